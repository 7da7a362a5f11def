"""Time by phase and by part: what is counted once is counted nowhere else."""

import json
import time

import pytest

from fdl.callbacks.profile import PROFILE_FILE, Profile, format_times
from fdl.errors import UserError
from fdl.runs import run as runs
from fdl.utils.stopwatch import PARTS, Stopwatch
from tests import rank_jobs

SHORT = (
    "profile=true",
    "federation.rounds=2",
    "federation.clients=2",
    "local_training.steps=1",
    "server_distil.steps=1",
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_parts_interrupt_each_other(clock):
    """A phase has all of its time, a part only its own."""
    watch = Stopwatch()
    with watch("clients"):
        clock(1)
        with watch.part("encode"):
            clock(10)
            with watch.part("extraction", within="clients"):  # not here: encode is being timed
                clock(100)
        with watch.part("extraction", within="clients"):
            clock(1000)
        clock(2)
    with watch("server"):
        clock(5)
    with watch.part("decode"):  # outside of any phase nothing is timed
        clock(7)
    assert dict(watch) == {"clients": 1113.0, "server": 5.0}
    expected = {"clients": 3.0, "encode": 110.0, "extraction": 1000.0, "distil": 5.0}
    assert watch.parts == dict.fromkeys(PARTS, 0.0) | expected
    assert sum(watch.parts.values()) == sum(watch.values())


def test_an_error_hands_the_clock_back(clock):
    """Whatever happens in a part, its phase goes on."""
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch("clients"), watch.part("decode"):
        clock(1)
        raise ZeroDivisionError
    clock(50)
    with watch("evaluate"):
        clock(2)
    assert watch.parts["decode"] == 1 and watch.parts["clients"] == 0 and watch.parts["evaluate"] == 2


def test_a_profiled_run_leaves_a_trace_and_a_table(tmp_path):
    """``profile: true``: for TensorBoard, and plainly; the summary has the parts in any run."""
    recipe = rank_jobs.recipe("federated_distillation", 1, SHORT)
    summary = runs.run_recipe(recipe, tmp_path / "run")
    traces = list((tmp_path / "run/tensorboard").glob("*.pt.trace.json"))
    assert len(traces) == 1
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    parts = summary["time"]["parts"]
    assert list(parts) == list(PARTS) and all(parts[part] > 0 for part in PARTS)
    assert sum(parts.values()) == pytest.approx(sum(summary["history"][-1]["seconds"].values()), rel=0.5)
    table = (tmp_path / "run" / PROFILE_FILE).read_text()
    assert all(part in table for part in PARTS) and "aten::" in table and format_times(parts) in table


def test_what_cannot_be_recorded():
    """Numbers out of range."""
    for wrong in ({"skip": -1}, {"rounds": 0}, {"top": 0}):
        with pytest.raises(UserError, match="expected skip"):
            Profile(**wrong)
