"""How values are written for people: few digits, known units, and "n/a" for what is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

MISSING = "n/a"


def finite(value: object) -> float | None:
    """The value as a float where it is a finite number, else None. Booleans and digits in strings are not numbers."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def moment(value: object) -> float | None:
    """Seconds since the epoch, from a number of them or from an ISO 8601 time (UTC where it names no zone)."""
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return finite(value)


def date(value: object) -> str:
    """A time as `2026-03-01 14:05 UTC`."""
    seconds = moment(value)
    if seconds is None:
        return MISSING
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return MISSING


def significant(value: object, digits: int = 3) -> str:
    """`digits` significant digits, without an exponent between 1e-4 and 1e6: 0.0123, 45.7, 1,280."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e6:
        return power(number, digits)
    rounded = float(f"{number:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits - 1 - magnitude)}f}"


def power(value: object, digits: int = 3) -> str:
    """A number as a power of ten: `3.20 × 10¹⁵`."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def nats(value: object) -> str:
    """A loss, three decimals: the fourth moves with the seed."""
    number = finite(value)
    return MISSING if number is None else f"{number:.3f}" if abs(number) < 1000 else power(number)


def count(value: object) -> str:
    """A count: 812, 4.12M, 1.30T."""
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) < 1000:
        return f"{number:.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if abs(number) < 999.5 * size:
            return f"{significant(number / size)}{unit}"
    return power(number)


def whole(value: object) -> str:
    """An integer in full: 12,000."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def size(value: object) -> str:
    """Bytes: 512 MiB, 1.50 GiB."""
    number = finite(value)
    if number is None:
        return MISSING
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1000:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{significant(number)} {unit}"
        number /= 1024
    return f"{significant(number)} TiB"


def duration(value: object) -> str:
    """Seconds as `42 s`, `8 min 5 s`, `3 h 20 min`, `12 d 4 h`."""
    number = finite(value)
    if number is None or number < 0:
        return MISSING
    if number < 10:
        return f"{significant(number, 2)} s"
    seconds = round(number)
    for large, small, unit, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86_400, 3600)):
        if seconds < unit * {60: 60, 3600: 24, 86_400: 1 << 40}[unit]:
            if seconds < 60:
                return f"{seconds} s"
            rest = seconds % unit // part
            return f"{seconds // unit} {large}" + (f" {rest} {small}" if rest else "")
    return MISSING


def percent(value: object, digits: int = 2) -> str:
    """A share in [0, 1] as per cent."""
    number = finite(value)
    return MISSING if number is None else f"{significant(100 * number, digits if abs(number) < 0.995 else 3)} %"


def utilization(low: object, high: object) -> str:
    """MFU as a range of shares: against the highest and against the lowest peak probed.

    `low` above 1 would mean more than the highest peak this machine ever showed, so nothing is printed; `high` above 1
    only says that the lowest probe was too low, so that end is left out.
    """
    least, most = finite(low), finite(high)
    if least is None or least < 0 or (most is not None and most < least):
        return MISSING
    if least > 1:
        return f"{MISSING} (refused: above 100 % of the highest peak probed)"
    if most is None:
        return f"{percent(least)} of the highest peak"
    if most > 1:
        return f"at least {percent(least)} (upper end refused: above 100 %)"
    return percent(least) if percent(least) == percent(most) else f"{percent(least).removesuffix(' %')}–{percent(most)}"


def money(value: object) -> str:
    """An amount in the currency of the price it was computed with: 0.42, 128, 12,400."""
    number = finite(value)
    if number is None:
        return MISSING
    return f"{number:.2f}" if abs(number) < 100 else whole(float(f"{number:.2e}"))


def written(value: object) -> str:
    """A recipe's or an environment's value on one line."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(written(item) for item in value) or "none"
    return str(value).replace("\n", "\\n") or "(empty)"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables; items of lists of tables are numbered."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = {str(place): item for place, item in enumerate(value)}
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
