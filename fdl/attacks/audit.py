"""Attacks on a finished run, and whether they find more than its account of privacy allows."""

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
"""Chance with which an audit in which no attack goes beyond the ceiling passes, whatever the number of attacks."""


@dataclass
class Audit:
    """What all attacks on a run found.

    Attributes:
        round: the round after which the run was attacked.
        findings: by the attacks' labels.
        violations: a sentence for every attack that found more than the run's account of privacy allows.
    """

    round: int
    findings: dict[str, AttackResult]
    violations: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no attack went beyond its ceiling."""
        return not self.violations

    def metrics(self) -> dict[str, float]:
        """All numbers, as ``<attack>/<target>/<metric>``."""
        return {f"{label}/{name}": v for label, found in self.findings.items() for name, v in found.metrics.items()}

    def summary(self) -> dict[str, Any]:
        """For ``audit.json`` and ``summary.json``: ``passed``, ``confidence``, ``round``, ``violations``, ``attacks``.

        ``attacks`` has each attack's ``metrics`` and ``notes`` by its label.
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
        """Write figures and numbers for TensorBoard.

        Args:
            writer: where to.
        """
        for name, value in self.metrics().items():
            writer.add_scalar(f"audit/{name}", value, self.round)
        for name, draw in self.figures().items():
            add_figure(writer, f"audit/{name}", draw, self.round)

    def figures(self) -> dict[str, Callable[[], Figure]]:
        """What draws a ROC curve for each target, with all attacks on it, and what else the attacks have to show."""
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
    """Attack a finished run; reads private data, and what it says of them is for whoever may do so.

    With several ranks all of them do so alike; only shadow federations are spread over them.

    Args:
        loop: after its last round; left as it is.
        attacks: with different labels.

    Raises:
        UserError: an attack cannot be tried on this run.
    """
    loop.placement.replicate_states()
    subject = AttackTarget(loop)
    with ExitStack() as gates:
        gates.enter_context(pinned(loop.recipe.fabric.threads))
        for client in loop.clients:  # who audits a run may see what its participants may not
            gates.enter_context(client.data_gate.open())
        result = Audit(loop.round, {attack.label: attack.run(subject) for attack in attacks})
    curves = [(label, curve) for label, found in result.findings.items() for curve in found.curves]
    for label, curve in curves:
        found = result.findings[label]
        metrics, sentence = judge(curve, 1 - (1 - CONFIDENCE) / len(curves), loop.recipe.seed)
        found.metrics.update({f"{curve.target}/{name}": value for name, value in metrics.items()})
        if sentence:
            result.violations.append(f"{label} on the {curve.target}: {sentence}")
        if metrics["resolved_fpr"] > min(roc.RATES.values()):
            many, least = len(curve.non_members), metrics["resolved_fpr"]
            found.notes.append(f"{many:,} non-members tell false-positive rates from {least:.2%} on, and none below")
        found.notes = list(dict.fromkeys(found.notes))
    return result


def judge(curve: MembershipScores, level: float, seed: int) -> tuple[dict[str, float], str]:
    """Metrics of a curve, and what is wrong where it shows more than its ε allows.

    Args:
        curve: an attack's scores.
        level: with what confidence a violation is one.
        seed: of the halves into which the samples are cut.

    Returns:
        What `fdl.attacks.roc.measure` returns, with ``epsilon_lower``, the ε that the attack shows, and, where a finite
        ε is claimed, ``epsilon`` and ``advantage_ceiling``; and a sentence, empty where all is well.
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
