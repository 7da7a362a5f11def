"""Evaluation of the student and the specialists, on public data only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdl.metrics.tasks import TASKS

if TYPE_CHECKING:
    from fdl.evaluators.base import Evaluator
    from fdl.federation.state import Federation
    from fdl.participants import Server


def run_probes(server: Server, probes: Sequence[Evaluator], metrics: dict[str, float]) -> None:
    """Run evaluators on the student.

    Args:
        server: the server, with its student.
        probes: the evaluators.
        metrics: gets their results as ``student/<probe>/<metric>``.
    """
    for probe in probes:
        results = probe.evaluate(server, server.student)
        metrics.update({f"student/{probe.label}/{name}": value for name, value in results.items()})


def evaluate(loop: Federation, record: dict[str, Any], last: bool = False) -> None:
    """Evaluate the student on validation and test samples, and every trained specialist on test samples.

    With several ranks the leader evaluates the server's models, and each rank the specialists that it holds.

    Args:
        loop: the run, after a round's server update.
        record: the round's record. Its ``metrics`` get ``student/test/accuracy``, … and the mean over specialists as
            ``specialists/test/accuracy``, …; its ``clients`` get each specialist's ``test/accuracy``, …. Other models
            of the server are measured as ``pools/<name>/test/accuracy``, …, and evaluators' results are added as
            ``student/<probe>/<metric>``.
        last: True in the run's last round, in which all evaluators run.
    """
    names = TASKS[loop.server.task].select(loop.recipe.evaluation.metrics)
    found = _server_models(loop, record["round"], names, last) if loop.runtime.ranks.evaluates_server else {}
    own = _specialists(loop, names) if loop.recipe.evaluation.specialists else {}
    if not loop.placement.holds_all_clients:
        for data in loop.runtime.ranks.gather(json.dumps([found, own]).encode()):
            of_server, of_specialists = json.loads(data)
            found.update(of_server)
            own.update(of_specialists)
    record["metrics"].update(found)
    values: dict[str, list[float]] = {}
    for client in sorted(own, key=int):
        record["clients"].setdefault(client, {}).update({f"test/{name}": value for name, value in own[client].items()})
        for name, value in own[client].items():
            values.setdefault(name, []).append(value)
    record["metrics"].update({f"specialists/test/{name}": sum(v) / len(v) for name, v in values.items()})


def _server_models(loop: Federation, round: int, names: Sequence[str], last: bool) -> dict[str, float]:
    """Measure the server's models on validation and test samples, and run evaluators on the student."""
    server, metrics = loop.server, {}
    task = TASKS[server.task]
    splits = [(split, s) for split, s in (("validation", server.validation), ("test", server.test)) if len(s)]

    def measure(owner: str, module: Any) -> None:
        for split, samples in splits:
            values = task.measure(server, module, samples, names)
            metrics.update({f"{owner}/{split}/{name}": value for name, value in values.items()})

    if server.student is not None:
        measure("student", server.student)
        run_probes(server, [p for p in loop.probes if last or (p.every and round % p.every == 0)], metrics)
    for name, module in loop.method.server_models(server):
        measure(f"pools/{name}", module)
    return metrics


def _specialists(loop: Federation, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure this rank's trained specialists on test samples; metrics by client."""
    task, test, found = TASKS[loop.server.task], loop.server.test, {}
    for client in loop.placement.local_clients():
        if "specialist" in client.state:
            with client.turn():
                module = loop.method.client_model(loop.server, client)
                found[str(client.id)] = task.measure(client, module, test, names)
        client.offload_state(changed=False)
    return found
