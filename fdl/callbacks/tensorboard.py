"""TensorBoard log of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fdl.callbacks.base import Callback
from fdl.metrics.classification import confusion_matrix
from fdl.state.shards import is_sharded
from fdl.utils import figures
from fdl.utils.tensorboard import (
    MANY_CLIENTS,
    Curves,
    add_figure,
    hyperparameters,
    log_hparams,
    log_outcome,
    open_writer,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from fdl.federation.state import Federation


class TensorBoard(Callback):
    """Writes curves by round and by bytes, figures, hyperparameters and the recipe for TensorBoard.

    Events are written to ``tensorboard/`` in the run's folder. At the start: the recipe as text, and the number of
    samples per client and class; every round: the curves of `fdl.utils.tensorboard.Curves`; at the end: the student's
    confusion matrix on the test set, results of attacks, the values of `fdl.utils.tensorboard.log_outcome`, and
    hyperparameters with the last round's metrics. A resumed run shows every round once. A figure that cannot be drawn
    is skipped with a warning.
    """

    name = "tensorboard"
    optional = True

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, loop: Federation) -> None:
        """Write the recipe and the clients' labels; in a resumed run, also the completed rounds."""
        self._writer = open_writer(loop.folder / "tensorboard")
        self._writer.add_text("recipe", f"```yaml\n{loop.recipe.to_yaml()}```")
        self._label_histogram(loop)
        self._curves = Curves(self._writer, many=len(loop.clients) > MANY_CLIENTS)
        for record in loop.history:
            self._curves.log(record)

    def on_round_end(self, loop: Federation, record: dict[str, Any]) -> None:
        """Write the round's curves."""
        self._curves.log(record)

    def on_fit_end(self, loop: Federation, summary: dict[str, Any]) -> None:
        """Write the confusion matrix, results of attacks, the best round, all bytes, and the hyperparameters."""
        self._confusion(loop)
        if loop.audit is not None:
            loop.audit.log(self._writer)
        sent = [f"communication/{key}" for key in ("upload_bytes", "download_bytes")]
        outcome = log_outcome(self._writer, summary)
        log_hparams(self._writer, hyperparameters(loop.recipe.to_dict()), [*summary["metrics"], *sent, *outcome])
        self._close()

    def on_exception(self, loop: Federation, error: BaseException) -> None:
        """Flush buffered events and close the file."""
        self._close()

    def _label_histogram(self, loop: Federation) -> None:
        classes, names = loop.server.classes, [client.name for client in loop.clients]
        private = loop.recipe.privacy is not None  # then numbers of samples per class are not disclosed
        if private or any(client.train.labels is None for client in loop.clients):
            samples = [len(client.train) for client in loop.clients]
            add_figure(self._writer, "clients/samples", lambda: figures.sizes(samples, names), 0)
            return
        counts = [client.train.labels.bincount(minlength=len(classes)).numpy() for client in loop.clients]
        add_figure(self._writer, "clients/labels", lambda: figures.label_histogram(np.stack(counts), classes, names), 0)

    def _confusion(self, loop: Federation) -> None:
        server = loop.server
        if server.task != "classification" or server.student is None or len(server.test) == 0:
            return
        if is_sharded(server.student):
            return  # prediction takes all ranks, and only one has callbacks
        title = f"Student on the test set after round {loop.round}"

        def draw() -> Figure:
            predicted = server.predict(server.student, server.test).argmax(1)
            matrix = confusion_matrix(predicted, server.test.labels, server.num_classes)
            return figures.confusion(matrix.numpy(), server.classes, title)

        add_figure(self._writer, "student/test/confusion", draw, loop.round)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
