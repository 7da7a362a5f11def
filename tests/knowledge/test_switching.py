"""The switch between phases, on scripted scores; every decision is worked out by hand."""

import pytest

from fdl.errors import UserError
from fdl.knowledge.distillation.phase_schedule import CENTRALIZED, FEDERATED, FixedPhases, PlateauPhases, SinglePhase


class Scripted(PlateauPhases):
    """A plateau of scores that are given."""

    def __init__(self, scores, **settings):
        super().__init__(**settings)
        self.scores = iter(scores)

    def score(self, server):
        return next(self.scores)


def phases(switch, rounds, first=CENTRALIZED):
    """The phase of every round, as c or f, and what was logged."""
    name, lasted, memory, trace, logged = first, 0, {}, "", []
    for _ in range(rounds):
        trace, lasted = trace + name[0], lasted + 1
        over = switch.is_over(None, name, lasted, memory)
        logged.append(switch.log(memory))
        if over:
            name = FEDERATED if name == CENTRALIZED else CENTRALIZED
            lasted, memory = 0, switch.carry_over(memory)
    return trace, logged


def test_never_and_fixed():
    assert phases(SinglePhase(), 5)[0] == "ccccc" and phases(SinglePhase(), 3, FEDERATED)[0] == "fff"
    assert phases(FixedPhases(2, 3), 9)[0] == "ccfffccff"
    assert phases(FixedPhases(2, 3), 7, FEDERATED)[0] == "fffccff"


def test_a_plateau_counts_rounds_of_small_gains():
    # gains         –     .2    .05*  .1    .05*  .05* | .2    0*    0*  | 0*    0*
    scores = [0.1, 0.3, 0.35, 0.45, 0.5, 0.55, 0.75, 0.75, 0.75, 0.75, 0.75]
    switch = Scripted(scores, threshold=0.09, patience=2, smoothing=0.0, min_rounds=1)
    trace, logged = phases(switch, 11)
    assert trace == "ccccccfffcc"
    assert [entry["switch/stale"] for entry in logged] == [0, 0, 1, 0, 1, 2, 0, 1, 2, 1, 2]
    assert "switch/gain" not in logged[0] and logged[6]["switch/gain"] == pytest.approx(0.2)


def test_scores_are_smoothed_from_where_the_phase_began():
    # β = ¾: s = 0, then ¾·0 + ¼·0.8 = 0.2, ¾·0.2 + ¼·0.8 = 0.35, 0.4625, 0.546875; gains .2, .15, .1125, .084375.
    # The next phase begins at the last score, 0.8, and not at the average that lags behind it: no gain at all.
    switch = Scripted([0.0, *[0.8] * 6], threshold=0.1, patience=1, smoothing=0.75, min_rounds=1)
    trace, logged = phases(switch, 7)
    assert trace == "cccccfc"
    smoothed = [entry["switch/smoothed"] for entry in logged]
    assert smoothed == pytest.approx([0.0, 0.2, 0.35, 0.4625, 0.546875, 0.8, 0.8])
    assert logged[5]["switch/gain"] == pytest.approx(0.0, abs=1e-12)


def test_a_phase_lasts_at_least_and_at_most_so_many_rounds():
    flat = Scripted([0.5] * 12, threshold=0.01, patience=1, smoothing=0.0, min_rounds=3)
    assert phases(flat, 12)[0] == "cccfffcccfff"
    rising = Scripted([0.1 * i for i in range(9)], threshold=0.01, patience=1, smoothing=0.0, max_rounds=4)
    assert phases(rising, 9)[0] == "ccccffffc"


def test_a_gain_of_just_the_threshold_is_worth_going_on_for():
    switch = Scripted([0.0, 0.25, 0.5, 0.625], threshold=0.25, patience=1, smoothing=0.0, min_rounds=1)
    assert [e["switch/stale"] for e in phases(switch, 4)[1]] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold must be a number > 0"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"min_rounds": 3, "max_rounds": 2}, "max_rounds must be at least 3, got 2"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        PlateauPhases(**settings)
    with pytest.raises(UserError, match="federated must be at least 1"):
        FixedPhases(1, 0)
