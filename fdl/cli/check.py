"""Output of ``fdl check``: a description of the federation that a recipe builds, and the bytes of a round."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.filesize import decimal

from fdl.build.federation import build_federation
from fdl.cli.listing import align_columns
from fdl.engine.distributed.devices import require_gpus
from fdl.federation.executors import plain_function_note
from fdl.federation.traffic_estimate import estimate_rounds
from fdl.federation.trial_step import run_trial_steps

if TYPE_CHECKING:
    from fdl.datamodules.samples import Samples
    from fdl.loop import FederatedLoop
    from fdl.recipe.config import Recipe

log = logging.getLogger("fdl")

_MOST_CLASSES = 20
_Sizes = dict[str, dict[int, int]]


def describe_federation(recipe: Recipe, folder: Path) -> str:
    """Build a recipe's federation and describe it; nothing is trained or written.

    Every model takes one training step on two samples, which is undone: errors in user-defined models show here.

    Args:
        recipe: the checked recipe.
        folder: the folder that a run would use.

    Returns:
        The description, several lines of text.

    Raises:
        UserError: the recipe needs GPUs, and there are none; or a model fails in its training step.
    """
    require_gpus(recipe)
    log.info("reading the data and building the models")
    loop = build_federation(recipe, folder, launch=False)
    run_trial_steps(loop)
    left = [f"client {client} is left out: {reason}" for client, reason in loop.left_out.items()]
    note = plain_function_note(loop.executor, loop.method, loop.clients)
    return "\n".join([*_clients(loop), *left, *([] if note is None else [note]), "", *_server(loop, folder)])


def _clients(loop: FederatedLoop) -> list[str]:
    """Describe the clients, one row per client: model, data, and the maximum bytes of a round."""
    public = "" if not loop.server.proxy else f", with {len(loop.server.proxy):,} public samples"
    log.info("counting the bytes of two rounds of %d untrained clients%s", len(loop.clients), public)
    first, later = estimate_rounds(loop, 2)
    header = ("client", "architecture", "parameters", "train", "calibration", "down", "up", "samples by class")
    rows: list[tuple[object, ...]] = [header]
    for client in loop.clients:
        with client.data_gate.open():  # the data are on the machine of the caller
            histogram = _histogram(client.train, client.num_classes)
        rows.append(
            (
                f"{client.id}  {client.name}" if client.name else client.id,
                client.architecture,
                f"{_parameters(loop.runtime.shared_module(client.architecture)):,}",
                f"{len(client.train):,}",
                f"{len(client.calibration):,}",
                *(
                    decimal(max(sizes[direction][client.id] for sizes in (first, later)))
                    for direction in ("down", "up")
                ),
                histogram,
            )
        )
    numbers = () if any(client.name for client in loop.clients) else (0,)
    return [
        *align_columns(rows, right=(*numbers, 2, 3, 4, 5, 6)),
        *_traffic(first, later, loop.recipe.federation.client_fraction),
    ]


def _traffic(first: _Sizes, later: _Sizes, client_fraction: float) -> list[str]:
    """Describe the bytes that all clients together receive and send."""
    if not any(size for sizes in (first, later) for clients in sizes.values() for size in clients.values()):
        return ["nothing is sent"]
    asked = "" if client_fraction == 1 else f", of whom a fraction of {client_fraction:g} is sampled,"
    if first == later:
        lines = [f"a round of all clients{asked} sends {_down_and_up(first)}"]
    else:
        lines = [
            f"the first round of all clients{asked} sends {_down_and_up(first)}",
            f"a later round sends {_down_and_up(later)}",
        ]
    return [*lines, "(untrained models' messages: training changes what is entropy-coded or sent only on change)"]


def _down_and_up(sizes: _Sizes) -> str:
    return " and ".join(f"{decimal(sum(sizes[direction].values()))} {direction}" for direction in ("down", "up"))


def _server(loop: FederatedLoop, folder: Path) -> list[str]:
    """Describe the server's models and data, the device, and the run's folder."""
    server = loop.server
    lines = []
    for name, module in (("student", server.student), ("teacher", server.teacher)):
        if module is not None:
            lines.append((name, f"{_parameters(module):,} parameters"))
    for name in ("proxy", "public", "validation", "test"):
        samples = getattr(server, name)
        if name == "public" and not samples:
            continue
        lines.append((name, f"{0 if samples is None else len(samples):,} samples"))
    costs = {kind: nbytes for kind, nbytes in loop.method.setup_bytes(server).items() if nbytes}
    if costs:
        parts = ", ".join(f"{kind} {decimal(nbytes)}" for kind, nbytes in costs.items())
        lines.append(("before round 1", f"every client is sent {parts}"))
    lines += [("device", str(loop.runtime.device)), ("folder", str(folder))]
    return align_columns(lines)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _histogram(samples: Samples, classes: int) -> str:
    if samples.labels is None:
        return "unlabelled"
    counts = torch.bincount(samples.labels, minlength=classes).tolist()
    if classes <= _MOST_CLASSES:
        return " ".join(f"{count:>4}" for count in counts)
    held = sorted((count for count in counts if count), reverse=True)
    return f"{len(held)} of {classes} classes, {held[-1]} to {held[0]} each" if held else "none"
