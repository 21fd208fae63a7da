"""Asks models the same questions: `python -m hynb.generate.answers --questions FILE FOLDER [FOLDER …]`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hynb.errors import HynbError, ModelError
from hynb.files import read_json


def answers(
    folder: str | Path,
    questions: Sequence[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
) -> Iterator[str]:
    """A model's greedy answers, one after the other.

    Args:
        folder: a model's, or a LoRA adapter's, which is then asked together with its base.
        questions: conversations that end with the user's message.
        max_new_tokens: the longest answer.
        batch_size: questions answered at once, padded on the left.

    Raises:
        ModelError: the folder holds neither, or an adapter whose base is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
    from hynb.data import render_prompt, stop_token_ids

    folder = Path(folder).expanduser().absolute()
    base = base_of(folder)
    # On a CPU float32 is the fast type, and rounding can't turn one answer into another.
    options = {"device_map": "auto", "dtype": "auto"} if torch.cuda.is_available() else {"dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(base or folder, **options)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else base or folder
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stops = stop_token_ids(tokenizer)
    for first in range(0, len(questions), batch_size):
        prompts = [render_prompt(messages, tokenizer) for messages in questions[first : first + batch_size]]
        longest = max(map(len, prompts))
        padded = [[stops[0]] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        for ids in output[:, longest:]:
            yield tokenizer.decode(ids, skip_special_tokens=True).strip()


def base_of(folder: Path) -> Path | None:
    """The base of a LoRA adapter's folder; None for a model of its own.

    Raises:
        ModelError: the folder holds neither, or the base is not there.
    """
    adapter = read_json(folder / "adapter_config.json")
    if adapter is None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: has neither config.json nor adapter_config.json, so it is no model")
        return None
    base = Path(adapter.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        raise ModelError(f"{folder}: is an adapter for the base {base}, which is not there")
    return base


def split_answer(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A conversation up to its last user message, and the answer that follows there; empty when none does."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    answer = messages[last + 1]["content"] if last + 1 < len(messages) else ""
    return list(messages[: last + 1]), answer


def main() -> int:
    """Prints each question with every model's answer."""
    from hynb.data import read_conversations

    parser = argparse.ArgumentParser(prog="python -m hynb.generate.answers", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a model or a LoRA adapter")
    parser.add_argument("--questions", required=True, help="JSONL file of conversations")
    parser.add_argument("--count", type=int, default=3, help="questions, from the file's beginning")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    args = parser.parse_args()
    try:
        read = itertools.islice(read_conversations(args.questions), args.count)
        asked = [split_answer(conversation.messages) for conversation in read]
        for folder in args.folders:
            print(f"== {folder}")
            given = answers(folder, [messages for messages, _ in asked], max_new_tokens=args.max_new_tokens)
            for (messages, _), text in zip(asked, given, strict=True):
                print(f"{messages[-1]['content']}\n-> {text}", flush=True)
    except HynbError as error:
        print(f"hynb: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
