"""What a run leaves for people and for other programs to read."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

import fdl
from fdl.checkpoint import write_atomically
from fdl.modules.weights import state_bytes
from fdl.privacy.spent import spent
from fdl.tasks import TASKS, Task

if TYPE_CHECKING:
    from rich.console import Console

    from fdl.loop import FederatedLoop
    from fdl.participants import Client

_TITLES = {
    "nll": "NLL",
    "ece": "ECE",
    "macro_f1": "macro F1",
    "top5": "top-5 accuracy",
    "image_to_text_recall_at_1": "image to text recall at 1",
}
"""Metrics as people write them, where it is not their name."""


def summarise(loop: FederatedLoop, total_seconds: float | None = None) -> dict[str, Any]:
    """Gather what ``summary.json`` holds; its keys are stable.

    Args:
        loop: a run that has ended.
        total_seconds: wall time of the run; default the sum of its timed parts, which counts what was done before a
            resume too.

    Returns:
        ``name``, ``method``, ``seed``, ``score`` (the ``metric`` by which rounds and runs are compared, and whether
        ``higher_is_better``), ``rounds`` (done), ``metrics`` (of the last round), ``best`` (the round of the best score
        on validation data, of equals the one that the task's tie breaker prefers where that is measured, else the
        earliest; the last round where nothing was validated: its ``round``, ``metrics`` and ``communication``, and
        ``validation_samples``, on how many it was chosen, 0 where it was not),
        ``history`` (all records), ``communication`` (with ``by_kind``; ``student_delivery_bytes``: the student after
        the last round, sent to every site once more; and ``total_bytes``: messages, set-up and that delivery),
        ``privacy`` (as `fdl.privacy.spent` says; in JSON an infinite ε is null), ``time``, ``memory``
        (``peak_device_bytes`` is None without a CUDA device), ``participants``, ``left_out`` (why clients took no part
        at all, by id), ``environment`` and ``audit`` (as `fdl.auditing.Audit.summary` says; None where nothing was
        attacked).
    """
    history = loop.history
    last = history[-1] if history else {"round": 0, "metrics": {}, "communication": loop.ledger.totals()}
    task = TASKS[loop.server.task]
    number = best_round(history, task)
    best = next((record for record in history if record["round"] == number), last)
    parts = {f"{part}_s": loop.seconds.get(part, 0.0) for part in ("clients", "server", "evaluate")}
    total = sum(loop.seconds.values()) if total_seconds is None else total_seconds
    return {
        "name": loop.recipe.name,
        "method": loop.recipe.method.target,
        "seed": loop.recipe.seed,
        "score": {"metric": task.score, "higher_is_better": task.higher_is_better},
        "rounds": last["round"],
        "metrics": last["metrics"],
        "best": {key: best[key] for key in ("round", "metrics", "communication")}
        | {"validation_samples": 0 if number is None else len(loop.server.validation)},
        "history": history,
        "communication": _communication(loop),
        "privacy": spent(loop),
        "time": {
            "total_s": total,
            **parts,
            "transfer_s": last["communication"].get("transfer_s", 0.0),
            "parts": dict(loop.seconds.parts),
        },
        "memory": _memory(),
        "participants": _participants(loop),
        "left_out": {str(client): reason for client, reason in loop.left_out.items()},
        "environment": _environment(loop.runtime.device),
        "audit": None if loop.audit is None else loop.audit.summary(),
    }


def _communication(loop: FederatedLoop) -> dict[str, Any]:
    """All that was sent, and what bringing the outcome to the sites takes."""
    totals, delivery = loop.ledger.totals(), 0
    if loop.server.student is not None:
        delivery = len(loop.clients) * state_bytes(loop.server.student)
    sent = totals["upload_bytes"] + totals["download_bytes"] + totals["setup_bytes"]
    counts = {"student_delivery_bytes": delivery, "total_bytes": sent + delivery}
    return {**totals, **counts, "by_kind": loop.ledger.by_kind()}


def best_round(history: Sequence[Mapping[str, Any]], task: Task) -> int | None:
    """Return the round of the best score on validation data, the earliest of equals; None where none was validated."""
    measured = [r for r in history if not math.isnan(r["metrics"].get(f"student/validation/{task.score}", math.nan))]
    return max(measured, key=lambda record: _validated(record, task))["round"] if measured else None


def _validated(record: Mapping[str, Any], task: Task) -> tuple[float, float]:
    """How good a round was on validation data: small sets often tie in accuracy, hardly ever in likelihood."""
    metrics = record["metrics"]
    score = metrics[f"student/validation/{task.score}"]
    tie = metrics.get(f"student/validation/{task.tie_breaker}", 0.0)
    return score if task.higher_is_better else -score, -tie


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
    for name, value in _outcome(summary) + _cost(summary) + _attacked(summary):
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
        if value is None or not math.isfinite(value):
            continue
        if owner == "student" and name:
            text = f"{value:.4f}"
            if best["round"] != summary["rounds"] and best["metrics"].get(key) is not None:
                samples = best.get("validation_samples")  # runs of earlier versions did not say
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


def _cost(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it took, in rows of two."""
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
        titles["student_delivery_bytes"] = "To bring the student to all sites"
    titles["total_bytes"] = "Bytes in all"
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


def _attacked(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What attacks found, in rows of two."""
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
        architecture = client.architecture
        if architecture not in sizes:
            sizes[architecture] = sum(p.numel() for p in loop.runtime.template(architecture).parameters())
        return {
            "id": client.id,
            **({"name": client.name} if client.name else {}),
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
