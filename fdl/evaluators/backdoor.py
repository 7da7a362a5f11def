"""Success rate of a backdoor attack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.adversaries.answers import check_class
from fdl.adversaries.data import Triggered, check_images
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.utils.arguments import at_least

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server


class BackdoorSuccess(Evaluator):
    """Fraction of test images classified as the target once they carry the trigger of the adversary ``backdoor``.

    Images of the target class are left out. Metrics: ``success``, and as a control ``untriggered``, the fraction of the
    same images without trigger that are classified as the target.

    Args:
        target: number of the target class.
        size: side length of the trigger in pixels.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"backdoor"``.

    Raises:
        UserError: from `prepare`, if the data are not labelled images, or have no such class.
    """

    name = "backdoor"
    tasks = ("classification",)

    def __init__(self, target: int = 0, size: int = 2, every: int = 0, label: str | None = None):
        super().__init__(every, label)
        self.target, self.size = target, at_least("size", size, 1)

    def prepare(self, server: Server) -> None:
        """Check that the test set consists of labelled images, and has the target class."""
        try:
            check_class("target", self.target, server.num_classes)
            check_images(server.test, self.size)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Classify the test images of the other classes with and without the trigger."""
        others = server.test.subset(torch.nonzero(server.test.labels != self.target).squeeze(1))
        stamped = Triggered(others, torch.ones(len(others), dtype=torch.bool), self.target, self.size)
        found = {}
        for name, samples in (("success", stamped), ("untriggered", others)):
            predicted = server.predict(module, samples).argmax(1)
            found[name] = float((predicted == self.target).float().mean())
        return found
