"""Audit of the finished run in a folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fdl.errors import UserError
from fdl.runs.report import write_summary
from fdl.utils.tensorboard import open_writer

if TYPE_CHECKING:
    from rich.console import Console

    from fdl.attacks.audit import Audit
    from fdl.recipe.config import Recipe

AUDIT = "audit.json"
"""Name of the report in the run's folder."""


DEFAULT_ATTACKS = ("loss_threshold", "lira", "rmia", "label_leakage")
"""Attacks of an audit if the recipe names none."""


CONFIDENCE_ATTACKS = ("confidence_inference",)
"""Attacks added to the default ones if confidences are computed from private samples, e.g. by `density`."""


def audit_run(run: str | Path, attacks: Sequence[str] = (), overrides: Sequence[str] = ()) -> tuple[Audit, Path]:
    """Rebuild a finished run from its folder, attack it, and write ``audit.json`` and figures there.

    Reports of earlier audits are kept, as ``audit-1.json`` and so on.

    Args:
        run: the run's folder.
        attacks: short names or dotted paths; by default those of the recipe, or else `DEFAULT_ATTACKS`.
        overrides: ``key=value`` changes of `evaluation.attacks` and of keys that a resumed run may change.

    Returns:
        The results, and the file to which they were written.

    Raises:
        UserError: the folder holds no finished run, or an attack is not applicable to it.
    """
    from fdl.attacks.callback import AuditCallback
    from fdl.build.federation import build_federation
    from fdl.federation import snapshot
    from fdl.runs import run as runs
    from fdl.state import run_folder
    from fdl.utils.locks import FolderLock, require_unlocked
    from fdl.utils.paths import expanded

    run = expanded(run)
    runs.require_finished(run)
    require_unlocked(run)
    loop = build_federation(_recipe(run / runs.RECIPE, attacks, overrides), run)
    snapshot.restore(loop, write=False)
    loop.start_round(loop.round)
    (auditor,) = (callback for callback in loop.callbacks if isinstance(callback, AuditCallback))
    result = auditor.run(loop)
    with FolderLock(run):
        run_folder.renamed_aside(run / AUDIT)
        run_folder.renamed_aside(run / "tensorboard" / "audit")
        write_summary(run / AUDIT, result.summary())
        writer = open_writer(run / "tensorboard" / "audit")
        result.log(writer)
        writer.close()
    return result, run / AUDIT


def _recipe(path: Path, attacks: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """Load the run's recipe with the requested attacks, for one process and without callbacks."""
    from fdl.recipe.loading import load
    from fdl.registry.component import Component
    from fdl.runs.run_keys import changes, is_within, location_keys

    recipe = load(path, [*overrides, *([f"evaluation.attacks=[{','.join(attacks)}]"] if attacks else [])])
    before, now = load(path).to_dict(), recipe.to_dict()
    allowed = ["evaluation.attacks", "evaluation.batch_size", "fabric.threads"]
    changed = [key for key in changes(before, now) if not is_within(key, allowed)]
    if other := [key for key in changed if key not in location_keys(before, now, changed)]:
        raise UserError(
            f"{other[0]}: an audit looks at the run as it was; only evaluation.attacks can be given, and where "
            "the data lie now"
        )
    chosen = recipe.evaluation.attacks or [Component(name) for name in (*DEFAULT_ATTACKS, *_confidence_attacks(recipe))]
    return replace(
        recipe,
        evaluation=replace(recipe.evaluation, attacks=chosen),
        fabric=replace(recipe.fabric, devices=1, num_nodes=1, strategy="auto"),
        callbacks=[],
    )


def _confidence_attacks(recipe: Recipe) -> tuple[str, ...]:
    """Return the attacks on confidences, if these are computed from private samples."""
    from fdl.registry.instantiate import instantiate

    confidence = instantiate(recipe.method, "method", "method").confidence
    return CONFIDENCE_ATTACKS if confidence is not None and confidence.reads_samples else ()


def print_audit(result: Audit, console: Console) -> None:
    """Print the results of an audit.

    Args:
        result: the results.
        console: the console to print on.
    """
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
