"""Construction of a federation from a recipe.

When this package is imported, Python sets the attribute ``build`` of ``fdl``, which is also the name of the public
function `fdl.build`. The package is therefore callable and calls that function, so that ``from fdl import build`` and
``from fdl.build import build`` work in any order of imports.
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
    """Build a federation from a recipe: data, participants, channel, method, callbacks.

    Args:
        recipe: the checked recipe, from `fdl.load_recipe`.
        folder: the run's folder; nothing is written yet.
        launch: start distributed processes. If False, the loop can be inspected but not run.

    Raises:
        UserError: parts do not fit together; the message names their keys.
    """
    from fdl.build.federation import build_federation  # imports torch, which `from fdl import build` must not

    return build_federation(recipe, folder, launch)


class _CallablePackage(ModuleType):
    """Type of this package: a module that calls `fdl.build.build`."""

    def __call__(self, recipe: Recipe, folder: str | Path, launch: bool = True) -> FederatedLoop:
        return build(recipe, folder, launch)


sys.modules[__name__].__class__ = _CallablePackage
