"""Results of runs and comparisons for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.callbacks.csv_log import flatten
from fdl.runs import run as runs
from fdl.utils.paths import expanded

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.recipe.config import Recipe


class Run:
    """A finished run: its metrics, its student, its recipe and its folder.

    Args:
        folder: the run's folder.
        summary: the contents of its ``summary.json``; read from there by default.
        recipe: the recipe of the run; read from the folder by default.

    Attributes:
        folder: the run's folder, which `fdl export`, `fdl audit` and `fdl.fit` with `resume` take.
        summary: metrics, bytes, privacy and time, see `fdl.federation.summary.summarise`.

    Raises:
        UserError: the folder holds no finished run.
    """

    def __init__(self, folder: str | Path, summary: Mapping[str, Any] | None = None, recipe: Recipe | None = None):
        self.folder = expanded(folder)
        if summary is None:
            runs.require_finished(self.folder)
            summary = runs.read_summary(self.folder)
        self.summary: dict[str, Any] = dict(summary)
        if recipe is not None:
            self.recipe = recipe

    @cached_property
    def recipe(self) -> Recipe:
        """The complete recipe, with overrides applied and defaults filled in."""
        from fdl.recipe.loading import load

        return load(self.folder / runs.RECIPE)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics after the last round by name, e.g. ``student/test/accuracy``."""
        return self.summary["metrics"]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One flat dict per round, ready for ``pandas.DataFrame``.

        Columns are those of ``metrics.csv``: ``round``; the number of clients in the ``cohort``, ``dropped`` and
        ``refused``; every metric by its name; ``communication/…`` in cumulative bytes, ``seconds/…`` per round.
        """
        return [flatten(record) for record in self.summary["history"]]

    @cached_property
    def student(self) -> LightningModule:
        """The trained student after the last round, on the CPU in evaluation mode; loaded when first read.

        Raises:
            UserError: the method trains no student.
        """
        return self.load_student("last")

    def load_student(self, which: str = "best") -> LightningModule:
        """Load the student of a round from the run's folder.

        Args:
            which: ``"best"``: the best round on validation data (the last one without validation data), which
                `fdl export` writes; ``"last"``: the last round.

        Returns:
            A new module on the CPU, in evaluation mode.

        Raises:
            UserError: the method trains no student, or the weights of that round are no longer in the folder.
        """
        from fdl.runs.student import trained_student

        return trained_student(self.folder, self.summary, which).student.to("cpu").eval()

    def __repr__(self) -> str:
        score = self.summary["score"]["metric"]
        name = f"student/test/{score}"
        if name not in self.metrics:
            name = f"specialists/test/{score}"
        shown = f", {name} {self.metrics[name]:.4g}" if name in self.metrics else ""
        sent = self.summary["communication"]
        total = sent["upload_bytes"] + sent["download_bytes"]
        rounds = self.summary["rounds"]
        return (
            f"Run({str(self.folder)!r}: {self.summary['method']}, {rounds} round{'' if rounds == 1 else 's'}{shown}, "
            f"{total:,} bytes of messages)"
        )


class Comparison:
    """Several variants of a recipe, each over several seeds.

    Args:
        folder: the folder with ``compare.md``, ``compare.csv`` and ``compare.json``.
        table: one flat dict per variant, ready for ``pandas.DataFrame``; the columns are described in
            `fdl.runs.comparison.compare_table`.
        runs: the finished runs, variant by variant and seed by seed.
    """

    def __init__(self, folder: Path, table: Sequence[dict[str, Any]], runs: Sequence[Run]):
        self.folder = folder
        self.table = list(table)
        self.runs = list(runs)

    def __repr__(self) -> str:
        variants = ", ".join(row["variant"] for row in self.table)
        return f"Comparison({str(self.folder)!r}: {len(self.runs)} runs of {variants})"
