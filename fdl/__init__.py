"""fdl: federated distillation of foundation models with PyTorch Lightning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fdl.recipe.config import Recipe

# MKL, which multiplies matrices for torch, else chooses kernels by where in memory a matrix happens to lie; it reads
# this once, when it is first used (docs/reproducibility.md)
os.environ.setdefault("MKL_CBWR", "AUTO")

__version__ = "0.1.0"
__all__ = ["fit", "load"]


def load(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a YAML file, or what one would hold as plain dicts and lists.
        overrides: ``key=value`` strings; the later wins.

    Raises:
        fdl.errors.UserError: with all that is wrong in it.
    """
    from fdl.recipe.loading import from_mapping
    from fdl.recipe.loading import load as read

    return from_mapping(recipe, overrides) if isinstance(recipe, Mapping) else read(recipe, overrides)


def fit(
    recipe: Recipe | str | Path | Mapping[str, Any],
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run a federation, as ``fdl fit`` does; works in scripts, notebooks and threads.

    The folder then holds a run that ``fdl export``, ``fdl audit`` and ``fdl fit --resume`` take.

    Args:
        recipe: from `load`, or what `load` takes.
        folder: the run's folder; default ``<output>/<name>`` of the recipe.
        overrides: ``key=value`` strings, for a recipe that is not loaded yet.
        resume: go on from the last checkpoint; a complete run is not run again.
        overwrite: take the place of a run that is there.

    Returns:
        What ``summary.json`` holds, see `fdl.federation.summary.summarise`.

    Raises:
        fdl.errors.UserError: the recipe is wrong, or the folder holds something that would be lost.
        KeyboardInterrupt: after Ctrl-C, once the round is saved.
    """
    from fdl.recipe.config import Recipe
    from fdl.runs import run as runs
    from fdl.utils.paths import expanded

    if not isinstance(recipe, Recipe):
        recipe = load(recipe, overrides)
    elif overrides:
        raise TypeError("overrides are for a recipe that is not loaded yet; give them to fdl.load")
    return runs.fit(recipe, runs.folder_of(recipe, None if folder is None else expanded(folder)), resume, overwrite)
