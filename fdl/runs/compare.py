"""Several variants of a recipe over several seeds, in one table."""

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
    """One variant with one seed.

    Attributes:
        variant: its row in the table.
        seed: the seed.
        recipe: its own recipe.
        folder: where it lies.
    """

    variant: str
    seed: int
    recipe: Recipe
    folder: Path


def compare(
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Run everything that is not complete yet; then write and print the table.

    A run that fails does not keep the others from being run; the table marks it, and the same call tries it again.

    Args:
        files: recipe files.
        overrides: ``key=value`` strings for all of them.
        methods: variants of the recipes, or methods; default all variants.
        seeds: default those of the recipe.
        output: the comparison's folder; default ``<output_dir>/<name>/compare`` of the first recipe. A run lies in
            ``<variant>/seed-<k>`` in it.
        overwrite: run again what is there of a recipe that has changed since; what is complete stays.

    Raises:
        UserError: from a recipe, or where the folder holds something else, before anything runs; or in the end, naming
            the runs that have failed.
        KeyboardInterrupt: after Ctrl-C; what was done is kept.

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
        except Exception as error:  # of the user's own code, too: the others have nothing to do with it
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
    """PlannedRun, or go on with, a run that is not complete."""
    resume, replace = _way(run, overwrite)
    return runs.fit(run.recipe, run.folder, resume, replace)


def _way(run: PlannedRun, overwrite: bool = False) -> tuple[bool, bool]:
    """Whether a run goes on with what lies in its folder, and whether it takes its place.

    Raises:
        UserError: neither can be.
    """
    resume = runs.has_checkpoint(run.folder)
    try:
        runs.check_can_run(run.recipe, run.folder, resume)
    except UserError:
        if not resume:
            raise
        # of another recipe: no loss where it has not finished a round
        runs.check_can_run(run.recipe, run.folder, overwrite=overwrite)
        return False, overwrite
    return resume, False


def _require_unchanged(run: Run) -> None:
    """Raise, before anything runs, where a run of another recipe lies in the place of a run.

    Raises:
        UserError: it does.
    """
    try:
        _way(run)
    except UserError as error:
        raise UserError(f"{run.variant}, seed {run.seed}: {error}") from error


def _require_place(folder: Path) -> None:
    """Make the comparison's folder, or raise where it holds something else.

    Raises:
        UserError: it does, or cannot be written to.
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
    """The runs of one recipe file, all checked.

    Args:
        file: the recipe file.
        overrides: as in `compare`.
        methods: as in `compare`.
        seeds: as in `compare`.
        folder: the comparison's folder.
        many: whether the file is one of several, so that its variants need its name.

    Raises:
        UserError: for a name that is neither a variant nor a method.
        RecipeError: for a variant that is wrong.
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
    """The row of the variant of this name or, where there is none, of the only one with a method of this name."""
    methods = {result["variant"]: result["summary"]["method"] for result in results}
    rows = [row for row, method in methods.items() if method == name]
    return name if name in methods else rows[0] if len(rows) == 1 else None
