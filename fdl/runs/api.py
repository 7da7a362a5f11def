"""Functions of the command line for scripts and notebooks: `fdl.load_recipe`, `fdl.fit` and `fdl.compare`.

Torch is imported only after a recipe has been checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.errors import UserError
from fdl.recipe.config import Recipe
from fdl.recipe.loading import from_mapping, load

if TYPE_CHECKING:
    from fdl.runs.result import Comparison, Run


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a YAML file, or its contents as plain dicts and lists.
        overrides: ``key=value`` strings; of several values for one key the last one wins.

    Raises:
        RecipeError: the recipe is invalid; the message lists all problems.
        UserError: the file does not exist.
    """
    if isinstance(recipe, Mapping):
        return from_mapping(recipe, overrides)
    if not isinstance(recipe, str | Path):
        raise UserError(f"recipe: expected a path, a mapping or a Recipe, got {type(recipe).__name__}")
    return load(recipe, overrides)


def fit(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    output_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Run a federation, as ``fdl fit`` does, in a script, notebook or thread.

    Args:
        recipe: a YAML file, its contents as a mapping, or a `Recipe` from `load_recipe`.
        overrides: ``key=value`` strings that change the recipe; of several values for one key the last one wins.
        output_dir: the run's folder; default ``<output_dir>/<name>`` of the recipe.
        resume: continue from the last checkpoint; a complete run is not repeated.
        overwrite: replace a run in the folder.

    Returns:
        The finished run.

    Raises:
        RecipeError: the recipe is invalid.
        UserError: the folder holds files that would be lost, or nothing to resume; or training cannot continue.
        KeyboardInterrupt: after Ctrl-C, once the round in progress is saved.
    """
    from fdl.engine.distributed.launch_environment import is_follower
    from fdl.runs import run as runs
    from fdl.runs.result import Run

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = from_mapping(recipe.to_dict(), overrides)
    folder = runs.folder_of(recipe, output_dir)
    summary = runs.run_recipe(recipe, folder, resume, overwrite)
    # read from the file that the leading process wrote: a new run equals one read later, with None for infinities
    return Run(folder, summary if is_follower() else None, recipe)


def compare(
    recipes: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    output_dir: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Run several variants over several seeds, as ``fdl compare`` does; complete runs are not repeated.

    Args:
        recipes: one recipe file, or several.
        overrides: ``key=value`` strings for all of them.
        output_dir: the comparison's folder; default ``<output_dir>/<name>/compare`` of the first recipe.
        methods: variants of the recipes, or names of methods; default all variants.
        seeds: the seeds; default those of the recipes.
        overwrite: replace complete runs of a recipe that has changed since.

    Returns:
        The table, which is also printed and written to the folder, and the runs.

    Raises:
        RecipeError: a recipe is invalid; nothing was run.
        UserError: the folder holds other files, or, after all runs, some of them have failed.
        KeyboardInterrupt: after Ctrl-C; finished runs are kept.
    """
    from fdl.runs.compare import run_comparison

    files = [recipes] if isinstance(recipes, str | Path) else list(recipes)
    if not files:
        raise UserError("recipes: expected at least one recipe file")
    for name, given in (("methods", methods), ("overrides", overrides)):
        if isinstance(given, str):
            raise UserError(f"{name}: expected a list of strings, got a string; write [{given!r}]")
    return run_comparison(files, overrides, methods, seeds, output_dir, overwrite)
