"""Participants for mechanisms alone: streams, a state and a budget, and no federation around."""

from types import SimpleNamespace

from fdl.datamodules.guarded import PrivateDataGate
from fdl.utils.seeding import torch_stream


def someone(id=0, round=1, seed=0, privacy=None, dp_sgd=None, **more):
    """A client, or the server where the id is -1."""
    return SimpleNamespace(
        id=id,
        round=round,
        seed=seed,
        state={},
        cache={},
        metrics={},
        privacy=privacy,
        data_gate=PrivateDataGate(),
        dp_sgd=dp_sgd,
        rng=lambda purpose: torch_stream(seed, purpose, round, id),
        noise=lambda purpose: torch_stream(seed, purpose, round, id),
        **more,
    )
