"""The exact binomial test: is a share of successes compatible with chance?"""

from typing import Literal

import numpy as np
from scipy import special

from calledshot.stats.intervals import check_counts


def binomial_test(
    successes: int,
    trials: int,
    chance: float,
    *,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    mid_p: bool = False,
) -> float:
    """p-value of `successes` out of `trials` where each succeeds with probability `chance`.

    Two-sided: the probability of all outcomes that are no likelier than this one, as R's `binom.test`.
    With `mid_p` the outcome that was seen, and those exactly as likely, count half.
    """
    check_counts(successes, trials)
    if not 0 <= chance <= 1:
        raise ValueError(f"chance is a probability, not {chance}")
    counts = np.arange(trials + 1)
    log_ways = special.gammaln(trials + 1) - special.gammaln(counts + 1) - special.gammaln(trials - counts + 1)
    probability = np.exp(log_ways + special.xlogy(counts, chance) + special.xlog1py(trials - counts, -chance))
    seen = probability[successes]
    if alternative == "two-sided":
        extreme = probability <= seen * (1 + 1e-7)
        equal = extreme & (probability >= seen * (1 - 1e-7))
    else:
        extreme = counts >= successes if alternative == "greater" else counts <= successes
        equal = counts == successes
    p_value = probability[extreme].sum() - (probability[equal].sum() / 2 if mid_p else 0.0)
    return float(min(1.0, p_value))
