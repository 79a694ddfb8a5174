"""A run written down: schema, presets, overrides, and what it will cost. Standard library only."""

from .batching import Batching, batching
from .check import check, problems
from .cost import Cost, cost
from .derived import Shape, shape, source_name, source_names
from .errors import Requeue, RunError, ShotError, UsageError
from .fitting import Memory, enough_ranks, largest_micro_tokens, layout, memory
from .keys import Key, documented
from .layout import Layout
from .load import Preset, load_recipe, presets
from .memory import Footprint, footprint
from .schema import IDENTITY_EXCLUDES, Recipe
from .transfer import optimizer_groups
from .writing import difference, from_dict, identity, to_dict, to_toml

__all__ = [
    "IDENTITY_EXCLUDES",
    "Batching",
    "Cost",
    "Footprint",
    "Key",
    "Layout",
    "Memory",
    "Preset",
    "Recipe",
    "Requeue",
    "RunError",
    "Shape",
    "ShotError",
    "UsageError",
    "batching",
    "check",
    "cost",
    "difference",
    "documented",
    "enough_ranks",
    "footprint",
    "from_dict",
    "identity",
    "largest_micro_tokens",
    "layout",
    "load_recipe",
    "memory",
    "optimizer_groups",
    "presets",
    "problems",
    "shape",
    "source_name",
    "source_names",
    "to_dict",
    "to_toml",
]
