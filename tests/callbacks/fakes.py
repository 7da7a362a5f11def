"""A stand-in for the loop: what callbacks may ask of it, with rounds whose numbers are known in advance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf

from fdl.federation.summary import summarise
from fdl.utils.stopwatch import Stopwatch


@dataclass
class FakeRecipe:
    name: str = "tiny"
    seed: int = 4
    method: Any = None
    local_training: Any = None
    channel: Any = None
    student: Any = None
    teacher: Any = None
    evaluation: Any = None
    privacy: Any = None

    def to_dict(self):
        return {k: vars(v) if isinstance(v, SimpleNamespace) else v for k, v in asdict(self).items()}

    def to_yaml(self):
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


@dataclass
class FakeClient:
    id: int
    train: Any
    architecture: str = "mlp"
    name: str = ""
    state: dict = field(default_factory=lambda: {"specialist": {}})


class FakeServer:
    def __init__(self, num_classes: int):
        self.num_classes, self.task, self.privacy, self.state = num_classes, "classification", None, {}
        self.classes = [f"class {i}" for i in range(num_classes)]
        self.student: Any = torch.nn.Linear(4, num_classes)
        self.test = Labelled(torch.arange(12) % num_classes)
        self.validation = Labelled(torch.arange(8) % num_classes)

    def predict(self, module, samples):
        """Right for all but the first sample, which it takes for the last class."""
        logits = torch.nn.functional.one_hot(samples.labels, self.num_classes).float()
        logits[0] = logits[0].roll(-1)
        return logits


class Labelled:
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


class FakeLedger:
    def totals(self):
        return {"upload_bytes": 4096, "download_bytes": 1024, "setup_bytes": 7}

    def by_kind(self):
        return {"up/responses": 4096, "down/responses": 1024, "setup/encoder": 7}


class FakeLoop:
    def __init__(self, folder: Path, clients: int = 3, rounds: int = 4, classes: int = 3):
        self.recipe = FakeRecipe(
            method=SimpleNamespace(target="fedprox", args={"mu": 0.01}),
            local_training={"epochs": 2, "optimizer": {"target": "sgd", "args": {"lr": 0.1, "nesterov": True}}},
            channel={"upload": [{"target": "quantize", "args": {"bits": 8}}, {"target": "zstd"}], "download": []},
            student={"target": "mlp", "args": {"hidden": [32, 16]}},
            evaluation=SimpleNamespace(every=1),
        )
        self.folder, self.left_out = folder, {}
        self.clients = [FakeClient(i, Labelled(torch.full((i + 2,), i % classes))) for i in range(clients)]
        self.server = FakeServer(classes)
        self.ledger = FakeLedger()
        self.runtime = SimpleNamespace(device=torch.device("cpu"), shared_module=lambda name: MODULES[name])
        self.history: list[dict] = []
        self.audit = None
        self.seconds = Stopwatch()
        self.seconds.update({"clients": 1.0, "server": 0.5, "evaluate": 0.25, "checkpoint": 0.125})
        self.round, self.rounds, self.resumed_from = 0, rounds, None
        self.stopped: str | None = None

    def stop(self, reason):
        self.stopped = reason

    def cohort(self, round):
        return [client.id for client in self.clients], []

    def run(self, callbacks, until: int | None = None, first: int = 1, summary=None):
        """Play rounds as the loop does; `until` dies after that round without a word."""
        callbacks.on_fit_start(self)
        for round in range(first, self.rounds + 1):
            callbacks.on_round_start(self, round)
            new = record(round, len(self.clients))
            for client, metrics in new["clients"].items():
                callbacks.on_client_end(self, round, int(client), metrics)
            self.history.append(new)
            self.round = round
            callbacks.on_round_end(self, new)
            if round == until:
                return
        callbacks.on_fit_end(self, summary or summarise(self))

    def resume_after(self, round: int) -> FakeLoop:
        """What a new process finds in the checkpoint of a round."""
        loop = FakeLoop(self.folder, len(self.clients), self.rounds, self.server.num_classes)
        loop.history, loop.round, loop.resumed_from = self.history[:round], round, round
        return loop


MODULES = {"mlp": torch.nn.Linear(4, 3), "student": torch.nn.Linear(10, 3)}


def record(round: int, clients: int = 3) -> dict:
    """Two KiB up and one down a client and round; validation accuracy peaks in round 2."""
    metrics = {
        "student/test/accuracy": 0.5 + 0.1 * round,
        "student/validation/accuracy": {1: 0.6, 2: 0.9, 3: 0.8}.get(round, 0.9),
        "specialists/test/accuracy": 0.4,
    }
    if round >= 3:
        metrics["distil/loss"] = 1.0 / round
    return {
        "round": round,
        "cohort": list(range(clients)),
        "dropped": [0] if round == 2 else [],
        "refused": {"1": "not finite"} if round == 3 else {},
        "metrics": metrics,
        "clients": {str(i): {"fit/loss": i + round / 10, "test/accuracy": i / clients} for i in range(clients)},
        "communication": {
            "upload_bytes": 2048 * clients * round,
            "download_bytes": 1024 * clients * round,
            "setup_bytes": 7,
        },
        "seconds": {"clients": 1.0 * round, "server": 0.5 * round},
    }
