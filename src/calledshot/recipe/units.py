"""Numbers with units, as people type them: `8k`, `1.5M`, `3B` tokens; `80GiB`; `90min`; `45%`; `1e21flop`.

Counts are powers of 1000. Every parser takes text and raises `ValueError` with what it would have understood.
"""

import re
from decimal import Decimal

COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SI = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "P": 10**15, "E": 10**18, "Z": 10**21}
BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MINUTES = {"s": Decimal(1) / 60, "min": 1, "h": 60, "d": 1440}
NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)\s*([^\d\s].*)?")
LARGEST_EXPONENT = 40


def split(text: str, expected: str) -> tuple[Decimal, str]:
    """The number and the unit of `text`; the unit is "" where there is none."""
    match = NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected {expected}")
    number = Decimal(match[1].replace("_", ""))
    if abs(number.adjusted()) > LARGEST_EXPONENT and number:
        raise ValueError(f"out of range; expected {expected}")
    return number, (match[2] or "").strip()


def count(text: str) -> Decimal:
    """`8`, `8k`, `1.5M`, `3B`, `2T`: a plain number."""
    number, unit = split(text, "a number (8, 8k, 1.5M, 3B, 2T)")
    if unit not in COUNTS:
        raise ValueError(f"unknown unit {unit!r}; counts take k, M, B or T (powers of 1000)")
    return number * COUNTS[unit]


def whole(text: str) -> int:
    """A count without a fraction."""
    number = count(text)
    if number != int(number):
        raise ValueError("expected a whole number")
    return int(number)


def bytes_(text: str) -> int:
    """`80GiB`, `16GB`: bytes. The unit must be written, since a bare number or a `G` could mean either;
    nothing is `0`."""
    number, unit = split(text, "bytes with a unit (80GB or 80GiB)")
    if not number and not unit:
        return 0
    if unit not in BYTES:
        raise ValueError(f"expected bytes with a unit, one of {', '.join(BYTES)}")
    return int(number * BYTES[unit])


def minutes(text: str) -> float:
    """`90s`, `10min`, `2h`, `3d`, or a bare number of minutes: minutes."""
    number, unit = split(text, "a time (90s, 10min, 2h, 3d)")
    if unit and unit not in MINUTES:
        raise ValueError(f"unknown unit {unit!r}; times take s, min, h or d")
    return float(number * MINUTES[unit or "min"])


def flops(text: str) -> float:
    """`1e21`, `1e21flop`, `400Eflop`, `989TFLOP/s`: FLOPs, or FLOP/s."""
    number, unit = split(text, "FLOPs (1e21, 1e21flop, 989T)")
    prefix = re.sub(r"(?i:flops?)(/s)?$", "", unit).strip()
    if prefix not in SI:
        raise ValueError(f"unknown unit {unit!r}; FLOPs take k, M, G, T, P, E or Z, then `flop` if you like")
    return float(number * SI[prefix])


def share(text: str) -> float:
    """`45%` or `0.45`: a share."""
    number, unit = split(text, "a share (0.45 or 45%)")
    if unit not in ("", "%"):
        raise ValueError(f"unknown unit {unit!r}; expected a share (0.45 or 45%)")
    return float(number / 100 if unit else number)


def show_count(number: float) -> str:
    """`1500000` as `1.5M`: at most four digits, for people."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def show_bytes(number: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(number) >= BYTES[unit]:
            return f"{number / BYTES[unit]:,.2f} {unit}"
    return f"{number:,.0f} B"


def show_hours(hours: float) -> str:
    """Hours as days, hours or minutes, whichever reads best."""
    if hours >= 72:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.1f} minutes"
