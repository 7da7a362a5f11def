import math

import pytest

from fdl.callbacks.early_stop import EarlyStopping
from fdl.errors import UserError
from tests.callbacks.fakes import FakeLoop


def play(callback, loop, values, first=1):
    """Feed values of the monitored metric (None: not measured); returns the round that stopped, or None."""
    callback.on_fit_start(loop)
    for round, value in enumerate(values, first):
        metrics = {"distil/loss": 1.0} if value is None else {callback.monitor: value, "distil/loss": 1.0}
        callback.on_round_end(loop, {"round": round, "metrics": metrics})
        if loop.stopped:
            return round
    return None


@pytest.fixture
def loop(tmp_path):
    return FakeLoop(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "values", "stops"),
    [
        ({"patience": 2}, [0.1, 0.5, 0.4, 0.5, 0.9], 4),
        ({"patience": 3}, [0.1, 0.5, 0.4, 0.5, 0.9], None),
        ({"patience": 2, "mode": "min"}, [0.9, 0.5, 0.6, 0.7], 4),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.59], 3),
        ({"patience": 2, "min_delta": 0.1}, [0.5, 0.55, 0.61], None),
        ({"patience": 2}, [math.nan, math.nan], 2),
        ({"patience": 2}, [0.1, math.nan, 0.2, math.nan], None),
    ],
)
def test_stops_after_patience_rounds_without_improvement(loop, arguments, values, stops):
    assert play(EarlyStopping(**arguments), loop, values) == stops


def test_reason_names_metric_best_value_and_round(loop):
    play(EarlyStopping(patience=2), loop, [0.1, 0.5, 0.4, 0.5])
    assert loop.stopped == "student/validation/accuracy has not improved on 0.5 of round 2 for 2 rounds"


def test_rounds_between_evaluations_are_waited_out(loop):
    loop.recipe.evaluation.every = 2
    assert play(EarlyStopping(patience=3), loop, [None, 0.5, None, 0.5, None, 0.5]) == 6


def test_unknown_metric_lists_what_there_is(loop):
    callback = EarlyStopping(monitor="student/acc")
    with pytest.raises(UserError, match='no metric "student/acc"; it has: student/test/accuracy, test/loss'):
        callback.on_round_end(loop, {"round": 1, "metrics": {"test/loss": 1.0, "student/test/accuracy": 0.5}})


def test_state_survives_a_restart(loop):
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    assert play(first, loop, [0.9, 0.5]) is None
    second.load_state_dict(first.state_dict())
    assert play(second, loop, [0.8, 0.8], first=3) == 4


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}, {"mode": "up"}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        EarlyStopping(**arguments)


@pytest.mark.parametrize(("task", "monitor", "mode"), [("language", "student/validation/nll", "min")])
def test_it_watches_the_score_of_the_data(loop, task, monitor, mode):
    loop.server.task = task
    callback = EarlyStopping(patience=2)
    assert play(callback, loop, [2.0, 1.5, 1.6, 1.5]) == 4
    assert (callback.monitor, callback.mode) == (monitor, mode)
