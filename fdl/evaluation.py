"""How good the student and the specialists are, on public labels only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdl.metrics import classification

if TYPE_CHECKING:
    from fdl.participants import Client, Server
    from fdl.recipe import Evaluation


def evaluate(server: Server, clients: Sequence[Client], config: Evaluation, record: dict[str, Any]) -> None:
    """Evaluate the student on validation and test, and every trained specialist on test.

    Args:
        server: holds the student and the labelled public data.
        clients: whose specialists, where they have one, are evaluated.
        config: which metrics, and whether specialists are evaluated.
        record: the round's record. Its ``metrics`` get ``student/test/accuracy``, … and the mean over specialists as
            ``specialists/test/accuracy``, …; its ``clients`` get each specialist's own ``test/accuracy``, ….
    """
    metrics: dict[str, float] = record["metrics"]
    if server.student is not None:
        for split, samples in (("validation", server.validation), ("test", server.test)):
            if len(samples):
                logits = server.predict(server.student, samples)
                for name, value in classification(logits, samples.labels, config.metrics).items():
                    metrics[f"student/{split}/{name}"] = value
    if not config.specialists:
        return
    values: dict[str, list[float]] = {}
    for client in clients:
        if "specialist" in client.state:
            logits = client.predict(client.specialist(), server.test)
            own = record["clients"].setdefault(str(client.id), {})
            for name, value in classification(logits, server.test.labels, config.metrics).items():
                own[f"test/{name}"] = value
                values.setdefault(name, []).append(value)
    metrics.update({f"specialists/test/{name}": sum(v) / len(v) for name, v in values.items()})
