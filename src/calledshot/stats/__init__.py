"""Statistics for every number that is printed: intervals, paired tests, power, false discoveries.

Only numpy and scipy.special, since importing scipy.stats takes half a second.
"""

from calledshot.stats.binomial import binomial_test
from calledshot.stats.discovery import benjamini_hochberg, benjamini_yekutieli, bonferroni, holm
from calledshot.stats.formatting import format_interval, format_value
from calledshot.stats.intervals import FEW, Interval, bootstrap_interval, mean_interval, wilson
from calledshot.stats.paired import Comparison, mcnemar, paired_comparison, paired_permutation
from calledshot.stats.power import (
    items_needed,
    paired_items_needed,
    paired_power,
    paired_smallest_difference,
    power_of,
    smallest_difference,
)

__all__ = [
    "FEW",
    "Comparison",
    "Interval",
    "benjamini_hochberg",
    "benjamini_yekutieli",
    "binomial_test",
    "bonferroni",
    "bootstrap_interval",
    "format_interval",
    "format_value",
    "holm",
    "items_needed",
    "mcnemar",
    "mean_interval",
    "paired_comparison",
    "paired_items_needed",
    "paired_permutation",
    "paired_power",
    "paired_smallest_difference",
    "power_of",
    "smallest_difference",
    "wilson",
]
