"""Summary of a run, for readers and for other programs."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fdl
from fdl.federation.history import best_round
from fdl.federation.privacy_spent import privacy_spent
from fdl.metrics.tasks import TASKS
from fdl.state.weights import state_bytes

if TYPE_CHECKING:
    from fdl.federation.state import Federation
    from fdl.participants import Client


def summarise(loop: Federation, total_seconds: float | None = None) -> dict[str, Any]:
    """Build the contents of ``summary.json``; its keys are stable.

    Args:
        loop: a run that has ended.
        total_seconds: wall time of the run; default the sum of its timed parts, which includes those before a resume.

    Returns:
        ``name``, ``method``, ``seed``, ``score`` (the ``metric`` by which rounds and runs are compared, and whether
        ``higher_is_better``), ``rounds`` (done), ``metrics`` (of the last round), ``best`` (the round of the best score
        on validation data, of equals the one that the task's tie breaker prefers if that is measured, else the
        earliest; the last round if none was validated: its ``round``, ``metrics`` and ``communication``, and
        ``validation_samples``, the number of samples that it was chosen by, 0 if none was validated), ``history`` (all
        records), ``communication`` (with ``by_kind``; ``student_delivery_bytes``: the student after the last round,
        sent to every site once more; and ``total_bytes``: messages, set-up and that delivery), ``privacy`` (of
        `fdl.federation.privacy_spent.privacy_spent`; in JSON an infinite ε is null), ``time``, ``memory``
        (``peak_device_bytes`` is None without a CUDA device), ``participants``, ``left_out`` (clients that took no part
        at all, with the reason, by id), ``environment`` and ``audit`` (of `fdl.attacks.audit.Audit.summary`; None
        without attacks).
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
        "privacy": privacy_spent(loop.server, loop.clients, loop.history),
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


def _communication(loop: Federation) -> dict[str, Any]:
    """Return the bytes of all messages, and of delivering the final student to the sites."""
    totals, delivery = loop.ledger.totals(), 0
    if loop.server.student is not None:
        delivery = len(loop.clients) * state_bytes(loop.server.student)
    sent = totals["upload_bytes"] + totals["download_bytes"] + totals["setup_bytes"]
    counts = {"student_delivery_bytes": delivery, "total_bytes": sent + delivery}
    return {**totals, **counts, "by_kind": loop.ledger.by_kind()}


def _memory() -> dict[str, int | None]:
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_rss_bytes": _peak_rss(), "peak_device_bytes": device}


def _peak_rss() -> int:
    """Return the peak memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        # on Linux a process inherits the peak of the one that started it; its own is in /proc, if that is mounted
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return peak
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), peak)


def _participants(loop: Federation) -> list[dict[str, Any]]:
    """List all clients, with the newest value of each of their metrics."""
    newest: dict[str, dict[str, float]] = {}
    for record in loop.history:
        for client, metrics in record["clients"].items():
            newest.setdefault(client, {}).update(metrics)
    sizes: dict[str, int] = {}

    def entry(client: Client) -> dict[str, Any]:
        architecture = client.architecture
        if architecture not in sizes:
            sizes[architecture] = sum(p.numel() for p in loop.runtime.shared_module(architecture).parameters())
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
