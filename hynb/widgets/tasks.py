"""The tasks of the notebooks that need torch or transformers; they run in a process of their own (worker.py)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hynb.errors import DataError, MergeError

_REPORT_SECONDS = 0.25


@dataclass(kw_only=True, frozen=True)
class Progress:
    """How far a task has come.

    Args:
        done, total: in the same unit.
        text: what is being worked on.
    """

    done: float
    total: float
    text: str


Part = Literal["question", "thought", "answer", "end"]


@dataclass(kw_only=True, frozen=True)
class Piece:
    """A piece of an answer that is being written; an answer begins with its question and closes with its end.

    Args:
        model, question: their numbers, from 0.
        part: what the text belongs to; the text of an end is empty, or says why the answer is not complete.
    """

    model: int
    question: int
    part: Part
    text: str


Report = Callable[[Progress | Piece], None]


@dataclass(kw_only=True, frozen=True)
class Preview:
    """One conversation as the model sees it.

    Args:
        source: file and line.
        text, html: the tokens, with those that are trained on marked; `html` is escaped.
    """

    source: str
    text: str
    html: str
    tokens: int
    trained_tokens: int


@dataclass(kw_only=True, frozen=True)
class CheckedData:
    """The files of one data parameter.

    Args:
        text: the report.
        problems: one message per invalid line.
        samples: number of samples that are left.
    """

    text: str
    problems: list[str]
    samples: int


@dataclass(kw_only=True, frozen=True)
class AskedQuestion:
    """One question.

    Args:
        expected: the answer in the data; empty if there is none.
        answers: one of each model.
    """

    question: str
    expected: str
    answers: list[str]


@dataclass(kw_only=True, frozen=True)
class MergedModel:
    """What a merge wrote, as in `hynb.merge.write.MergeResult`.

    Args:
        found: an earlier merge of the same base and adapter wrote it.
    """

    found: bool
    output_path: str
    tensors_changed: int
    tensors_copied: int
    weight_bytes: int
    largest_change: float
    mean_change: float
    seconds: float


def preview(report: Report, config: dict[str, Any], count: int) -> list[Preview]:
    """The first conversations of the training data; lines that a run would leave out are passed over.

    Args:
        config: values of a Config.
        count: number of conversations.
    """
    from hynb.config import Config
    from hynb.data import IGNORED, ChatDataset, as_html, as_text, encode
    from hynb.runs import find_base
    from hynb.train import label_options, load_tokenizer

    chosen = Config(**config)
    assert chosen.train_data_file is not None
    tokenizer, _ = load_tokenizer(chosen, find_base(chosen))
    options = label_options(chosen)
    dataset = ChatDataset(chosen.train_data_file, tokenizer, chosen.max_seq_length, options=options)
    shown: list[Preview] = []
    for index in range(len(dataset)):
        if len(shown) == count:
            break
        try:
            conversation = dataset.conversation(index)
        except DataError:
            if chosen.on_bad_sample == "stop":
                raise
            continue
        encoded = encode(conversation, tokenizer, chosen.max_seq_length, options)
        item = Preview(
            source=conversation.source,
            text=as_text(conversation, tokenizer, chosen.max_seq_length, options=options),
            html=as_html(conversation, tokenizer, chosen.max_seq_length, options=options),
            tokens=len(encoded["input_ids"]),
            trained_tokens=sum(label != IGNORED for label in encoded["labels"]),
        )
        shown.append(item)
    return shown


def check_data(report: Report, config: dict[str, Any]) -> list[CheckedData]:
    """Every line of the training and of the evaluation data.

    Args:
        config: values of a Config.
    """
    from hynb.config import Config
    from hynb.runs import find_base
    from hynb.train import check_files, load_tokenizer

    chosen = Config(**config)
    tokenizer, _ = load_tokenizer(chosen, find_base(chosen))
    names = [name for name in ("train_data_file", "eval_data_file") if getattr(chosen, name) is not None]
    throttled = _throttled(report)
    checked: list[CheckedData] = []
    for number, name in enumerate(names):

        def show(done: int, total: int, number: int = number, name: str = name) -> None:
            text = f"{name}, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
            throttled(Progress(done=number + done / max(total, 1), total=len(names), text=text))

        found = check_files(chosen, tokenizer, name, on_bad_sample="report", progress=show)
        text = found.text(
            batch_size=chosen.per_device_train_batch_size, special_tokens_allowed=chosen.allow_special_tokens_in_text
        )
        if chosen.split_long_samples and found.cut_samples:
            text += "\nsplit_long_samples is set: longer samples are divided, and nothing is truncated"
        checked.append(CheckedData(text=text, problems=found.problems(), samples=found.samples))
    return checked


def ask(
    report: Report, folders: Sequence[str], questions: str, count: int, max_new_tokens: int
) -> list[AskedQuestion]:
    """The greedy answers of several models to the same questions, reported while they are written.

    Args:
        folders: of models, or of LoRA adapters, each of which is asked together with its base.
        questions: JSONL file of conversations.
        count: number of questions, from the beginning of the file.
        max_new_tokens: length of the longest answer.
    """
    from hynb.data import read_conversations
    from hynb.generate import AnsweringModel, question_of, shown_answer, shown_message

    conversations = list(itertools.islice(read_conversations(questions), count))
    asked = [question_of(conversation) for conversation in conversations]
    by_model: list[list[str]] = []
    for number, folder in enumerate(folders):
        report(Progress(done=number, total=len(folders), text=Path(folder).name))
        model = AnsweringModel(folder)
        texts: list[str] = []
        for index, question in enumerate(asked):

            def show(part: Part, text: str, number: int = number, index: int = index) -> None:
                report(Piece(model=number, question=index, part=part, text=text))

            show("question", question.messages[-1]["content"] or "")
            answer = model.stream(question, max_new_tokens=max_new_tokens, show=show)
            show("end", "" if answer.ended else f"no end token within {max_new_tokens} tokens")
            texts.append(shown_answer(answer))
        by_model.append(texts)
        # The next model is loaded when this one's memory is free.
        del model
    return [
        AskedQuestion(
            question=question.messages[-1]["content"] or "",
            expected=shown_message(conversation.messages[-1]),
            answers=[texts[index] for texts in by_model],
        )
        for index, (question, conversation) in enumerate(zip(asked, conversations, strict=True))
    ]


def merge(
    report: Report,
    base_model_path: str,
    adapter_model_path: str,
    output_path: str,
    save_dtype: str,
    overwrite: bool,
) -> MergedModel:
    """Merges an adapter, unless the output folder already has the merge of the same base and adapter.

    Raises:
        MergeError: as `hynb.merge.merge_lora`, or the output folder has other content.
    """
    from hynb.merge import find_merge, merge_lora

    found = find_merge(
        base_model_path=base_model_path,
        adapter_model_path=adapter_model_path,
        output_path=output_path,
        save_dtype=save_dtype,
    )
    if found is not None:
        return _merged_model(found, found=True)
    if Path(output_path).exists() and not overwrite:
        raise MergeError(
            f"output_path = {output_path}: already exists and is not the result of this merge; choose another path, "
            "or replace the folder with overwrite_output_path"
        )
    throttled = _throttled(report)
    result = merge_lora(
        base_model_path=base_model_path,
        adapter_model_path=adapter_model_path,
        output_path=output_path,
        save_dtype=save_dtype,
        overwrite=overwrite,
        progress=lambda item: throttled(Progress(done=item.done_bytes, total=item.total_bytes, text=item.shard)),
    )
    return _merged_model(vars(result), found=False)


def verify(report: Report, output_path: str) -> int:
    """Compares every tensor of a merged folder; returns the number of tensors."""
    from hynb.merge import verify_merge

    throttled = _throttled(report)

    def show(done: int, total: int) -> None:
        throttled(Progress(done=done, total=total, text=f"tensor {done} of {total}"))

    return verify_merge(output_path, progress=show)


TASKS: Mapping[str, Callable[..., Any]] = {task.__name__: task for task in (preview, check_data, ask, merge, verify)}


def _merged_model(values: Mapping[str, Any], *, found: bool) -> MergedModel:
    names = MergedModel.__dataclass_fields__.keys() - {"found"}
    return MergedModel(found=found, **{name: values[name] for name in names})


def _throttled(report: Report) -> Callable[[Progress], None]:
    """Passes on a few reports per second, and in any case the last one."""
    reported_at = 0.0

    def throttled(progress: Progress) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if progress.done == progress.total or now - reported_at > _REPORT_SECONDS:
            reported_at = now
            report(progress)

    return throttled
