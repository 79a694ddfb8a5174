"""Before a run: how many items a difference needs, and which difference so many items can show.

All by the normal approximation for two proportions at a two-sided level, which is what planning needs. Paired means
that both systems answer the same items; `discordance` is then the share of items on which exactly one of them is right,
and the variance of an item's difference is discordance - difference². Miller (2024, "Adding Error Bars to Evals",
section 5) has the same formula in variances.
"""

import math

from scipy import special

from calledshot.stats.intervals import two_sided_z


def items_needed(rate_a: float, rate_b: float, *, power: float = 0.8, level: float = 0.95) -> int:
    """Items for each of two systems with these true rates, on separate items: 2,445 for 0.50 against 0.54."""
    variance = rate_a * (1 - rate_a) + rate_b * (1 - rate_b)
    return _items(variance, rate_a - rate_b, power, level)


def paired_items_needed(difference: float, discordance: float, *, power: float = 0.8, level: float = 0.95) -> int:
    """Items that both systems answer, for their rates to be told apart when they truly differ by `difference`."""
    return _items(_paired_variance(difference, discordance), difference, power, level)


def smallest_difference(items: int, *, rate: float = 0.5, power: float = 0.8, level: float = 0.95) -> float:
    """The difference of two rates that `items` separate items each can show: 0.063 for 1,000.

    Both rates are given the variance at `rate`; 0.5 is the cautious choice, and where nothing is known the right one.
    """
    return _z(power, level) * math.sqrt(2 * rate * (1 - rate) / items)


def paired_smallest_difference(items: int, discordance: float, *, power: float = 0.8, level: float = 0.95) -> float:
    """The difference of two rates that the same `items` answered by both can show.

    A result above `discordance` says that not even disagreements which all go one way would show.
    """
    z = _z(power, level)
    return z * math.sqrt(discordance / (items + z**2))


def power_of(rate_a: float, rate_b: float, items: int, *, level: float = 0.95) -> float:
    """Probability that a two-sided test on `items` separate items each tells these true rates apart."""
    return _power(rate_a * (1 - rate_a) + rate_b * (1 - rate_b), rate_a - rate_b, items, level)


def paired_power(difference: float, discordance: float, items: int, *, level: float = 0.95) -> float:
    """Probability that a two-sided paired test on `items` items shows a true `difference`."""
    return _power(_paired_variance(difference, discordance), difference, items, level)


def _z(power: float, level: float) -> float:
    if not 0 < power < 1:
        raise ValueError(f"power lies between 0 and 1, not at {power}")
    return two_sided_z(level) + float(special.ndtri(power))


def _paired_variance(difference: float, discordance: float) -> float:
    if not abs(difference) <= discordance <= 1:
        raise ValueError(
            f"a difference of {difference} needs that share of discordant items or more, not {discordance}"
        )
    return discordance - difference**2


def _items(variance: float, difference: float, power: float, level: float) -> int:
    if difference == 0:
        raise ValueError("no number of items shows a difference of 0")
    return max(1, math.ceil(_z(power, level) ** 2 * variance / difference**2))


def _power(variance: float, difference: float, items: int, level: float) -> float:
    if variance == 0:
        return float(difference != 0)
    shift, z = abs(difference) / math.sqrt(variance / items), two_sided_z(level)
    return float(special.ndtr(shift - z) + special.ndtr(-shift - z))
