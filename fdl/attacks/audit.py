"""Audit of a finished run: its attacks, compared with the bounds that its privacy accounting claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fdl.attacks import roc
from fdl.attacks.base import AttackResult, AttackTarget, MembershipScores
from fdl.utils import figures
from fdl.utils.seeding import numpy_stream
from fdl.utils.tensorboard import add_figure
from fdl.utils.threads import pinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from fdl.attacks.base import Attack
    from fdl.federation.state import Federation


CONFIDENCE = 0.99
"""Probability with which an audit passes if no attack truly exceeds its ceiling, for any number of attacks."""


@dataclass
class Audit:
    """Results of all attacks on a run.

    Attributes:
        round: the round after which the run was attacked.
        findings: results by the attacks' labels.
        violations: one sentence per attack that found more than the run's privacy accounting allows.
    """

    round: int
    findings: dict[str, AttackResult]
    violations: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if no attack exceeded its ceiling."""
        return not self.violations

    def metrics(self) -> dict[str, float]:
        """Return all metrics, named ``<attack>/<target>/<metric>``."""
        return {f"{label}/{name}": v for label, found in self.findings.items() for name, v in found.metrics.items()}

    def summary(self) -> dict[str, Any]:
        """Return the contents of ``audit.json``, which are also stored in ``summary.json``.

        Keys are ``passed``, ``confidence``, ``round``, ``violations`` and ``attacks``; the last holds each attack's
        ``metrics`` and ``notes`` by its label.
        """
        attacks = {label: {"metrics": f.metrics, "notes": f.notes} for label, f in self.findings.items()}
        return {
            "passed": self.passed,
            "confidence": CONFIDENCE,
            "round": self.round,
            "violations": self.violations,
            "attacks": attacks,
        }

    def log(self, writer: SummaryWriter) -> None:
        """Write figures and metrics for TensorBoard.

        Args:
            writer: the writer of the event file.
        """
        for name, value in self.metrics().items():
            writer.add_scalar(f"audit/{name}", value, self.round)
        for name, draw in self.figures().items():
            add_figure(writer, f"audit/{name}", draw, self.round)

    def figures(self) -> dict[str, Callable[[], Figure]]:
        """Return the functions that draw the figures by name: one ROC plot per target, and figures of attacks."""
        targets = dict.fromkeys(curve.target for found in self.findings.values() for curve in found.curves)
        drawn = {f"roc/{target}": partial(self._roc, target) for target in targets}
        for label, found in self.findings.items():
            drawn.update({f"{label}/{name}": draw for name, draw in found.figures.items()})
        return drawn

    def _roc(self, target: str) -> Figure:
        curves = {label: c for label, f in self.findings.items() for c in f.curves if c.target == target}
        ceilings = sorted({(c.epsilon, c.delta) for c in curves.values() if math.isfinite(c.epsilon)})
        rocs = {label: roc.Roc.of(c.members, c.non_members) for label, c in curves.items()}
        return figures.roc(
            {f"{label} (AUC {r.auc:.3f})": (r.fpr, r.tpr) for label, r in rocs.items()},
            {f"ceiling, ε = {e:.3g}, δ = {d:.0e}": lambda fpr, e=e, d=d: roc.ceiling(fpr, e, d) for e, d in ceilings},
            max(r.resolved for r in rocs.values()),
            f"Membership inference on the {target} after round {self.round}",
        )


def audit(loop: Federation, attacks: Sequence[Attack]) -> Audit:
    """Attack a finished run.

    An audit reads private data, so its results are only for people who may read these data. With several ranks, all of
    them run the same attacks; only shadow federations are spread over them.

    Args:
        loop: the run after its last round; it is not changed.
        attacks: the attacks, with different labels.

    Raises:
        UserError: an attack is not applicable to this run.
    """
    loop.placement.replicate_states()
    subject = AttackTarget(loop)
    with ExitStack() as gates:
        gates.enter_context(pinned(loop.recipe.fabric.threads))
        for client in loop.clients:  # an auditor may read what participants may not
            gates.enter_context(client.data_gate.open())
        result = Audit(loop.round, {attack.label: attack.run(subject) for attack in attacks})
    curves = [(label, curve) for label, found in result.findings.items() for curve in found.curves]
    for label, curve in curves:
        found = result.findings[label]
        metrics, sentence = evaluate_scores(curve, 1 - (1 - CONFIDENCE) / len(curves), loop.recipe.seed)
        found.metrics.update({f"{curve.target}/{name}": value for name, value in metrics.items()})
        if sentence:
            result.violations.append(f"{label} on the {curve.target}: {sentence}")
        if metrics["resolved_fpr"] > min(roc.RATES.values()):
            many, least = len(curve.non_members), metrics["resolved_fpr"]
            found.notes.append(f"{many:,} non-members tell false-positive rates from {least:.2%} on, and none below")
        found.notes = list(dict.fromkeys(found.notes))
    return result


def evaluate_scores(curve: MembershipScores, level: float, seed: int) -> tuple[dict[str, float], str]:
    """Compute the metrics of an attack's scores, and compare them with the ε that the run claims.

    Args:
        curve: an attack's scores.
        level: confidence level of a violation, in (0, 1).
        seed: seed of the random split of samples into halves.

    Returns:
        The metrics of `fdl.attacks.roc.measure` with ``epsilon_lower``, the lower bound of ε that the attack
        establishes, and, if a finite ε is claimed, ``epsilon`` and ``advantage_ceiling``; and a sentence that describes
        the violation, empty if there is none.
    """
    stream = numpy_stream(seed, f"audit/{curve.target}")
    metrics = roc.measure(curve.members, curve.non_members, stream)
    shown = roc.epsilon_lower(curve.members, curve.non_members, curve.delta, level, stream)
    metrics["epsilon_lower"] = shown
    if math.isfinite(curve.epsilon):
        metrics["epsilon"] = curve.epsilon
        metrics["advantage_ceiling"] = roc.advantage_ceiling(curve.epsilon, curve.delta)
    if shown <= curve.epsilon:
        return metrics, ""
    claimed = f"ε = {curve.epsilon:.3g} at δ = {curve.delta:.0e}"
    return metrics, f"shows ε ≥ {shown:.3g} with {level:.2%} confidence, and the run claims {claimed}"
