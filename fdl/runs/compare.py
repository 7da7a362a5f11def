"""Comparison of several variants of a recipe over several seeds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fdl.engine.distributed.launch_environment import started_by_others
from fdl.errors import UserError
from fdl.recipe.config import Compare, Recipe
from fdl.recipe.loading import load
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from fdl.runs import run as runs
from fdl.runs.result import Comparison, Run
from fdl.state import run_folder
from fdl.utils.console import console
from fdl.utils.paths import expanded
from fdl.utils.suggest import suggest

log = logging.getLogger("fdl")


class PlannedRun(NamedTuple):
    """Run of one variant with one seed.

    Attributes:
        variant: name of its row in the table.
        seed: the seed.
        recipe: the recipe of the run.
        folder: the run's folder.
    """

    variant: str
    seed: int
    recipe: Recipe
    folder: Path


def run_comparison(
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Execute all runs that are not complete yet; then write and print the table.

    The other runs are executed even if one fails; the table marks it, and calling the function again retries it.

    Args:
        files: recipe files.
        overrides: ``key=value`` strings for all of them.
        methods: variants of the recipes, or methods; default all variants.
        seeds: the seeds; default those of the recipe.
        output: the comparison's folder; default ``<output_dir>/<name>/compare`` of the first recipe. Its subfolders
            ``<variant>/seed-<k>`` are the runs' folders.
        overwrite: replace runs of a recipe that has changed since; complete runs are kept.

    Raises:
        UserError: before any run, a recipe is invalid or the folder holds other files; or after all runs, some have
            failed, and the message names them.
        KeyboardInterrupt: after Ctrl-C; finished rounds and runs are kept.

    Returns:
        The table and the runs.
    """
    if started_by_others():
        raise UserError(
            "fdl compare starts the processes of each run itself; start it without torchrun or srun, with "
            "fabric.devices=N, or start every run with fdl fit"
        )
    base = load(files[0], overrides)
    folder = runs.folder_of(base) / "compare" if output is None else expanded(output)
    planned = [run for file in files for run in plan(file, overrides, methods, seeds, folder, many=len(files) > 1)]
    _require_place(folder)
    for run in planned if not overwrite else ():
        if not runs.is_complete(run.recipe, run.folder):
            _require_unchanged(run)
    results: list[dict[str, Any]] = []
    failed: list[tuple[PlannedRun, str]] = []
    for number, run in enumerate(planned, 1):
        complete = runs.is_complete(run.recipe, run.folder)
        note = ", complete already" if complete else ""
        log.info("%d of %d: %s, seed %d%s", number, len(planned), run.variant, run.seed, note)
        try:
            summary = runs.read_summary(run.folder) if complete else _fit(run, overwrite)
        except Exception as error:  # also of user-defined code: the other runs are not affected
            if not isinstance(error, UserError):
                log.exception("%s, seed %d failed", run.variant, run.seed)
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            log.error("%d of %d: %s, seed %d failed: %s", number, len(planned), run.variant, run.seed, reason)
            failed.append((run, reason))
            continue
        results.append({"variant": run.variant, "seed": run.seed, "summary": summary})
    table = _publish(results, failed, base.compare or Compare(), folder)
    if failed:
        lines = [f"  - {run.variant}, seed {run.seed}: {reason}" for run, reason in failed]
        raise UserError(
            "\n".join(
                [
                    f"{len(failed)} of {len(planned)} run(s) failed:",
                    *lines,
                    "The same command runs what is missing and leaves the others as they are",
                ]
            )
        )
    finished = [Run(run.folder, result["summary"], run.recipe) for run, result in zip(planned, results, strict=True)]
    return Comparison(folder, table, finished)


def _fit(run: PlannedRun, overwrite: bool) -> dict[str, Any]:
    """Start or resume a run that is not complete, and return its summary."""
    resume, replace = _start_mode(run, overwrite)
    return runs.run_recipe(run.recipe, run.folder, resume, replace)


def _start_mode(run: PlannedRun, overwrite: bool = False) -> tuple[bool, bool]:
    """Decide how to start a run.

    Returns:
        True to resume the run in its folder, and True to replace it.

    Raises:
        UserError: neither is possible.
    """
    resume = runs.has_checkpoint(run.folder)
    try:
        runs.check_can_run(run.recipe, run.folder, resume)
    except UserError:
        if not resume:
            raise
        # a run of another recipe, which may be replaced if it has not finished a round
        runs.check_can_run(run.recipe, run.folder, overwrite=overwrite)
        return False, overwrite
    return resume, False


def _require_unchanged(run: Run) -> None:
    """Check that a run's folder holds no run of another recipe.

    Raises:
        UserError: it holds one.
    """
    try:
        _start_mode(run)
    except UserError as error:
        raise UserError(f"{run.variant}, seed {run.seed}: {error}") from error


def _require_place(folder: Path) -> None:
    """Create the comparison's folder, or check that an existing one is empty or holds a comparison.

    Raises:
        UserError: it holds other files, or cannot be written to.
    """
    runs.require_usable(folder)
    ours = run_folder.read_mark(folder).get("kind") == "comparison" or any(folder.glob(f"**/seed-*/{runs.RECIPE}"))
    if not ours and (found := run_folder.others(folder)):
        raise UserError(
            f"{folder}: is no empty folder, and holds no comparison of fdl's, but {run_folder.names(found)}; choose "
            "another folder with --output-dir"
        )
    run_folder.mark(folder, "comparison")


def plan(
    file: str | Path,
    overrides: Sequence[str],
    methods: Sequence[str] | None,
    seeds: Sequence[int] | None,
    folder: Path,
    many: bool = False,
) -> list[PlannedRun]:
    """Plan the runs of one recipe file, and check all of their recipes.

    Args:
        file: the recipe file.
        overrides: ``key=value`` strings that change the recipe.
        methods: variants of the recipe, or methods; None for all variants.
        seeds: the seeds; None for those of the recipe.
        folder: the comparison's folder.
        many: True if the file is one of several, so that names of its variants include that of the recipe.

    Raises:
        UserError: a name is neither a variant nor a method.
        RecipeError: a variant is invalid.
    """
    base = load(file, overrides)
    settings = base.compare or Compare()
    known = short_names(KINDS["method"])
    variants: dict[str, dict[str, Any]] = {}
    for name in methods or settings.variants or [base.method.target]:
        if name in settings.variants:
            variants[name] = settings.variants[name]
        elif name == base.method.target:
            variants[name] = {}
        elif name in known:
            variants[name] = {"method": name}
        else:
            hint = suggest(name, {*settings.variants, *known})
            raise UserError(f"{file}: {name!r} is neither a variant of this recipe nor a method{hint}")
    planned = []
    for name, changes in variants.items():
        label = name if not many else (f"{base.name}/{name}" if len(variants) > 1 else base.name)
        for seed in seeds or settings.seeds:
            recipe = load(file, [*overrides, f"seed={seed}"], variant=changes)
            recipe = dataclasses.replace(recipe, compare=None, name=f"{base.name}-{name}-seed-{seed}")
            place = (folder / base.name if many else folder) / name / f"seed-{seed}"
            planned.append(PlannedRun(label, seed, recipe, place))
    return planned


def _publish(
    results: Sequence[dict[str, Any]],
    failed: Sequence[tuple[PlannedRun, str]],
    settings: Compare,
    folder: Path,
) -> list[dict[str, Any]]:
    """Write the table as CSV and Markdown and all runs' hyperparameters for TensorBoard; print and return the table."""
    from fdl.runs import compare_report as report
    from fdl.runs.comparison import References

    named = (settings.reference, settings.bytes_reference, settings.single_site_reference)
    references = References(*(_row_of(name, results) for name in named))
    table = report.compare_table(results, references)
    reasons: dict[str, list[str]] = {}
    for run, reason in failed:
        reasons.setdefault(run.variant, []).append(f"seed {run.seed}: {' '.join(reason.split())}")
    sentences = {variant: "; ".join(why) for variant, why in reasons.items()}
    report.write_compare_csv(folder / "compare.csv", table, sentences)
    report.write_compare_json(folder / "compare.json", results, references)
    report.write_compare_markdown(folder / "compare.md", table, references, sentences)
    report.log_compare(folder, results, references)
    if table:
        report.print_compare(table, console(), references)
    for variant, sentence in sentences.items():
        print(f"Failed: {variant}, {sentence}")
    files = "compare.md, compare.csv, compare.json"
    print(f"In {folder}: {files}; tensorboard --logdir {folder / 'tensorboard'}")
    return table


def _row_of(name: str, results: Sequence[dict[str, Any]]) -> str | None:
    """Return the variant with this name or, if it does not exist, the only one whose method has this name."""
    methods = {result["variant"]: result["summary"]["method"] for result in results}
    rows = [row for row, method in methods.items() if method == name]
    return name if name in methods else rows[0] if len(rows) == 1 else None
