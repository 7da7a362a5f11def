"""A linear classifier on frozen features, from few labelled samples."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from fdl.datamodules.base import FederatedDataModule
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator, at_least
from fdl.evaluators.labelled import image_features, labelled
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from lightning import LightningModule
    from sklearn.linear_model import LogisticRegression

    from fdl.participants import Server


class LinearProbe(Evaluator):
    """Few-shot logistic regression on the model's frozen features (as in Radford et al., 2021).

    For each seed, k samples a class are drawn to train on (the first k of one order, so that more shots contain
    fewer), and up to as many as the largest k of the others choose C. Features are divided by the training samples'
    root mean square length, so that one grid of C serves every model. L-BFGS, at most 1,000 iterations, no
    augmentation. Metrics: ``accuracy_<k>_shot`` on the test set, the mean over seeds, and ``…_std``, their standard
    deviation.

    Args:
        shots: training samples a class.
        seeds: how many draws, at least 3.
        c: inverse strengths of the L2 penalty to choose from, > 0; the smallest of equally good ones is taken.
        data: public labelled images to probe with; None draws the shots from the validation set and tests on the
            recipe's own test set.
        every: as in `Evaluator`.
        label: as in `Evaluator`.
    """

    name = "linear_probe"
    tasks = ("classification", "image_text")

    def __init__(
        self,
        shots: list[int] | None = None,
        seeds: int = 3,
        c: list[float] | None = None,
        data: FederatedDataModule | None = None,
        every: int = 0,
        label: str | None = None,
    ):
        super().__init__(every, label)
        self.shots = sorted(at_least("shots", k, 1) for k in ([1, 2, 4, 8, 16] if shots is None else shots))
        self.c = sorted([0.01, 0.1, 1.0, 10.0, 100.0, 1000.0] if c is None else c)
        if not self.shots:
            raise UserError("shots must name at least one number")
        if not self.c or not self.c[0] > 0:
            raise UserError(f"c must name numbers > 0, got {self.c}")
        self.seeds, self.data = at_least("seeds", seeds, 3), data

    def prepare(self, server: Server) -> None:
        """Read further data, and count the samples of each class."""
        self._draws(server)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Fit a classifier for every seed and number of shots."""
        pool, test, _ = labelled(server, self.data, self.name)
        draws = self._draws(server)
        # each sample is embedded once, however many seeds drew it
        used = np.unique(np.concatenate([rows.ravel() for draw in draws for rows in draw]))
        features = server.predict(module, pool.subset(used), image_features).numpy()
        asked = server.predict(module, test, image_features).numpy()
        if not (np.isfinite(features).all() and np.isfinite(asked).all()):
            return {f"accuracy_{k}_shot{ending}": float("nan") for k in self.shots for ending in ("", "_std")}
        labels, truth = pool.labels.numpy()[used], test.labels.numpy()
        metrics = {}
        for k in self.shots:
            scores = []
            for shots, others in draws:
                train, tune = (np.searchsorted(used, rows) for rows in (shots[:, :k].ravel(), others))
                scale = np.sqrt(np.mean(np.sum(np.square(features[train], dtype=np.float64), axis=1))) or 1.0
                probe = self._fit(features[train] / scale, labels[train], features[tune] / scale, labels[tune])
                scores.append(probe.score(asked / scale, truth))
            metrics[f"accuracy_{k}_shot"] = float(np.mean(scores))
            metrics[f"accuracy_{k}_shot_std"] = float(np.std(scores, ddof=1))
        return metrics

    def _draws(self, server: Server) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each seed: rows to train on, [classes, largest k] in order of use, and rows to choose C by, [m]."""
        pool, test, classes = labelled(server, self.data, self.name)
        if not len(test):
            raise UserError(f"{self.name} needs a test set, and it is empty")
        labels, most = pool.labels.numpy(), self.shots[-1]
        counts = np.bincount(labels, minlength=len(classes))
        scarce = int(counts.argmin())
        if counts[scarce] <= most:
            source = "the validation set" if self.data is None else f"the training set of {self.data.name}"
            raise UserError(
                f"{self.name}: {most} shots and one more sample to choose C by need {most + 1} samples of every class, "
                f"but {source} has {counts[scarce]} of {classes[scarce]!r}; ask for fewer shots or hold out more"
            )
        draws = []
        for seed in range(self.seeds):
            stream = numpy_stream(server.seed, f"{self.name}/{seed}")
            orders = [stream.permutation(np.flatnonzero(labels == c)) for c in range(len(classes))]
            others = np.concatenate([order[most : 2 * most] for order in orders])
            draws.append((np.stack([order[:most] for order in orders]), others))
        return draws

    def _fit(self, x: np.ndarray, y: np.ndarray, others: np.ndarray, theirs: np.ndarray) -> LogisticRegression:
        """The classifier with the C that is best on the others."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        best, score = None, -1.0
        with warnings.catch_warnings():
            # a weak penalty on separable samples has its optimum far away; what matters is how it does on the others
            warnings.simplefilter("ignore", ConvergenceWarning)
            for c in self.c:
                probe = LogisticRegression(C=c, solver="lbfgs", max_iter=1000).fit(x, y)
                if (reached := probe.score(others, theirs)) > score:
                    best, score = probe, reached
        return best
