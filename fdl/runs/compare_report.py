"""Reports of a comparison of runs: Markdown, CSV, JSON, console, and TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from fdl.metrics.tasks import TASKS
from fdl.runs.comparison import (
    COLUMNS,
    DIFFERENCES,
    NO_REFERENCES,
    SCORE_TARGETS,
    References,
    client_gains,
    compare_table,
    measure_all,
)
from fdl.utils.files import write_atomically
from fdl.utils.tensorboard import Curves, log_hparams, log_outcome, log_scalars, open_writer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "compare_caption",
    "compare_table",
    "log_compare",
    "print_compare",
    "write_compare_csv",
    "write_compare_json",
    "write_compare_markdown",
]

QUALITY = (
    "student_last",
    *DIFFERENCES,
    "kte",
    "recovered_gap",
    "recovered_gap_nll",
    "specialists",
    "student_best",
    "rounds_to_best",
    "seconds",
)
BYTES = (
    *("bytes_total", "bytes_total_percent", "setup_bytes", "student_delivery_bytes", "bytes_all", "bytes_all_percent"),
    "bytes_to_best",
)
TO_TARGET = tuple(
    f"{name}_{target}{part}"
    for target in SCORE_TARGETS
    for name, part in (
        *(("rounds_to", ""), ("bytes_to", ""), ("bytes_to", "_percent"), ("bytes_to", "_all")),
        ("bytes_to", "_all_percent"),
    )
)
GAINS = tuple(name for name in COLUMNS if "_gain" in name)
REPORT_SECTIONS = {
    "Quality": QUALITY,
    "Bytes, all rounds": BYTES,
    "Bytes to an equal target": TO_TARGET,
    "Gain of each site from participation": GAINS,
}
"""The tables of ``compare.md``."""

PRINTED = (
    *("student_last", "kte", "recovered_gap", "bytes_total", "bytes_all", "bytes_all_percent"),
    *("bytes_to_95_all_percent", "seconds"),
)
"""Columns that fit on a screen."""

SORTED_BY = (
    *("kte", "recovered_gap", "bytes_all", "bytes_to_95_all", "bytes_to_98_all"),
    *(f"{whose}_gain{part}" for whose in ("student", "specialist") for part in ("", "_min", "_variance", "_jain")),
)
"""Measures by which TensorBoard's dashboard can sort runs, besides a run's own metrics. The list is constant, since of
several lists that are written for a run, TensorBoard reads only the first."""


def write_compare_csv(path: Path, table: Sequence[Mapping[str, Any]], failed: Mapping[str, str] | None = None) -> None:
    """Write a comparison in full precision as CSV, one row per variant; None is written as an empty cell.

    Args:
        path: the file to write.
        table: from `compare_table`.
        failed: reasons of failed runs by variant, for the column ``failed``. The other columns of a variant whose runs
            all failed are empty.
    """
    failed = failed or {}
    rows = [{**line, "failed": failed.get(line["variant"])} for line in table]
    there = {line["variant"] for line in table}
    rows += [{"variant": name, "seeds": 0, "failed": why} for name, why in failed.items() if name not in there]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_compare_json(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    references: References = NO_REFERENCES,
) -> None:
    """Write the measures of every run, seed by seed, and the gain of each client.

    Args:
        path: the JSON file to write: ``references``, and ``runs`` with ``variant``, ``seed``, everything in
            `fdl.runs.comparison.COLUMNS`, and ``gains`` from `fdl.runs.comparison.client_gains`.
        rows: ``{"variant", "seed", "summary"}`` for every run.
        references: the variants with which the others are compared.
    """
    measured = measure_all(rows, references)
    summaries = {(row["variant"], row["seed"]): row["summary"] for row in rows}
    runs = []
    for (variant, seed), values in measured.items():
        alone = summaries.get((references.single_site, seed)) if variant != references.single_site else None
        gains = {} if alone is None else client_gains(summaries[variant, seed], alone)
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
        runs.append({"variant": variant, "seed": seed, **finite, "gains": gains})
    names = dict(zip(("reference", "bytes_reference", "single_site_reference"), references))
    text = json.dumps({"references": names, "runs": runs}, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def write_compare_markdown(
    path: Path,
    table: Sequence[Mapping[str, Any]],
    references: References = NO_REFERENCES,
    failed: Mapping[str, str] | None = None,
) -> None:
    """Write a comparison as Markdown, in sections, with a caption that explains its columns.

    Args:
        path: the file to write.
        table: from `compare_table`.
        references: the variants with which the others are compared.
        failed: reasons of failed runs by variant, for the last section. A variant whose runs all failed is in no other
            section.
    """
    parts = []
    for title, columns in REPORT_SECTIONS.items() if table else ():
        titles, cells = _cells(table, columns, references)
        if len(titles) == 2:  # only names and seeds
            continue
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *cells]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    if table:
        parts.append(compare_caption(table, references))
    if failed:
        parts.append("## Failed\n\n" + "\n".join(f"- {name}: {why}" for name, why in failed.items()))
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())


def print_compare(
    table: Sequence[Mapping[str, Any]],
    console: Console,
    references: References = NO_REFERENCES,
) -> None:
    """Print the most important columns of a comparison.

    No cell is truncated or wrapped; lines may exceed the width of the console.

    Args:
        table: from `compare_table`.
        console: the console to print on.
        references: the variants with which the others are compared.
    """
    titles, cells = _cells(table, PRINTED, references)
    shown = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        shown.add_column(textwrap.fill(title, 11), justify="left" if title == "Variant" else "right", no_wrap=True)
    for line in cells:
        shown.add_row(*map(Text, line))
    console.print(Segments(console.render(shown, console.options.update(max_width=10_000))), end="", crop=False)
    console.print(Text(compare_caption(table, references, PRINTED), style="dim"))


ALL_COLUMNS = tuple(name for part in REPORT_SECTIONS.values() for name in part)
"""Columns of all sections of a comparison, in order."""


def compare_caption(
    table: Sequence[Mapping[str, Any]],
    references: References = NO_REFERENCES,
    columns: Iterable[str] = ALL_COLUMNS,
) -> str:
    """Explain the columns of a comparison.

    Args:
        table: from `compare_table`.
        references: the variants with which the others are compared.
        columns: the columns that are shown.
    """
    reference, bytes_reference, single_site = references
    score, shown = table[0]["score"], set(columns)
    metric = score.replace("_", " ") if score != "nll" else "NLL"
    higher = next(task.higher_is_better for task in TASKS.values() if task.score == score)
    sentences = [
        f"Mean ± standard deviation over seeds. {metric[0].upper()}{metric[1:]} on test data"
        f"{'' if higher else ', less is better'}, of the student after the last round."
    ]
    if shown & set(DIFFERENCES) and (reference or bytes_reference):
        sentences.append("Δ: difference to that variant with the same seed, with its 95 % t interval.")
    if reference is not None and higher:
        sentences.append(f"KTE, knowledge-transfer efficiency: the student's {metric} as a share of {reference}'s.")
    if reference is not None and single_site is not None:
        sentences.append(
            f"Recovered gap: which share of the way from the mean model of {single_site} to {reference} the student "
            "goes."
        )
    if "student_best" in shown and (labels := max(line["validation_samples"] for line in table)):
        sentences.append(f"Best round: chosen on {labels:,} validation samples, which a real server hardly has.")
    sentences.append(
        "Messages: up and down, all clients. Together: with what is sent before round 1 (proxy set, public encoder, "
        "labelled public samples), and with the final student, uncompressed, sent to every site; private data that a "
        "centralised run needs in one place are in neither."
    )
    if bytes_reference is not None:
        sentences.append(f"%: of {bytes_reference}'s bytes of the same kind.")
    if reference is not None and shown & set(TO_TARGET):
        goal = (
            f"of {reference}'s {metric}"
            if higher
            else f"of the way from {single_site or 'a site alone'} to {reference}"
        )
        sentences.append(f"95 %, 98 %: up to the first round whose student reaches that share {goal}.")
    if single_site is not None and shown & set(GAINS):
        sentences.append(
            f"Gain: a client's {metric} on the common test data above that of its own model in {single_site}, if it is "
            "served by the student or by its own model; mean, least and variance over clients, and Jain's index, "
            "where none loses."
        )
    return " ".join(sentences)


def log_compare(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    references: References = NO_REFERENCES,
) -> None:
    """Write every run of a comparison to TensorBoard: curves by round and by bytes, outcome and hyperparameters.

    Args:
        folder: the comparison's folder; runs are written to ``tensorboard/<variant>-seed<k>`` in it.
        rows: ``{"variant", "seed", "summary"}`` for every run. Its measures are logged as ``compare/…``.
        references: the variants with which the others are compared.
    """
    measured = measure_all(rows, references)
    for row in rows:
        summary = row["summary"]
        writer = open_writer(folder / "tensorboard" / f"{row['variant']}-seed{row['seed']}")
        curves = Curves(writer)
        for record in summary["history"]:
            finite = {key: value for key, value in record["metrics"].items() if value is not None}
            curves.log({**record, "metrics": finite, "clients": {}})  # clients' curves are in the runs' own folders
        values = {f"compare/{name}": value for name, value in measured[row["variant"], row["seed"]].items()}
        log_scalars(writer, values, summary["rounds"])
        compared = [f"compare/{name}" for name in SORTED_BY]
        sent = [f"communication/{key}" for key in ("upload_bytes", "download_bytes")]
        hparams = {"variant": row["variant"], "method": summary["method"], "seed": row["seed"]}
        log_hparams(writer, hparams, [*summary["metrics"], *sent, *log_outcome(writer, summary), *compared])
        writer.close()


def _cells(
    table: Sequence[Mapping[str, Any]],
    columns: Iterable[str],
    references: References = NO_REFERENCES,
) -> tuple[list[str], list[list[str]]]:
    """Format titles and cells, without the columns that are empty in every row."""
    loss = not next(task.higher_is_better for task in TASKS.values() if task.score == table[0]["score"])
    shown = [name for name in columns if any(line[f"{name}_mean"] is not None for line in table)]
    shown = [name for name in shown if not (loss and name == "kte")]  # of a loss, it equals the recovered gap
    titles = COLUMNS | dict(zip(DIFFERENCES, [f"Δ {name}" for name in references[:2]]))
    rows = [[line["variant"], str(line["seeds"]), *(_cell(name, line) for name in shown)] for line in table]
    return ["Variant", "Seeds", *(titles[name] for name in shown)], rows


def _cell(name: str, line: Mapping[str, Any]) -> str:
    mean, target = line[f"{name}_mean"], next((t for t in SCORE_TARGETS if f"_to_{t}" in name), None)
    if mean is None:
        missed = target is not None and "percent" not in name and line[f"reached_{target}"] < line["seeds"]
        trained = line["student_last_mean"] is not None
        return f"by {line[f'reached_{target}']} of {line['seeds']} seeds only" if missed and trained else "-"
    if name in DIFFERENCES:
        low, high = line[f"{name}_low"], line[f"{name}_high"]
        return f"{mean:+.4f}" + ("" if low is None else f" [{low:+.4f}, {high:+.4f}]")
    if "bytes" in name and "percent" not in name:
        return decimal(round(mean))
    digits = 1 if name.startswith("rounds_to") or name == "seconds" else 2 if "percent" in name else 4
    std = line[f"{name}_std"]
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
