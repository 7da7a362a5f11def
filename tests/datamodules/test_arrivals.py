"""Which sample is there in which round, by a script."""

import json

import numpy as np
import pytest

from fdl.build import build
from fdl.datamodules.arrivals import ClassIncremental, DomainIncremental
from fdl.errors import UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.recipe import from_mapping
from tests.test_loop import Crash

LABELS = np.array([0, 1, 2, 3, 4, 0, 4])


def test_rounds_belong_to_stages_and_the_last_one_goes_on():
    arrival = ClassIncremental(stages=3, rounds=2)
    assert [arrival.stage(round) for round in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_classes_come_in_runs_and_go_again_unless_they_are_kept():
    arrival = ClassIncremental(stages=2)
    assigned = arrival.assign(LABELS, None, 5)
    assert assigned.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert [arrival.visible(assigned, stage).tolist() for stage in (0, 1)] == [[0, 1, 2, 5], [3, 4, 6]]
    kept = ClassIncremental(stages=2, keep=True)
    assert [kept.visible(assigned, stage).tolist() for stage in (0, 1)] == [[0, 1, 2, 5], list(range(7))]
    assert [arrival.known_classes(stage, 5) for stage in (0, 1)] == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_classes_may_come_in_another_order():
    arrival = ClassIncremental(stages=3, order=[4, 0, 2, 1, 3])
    assert arrival.assign(LABELS, None, 5).tolist() == [0, 1, 1, 2, 0, 0, 0]
    assert arrival.known_classes(1, 5) == [0, 1, 2, 4]


def test_domains_come_one_after_another_with_all_classes():
    arrival = DomainIncremental(domains=["sketch", "photo"], rounds=3)
    assert arrival.assign(None, np.array(["photo", "sketch", "photo"]), 5).tolist() == [1, 0, 1]
    assert (arrival.stages, arrival.known_classes(0, 2)) == (2, [0, 1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="stages must be at least 1, got 0"):
        ClassIncremental(stages=0)
    with pytest.raises(UserError, match="stages: 6, but the data have only 5 classes"):
        ClassIncremental(stages=6).assign(LABELS, None, 5)
    with pytest.raises(UserError, match=r"order must name each of the 5 classes once, by number, got \[0, 1\]"):
        ClassIncremental(stages=2, order=[0, 1]).assign(LABELS, None, 5)
    with pytest.raises(UserError, match="class_incremental is for data with classes"):
        ClassIncremental(stages=2).assign(None, None, 0)
    with pytest.raises(UserError, match="domain_incremental is for data with domains"):
        DomainIncremental(["a", "b"]).assign(LABELS, None, 5)
    with pytest.raises(UserError, match="domains must name all of a, b, c; c is missing"):
        DomainIncremental(["a", "b"]).assign(None, np.array(list("abc")), 5)
    with pytest.raises(UserError, match="domains must differ, got a, a"):
        DomainIncremental(["a", "a"])


def federation(folder, method="fedavg", callbacks=(), **changes):
    tree = {
        "name": "stream",
        "method": method,
        "data": {"target": "digits", "args": {"proxy": 60, "validation": 60, "test": 200, "limit": 900}},
        "partition": {"target": "dirichlet", "args": {"alpha": 0.3}},
        "arrival": {"target": "class_incremental", "args": {"stages": 5, "rounds": 2}},
        "federation": {"clients": 6, "rounds": 6, "calibration_fraction": 0.2},
        "student": {"target": "mlp", "args": {"hidden": [16]}},
        "specialists": [{"target": "mlp", "args": {"hidden": [16]}}],
        "local_training": {"steps": 5, "optimizer": {"target": "adam", "args": {"lr": 0.01}}},
        "server_distil": {"steps": 5},
        "evaluation": {"evaluators": ["continual"]},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
        **changes,
    }
    loop = build(from_mapping(tree), folder)
    for callback in callbacks:
        loop.callbacks.callbacks.append(callback)
    return loop


def classes_of(samples):
    return set(samples.labels.tolist())


def test_clients_see_only_what_is_there_and_everything_comes_once(tmp_path):
    loop, whole = federation(tmp_path), federation(tmp_path, arrival=None, evaluation={})
    counts = np.zeros(6, dtype=int)
    for round in range(1, 11):
        loop.start_round(round)
        stage = (round - 1) // 2
        assert loop.server.stage == stage
        for client in loop.clients:
            assert classes_of(client.train) | classes_of(client.calibration) <= {2 * stage, 2 * stage + 1}
            counts[client.id] += len(client.train) if round % 2 else 0
        there = [client.id for client in loop.clients if len(client.train)]
        assert loop.cohort(round) == (there, [])
    assert counts.tolist() == [len(client.train) for client in whole.clients]
    assert all(len(client.train) for client in whole.clients)


def test_some_client_has_nothing_for_a_while_and_sits_out(tmp_path):
    loop = federation(tmp_path)
    estimate_bytes(loop)  # as in a run, whoever has nothing sends nothing
    loop.run()
    asked = [record["cohort"] for record in loop.history]
    assert any(len(cohort) < 6 for cohort in asked) and all(asked)
    for round, cohort in enumerate(asked, 1):
        loop.start_round(round)
        assert cohort == [client.id for client in loop.clients if len(client.train)]


def test_the_pool_of_a_centralised_run_comes_in_stages_too(tmp_path):
    loop = federation(tmp_path, method="centralized")
    loop.start_round(3)
    assert classes_of(loop.server.pooled) == {2, 3}


def test_what_was_made_of_earlier_data_is_forgotten_with_them(tmp_path):
    client = federation(tmp_path).clients[0]
    client.start_round(1)
    client.cache["answers"] = 1
    client.start_round(2)
    assert client.cache == {"answers": 1}
    client.start_round(3)
    assert client.cache == {}


def told(loop):
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in loop.history]
    return json.dumps([history, loop.server.student.state_dict()["backbone.head.bias"].tolist()])


# round 4 is the middle of the second stage, round 5 the beginning of the third
@pytest.mark.parametrize(("method", "crash_in"), [("fedavg", 5), ("cfed", 4), ("federated_distillation", 4)])
def test_a_run_resumed_in_the_middle_of_a_stage_equals_the_straight_one(tmp_path, method, crash_in):
    straight = federation(tmp_path / "straight", method)
    straight.run()
    crashed = federation(tmp_path / "crashed", method, callbacks=[Crash(crash_in)])
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = federation(tmp_path / "crashed", method)
    resumed.run(resume=True)
    assert resumed.resumed_from == crash_in - 1
    assert told(resumed) == told(straight)


def test_a_schedule_that_does_not_suit_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="arrival: stages: 11, but the data have only 10 classes"):
        federation(tmp_path, arrival={"target": "class_incremental", "args": {"stages": 11}})
    with pytest.raises(UserError, match="arrival: domain_incremental is for data with domains"):
        federation(tmp_path, arrival={"target": "domain_incremental", "args": {"domains": ["a"]}})
