"""Renders a chat template and records which part of the text each message produced.

A chat template is a program (Jinja). Its syntax tree is compiled with a marker at the beginning of every iteration of
a loop and one behind the loop; the marker names the message that the iteration handles. The environment is the one
that transformers documents for chat templates (transformers 5.23, utils/chat_template_utils.py).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

_MARK, _END, _COUNT = "_mark_message", "_mark_end", "_count_iteration"
# Of one rendering: turns of all loops and calls of macros, a tenth of a second of them, beside those of a loop over
# messages within another one over them; and what it may write.
_MOST_ITERATIONS, _MOST_CHARACTERS = 100_000, 100_000_000
# Of a power's result; no template needs one.
_MOST_DIGITS = 1000
# Noncharacters (Unicode 23.7), which are not for text: messages that have one are refused when they are read.
_START, _STOP = "\ufdd0", "\ufdd1"
_MARKER = re.compile(f"{_START}(\\d*){_STOP}")
# Templates that write the present time write this one in training: check, stored tokens, all ranks and a resumed run
# have to find the same token ids. On this day Hunyuan-A13B was published, whose template does so.
TRAINING_TIME = datetime(2025, 6, 27, 12, 0, 0)


@dataclass(kw_only=True, frozen=True)
class Traced:
    """A rendering.

    Args:
        spans: for each message, start and end of the text that its iteration wrote; None where no iteration of a loop
            that handles it wrote anything.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]

    def segment(self, index: int) -> str:
        """What the template wrote for a message; the whole text where it was written outside of a loop."""
        span = self.spans[index]
        return self.text[span[0] : span[1]] if span else self.text


class TracedTemplate:
    """A compiled chat template.

    Attributes:
        arguments: names of variables that a caller may set.
        choices: for each variable the texts that the template compares it with.
        sought: texts that the template looks for inside of others, such as messages.
        equal: texts that it compares others with.
        writes_time: whether it has a call of `strftime_now`, with which templates write the present time.
        has_written_time: whether it has come to such a call without a time of the caller's.

    Raises:
        jinja2.TemplateError: it is not a Jinja template.
    """

    def __init__(self, source: str) -> None:
        environment = _environment()
        tree = environment.parse(source)
        # First: the search for arguments makes one constant of each list.
        self.choices = _choices(tree)
        self.sought, self.equal = _literals(tree)
        self.arguments = _arguments(tree) - set(environment.globals)
        self.writes_time = any(
            isinstance(call.node, jinja2.nodes.Name) and call.node.name == "strftime_now"
            for call in tree.find_all(jinja2.nodes.Call)
        )
        self.has_written_time = False
        # Markers in a block that is stored or filtered may change what is done with the block.
        blocks = (jinja2.nodes.AssignBlock, jinja2.nodes.FilterBlock, jinja2.nodes.CallBlock)
        self._has_stored_loops = any(block.find(jinja2.nodes.For) for block in tree.find_all(blocks))
        has_macro_loops = any(macro.find(jinja2.nodes.For) for macro in tree.find_all(jinja2.nodes.Macro))
        self._unmarked = None
        if self._has_stored_loops or has_macro_loops:
            self._unmarked = _compiled(_Counting().visit(environment.parse(source)))
        self._template = _compiled(_Counting().visit(_Marking().visit(tree)))

    def __call__(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> Traced:
        """Renders messages.

        Args:
            arguments: all other variables of the template.

        Raises:
            jinja2.TemplateError: the template refuses them.
            Exception: whatever else a template's expressions raise.
        """
        if self.writes_time:
            arguments = {"strftime_now": self._training_time, **arguments}
        markers = _Markers(messages)
        given = {**arguments, _MARK: markers.begin, _END: markers.end}
        traced = _traced(_rendered(self._template, messages, given), len(messages))
        if self._unmarked and (self._has_stored_loops or markers.in_macro):
            text = _rendered(self._unmarked, messages, arguments)
            if text != traced.text and self._has_stored_loops:
                raise jinja2.TemplateError("it changes a block in which it has collected messages")
            if text != traced.text:
                return Traced(text=text, spans=(None,) * len(messages))
        return traced

    def looks_at(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether messages have other fields than role and content, or a content that the template may look for."""
        for message in messages:
            content = message.get("content")
            if len(message) != 2 or not isinstance(content, str) or "role" not in message:
                return True
            if (content in self.equal and content) or any(text in content for text in self.sought):
                return True
        return False

    def _training_time(self, form: str) -> str:
        self.has_written_time = True
        return TRAINING_TIME.strftime(form)


def _compiled(tree: jinja2.nodes.Template) -> jinja2.Template:
    environment = _environment()
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _rendered(template: jinja2.Template, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """What a template writes.

    Raises:
        jinja2.TemplateError: it writes too much, or does not come to an end.
        Exception: whatever else its expressions raise.
    """
    left = _MOST_ITERATIONS + len(messages) ** 2

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise jinja2.TemplateError(f"its loops take more than {_MOST_ITERATIONS:,} turns")

    parts, characters = [], 0
    for part in template.generate(messages=messages, **arguments, **{_COUNT: count}):
        parts.append(part)
        characters += len(part)
        if characters > _MOST_CHARACTERS:
            raise jinja2.TemplateError(f"it writes more than {_MOST_CHARACTERS:,} characters")
    return "".join(parts)


class _Markers:
    """Writes the markers of one rendering.

    Attributes:
        in_macro: whether one was written inside of a macro, whose output the template may change.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._numbers = {id(message): number for number, message in enumerate(messages)}
        # The loop that handles a message at present.
        self._loop: int | None = None
        self.in_macro = False

    def begin(self, loop: int, in_macro: bool, *items: object) -> str:
        """The marker at the beginning of an iteration.

        Args:
            loop: number of the loop in the template.
            in_macro: the loop is inside of a macro, where a loop over parts of a message is none over messages.
            items: what the iteration may handle.
        """
        number = next((self._numbers[id(item)] for item in items if id(item) in self._numbers), None)
        if in_macro and (self._loop not in (None, loop) or (number is None and self._loop is None)):
            return ""
        self.in_macro |= in_macro
        self._loop = None if number is None else loop
        return f"{_START}{'' if number is None else number}{_STOP}"

    def end(self, loop: int, in_macro: bool) -> str:
        """The marker behind a loop."""
        if in_macro and self._loop != loop:
            return ""
        self._loop = None
        return f"{_START}{_STOP}"


def _traced(marked: str, count: int) -> Traced:
    texts: list[str] = []
    spans: list[tuple[int, int] | None] = [None] * count
    position = length = 0
    current: int | None = None
    for match in _MARKER.finditer(marked):
        text = marked[position : match.start()]
        # White space that an earlier loop leaves is not the message's.
        if current is not None and text and (text.strip() or spans[current] is None):
            spans[current] = (length, length + len(text))
        texts.append(text)
        length += len(text)
        position = match.end()
        current = int(match[1]) if match[1] else None
    texts.append(marked[position:])
    return Traced(text="".join(texts), spans=tuple(spans))


class _Marking(jinja2.visitor.NodeTransformer):
    """Adds the markers to the syntax tree: to outer loops, since a loop inside of one handles parts of a message."""

    def __init__(self) -> None:
        self._loops = 0
        self._in_macro = False

    def visit_Macro(self, node: jinja2.nodes.Macro) -> Any:  # noqa: N802  the name that Jinja calls
        before, self._in_macro = self._in_macro, True
        self.generic_visit(node)
        self._in_macro = before
        return node

    def visit_For(self, node: jinja2.nodes.For) -> Any:  # noqa: N802  the name that Jinja calls
        self._loops += 1
        place = [jinja2.nodes.Const(self._loops), jinja2.nodes.Const(self._in_macro)]
        targets = node.target.items if isinstance(node.target, jinja2.nodes.Tuple) else [node.target]
        items = [jinja2.nodes.Name(item.name, "load") for item in targets if isinstance(item, jinja2.nodes.Name)]
        node.body.insert(0, _output(_MARK, *place, *items, *_indexed(node)))
        return [node, _output(_END, *place)]


class _Counting(jinja2.visitor.NodeTransformer):
    """Counts the turns of every loop and the calls of every macro: a template may have loops that do not end."""

    def visit_For(self, node: jinja2.nodes.For) -> Any:  # noqa: N802  the name that Jinja calls
        return self._counted(node)

    def visit_Macro(self, node: jinja2.nodes.Macro) -> Any:  # noqa: N802  the name that Jinja calls
        return self._counted(node)

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        call = jinja2.nodes.Call(jinja2.nodes.Name(_COUNT, "load"), [], [], None, None)
        node.body.insert(0, jinja2.nodes.ExprStmt(call))
        return node


def _indexed(loop: jinja2.nodes.For) -> list[jinja2.nodes.Expr]:
    """What a loop over numbers takes by its number, such as `messages[i]`; None where the list is not defined yet."""
    if not isinstance(loop.target, jinja2.nodes.Name):
        return []
    lists = {
        item.node.name
        for part in loop.body
        for item in part.find_all(jinja2.nodes.Getitem)
        if isinstance(item.node, jinja2.nodes.Name)
        and isinstance(item.arg, jinja2.nodes.Name)
        and item.arg.name == loop.target.name
    }
    found: list[jinja2.nodes.Expr] = []
    for name in sorted(lists):
        whole = jinja2.nodes.Name(name, "load")
        item = jinja2.nodes.Getitem(whole, jinja2.nodes.Name(loop.target.name, "load"), "load")
        found.append(jinja2.nodes.CondExpr(jinja2.nodes.Test(whole, "defined", [], [], None, None), item, None))
    return found


def _output(name: str, *arguments: jinja2.nodes.Expr) -> jinja2.nodes.Output:
    call = jinja2.nodes.Call(jinja2.nodes.Name(name, "load"), list(arguments), [], None, None)
    return jinja2.nodes.Output([call])


class _Generation(jinja2.ext.Extension):
    """The `{% generation %}` block, with which some templates mark answers; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  the name and kind that Jinja expects

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes inside of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses products and powers that would fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator of `intercepted_binops`.

        Raises:
            jinja2.TemplateError: it would be too large.
        """
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MOST_DIGITS * 3:
                raise jinja2.TemplateError(f"it computes a power of more than {_MOST_DIGITS:,} digits")
        elif any(
            isinstance(one, (str, list, tuple)) and isinstance(other, int) and len(one) * other > _MOST_CHARACTERS
            for one, other in ((left, right), (right, left))
        ):
            raise jinja2.TemplateError(f"it repeats a text to more than {_MOST_CHARACTERS:,} characters")
        return super().call_binop(context, operator, left, right)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TRAINING_TIME.strftime
    return environment


def _arguments(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Variables that the template reads without setting them, or only where they are not defined."""
    undeclared = jinja2.meta.find_undeclared_variables(tree)
    assigned = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    tested = {
        node.node.name
        for node in tree.find_all(jinja2.nodes.Test)
        if node.name == "defined" and isinstance(node.node, jinja2.nodes.Name)
    }
    return frozenset(undeclared - (assigned - tested))


def _choices(tree: jinja2.nodes.Template) -> dict[str, frozenset[str]]:
    """The texts that the template compares each variable with."""
    found: dict[str, frozenset[str]] = {}
    for compare in tree.find_all(jinja2.nodes.Compare):
        if isinstance(compare.expr, jinja2.nodes.Name):
            found[compare.expr.name] = found.get(compare.expr.name, frozenset()) | _constants(compare)
    return found


def _literals(tree: jinja2.nodes.Template) -> tuple[frozenset[str], frozenset[str]]:
    """Texts that the template looks for in others by `in` or a string's method, and texts that it compares with."""
    sought: set[str] = set()
    equal: set[str] = set()
    items = {
        node.target.name for node in tree.find_all(jinja2.nodes.For) if isinstance(node.target, jinja2.nodes.Name)
    }
    for compare in tree.find_all(jinja2.nodes.Compare):
        for operand in compare.ops:
            if operand.op not in ("in", "notin"):
                equal |= _constants(compare)
            # `'tool_calls' in message` looks for a key.
            elif not (isinstance(operand.expr, jinja2.nodes.Name) and operand.expr.name in items):
                sought |= _constants(compare)
    for call in tree.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Getattr) and call.node.attr not in ("format", "get", "items", "append"):
            sought |= {text for argument in call.args for text in _constants(argument)}
    for filtered in tree.find_all(jinja2.nodes.Filter):
        if filtered.name in ("replace", "select", "reject"):
            sought |= {text for argument in filtered.args for text in _constants(argument)}
    return frozenset(sought - {""}), frozenset(equal)


def _constants(node: jinja2.nodes.Node) -> set[str]:
    nodes = [node, *node.find_all(jinja2.nodes.Const)]
    return {item.value for item in nodes if isinstance(item, jinja2.nodes.Const) and isinstance(item.value, str)}
