"""A run as TensorBoard shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fdl.auditing import log
from fdl.callbacks import figures
from fdl.callbacks.base import Callback
from fdl.callbacks.events import MANY_CLIENTS, Curves, hyperparameters, log_hparams, log_outcome, open_writer
from fdl.modules.shards import is_sharded

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from fdl.loop import FederatedLoop


class TensorBoard(Callback):
    """Writes curves by round and by bytes, figures, hyperparameters and the recipe for TensorBoard.

    Events go to ``tensorboard/`` in the run's folder. At the start: the recipe as text and who holds how many samples
    of which class; every round: what `fdl.callbacks.events.Curves` lists; at the end: the student's confusion matrix
    on the test set, what attacks found, what `fdl.callbacks.events.log_outcome` lists, and hyperparameters with the
    last round's metrics. A resumed run shows every round once.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Write the recipe and the clients' labels; after a resume, the rounds that are done once more."""
        self._writer = open_writer(loop.folder / "tensorboard")
        self._writer.add_text("recipe", f"```yaml\n{loop.recipe.to_yaml()}```")
        self._label_histogram(loop)
        self._curves = Curves(self._writer, many=len(loop.clients) > MANY_CLIENTS)
        for record in loop.history:
            self._curves.log(record)

    def on_round_end(self, loop: FederatedLoop, record: dict[str, Any]) -> None:
        """Write the round's curves."""
        self._curves.log(record)

    def on_fit_end(self, loop: FederatedLoop, summary: dict[str, Any]) -> None:
        """Write the confusion matrix, what attacks found, the best round, all bytes, and the hyperparameters."""
        self._confusion(loop)
        if loop.audit is not None:
            log(self._writer, loop.audit)
        sent = [f"communication/{key}" for key in ("upload_bytes", "download_bytes")]
        outcome = log_outcome(self._writer, summary)
        log_hparams(self._writer, hyperparameters(loop.recipe.to_dict()), [*summary["metrics"], *sent, *outcome])
        self._close()

    def on_exception(self, loop: FederatedLoop, error: BaseException) -> None:
        """Write out what is buffered."""
        self._close()

    def _label_histogram(self, loop: FederatedLoop) -> None:
        classes = loop.server.classes
        private = loop.recipe.privacy is not None  # then how many samples of a class somebody has is not shown
        if private or any(client.train.labels is None for client in loop.clients):
            figure = figures.sizes([len(client.train) for client in loop.clients])
            self._writer.add_figure("clients/samples", figure, 0, close=False)
            return
        counts = [client.train.labels.bincount(minlength=len(classes)).numpy() for client in loop.clients]
        figure = figures.label_histogram(np.stack(counts), classes)
        self._writer.add_figure("clients/labels", figure, 0, close=False)

    def _confusion(self, loop: FederatedLoop) -> None:
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        server = loop.server
        if server.task != "classification" or server.student is None or len(server.test) == 0:
            return
        if is_sharded(server.student):
            return  # it takes all ranks to answer, and only one has callbacks
        predicted = server.predict(server.student, server.test).argmax(1)
        matrix = multiclass_confusion_matrix(predicted, server.test.labels, server.num_classes)
        title = f"Student on the test set after round {loop.round}"
        figure = figures.confusion(matrix.numpy(), server.classes, title)
        self._writer.add_figure("student/test/confusion", figure, loop.round, close=False)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
