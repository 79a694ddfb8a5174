"""A run written down: schema, presets, overrides, and what it will cost. Standard library only."""

from .check import check, problems
from .cost import Cost, Memory, cost, memory
from .derived import Shape, shape, source_name, source_names
from .errors import Requeue, RunError, ShotError, UsageError
from .keys import Key, documented
from .layout import Layout, layout
from .load import Preset, load_recipe, presets
from .schema import IDENTITY_EXCLUDES, Recipe
from .transfer import optimizer_groups
from .writing import difference, from_dict, identity, to_dict, to_toml

__all__ = [
    "IDENTITY_EXCLUDES",
    "Cost",
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
    "check",
    "cost",
    "difference",
    "documented",
    "from_dict",
    "identity",
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
