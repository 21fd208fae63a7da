"""Greedy answers of models to the same questions: `python -m hynb.generate --questions FILE FOLDER [FOLDER …]`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hynb.errors import HynbError
from hynb.runs import find_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answers(
    folder: str | Path,
    questions: Sequence[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
) -> Iterator[str]:
    """A model's greedy answers, in the order of the questions.

    Args:
        folder: a model, or a LoRA adapter, which is loaded together with its base.
        questions: conversations that end with the user's message.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions answered at the same time, padded on the left.

    Raises:
        ModelError: the folder holds neither a model nor an adapter, or the adapter's base is missing.
    """
    import torch

    from hynb.data import render_prompt, stop_token_ids

    model, tokenizer = _load(Path(folder).expanduser().absolute())
    stops = stop_token_ids(tokenizer)
    for first in range(0, len(questions), batch_size):
        prompts = [render_prompt(messages, tokenizer) for messages in questions[first : first + batch_size]]
        length = max(map(len, prompts))
        padded = [[stops[0]] * (length - len(ids)) + ids for ids in prompts]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        for ids in output[:, length:]:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert isinstance(text, str)
            yield text.strip()


def split_answer(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A conversation up to its last user message, and the answer that follows; the answer may be empty."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    answer = messages[last + 1]["content"] if last + 1 < len(messages) else ""
    return list(messages[: last + 1]), answer


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each question with every model's answer; returns the exit code."""
    from hynb.data import read_conversations

    parser = argparse.ArgumentParser(prog="python -m hynb.generate", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a model or a LoRA adapter")
    parser.add_argument("--questions", required=True, help="JSONL file of conversations")
    parser.add_argument("--count", type=int, default=3, help="number of questions, from the start of the file")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    args = parser.parse_args(argv)
    try:
        conversations = itertools.islice(read_conversations(args.questions), args.count)
        questions = [split_answer(conversation.messages)[0] for conversation in conversations]
        for folder in args.folders:
            print(f"== {folder}")
            texts = answers(folder, questions, max_new_tokens=args.max_new_tokens)
            for messages, text in zip(questions, texts, strict=True):
                print(f"{messages[-1]['content']}\n-> {text}", flush=True)
    except HynbError as error:
        print(f"hynb: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _load(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of a folder in evaluation mode, with its adapter where it is one, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes

    base = find_base(folder)
    # On a CPU float32 is the fast type, and rounding cannot change an answer.
    options = {"device_map": "auto", "dtype": "auto"} if torch.cuda.is_available() else {"dtype": "float32"}
    model: Any = AutoModelForCausalLM.from_pretrained(base, **options)
    if base != folder:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else base
    return model.eval(), AutoTokenizer.from_pretrained(tokenizer_folder)
