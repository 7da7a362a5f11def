"""An architecture's shared module belongs to one borrower at a time, for as long as its block lasts."""

import pytest
import torch
from torch import nn

from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.participants import Client
from fdl.recipe import Component, Fit
from fdl.state.model_handle import ModelHandle
from fdl.state.weights import load_into


class Line(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def training_step(self, batch):
        return {"loss": self(batch[0]).square().mean()}


def constant(value):
    return {"weight": torch.full((2, 2), float(value)), "bias": torch.zeros(2)}


@pytest.fixture
def runtime():
    runtime = Runtime(accelerator="cpu")
    runtime.factories.update({"one": Line, "other": Line})
    return runtime


def client_of(runtime, number=0):
    local = Fit(epochs=1, batch_size=2, optimizer=Component("sgd", {"lr": 0.1}))
    samples = TensorSamples(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    return Client(
        id=number, architecture="one", train=samples, calibration=samples, runtime=runtime, seed=3,
        local_training=local, server_distil=local, client_distil=local, proxy=None, num_classes=2,
    )  # fmt: skip


def test_a_borrowed_module_is_filled_and_refused_to_others_until_the_block_ends(runtime):
    with runtime.borrow("one", constant(1)) as module:
        assert module is runtime.shared_module("one") and bool((module.weight == 1).all())
        with (
            pytest.raises(RuntimeError, match=r"'one' is borrowed already, .*; leave the block"),
            runtime.borrow("one", constant(2)),
        ):
            pass
        assert bool((module.weight == 1).all())
        with runtime.borrow("other", constant(2)) as second:
            assert second is not module
    with (
        pytest.raises(ValueError, match="unknown 'more'"),
        runtime.borrow("one", {**constant(3), "more": torch.ones(1)}),
    ):
        pass
    with pytest.raises(ZeroDivisionError), runtime.borrow("one"):
        raise ZeroDivisionError
    with runtime.borrow("one") as module:
        assert bool((module.weight == 1).all())


def test_a_module_that_nobody_has_borrowed_cannot_be_filled(runtime):
    with pytest.raises(RuntimeError, match=r"with runtime\.borrow"):
        load_into(runtime.shared_module("one"), constant(1))


def test_a_client_uses_models_within_its_turn_only(runtime):
    client, other = client_of(runtime), client_of(runtime, 1)
    for use in (client.specialist, lambda: client.load(constant(1)), client.calibration_accuracy):
        with pytest.raises(RuntimeError, match=r"client 0 uses a model outside of its turn.*with client\.turn\(\)"):
            use()
    with client.turn(), pytest.raises(RuntimeError, match="client 0 has its turn already"), client.turn():
        pass
    with client.turn():
        client.specialist()
        with pytest.raises(RuntimeError, match="borrowed already"), other.turn():
            other.specialist()


def test_weights_are_copied_once_per_turn_and_training_is_seen_by_who_borrows_again(runtime, monkeypatch):
    copies = []
    copied = ModelHandle._copy
    monkeypatch.setattr(ModelHandle, "_copy", lambda *given: (copies.append(1), copied(*given))[1])
    client, other = client_of(runtime), client_of(runtime, 1)
    with client.turn():
        start = client.specialist().weight.clone()
        client.fit(client.specialist(), client.train, client.local_training)
        trained = client.specialist().weight.clone()
        assert len(copies) == 1 and not torch.equal(start, trained)
    with other.turn():
        other.specialist()
    with client.turn():  # it kept nothing
        assert torch.equal(client.specialist().weight, start)
        client.fit(client.specialist(), client.train, client.local_training)
        client.save_specialist(client.specialist())
    with client.turn():
        assert torch.equal(client.specialist().weight, trained)
        client.load(constant(5))
        assert torch.equal(client.specialist().weight, trained)  # sent weights lay in its place, and it came back
    assert len(copies) == 6
