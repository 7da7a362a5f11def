"""Attacks on a finished run, and whether they find more than its account of privacy allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl.attacks import roc
from fdl.attacks.base import Curve, Findings, Subject
from fdl.callbacks import figures
from fdl.callbacks.events import add_figure, open_writer
from fdl.errors import UserError
from fdl.report import write_summary
from fdl.seeding import numpy_stream
from fdl.threads import pinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter

    from fdl.attacks.base import Attack
    from fdl.loop import FederatedLoop
    from fdl.recipe import Recipe

AUDIT = "audit.json"
"""The report in the run's folder."""

DEFAULT = ("loss_threshold", "lira", "rmia", "label_leakage")
"""What a run is audited with where its recipe names no attacks."""

ON_CONFIDENCES = ("confidence_inference",)
"""What is added to these where a confidence is measured on private samples, as `density` is."""

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
    findings: dict[str, Findings]
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


def audit(loop: FederatedLoop, attacks: Sequence[Attack]) -> Audit:
    """Attack a finished run; reads private data, and what it says of them is for whoever may do so.

    With several ranks all of them do so alike; only shadow federations are spread over them.

    Args:
        loop: after its last round; left as it is.
        attacks: with different labels.

    Raises:
        UserError: an attack cannot be tried on this run.
    """
    loop.spread.everywhere()
    subject = Subject(loop)
    with ExitStack() as gates:
        gates.enter_context(pinned(loop.recipe.fabric.threads))
        for client in loop.clients:  # who audits a run may see what its participants may not
            gates.enter_context(client.gate.open())
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


def judge(curve: Curve, level: float, seed: int) -> tuple[dict[str, float], str]:
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


def audit_run(run: Path, attacks: Sequence[str] = (), overrides: Sequence[str] = ()) -> tuple[Audit, Path]:
    """Rebuild a finished run from its folder, attack it, and write ``audit.json`` and figures there.

    Those of an earlier audit stay, as ``audit-1.json`` and so on.

    Args:
        run: the run's folder.
        attacks: short names or dotted paths; by default those of the recipe, or else `DEFAULT`.
        overrides: ``key=value`` changes of `evaluation.attacks` and of what a resumed run may change.

    Returns:
        What was found, and the file that says so.

    Raises:
        UserError: the folder holds no finished run, or an attack cannot be tried on it.
    """
    from fdl import run_folder, runs, snapshot
    from fdl.build import build
    from fdl.locks import FolderLock, require_unlocked

    runs.require_finished(run)
    require_unlocked(run)
    loop = build(_recipe(run / runs.RECIPE, attacks, overrides), run)
    snapshot.restore(loop, write=False)
    loop.begin(loop.round)
    result = audit(loop, loop.attacks)
    with FolderLock(run):
        run_folder.renamed_aside(run / AUDIT)
        run_folder.renamed_aside(run / "tensorboard" / "audit")
        write_summary(run / AUDIT, result.summary())
        writer = open_writer(run / "tensorboard" / "audit")
        log(writer, result)
        writer.close()
    return result, run / AUDIT


def _recipe(path: Path, attacks: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The run's recipe with the attacks that are asked for, in one process and watched by nobody."""
    from fdl.recipe import Component, load
    from fdl.run_keys import changes, places, within

    recipe = load(path, [*overrides, *([f"evaluation.attacks=[{','.join(attacks)}]"] if attacks else [])])
    before, now = load(path).to_dict(), recipe.to_dict()
    allowed = ["evaluation.attacks", "evaluation.batch_size", "fabric.threads"]
    changed = [key for key in changes(before, now) if not within(key, allowed)]
    if other := [key for key in changed if key not in places(before, now, changed)]:
        raise UserError(
            f"{other[0]}: an audit looks at the run as it was; only evaluation.attacks can be given, and where "
            "the data lie now"
        )
    chosen = recipe.evaluation.attacks or [Component(name) for name in (*DEFAULT, *_on_confidences(recipe))]
    return replace(
        recipe,
        evaluation=replace(recipe.evaluation, attacks=chosen),
        fabric=replace(recipe.fabric, devices=1, num_nodes=1, strategy="auto"),
        callbacks=[],
    )


def _on_confidences(recipe: Recipe) -> tuple[str, ...]:
    """The attacks on what clients say of their answers, where that is measured on their samples."""
    from fdl.recipe import instantiate

    confidence = getattr(instantiate(recipe.method, "method", "method"), "confidence", None)
    return ON_CONFIDENCES if getattr(confidence, "reads_samples", False) else ()


def log(writer: SummaryWriter, result: Audit) -> None:
    """Write an audit's figures and numbers for TensorBoard."""
    for name, value in result.metrics().items():
        writer.add_scalar(f"audit/{name}", value, result.round)
    for name, draw in result.figures().items():
        add_figure(writer, f"audit/{name}", draw, result.round)


def print_table(result: Audit, console: Console) -> None:
    """Print what an audit found."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def number(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None or not math.isfinite(value) else format(value, form)

    title = Text(f"Membership inference after round {result.round}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    heads = ("attack", "target", "AUC", "balanced acc.", "TPR at 0.1 % FPR", "1 % FPR", "smallest FPR", "ε shown", "ε")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 2 else "right")
    for label, found in result.findings.items():
        for curve in found.curves:
            own = {n.partition("/")[2]: v for n, v in found.metrics.items() if n.startswith(f"{curve.target}/")}
            table.add_row(
                label,
                curve.target,
                number(own["auc"]),
                number(own["balanced_accuracy"]),
                number(own.get("tpr_at_0.1pct_fpr")),
                number(own.get("tpr_at_1pct_fpr")),
                f"{number(own['tpr_at_resolved_fpr'])} at {own['resolved_fpr']:.2%}",
                f"≥ {own['epsilon_lower']:.2f}",
                number(own.get("epsilon"), ".2f"),
            )
    if table.row_count:
        console.print(table)
    for label, found in result.findings.items():
        if not found.curves:
            console.print(Text(label, style="bold"))
            console.print("\n".join(f"  {name}: {number(value, '.4f')}" for name, value in found.metrics.items()))
    for note in dict.fromkeys(note for found in result.findings.values() for note in found.notes):
        console.print(Text(f"  note: {note}"), soft_wrap=True)
    for violation in result.violations:
        console.print(Text(f"  FAILED: {violation}", style="bold red"), soft_wrap=True)
