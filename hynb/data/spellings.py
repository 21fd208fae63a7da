"""A message's fields as other programs write them, brought to the names and types that this package reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hynb.data.message_forms import THOUGHT_FIELDS

# Fields of messages that are texts, where an empty one is the same as none.
TEXT_FIELDS = (*THOUGHT_FIELDS, "name", "tool_call_id")
# Whether an answer is trained on: OpenAI's fine-tuning format, and ms-swift's.
_TRAIN_FIELDS = ("weight", "loss")
# Types of the parts of a content: Chat Completions, Responses; Anthropic and Mistral.
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")


def normalised(message: Any) -> Any:
    """A message without empty fields, with older and foreign spellings in their common form.

    What has no such form stays as it is, for the checks to name it.
    """
    if not isinstance(message, dict):
        return message
    kept = {
        key: value
        for key, value in message.items()
        if value is not None and (value != [] or key == "content") and (value != "" or key not in TEXT_FIELDS)
    }
    if "content" in message:
        kept["content"] = message["content"]
    if isinstance(call := kept.get("function_call"), dict) and "tool_calls" not in kept:
        del kept["function_call"]
        kept["tool_calls"] = [{"type": "function", "function": call}]
    if kept.get("role") == "developer":
        kept["role"] = "system"
    if kept.get("role") == "function":
        kept["role"] = "tool"
    _join_parts(kept)
    if kept.get("role") == "tool" and isinstance(kept.get("content"), (dict, list, int, float)):
        # As serving software hands it to the template, which takes text.
        kept["content"] = json.dumps(kept["content"], ensure_ascii=False)
    thoughts = [name for name in THOUGHT_FIELDS if name in kept]
    for name in thoughts[1:]:
        # vLLM writes the same thought under two names.
        if kept[name] == kept[thoughts[0]]:
            del kept[name]
    for name in _TRAIN_FIELDS:
        value = kept.get(name)
        if value in (0, 1) and kept.get("train", bool(value)) == bool(value):
            kept["train"] = bool(kept.pop(name))
    if "content" not in kept and (kept.get("tool_calls") or any(kept.get(name) for name in THOUGHT_FIELDS)):
        kept["content"] = None
    return kept


def _join_parts(message: dict[str, Any]) -> None:
    """Puts the text of a content in parts in its place, and a thought in front of it into a field of its own."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts or _problem(parts, message):
        return
    thought = "".join(_thought(part) for part in parts if part["type"] in _THOUGHT_PARTS)
    message["content"] = "".join(part["text"] for part in parts if part["type"] in _TEXT_PARTS)
    if thought:
        message[THOUGHT_FIELDS[0]] = thought
    # What else a part has is looked for in the rendering as any field of a message, and named where it is not there.
    for part in parts:
        read = "text" if part["type"] in _TEXT_PARTS else _thought_key(part)
        rest = {name: value for name, value in part.items() if name not in ("type", read)}
        message |= {f"content[].{name}": value for name, value in rest.items() if value and value != part.get(read)}


def spelling_problem(message: dict[str, Any]) -> str:
    """What of a message has no common form; empty if nothing."""
    for name in _TRAIN_FIELDS:
        if name in message:
            same = f", as train is {str(message['train']).lower()}" if "train" in message else ""
            return (
                f"{name} says whether the message is trained on, and must be 1 or true, 0 or false{same}; it is "
                f"{json.dumps(message[name])[:60]}"
            )
    thoughts = [name for name in THOUGHT_FIELDS if name in message]
    if len(thoughts) > 1:
        return f"{' and '.join(thoughts)} are different thoughts: keep one of them"
    parts = message.get("content")
    return _problem(parts, message) if isinstance(parts, list) and parts else ""


def _problem(parts: Sequence[Any], message: dict[str, Any]) -> str:
    """Why the parts of a content have no common form; empty if they have one."""
    types: list[str] = []
    for number, part in enumerate(parts, 1):
        named = f"part {number} of the content"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            return f'{named} must be an object such as {{"type": "text", "text": …}}: write the content as text'
        if kind in _TEXT_PARTS:
            if not isinstance(part.get("text"), str):
                return f"{named} has no text"
        elif kind not in _THOUGHT_PARTS:
            where = {"tool_use": "tool_calls", "tool_result": "a message of the role tool"}
            hint = f"write it as {where[kind]}" if kind in where else "only text is trained on: remove the record"
            return f"{named} is of the type {kind[:40]}: {hint}"
        elif message.get("role") != "assistant" or not _thought(part):
            return f"{named} is of the type {kind}: it must be the assistant's, with the thought as its text"
        elif any(earlier in _TEXT_PARTS for earlier in types):
            return f"{named} is a thought behind text, where templates write it in front: make two messages of them"
        elif any(name in message for name in THOUGHT_FIELDS):
            return f"{named} is a thought, and the message has one in a field of its own: keep one of them"
        types.append(kind)
    return ""


def _thought_key(part: dict[str, Any]) -> str:
    """The key under which a part has its thought; "text" if it has none."""
    return next((name for name in _THOUGHT_PARTS if name in part), "text")


def _thought(part: dict[str, Any]) -> str:
    """The text of a part with a thought; empty if it has none."""
    value = part.get(_thought_key(part))
    if isinstance(value, list):
        texts = [item["text"] for item in value if isinstance(item, dict) and isinstance(item.get("text"), str)]
        return "".join(texts) if len(texts) == len(value) else ""
    return value if isinstance(value, str) else ""
