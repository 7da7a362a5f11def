import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from fdl.attacks.audit import audit, evaluate_scores
from fdl.attacks.base import Attack, AttackResult, AttackTarget, MembershipScores
from fdl.attacks.callback import AuditCallback
from fdl.build import build
from fdl.callbacks.base import Callback
from fdl.cli import main as cli
from fdl.errors import UserError
from fdl.runs import run as runs
from fdl.runs.audit import AUDIT, audit_run
from fdl.runs.report import print_summary
from tests.attacks.runs import finished, recipe


class Planted(Attack):
    """Scores drawn from two Gaussians, and a claim about them."""

    name = "planted"

    def __init__(self, gap: float = 3.0, claimed: float = 0.5, label: str | None = None):
        super().__init__(label)
        self.gap, self.claimed = gap, claimed

    def run(self, subject: AttackTarget) -> AttackResult:
        """Draw them."""
        draw = np.random.default_rng(subject.seed)
        curve = MembershipScores("student", draw.normal(self.gap, 1, 800), draw.normal(0, 1, 800), self.claimed, 1e-5)
        return AttackResult(metrics={"student/gap": self.gap}, curves=[curve], notes=["planted"])


PLANTED = "tests.attacks.test_auditing.Planted"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in a folder, audited while it was run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    attacks = ["loss_threshold", "label_leakage"]
    changes = {"federation": {"clients": 2, "rounds": 1}, "callbacks": ["tensorboard"]}
    summary = runs.run_recipe(recipe(evaluation={"attacks": attacks}, **changes), folder)
    return folder, summary


def test_an_attack_above_the_ceiling_fails_the_audit(tmp_path):
    loop = finished(tmp_path, federation={"clients": 2, "rounds": 1})
    within = audit(loop, [Planted(gap=0.1), Planted(gap=3.0, claimed=math.inf, label="unprotected")])
    assert within.passed and within.summary()["violations"] == []
    beyond = audit(loop, [Planted(gap=0.1), Planted(gap=3.0, label="strong")])
    assert not beyond.passed
    assert len(beyond.violations) == 1 and beyond.violations[0].startswith("strong on the student: shows ε ≥ ")
    own = beyond.metrics()
    assert own["strong/student/epsilon_lower"] > own["strong/student/epsilon"] == 0.5
    assert own["strong/student/advantage"] > own["strong/student/advantage_ceiling"]
    assert own["planted/student/gap"] == 0.1


def test_chance_does_not_fail_an_audit():
    draw = np.random.default_rng(0)
    failed = [
        evaluate_scores(MembershipScores("student", draw.normal(size=60), draw.normal(size=60), 0.0, 0.0), 0.99, seed)[
            1
        ]
        for seed in range(200)
    ]
    assert sum(map(bool, failed)) <= 4  # at 1 %, 2 are expected


def test_the_summary_holds_what_attacks_found(run):
    _, summary = run
    found = summary["audit"]
    assert found["passed"] and set(found["attacks"]) == {"loss_threshold", "label_leakage"}
    metrics = found["attacks"]["loss_threshold"]["metrics"]
    assert 0 <= metrics["specialists/auc"] <= 1 and metrics["specialists/members"] == metrics["specialists/non_members"]
    assert "epsilon" not in str(list(metrics)).replace("epsilon_lower", ""), "nothing is claimed"
    assert any(
        "non-members tell false-positive rates from" in note for note in found["attacks"]["loss_threshold"]["notes"]
    )


def test_attacks_come_before_other_callbacks_which_see_the_findings(tmp_path):
    seen = {}

    class Late(Callback):
        def on_fit_end(self, loop, summary):
            seen.update(summary["audit"], saved=dict(saved[-1]))

    loop, saved = build(recipe(evaluation={"attacks": ["loss_threshold"]}), tmp_path), []
    assert isinstance(next(iter(loop.callbacks)), AuditCallback)
    loop.callbacks.append(Late())
    loop.on_summary = lambda summary: saved.append(dict(summary))
    summary = loop.run()
    assert [one["audit"] is None for one in saved] == [True, False]  # first what the rounds came to: attacks may fail
    assert seen["saved"]["audit"] == summary["audit"] == loop.audit.summary()
    assert set(seen["attacks"]) == {"loss_threshold"}


def test_the_closing_table_says_what_attacks_found(run, capsys):
    print_summary(run[1], Console(width=200, no_color=True), run[0])
    text = capsys.readouterr().out
    area = run[1]["audit"]["attacks"]["loss_threshold"]["metrics"]["student/auc"]
    assert f"Attack loss_threshold, AUC student {area:.3f}, specialists" in " ".join(text.split())
    assert "Audit of privacy passed" in " ".join(text.split())


def test_a_finished_run_audited_later_says_the_same(run):
    folder, _ = run
    result, path = audit_run(folder, ["loss_threshold", "label_leakage"])
    assert path == folder / AUDIT
    report = json.loads(path.read_text())
    assert report == json.loads((folder / runs.SUMMARY).read_text())["audit"]
    assert result.passed and (folder / "tensorboard" / "audit").is_dir()


def test_figures_and_numbers_are_in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard")).Reload().Tags()
    assert {"audit/roc/student", "audit/roc/specialists", "audit/roc/responses"} <= set(events["images"])
    assert "audit/label_leakage/histograms" in events["images"]
    assert "audit/loss_threshold/student/auc" in events["scalars"]


def test_the_figure_is_logarithmic_and_shows_the_ceiling(tmp_path):
    loop = finished(tmp_path, federation={"clients": 2, "rounds": 1})
    (draw,) = audit(loop, [Planted(), Planted(gap=0.5, label="weak")]).figures().values()
    figure = draw()
    axes = figure.axes[0]
    FigureCanvasAgg(figure).draw()
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {line.get_label().split(" (")[0]: line for line in axes.get_lines()}
    assert {"planted", "weak", "guessing"} <= set(lines)
    bound = next(line for name, line in lines.items() if name.startswith("ceiling, ε = 0.5"))
    fpr, tpr = bound.get_data()
    low = fpr < 0.1
    np.testing.assert_allclose(tpr[low], np.maximum(math.exp(0.5) * fpr[low] + 1e-5, axes.get_ylim()[0]))


def test_the_command_prints_a_table_and_tells_failure_by_its_exit_code(run, capsys):
    folder = str(run[0])
    assert cli.run(["audit", "--run", folder, "--attacks", "loss_threshold,label_leakage"]) == 0
    text = capsys.readouterr().out
    assert "specialists" in text and "label_leakage" in text and "mean/kl" in text and AUDIT in text
    assert cli.run(["audit", "--run", folder, "--attacks", PLANTED]) == cli.AUDIT_FAILED == 3
    assert "FAILED: planted on the student" in capsys.readouterr().out
    assert json.loads((run[0] / AUDIT).read_text())["passed"] is False
    assert cli.run(["audit", "--run", folder, f"evaluation.attacks=[{{target: {PLANTED}, args: {{gap: 0.0}}}}]"]) == 0


def test_what_cannot_be_audited_is_said_in_one_message(run, tmp_path, capsys):
    with pytest.raises(UserError, match="holds no finished run"):
        audit_run(tmp_path)
    with pytest.raises(UserError, match=r"federation\.rounds: an audit looks at the run as it was"):
        audit_run(run[0], overrides=["federation.rounds=2"])
    assert cli.run(["audit", "--run", str(run[0]), "--attacks", "lirra"]) == 2
    assert "did you mean 'lira'?" in capsys.readouterr().err
    assert cli.run(["fit", "--recipe", str(run[0] / "recipe.yaml"), "evaluation.attacks=[lira, lira]"]) == 2
    assert "evaluation.attacks.1: there is an attack 'lira' already" in capsys.readouterr().err


def test_attacks_are_for_data_that_they_know():
    from types import SimpleNamespace

    from fdl.build.federation import _attacks

    with pytest.raises(UserError, match=r"evaluation\.attacks\.0: lira is for classification data"):
        _attacks(recipe(evaluation={"attacks": ["lira"]}), SimpleNamespace(task="language"))
