"""A line of training data as a conversation: formats, fields of messages, and what is wrong with them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hynb.data.files import Conversation, Paths, find_files, lines
from hynb.data.message_forms import THOUGHT_FIELDS
from hynb.data.spellings import TEXT_FIELDS, normalised, spelling_problem
from hynb.errors import DataError
from hynb.files import unique_keys

ROLES = ("system", "user", "assistant", "tool")
FORMATS = '{"messages": [{"role": …, "content": …}, …]}, ShareGPT\'s conversations, or Alpaca\'s instruction/output'
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# What each format reads of a record; all other keys are handed to the chat template.
_KEYS = {
    "messages": {"messages"},
    "conversations": {"conversations", "system"},
    "instruction": {"instruction", "input", "output", "system", "history", "reasoning_content"},
}
# Unicode 23.7: not for text; the template's rendering is traced with some of them.
_NONCHARACTERS = {chr(code) for code in range(0xFDD0, 0xFDF0)}

# An escape of half of a surrogate pair, or of a noncharacter; an emoji is a pair of them.
_SUSPECT_ESCAPE = re.compile(rb"\\u(?:[dD][89a-fA-F]|[fF][dD][dDeE])")


def parse_line(line: bytes, source: str) -> Conversation:
    """The conversation in one line; ShareGPT's and Alpaca's formats are converted.

    Args:
        source: the line's location as file:line.

    Raises:
        DataError: with the location, what is wrong and an excerpt.
    """
    try:
        text = line.decode("utf-8")
        record = json.loads(text)
        is_plain = _is_plain(record, line)
        if not is_plain or len(record) > 1:
            json.loads(text, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{error.colno}: invalid JSON: {error.msg}; it begins {excerpt(line)}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{source}: JSON that cannot be read: {error or 'nested too deeply'}") from None
    messages, keys = (record["messages"], _KEYS["messages"]) if is_plain else _checked(record, source, line)
    arguments = {key: value for key, value in record.items() if key not in keys and value not in (None, [], "")}
    if not arguments:
        return Conversation(messages=messages, source=source)
    if problem := _text_problem(arguments):
        raise DataError(f"{source}: {problem}")
    if not isinstance(effort := arguments.get("reasoning_effort", ""), str):
        raise DataError(f"{source}: reasoning_effort: must be text, not {_short(effort)} ({_kind(effort)})")
    return Conversation(messages=messages, source=source, arguments=_with_tools(arguments, source))


def read_conversations(paths: Paths) -> Iterator[Conversation]:
    """The conversations of JSONL files in order; blank lines are skipped.

    Args:
        paths: as `find_files` takes them; `.gz` and `.zst` are decompressed while they are read.

    Raises:
        DataError: at the first invalid line, with file:line and what is wrong.
    """
    for path in find_files(paths):
        for source, line in lines(path):
            yield parse_line(line, source)


def excerpt(line: bytes) -> str:
    """The beginning of a line, quoted, for a message."""
    return repr(line[:60].decode("utf-8", errors="replace").strip())


def _is_plain(record: Any, line: bytes) -> bool:
    """Whether messages are valid and need no conversion: a role and a text each, once, and nothing else.

    Most lines of most files are such; they need not go through all checks one by one.
    """
    if type(record) is not dict or b"\xef\xb7" in line:
        return False
    if b"\\u" in line and _SUSPECT_ESCAPE.search(line):
        return False
    messages = record.get("messages")
    if type(messages) is not list or line.count(b'"messages"') > 1:
        return False
    # A quotation mark inside of a text has a backslash before it: these are keys, or whole texts.
    if line.count(b'"role"') > len(messages) or line.count(b'"content"') > len(messages):
        return False
    roles = []
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or type(role) is not str:
            return False
        if role != "user" and (not content or content.isspace()):
            return False
        roles.append(role)
    return _is_order(tuple(roles))


@functools.lru_cache(maxsize=4096)
def _is_order(roles: tuple[str, ...]) -> bool:
    """Whether messages of these roles may follow each other and end with an answer."""
    messages = [{"role": role, "content": "…"} for role in roles]
    befores = [None, *messages]
    if any(_message_problem(message, before) for message, before in zip(messages, befores, strict=False)):
        return False
    return "user" in roles and roles[-1] == "assistant"


def _checked(record: Any, source: str, line: bytes) -> tuple[list[dict[str, Any]], set[str]]:
    """The messages of a record in their common form, and the keys that they were made of.

    Raises:
        DataError: as `parse_line`.
    """
    found = _messages(record, source)
    if found is None or not isinstance(found[0], list) or not found[0]:
        raise DataError(f"{source}: must be {FORMATS}; it begins {excerpt(line)}")
    messages, keys = found
    kept: list[dict[str, Any]] = []
    for number, given in enumerate(messages, 1):
        message = normalised(given)
        if problem := _message_problem(message, kept[-1] if kept else None):
            raise DataError(f"{source}: message {number}: {problem}")
        # An empty system message is the same as none.
        if message["role"] != "system" or message["content"]:
            kept.append(message)
    if not kept or kept[-1]["role"] != "assistant":
        last = messages[-1]["role"] if not kept else kept[-1]["role"]
        raise DataError(
            f"{source}: the last message is the {last}'s: there is no answer to train on behind it; end the "
            "conversation with an answer of the assistant's"
        )
    if not any(message["role"] == "user" for message in kept):
        raise DataError(f"{source}: there is no message of the user, which the answers follow")
    if not any(message["role"] == "assistant" and message.get("train", True) for message in kept):
        raise DataError(f'{source}: every answer has "train": false: there is nothing to train on')
    return kept, keys


def _messages(record: Any, source: str) -> tuple[Any, set[str]] | None:
    """The messages of a record and the keys that they were made of; None if it is of no known format."""
    if not isinstance(record, dict):
        return None
    if "messages" in record:
        return record["messages"], _KEYS["messages"]
    if isinstance(record.get("conversations"), list):
        return _from_sharegpt(record, source), _KEYS["conversations"]
    if "instruction" in record and "output" in record:
        return _from_alpaca(record, source), _KEYS["instruction"]
    return None


def _with_tools(arguments: dict[str, Any], source: str) -> dict[str, Any]:
    """Arguments with `tools` as a list; some ShareGPT data has them as JSON text."""
    # OpenAI's older form of tools.
    functions = arguments.get("functions")
    if "tools" not in arguments and isinstance(functions, list):
        tools = [{"type": "function", "function": function} for function in functions]
        arguments = {key: value for key, value in arguments.items() if key != "functions"} | {"tools": tools}
    tools = arguments.get("tools")
    if tools is None:
        return arguments
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{source}: tools: is text that is not JSON: {error}") from None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise DataError(f"{source}: tools: must be a list of tool descriptions, not {_short(tools)} ({_kind(tools)})")
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise DataError(f"{source}: tools: tool {number} must be an object, not {_short(tool)} ({_kind(tool)})")
        if not isinstance(tool.get("function", {}), dict):
            raise DataError(
                f"{source}: tools: the function of tool {number} must be an object, not "
                f"{_short(tool['function'])} ({_kind(tool['function'])})"
            )
    return {key: value for key, value in arguments.items() if key != "tools"} | ({"tools": tools} if tools else {})


def _from_sharegpt(record: dict[str, Any], source: str) -> list[dict[str, Any]]:
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for number, turn in enumerate(record["conversations"], 1):
        place = f"{source}: conversations, turn {number}"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(f'{place}: must be {{"from": …, "value": …}}')
        name = turn["from"]
        if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
            raise DataError(
                f"{place}: from {_short(name)} is unknown; it must be one of {', '.join(_SHAREGPT_ROLES)}"
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if name == "function_call":
            messages.append({"role": "assistant", "content": None, "tool_calls": _calls(turn["value"], place)} | rest)
        else:
            messages.append({"role": _SHAREGPT_ROLES[name], "content": turn["value"]} | rest)
    return messages


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The tool calls of a ShareGPT turn: one or several {"name": …, "arguments": …}, as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{place}: the function_call is not JSON: {error}") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f'{place}: the function_call must be {{"name": …, "arguments": …}}, not {_short(value)}')
    return [{"type": "function", "function": call} for call in calls]


def _from_alpaca(record: dict[str, Any], source: str) -> list[dict[str, Any]]:
    question = record["instruction"]
    for key in ("instruction", "input", "output", "system"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise DataError(f"{source}: {key} must be text, not {type(record[key]).__name__}")
    if record.get("input"):
        question = f"{question}\n{record['input']}"
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise DataError(f"{source}: history must be a list of [question, answer]")
    for earlier_question, answer in history:
        messages += [{"role": "user", "content": earlier_question}, {"role": "assistant", "content": answer}]
    answer = {"role": "assistant", "content": record["output"], "reasoning_content": record.get("reasoning_content")}
    return [*messages, {"role": "user", "content": question}, answer]


def _short(value: Any) -> str:
    """The `repr` of a value for a message, at most 60 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "…"


def _message_problem(message: Any, before: dict[str, Any] | None) -> str:
    """What is wrong with a message that follows another one; empty if nothing is."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return 'must be {"role": …, "content": …}'
    role = message["role"]
    if role not in ROLES:
        return f"role {_short(role)} is unknown; it must be one of {', '.join(ROLES)}"
    if problem := spelling_problem(message):
        return problem
    problem = _content_problem(message) or _calls_problem(message) or _type_problem(message) or _text_problem(message)
    if problem:
        return problem
    if not isinstance(message.get("train", True), bool):
        return f"train must be true or false, not {_short(message['train'])}"
    return _order_problem(message, before)


def _content_problem(message: dict[str, Any]) -> str:
    role, content = message["role"], message.get("content")
    if content is None and (message.get("tool_calls") or is_thought_alone(message)):
        return ""
    if not isinstance(content, str):
        found = "missing" if content is None else _short(content)
        kind = "" if content is None else f" ({_kind(content)})"
        return f"the content of the {role} must be text, and is {found}{kind}: write text, or remove the record"
    return "the assistant's answer is empty: write it, or remove the record" if _is_empty_answer(message) else ""


def is_thought_alone(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer that has a thought in a field of its own and nothing else."""
    if message["role"] != "assistant" or message.get("tool_calls") or (message.get("content") or "").strip():
        return False
    return any(isinstance(thought := message.get(name), str) and thought.strip() for name in THOUGHT_FIELDS)


def _is_empty_answer(message: dict[str, Any]) -> bool:
    if message["role"] != "assistant" or message["content"].strip() or message.get("tool_calls"):
        return False
    return not is_thought_alone(message)


def _calls_problem(message: dict[str, Any]) -> str:
    if "tool_calls" not in message:
        return ""
    if message["role"] != "assistant":
        return f"tool_calls: only the assistant calls tools, not the {message['role']}"
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        return f"tool_calls must be a list, not {_kind(calls)}"
    for number, call in enumerate(calls, 1):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f'tool call {number} must be {{"function": {{"name": …, "arguments": …}}}}'
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                return f"tool call {number}: its arguments are text that is not JSON: {error}"
        if not isinstance(arguments, dict):
            return f"tool call {number}: its arguments must be an object, not {_kind(arguments)}"
        for name in ("id", "type"):
            if not isinstance(call.get(name), (str, type(None))):
                return f"tool call {number}: its {name} must be text, not {_kind(call[name])}"
    return ""


def _type_problem(message: dict[str, Any]) -> str:
    """Fields of a message that have to be text and are not."""
    for name in TEXT_FIELDS:
        if not isinstance(message.get(name), (str, type(None))):
            return f"{name} must be text, and is {_short(message[name])} ({_kind(message[name])})"
    return ""


def _kind(value: Any) -> str:
    """A value's type, named as in JSON."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def _text_problem(message: dict[str, Any]) -> str:
    """Characters that are not text, in any text of a message."""
    for name, text in _texts(message):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            where = f"the content of the {message.get('role')}" if name == "content" else name
            return f"{where} has half of a surrogate pair; write the character itself"
        if not text.isascii() and not _NONCHARACTERS.isdisjoint(text):
            return f"{name} has a noncharacter (U+FDD0 to U+FDEF), which is not for text; remove it"
    return ""


def _texts(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [
            item for key, inner in value.items() for item in [*_texts(key, name or key), *_texts(inner, name or key)]
        ]
    if isinstance(value, list):
        return [item for inner in value for item in _texts(inner, name)]
    return []


def _order_problem(message: dict[str, Any], before: dict[str, Any] | None) -> str:
    """What no order of messages explains; where system messages and a first answer may be, the template decides."""
    role, last = message["role"], before["role"] if before else None
    if role == "assistant" and last == "assistant":
        return "the assistant's message follows the assistant's; the user's must come before it: join the two"
    if role == "user" and last == "user":
        return "two messages of the user follow each other: join them, or write the answer that is missing"
    if role == "tool" and not (before and (last == "tool" or before.get("tool_calls"))):
        if not last:
            return "the first message is the tool's: the assistant's, with tool_calls, must come before it"
        return f"the tool's result follows the {last}'s message, which calls no tool"
    return ""
