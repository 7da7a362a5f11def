"""Accuracy on classes seen in training (base) and on classes known by name only (new)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.evaluators.continual import accuracy_among
from fdl.participants import copy_of
from fdl.state.weights import load_into
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from fdl.participants import Server


class BaseNew(Evaluator):
    """Base-to-new generalisation: accuracy among the base classes, and among the new classes.

    Metrics: ``base``, ``new``, their ``harmonic_mean``, and ``base_gain`` and ``new_gain``, the differences from the
    model before the first round. A negative ``new_gain`` is the zero-shot ability lost in training.

    Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models" (2022).

    Args:
        new: names of the classes excluded from training at every site; all others are base classes.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"base_new"``.

    Raises:
        UserError: fewer than two names are given; from `prepare`, the data do not have a named class, or have fewer
            than two base classes.
    """

    name = "base_new"
    tasks = ("classification",)

    def __init__(self, new: list[str], every: int = 0, label: str | None = None):
        super().__init__(every, label)
        if len(set(new)) < 2:
            raise UserError(f"new must name at least two classes, got {new}")
        self.new = list(dict.fromkeys(str(name) for name in new))
        self._before: dict[str, float] | None = None
        self._start: dict[str, Tensor] = {}

    def prepare(self, server: Server) -> None:
        """Look up the classes, and keep the student's initial weights."""
        for name in self.new:
            if name not in server.classes:
                raise UserError(f"{self.name}: the data have no class {name!r}{suggest(name, server.classes)}")
        if len(server.classes) < len(self.new) + 2:
            raise UserError(f"{self.name}: of {len(server.classes)} classes, {len(self.new)} new ones leave no base")
        self._start = copy_of(server.student)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Classify the test samples of base classes among these, and those of new classes among these."""
        if self._before is None:
            now = copy_of(module)
            load_into(module, self._start)
            self._before = self._accuracies(server, module)
            load_into(module, now)
        found = self._accuracies(server, module)
        total = found["base"] + found["new"]
        gains = {f"{kind}_gain": found[kind] - self._before[kind] for kind in found}
        return {**found, "harmonic_mean": 2 * found["base"] * found["new"] / total if total else 0.0, **gains}

    def _accuracies(self, server: Server, module: LightningModule) -> dict[str, float]:
        logits, labels = server.predict(module, server.test), server.test.labels
        new = torch.tensor([server.classes.index(name) for name in self.new])
        base = torch.tensor([c for c in range(len(server.classes)) if c not in set(new.tolist())])
        found = {}
        for kind, classes in (("base", base), ("new", new)):
            own = torch.isin(labels, classes)
            found[kind] = accuracy_among(logits[own], labels[own], classes)
        return found
