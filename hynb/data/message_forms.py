"""A message in the forms in which chat templates may expect the same content."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Names under which templates read a thought; transformers copies one to the others (5.23, `_alias_reasoning_fields`).
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
Messages = Sequence[Mapping[str, Any]]


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it, without what says whether it is trained on."""
    plain = {name: value for name, value in message.items() if name != "train"}
    given = next((plain[name] for name in THOUGHT_FIELDS if plain.get(name) is not None), None)
    if given is not None:
        plain |= {name: given for name in THOUGHT_FIELDS if plain.get(name) is None}
    return plain


def message_forms(messages: Messages, *, parse_first: bool) -> Iterator[Messages]:
    """The messages in each form that a template may expect of the same content.

    A tool call's arguments are a JSON text in some data and a mapping in others; an absent content is missing, which
    transformers makes of null (5.23, tokenization_utils_base.py), empty or null.

    Args:
        parse_first: begin with arguments as mappings; a template that does not look would encode a text twice.
    """
    has_text = any(
        isinstance(call["function"].get("arguments"), str)
        for message in messages
        for call in message.get("tool_calls") or ()
    )
    has_calls = any(message.get("tool_calls") for message in messages)
    absent = [message.get("content") is None for message in messages]
    if not has_calls and not any(absent):
        yield messages
        return
    as_given = ("as it is", "parsed", "text")
    orders = (("parsed", "as it is") if parse_first and has_text else as_given) if has_calls else ("as it is",)
    contents = ("missing", "", "null") if any(absent) else ("given",)
    for arguments, content in itertools.product(orders, contents):
        form = copy.deepcopy([dict(message) for message in messages])
        for message, is_absent in zip(form, absent, strict=True):
            if is_absent and content == "missing":
                message.pop("content", None)
            elif is_absent:
                message["content"] = "" if content == "" else None
            _convert_arguments(message, arguments)
        yield form


def _convert_arguments(message: dict[str, Any], form: str) -> None:
    """Makes the arguments of tool calls mappings ("parsed") or JSON ("text"), or leaves them."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue
        given = function.get("arguments")
        if form == "parsed" and isinstance(given, str):
            try:
                function["arguments"] = json.loads(given or "{}")
            except ValueError:
                continue
        elif form == "text" and isinstance(given, Mapping):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
