"""What a suite's runs say: verdicts against the noise of seeds, the arms' order at each size, and what a win cost.

Everything is arithmetic on `Outcome`; nothing is read from disk.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calledshot.stats import benjamini_hochberg, holm

from .noise import Contrast, Noise, contrast, own, pooled, rank_correlation, smallest
from .outcomes import NEARBY, Outcome
from .suite import Suite

ALPHA = 0.05
"""Share of false ones that is expected at most among the differences of a family that are called better or worse."""
LOSS = "bits per byte"
BETTER, WORSE, NOISE, NONE = "better", "worse", "inside the noise", "no verdict"
FEWEST_POINTS = 3
"""Points of a curve that a slope is fitted through at least."""
SLOPES = (0.5, 1.5)
"""The true gain, as shares of the slope that is taken during a run, lies between these.

A learning curve flattens: a power law of exponent 0.35 keeps 0.66 of the slope at twice the tokens and 0.59 at four
times. And a longer run also decays for longer: dense decoders of 0.3M, 1M and 3M parameters gained 1.03, 1.24 and 1.28
times their slopes from twice the tokens (docs/ablations.md).
"""

Key = tuple[str, str]
"""(arm, size)."""


@dataclass(frozen=True)
class Effect:
    """One arm against another at one size: lower is better, so a negative difference is the arm's gain."""

    arm: str
    against: str
    size: str
    difference: float | None = None
    """Of the means; None where one side has no result."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % t interval, for this test alone; None without a verdict."""
    p_value: float | None = None
    adjusted: float | None = None
    """Benjamini and Hochberg's, over the family that the effect was tested in."""
    sure: bool = False
    """Whether Holm's correction, which bounds the probability of a single false one, leaves the verdict too."""
    verdict: str = NONE
    reason: str = ""
    """Why there is no verdict, or what to hold against the one there is."""
    seeds: tuple[int, int] = (0, 0)
    """Runs on either side."""


@dataclass(frozen=True)
class Stability:
    """What was unstable about an arm at a size."""

    spikes: int
    """Jumps of the training loss that most runs of the same seed do not share, since those are the data's."""
    skipped: int
    diverged: int
    """Runs."""
    failed: int
    """Runs."""

    @property
    def unstable(self) -> bool:
        """Whether a reader should know."""
        return bool(self.spikes or self.skipped or self.diverged)

    @property
    def apart(self) -> bool:
        """Whether the arm is left out of the noise that others are judged by, and is judged by its own."""
        return bool(self.skipped or self.diverged)


@dataclass(frozen=True)
class Flip:
    """Two arms whose order changes with size, outside the noise at both."""

    first: str
    second: str
    better_at: str
    """Size at which `first` wins."""
    worse_at: str
    """Size at which `second` wins."""


@dataclass(frozen=True)
class Order:
    """The arms by loss at each size, and how alike the orders are."""

    by_size: dict[str, list[str]]
    """Best first."""
    correlations: list[tuple[str, str, float, int]]
    """Two sizes, Spearman's rank correlation over the arms that both have, and how many these are."""
    flips: list[Flip]
    pairs: int
    """Pairs of arms and sizes that were looked at for flips."""


@dataclass(frozen=True)
class Exchange:
    """What more or fewer tokens are worth to the baseline."""

    gain: float
    """Bits per byte for e times the tokens."""
    variance: float
    """Of the estimate of `gain`."""
    first: float
    """Share of the run's tokens from which on the slope was taken."""


@dataclass(frozen=True)
class Budget:
    """An arm against the baseline once both may spend the same: the baseline's loss is moved along its own curve. How
    far is known to a factor (`SLOPES`), so the interval holds both ends, and a verdict is one of both."""

    ratio: float
    """What the arm spent over what the baseline spent."""
    effect: Effect


@dataclass(frozen=True)
class Analysis:
    """All that is said about a suite's runs."""

    noise: dict[str, Noise | None]
    """By size."""
    floor: dict[str, float]
    """By size: smallest difference of a one-seed arm from the baseline that a single test would see."""
    stability: dict[Key, Stability]
    effects: list[Effect]
    """Every arm against the baseline, then the suite's comparisons that are not among them."""
    order: Order
    gain: dict[str, float]
    """By size: bits per byte that the baseline gains for e times the tokens, from its own curve."""
    by_flops: dict[Key, Budget]
    by_seconds: dict[Key, Budget]
    measures: dict[str, list[Effect]]
    """The same as `effects` for each of the suite's evals, each a family of its own."""

    def effect(self, arm: str, size: str) -> Effect | None:
        """An arm against the baseline."""
        return next((one for one in self.effects if (one.arm, one.size) == (arm, size)), None)

    @property
    def verdicts(self) -> dict[str, int]:
        """How often each verdict was given to an arm against another."""
        return {
            verdict: sum(one.verdict == verdict for one in self.effects) for verdict in (BETTER, WORSE, NOISE, NONE)
        }


def comparable(suite: Suite, runs: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, without the loss of runs that were measured on other text than the baseline at their size."""
    measured = {
        size.name: {one.bytes_evaluated for one in runs if (one.arm, one.size) == (suite.baseline, size.name)} - {None}
        for size in suite.sizes
    }
    return [
        replace(one, loss=None) if measured[one.size] and one.bytes_evaluated not in measured[one.size] else one
        for one in runs
    ]


def analyse(suite: Suite, runs: Sequence[Outcome]) -> Analysis:
    """The analysis of every outcome of a suite; unfinished runs count for nothing but stability."""
    runs = comparable(suite, runs)
    steady = stability(runs)
    groups = grouped(runs, lambda one: one.loss)
    noise = {size.name: noise_at(size.name, groups, steady) for size in suite.sizes}
    judged = Judge(suite, steady, noise)
    effects = judged.family(judged.pairs(), groups)
    seeds = {name: len(groups.get((suite.baseline, name), ())) for name in noise}
    exchanges = {name: value for name in noise if (value := exchange(suite, name, runs)) is not None}
    names = {name for one in runs for name in one.measures}
    measures = {}
    for name in dict.fromkeys(one.name for one in suite.evals if one.name in names):
        asked = grouped(runs, lambda one, name=name: one.measures.get(name))
        other = Judge(suite, steady, {size: noise_at(size, asked, steady) for size in noise})
        measures[name] = other.family(other.pairs(), asked)
    return Analysis(
        noise=noise,
        floor={name: smallest(known, 1, seeds[name]) for name, known in noise.items() if known and seeds[name]},
        stability=steady,
        effects=effects,
        order=order(suite, judged, groups),
        gain={name: one.gain for name, one in exchanges.items()},
        by_flops=judged.at_equal(grouped(runs, lambda one: one.flops), groups, exchanges, exact=True),
        by_seconds=judged.at_equal(clocked(runs), groups, exchanges, exact=False),
        measures=measures,
    )


def grouped(runs: Sequence[Outcome], read: Callable[[Outcome], float | None]) -> dict[Key, list[float]]:
    """A number of the runs that count, by cell."""
    found: dict[Key, list[float]] = {}
    for one in runs:
        if one.counts and (value := read(one)) is not None:
            found.setdefault((one.arm, one.size), []).append(value)
    return found


def clocked(runs: Sequence[Outcome]) -> dict[Key, list[float]]:
    """Seconds by cell: by each measurement of its speed where that was measured alone, else of each run."""
    found = grouped(runs, lambda one: one.seconds)
    return found | {(one.arm, one.size): list(one.clocks) for one in runs if one.counts and one.clocks}


def stability(runs: Sequence[Outcome]) -> dict[Key, Stability]:
    """What was unstable, by cell."""
    cells: dict[Key, list[Outcome]] = {}
    for one in runs:
        cells.setdefault((one.arm, one.size), []).append(one)

    def spikes(run: Outcome) -> int:
        beside = [one for one in runs if (one.size, one.seed) == (run.size, run.seed) and one is not run and one.curve]
        return sum(2 * sum(near(step, one) for one in beside) < max(1, len(beside)) for step in run.spikes)

    def near(step: int, one: Outcome) -> bool:
        return any(abs(step - other) <= NEARBY for other in one.spikes)

    return {
        key: Stability(
            spikes=sum(map(spikes, members)),
            skipped=sum(one.skipped for one in members),
            diverged=sum(one.diverged for one in members),
            failed=sum(one.state == "failed" for one in members),
        )
        for key, members in cells.items()
    }


def noise_at(size: str, groups: Mapping[Key, Sequence[float]], steady: Mapping[Key, Stability]) -> Noise | None:
    """The noise of seeds at a size, from its stable arms with several."""
    return pooled(values for key, values in groups.items() if key[1] == size and not steady[key].apart)


class Judge:
    """Tests arms against each other with the noise of their size."""

    def __init__(self, suite: Suite, steady: Mapping[Key, Stability], noise: Mapping[str, Noise | None]) -> None:
        self.suite, self.steady, self.noise = suite, steady, noise

    def pairs(self) -> list[tuple[str, str, str]]:
        """(arm, against, size) of the suite's tests: every arm against the baseline, and its comparisons."""
        suite = self.suite
        found = []
        for size in suite.sizes:
            names = [arm.name for arm in suite.arms_at(size)]
            found += [(name, suite.baseline, size.name) for name in names if name != suite.baseline]
            found += [
                (a, b, size.name) for a, b in suite.comparisons if suite.baseline not in (a, b) and {a, b} <= set(names)
            ]
        return found

    def noise_of(self, arm: str, size: str, values: Sequence[float]) -> Noise | None:
        """The noise of one run of an arm: that of its size, or its own where it is unstable."""
        return own(values) if self.steady[arm, size].apart else self.noise[size]

    def family(self, pairs: Iterable[tuple[str, str, str]], groups: Mapping[Key, Sequence[float]]) -> list[Effect]:
        """The effects of some pairs, corrected together."""
        return corrected([self.test(arm, against, size, groups) for arm, against, size in pairs])

    def test(
        self,
        arm: str,
        against: str,
        size: str,
        groups: Mapping[Key, Sequence[float]],
        shift: float = 0.0,
        more: float | None = 0.0,
    ) -> Effect:
        """One test, not corrected yet. `shift` is added to the difference; its variance is `more`, None if unknown."""
        a, b = groups.get((arm, size), ()), groups.get((against, size), ())
        blank = Effect(arm, against, size, seeds=(len(a), len(b)))
        if not a or not b:
            return replace(blank, reason=f"no result of {arm if not a else against}")
        seen = replace(blank, difference=statistics.fmean(a) - statistics.fmean(b) + shift)
        noise_a, noise_b = self.noise_of(arm, size, a), self.noise_of(against, size, b)
        if noise_a is None or noise_b is None or more is None:
            lonely = arm if noise_a is None else against
            if self.steady[lonely, size].apart:
                return replace(seen, reason=f"{lonely} is unstable, and has one seed")
            return replace(seen, reason="the noise is not known")
        found: Contrast = contrast(a, b, noise_a, noise_b, shift, more)
        unstable = [name for name in (arm, against) if self.steady[name, size].unstable]
        return replace(
            seen,
            low=found.difference.low,
            high=found.difference.high,
            p_value=found.p_value,
            reason=f"{' and '.join(unstable)} unstable" if unstable else "",
        )

    def at_equal(
        self,
        spent: Mapping[Key, Sequence[float]],
        groups: Mapping[Key, Sequence[float]],
        exchanges: Mapping[str, Exchange],
        *,
        exact: bool,
    ) -> dict[Key, Budget]:
        """Every arm against the baseline at equal spending, whose noise is pooled by size unless it is `exact`."""
        found: list[tuple[Key, float, Effect]] = []
        for arm, against, size in self.pairs():
            a, b = spent.get((arm, size)), spent.get((against, size))
            if against != self.suite.baseline or size not in exchanges or not a or not b:
                continue
            ratio, known = statistics.geometric_mean(a) / statistics.geometric_mean(b), exchanges[size]
            clock: float | None = 0.0
            if not exact:
                noise = pooled(np.log(values).tolist() for key, values in spent.items() if key[1] == size)
                clock = None if noise is None else noise.sd**2 * (1 / len(a) + 1 / len(b))
            ends = []
            for share in SLOPES:
                shift = share * known.gain * math.log(ratio)
                more = share**2 * known.variance * math.log(ratio) ** 2
                more = None if clock is None else more + (share * known.gain) ** 2 * clock
                ends.append(self.test(arm, against, size, groups, shift, more))
            effect = between(*ends)
            if ratio < known.first and effect.p_value is not None:
                effect = replace(effect, p_value=None, reason="it spent less than the baseline's curve is known for")
            found.append(((arm, size), ratio, effect))
        effects = corrected([effect for _, _, effect in found])
        return {key: Budget(ratio, effect) for (key, ratio, _), effect in zip(found, effects, strict=True)}


def between(first: Effect, second: Effect) -> Effect:
    """One effect that is known to lie between two: the interval of both, and no verdict that not both give."""
    if first.difference is None or second.difference is None:
        return first
    middle = replace(first, difference=(first.difference + second.difference) / 2)
    if None in (first.low, first.high, second.low, second.high, first.p_value, second.p_value):
        return middle
    alike = first.difference * second.difference > 0
    return replace(
        middle,
        low=min(first.low, second.low),
        high=max(first.high, second.high),
        p_value=max(first.p_value, second.p_value) if alike else 1.0,
    )


def corrected(effects: Sequence[Effect]) -> list[Effect]:
    """The effects with p-values adjusted over all of them, and verdicts.

    The tests share a baseline and an estimate of the noise, so they depend on each other positively, for which
    Benjamini and Hochberg's promise holds; when nothing is there to be found, it is that of Holm's.
    """
    p_values = [one.p_value for one in effects if one.p_value is not None]
    if not p_values:
        return list(effects)
    adjusted = zip(benjamini_hochberg(p_values).tolist(), holm(p_values).tolist(), strict=True)
    found = []
    for one in effects:
        if one.p_value is not None and one.difference is not None:
            rate, probability = next(adjusted)
            sign = BETTER if one.difference < 0 else WORSE
            verdict = sign if rate <= ALPHA else NOISE
            one = replace(one, adjusted=rate, sure=probability <= ALPHA, verdict=verdict)
        found.append(one)
    return found


def exchange(suite: Suite, size: str, runs: Sequence[Outcome]) -> Exchange | None:
    """What tokens are worth to the baseline: the slope of its held-out loss on the logarithm of the tokens, before its
    learning rate falls and over the second half of that time.

    Where the learning rate is never constant, the second half of the run takes its place. None with fewer than
    `FEWEST_POINTS` points; a curve that rises gains nothing.
    """
    slopes, variances, first = [], [], 0.0
    for one in runs:
        if (one.arm, one.size) != (suite.baseline, size) or not one.counts:
            continue
        points = [point for point in one.curve if point.steady]
        if len(points) < FEWEST_POINTS:
            points = list(one.curve)
        points = [point for point in points if point.tokens >= points[-1].tokens / 2]
        if len(points) >= FEWEST_POINTS:
            tokens = np.log([point.tokens for point in points])
            line, covariance = np.polyfit(tokens, [point.loss for point in points], 1, cov=True)
            slopes.append(-float(line[0]))
            variances.append(float(covariance[0, 0]))
            first = max(first, points[0].tokens / (one.tokens or one.curve[-1].tokens))
    if not slopes:
        return None
    return Exchange(max(0.0, statistics.fmean(slopes)), statistics.fmean(variances) / len(slopes), first)


def order(suite: Suite, judge: Judge, groups: Mapping[Key, Sequence[float]]) -> Order:
    """The arms' order at each size, how it changes, and the changes that are outside the noise at both sizes; the
    correction is over all pairs of arms and sizes."""
    means = {key: statistics.fmean(values) for key, values in groups.items()}
    by_size = {
        size.name: sorted((arm for arm, at in means if at == size.name), key=lambda arm: means[arm, size.name])
        for size in suite.sizes
    }
    correlations = []
    for first, second in itertools.combinations(by_size, 2):
        both = [arm for arm in by_size[first] if arm in by_size[second]]
        known = rank_correlation([means[arm, first] for arm in both], [means[arm, second] for arm in both])
        if known is not None:
            correlations.append((first, second, known, len(both)))
    tested = judge.family(
        [(a, b, size) for size, arms in by_size.items() for a, b in itertools.combinations(sorted(arms), 2)], groups
    )
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for one in tested:
        if one.verdict in (BETTER, WORSE):
            sides.setdefault((one.arm, one.against), {}).setdefault(one.verdict, one.size)
    flips = [Flip(a, b, side[BETTER], side[WORSE]) for (a, b), side in sides.items() if len(side) == 2]
    return Order(by_size, correlations, flips, len(tested))
