"""What of a conversation is trained on, derived from the chat template itself: each answer up to its end token.

The answer is what the template would have the model produce: it begins where the generation prompt ends and ends
with the token at which generation stops. A thought belongs to the answer, also where the generation prompt already
opens it (upstream's training of Hy3 does the same).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hynb.data.compared import UntraceableError, compared_spans
from hynb.data.contents import THOUGHT, change_of, has_answer, has_content, is_without_thought
from hynb.data.end_tokens import NoEndTokenError, end_of, end_token, trailing_tokens
from hynb.data.features import Features, features_of
from hynb.data.files import Conversation
from hynb.data.jinja_trace import TRAINING_TIME, Traced, TracedTemplate
from hynb.data.message_forms import THOUGHT_FIELDS, Messages, message_forms, plain_message
from hynb.data.placeholders import (
    Placeholders,
    Rendered,
    Shape,
    placeholder,
    placeholder_messages,
    placeholder_positions,
    shape_of,
    without_placeholders,
)
from hynb.data.template_tokens import TemplateTokenizer, answer_tags, broken_texts, pattern_of, token_texts
from hynb.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables of a template that are not taken from a record.
_OWN_ARGUMENTS = frozenset({"messages", "add_generation_prompt", "is_training", "documents"})
# The record's own time, for templates that write the present one by calling `strftime_now`.
TIME_ARGUMENT = "current_time"


class ChatTemplate:
    """The chat template of a tokenizer; `of` makes and caches one.

    Attributes:
        special, added: patterns of the texts of the tokenizer's special tokens, and of all its added tokens.
        special_texts, added_texts: these texts.
    """

    def __init__(self, tokenizer: TemplateTokenizer, source: str) -> None:
        try:
            self._template = TracedTemplate(source)
        except Exception as error:
            # Jinja and the compiler behind it raise others too: for long numbers, and for what is nested deeply.
            raise DataError(f"the chat template is not valid: {str(error) or type(error).__name__}") from None
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.special_texts = token_texts(tokenizer, special_only=True)
        self.added_texts = token_texts(tokenizer, special_only=False)
        self.special, self.added = pattern_of(self.special_texts), pattern_of(self.added_texts)
        eos = self._special_tokens.get("eos_token")
        self._eos = eos if isinstance(eos, str) else None
        self._asks_for_text = bool(re.search(r"arguments\s+is\s+(not\s+)?(string|mapping)", source))
        self._placeholders: dict[Shape, Placeholders] = {}
        self._generation_prompts: dict[tuple[Any, ...], str] = {}

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> ChatTemplate:
        """The template that applies: some tokenizers have another one for conversations with tools.

        Raises:
            DataError: the tokenizer has none, or it is not valid.
        """
        try:
            source = tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise DataError(f"the tokenizer has no chat template: {error}") from None
        return _template_of(tokenizer, source)

    @property
    def record_arguments(self) -> frozenset[str]:
        """Names that a record may set beside its messages, `tools` included."""
        known = self._template.arguments - _OWN_ARGUMENTS - self._special_tokens.keys()
        return known | {TIME_ARGUMENT} if self._template.writes_time else known

    def choices(self, name: str) -> list[str]:
        """Values of an argument that the template tells apart."""
        return sorted(self._template.choices.get(name, ()))

    @property
    def written_time(self) -> str:
        """The time that it has written where a record named none, so far in this process; empty if it has not."""
        return TRAINING_TIME.isoformat(" ") if self._template.has_written_time else ""

    @functools.cached_property
    def end_tokens(self) -> frozenset[str]:
        """Texts of the tokens that end an answer; empty if the template ends answers with none."""
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
        found: list[str] = []
        # Some templates end an answer that calls a tool with another token.
        for answer in ({"content": "…"}, {"content": "", "tool_calls": [call]}):
            exchange = [{"role": "user", "content": "…"}, {"role": "assistant", **answer}]
            try:
                traced = self._located(exchange, self._arguments({}), "chat template")
            except DataError:
                continue
            span = traced.spans[-1]
            # A template may end the last answer behind its loop.
            tails = [traced.text[span[0] : span[1]], traced.text[span[0] :]] if span else [traced.text]
            if text := end_token(tails, self.added, found, self._eos):
                found.append(text)
        return frozenset([*found, *([self._eos] if found and self._eos else [])])

    @functools.cached_property
    def _takes_text_arguments(self) -> bool:
        """Whether it renders a tool call's arguments that are a JSON text; one that asks may leave them out."""
        if not self._asks_for_text:
            return False
        mark = placeholder(0)
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": mark})}}
        exchange = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            return mark in self._template(exchange, self._with_time(self._arguments({}), "")).text
        except Exception:
            # Of any kind, as in `_trace`.
            return False

    @functools.cached_property
    def never_ends(self) -> bool:
        """Whether it ends no answer in plain text, so that conversations that end with one cannot be trained on."""
        exchange = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
        for system in ([], [{"role": "system", "content": "…"}]):
            try:
                self._render_traced([*system, *exchange], {}, "chat template")
            except NoEndTokenError:
                return True
            except DataError:
                continue
            return False
        return False

    def render(self, conversation: Conversation, *, allow_special_tokens: bool = False) -> Rendered:
        """The text of a conversation and what of it is trained on.

        Args:
            allow_special_tokens: text in a message that spells a special token becomes the token.

        Raises:
            DataError: the template refuses the conversation, changes a message, or ends an answer with no end token.
        """
        messages = [plain_message(message) for message in conversation.messages]
        arguments = conversation.arguments
        if not allow_special_tokens:
            messages = [self._broken_message(message) for message in messages]
            arguments = broken_texts(arguments, self.special)
        if not arguments and self.is_simple(messages):
            return self.placeholders(messages, conversation.source).fill(messages)
        return self._render_traced(messages, arguments, conversation.source)

    def prompt(self, messages: Messages, arguments: Mapping[str, Any], *, source: str = "prompt") -> str:
        """The text after which the model writes the next answer, for generation.

        Raises:
            DataError: the template refuses the messages.
        """
        plain = [self._broken_message(plain_message(message)) for message in messages]
        given = {**self._special_tokens, "tools": None, "documents": None}
        given |= broken_texts(dict(arguments), self.special)
        if self._template.writes_time and not given.get(TIME_ARGUMENT):
            given[TIME_ARGUMENT] = datetime.now().isoformat()
        return self._trace(plain, {**given, "add_generation_prompt": True}, source).text

    def shortened_turns(self, conversation: Conversation) -> list[int]:
        """Indices of answers that the template renders in another way than if they were the last message."""
        messages = conversation.messages
        answers = sum(message["role"] == "assistant" for message in messages)
        plain = [plain_message(message) for message in messages]
        if answers < 2 or (not conversation.arguments and self.is_simple(plain)):
            return []
        whole, _ = self.rendered_turns(messages, conversation)
        found = []
        for index, message in enumerate(messages[:-1]):
            # With this switch the template may write an empty thought in the last answer alone.
            may_be = "enable_thinking" in conversation.arguments or self._may_be_shortened(message)
            if message["role"] == "assistant" and may_be:
                alone = self.rendered_turns(messages[: index + 1], conversation)[0][index]
                if (whole[index] or "").strip() != (alone or "").strip():
                    found.append(index)
        return found

    def _may_be_shortened(self, message: Mapping[str, Any]) -> bool:
        """Whether an answer has a thought, or a text that the template looks for."""
        content = message.get("content") or ""
        if any(message.get(name) for name in THOUGHT_FIELDS) or THOUGHT.search(content):
            return True
        return any(text in content for text in self._template.sought if text.strip())

    def features(self) -> Features:
        """What the template can render, tried on small conversations."""

        def render(messages: Messages, given: Mapping[str, Any]) -> str:
            return self._trace(messages, self._arguments(given), "chat template").text

        names = sorted(self.record_arguments - {"tools"})
        return features_of(render, arguments=tuple(names), end_tokens=tuple(sorted(self.end_tokens)))

    def rendering(self, conversation: Conversation) -> str:
        """The text up to the end of the last answer: on what follows it no answer depends."""
        messages = [plain_message(message) for message in conversation.messages]
        try:
            traced = self._located(messages, self._arguments(conversation.arguments), conversation.source)
        except DataError:
            return ""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        span = traced.spans[answers[-1]] if answers else None
        if span is None:
            return traced.text
        try:
            return traced.text[: self._end(traced, answers[-1], span[0], conversation.source)]
        except DataError:
            return traced.text[: span[1]]

    def asked(self, conversation: Conversation, index: int) -> tuple[str, str]:
        """What a record's arguments have the model continue for an answer, and the text that is trained as that.

        Args:
            index: the answer's, of the messages.

        Raises:
            DataError: the template refuses the messages.
        """
        messages = [plain_message(message) for message in conversation.messages[: index + 1]]
        arguments, source = self._arguments(conversation.arguments), conversation.source
        prompt = self._trace(messages[:-1], {**arguments, "add_generation_prompt": True}, source).text
        return prompt, self._trace(messages, arguments, source).text

    def rendered_turns(self, messages: Messages, conversation: Conversation) -> tuple[list[str | None], str]:
        """What the template writes for each message, and the whole text.

        Raises:
            DataError: the template refuses the messages.
        """
        plain = [plain_message(message) for message in messages]
        traced = self._located(plain, self._arguments(conversation.arguments), conversation.source)
        return [traced.text[span[0] : span[1]] if span else None for span in traced.spans], traced.text

    def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        own = {"tools": None, "documents": None, "add_generation_prompt": False}
        training = {"is_training": True} if "is_training" in self._template.arguments else {}
        return {**self._special_tokens, **own, **training, **given}

    def _trace(self, messages: Messages, arguments: Mapping[str, Any], source: str) -> Traced:
        """Renders messages in the first of their forms that the template takes."""
        arguments = self._with_time(arguments, source)
        problem: Exception | None = None
        for form in message_forms(messages, parse_first=not self._takes_text_arguments):
            try:
                return self._template(form, arguments)
            except Exception as error:
                # A template raises exceptions of any kind for a conversation that it does not support.
                problem = problem or error
        reason = str(problem) or type(problem).__name__
        raise DataError(f"{source}: the chat template refuses the conversation: {reason}") from problem

    def _with_time(self, arguments: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """Arguments with a `strftime_now` that has the record's time, if it names one and the template writes one."""
        if not self._template.writes_time or not (time := arguments.get(TIME_ARGUMENT)):
            return arguments
        try:
            return {**arguments, "strftime_now": datetime.fromisoformat(time).strftime}
        except (TypeError, ValueError):
            raise DataError(
                f'{source}: {TIME_ARGUMENT} = {time!r}: must be a time such as "{TRAINING_TIME.isoformat(" ")}"'
            ) from None

    def _located(self, messages: Messages, arguments: Mapping[str, Any], source: str) -> Traced:
        """The same, with the part of each message also where the template writes it outside of a loop."""
        traced = self._trace(messages, arguments, source)
        lost = [
            message
            for message, span in zip(messages, traced.spans, strict=True)
            if span is None and message["role"] != "system"
        ]
        if not lost:
            return traced
        try:
            spans = compared_spans(
                traced.text, messages, lambda part: self._trace(part, arguments, source).text, self.special
            )
        except UntraceableError as error:
            answers = [
                span for message, span in zip(messages, traced.spans, strict=True) if message["role"] == "assistant"
            ]
            # Other messages may be written outside of a loop, unless that is where an answer is written too.
            apart = not any(
                message.get("content") and has_content(traced.text[span[0] : span[1]], message["content"])
                for message in lost
                for span in answers
                if span
            )
            if all(answers) and apart:
                return traced
            raise DataError(f"{source}: {error}") from None
        return Traced(text=traced.text, spans=spans)

    def _render_traced(self, messages: Messages, given: Mapping[str, Any], source: str) -> Rendered:
        arguments = self._arguments(given)
        traced = self._located(messages, arguments, source)
        self._check_system_messages(messages, traced, arguments, source)
        trained: list[tuple[int, int]] = []
        problems: dict[int, str] = {}
        for index, message in enumerate(messages):
            content, segment, span = message.get("content") or "", traced.segment(index), traced.spans[index]
            if message["role"] != "assistant":
                if not has_content(segment, content):
                    raise DataError(_changed(message, index, segment, source))
                continue
            if span is None:
                raise DataError(f"{source}: the chat template leaves out message {index + 1}")
            is_short = not has_answer(segment, content)
            if is_short:
                # An earlier answer may be shortened by design; `shortened_turns` finds it.
                alone = self._located(messages[: index + 1], arguments, source).segment(index)
                if index + 1 == len(messages) or not has_answer(alone, content):
                    raise DataError(_changed(message, index, alone, source))
            start = span[0] + len(self._header(messages, index, traced, arguments, source))
            end, problem = self._end_or_problem(messages, traced, index, start, source)
            if problem:
                problems[len(trained)] = problem
            elif is_short and not is_without_thought(
                self.added.sub("", traced.text[start:end]), content, has_calls=bool(message.get("tool_calls"))
            ):
                problems[len(trained)] = (
                    f"the chat template cuts the answer of message {index + 1}, and not only its thought, because "
                    "other messages follow it: remove the messages behind it, or set split_turns: true, which makes "
                    "a sample of each answer, or train_on_turns: last"
                )
            trained.append((start, end))
        written = [span for span in traced.spans if span]
        if any(one[1] > other[0] for one, other in itertools.pairwise(written)):
            raise DataError(f"{source}: the chat template writes messages in another order than they have")
        return Rendered(text=traced.text, trained=tuple(trained), turns=traced.spans, problems=problems)

    def _check_system_messages(
        self, messages: Messages, traced: Traced, arguments: Mapping[str, Any], source: str
    ) -> None:
        """Refuses system messages that are lost, moved before other messages, or not told apart from them.

        Raises:
            DataError: naming the message.
        """
        indices = [index for index, message in enumerate(messages) if message["role"] == "system"]
        hoisted = [index for index in indices if traced.spans[index] is None and messages[index].get("content")]
        for index in indices:
            if index and (span := traced.spans[index]) and _is_bare(traced.text, span, messages[index]):
                raise DataError(
                    f"{source}: the chat template writes the system's message {index + 1} without a beginning or an "
                    "end: join it with the first one, or write it as the user's"
                )
        if not hoisted:
            return
        marked = [
            {**message, "content": placeholder(index)} if index in hoisted else message
            for index, message in enumerate(messages)
        ]
        try:
            changed = self._trace(marked, arguments, source)
        except DataError:
            # It looks at their texts; whether these are rendered is checked as for other messages.
            return
        position = placeholder_positions(changed.text)
        for index in hoisted:
            if index not in position:
                advice = ": join the system messages into one" if len(indices) > 1 else ""
                raise DataError(f"{source}: the chat template leaves out the system's message {index + 1}{advice}")
            others = [changed.spans[number] for number in range(index)]
            if any(span and span[1] > position[index] for span in others):
                raise DataError(
                    f"{source}: the chat template writes the system's message {index + 1} before the messages that "
                    "it follows: put it first, or write it as the user's"
                )

    def _end_or_problem(
        self, messages: Messages, traced: Traced, index: int, start: int, source: str
    ) -> tuple[int, str]:
        """The end of an answer's end token; of an earlier answer without one, its end and what is wrong with it.

        Raises:
            NoEndTokenError: the last answer has none.
        """
        span = traced.spans[index]
        assert span is not None
        try:
            return self._end(traced, index, start, source), ""
        except NoEndTokenError:
            if not any(message["role"] == "assistant" for message in messages[index + 1 :]):
                raise
        tokens = [match[0] for match in trailing_tokens(traced.text[start : span[1]], self.added)]
        ends = f"with {tokens[-1]!r}" if tokens else "without an end token"
        return span[1], (
            f"the chat template ends the answer of message {index + 1} {ends}, and the last answer of a conversation "
            f"with {' or '.join(map(repr, sorted(self.end_tokens)))}, at which generation stops: set split_turns: "
            "true or train_on_turns: last, which train on last answers alone"
        )

    def _header(
        self, messages: Messages, index: int, traced: Traced, arguments: Mapping[str, Any], source: str
    ) -> str:
        """What the template writes for an answer before what the model produces: the generation prompt.

        A template that ignores add_generation_prompt leaves all of it to the model.
        """
        span = traced.spans[index]
        assert span is not None
        segment = traced.text[span[0] : span[1]]
        if all(message["role"] == "system" for message in messages[:index]):
            return self._without_thought(self._opening_prompt(messages, index, segment, arguments, source), segment)
        roles = tuple(message["role"] for message in messages[max(0, index - 2) : index])
        rest = {name: value for name, value in arguments.items() if name not in ("tools", "documents")}
        key = (index == 0, roles, bool(arguments.get("tools")), json.dumps(rest, sort_keys=True, default=str))
        header = self._without_thought(self._generation_prompts.get(key, ""), segment)
        if header or "add_generation_prompt" not in self._template.arguments:
            return header
        # Others of the same key may have another one: what they do not share with the answer is found anew.
        prompt = self._generation_prompt(messages[:index], traced.text[: span[0]], segment, arguments, source)
        self._generation_prompts[key] = prompt
        return self._without_thought(prompt, segment)

    def _without_thought(self, prompt: str, segment: str) -> str:
        """What a generation prompt and an answer have in common, but for a thought that the prompt begins."""
        header = _common(prompt, segment)
        # The prompt may open a thought, or close one, which the answer has or has not: the two may agree in the first
        # characters of a token, such as <think> and <tool_calls>.
        for match in (*THOUGHT.finditer(prompt), *self.added.finditer(prompt)):
            is_thought = match[0].startswith("<think")
            if match.start() < len(header) and (is_thought or len(header) < match.end()):
                header = header[: match.start()]
        return header

    def _opening_prompt(
        self, messages: Messages, index: int, segment: str, arguments: Mapping[str, Any], source: str
    ) -> str:
        """The generation prompt of an answer that no message of the user comes before.

        Raises:
            DataError: the template does not write such an answer as it writes others.
        """
        asked = [*messages[:index], {"role": "user", "content": "…"}]
        before = self._trace(asked, arguments, source).text
        prompt = self._generation_prompt(asked, before, segment, arguments, source)
        thought = THOUGHT.search(prompt)
        if not prompt or not segment.startswith(prompt[: thought.start()] if thought else prompt):
            raise DataError(
                f"{source}: message {index + 1}: the chat template has no beginning for an assistant's message that "
                "follows no message of the user: put the user's before it, or remove it"
            )
        return prompt

    def _generation_prompt(
        self, messages: Messages, before: str, segment: str, arguments: Mapping[str, Any], source: str
    ) -> str:
        """What add_generation_prompt adds to messages; empty if nothing, or if they alone are refused.

        Args:
            before: what the template writes before the answer.
            segment: what it writes for the answer.
        """
        try:
            prompt = self._trace(messages, {**arguments, "add_generation_prompt": True}, source).text
            without = self._trace(messages, arguments, source).text
        except DataError:
            return ""
        # The template may write text behind the messages, or earlier answers differently where no message follows.
        added = [prompt[len(text) :] for text in (before, without) if prompt.startswith(text)]
        if found := next((text for text in added if self._without_thought(text, segment)), ""):
            return found
        # Or, as the end of a tool's result, with the messages where they are the last and with the answer else.
        last = added[-1] if added else ""
        overlap = segment[: segment.find(last) + len(last)] if last and last in segment else ""
        return overlap if overlap and prompt.endswith(overlap) else next((text for text in added if text), "")

    def _end(self, traced: Traced, index: int, start: int, source: str) -> int:
        """The end of an answer's end token.

        Raises:
            DataError: the template writes none, so that the model would never learn to stop.
        """
        span = traced.spans[index]
        assert span is not None
        tails = [traced.text[start : span[1]]]
        if index + 1 == len(traced.spans):
            tails.append(traced.text[start:])
        for tail in tails:
            if (end := end_of(tail, self.added, self.end_tokens)) is not None:
                return start + end
        raise NoEndTokenError(
            f"{source}: the chat template writes no end token after message {index + 1}, so the model would not "
            "learn to stop. Use the template of an instruct model, or one that takes is_training"
        )

    @functools.cached_property
    def _tags(self) -> frozenset[str]:
        """Special tokens that are an answer's form: those around a thought, and those that it looks for in texts."""
        others = {value for value in self._special_tokens.values() if isinstance(value, str)} | self.end_tokens
        return answer_tags(self.special_texts - others, self._template.sought)

    def _broken_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message whose texts spell no special token but, in an answer, those that the template looks for there."""
        broken = {**broken_texts(message, self.special), "role": message["role"]}
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str) and broken["content"] != content:
            broken["content"] = broken_texts(content, self.special, keep=self._tags)
        return broken

    def is_simple(self, messages: Messages) -> bool:
        """Whether messages differ from placeholders in nothing that the template looks at."""
        return not self._template.looks_at(messages)

    def placeholders(self, messages: Messages, source: str) -> Placeholders:
        """The rendering of placeholders in place of the contents of messages for which `is_simple` is true.

        Raises:
            DataError: as `render`.
        """
        shape = shape_of(messages)
        if shape not in self._placeholders:
            try:
                rendered = self._render_traced(placeholder_messages(shape), {}, source)
                self._placeholders[shape] = Placeholders(rendered, shape, source)
            except DataError as error:
                # Name what is wrong with this conversation, not with its placeholders.
                self._render_traced(messages, {}, source)
                raise DataError(without_placeholders(str(error))) from error
        return self._placeholders[shape]


@functools.lru_cache(maxsize=16)
def _template_of(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer, source)


def _common(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])  # noqa: RUF071  works on text, not only on paths


def _is_bare(text: str, span: tuple[int, int], message: Mapping[str, Any]) -> bool:
    """Whether a template writes nothing for a message but its content."""
    return text[span[0] : span[1]].strip() == message["content"].strip()


def _changed(message: Mapping[str, Any], index: int, text: str, source: str) -> str:
    return f"{source}: the chat template changes message {index + 1}: {change_of(message, text)}"
