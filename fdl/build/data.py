"""Construction of every participant's data from a recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fdl.datamodules.arrivals import ScheduledSamples
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.participants import Server
from fdl.recipe.config import Recipe
from fdl.state.shards import full_tensor_cpu
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from fdl.datamodules.arrivals import Arrival
    from fdl.datamodules.base import FederatedDataModule
    from fdl.datamodules.samples import Samples
    from fdl.methods.base import Method


CALIBRATION = 0.1
"""Fraction of a client's data that is held out if the method needs calibration data and the recipe gives none."""


def _hold_out(share: np.ndarray, recipe: Recipe, client: int, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Split a client's indices into training samples, at least one, and calibration samples."""
    shuffled = numpy_stream(recipe.seed, "calibration", 0, client).permutation(share)
    part = recipe.federation.calibration_fraction
    if part is None:  # samples that are not needed for calibration are better used for training
        part = CALIBRATION if method.needs_calibration else 0.0
    held_out = min(round(part * len(share)), len(share) - 1)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def _pooled_rows(rows: Sequence[np.ndarray], data: FederatedDataModule) -> np.ndarray | None:
    """Return the rows that the clients train on, pooled: a centralised run gets the same samples; None for all rows."""
    union = np.sort(np.concatenate(rows))
    return None if len(union) == len(data.train) else union


def _apply_arrivals(
    arrival: Arrival | None, data: FederatedDataModule
) -> tuple[Callable[[np.ndarray | None], Samples | ScheduledSamples], np.ndarray | None]:
    """Apply the arrival schedule, if the recipe has one.

    Returns:
        A function from a participant's rows (None: all) to its samples, and each test sample's stage if known.

    Raises:
        UserError: the schedule does not fit the data.
    """
    if arrival is None:
        return lambda rows: data.train if rows is None else data.train.subset(rows), None

    def stages(samples: Samples, groups: np.ndarray | None) -> np.ndarray:
        labels = None if samples.labels is None else samples.labels.numpy()
        return arrival.assign(labels, groups, data.num_classes)

    try:
        assigned = stages(data.train, data.groups)
    except UserError as error:
        raise UserError(f"arrival: {error}") from error
    known = data.test_groups is not None if arrival.by_domain else data.test.labels is not None
    test_stages = stages(data.test, data.test_groups) if known else None
    everything = np.arange(len(assigned))

    def incoming(rows: np.ndarray | None) -> ScheduledSamples:
        rows = everything if rows is None else rows
        return ScheduledSamples(data.train.subset(rows), assigned[rows], arrival)

    return incoming, test_stages


def _fingerprint(
    data: FederatedDataModule, shares: list[np.ndarray], runtime: Runtime, architectures: set[str], server: Server
) -> str:
    """Hash the data, their partition, and the frozen weights, which checkpoints do not contain."""
    digest = hashlib.blake2b(data.fingerprint().encode(), digest_size=16)
    own = [runtime.shared_module(key) for key in sorted(architectures)]
    for module in (server.student, server.teacher, *own):
        names = () if module is None else module.frozen
        tensors = module.state_dict() if names else {}
        for name in sorted(names):
            whole = full_tensor_cpu(tensors[name]).contiguous()
            digest.update(name.encode() + whole.view(-1).view(torch.uint8).numpy().tobytes())
    for share in shares:
        digest.update(np.ascontiguousarray(share, dtype="<i8").tobytes() + b"/")
    return digest.hexdigest()
