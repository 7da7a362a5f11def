"""How good the student and the specialists are, on public data only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fdl.tasks import TASKS

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import nn

    from fdl.evaluators.base import Evaluator
    from fdl.participants import Client, Server
    from fdl.recipe import Evaluation


def ask(server: Server, probes: Sequence[Evaluator], metrics: dict[str, float]) -> None:
    """Put further questions to the student; the answers are noted as ``student/<probe>/<metric>``."""
    for probe in probes:
        answers = probe.evaluate(server, server.student)
        metrics.update({f"student/{probe.label}/{name}": value for name, value in answers.items()})


def evaluate(
    server: Server,
    clients: Sequence[Client],
    config: Evaluation,
    record: dict[str, Any],
    probes: Sequence[Evaluator] = (),
    last: bool = False,
    models: Iterable[tuple[str, LightningModule]] = (),
    client_model: Callable[[Client], nn.Module] | None = None,
) -> None:
    """Evaluate the student on validation and test, and every trained specialist on test.

    Args:
        server: holds the student and the public data.
        clients: whose specialists, where they have one, are evaluated.
        config: which metrics, and whether specialists are evaluated.
        record: the round's record. Its ``metrics`` get ``student/test/accuracy``, … and the mean over specialists as
            ``specialists/test/accuracy``, …; its ``clients`` get each specialist's own ``test/accuracy``, ….
        probes: further questions to the student, whose answers become ``student/<probe>/<metric>``.
        last: whether this is the run's last round.
        models: the server's models beside the student, by name; measured as ``pools/<name>/test/accuracy``, ….
        client_model: with what a client answers; None is its specialist.
    """
    metrics: dict[str, float] = record["metrics"]
    task = TASKS[server.task]
    names = task.asked(config.metrics)
    if server.student is not None:
        for split, samples in (("validation", server.validation), ("test", server.test)):
            if len(samples):
                for name, value in task.measure(server, server.student, samples, names).items():
                    metrics[f"student/{split}/{name}"] = value
        ask(server, [p for p in probes if last or (p.every and record["round"] % p.every == 0)], metrics)
    for name, module in models:
        for split, samples in (("validation", server.validation), ("test", server.test)):
            if len(samples):
                values = task.measure(server, module, samples, names)
                metrics.update({f"pools/{name}/{split}/{metric}": value for metric, value in values.items()})
    if not config.specialists:
        return
    values: dict[str, list[float]] = {}
    for client in clients:
        if "specialist" in client.state:
            own = record["clients"].setdefault(str(client.id), {})
            module = client.specialist() if client_model is None else client_model(client)
            for name, value in task.measure(client, module, server.test, names).items():
                own[f"test/{name}"] = value
                values.setdefault(name, []).append(value)
    metrics.update({f"specialists/test/{name}": sum(v) / len(v) for name, v in values.items()})
