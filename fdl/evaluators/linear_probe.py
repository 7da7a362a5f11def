"""Few-shot linear probe on frozen features."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from fdl.datamodules.base import FederatedDataModule
from fdl.errors import UserError
from fdl.evaluators.base import Evaluator
from fdl.evaluators.labelled import image_features, labelled_samples
from fdl.utils.arguments import at_least
from fdl.utils.seeding import numpy_stream

if TYPE_CHECKING:
    from lightning import LightningModule
    from sklearn.linear_model import LogisticRegression

    from fdl.participants import Server


class LinearProbe(Evaluator):
    """Few-shot logistic regression on the model's frozen features (Radford et al., 2021).

    For each seed, k samples per class are drawn for training (the first k of one order, so that larger k include
    smaller ones), and up to as many other samples as the largest k select C. Features are divided by the root mean
    square norm of the training samples, so that one grid of C suits every model. L-BFGS, at most 1,000 iterations, no
    augmentation. Metrics: ``accuracy_<k>_shot``, test accuracy averaged over seeds, and ``…_std``, its standard
    deviation.

    Args:
        shots: numbers of training samples per class; None: 1, 2, 4, 8 and 16.
        seeds: number of draws, at least 3.
        c: inverse strengths of the L2 penalty to choose from, > 0; of equally good ones, the smallest is used. None: a
            grid from 0.01 to 1,000.
        data: public labelled images; None: the shots are drawn from the validation set, and the recipe's own test set
            is used.
        every: number of rounds between two evaluations; 0: only after the last round.
        label: name under which the metrics are recorded; None: ``"linear_probe"``.
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
        """Read the further data, and check that every class has enough samples."""
        self._draws(server)

    def evaluate(self, server: Server, module: LightningModule) -> dict[str, float]:
        """Fit and test one classifier per seed and number of shots."""
        pool, test, _ = labelled_samples(server, self.data, self.name)
        draws = self._draws(server)
        # each sample is embedded once, even if several seeds drew it
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
        """Draw, per seed, rows for training, [classes, largest k] in order of use, and rows for selecting C, [m]."""
        pool, test, classes = labelled_samples(server, self.data, self.name)
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
        """Fit one classifier per C, and return the one that is best on the samples for selection."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        best, score = None, -1.0
        with warnings.catch_warnings():
            # with a weak penalty, separable samples have a distant optimum; only accuracy on the other samples matters
            warnings.simplefilter("ignore", ConvergenceWarning)
            for c in self.c:
                probe = LogisticRegression(C=c, solver="lbfgs", max_iter=1000).fit(x, y)
                if (reached := probe.score(others, theirs)) > score:
                    best, score = probe, reached
        return best
