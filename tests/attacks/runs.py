"""Small federations on handwritten digits that have ended."""

from pathlib import Path

from fdl.build import build
from fdl.recipe import from_mapping

FIT = {"steps": 30, "batch_size": 32, "optimizer": {"target": "adam", "args": {"lr": 0.01}}}


def recipe(**changes):
    """Three clients with perceptrons, two rounds, answers of 8 bits."""
    tree = {
        "method": {"target": "federated_distillation", "args": {"confidence": "max_probability"}},
        "data": {"target": "digits", "args": {"proxy": 60, "validation": 60, "test": 240, "limit": 700}},
        "partition": {"target": "dirichlet", "args": {"alpha": 0.5}},
        "federation": {"clients": 3, "rounds": 2},
        "specialists": [{"target": "mlp", "args": {"hidden": [32]}}],
        "student": {"target": "mlp", "args": {"hidden": [32]}},
        "local_training": FIT,
        "server_distil": FIT,
        "channel": {"upload": [{"target": "quantize", "args": {"bits": 8}}]},
        "fabric": {"accelerator": "cpu"},
        "callbacks": [],
    }
    return from_mapping(tree | changes)


def finished(folder: Path, trained: bool = True, **changes):
    """A loop after its last round, or before its first."""
    loop = build(recipe(**changes), folder)
    if trained:
        loop.run()
    else:
        loop.history.append({"clients": {str(client.id): {} for client in loop.clients}})
    return loop
