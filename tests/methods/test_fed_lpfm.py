"""Fed-LPFM on the toy federation: foundation models with known weights, and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from fdl.datamodules.arrivals import ClassIncremental, ScheduledSamples
from fdl.errors import UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.aggregation.server_optimizers import Adam
from fdl.knowledge.distillation.cost_model import prediction_flops, samples_seen, training_flops, weight_bytes
from fdl.methods.fed_lpfm import FedLPFM
from fdl.methods.fedavg import FedAvg
from fdl.modules.small_classifiers import CNN, MLP
from fdl.recipe import Component, Fit
from tests.test_loop import outcome
from tests.toy import E0, E1, Linear, federation, samples, weight

T0, T1 = 1.5, -0.5
"""What the foundation model says of each client's input, as a margin for the right class."""


class Foundation(Linear):
    """Logits (T0, 0) for x = (1, 0), and (0, T1) for x = (0, 1)."""

    def __init__(self):
        super().__init__()
        self.linear.weight.data = torch.tensor([[T0, 0.0], [0.0, T1]])


class Second(Linear):
    """Logits (0.4, 0) and (0, 0.2)."""

    def __init__(self):
        super().__init__()
        self.linear.weight.data = torch.tensor([[0.4, 0.0], [0.0, 0.2]])


def sigma(z):
    return 1 / (1 + math.exp(-z))


def toy(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.runtime.factories |= {"linear": Foundation, "second": Second}
    return loop


def run(method, folder, **settings):
    loop = toy(method, folder, **settings)
    loop.run()
    return loop


def averaged(first, second):
    """The student's weights where the two clients' proxies have these margins."""
    return torch.tensor([[0.25 * first, -0.75 * second], [-0.25 * first, 0.75 * second]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_one_step_towards_labels_and_foundation_model(tmp_path, share, temperature):
    # from p = ½: labels pull by ½, the foundation model by T (σ(t / T) - ½)
    first, second = ((1 - share) * 0.5 + share * temperature * (sigma(t / temperature) - 0.5) for t in (T0, T1))
    loop = run(FedLPFM(share, temperature), tmp_path)
    torch.testing.assert_close(weight(loop.server.student), averaged(first, second))


def test_the_second_step_sees_the_same_answers(tmp_path):
    share, margins = 0.4, []
    for t in (T0, T1):
        z = 0.0
        for _ in range(2):
            z -= (1 - share) * (sigma(2 * z) - 1) + share * (sigma(2 * z) - sigma(t))
        margins.append(z)
    torch.testing.assert_close(
        weight(run(FedLPFM(share), tmp_path, local_training=2).server.student), averaged(*margins)
    )


def test_two_models_teach_by_their_mean_probability(tmp_path):
    first, second = ((sigma(a) + sigma(b)) / 2 - 0.5 for a, b in ((T0, 0.4), (T1, 0.2)))
    loop = run(FedLPFM(1.0, models=2), tmp_path)
    torch.testing.assert_close(weight(loop.server.student), averaged(first, second))


def test_losses_of_logits_take_the_mean_of_logits(tmp_path):
    # squared error, mean over two classes: the gradient is the difference of logits itself
    loop = run(FedLPFM(1.0, loss="mse", models=2), tmp_path)
    expected = torch.tensor([[0.25 * (T0 + 0.4) / 2, 0.0], [0.0, 0.75 * (T1 + 0.2) / 2]])
    torch.testing.assert_close(weight(loop.server.student), expected)


def test_without_weight_it_is_fedavg(tmp_path):
    settings = {"rounds": 3, "local_training": 3}
    taught = run(FedLPFM(0.0, optimizer=Adam()), tmp_path / "a", **settings)
    plain = run(FedAvg(Adam()), tmp_path / "b", **settings)
    assert outcome(taught) == outcome(plain)


def test_only_the_proxy_travels_and_no_foundation_model_is_saved(tmp_path):
    taught, plain = run(FedLPFM(0.5), tmp_path / "a", rounds=2), run(FedAvg(), tmp_path / "b", rounds=2)
    assert taught.ledger.by_kind() == plain.ledger.by_kind()
    assert estimate_bytes(taught) == estimate_bytes(plain)
    assert all(client.state == {} for client in taught.clients)
    assert torch.equal(weight(taught.runtime.shared_module("linear")), Foundation().linear.weight)


def test_fine_tuning_happens_once_at_every_site_from_the_public_weights(tmp_path):
    loop = run(FedLPFM(1.0, fine_tune=True), tmp_path, rounds=2)
    # one step on the own sample moves the logits of its input by ±(1 - σ(t)); the other column is the public one
    tuned = [t + 2 * (1 - sigma(t)) for t in (T0, T1)]
    for client, margin in zip(loop.clients, tuned):
        own = client.state["predictions"][0, client.id].item()
        assert own == pytest.approx(sigma(margin), rel=1e-5)
    assert torch.equal(weight(loop.runtime.shared_module("linear")), Foundation().linear.weight)
    fits = [[name for name in r["clients"]["0"] if name.startswith("fine_tune")] for r in loop.history]
    assert fits == [["fine_tune/0/loss"], []]
    margins = []
    for margin in tuned:  # two rounds of one step, each from the average, whose columns are ¼ and ¾ of a client's
        margins.append(sigma(margin) - 0.5)
    after = []
    for first, margin, part in zip(margins, tuned, (0.25, 0.75)):
        start = part * first
        after.append(part * (start + sigma(margin) - sigma(2 * start)) + (1 - part) * start)
    expected = torch.tensor([[after[0], -after[1]], [-after[0], after[1]]])
    torch.testing.assert_close(weight(loop.server.student), expected)


def staged(folder, rounds):
    """Client 0 has (1, 0) of class 0 in round 1, and (0, 1) of class 1 in its place from round 2 on."""
    loop = toy(FedLPFM(1.0, fine_tune=True), folder, rounds=rounds)
    arrival, assigned = ClassIncremental(stages=2), np.array([0, 1])
    for participant in (*loop.clients, loop.server):
        participant.arrival = arrival
    loop.clients[0]._train = ScheduledSamples(samples([E0, E1], [0, 1]), assigned, arrival)
    loop.clients[0].update_data()
    return loop


def test_fine_tuned_models_learn_and_answer_what_arrives_later(tmp_path):
    loop = staged(tmp_path / "straight", 3)
    loop.run()
    fits = [[name for name in r["clients"]["0"] if name.startswith("fine_tune")] for r in loop.history]
    assert fits == [["fine_tune/0/loss"], ["fine_tune/0/loss"], []]
    # logits of (0, 1) are (0, T1): one step from there, not from what was tuned on (1, 0)
    own = loop.clients[0].state["predictions"]
    assert own[0, 1].item() == pytest.approx(sigma(T1 + 2 * (1 - sigma(T1))), rel=1e-5)
    crashed = staged(tmp_path / "crashed", 2)
    crashed.run()
    resumed = staged(tmp_path / "crashed", 3)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2 and outcome(resumed) == outcome(loop)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_resumed_run_equals_the_straight_one(tmp_path, fine_tune):
    settings = {"rounds": 4, "local_training": 3, "client_fraction": 0.5}
    method = FedLPFM(0.5, models=2, fine_tune=fine_tune)
    straight = run(method, tmp_path / "straight", **settings)
    crashed = toy(method, tmp_path / "crashed", **settings)
    crashed.rounds = 2
    crashed.run()
    resumed = toy(method, tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)


def test_costs_are_noted(tmp_path):
    loop = run(FedLPFM(0.5, models=2), tmp_path, local_training=2)
    # a 2×2 product is 8 operations; backward one more for the weights, none for the inputs
    for client, count in ((0, 1), (1, 3)):
        noted = loop.history[0]["clients"][str(client)]
        assert noted["flops/proxy_an_answer"] == 8
        assert noted["flops/training_a_round"] == 2 * count * 16
        assert noted["flops/foundation_models_once"] == count * 2 * 8
        assert (noted["bytes/foundation_models"], noted["bytes/proxy"]) == (32, 16)


def test_counting_leaves_statistics_and_gradients_alone(tmp_path):
    client = toy(FedLPFM(), tmp_path).clients[0]
    client.train = samples([torch.rand(1, 8, 8).tolist()], [0])
    cnn = CNN(channels=[4], norm="batch", embedding=6, num_classes=3, input_shape=(1, 8, 8))
    before = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    # 3×3 convolution of 8×8 pixels, then two linear layers
    forward = 2 * 9 * 4 * 64 + 2 * sum(
        layer.weight.numel() for layer in cnn.modules() if type(layer) is torch.nn.Linear
    )
    assert prediction_flops(client, cnn) == forward
    # backward: weights' gradients for every layer, inputs' for all but the first
    assert training_flops(client, cnn) == 3 * forward - 2 * 9 * 4 * 64
    assert all(torch.equal(tensor, before[name]) for name, tensor in cnn.state_dict().items())
    assert all(parameter.grad is None for parameter in cnn.parameters())
    mlp = MLP(hidden=[], num_classes=3, input_shape=(1, 8, 8))
    assert weight_bytes(mlp) == 4 * (64 * 3 + 3)


@pytest.mark.parametrize(
    ("count", "config", "seen"),
    [
        (10, {"epochs": 3}, 30),
        (10, {"steps": 4}, 14),
        (10, {"steps": 3}, 10),
        (100, {"steps": 2}, 8),
        (3, {"steps": 5}, 15),
    ],
)
def test_samples_seen_are_those_that_batches_draw(count, config, seen):
    from fdl.engine.batches import batches

    fit = Fit(batch_size=4, optimizer=Component("sgd"), **config)
    assert samples_seen(count, fit) == seen
    assert sum(len(indices) for _, indices in batches(count, fit, torch.Generator())) == seen


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": 1.1}, "weight must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"loss": "k1"}, "loss must be one of kl"),
        ({"models": 0}, "models must be"),
    ],
)
def test_settings_that_make_no_sense(settings, reason):
    with pytest.raises(UserError, match=reason):
        FedLPFM(**settings)


def test_more_models_than_there_are(tmp_path):
    with pytest.raises(UserError, match="3 at a client, but specialists has 2"):
        run(FedLPFM(models=3), tmp_path)
