"""Local updates that yield requests, one that does not, and what becomes of mistakes."""

import logging

import pytest
import torch

from fdl.engine.requests import FitRequest, PredictRequest
from fdl.errors import UserError
from fdl.federation.executors import Vectorized
from fdl.federation.local_turns import LocalTurn, run_local_update
from fdl.messages import Parameters
from fdl.methods.fedavg import FedAvg
from fdl.state.weights import module_state
from tests.toy import federation


class Yields(FedAvg):
    """Trains and predicts by requests, and notes where it is."""

    name = "yields"

    def __init__(self):
        super().__init__()
        self.seen = []

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        try:
            losses = yield FitRequest(module, client.train, client.local_training)
            logits = yield PredictRequest(module, client.train)
            self.seen.append((sorted(losses), tuple(logits.shape)))
        finally:
            self.seen.append("left")
        return Parameters(module_state(module), samples=client.samples)


class Plain(FedAvg):
    """Trains at once."""

    name = "plain"

    def local_update(self, client, download):
        module = client.load(download.tensors, "student")
        client.fit(module, client.train, client.local_training)
        return Parameters(module_state(module), samples=client.samples)


def started(method, tmp_path):
    loop = federation(method, tmp_path)
    loop.start_round(1)
    loop.method.setup(loop.server, loop.clients)
    return loop, LocalTurn(method, loop.clients[0], loop.download_for(0))


def test_requests_are_answered_and_the_turn_ends_with_the_upload(tmp_path):
    method = Yields()
    loop, turn = started(method, tmp_path)
    turn.start()
    assert isinstance(turn.request, FitRequest) and turn.is_generator
    turn.run_request()
    assert isinstance(turn.request, PredictRequest)
    turn.run_request()
    assert turn.request is None and isinstance(turn.upload, Parameters)
    assert method.seen == [(["loss"], (len(loop.clients[0].train), 2)), "left"]
    with loop.clients[0].turn():  # it has given back what it had borrowed
        loop.clients[0].load(module_state(loop.server.student), "student")


def test_a_cancelled_turn_leaves_its_blocks_and_gives_modules_back(tmp_path):
    method = Yields()
    loop, turn = started(method, tmp_path)
    turn.start()
    turn.cancel()
    assert method.seen == ["left"] and turn.request is None and turn.upload is None
    with loop.runtime.borrow("student"):
        pass


def test_an_error_of_a_request_is_raised_where_it_was_yielded(tmp_path):
    method = Yields()
    loop, turn = started(method, tmp_path)
    turn.start()
    loop.clients[0].fit = lambda *_: (_ for _ in ()).throw(ZeroDivisionError("oops"))
    with pytest.raises(ZeroDivisionError):
        turn.run_request()
    assert method.seen == ["left"]
    with loop.runtime.borrow("student"):
        pass


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (lambda self, client, download: iter_of(3), "yields int, not a FitRequest or PredictRequest"),
        (lambda self, client, download: iter_of(None), "yields NoneType, not a FitRequest"),
    ],
)
def test_anything_else_that_is_yielded_is_refused(update, reason, tmp_path):
    kind = type("Wrong", (FedAvg,), {"name": "wrong", "local_update": update})
    loop = federation(kind(), tmp_path)
    with pytest.raises(UserError, match=rf"client 0 \(linear\) in round 1: Wrong\.local_update {reason}"):
        loop.run()


def iter_of(value):
    yield value


class Forgets(FedAvg):
    """Calls the generator of its base class without ``yield from``."""

    name = "forgets"

    def local_update(self, client, download):
        if client.id < 0:
            yield None
        return super().local_update(client, download)


def test_a_missing_yield_from_is_said(tmp_path):
    loop = federation(Forgets(), tmp_path)
    with pytest.raises(UserError, match=r"Forgets\.local_update returns a generator; .* `return \(yield from …\)`"):
        loop.run()


def test_both_forms_train_alike(tmp_path):
    uploads = []
    for method in (Yields(), Plain()):
        loop, _ = started(method, tmp_path / method.name)
        uploads.append(run_local_update(method, loop.clients[0], loop.download_for(0)))
    assert all(torch.equal(uploads[0].tensors[name], tensor) for name, tensor in uploads[1].tensors.items())


def test_a_plain_local_update_is_said_once_not_to_be_vectorised(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fdl")
    loop = federation(Plain(), tmp_path, rounds=2)
    loop.executor = Vectorized()
    loop.run()
    found = [record.getMessage() for record in caplog.records if "yield FitRequest" in record.getMessage()]
    assert len(found) == 1 and "clients of plain train one after another" in found[0]
