"""How far a backdoor got: test images with the trigger, and what the student takes them for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.adversaries.answers import in_range
from fdl.adversaries.data import Triggered, check_images
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator, at_least

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server


class BackdoorSuccess(Evaluator):
    """Share of test images that get the target's class once they have the trigger of adversary ``backdoor``.

    Images of the target class are left out. Metrics: ``success``, and ``untriggered``, the share of the same images
    that get that class as they are, which is about what a student without a backdoor comes to.

    Args:
        target: the class.
        size: side of the trigger in pixels.
        every: as in `Evaluator`.
        label: as in `Evaluator`.

    Raises:
        UserError: from `prepare`, where the data are no images with labels, or have no such class.
    """

    name = "backdoor"
    tasks = ("classification",)

    def __init__(self, target: int = 0, size: int = 2, every: int = 0, label: str | None = None):
        super().__init__(every, label)
        self.target, self.size = target, at_least("size", size, 1)

    def prepare(self, server: Server) -> None:
        """Refuse what cannot be asked."""
        try:
            in_range("target", self.target, server.num_classes)
            check_images(server.test, self.size)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Ask for the same images with and without the trigger."""
        others = server.test.subset(torch.nonzero(server.test.labels != self.target).squeeze(1))
        stamped = Triggered(others, torch.ones(len(others), dtype=torch.bool), self.target, self.size)
        found = {}
        for name, samples in (("success", stamped), ("untriggered", others)):
            predicted = server.predict(module, samples).argmax(1)
            found[name] = float((predicted == self.target).float().mean())
        return found
