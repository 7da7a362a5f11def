"""From a recipe to every client's data."""

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
"""Share of a client's data that is held out where the method looks at it and the recipe does not say how much."""


def _hold_out(share: np.ndarray, recipe: Recipe, client: int, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Split a client's indices into what it trains on and what it calibrates with; at least one to train on."""
    shuffled = numpy_stream(recipe.seed, "calibration", 0, client).permutation(share)
    part = recipe.federation.calibration_fraction
    if part is None:  # what nobody looks at is better trained on
        part = CALIBRATION if method.needs_calibration else 0.0
    held_out = min(round(part * len(share)), len(share) - 1)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def _together(rows: Sequence[np.ndarray], data: FederatedDataModule) -> np.ndarray | None:
    """What all clients train on, so that who has it in one place has no sample more; None where that is everything."""
    union = np.sort(np.concatenate(rows))
    return None if len(union) == len(data.train) else union


def _arriving(
    arrival: Arrival | None, data: FederatedDataModule
) -> tuple[Callable[[np.ndarray | None], Samples | ScheduledSamples], np.ndarray | None]:
    """What makes a participant's samples of its rows (None: all), and each test sample's stage where that is known.

    Raises:
        UserError: when the schedule does not suit the data.
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
    """Of the data, of who holds which, and of the frozen weights, which no checkpoint has."""
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
