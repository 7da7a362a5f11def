"""The recipe: one YAML file that describes an experiment completely."""

from fdl.recipe.config import Fit, Recipe, Scheduler
from fdl.recipe.loading import difference, from_mapping, load
from fdl.registry.component import Component
from fdl.registry.instantiate import instantiate

__all__ = ["Component", "Fit", "Recipe", "Scheduler", "difference", "from_mapping", "instantiate", "load"]
