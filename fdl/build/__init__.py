"""From a checked recipe to a federation ready to run.

The package can be called, as the function `fdl.build.federation.build`: Python puts every imported package into its
parent under its own name, so that ``fdl.build`` is this package and has to be that function, too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop
    from fdl.recipe.config import Recipe

__all__ = ["build"]


def build(recipe: Recipe, folder: str | Path, launch: bool = True) -> FederatedLoop:
    """Build everything a recipe names; see `fdl.build.federation.build`, which is imported on the first call.

    Args:
        recipe: checked, from `fdl.load_recipe`.
        folder: the run's folder; nothing is written yet.
        launch: join the other processes that the recipe asks for.

    Raises:
        UserError: parts do not fit together; the message names their keys.
    """
    from fdl.build.federation import build as build_federation

    return build_federation(recipe, folder, launch)


class _CallablePackage(ModuleType):
    """A package that stands for its main function."""

    def __call__(self, recipe: Recipe, folder: str | Path, launch: bool = True) -> FederatedLoop:
        return build(recipe, folder, launch)


sys.modules[__name__].__class__ = _CallablePackage
