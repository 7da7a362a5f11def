"""What a comparison of runs leaves: one table for people, for other programs, and for TensorBoard."""

from __future__ import annotations

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from fdl.callbacks.events import Curves, log_hparams, open_writer
from fdl.checkpoint import write_atomically
from fdl.metrics import knowledge_transfer_efficiency, nll_transfer_efficiency
from fdl.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = {
    "student_best": "Student, best round",
    "student_last": "Student, last round",
    "specialists": "Mean specialist",
    "kte": "KTE",
    "bytes_to_best": "Bytes to best round",
    "bytes_to_best_percent": "% to best round",
    "bytes_total": "Bytes, all rounds",
    "bytes_total_percent": "% all rounds",
    "setup_bytes": "Set-up bytes",
    "rounds_to_best": "Best round",
    "seconds": "Seconds",
}
"""What `compare_table` measures, with the titles that people read."""

PRINTED = ("student_best", "specialists", "kte", "bytes_to_best", "bytes_to_best_percent", "seconds")
"""What fits beside each other on a screen."""


def compare_table(
    rows: Sequence[Mapping[str, Any]], reference: str | None = None, bytes_reference: str | None = None
) -> list[dict[str, Any]]:
    """Summarise several variants, each over its seeds.

    Accuracy is on test data. A variant's best round is chosen on validation data, seed by seed.

    Args:
        rows: ``{"variant", "seed", "summary"}`` for every run.
        reference: the variant whose student counts as 1 in the knowledge-transfer efficiency, usually centralised.
        bytes_reference: the variant whose bytes up to its best round count as 100 %, usually FedAvg.

    Returns:
        A row a variant, in order of first appearance: ``variant``, ``method``, ``seeds`` (how many), ``score`` (the
        metric that is compared), and the mean and
        sample standard deviation of everything in `COLUMNS` as ``<name>_mean`` and ``<name>_std``. Bytes are upload
        plus download; ratios are taken seed by seed, over the seeds that the reference has too. None stands for what
        there is not: a student in a variant that trains none, a ratio without its reference, a deviation of one seed.
    """
    summaries = {(row["variant"], row["seed"]): row["summary"] for row in rows}
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = {seed: summary for (name, seed), summary in summaries.items() if name == variant}
        measured = [
            _measure(summary, summaries.get((reference, seed)), summaries.get((bytes_reference, seed)))
            for seed, summary in runs.items()
        ]
        line = {"variant": variant, "method": next(iter(runs.values()))["method"], "seeds": len(runs)}
        line["score"] = next(iter(runs.values()))["score"]["metric"]
        for name in COLUMNS:
            values = [m[name] for m in measured if m[name] is not None and math.isfinite(m[name])]
            line[f"{name}_mean"] = statistics.fmean(values) if values else None
            line[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(line)
    return table


def _measure(
    summary: Mapping[str, Any], reference: Mapping[str, Any] | None, bytes_reference: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """Everything in `COLUMNS` for one run."""
    best, last, score = summary["best"], summary["metrics"], summary["score"]["metric"]
    own, others = f"student/test/{score}", f"specialists/test/{score}"
    student = best["metrics"].get(own)
    central = None if reference is None else reference["best"]["metrics"].get(own)
    base = 0 if bytes_reference is None else _traffic(bytes_reference["best"]["communication"])
    to_best, total = _traffic(best["communication"]), _traffic(summary["communication"])
    return {
        "student_best": student,
        "student_last": last.get(own),
        "specialists": last.get(others),
        "kte": _transfer(summary["score"]["higher_is_better"], student, central, last.get(others)),
        "bytes_to_best": to_best,
        "bytes_to_best_percent": 100 * to_best / base if base else None,
        "bytes_total": total,
        "bytes_total_percent": 100 * total / base if base else None,
        "setup_bytes": summary["communication"]["setup_bytes"],
        "rounds_to_best": best["round"],
        "seconds": summary["time"]["total_s"],
    }


def _transfer(higher: bool, student: float | None, central: float | None, single: float | None) -> float | None:
    """Knowledge-transfer efficiency; of a loss, it needs to know where a single site stands."""
    if student is None or central is None or (not higher and single is None):
        return None
    if higher:
        return knowledge_transfer_efficiency(student, central)
    return nll_transfer_efficiency(single, student, central)


def _traffic(communication: Mapping[str, Any]) -> int:
    return communication["upload_bytes"] + communication["download_bytes"]


def write_compare_csv(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Write a comparison in full precision, a row a variant; what is None is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(path, text.getvalue().encode())


def write_compare_markdown(
    path: Path,
    table: Sequence[Mapping[str, Any]],
    reference: str | None = None,
    bytes_reference: str | None = None,
) -> None:
    """Write a comparison for people, with a line that says what its columns mean; arguments as in `compare_table`."""
    titles, cells = _cells(table)
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    write_atomically(path, f"{text}\n\n{compare_caption(reference, bytes_reference, table[0]['score'])}\n".encode())


def print_compare(
    table: Sequence[Mapping[str, Any]],
    console: Console,
    reference: str | None = None,
    bytes_reference: str | None = None,
) -> None:
    """Print the most telling columns of a comparison; arguments as in `compare_table`.

    No cell is cut or broken: lines are as long as they have to be.
    """
    titles, cells = _cells(table, PRINTED)
    shown = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        shown.add_column(textwrap.fill(title, 11), justify="left" if title == "Variant" else "right", no_wrap=True)
    for line in cells:
        shown.add_row(*map(Text, line))
    console.print(Segments(console.render(shown, console.options.update(max_width=10_000))), end="", crop=False)
    console.print(Text(compare_caption(reference, bytes_reference, table[0]["score"]), style="dim"))


def compare_caption(reference: str | None, bytes_reference: str | None, score: str = "accuracy") -> str:
    """Say what the columns of a comparison mean.

    Args:
        reference: as in `compare_table`.
        bytes_reference: likewise.
        score: the metric that is compared.
    """
    metric = score.replace("_", " ") if score != "nll" else "NLL"
    higher = next(task.higher_is_better for task in TASKS.values() if task.score == score)
    better = "" if higher else ", less is better"
    sentences = [
        f"Mean ± standard deviation over seeds. {metric[0].upper()}{metric[1:]} on test data{better}; best round "
        "chosen on validation data."
    ]
    if reference is not None and higher:
        sentences.append(f"KTE, knowledge-transfer efficiency: the student's {metric} as a share of {reference}'s.")
    elif reference is not None:
        sentences.append(
            f"KTE, knowledge-transfer efficiency: which share of the way from the mean specialist's to {reference}'s "
            f"{metric} the student goes."
        )
    sentences.append("Bytes: up and down together, all clients.")
    if bytes_reference is not None:
        sentences.append(f"%: of {bytes_reference}'s bytes up to its best round.")
    return " ".join(sentences)


def log_compare(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write every run of a comparison to TensorBoard: curves by round and by bytes, and hyperparameters.

    Args:
        folder: the comparison's folder; runs go to ``tensorboard/<variant>-seed<k>`` in it.
        rows: as in `compare_table`.
    """
    for row in rows:
        summary = row["summary"]
        writer = open_writer(folder / "tensorboard" / f"{row['variant']}-seed{row['seed']}")
        curves = Curves(writer)
        for record in summary["history"]:
            finite = {key: value for key, value in record["metrics"].items() if value is not None}
            curves.log({**record, "metrics": finite, "clients": {}})  # clients' curves are in the runs' own folders
        sent = [f"communication/{key}" for key in ("upload_bytes", "download_bytes")]
        hparams = {"variant": row["variant"], "method": summary["method"], "seed": row["seed"]}
        log_hparams(writer, hparams, [*summary["metrics"], *sent])
        writer.close()


def _cells(table: Sequence[Mapping[str, Any]], columns: Iterable[str] = COLUMNS) -> tuple[list[str], list[list[str]]]:
    """Titles and texts, without the columns that are empty in every row."""
    names = [name for name in columns if any(line[f"{name}_mean"] is not None for line in table)]
    titles = ["Variant", "Seeds", *(COLUMNS[name] for name in names)]
    cells = [
        [
            line["variant"],
            str(line["seeds"]),
            *(_cell(name, line[f"{name}_mean"], line[f"{name}_std"]) for name in names),
        ]
        for line in table
    ]
    return titles, cells


def _cell(name: str, mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    if "bytes" in name and "percent" not in name:
        return decimal(round(mean))
    digits = 1 if name in ("rounds_to_best", "seconds") else 2 if "percent" in name else 4
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
