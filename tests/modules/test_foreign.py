"""LightningModules as Lightning's documentation teaches them run in a federation, and `check` says what is wrong."""

import math

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy

from fdl import recipe
from fdl.build import build
from fdl.cli.check import describe_federation
from fdl.errors import UserError
from fdl.federation.trial_step import run_trial_steps
from fdl.modules.foreign import ForeignModule, losses_of
from fdl.modules.output import Output
from fdl.participants import copy_of
from fdl.runs import run as runs


class Standard(LightningModule):
    """Logits from forward, a loss from training_step(batch, batch_idx), lazy layers, and its own log."""

    def __init__(self, hidden: int = 16):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OfBatchAlone(Standard):
    def training_step(self, batch):
        return {"loss": cross_entropy(self(batch[0]), batch[1]), "predictions": self(batch[0]).argmax(1), "n": 3}


class Named(Standard):
    """As models of transformers answer."""

    def forward(self, x):
        return {"logits": self.net(x)}

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])["logits"], batch[1])


class Short(Standard):
    def forward(self, x):
        return Output(self.net(x))

    def training_step(self, batch, batch_idx):
        return {"loss": cross_entropy(self(batch[0]).logits, batch[1])}


class Silent(Standard):
    def training_step(self, batch, batch_idx):
        return {"nll": torch.ones(())}


class Mistyped(Standard):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch), batch[1])


class Manual(Standard):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class WithoutStep(LightningModule):
    def forward(self, x):
        return x


class OtherClasses(Standard):
    def forward(self, x):
        return self.net(x)[:, :7]

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


def tree(model, method="federated_distillation", **more):
    one = {"target": f"{__name__}.{model}"}
    clients = {} if method == "fedavg" else {"specialists": [one]}
    return {
        "name": "foreign",
        "method": method,
        "data": {"target": "digits", "args": {"proxy": 60, "test": 100, "limit": 300}},
        "federation": {"clients": 2, "rounds": 2},
        "student": one,
        "local_training": {"steps": 3, "optimizer": {"target": "sgd", "args": {"lr": 0.1}}},
        "server_distil": {"steps": 3},
        "callbacks": [],
        "fabric": {"accelerator": "cpu"},
        **clients,
        **more,
    }


@pytest.mark.parametrize("model", ["Standard", "OfBatchAlone", "Named", "Short"])
def test_a_module_of_lightnings_contract_runs(model, tmp_path):
    summary = runs.run_recipe(recipe.from_mapping(tree(model)), tmp_path / "run")
    assert summary["rounds"] == 2 and not any(record["refused"] for record in summary["history"])
    assert math.isfinite(summary["metrics"]["student/test/accuracy"])


def test_federated_averaging_is_that_of_plain_torch(tmp_path):
    """One step of full batches from one start is the mean of the clients' own steps, weighted by samples."""
    settings = tree("Standard", "fedavg")
    settings["federation"]["rounds"] = 1
    settings["local_training"] |= {"steps": 1, "batch_size": 1000}
    loop = build(recipe.from_mapping(settings), tmp_path / "run")
    start = copy_of(loop.server.student)
    expected, total = {name: torch.zeros_like(value) for name, value in start.items()}, 0
    for client in loop.clients:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        net.load_state_dict({name.removeprefix("module.net."): value for name, value in start.items()})
        x, y = client.train.batch(torch.arange(client.samples))
        cross_entropy(net(x), y).backward()
        total += client.samples
        for name, parameter in net.named_parameters():
            expected[f"module.net.{name}"] += client.samples * (parameter - 0.1 * parameter.grad).detach()
    loop.run()
    for name, value in copy_of(loop.server.student).items():
        torch.testing.assert_close(value, expected[name] / total, rtol=1e-5, atol=1e-6)


def test_clients_train_together_as_one_by_one(tmp_path):
    one = runs.run_recipe(recipe.from_mapping(tree("Standard", "fedavg")), tmp_path / "one")
    both = runs.run_recipe(
        recipe.from_mapping(tree("Standard", "fedavg", client_execution="vectorized")), tmp_path / "both"
    )
    key = "student/test/accuracy"
    assert both["metrics"][key] == pytest.approx(one["metrics"][key], abs=1e-3)


def test_the_embedding_is_what_the_last_layer_sees_and_parts_can_be_asked_for(tmp_path):
    student = build(recipe.from_mapping(tree("Standard")), tmp_path).server.student
    assert isinstance(student, ForeignModule) and student.head == "net.3"
    x = torch.rand(3, 1, 8, 8)
    output = student(x, features=["net.1"])
    assert torch.equal(output.logits, student.module.net[3](output.embedding))
    assert torch.equal(output.embedding, output.features["net.1"].relu())


def test_check_takes_a_step_and_leaves_no_trace(tmp_path):
    loop = build(recipe.from_mapping(tree("Standard")), tmp_path / "run", launch=False)
    models = loop.server.student, loop.runtime.shared_module(loop.clients[0].architecture)
    before, state = [copy_of(model) for model in models], torch.random.get_rng_state()
    run_trial_steps(loop)
    assert torch.equal(torch.random.get_rng_state(), state)
    for model, weights in zip(models, before):
        assert all(torch.equal(value, weights[name]) for name, value in copy_of(model).items())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Silent", r"client 0: .*Silent\.training_step returns dict, expected the loss"),
        ("Mistyped", r"client 0: .*Mistyped\.training_step fails on two samples: AttributeError"),
        ("Manual", r"specialists\.0|student: .*Manual sets automatic_optimization = False"),
        ("WithoutStep", r"WithoutStep has no training_step; a model needs forward\(x\) and"),
        ("OtherClasses", r"client 0: .*OtherClasses\.forward returns, for two samples, logits of shape \[2, 7\]"),
    ],
)
def test_mistakes_are_said_by_check_in_a_sentence(model, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        describe_federation(recipe.from_mapping(tree(model)), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_loss_is_one_number():
    assert losses_of(torch.ones(1), "m")["loss"].shape == ()
    with pytest.raises(UserError, match=r"m returns a tensor of shape \[2\] as its loss"):
        losses_of({"loss": torch.ones(2)}, "m")
    with pytest.raises(UserError, match="m returns NoneType, expected the loss"):
        losses_of(None, "m")
