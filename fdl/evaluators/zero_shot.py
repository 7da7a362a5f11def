"""Zero-shot image classification by class names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fdl.datamodules.base import FederatedDataModule
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.evaluators.labelled import labelled_samples
from fdl.metrics.classification import classification
from fdl.modules.zero_shot import templates_of, zero_shot_classifier, zero_shot_selector
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.participants import Server


class ZeroShot(Evaluator):
    """Zero-shot classification: the class whose prompts have the nearest text vector (Radford et al., 2021).

    Metrics: ``accuracy``, ``macro_f1``, and ``top5`` for more than five classes.

    Args:
        data: labelled images, of which the test set is used; None: the recipe's own test set, which must have labels.
        classes: the classes to choose from, e.g. those unseen in training; images of other classes are left out. None:
            all classes.
        templates: a key of `fdl.modules.zero_shot.PROMPT_TEMPLATES`, or sentences in which ``{}`` stands for the class
            name.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"zero_shot"``.
    """

    name = "zero_shot"
    tasks = ("image_text",)

    def __init__(
        self,
        data: FederatedDataModule | None = None,
        classes: list[str] | None = None,
        templates: str | list[str] = "photo",
        every: int = 0,
        label: str | None = None,
    ):
        super().__init__(every, label)
        if classes is not None and len(set(classes)) < 2:
            raise UserError(f"classes must name at least two, got {classes}")
        self.data, self.classes, self.templates = data, classes, templates_of(templates)

    def prepare(self, server: Server) -> None:
        """Read the further data, and look up the chosen classes."""
        self._images(server)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Classify the test images."""
        samples, labels, classes = self._images(server)
        weights = zero_shot_classifier(module, server.model_kwargs["tokenizer"], classes, self.templates)
        logits = server.predict(module, samples, zero_shot_selector(weights))
        names = ["accuracy", "macro_f1", *(["top5"] if len(classes) > 5 else [])]
        return classification(logits, labels, names)

    def _images(self, server: Server) -> tuple[Samples, torch.Tensor, list[str]]:
        """Select the images to classify, their labels among the chosen classes, and the names of these classes."""
        _, test, known = labelled_samples(server, self.data, self.name)
        if "tokenizer" not in server.model_kwargs:
            raise UserError(f"{self.name} needs a tokenizer for the classes' names, and the data have none")
        chosen = list(dict.fromkeys(known if self.classes is None else self.classes))
        for name in chosen:
            if name not in known:
                raise UserError(f"{self.name}: the data have no class {name!r}{suggest(name, known)}")
        labels = torch.tensor([chosen.index(name) if name in chosen else -1 for name in known])[test.labels]
        rows = torch.nonzero(labels >= 0).flatten()
        if not len(rows):
            raise UserError(f"{self.name}: the test set has no image of the classes asked for")
        return test.subset(rows), labels[rows], chosen
