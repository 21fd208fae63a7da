"""Fields of a record that its rendering by the chat template does not depend on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hynb.data.files import Conversation
from hynb.data.template import TIME_ARGUMENT, ChatTemplate
from hynb.errors import DataError

_OTHER_TIME = "1999-12-31"
# It chooses how the model is asked, and may leave what it answers as it is.
_SWITCH = "enable_thinking"
# What tells a call from others, and its kind, of which there is one.
_KEYS_OF_CALL = ("function", "id", "type", "index")


def ignored_fields(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """Fields of a record that its rendering does not depend on, such as `tools` or `messages[].name`.

    Raises:
        DataError: the template refuses the conversation.
    """
    turns, rendering = template.rendered_turns(conversation.messages, conversation)
    learned = template.rendering(conversation)
    found = []
    for name in conversation.arguments:
        # One that the template refuses ("") shows nothing.
        others = _other_arguments(template, conversation, name)
        if all(template.rendering(conversation.replaced(arguments=other)) in ("", learned) for other in others):
            found.append(name)
    for name in sorted({name for message in conversation.messages for name in message}):
        if name not in ("role", "content", "train") and _ignores(template, conversation, name, turns, rendering):
            found.append(f"messages[].{name}")
    if "tools" in conversation.arguments and "tools" not in found:
        found += _lost_of_tools(template, conversation, learned)
    if "messages[].tool_calls" not in found:
        if _loses_arguments(template, conversation, turns, rendering):
            found.append("messages[].tool_calls[].function.arguments")
        found += _lost_of_calls(template, conversation, turns, rendering)
    return found


def is_asked_as_trained(template: ChatTemplate, conversation: Conversation, name: str) -> bool:
    """Whether an argument that no answer depends on belongs to the prompts, with which the trained text then begins.

    Where it has the prompt close a thought, each answer has to begin with that: the model would otherwise be asked in
    another form than the one that it is trained in.
    """
    if name not in template.record_arguments or _not_as_asked(template, conversation):
        return False
    if name == _SWITCH:
        return True
    last = len(conversation.messages) - 1
    prompts = [_asked(template, conversation, last)]
    prompts += [
        _asked(template, conversation.replaced(arguments=other), last)
        for other in _other_arguments(template, conversation, name)
    ]
    return len({prompt[0] for prompt in prompts if prompt}) > 1


def switch_problem(template: ChatTemplate, conversation: Conversation) -> str:
    """What an answer does not begin with, although the record's `enable_thinking` has the model asked with it."""
    if not (found := _not_as_asked(template, conversation)):
        return ""
    index, prompt, text = found
    rest = {key: value for key, value in conversation.arguments.items() if key != _SWITCH}
    before = _asked(template, conversation.replaced(arguments=rest), index)
    added = prompt.removeprefix(before[0]) if before else prompt
    if not added:
        return ""
    behind = " and, of what is trained, writes it only behind the last answer" if text.endswith(added) else ""
    return (
        f"{_SWITCH} in what is trained: with this value it ends the prompt with {added[-60:]!r}{behind}: begin "
        f"the answer of message {index + 1} with that"
    )


def _not_as_asked(template: ChatTemplate, conversation: Conversation) -> tuple[int, str, str] | None:
    """The first trained answer that does not begin as its prompt ends, with the prompt and the trained text."""
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        asked = _asked(template, conversation, index)
        if asked and not asked[1].startswith(asked[0].rstrip()):
            return index, *asked
    return None


def _asked(template: ChatTemplate, conversation: Conversation, index: int) -> tuple[str, str] | None:
    """`ChatTemplate.asked`; None where the template refuses that."""
    try:
        return template.asked(conversation, index)
    except DataError:
        return None


def _other_arguments(template: ChatTemplate, conversation: Conversation, name: str) -> Iterator[dict[str, Any]]:
    """The record's arguments without one, and with other values of it, since it may have the default's."""
    given = conversation.arguments[name]
    rest = {key: value for key, value in conversation.arguments.items() if key != name}
    yield rest
    yield rest | {name: _OTHER_TIME if name == TIME_ARGUMENT else _other(given)}
    if isinstance(given, str):
        yield from (rest | {name: value} for value in template.choices(name) if value != given)


def _ignores(
    template: ChatTemplate, conversation: Conversation, name: str, turns: Sequence[str | None], text: str
) -> bool:
    """Whether some message has a field that its own part of the rendering does not depend on."""
    messages = conversation.messages
    without = [{key: value for key, value in message.items() if key != name} for message in messages]
    variants = [without]
    if name == "tool_calls":
        # Each of several calls has to be there.
        most = max(len(message.get(name) or ()) for message in messages)
        variants += [
            [
                message | {name: [call for place, call in enumerate(message[name]) if place != number]}
                if len(message.get(name) or ()) > max(1, number)
                else message
                for message in messages
            ]
            for number in range(most if most > 1 else 0)
        ]
    return any(_is_the_same(template, conversation, others, turns, text) for others in variants)


def _lost_of_tools(template: ChatTemplate, conversation: Conversation, learned: str) -> list[str]:
    """What of descriptions of tools the rendering does not depend on, such as `tools[].parameters`.

    All of it is marked in one rendering; what shows no mark is changed by itself, since a template may rewrite it.
    """
    tools = conversation.arguments["tools"]
    places = [
        (number, name)
        for number, tool in enumerate(tools)
        for name in ("name", "description", "parameters")
        if _of_tool(tool).get(name) and (name != "parameters" or _of_tool(tool)[name].get("properties"))
    ]

    def rendered(marked: Sequence[tuple[int, str]]) -> str:
        changed = copy.deepcopy(tools)
        for number, name in marked:
            of_tool, mark = _of_tool(changed[number]), _mark(places.index((number, name)))
            if name == "parameters":
                of_tool[name]["properties"] |= {mark: {"type": "string"}}
            else:
                of_tool[name] = f"{of_tool[name]}{mark}"
        return template.rendering(conversation.replaced(arguments=conversation.arguments | {"tools": changed}))

    whole = rendered(places)
    unmarked = [place for number, place in enumerate(places) if _mark(number) not in whole]
    return sorted({f"tools[].{place[1]}" for place in unmarked if rendered([place]) == learned})


def _of_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tool with its name, description and parameters, without those of other types than usual."""
    found = tool.get("function", tool)
    kinds = {"name": str, "description": str, "parameters": dict}
    if all(isinstance(found.get(name, kind()), kind) for name, kind in kinds.items()):
        properties = (found.get("parameters") or {}).get("properties", {})
        return found if isinstance(properties, dict) else {}
    return {}


def _loses_arguments(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[str | None], text: str
) -> bool:
    """Whether some argument of a tool call is not rendered; found as in `_lost_of_tools`."""
    messages = [
        message | {"tool_calls": [_with_mapping(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in conversation.messages
    ]
    places = [
        (index, number, name)
        for index, message in enumerate(messages)
        for number, call in enumerate(message.get("tool_calls") or ())
        for name in call["function"]["arguments"]
    ]

    def marked(chosen: Sequence[tuple[int, int, str]]) -> list[dict[str, Any]]:
        changed = copy.deepcopy(messages)
        for place in chosen:
            index, number, name = place
            given, mark = changed[index]["tool_calls"][number]["function"]["arguments"], _mark(places.index(place))
            given[name] = f"{given[name]}{mark}" if isinstance(given[name], str) else mark
        return changed

    if not places:
        return False
    try:
        _, whole = template.rendered_turns(marked(places), conversation)
    except DataError:
        whole = ""
    return any(
        _is_the_same(template, conversation.replaced(messages=messages), marked([place]), turns, text)
        for number, place in enumerate(places)
        if _mark(number) not in whole
    )


def _lost_of_calls(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[str | None], text: str
) -> list[str]:
    """Further keys of tool calls that the rendering does not depend on."""
    messages = conversation.messages
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    places = {("call", key) for call in calls for key in call if key not in _KEYS_OF_CALL}
    places |= {("function", key) for call in calls for key in call["function"] if key != "arguments"}

    def without(holder: str, key: str) -> list[dict[str, Any]]:
        changed = copy.deepcopy([dict(message) for message in messages])
        for call in [call for message in changed for call in message.get("tool_calls") or ()]:
            held = call["function"] if holder == "function" else call
            if key == "name":
                # No template takes a call without one.
                held[key] = f"{held[key]}x"
            else:
                held.pop(key, None)
        return changed

    return [
        f"messages[].tool_calls[].{'function.' if holder == 'function' else ''}{key}"
        for holder, key in sorted(places)
        if _is_the_same(template, conversation, without(holder, key), turns, text)
    ]


def _with_mapping(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as a mapping."""
    arguments = call["function"].get("arguments") or {}
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**call["function"], "arguments": parsed}}


def _mark(number: int) -> str:
    return f"x{number}mark"


def _is_the_same(
    template: ChatTemplate,
    conversation: Conversation,
    others: Sequence[dict[str, Any]],
    turns: Sequence[str | None],
    text: str,
) -> bool:
    """Whether some message is rendered as the other one in its place, from which it differs."""
    try:
        changed, changed_text = template.rendered_turns(others, conversation)
    except DataError:
        return False
    for index, (message, other) in enumerate(zip(conversation.messages, others, strict=True)):
        if message == other or turns[index] != changed[index]:
            continue
        # A message that is written outside of a loop, and the thought of an earlier answer.
        if turns[index] is None and changed_text != text:
            continue
        if message["role"] != "assistant" or not _is_rendered_alone(template, conversation, index, other):
            return True
    return False


def _is_rendered_alone(
    template: ChatTemplate, conversation: Conversation, index: int, other: Mapping[str, Any]
) -> bool:
    """Whether a message is rendered differently from another one where it is the last of the conversation."""
    before = conversation.messages[:index]
    _, one = template.rendered_turns([*before, conversation.messages[index]], conversation)
    try:
        return one != template.rendered_turns([*before, other], conversation)[1]
    except DataError:
        return True


def _other(value: Any) -> Any:
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else None
