"""What is written to TensorBoard's event files, for a run and for a comparison of runs alike."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("fdl")

MANY_CLIENTS = 50
"""Beyond this many, clients are shown as a distribution and no longer one curve each."""

NOT_HYPERPARAMETERS = (
    "name",
    "output",
    "callbacks",
    "checkpoint",
    "evaluation",
    "fabric",
    "executor",
    "inference",
    "compare",
    "channel.limit",
)


def open_writer(folder: Path) -> SummaryWriter:
    """Open a writer whose events take the place of all earlier ones in the same folder.

    TensorBoard drops what precedes a second start mark in a folder, at and after the step that the mark names. Points
    by bytes have other steps than points by round, so no single step but 0 is right for both: whoever goes on with a
    run writes its earlier rounds once more. The first writer, too, must leave a mark for the second to count.
    """
    from torch.utils.tensorboard import SummaryWriter  # a second of imports, spared when nobody asks for TensorBoard

    return SummaryWriter(str(folder), purge_step=0, flush_secs=10)


def add_figure(writer: SummaryWriter, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Draw a figure and write it; one that cannot be drawn is left out with a warning, whatever went wrong.

    Args:
        writer: where to.
        tag: what it is called.
        draw: makes the figure; it is called once.
        step: the round.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")  # a box in its place says so
            writer.add_figure(tag, draw(), step, close=False)
    except Exception as error:  # a picture is never worth a run
        log.warning("the figure %s is left out: it cannot be drawn (%r)", tag, error)


class Curves:
    """Writes rounds as scalars, given one after another from the first.

    Args:
        writer: where to.
        many: show clients as a distribution instead of one curve each.
    """

    def __init__(self, writer: SummaryWriter, many: bool = False):
        self.writer, self.many = writer, many
        self._before: dict[str, dict[str, float]] = {"communication": {}, "seconds": {}}
        self._kibibytes = -1

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one round's record.

        Tags: metrics under their own names; ``clients/<id>/…``; ``communication/…`` cumulative and
        ``communication_per_round/…``; ``seconds_per_round/…``; ``cohort/…`` in clients; and the student's metrics once
        more as ``by_kilobytes/…``, whose step is the upload and download so far in KiB.
        """
        round = record["round"]
        self._scalars("", record["metrics"], round)
        if self.many:
            self._distributions(record["clients"].values(), round)
        else:
            for client, metrics in record["clients"].items():
                self._scalars(f"clients/{client}/", metrics, round)
        self._scalars("communication/", record["communication"], round)
        for part, before in self._before.items():
            growth = {key: value - before.get(key, 0) for key, value in record[part].items() if key != "setup_bytes"}
            self._scalars(f"{part}_per_round/", growth, round)
            self._before[part] = dict(record[part])
        cohort, dropped, refused = (len(record[key]) for key in ("cohort", "dropped", "refused"))
        self._scalars("cohort/", {"invited": cohort, "dropped": dropped, "refused": refused}, round)
        self._by_kilobytes(record)

    def _by_kilobytes(self, record: Mapping[str, Any]) -> None:
        total = record["communication"]["upload_bytes"] + record["communication"]["download_bytes"]
        student = {key: value for key, value in record["metrics"].items() if key.startswith("student/")}
        # two points at one step would be two values at once; this also leaves out methods that send nothing
        if student and total > 0 and total // 1024 > self._kibibytes:
            self._kibibytes = total // 1024
            self._scalars("by_kilobytes/", student, self._kibibytes)

    def _distributions(self, clients: Iterable[Mapping[str, float]], round: int) -> None:
        values: dict[str, list[float]] = {}
        for metrics in clients:
            for key, value in metrics.items():
                values.setdefault(key, []).append(value)
        for key, numbers in values.items():
            array = np.asarray(numbers, dtype=np.float64)
            array = array[np.isfinite(array)]
            if len(array):
                self.writer.add_histogram(f"clients/{key}", array, round)
                summary = {"mean": array.mean(), "min": array.min(), "max": array.max()}
                self._scalars(f"clients/{key}/", summary, round)

    def _scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(prefix + key, value, step)


def log_outcome(writer: SummaryWriter, summary: Mapping[str, Any]) -> list[str]:
    """Write what a finished run came to, beside the last round's metrics, which are in its curves.

    Tags: ``best_on_validation/…``, the student's metrics in the round that was best on validation data, and in how many
    samples those consist; ``communication/student_delivery_bytes`` and ``communication/total_bytes``.

    Args:
        writer: the run's writer.
        summary: as `fdl.federation.summary.summarise` makes it, or read from a ``summary.json``.

    Returns:
        The tags.
    """
    best, sent = summary["best"], summary["communication"]
    found = {key: value for key, value in best["metrics"].items() if key.startswith("student/")}
    found |= {"round": best["round"], "validation_samples": best.get("validation_samples")}
    tagged = {f"best_on_validation/{key}": value for key, value in found.items()}
    tagged |= {f"communication/{key}": sent.get(key) for key in ("student_delivery_bytes", "total_bytes")}
    return log_scalars(writer, tagged, summary["rounds"])


def log_scalars(writer: SummaryWriter, values: Mapping[str, float | None], step: int) -> list[str]:
    """Write numbers at one step, and return the tags of those that there are."""
    known = {tag: value for tag, value in values.items() if value is not None}
    for tag, value in known.items():
        writer.add_scalar(tag, value, step)
    return list(known)


def log_hparams(writer: SummaryWriter, hparams: Mapping[str, str | float], metrics: Iterable[str]) -> None:
    """Write a run's hyperparameters into the run itself.

    `SummaryWriter.add_hparams` would open a run of its own in a sub-folder; the same three records in the writer's file
    make the dashboard take the metrics from this run's curves.

    Args:
        writer: the run's writer.
        hparams: numbers and strings by name.
        metrics: tags of scalars of this run; the dashboard shows their last values.
    """
    from torch.utils.tensorboard.summary import hparams as records

    for record in records(dict(hparams), dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(record)  # type: ignore[attr-defined]  # declared None, set in the constructor


def hyperparameters(recipe: Mapping[str, Any]) -> dict[str, str | float]:
    """Flatten what may influence a run's result, e.g. ``{"method": "fedprox", "method.mu": 0.01, "seed": 0}``.

    Args:
        recipe: the resolved recipe as plain dicts and lists.
    """
    flat: dict[str, str | float] = {}

    def walk(key: str, value: Any) -> None:
        if key in NOT_HYPERPARAMETERS:
            return
        if isinstance(value, dict):
            value = dict(value)
            if "target" in value:
                flat[key] = value.pop("target")
                value |= value.pop("args", {})
            for name, inner in value.items():
                walk(f"{key}.{name}", inner)
        elif isinstance(value, list | tuple):
            flat[key] = ", ".join(map(_compact, value)) or "none"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = value
        elif value is not None:
            flat[key] = str(value)

    for key, value in recipe.items():
        walk(key, value)
    return flat


def _compact(value: Any) -> str:
    """Write a component as one word: ``quantize(bits=8)``."""
    if not isinstance(value, dict) or "target" not in value:
        return str(value)
    args = ", ".join(f"{key}={_compact(inner)}" for key, inner in value.get("args", {}).items())
    return f"{value['target']}({args})" if args else str(value["target"])
