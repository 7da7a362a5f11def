"""Only marked steps are replayed, and only where the recipe says ``compile: traced``."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.engine.steps.selection import StepSelection
from fdl.engine.steps.traced import TracedStep
from fdl.engine.training_loop import EagerStep
from fdl.engine.vectorized.fit import StackedFit, fit_together
from fdl.engine.vectorized.stacked_models import StackedModels
from fdl.knowledge.distillation.targets import ResponseObjective
from fdl.methods.fedprox import ProximalObjective
from fdl.modules.objectives import is_traceable, training_step
from fdl.modules.small_classifiers import CNN, MLP
from fdl.modules.tracing import runs_traceable_code, traceable
from fdl.recipe import Component, Fit
from fdl.state.weights import trainable
from fdl.utils.seeding import torch_stream

SHAPE = {"num_classes": 3, "input_shape": (1, 4, 4)}


@dataclass
class Settings:
    loss_weight: float = 1.0


class AnnealedMLP(MLP):
    """Reads a number that a method changes each round, in an object of its own, and counts its steps."""

    def __init__(self):
        super().__init__([8], **SHAPE)
        self.settings, self.calls = Settings(), []

    def training_step(self, batch, batch_idx=0):
        self.calls.append(len(batch[0]))
        losses = super().training_step(batch)
        return {**losses, "loss": losses["loss"] * self.settings.loss_weight}


@pytest.fixture(autouse=True)
def eager_to_trace(monkeypatch):
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 2)
    monkeypatch.setattr("fdl.engine.vectorized.fit.TRACE_STACKED_AFTER_STEPS", 2)


def samples(count=24):
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return TensorSamples(x, torch.arange(count) % 3)


def fit_of(compile):
    return Fit(batch_size=8, optimizer=Component("sgd", {"lr": 0.1}), compile=compile)


def annealed(compile):
    torch.manual_seed(0)
    module, runtime, losses = AnnealedMLP(), Runtime(accelerator="cpu"), []
    for round in range(6):
        module.settings.loss_weight = 0.5**round
        losses.append(runtime.fit(module, samples(), fit_of(compile), torch_stream(0, "fit", round)))
    return losses, torch.cat([p.detach().flatten() for p in module.parameters()]), module.calls


def test_a_setting_that_changes_between_rounds_is_seen_as_without_tracing():
    losses, weights, calls = annealed("traced")
    expected, wanted, _ = annealed("none")
    assert losses == expected and torch.equal(weights, wanted)
    assert calls == [8] * 18  # 6 rounds of 3 steps


def test_a_marked_step_is_replayed_and_compile_none_calls_it_every_time():
    class Counting(MLP):
        calls = 0

        @traceable
        def training_step(self, batch, batch_idx=0):
            type(self).calls += 1
            return super().training_step(batch)

    def calls(compile):
        Counting.calls, module, runtime = 0, Counting([8], **SHAPE), Runtime(accelerator="cpu")
        for round in range(6):
            runtime.fit(module, samples(), fit_of(compile), torch_stream(0, "fit", round))
        return Counting.calls

    assert calls("none") == 18
    assert calls("traced") < 18


@pytest.mark.parametrize(("compile", "calls"), [("none", 18), ("traced", 18)])
def test_stacked_unmarked_steps_are_called_once_for_all_models(compile, calls):
    runtime, template = Runtime(accelerator="cpu"), AnnealedMLP()
    stack = StackedModels(template, 3)
    for round in range(6):
        jobs = [
            StackedFit(stack, row, samples(), fit_of(compile), torch_stream(row, "fit", round), training_step, 1)
            for row in range(3)
        ]
        fit_together(runtime, jobs)
    assert len(stack.skeleton(training=True).calls) == calls


def chosen(module, compile="traced", objective=training_step):
    runtime = Runtime(accelerator="cpu")
    selection = StepSelection(runtime.fabric, runtime.ranks, None, "auto")
    return type(selection.choose(module, trainable(module), objective, fit_of(compile)))


def test_all_built_in_small_models_and_objectives_are_traced():
    for module in (MLP([8], **SHAPE), CNN([4], **SHAPE)):
        held = ProximalObjective([p.detach().clone() for p in module.parameters()], 0.1, True)
        for objective in (training_step, held, ResponseObjective("kl", 1.0)):
            assert chosen(module, objective=objective) is TracedStep
        assert chosen(module, "none") is EagerStep


class Unmarked(nn.Module):
    def forward(self, x):
        return x


class Helper(MLP):
    """Changes what a marked step calls."""

    def forward(self, x, features=()):
        return super().forward(x, features)


class Renamed(MLP):
    def __init__(self):
        super().__init__([8], **SHAPE)


class Held(ResponseObjective):
    pass


def test_the_mark_does_not_reach_code_that_it_was_not_set_on():
    assert runs_traceable_code(Renamed) and runs_traceable_code(nn.Linear)
    assert not any(map(runs_traceable_code, (Unmarked, Helper, AnnealedMLP)))
    module = MLP([8], **SHAPE)
    module.backbone.trunk.append(Unmarked())
    assert chosen(module) is EagerStep
    for objective in (ProximalObjective([], 0.1, True), ResponseObjective("kl", 1.0)):
        assert chosen(AnnealedMLP(), objective=objective) is EagerStep
    assert not is_traceable(module, Held("kl", 1.0))


def test_fits_are_equal_and_hashed_by_value():
    one, other = (Fit(optimizer=Component("adam", {"lr": 0.1, "betas": [0.9, 0.99]})) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != replace(one, epochs=2)
    with pytest.raises(AttributeError):
        one.epochs = 3


def test_optimisers_are_found_by_value():
    runtime, module = Runtime(accelerator="cpu"), MLP([8], **SHAPE)
    for _ in range(3):
        runtime.fit(module, samples(), fit_of("none"), torch_stream(0, "fit"))
    assert len(runtime.steps.optimizers.reusable()) == 1
