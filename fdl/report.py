"""What a run, or a comparison of runs, leaves for people and for other programs to read."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import resource
import shlex
import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.filesize import decimal
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

import fdl
from fdl.callbacks.events import Curves, log_hparams, open_writer
from fdl.checkpoint import write_atomically
from fdl.metrics import knowledge_transfer_efficiency

if TYPE_CHECKING:
    from rich.console import Console

    from fdl.loop import FederatedLoop
    from fdl.participants import Client

STUDENT, SPECIALISTS, VALIDATION = "student/test/accuracy", "specialists/test/accuracy", "student/validation/accuracy"

# --- one run


def summarise(loop: FederatedLoop, total_seconds: float | None = None) -> dict[str, Any]:
    """Gather what ``summary.json`` holds; its keys are stable.

    Args:
        loop: a run that has ended.
        total_seconds: wall time of the run; default the sum of its timed parts, which counts what was done before a
            resume too.

    Returns:
        ``name``, ``method``, ``seed``, ``rounds`` (done), ``metrics`` (of the last round), ``best`` (the round of the
        highest accuracy on validation data, the earliest of equals, else the last: its ``round``, ``metrics`` and
        ``communication``), ``history`` (all records), ``communication`` (with ``by_kind``), ``time``, ``memory``
        (``peak_device_bytes`` is None without a CUDA device), ``participants`` and ``environment``.
    """
    history = loop.history
    last = history[-1] if history else {"round": 0, "metrics": {}, "communication": loop.ledger.totals()}
    measured = [r for r in history if not math.isnan(r["metrics"].get(VALIDATION, math.nan))]
    best = max(measured, key=lambda r: r["metrics"][VALIDATION]) if measured else last
    parts = {f"{part}_s": loop.seconds.get(part, 0.0) for part in ("clients", "server", "evaluate")}
    total = sum(loop.seconds.values()) if total_seconds is None else total_seconds
    return {
        "name": loop.recipe.name,
        "method": loop.recipe.method.target,
        "seed": loop.recipe.seed,
        "rounds": last["round"],
        "metrics": last["metrics"],
        "best": {key: best[key] for key in ("round", "metrics", "communication")},
        "history": history,
        "communication": {**loop.ledger.totals(), "by_kind": loop.ledger.by_kind()},
        "time": {"total_s": total, **parts},
        "memory": _memory(),
        "participants": _participants(loop),
        "environment": _environment(loop.runtime.device),
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary as JSON, whole or not at all; what is not finite becomes null, which any parser reads."""
    write_atomically(path, (json.dumps(_plain(summary), indent=1, allow_nan=False) + "\n").encode())


def print_table(summary: Mapping[str, Any], console: Console, folder: Path) -> None:
    """Print what a run came to.

    Args:
        summary: from `summarise`, or read from a ``summary.json``.
        console: where to.
        folder: the run's folder.
    """
    title = Text(f"{summary['name']} ({summary['method']})", style="bold")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _outcome(summary) + _cost(summary):
        table.add_row(Text(name), Text(value))
    console.print(table)
    # not in the table: what people copy must not be broken over lines
    for name, value in (
        ("Run folder", str(folder)),
        ("To look at it", shlex.join(["tensorboard", "--logdir", f"{folder}"])),
    ):
        console.print(Text.assemble((f"  {name}: ", "bold"), value), soft_wrap=True)


def _outcome(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How good the models are, in rows of two."""
    metrics, best = summary["metrics"], summary["best"]
    rows = []
    for key, value in metrics.items():
        owner, _, name = key.partition("/test/")
        if value is None:
            continue
        if owner == "student" and name:
            text = f"{value:.4f}"
            if best["round"] != summary["rounds"] and best["metrics"].get(key) is not None:
                text += f"  ({best['metrics'][key]:.4f} in round {best['round']}, best on validation)"
            rows.append((f"Student, test {name}", text))
        elif owner == "specialists" and name:
            own = [p["metrics"].get(f"test/{name}") for p in summary["participants"]]
            own = [v for v in own if v is not None]
            spread = f"  ({min(own):.4f} to {max(own):.4f})" if own else ""
            rows.append((f"Specialists, test {name}", f"{value:.4f} on average{spread}"))
    return rows


def _cost(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it took, in rows of two."""
    sent, time = summary["communication"], summary["time"]
    setup = [kind.removeprefix("setup/") for kind in sent["by_kind"] if kind.startswith("setup/")]
    titles = {
        "upload_bytes": "Sent up by clients",
        "download_bytes": "Sent down to clients",
        "setup_bytes": f"Sent once, before ({', '.join(setup)})" if setup else "Sent once, before",
    }
    rows = [(title, f"{decimal(sent[key])}  ({sent[key]:,} bytes)") for key, title in titles.items()]
    refused = [client for record in summary["history"] for client in record["refused"]]
    if refused:
        who = ", ".join(sorted(set(refused), key=int))
        rows.append(("Messages refused", f"{len(refused)}, of client {who}"))
    rows.append(("Rounds", str(summary["rounds"])))
    parts = ", ".join(f"{part} {time[f'{part}_s']:.1f}" for part in ("clients", "server", "evaluate"))
    rows.append(("Seconds", f"{time['total_s']:.1f}  ({parts})"))
    return rows


def _memory() -> dict[str, int | None]:
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_rss_bytes": _peak_rss(), "peak_device_bytes": device}


def _peak_rss() -> int:
    """Return the most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        # Linux lets a process inherit the peak of the one that started it; its own is in /proc, where there is one
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return peak
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), peak)


def _participants(loop: FederatedLoop) -> list[dict[str, Any]]:
    """Every client, with the newest value of each of its metrics."""
    newest: dict[str, dict[str, float]] = {}
    for record in loop.history:
        for client, metrics in record["clients"].items():
            newest.setdefault(client, {}).update(metrics)
    sizes: dict[str, int] = {}

    def entry(client: Client) -> dict[str, Any]:
        # who keeps no specialist of its own trains, or stands in for, the student's architecture
        own = "specialist" in client.state or loop.server.student is None
        architecture = client.architecture if own else "student"
        if architecture not in sizes:
            sizes[architecture] = sum(p.numel() for p in loop.runtime.template(architecture).parameters())
        return {
            "id": client.id,
            "samples": len(client.train),
            "architecture": architecture,
            "parameters": sizes[architecture],
            "metrics": newest.get(str(client.id), {}),
        }

    return [entry(client) for client in loop.clients]


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "fdl": fdl.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpus": os.cpu_count(),
    }


def _plain(value: Any) -> Any:
    """Turn a value into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


# --- many runs

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
        A row a variant, in order of first appearance: ``variant``, ``method``, ``seeds`` (how many), and the mean and
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
    best, last = summary["best"], summary["metrics"]
    student = best["metrics"].get(STUDENT)
    central = None if reference is None else reference["best"]["metrics"].get(STUDENT)
    base = 0 if bytes_reference is None else _traffic(bytes_reference["best"]["communication"])
    to_best, total = _traffic(best["communication"]), _traffic(summary["communication"])
    return {
        "student_best": student,
        "student_last": last.get(STUDENT),
        "specialists": last.get(SPECIALISTS),
        "kte": None if student is None or central is None else knowledge_transfer_efficiency(student, central),
        "bytes_to_best": to_best,
        "bytes_to_best_percent": 100 * to_best / base if base else None,
        "bytes_total": total,
        "bytes_total_percent": 100 * total / base if base else None,
        "setup_bytes": summary["communication"]["setup_bytes"],
        "rounds_to_best": best["round"],
        "seconds": summary["time"]["total_s"],
    }


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
    write_atomically(path, f"{text}\n\n{compare_caption(reference, bytes_reference)}\n".encode())


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
    console.print(Text(compare_caption(reference, bytes_reference), style="dim"))


def compare_caption(reference: str | None, bytes_reference: str | None) -> str:
    """Say what the columns of a comparison mean."""
    sentences = ["Mean ± standard deviation over seeds. Accuracy on test data; best round chosen on validation data."]
    if reference is not None:
        sentences.append(f"KTE, knowledge-transfer efficiency: the student's accuracy as a share of {reference}'s.")
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
