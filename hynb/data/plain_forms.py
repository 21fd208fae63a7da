"""Conversations of plain messages, of which the template decides all but the contents: prepared without rendering."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hynb.data.contents import TEXT_NOTE, THOUGHT
from hynb.data.files import Conversation
from hynb.data.message_forms import THOUGHT_FIELDS, Messages
from hynb.data.pieces import LabelOptions, Prepared, Segment, pieces, special_ids, text_ids, trained_spans
from hynb.data.placeholders import Shape, Slot, parts, placeholder_messages, shape_of
from hynb.data.template import ChatTemplate
from hynb.errors import DataError

# Keys of a record that say something about the conversation, whether or not a template reads them.
MEANINGFUL = frozenset(
    (
        *("tools", "reasoning_effort", "enable_thinking", "documents", "system", *THOUGHT_FIELDS),
        *("image", "images", "video", "videos", "audio", "audios"),
    )
)


@dataclass(kw_only=True, frozen=True, slots=True)
class _Form:
    """What is known of all conversations of one shape.

    Args:
        segments: as in `Prepared`.
        texts: the parts of each text that is to be tokenised.
        writes_thought: whether the template writes a thought into an answer that has none.
    """

    segments: list[Segment]
    texts: list[Sequence[str | Slot]]
    writes_thought: bool


class PlainForms:
    """Prepares conversations from the rendering of placeholders, which is made once for each shape.

    Args:
        template: the tokenizer's, for conversations without tools.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, options: LabelOptions) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._options = options
        self._known = MEANINGFUL | template.record_arguments | {"chat_template_kwargs"}
        self._forms: dict[Shape, _Form | None] = {}
        texts = template.special_texts
        self._first_characters = tuple({text[0] for text in template.added_texts})
        # Otherwise one special token could begin within another one, and what is found would depend on the order.
        self._is_usable = not any(text[0] in other[1:] for text in texts for other in texts)

    def prepared(self, conversation: Conversation) -> Prepared | None:
        """What `prepare` returns; None for a conversation that has to be rendered for that."""
        messages = conversation.messages
        unknown = tuple(conversation.arguments)
        if not self._is_usable or (unknown and not self._known.isdisjoint(unknown)):
            return None
        if not self._template.is_simple(messages):
            return None
        shape = shape_of(messages)
        if shape not in self._forms:
            self._forms[shape] = self._form(shape, conversation)
        form = self._forms[shape]
        if form is None:
            return None
        texts = [
            "".join([part if isinstance(part, str) else part.text(messages) for part in text])
            if len(text) > 1 or isinstance(text[0], str)
            else text[0].text(messages)
            for text in form.texts
        ]
        if self._has_first_character(texts) and any(map(self._template.special.search, texts)):
            return None
        return Prepared(
            segments=form.segments,
            texts=texts,
            ignored=(),
            unknown=unknown,
            shortened=0,
            spelled=self._is_spelled(messages),
            special_tokens_allowed=self._options.allow_special_tokens_in_text,
            notes=(TEXT_NOTE,) if form.writes_thought and _has_thought(messages) else (),
        )

    def _has_first_character(self, texts: Sequence[str]) -> bool:
        for character in self._first_characters:
            for text in texts:
                if character in text:
                    return True
        return False

    def _is_spelled(self, messages: Messages) -> bool:
        contents = [message["content"] for message in messages]
        return self._has_first_character(contents) and any(map(self._template.added.search, contents))

    def _form(self, shape: Shape, conversation: Conversation) -> _Form | None:
        try:
            rendered = self._template.placeholders(conversation.messages, conversation.source).rendered
        except DataError:
            # Rendering the conversation itself raises it again, with its location.
            return None
        placeholders = conversation.replaced(messages=placeholder_messages(shape), arguments={})
        spans = trained_spans(placeholders, rendered, self._options)
        segments: list[Segment] = []
        texts: list[Sequence[str | Slot]] = []
        for piece in pieces(rendered.text, spans, self._template.special):
            found = list(parts(piece.text))
            if any(isinstance(part, Slot) for part in found):
                segments.append((None, piece.trained))
                texts.append(found)
                continue
            if piece.special:
                ids = array("I", special_ids(self._tokenizer, piece.text))
            else:
                allowed = self._options.allow_special_tokens_in_text
                ids = array("I", next(text_ids(self._tokenizer, [piece.text], allowed)))
            before, is_trained = segments[-1] if segments else (None, False)
            if before is not None and is_trained == piece.trained:
                segments.pop()
                ids = before + ids
            segments.append((ids, piece.trained))
        writes_thought = any(THOUGHT.search(rendered.text, *span) for span in rendered.trained)
        return _Form(segments=segments, texts=texts, writes_thought=writes_thought)


def _has_thought(messages: Messages) -> bool:
    return any(THOUGHT.search(message["content"]) for message in messages if message["role"] == "assistant")


@functools.lru_cache(maxsize=16)
def plain_forms(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, options: LabelOptions) -> PlainForms:
    """The forms of a tokenizer's template, made once."""
    return PlainForms(tokenizer, template, options)
