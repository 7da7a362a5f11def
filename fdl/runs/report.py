"""Report of a finished run: summary.json and the table on the console."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fdl.utils.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console


_TITLES = {
    "nll": "NLL",
    "ece": "ECE",
    "macro_f1": "macro F1",
    "top5": "top-5 accuracy",
    "image_to_text_recall_at_1": "image to text recall at 1",
}
"""Titles of metrics that differ from their names."""


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary as JSON, atomically, with null for values that are not finite, which any parser reads.

    Args:
        path: the file to write.
        summary: the summary.
    """
    write_atomically(path, (json.dumps(_plain(summary), indent=1, allow_nan=False) + "\n").encode())


def print_summary(summary: Mapping[str, Any], console: Console, folder: Path) -> None:
    """Print the summary of a run.

    Args:
        summary: from `summarise`, or read from a ``summary.json``.
        console: the console to print on.
        folder: the run's folder.
    """
    title = Text(f"{summary['name']} ({summary['method']})", style="bold")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _score_rows(summary) + _cost_rows(summary) + _audit_rows(summary):
        table.add_row(Text(name), Text(value))
    console.print(table)
    # not in the table: text to copy must not be wrapped
    for name, value in (
        ("Run folder", str(folder)),
        ("To view it", shlex.join(["tensorboard", "--logdir", f"{folder}"])),
    ):
        console.print(Text.assemble((f"  {name}: ", "bold"), value), soft_wrap=True)


def _score_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the scores of the models as pairs of title and value."""
    metrics, best = summary["metrics"], summary["best"]
    rows = []
    for key, value in metrics.items():
        owner, _, name = key.partition("/test/")
        if value is None or not math.isfinite(value):
            continue
        if owner == "student" and name:
            text = f"{value:.4f}"
            if best["round"] != summary["rounds"] and best["metrics"].get(key) is not None:
                samples = best.get("validation_samples")  # summaries of earlier versions do not have it
                chosen = f"{samples:,} validation samples" if samples else "validation"
                text += f"  ({best['metrics'][key]:.4f} in round {best['round']}, best on {chosen})"
            rows.append((f"Student, test {_title(name)}", text))
        elif owner.startswith("pools/") and name:
            rows.append((f"Pool {owner.removeprefix('pools/')}, test {_title(name)}", f"{value:.4f}"))
        elif owner == "specialists" and name:
            own = [p["metrics"].get(f"test/{name}") for p in summary["participants"]]
            own = [v for v in own if v is not None and math.isfinite(v)]
            spread = f"  ({min(own):.4f} to {max(own):.4f})" if own else ""
            rows.append((f"Specialists, test {_title(name)}", f"{value:.4f} on average{spread}"))
    return rows


def _title(metric: str) -> str:
    return _TITLES.get(metric, metric.replace("_", " "))


def _cost_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format bytes, privacy, rounds and seconds as pairs of title and value."""
    sent, time = summary["communication"], summary["time"]
    setup = [
        kind.removeprefix("setup/") for kind, size in sent["by_kind"].items() if size and kind.startswith("setup/")
    ]
    titles = {
        "upload_bytes": "Sent up by clients",
        "download_bytes": "Sent down to clients",
        "setup_bytes": f"Sent once, before round 1 ({', '.join(setup)})" if setup else "Sent once, before round 1",
    }
    if sent.get("student_delivery_bytes"):
        titles["student_delivery_bytes"] = "Delivery of the student to all sites"
    titles["total_bytes"] = "Total bytes"
    known = {key: title for key, title in titles.items() if key in sent}  # older versions did not count all of them
    rows = [(title, f"{decimal(sent[key])}  ({sent[key]:,} bytes)") for key, title in known.items()]
    if left := summary.get("left_out"):
        rows.append(("Clients left out", f"{', '.join(left)}  ({next(iter(left.values()))})"))
    refused = [pair for record in summary["history"] for pair in record["refused"].items()]
    if refused:
        who = ", ".join(sorted({client for client, _ in refused}, key=int))
        (reason, _), *others = Counter(reason for _, reason in refused).most_common()
        why = f"mostly: {reason}" if others else reason
        rows.append(("Messages refused", f"{len(refused)}, of client {who}  ({why})"))
    if (private := summary.get("privacy", {})).get("epsilon") is not None and "delta" in private:
        what = f"ε = {private['epsilon']:.3f} at δ = {private['delta']:g}, for each {private['level']}"
        rows.append(("Privacy spent, at most", what))
    rows.append(("Rounds", str(summary["rounds"])))
    parts = ", ".join(f"{part} {time[f'{part}_s']:.1f}" for part in ("clients", "server", "evaluate"))
    rows.append(("Seconds", f"{time['total_s']:.1f}  ({parts})"))
    if time.get("transfer_s"):
        rows.append(("Seconds on the links", f"{time['transfer_s']:.1f}  (simulated)"))
    return rows


def _audit_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the results of attacks as pairs of title and value."""
    audit = summary.get("audit")
    if audit is None:
        return []
    rows = []
    for label, found in audit["attacks"].items():
        areas = [f"{key.removesuffix('/auc')} {v:.3f}" for key, v in found["metrics"].items() if key.endswith("/auc")]
        if areas:
            rows.append((f"Attack {label}, AUC", ", ".join(areas)))
    verdict = "passed" if audit["passed"] else f"FAILED: {'; '.join(audit['violations'])}"
    return [*rows, ("Audit of privacy", verdict)]


def _plain(value: Any) -> Any:
    """Convert a value to types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
