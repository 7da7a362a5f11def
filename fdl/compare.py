"""Several variants of a recipe over several seeds, in one table."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fdl import runs
from fdl.catalog import KINDS, short_names, suggest
from fdl.clusters import started_by_others
from fdl.errors import UserError
from fdl.recipe import Compare, Recipe, load
from fdl.terminal import console

log = logging.getLogger("fdl")


class Run(NamedTuple):
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
    output: Path | None = None,
) -> None:
    """Run everything that is not complete yet; then write and print the table.

    Args:
        files: recipe files.
        overrides: ``key=value`` strings for all of them.
        methods: variants of the recipes, or methods; default all variants.
        seeds: default those of the recipe.
        output: the comparison's folder; default ``<output>/<name>/compare`` of the first recipe. A run lies in
            ``<variant>/seed-<k>`` in it.

    Raises:
        UserError: from a recipe, before anything runs; or from a run, naming it.
        KeyboardInterrupt: after Ctrl-C; what was done is kept.
    """
    if started_by_others():
        raise UserError(
            "fdl compare starts the processes of each run itself; start it without torchrun or srun, with "
            "fabric.devices=N, or start every run with fdl fit"
        )
    base = load(files[0], overrides)
    folder = output or Path(base.output) / base.name / "compare"
    planned = [run for file in files for run in plan(file, overrides, methods, seeds, folder, many=len(files) > 1)]
    results = []
    for number, run in enumerate(planned, 1):
        note = ", complete already" if runs.is_complete(run.recipe, run.folder) else ""
        log.info("%d of %d: %s, seed %d%s", number, len(planned), run.variant, run.seed, note)
        try:
            summary = runs.fit(run.recipe, run.folder, resume=runs.has_checkpoint(run.folder))
        except UserError as error:
            raise UserError(f"{run.variant}, seed {run.seed}: {error}") from error
        results.append({"variant": run.variant, "seed": run.seed, "summary": summary})
    _publish(results, base.compare or Compare(), folder)


def plan(
    file: str | Path,
    overrides: Sequence[str],
    methods: Sequence[str] | None,
    seeds: Sequence[int] | None,
    folder: Path,
    many: bool = False,
) -> list[Run]:
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
            planned.append(Run(label, seed, recipe, place))
    return planned


def _publish(results: Sequence[dict[str, Any]], settings: Compare, folder: Path) -> None:
    """Write the table as CSV and Markdown and all runs' hyperparameters for TensorBoard; print the table."""
    from fdl import compare_report as report

    named = (settings.reference, settings.bytes_reference, settings.single_site_reference)
    references = [_row_of(name, results) for name in named]
    table = report.compare_table(results, *references)
    report.write_compare_csv(folder / "compare.csv", table)
    report.write_compare_json(folder / "compare.json", results, *references)
    report.write_compare_markdown(folder / "compare.md", table, *references)
    report.log_compare(folder, results, *references)
    report.print_compare(table, console(), *references)
    files = "compare.md, compare.csv, compare.json"
    print(f"In {folder}: {files}; tensorboard --logdir {folder / 'tensorboard'}")


def _row_of(name: str, results: Sequence[dict[str, Any]]) -> str | None:
    """The row of the variant of this name or, where there is none, of the only one with a method of this name."""
    methods = {result["variant"]: result["summary"]["method"] for result in results}
    rows = [row for row, method in methods.items() if method == name]
    return name if name in methods else rows[0] if len(rows) == 1 else None
