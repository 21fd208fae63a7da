"""The `hynb ask` command."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hynb.errors import ConfigError, DataError
from hynb.generate.answer import Answer, Part
from hynb.generate.scores import score, write_differences
from hynb.runs import find_base

_GREY, _PLAIN = "\x1b[90m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hynb ask`."""
    parser.description = (
        "Ask a model, or a LoRA adapter with its base, one question; or all questions of a file, whose answers are "
        "compared with those in the file."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a model, a checkpoint or a LoRA adapter")
    parser.add_argument("question", nargs="?", help="one question, whose answer is shown while it is written")
    parser.add_argument(
        "--questions", metavar="FILE", help="JSONL file of conversations; the model writes the last answer of each"
    )
    parser.add_argument("--count", type=int, help="number of questions, from the start of the file [all]")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="FOLDER", help="more models that answer the same questions"
    )
    parser.add_argument("--differences", type=Path, metavar="FILE", help="CSV of the answers that differ")
    parser.add_argument("--system", metavar="TEXT", help="system message of the question")
    parser.add_argument("--reasoning_effort", help="of templates that read it, such as high, low, no_think for Hy3")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of the tools that the model may call")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer, in tokens [512]")
    parser.add_argument("--batch_size", type=int, default=1, help="questions answered at the same time [1]")
    parser.add_argument(
        "--greedy", action="store_true", help="the most probable token each time, instead of the model's sampling"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")


def run(args: argparse.Namespace) -> int:
    """Prints answers, and scores where there is a file of questions.

    Raises:
        ConfigError, DataError, ModelError: what is wrong with the arguments, the questions or a folder.
    """
    _check(args)
    folders = [args.folder, *args.compare]
    for folder in folders:
        find_base(Path(folder).expanduser().absolute())
    arguments = _template_arguments(args)
    if args.questions:
        _ask_file(args, folders, arguments)
    else:
        for folder in folders:
            if len(folders) > 1:
                print(f"== {folder}")
            _ask_one(args, folder, arguments)
    return 0


def _check(args: argparse.Namespace) -> None:
    problems = [
        f"--{name} {getattr(args, name)}: must be at least 1"
        for name in ("count", "max_new_tokens", "batch_size")
        if getattr(args, name) is not None and getattr(args, name) < 1
    ]
    if bool(args.question) == bool(args.questions):
        problems.append('give one question ("…") or a file of them (--questions FILE)')
    if args.differences and not args.questions:
        problems.append("--differences: needs --questions FILE, with whose answers the model's are compared")
    if args.system and args.questions:
        problems.append("--system: belongs to a single question; conversations in a file have their own")
    if problems:
        raise ConfigError(problems)


def _template_arguments(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if args.reasoning_effort:
        found["reasoning_effort"] = args.reasoning_effort
    if args.tools:
        try:
            tools = json.loads(args.tools.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"--tools {args.tools}: cannot be read: {error}") from None
        tools = [tools] if isinstance(tools, dict) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"--tools {args.tools}: must be a JSON list of tool descriptions")
        found["tools"] = tools
    return found


def _ask_one(args: argparse.Namespace, folder: str, arguments: dict[str, Any]) -> None:
    from hynb.generate.generation import AnsweringModel, Question, check_question, load_tokenizer

    system = [{"role": "system", "content": args.system}] if args.system else []
    question = Question(messages=[*system, {"role": "user", "content": args.question}], arguments=arguments)
    # Before the weights are read, which takes minutes for a large model.
    check_question(question, load_tokenizer(Path(folder).expanduser().absolute()))
    model = AnsweringModel(folder, greedy=args.greedy, seed=args.seed)
    answer = model.stream(question, max_new_tokens=args.max_new_tokens, show=_Printer())
    print()
    if not answer.ended:
        print(f"hynb: no end token within {args.max_new_tokens} tokens", file=sys.stderr)


class _Printer:
    """Prints the pieces of an answer as they come, the thought under a heading of its own and in grey."""

    def __init__(self) -> None:
        self._part: Part | None = None
        self._grey = sys.stdout.isatty()

    def __call__(self, part: Part, text: str) -> None:
        if part != self._part:
            text = text.lstrip()
            if not text:
                return
            if part == "thought":
                print("thought:", flush=True)
            elif self._part == "thought":
                print("\n\nanswer:", flush=True)
            self._part = part
        grey = self._grey and part == "thought"
        print(f"{_GREY}{text}{_PLAIN}" if grey else text, end="", flush=True)


def _ask_file(args: argparse.Namespace, folders: Sequence[str], arguments: dict[str, Any]) -> None:
    from hynb.data import read_conversations
    from hynb.generate.generation import AnsweringModel, check_question, load_tokenizer, question_of

    conversations = [
        item.replaced(arguments={**item.arguments, **arguments})
        for item in itertools.islice(read_conversations(args.questions), args.count)
    ]
    if not conversations:
        raise DataError(f"{args.questions}: has no conversation")
    questions = [question_of(item) for item in conversations]
    tokenizer = load_tokenizer(Path(folders[0]).expanduser().absolute())
    for question in questions:
        check_question(question, tokenizer)
    expected: list[Answer] = []
    given: dict[str, list[Answer]] = {}
    for folder in folders:
        model = AnsweringModel(folder, greedy=args.greedy, seed=args.seed)
        expected = expected or [model.expected(item) for item in conversations]
        print(f"== {folder}")
        name = folder if folder not in given else f"{folder} ({len(given) + 1})"
        given[name] = []
        found = model.answers(questions, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
        for question, answer in zip(questions, found, strict=True):
            given[name].append(answer)
            _print_answer(question.messages[-1].get("content") or "", answer)
        del model
    width = max(map(len, given))
    for name, answers in given.items():
        print(f"{name:{width}}  {score(answers, expected)}")
    if args.differences:
        texts = [(item.source, item.messages[-1].get("content") or "") for item in questions]
        count = write_differences(args.differences, texts, expected, given)
        print(f"{count} of {len(questions)} questions with answers that differ: {args.differences}")


def _print_answer(question: str, answer: Answer) -> None:
    print(question)
    if answer.thought:
        print(f"   thought: {answer.thought}")
    print(f"-> {answer.text}{'' if answer.ended else ' [no end token]'}", flush=True)
