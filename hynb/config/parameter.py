"""One parameter of a run: its type, bounds and help, and how its values are parsed, checked and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hynb.errors import nearest

# How None is written on a command line and in a notebook's parameters, where plain types are needed.
AUTOMATIC = "auto"
_LARGEST = 10**18
# Characters of a wrong value.
_SHOWN = 200


@dataclass(kw_only=True, frozen=True, eq=False)
class Parameter:
    """One parameter of the schema, from which its widget, flag, table row and validation are generated.

    Args:
        type: of a value other than None; str for a parameter with choices, list for a list of str.
        optional: whether None is valid, which means automatic.
        choices: the valid values; empty if the type allows any.
        minimum: smallest valid number.
        above: every valid number is greater than this.
        maximum: largest valid number.
    """

    name: str
    type: type
    optional: bool
    default: Any
    choices: tuple[str, ...]
    group: str
    help: str
    minimum: float | None
    above: float | None
    maximum: float | None
    unit: str

    @property
    def type_name(self) -> str:
        """The type in words, for messages and tables."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return words.get(self.type, "a list of names")

    @property
    def range(self) -> str:
        """The bounds as text; empty if there are none."""
        bounds = [
            f"{word} {value if isinstance(value, int) else format(value, 'g')}"
            for word, value in (("≥", self.minimum), (">", self.above), ("≤", self.maximum))
            if value is not None
        ]
        return " and ".join(bounds)

    def parse(self, value: Any) -> Any:
        """Converts text, a YAML value or a notebook's plain value to this parameter's type.

        Raises:
            ValueError: what is wrong with the value; the message lacks the parameter's name.
        """
        if self.optional and (value is None or value in ("", AUTOMATIC)):
            return None
        if value is None:
            raise ValueError(f"is empty; it takes {self.type_name}")
        if self.type is list:
            if value == "none" and not self.default:
                return []
            parts = value.replace(",", " ").split() if isinstance(value, str) else value
            if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
                raise ValueError(f"is {_shown(value)}; it takes names, separated by commas")
            return list(parts)
        if self.type is str:
            if not isinstance(value, str):
                raise ValueError(f"is {_shown(value)}; it takes {self.type_name}")
            return value
        return PARSERS[self.type](value)

    def problems(self, value: Any) -> list[str]:
        """One message for a value of the wrong type, outside the choices or out of bounds; else none."""
        name = f"{self.name} = {_shown(value)}"
        if value is None:
            return [] if self.optional else [f"{name}: must be {self.type_name}"]
        if self.choices and value not in self.choices:
            return [f"{name}: must be {self.type_name}{nearest(str(value), self.choices)}"]
        wanted = (int, float) if self.type is float else self.type
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.type is not bool):
            return [f"{name}: must be {self.type_name}"]
        if self.type is list and self.default and not value:
            return [f"{name}: must name at least one module; the default is {', '.join(self.default)}"]
        if isinstance(value, str) and not value.strip():
            return [f"{self.name}: is empty; it takes {self.type_name}"]
        if not isinstance(value, int | float) or self.type is bool:
            return []
        if not self._in_bounds(value):
            return [f"{name}: must be {self.range}; the default is {self.default_text}"]
        if not _is_usable(value):
            return [f"{self.name} = {_shown(value)}: must be a finite number below 1e18"]
        return []

    def _in_bounds(self, value: float) -> bool:
        # NaN fails every comparison, and every number has a bound.
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    @property
    def default_text(self) -> str:
        """The default as it is written on a command line; `none` for an empty list."""
        return value_text(self.default) or "none"


def _is_usable(value: float) -> bool:
    """Whether a number is one, and not larger than the integers of the programs that compute with it."""
    return abs(value) < _LARGEST


def value_text(value: Any) -> str:
    """The text of a parameter's value on a command line and in a table."""
    if value is None:
        return AUTOMATIC
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"is {_shown(value)}; it takes true or false")


def _parse_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and _is_usable(value):
        return value
    try:
        if isinstance(value, float) and _is_usable(value) and value.is_integer():
            return int(value)
        if isinstance(value, str):
            number = int(value.replace("_", ""))
            if _is_usable(number):
                return number
    except ValueError:
        pass
    raise ValueError(f"is {_shown(value)}; it takes a whole number")


def _parse_float(value: Any) -> float:
    # YAML 1.1 reads 1e-5 as text.
    if not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"is {_shown(value)}; it takes a number")


def _shown(value: Any) -> str:
    """A wrong value in a message, which a long one must not fill."""
    if isinstance(value, int) and not isinstance(value, bool) and not _is_usable(value):
        return "a number with too many digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# By type: the value, or a ValueError that says what is wrong with it.
PARSERS = {bool: _parse_bool, int: _parse_int, float: _parse_float}
