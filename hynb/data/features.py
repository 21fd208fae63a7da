"""What a chat template can render, found by rendering small conversations that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hynb.data.message_forms import THOUGHT_FIELDS, Messages
from hynb.errors import DataError


@dataclass(kw_only=True, frozen=True)
class Features:
    """What a chat template can render.

    Args:
        system, tools, tool_calls, tool_results, thoughts: whether it does.
        arguments: names that a record may set beside its messages.
        end_tokens: texts of the tokens that end an answer; empty if answers have no end.
    """

    system: bool
    tools: bool
    tool_calls: bool
    tool_results: bool
    thoughts: bool
    arguments: tuple[str, ...]
    end_tokens: tuple[str, ...]


def features_of(
    render: Callable[[Messages, Mapping[str, Any]], str], *, arguments: tuple[str, ...], end_tokens: tuple[str, ...]
) -> Features:
    """The features of a template.

    Args:
        render: renders messages with arguments such as `tools`; raises DataError where the template refuses them.
        arguments, end_tokens: as in `Features`.
    """
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "found", "tool_call_id": "1"}

    def differs(one: Messages, other: Messages, tools: bool = False, without: bool = False) -> bool:
        texts = []
        for messages, given in ((one, tools), (other, tools and not without)):
            try:
                texts.append(render(list(messages), {"tools": [tool]} if given else {}))
            except DataError:
                texts.append("")
        return bool(texts[0]) and texts[0] != texts[1]

    return Features(
        system=differs([{"role": "system", "content": "s"}, user, answer], [user, answer]),
        tools=differs([user, answer], [user, answer], tools=True, without=True),
        tool_calls=differs([user, calling, result, answer], [user, answer, result, answer], tools=True),
        tool_results=differs(
            [user, calling, result, answer], [user, calling, result | {"content": "lost"}, answer], tools=True
        ),
        thoughts=differs([user, answer | dict.fromkeys(THOUGHT_FIELDS, "thought")], [user, answer]),
        arguments=arguments,
        end_tokens=end_tokens,
    )
