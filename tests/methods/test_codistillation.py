"""Codistillation between two toy pools: a linear model, and one whose logits are twice as large.

Client 0 is of the small pool, client 1 of the large one. Expected numbers come from the gradients written out in
numpy: of cross entropy (p - y) xᵀ, of T² KL T (p_T - q_T) xᵀ / n, each times the model's factor 1 or 2.
"""

import dataclasses

import numpy as np
import pytest
import torch

from fdl.comm.stages.quantize import Quantize
from fdl.errors import UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.aggregation.server_optimizers import SGD, Adam
from fdl.methods.codistillation import Codistillation
from fdl.methods.fedavg import FedAvg
from fdl.modules.output import Output
from fdl.modules.small_classifiers import MLP
from fdl.recipe import from_mapping
from fdl.runs import run as runs
from tests.test_loop import outcome
from tests.toy import Linear, federation, weight

FACTOR = {"linear": 1.0, "double": 2.0}
PLAIN = {"optimizer": SGD(lr=1.0, momentum=0.0)}


class Double(Linear):
    """Twice the linear model's logits."""

    def forward(self, x, features=()):
        output = super().forward(x)
        return Output(2 * output.logits, output.embedding, {})


class Tilted(Linear):
    """A linear model that starts with an opinion."""

    def __init__(self):
        super().__init__()
        self.linear.weight.data = torch.tensor([[0.3, -0.2], [0.0, 0.4]])


def toy(method, folder, large=Double, small=Linear, **settings):
    loop = federation(method, folder, **settings)
    del loop.runtime.factories["linear"]
    loop.runtime.factories |= {"student": small, "linear": small, "double": large}
    loop.server.student = loop.runtime.create("student", 0)
    loop.clients[1].architecture = "double"
    return loop


def run(method, folder, **settings):
    loop = toy(method, folder, **settings)
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    return loop


def pools(loop):
    """Both pools' weights."""
    found = {name: weight(module).clone() for name, module in loop.method.server_models(loop.server)}
    assert torch.equal(found["linear"], weight(loop.server.student))
    return found


def softmax(z):
    e = np.exp(z - z.max(0))
    return e / e.sum(0)


def local(w, factor, client, steps=1):
    """Full-batch steps on one client's data."""
    x = np.eye(2)[client]
    for _ in range(steps):
        w = w - factor * np.outer(softmax(factor * w @ x) - np.eye(2)[client], x)
    return w


def distilled(w, factor, teacher, temperature=1.0):
    """One step on both proxy samples, which are the unit vectors; columns of `teacher` are logits."""
    gap = softmax(factor * w / temperature) - softmax(teacher / temperature)
    return w - factor * temperature * gap / 2


def test_disjoint_pools_average_apart(tmp_path):
    found = pools(run(Codistillation(sharing="disjoint", alpha=0.0, **PLAIN), tmp_path))
    zero = np.zeros((2, 2))
    torch.testing.assert_close(found["linear"], torch.tensor(local(zero, 1, 0)).float())
    torch.testing.assert_close(found["double"], torch.tensor(local(zero, 2, 1)).float())


def test_nested_pools_train_the_small_model_everywhere(tmp_path):
    loop = run(Codistillation(alpha=0.0, **PLAIN), tmp_path)
    found, zero = pools(loop), np.zeros((2, 2))
    mean = 0.25 * local(zero, 1, 0) + 0.75 * local(zero, 1, 1)
    torch.testing.assert_close(found["linear"], torch.tensor(mean).float())
    torch.testing.assert_close(found["double"], torch.tensor(local(zero, 2, 1)).float())
    up = {row.client: row.bytes for row in loop.ledger.rows() if row.direction == "up"}
    assert up[1] > up[0]


@pytest.mark.parametrize("alpha", [0.25, 0.75])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_merged_mixes_two_displacements_from_the_same_start(tmp_path, alpha, temperature):
    method = Codistillation(sharing="disjoint", alpha=alpha, temperature=temperature, **PLAIN)
    found = pools(run(method, tmp_path, rounds=3, small=Tilted))
    small, large = Tilted().linear.weight.detach().numpy().astype(float), np.zeros((2, 2))
    for _ in range(3):
        learnt = distilled(small, 1, 2 * large, temperature), distilled(large, 2, small, temperature)
        small = small + (1 - alpha) * (local(small, 1, 0) - small) + alpha * (learnt[0] - small)
        large = large + (1 - alpha) * (local(large, 2, 1) - large) + alpha * (learnt[1] - large)
    torch.testing.assert_close(found["linear"], torch.tensor(small).float())
    torch.testing.assert_close(found["double"], torch.tensor(large).float())


def test_periodic_distils_what_the_round_left(tmp_path):
    found = pools(run(Codistillation("periodic", "disjoint", period=2, **PLAIN), tmp_path, rounds=3, small=Tilted))
    small, large = Tilted().linear.weight.detach().numpy().astype(float), np.zeros((2, 2))
    for round in (1, 2, 3):
        small, large = local(small, 1, 0), local(large, 2, 1)
        if round == 2:
            small, large = distilled(small, 1, 2 * large), distilled(large, 2, small)
    torch.testing.assert_close(found["linear"], torch.tensor(small).float())
    torch.testing.assert_close(found["double"], torch.tensor(large).float())


def test_without_alpha_it_is_fedadam_in_every_pool(tmp_path):
    settings = {"rounds": 4, "local_training": 3}
    nested = run(Codistillation(alpha=0.0), tmp_path / "a", **settings)
    adam = federation(FedAvg(Adam()), tmp_path / "b", **settings)
    adam.run()
    assert torch.equal(weight(nested.server.student), weight(adam.server.student))
    # the large pool is FedAdam of its only client
    alone = federation(FedAvg(Adam()), tmp_path / "c", **settings)
    alone.runtime.factories["student"] = Double
    alone.server.student = alone.runtime.create("student", 0)
    alone.cohort = lambda round: ([1], [])
    alone.run()
    assert torch.equal(pools(nested)["double"], weight(alone.server.student))


def test_at_alpha_one_nobody_listens_to_the_clients(tmp_path):
    lazy, busy = (
        run(Codistillation(alpha=1.0), tmp_path / str(steps), rounds=3, local_training=steps, small=Tilted)
        for steps in (1, 7)
    )
    assert all(torch.equal(pools(lazy)[pool], pools(busy)[pool]) for pool in FACTOR)
    assert not torch.equal(pools(lazy)["double"], torch.zeros(2, 2))


@pytest.mark.parametrize("mode", ["merged", "periodic"])
def test_equal_models_have_nothing_to_teach_each_other(tmp_path, mode):
    method = Codistillation(mode, alpha=1.0, **PLAIN)
    loop = run(method, tmp_path, large=Tilted, small=Tilted, local_training=0)
    for found in pools(loop).values():
        torch.testing.assert_close(found, Tilted().linear.weight.detach(), atol=1e-6, rtol=0)
    assert loop.history[0]["metrics"]["distil/loss"] == pytest.approx(0, abs=1e-6)


def test_three_pools_learn_from_the_mean_of_the_others(tmp_path):
    loop = toy(Codistillation(alpha=1.0, sharing="disjoint", **PLAIN), tmp_path, small=Tilted)
    loop.runtime.factories["third"] = Linear
    loop.run()
    start = Tilted().linear.weight.detach().numpy().astype(float)
    teacher = (softmax(start) + 0.5) / 2  # for the large model: the small one and the third, which has no opinion
    expected = -2 * (0.5 - teacher) / 2
    torch.testing.assert_close(pools(loop)["double"], torch.tensor(expected).float())
    # nobody was heard of the third pool
    assert torch.equal(pools(loop)["third"], torch.zeros(2, 2))


@pytest.mark.parametrize("settings", [{}, {"mode": "periodic", "period": 2, "sharing": "disjoint"}])
def test_a_resumed_run_equals_the_straight_one(tmp_path, settings):
    def make(folder):
        return toy(Codistillation(**settings), folder, rounds=5, local_training=3, client_fraction=0.5, small=Tilted)

    straight = make(tmp_path / "straight")
    straight.run()
    crashed = make(tmp_path / "crashed")
    crashed.rounds = 2
    crashed.run()
    resumed = make(tmp_path / "crashed")
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)
    assert all(torch.equal(pools(resumed)[pool], pools(straight)[pool]) for pool in FACTOR)


def test_it_works_through_a_lossy_link_and_can_be_estimated(tmp_path):
    loop = toy(Codistillation(), tmp_path, rounds=2, upload=[Quantize(8)])
    estimated = estimate_bytes(loop)
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    sent = {row.client: row.bytes for row in loop.ledger.rows() if row.direction == "down" and row.round == 1}
    assert estimated["down"] == sent


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: {**t, "double/linear.weight": torch.zeros(3, 2)}, "expected [2, 2]"),
        (lambda t: {"linear/linear.weight": t["linear/linear.weight"]}, "tensors missing"),
        (lambda t: {**t, "third/linear.weight": torch.zeros(2, 2)}, "no tensor 'third/linear.weight'"),
    ],
)
def test_an_upload_with_one_bad_model_is_refused_whole(tmp_path, spoil, reason):
    loop, alone = (toy(Codistillation(alpha=0.0), tmp_path / name) for name in "ab")
    update = loop.method.local_update

    def bad(client, download):
        message = yield from update(client, download)
        return dataclasses.replace(message, tensors=spoil(dict(message.tensors))) if client.id == 1 else message

    loop.method.local_update = bad
    loop.run()
    assert reason in loop.history[0]["refused"]["1"]
    alone.cohort = lambda round: ([0], [])
    alone.run()
    assert all(torch.equal(pools(loop)[pool], pools(alone)[pool]) for pool in FACTOR)


def test_one_model_is_no_pools_and_the_student_is_the_smallest(tmp_path):
    with pytest.raises(UserError, match="two different models"):
        federation(Codistillation(), tmp_path).run()
    other = toy(Codistillation(), tmp_path)
    other.server.student = MLP(hidden=[3], num_classes=2, input_shape=(2, 1, 1))
    with pytest.raises(UserError, match="must be the model of the first of the specialists"):
        other.run()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"alpha": 1.5}, "alpha must be"), ({"period": 0}, "period must be"), ({"temperature": 0.0}, "temperature")],
)
def test_settings_that_make_no_sense(settings, reason):
    with pytest.raises(UserError, match=reason):
        Codistillation(**settings)


def test_the_model_of_every_pool_is_evaluated(tmp_path):
    tree = {
        "name": "pools",
        "method": "codistillation",
        "data": "digits",
        "federation": {"clients": 4, "rounds": 1},
        "specialists": [{"target": "mlp", "args": {"hidden": [4]}}, {"target": "mlp", "args": {"hidden": [16]}}],
        "student": "${specialists.0}",
        "local_training": {"steps": 2},
        "server_distil": {"steps": 1},
        "callbacks": [],
    }
    metrics = runs.run_recipe(from_mapping(tree), tmp_path / "run")["metrics"]
    pools = {key.split("/")[1]: value for key, value in metrics.items() if key.startswith("pools/") and "/test/" in key}
    assert list(pools) == ["mlp", "mlp-1"]
    assert pools["mlp"] == metrics["student/test/accuracy"]
