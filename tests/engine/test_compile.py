"""Compiled steps train as the steps themselves do, are compiled once, and are given up where they cannot be."""

import logging

import pytest
import torch
from torch.nn import functional as F

from fdl.datamodules.samples import TensorSamples
from fdl.engine.compile import Compiler
from fdl.engine.runtime import Runtime
from fdl.engine.training_loop import EagerStep
from fdl.methods.fedprox import ProximalObjective
from fdl.modules.objectives import training_step
from fdl.modules.small_classifiers import CNN, MLP
from fdl.recipe import Component, Fit
from fdl.utils.seeding import torch_stream

GREY = {"num_classes": 10, "input_shape": (1, 8, 8)}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Backend:
    """Hands back what it is to compile, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        self.calls += 1
        return graph.forward


def data(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorSamples(
        torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)
    )


def adam(compile, **settings):
    return Fit(batch_size=8, compile=compile, optimizer=Component("adam", {"lr": 0.01}), **settings)


def closure(module, number):
    """As methods make one in every round, around tensors of that round."""
    shift = torch.full((10,), 0.1 * number, device=next(module.parameters()).device)

    def objective(module, batch):
        return {"loss": F.cross_entropy(module(batch[0]).logits + shift, batch[1]), "shift": shift.sum()}

    return objective


def held(module, number):
    anchor = [parameter.detach().clone() + 0.1 * number for parameter in module.parameters()]
    return ProximalObjective(anchor, 0.5, True)


def trained(module, compile, objective=None, backend=None, runtime=None, sizes=(20, 19, 25)):
    """Losses and weights after fits of several clients' data, one after another."""
    runtime = runtime or Runtime(accelerator="cpu")
    if backend is not None:
        runtime.steps.compiler = Compiler(backend)
    module, config, found = runtime.place(module), adam(compile, epochs=2), []
    for number, size in enumerate(sizes):
        made = None if objective is None else objective(module, number)
        found.append(runtime.fit(module, data(size, number), config, torch_stream(0, "fit", number), made))
    return found, torch.cat([value.detach().cpu().flatten() for value in module.state_dict().values()])


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fdl"]


def new(kind, **settings):
    torch.manual_seed(0)
    return kind([8], **GREY, **settings)


@pytest.mark.parametrize("objective", [None, closure, held])
def test_a_step_is_compiled_once_for_all_clients_and_rounds(objective):
    backend = Backend()
    losses, weights = trained(new(MLP), "default", objective, backend)
    expected_losses, expected = trained(new(MLP), "none", objective)
    assert backend.calls == 1
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    for found, wanted in zip(losses, expected_losses):
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.fixture
def one_version():
    """Torch keeps one compiled version of a function, not the usual 8."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: 1}):
        yield


def test_models_and_objectives_have_steps_of_their_own(one_version):
    backend, runtime = Backend(), Runtime(accelerator="cpu")
    for width in (8, 9):
        module = MLP([width], **GREY)
        trained(module, "default", None, backend if width == 8 else None, runtime, [16, 16])
        trained(module, "default", held, None, runtime, [16, 16])
    assert backend.calls == 4


def test_steps_of_too_many_kinds_are_not_compiled(one_version, caplog):
    def named(module, number):
        def objective(module, batch):
            return {**training_step(module, batch), name: torch.zeros(())}

        name = "abc"[number]
        return objective

    with caplog.at_level(logging.WARNING, "fdl"):
        found = trained(new(MLP), "default", named, Backend())
    expected = trained(new(MLP), "none", named)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert [list(losses) for losses in found[0]] == [["loss", name] for name in "abc"]
    assert len(said(caplog)) == 1


def test_what_cannot_be_compiled_is_said_once_and_trained_all_the_same(caplog):
    def looks(module, number):
        def objective(module, batch):
            loss = training_step(module, batch)["loss"]
            return {"loss": loss * 2 if loss.item() > 1e9 else loss}

        return objective

    backend = Backend()
    with caplog.at_level(logging.WARNING, "fdl"):
        found = trained(new(MLP), "default", looks, backend)
    assert found[0] == (expected := trained(new(MLP), "none", looks))[0] and torch.equal(found[1], expected[1])
    assert backend.calls == 0
    (line,) = said(caplog)
    assert "MLP is trained without torch.compile" in line and "data-dependent" in line


def test_a_compiler_that_fails_is_given_up(caplog):
    def broken(graph, inputs):
        raise OSError("there is no compiler here")

    with caplog.at_level(logging.WARNING, "fdl"):
        found, expected = trained(new(MLP), "default", None, broken), trained(new(MLP), "none")
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    (line,) = said(caplog)
    assert "there is no compiler here" in line


def test_a_mistake_in_an_objective_is_raised_as_it_is():
    def mistaken(module, number):
        def objective(module, batch):
            raise KeyError("no such loss")

        return objective

    with pytest.raises(KeyError, match="no such loss"):
        trained(new(MLP), "default", mistaken, Backend())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MLP, CNN])
@pytest.mark.parametrize("objective", [None, held])
def test_compiled_for_the_cpu_results_are_the_same(kind, objective, caplog):
    # whether a bias in front of a normalisation has a gradient is decided by rounding, which Adam makes a step of
    settings = {"norm": "group"} if kind is CNN else {}
    losses, weights = trained(new(kind, **settings), "default", objective)
    expected_losses, expected = trained(new(kind, **settings), "none", objective)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-4 if kind is CNN else 1e-5)
    assert losses[-1]["loss"] == pytest.approx(expected_losses[-1]["loss"], abs=1e-5)
    assert not said(caplog)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("objective", [None, closure, held])
def test_compiled_for_a_gpu_results_are_the_same(mode, objective, caplog):
    losses, weights = trained(new(MLP), mode, objective, None, Runtime(accelerator="gpu"))
    expected_losses, expected = trained(new(MLP), "none", objective, None, Runtime(accelerator="gpu"))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-4)
    for found, wanted in zip(losses, expected_losses):
        assert found == pytest.approx(wanted, abs=1e-4)
    assert not said(caplog)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("mode", ["none", "default", "reduce-overhead"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_step_waits_for_the_gpu(mode, optimizer, monkeypatch):
    runtime, steps = Runtime(accelerator="gpu", precision="bf16-mixed"), 12
    module, samples = runtime.place(new(MLP)), data(64)
    config = Fit(
        steps=steps,
        batch_size=8,
        gradient_clip=1.0,
        compile=mode,
        optimizer=Component(optimizer, {"lr": 0.01}),
    )
    runtime.fit(module, samples, config, torch_stream(0, "fit"))  # compiles
    done, gradients = 0, EagerStep.gradients

    def watched(*arguments):
        nonlocal done
        done += 1
        if done == 3:  # an optimiser's first step makes its state
            torch.cuda.set_sync_debug_mode("error")
        losses = gradients(*arguments)
        if done == steps:  # the losses are read after it
            torch.cuda.set_sync_debug_mode("default")
        return losses

    monkeypatch.setattr(EagerStep, "gradients", watched)
    try:
        runtime.fit(module, samples, config, torch_stream(0, "fit"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done == steps
