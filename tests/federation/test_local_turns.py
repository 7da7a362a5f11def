"""Local updates run from request to request: what is cancelled, thrown into them, or yielded by mistake."""

import logging

import pytest

from fdl.build import build
from fdl.engine.requests import FitRequest, PredictRequest
from fdl.errors import UserError
from fdl.federation.executors import Sequential, Vectorized, plain_function_note
from fdl.federation.local_turns import LocalTurn, run_local_update
from fdl.messages import Parameters
from fdl.methods.fedavg import FedAvg
from fdl.recipe import from_mapping
from fdl.state.weights import module_state

EXECUTORS = pytest.mark.parametrize("executor", [Sequential, Vectorized])


class Plain(FedAvg):
    """Computes at once."""

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        client.fit(module, client.train, client.local_training)
        return Parameters(module_state(module), samples=client.samples)


class Delegates(FedAvg):
    """Returns what it should have delegated to."""

    def local_update(self, client, download):
        if client.id < 0:
            yield
        return super().local_update(client, download)


class YieldsLosses(FedAvg):
    """Yields the result of a fit in the place of a request."""

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        yield client.fit(module, client.train, client.local_training)


class Recovers(FedAvg):
    """Handles an error of its request, where it yielded it."""

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        try:
            yield PredictRequest(module, client.train, "nothing of the kind")
        except AttributeError:
            client.metrics["recovered"] = 1.0
        yield FitRequest(module, client.train, client.local_training)
        return Parameters(module_state(module), samples=client.samples)


class Closes(FedAvg):
    """Notes which local updates were begun and which were ended; client 2 fails when the others wait."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        self.begun.append(client.id)
        try:
            yield FitRequest(module, client.train, client.local_training)
            if client.id == 2:
                raise UserError("no power")
            yield FitRequest(module, client.train, client.local_training)
        finally:
            self.ended.append(client.id)
        return Parameters(module_state(module), samples=client.samples)


@pytest.fixture
def loop(tmp_path):
    recipe = {
        "seed": 3,
        "data": {"target": "digits", "args": {"proxy": 60, "validation": 0, "test": 1400}},
        "partition": {"target": "dirichlet", "args": {"alpha": 1.0}},
        "method": {"target": "fedavg"},
        "federation": {"clients": 4, "rounds": 1},
        "student": {"target": "mlp", "args": {"hidden": [12]}},
        "local_training": {"epochs": 1, "batch_size": 32},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
    }
    loop = build(from_mapping(recipe), tmp_path)
    loop.set_up()
    return loop


def turns(loop, round=1):
    loop.start_round(round)
    return [(client, loop.download_for(client.id)) for client in loop.clients]


def test_a_cancelled_turn_runs_its_finally_blocks_and_gives_modules_back(loop):
    method, (client, download) = Closes(), turns(loop)[0]
    turn = LocalTurn(method, client, download)
    turn.start()
    assert isinstance(turn.request, FitRequest) and turn.is_generator and method.ended == []
    turn.cancel()
    assert turn.request is None and turn.upload is None and method.ended == [client.id]
    with client.turn():  # it can have another one
        pass
    turn.cancel()  # once more does nothing
    assert method.ended == [client.id]


@EXECUTORS
def test_an_error_in_one_turn_names_its_client_and_ends_all(loop, executor):
    method = Closes()
    with pytest.raises(UserError, match=r"client 2 \(student\) in round 1: no power"):
        list(executor()(method, turns(loop)))
    assert sorted(method.begun) == sorted(method.ended) and 2 in method.ended
    assert all(client.modules is loop.runtime for client in loop.clients)
    assert len(list(executor()(FedAvg(), turns(loop, 2)))) == 4


def test_a_round_that_nobody_wants_any_more_ends_turns(loop):
    method = Closes()
    running = Vectorized()(method, turns(loop)[:2])
    next(running)
    running.close()
    assert sorted(method.ended) == [0, 1] and all(client.modules is loop.runtime for client in loop.clients)


@EXECUTORS
def test_an_error_is_thrown_to_where_the_request_was_yielded(loop, executor):
    assert all(isinstance(upload, Parameters) for _, upload in executor()(Recovers(), turns(loop)))
    assert all(client.metrics["recovered"] == 1.0 and "fit/loss" in client.metrics for client in loop.clients)


@EXECUTORS
@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (YieldsLosses(), r"YieldsLosses\.local_update yields dict, not a FitRequest or PredictRequest; client\.fit"),
        (Delegates(), r"Delegates\.local_update returns a generator; .* write `return \(yield from …\)`"),
    ],
)
def test_a_mistake_about_requests_is_a_sentence_that_names_the_client(loop, executor, method, reason):
    with pytest.raises(UserError, match=r"client \d \(student\) in round 1: " + reason):
        list(executor()(method, turns(loop)))
    assert all(client.modules is loop.runtime for client in loop.clients)


def test_a_plain_function_trains_one_after_another_and_the_log_says_so_once(loop, caplog):
    caplog.set_level(logging.INFO, "fdl")
    executor, method = Vectorized(), Plain()
    for round in (1, 2):
        assert len(list(executor(method, turns(loop, round)))) == 4
    told = [record.message for record in caplog.records if "one after another" in record.message]
    assert len(told) == 1 and "Plain.local_update calls client.fit; `yield FitRequest(…)`" in told[0]


def test_check_notes_a_plain_function_only_where_it_costs_something(loop):
    executor = Vectorized()
    assert "Plain.local_update calls client.fit" in plain_function_note(executor, Plain(), loop.clients)
    assert plain_function_note(executor, FedAvg(), loop.clients) is None
    assert plain_function_note(executor, Plain(), loop.clients[:1]) is None
    assert plain_function_note(Sequential(), Plain(), loop.clients) is None


def test_a_generator_ends_where_a_plain_function_does(loop):
    loop.start_round(1)
    client = loop.clients[0]
    plain, yielding = (run_local_update(method, client, loop.download_for(0)) for method in (Plain(), FedAvg()))
    assert plain.tensors.keys() == yielding.tensors.keys() and plain.samples == yielding.samples
