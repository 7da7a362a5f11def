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

from fdl.build.federation import build

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop
    from fdl.recipe.config import Recipe

__all__ = ["build"]


class _CallablePackage(ModuleType):
    """Type of this package: a module that calls `fdl.build.build`."""

    def __call__(self, recipe: Recipe, folder: str | Path, launch: bool = True) -> FederatedLoop:
        return build(recipe, folder, launch)


sys.modules[__name__].__class__ = _CallablePackage
