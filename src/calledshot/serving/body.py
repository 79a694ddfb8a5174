"""A request's body, read field by field. Each reader raises ApiError that names the field."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from calledshot.serving.errors import ApiError


def parse(body: bytes) -> Body:
    """The JSON object of a body."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return Body(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class Body:
    """Fields that are absent or null take their default."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields
        self._read: set[str] = set()

    def value(self, name: str) -> Any:
        """Whatever stands there, None for nothing."""
        self._read.add(name)
        return self._fields.get(name)

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            wrong(name, "must be a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            wrong(name, "must be true or false")
        return bool(value)

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            wrong(name, "must be a whole number")
        return _within(name, value, low, high)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(_within(name, value, low, high)):
            wrong(name, "must be a number")
        return float(value)

    def strings(self, name: str, most: int) -> list[str]:
        """A string or a list of up to `most`, none of them empty."""
        value = self.value(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            wrong(name, "must be a string or a list of strings, none of them empty")
        if len(found) > most:
            wrong(name, f"has {len(found)} strings, at most {most} are taken")
        return found

    def neutral(self, name: str, *values: Any) -> None:
        """A field that is only taken where it changes nothing."""
        value = self.value(name)
        if value is not None and value not in values:
            wrong(name, "is not supported by this server", code="unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Fields that say nothing about the completion."""
        self._read.update(names)

    def done(self) -> None:
        """Raise for a field that nobody has read: better than doing something else than was asked for."""
        unknown = [name for name in self._fields if name not in self._read]
        if unknown:
            wrong(unknown[0], "is not known", code="unknown_parameter")


def wrong(name: str, what: str, code: str | None = None) -> NoReturn:
    """Raise for a field."""
    raise ApiError(400, f"{name[:100]!r} {what}", parameter=name[:100], code=code)


def _within(name: str, value: Any, low: float, high: float | None) -> Any:
    if value < low or (high is not None and value > high):
        wrong(name, f"must be {low:g} or more" if high is None else f"must be between {low:g} and {high:g}")
    return value
