"""Answers of a model, or of an adapter with its base, to questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hynb.errors import DataError, ModelError
from hynb.generate.answer import Answer, AnswerStream, Part, make_answer, opens_thought
from hynb.runs import find_base

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from hynb.data import Conversation

Show = Callable[[Part, str], None]
_LARGEST_CHARACTER_BYTES = 4


@dataclass(kw_only=True, frozen=True)
class Question:
    """What a model is to answer.

    Args:
        messages: the last one is the user's, or the result of a tool.
        arguments: of the chat template, such as `tools` and `reasoning_effort`.
        source: its location as file:line.
    """

    messages: list[dict[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str = "question"


def question_of(conversation: Conversation, arguments: Mapping[str, Any] | None = None) -> Question:
    """The question that a conversation's last answer is for.

    Args:
        arguments: of the chat template; they override the record's.
    """
    given = {**conversation.arguments, **(arguments or {})}
    return Question(messages=list(conversation.messages[:-1]), arguments=given, source=conversation.source)


class AnsweringModel:
    """A model in evaluation mode with its tokenizer.

    Args:
        folder: a model, or a LoRA adapter, which is loaded together with its base.
        greedy: the most probable token each time; otherwise as the folder's generation_config.json samples.
        seed: of the sampling.

    Attributes:
        stops: ids at which generation ends: the template's end tokens, and those of generation_config.json.

    Raises:
        ModelError: the folder holds neither a model nor an adapter, or it cannot be loaded.
    """

    def __init__(self, folder: str | Path, *, greedy: bool = True, seed: int = 0) -> None:
        from transformers import set_seed

        from hynb.data import stop_token_ids

        self.folder = Path(folder).expanduser().absolute()
        self.tokenizer = load_tokenizer(self.folder)
        self._model = _load_model(self.folder)
        own: GenerationConfig = self._model.generation_config
        ids = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        stops = [*stop_token_ids(self.tokenizer), *(item for item in ids if isinstance(item, int))]
        self.stops = list(dict.fromkeys(stops))
        # Assigned and not passed: transformers 5.23 fills the gaps of a passed config from the model's own.
        self._model.generation_config = _generation_config(own, self.stops, greedy=greedy)
        set_seed(seed)

    def answers(self, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int = 1) -> Iterator[Answer]:
        """The answers in the order of the questions.

        Args:
            max_new_tokens: longest output, in tokens.
            batch_size: questions answered at the same time, padded on the left.

        Raises:
            DataError: the chat template refuses a question, or does not read one of its arguments.
        """
        for first in range(0, len(questions), batch_size):
            yield from self._batch(questions[first : first + batch_size], max_new_tokens)

    def stream(self, question: Question, *, max_new_tokens: int, show: Show) -> Answer:
        """One answer, whose parts are shown while it is written.

        Args:
            show: called with `thought` or `answer`, and a piece of its text.

        Raises:
            DataError: as `answers`.
        """
        from hynb.data import ChatTemplate, render_prompt

        template = ChatTemplate.of(self.tokenizer, question.arguments.get("tools"))
        prompt = self.tokenizer.decode(render_prompt(question.messages, self.tokenizer, question.arguments))
        assert isinstance(prompt, str)
        parts = AnswerStream(template.special, opened=opens_thought(prompt))

        def show_parts(text: str, last: bool) -> None:
            for part, piece in parts.feed(text, last=last):
                show(part, piece)

        streamer = _Streamer(self.tokenizer, show_parts)
        return self._batch([question], max_new_tokens, streamer=streamer)[0]

    def expected(self, conversation: Conversation) -> Answer:
        """A conversation's last answer, tool calls included, as the template would have the model write it.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        from hynb.data import ChatTemplate, trained_text

        raw = trained_text(conversation, self.tokenizer)
        template = ChatTemplate.of(self.tokenizer, conversation.arguments.get("tools"))
        return make_answer(template.special.sub("", raw), ended=True)

    def _batch(self, questions: Sequence[Question], max_new_tokens: int, streamer: Any = None) -> list[Answer]:
        import torch

        from hynb.data import ChatTemplate, render_prompt

        prompts = []
        for question in questions:
            check_question(question, self.tokenizer)
            prompts.append(render_prompt(question.messages, self.tokenizer, question.arguments))
        length = max(map(len, prompts))
        padded = [[self.stops[0]] * (length - len(ids)) + ids for ids in prompts]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor(padded, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
            )
        found = []
        for question, prompt, row in zip(questions, prompts, output[:, length:].tolist(), strict=True):
            end = next((index for index, token_id in enumerate(row) if token_id in self.stops), None)
            raw, before = self.tokenizer.decode(row[:end]), self.tokenizer.decode(prompt)
            assert isinstance(raw, str) and isinstance(before, str)
            special = ChatTemplate.of(self.tokenizer, question.arguments.get("tools")).special
            found.append(
                make_answer(special.sub("", raw).strip(), ended=end is not None, opened=opens_thought(before))
            )
        return found


class _Streamer:
    """Hands on an output's text with each token, as `generate` of transformers takes a streamer.

    transformers' TextStreamer (5.23) waits for the next space, which some languages and code do not have.

    Args:
        show: called with a piece of text, and whether it is the last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str, bool], None]) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._held: list[int] = []
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, and then each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._held += value.reshape(-1).tolist()
        text = self._text()
        # The end of a character may be missing in a byte-level vocabulary.
        if not text.endswith("\ufffd") or len(self._held) >= _LARGEST_CHARACTER_BYTES:
            self._held = []
            self._show(text, False)

    def end(self) -> None:
        """Takes the end of the output."""
        self._show(self._text(), True)

    def _text(self) -> str:
        text = self._tokenizer.decode(self._held)
        assert isinstance(text, str)
        return text


def check_question(question: Question, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the chat template reads the question's tools and reasoning effort.

    Raises:
        DataError: it does not, so that the model would answer as if they were not there.
    """
    from hynb.data import ChatTemplate

    known = ChatTemplate.of(tokenizer, question.arguments.get("tools")).record_arguments
    for name in ("tools", "reasoning_effort"):
        if question.arguments.get(name) is not None and name not in known:
            reads = ", ".join(sorted(known)) or "none"
            raise DataError(
                f"{question.source}: {name}: the chat template of {tokenizer.name_or_path} does not read it; "
                f"arguments that it reads: {reads}"
            )


def answers(
    folder: str | Path, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int = 1
) -> Iterator[Answer]:
    """A model's greedy answers, in the order of the questions.

    Args:
        folder: a model, or a LoRA adapter, which is loaded together with its base.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions answered at the same time, padded on the left.

    Raises:
        ModelError: the folder holds neither a model nor an adapter, or the adapter's base is missing.
        DataError: the chat template refuses a question.
    """
    yield from AnsweringModel(folder).answers(questions, max_new_tokens=max_new_tokens, batch_size=batch_size)


def _generation_config(own: GenerationConfig, stops: list[int], *, greedy: bool) -> GenerationConfig:
    from transformers import GenerationConfig

    ends = {"eos_token_id": stops, "pad_token_id": stops[0]}
    if greedy:
        return GenerationConfig(do_sample=False, **ends)
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: getattr(own, name) for name in names if getattr(own, name, None) is not None}
    return GenerationConfig(**values, **ends)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or an adapter; an adapter without one has its base's.

    Raises:
        ModelError: the folder holds neither a model nor an adapter, or it has no tokenizer.
    """
    from hynb.data import load_tokenizer_folder

    base = find_base(folder)
    own = folder if (folder / "tokenizer_config.json").is_file() else base
    return load_tokenizer_folder(own)


def _load_model(folder: Path) -> Any:
    """The model of a folder in evaluation mode, with its adapter where it is one."""
    import torch
    from transformers import AutoModelForCausalLM

    base = find_base(folder)
    # On a CPU float32 is the fast type, and rounding cannot change an answer.
    options = {"device_map": "auto", "dtype": "auto"} if torch.cuda.is_available() else {"dtype": "float32"}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{base}: cannot be loaded: {error}") from error
    if base != folder:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval()
