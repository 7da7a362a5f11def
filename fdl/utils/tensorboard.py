"""TensorBoard event files of runs and of comparisons."""

from __future__ import annotations

import logging
import time
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
"""Largest number of clients with a curve each; more are shown as a distribution."""

NOT_HYPERPARAMETERS = (
    "name",
    "output_dir",
    "callbacks",
    "checkpoint",
    "evaluation",
    "fabric",
    "client_execution",
    "inference",
    "compare",
    "channel.max_message_bytes",
)


def open_writer(folder: Path) -> SummaryWriter:
    """Open a writer whose events replace all earlier ones in the same folder.

    On a second start mark, TensorBoard drops earlier events of the folder from the step that the mark names. Curves by
    bytes and curves by round count steps differently, so 0 is the only step that is right for both, and a resumed run
    writes its earlier rounds again. The first writer must leave a mark, too, for the second one to take effect.

    Args:
        folder: the folder of the event files.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import, which runs without TensorBoard save

    _wait_for_a_later_name(folder)
    return SummaryWriter(str(folder), purge_step=0, flush_secs=10)


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until the next second if an event file of this second exists.

    TensorBoard reads files in the order of their names, which begin with the second and end with a counter that sorts
    as text, so that of two files of one second the newer may come first.
    """
    seconds = [part for path in folder.glob("events.out.tfevents.*") if (part := path.name.split(".")[3]).isdigit()]
    now = time.time()
    if seconds and int(max(seconds)) >= int(now):
        time.sleep(1 - now % 1)


def add_figure(writer: SummaryWriter, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Draw a figure and write it; if drawing fails for any reason, log a warning and go on.

    Args:
        writer: the run's writer.
        tag: the figure's tag.
        draw: function that returns the figure; called once.
        step: the round.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")  # it is drawn as a box
            writer.add_figure(tag, draw(), step, close=False)
    except Exception as error:  # a figure must never end a run
        log.warning("the figure %s is left out: it cannot be drawn (%r)", tag, error)


class Curves:
    """Scalars of consecutive rounds.

    Args:
        writer: the run's writer.
        many: write the clients' metrics as a distribution instead of one curve per client.
    """

    def __init__(self, writer: SummaryWriter, many: bool = False):
        self.writer, self.many = writer, many
        self._before: dict[str, dict[str, float]] = {"communication": {}, "seconds": {}}
        self._kibibytes = -1

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one round's record; rounds must be given in order, from the first.

        Tags: metrics under their own names; ``clients/<id>/…``; ``communication/…`` (cumulative) and
        ``communication_per_round/…``; ``seconds_per_round/…``; ``cohort/…`` (number of clients); and the student's
        metrics again as ``by_kilobytes/…``, whose step is the cumulative upload and download in KiB.

        Args:
            record: the round's entry of the run's history.
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
        # one step cannot hold two values; this also skips methods that send nothing
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
    """Write the results of a finished run that its curves do not contain.

    Tags: ``best_on_validation/…``, the student's metrics in the round with the best validation score, and the number of
    validation samples; ``communication/student_delivery_bytes`` and ``communication/total_bytes``.

    Args:
        writer: the run's writer.
        summary: result of `fdl.federation.summary.summarise`, or content of a ``summary.json``.

    Returns:
        The tags written.
    """
    best, sent = summary["best"], summary["communication"]
    found = {key: value for key, value in best["metrics"].items() if key.startswith("student/")}
    found |= {"round": best["round"], "validation_samples": best.get("validation_samples")}
    tagged = {f"best_on_validation/{key}": value for key, value in found.items()}
    tagged |= {f"communication/{key}": sent.get(key) for key in ("student_delivery_bytes", "total_bytes")}
    return log_scalars(writer, tagged, summary["rounds"])


def log_scalars(writer: SummaryWriter, values: Mapping[str, float | None], step: int) -> list[str]:
    """Write numbers at one step, leaving out those that are None, and return the tags written."""
    known = {tag: value for tag, value in values.items() if value is not None}
    for tag, value in known.items():
        writer.add_scalar(tag, value, step)
    return list(known)


def log_hparams(writer: SummaryWriter, hparams: Mapping[str, str | float], metrics: Iterable[str]) -> None:
    """Write a run's hyperparameters into the run's own event file.

    `SummaryWriter.add_hparams` would open another run in a sub-folder; with the same three records in the writer's own
    file, the dashboard takes the metrics from this run's curves.

    Args:
        writer: the run's writer.
        hparams: numbers and strings by name.
        metrics: tags of this run's scalars; the dashboard shows their last values.
    """
    from torch.utils.tensorboard.summary import hparams as records

    for record in records(dict(hparams), dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(record)  # type: ignore[attr-defined]  # declared None, set in the constructor


def hyperparameters(recipe: Mapping[str, Any]) -> dict[str, str | float]:
    """Flatten the parts of a recipe that may influence the result.

    Args:
        recipe: the resolved recipe as plain dicts and lists.

    Returns:
        Values by dotted key, e.g. ``{"method": "fedprox", "method.mu": 0.01, "seed": 0}``.
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
    """Format a component as one word, e.g. ``quantize(bits=8)``."""
    if not isinstance(value, dict) or "target" not in value:
        return str(value)
    args = ", ".join(f"{key}={_compact(inner)}" for key, inner in value.get("args", {}).items())
    return f"{value['target']}({args})" if args else str(value["target"])
