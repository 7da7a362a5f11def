"""Steps that were written down: the same to the bit, forgotten when anything changes, and only where that is right."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fdl.engine.tracing.step_graph
import fdl.engine.tracing.step_recorder
from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.engine.tracing.step_graph import trace_step
from fdl.engine.vectorized.fit import StackedFit, fit_together
from fdl.engine.vectorized.stacked_models import StackedModels
from fdl.knowledge.distillation.targets import ResponseObjective, SoftLabelled
from fdl.methods.fedprox import ProximalObjective
from fdl.modules.classifier import ImageClassifier
from fdl.modules.objectives import training_step
from fdl.modules.tracing import traceable
from fdl.recipe import Component, Fit
from fdl.utils.seeding import torch_stream


def samples(count=21, seed=0):
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return TensorSamples(x, torch.arange(count) % 3)


def classifier(*layers):
    layers = layers or (nn.Flatten(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    return ImageClassifier(nn.Sequential(*layers), num_classes=3, input_shape=(1, 4, 4))


def small(seed=0, *layers):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return classifier(*layers)


def fit_of(target="sgd", **changes):
    args = {"lr": 0.1, "momentum": 0.9} if target == "sgd" else {"lr": 0.01}
    return Fit(**{"epochs": 2, "batch_size": 8, "optimizer": Component(target=target, args=args)} | changes)


@pytest.fixture
def written(monkeypatch):
    """What comes of every attempt to write a step down."""
    found = []

    def note(*arguments):
        found.append(trace_step(*arguments))
        return found[-1]

    monkeypatch.setattr(fdl.engine.tracing.step_recorder, "trace_step", note)
    return found


def weights_after(module, config, objective=None, fits=6):
    runtime, losses = Runtime(accelerator="cpu"), []
    for turn in range(fits):
        chosen = objective(module, turn) if callable(objective) else None
        losses.append(runtime.fit(module, samples(21 + turn % 2), config, torch_stream(0, "fit", turn), chosen))
    return losses, [parameter.detach().clone() for parameter in module.parameters()]


def held(module, turn):
    return ProximalObjective([parameter.detach().clone() for parameter in module.parameters()], 0.3, True)


@pytest.mark.parametrize("objective", [None, held], ids=["own", "held"])
@pytest.mark.parametrize(
    "config", [fit_of(), fit_of("adamw"), fit_of(gradient_clip=0.05), fit_of(epochs=None, steps=7)]
)
def test_written_down_steps_end_where_others_do(config, objective, written, monkeypatch):
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 3)
    found = weights_after(small(), config, objective)
    assert len(written) >= 2 and None not in written
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 10**9)
    expected = weights_after(small(), config, objective)
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1]))


@pytest.mark.parametrize("objective", [training_step, held], ids=["own", "held"])
def test_stacked_steps_written_down_end_where_others_do(objective, written, monkeypatch):
    def trained(uses):
        monkeypatch.setattr("fdl.engine.vectorized.fit.TRACE_STACKED_AFTER_STEPS", uses)
        runtime, template, config = Runtime(accelerator="cpu"), small(), fit_of()
        stack, losses = StackedModels(template, 3), []
        for turn in range(6):
            wanted = training_step if objective is training_step else held(template, turn)
            jobs = [
                StackedFit(stack, row, samples(19 + row, row), config, torch_stream(row, "fit", turn), wanted, 1)
                for row in range(3)
            ]
            losses.append(fit_together(runtime, jobs))
        return losses, stack.whole.clone()

    found = trained(2)
    assert len(written) >= 2 and None not in written
    expected = trained(10**9)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "mse"])
def test_steps_that_learn_from_answers_are_written_down_too(loss, written, monkeypatch):
    answers = torch.rand(21, 3, generator=torch.Generator().manual_seed(1)).softmax(1)

    def trained(uses):
        monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", uses)
        module, runtime, losses = small(), Runtime(accelerator="cpu"), []
        for turn in range(6):  # an equal objective, made anew
            data, objective = SoftLabelled(samples(), answers), ResponseObjective(loss, 2.0)
            losses.append(runtime.fit(module, data, fit_of(), torch_stream(0, "fit", turn), objective))
        return losses, module.backbone[1].weight.detach()

    found = trained(3)
    assert len(written) >= 2 and None not in written
    expected = trained(10**9)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_nothing_is_written_down_in_the_first_fit_that_has_it(written, monkeypatch):
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 2)
    module = small()
    weights_after(module, fit_of(epochs=20), fits=1)
    assert written == []
    # an objective that holds another number each time is another objective each time
    weights_after(
        small(), fit_of(), lambda module, turn: dataclasses.replace(held(module, turn), mu=0.1 * turn), fits=3
    )
    assert written == []


class Scaled(ImageClassifier):
    """Divides its logits by an attribute, and by a frozen number in a buffer."""

    def __init__(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        super().__init__(network, num_classes=3, input_shape=(1, 4, 4))
        self.temperature = 1.0
        self.register_buffer("softness", torch.ones(()), persistent=False)

    @traceable
    def training_step(self, batch, batch_idx=0):
        return {"loss": F.cross_entropy(self(batch[0]).logits / self.temperature / self.softness, batch[1])}


def set_attribute(module):
    module.temperature = 5.0


def set_buffer(module):
    module.softness.fill_(5.0)


def replace_buffer(module):
    module.softness = torch.full((), 5.0)


def add_hook(module):
    module.backbone[1].register_forward_hook(lambda layer, inputs, output: output / 5.0)


@pytest.mark.parametrize("change", [set_attribute, set_buffer, replace_buffer, add_hook])
def test_what_changes_about_a_module_is_seen(change, written, monkeypatch):
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 2)
    config = fit_of(epochs=1, batch_size=21)

    def losses(changes_after):
        torch.manual_seed(0)
        module, runtime, found = Scaled(), Runtime(accelerator="cpu"), []
        for turn in range(8):
            if turn == changes_after:
                change(module)
            found.append(runtime.fit(module, samples(), config, torch_stream(0, "fit"))["loss"])
        return found

    found = losses(5)
    assert len(written) >= 1 and written[0] is not None
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 10**9)
    assert found == losses(5) != losses(100)


def test_a_layer_that_is_frozen_later_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 2)
    module, runtime, config = small(), Runtime(accelerator="cpu"), fit_of(epochs=1, batch_size=21)
    for turn in range(4):
        runtime.fit(module, samples(), config, torch_stream(0, "fit", turn))
    layer = module.backbone[1]
    layer.requires_grad_(False)
    before, head = layer.weight.clone(), module.backbone[3].weight.detach().clone()
    for turn in range(4):
        runtime.fit(module, samples(), config, torch_stream(0, "fit", turn))
    assert torch.equal(layer.weight, before) and not torch.equal(module.backbone[3].weight, head)


def test_functions_whose_state_nobody_knows_are_not_written_down(written, monkeypatch):
    monkeypatch.setattr("fdl.engine.steps.selection.TRACE_AFTER_STEPS", 1)
    count = 0

    def objective(module, batch):
        nonlocal count
        count += 1
        return {"loss": module.training_step(batch)["loss"] / count}

    weights_after(small(), fit_of(), lambda module, turn: objective)
    assert written == [] and count == 6 * 6


WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def step(function):
    def whole(x):
        loss = function(x @ WEIGHT).sum()
        return {"loss": loss.detach()}, list(torch.autograd.grad(loss, [WEIGHT]))

    return whole


SHIFT = torch.arange(4.0)
REFUSED = {
    "random numbers": lambda y: y * torch.rand_like(y),
    "a look at the data": lambda y: y * 2 if y.sum() > 0 else y,
    "another tensor": lambda y: y * SHIFT,
    "what is not repeated": lambda y, seen=[]: y * (seen.append(0) or len(seen)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_could_be_others_the_next_time_are_not_written_down(name):
    x = torch.randn(3, 4)
    whole = step(REFUSED[name])
    assert trace_step(whole, [x], whole(x), [WEIGHT]) is None


def test_a_step_is_tidied_and_still_the_same():
    def function(y):
        same = y.view(3, 4).expand(3, 4) * 1
        return same.t().t() + same.relu() + same.relu()

    whole, x = step(function), torch.randn(3, 4)
    found = trace_step(whole, [x], whole(x), [WEIGHT])
    for other in (torch.randn(3, 4), x):
        (loss, gradients), (expected, wanted) = found(other), whole(other)
        assert torch.equal(loss["loss"], expected["loss"]) and torch.equal(gradients[0], wanted[0])
    names = found.__wrapped__.__code__.co_varnames
    assert sum(name.startswith("relu") for name in names) == 1  # asked for twice, done once
    assert not any(name.startswith(("view", "mul", "detach", "alias")) for name in names), names


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_of_weights_are_not_transposed_copies(batched):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*[3] * batched, 64, 32, generator=generator).requires_grad_()
    x = torch.randn(*[3] * batched, 16, 32, generator=generator)

    def whole(x, weight):
        loss = torch.matmul(x, weight.mT).sin().sum()
        return {"loss": loss.detach()}, list(torch.autograd.grad(loss, [weight]))

    found = trace_step(whole, [x, weight], whole(x, weight), [])
    y = torch.randn(x.shape, generator=generator)
    assert found(y, weight)[1][0].is_contiguous()
    assert torch.equal(found(y, weight)[1][0], whole(y, weight)[1][0])


def test_products_that_round_otherwise_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(fdl.engine.tracing.step_graph, "_rounds_alike", lambda product: False)
    weight, x = torch.randn(2, 5, 3).requires_grad_(), torch.randn(2, 4, 3)

    def whole(x, weight):
        loss = torch.bmm(x, weight.mT).sin().sum()
        return {"loss": loss.detach()}, list(torch.autograd.grad(loss, [weight]))

    found = trace_step(whole, [x, weight], whole(x, weight), [])
    gradient, expected = found(x, weight)[1][0], whole(x, weight)[1][0]
    assert torch.equal(gradient, expected) and gradient.stride() == expected.stride()


def test_a_graph_reads_parameters_as_they_are_now():
    weight, x = WEIGHT.detach().clone().requires_grad_(), torch.randn(3, 4)

    def whole(x):
        loss = (x @ weight).square().sum()
        return {"loss": loss.detach()}, list(torch.autograd.grad(loss, [weight]))

    found = trace_step(whole, [x], whole(x), [weight])
    with torch.no_grad():
        weight.mul_(3.0)
    assert torch.equal(found(x)[0]["loss"], whole(x)[0]["loss"])
