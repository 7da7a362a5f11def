"""Group knowledge transfer on the toy federation, whose extractor is the identity: features are the private samples."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fdl.build import build
from fdl.comm.codec import Codec
from fdl.comm.stages.entropy import Deflate
from fdl.comm.stages.quantize import Quantize
from fdl.comm.wire import pack, unpack
from fdl.errors import RejectedMessageError, UserError
from fdl.messages.private_features import PrivateFeatures
from fdl.methods.fedgkt import FedGKT
from fdl.methods.single_site import SingleSite
from fdl.modules.base import FederatedModule
from fdl.modules.output import Output
from fdl.recipe import from_mapping
from tests.test_loop import Crash, outcome
from tests.toy import federation, weight


def toy(folder, rounds=1, **settings):
    method = settings.pop("method", None) or FedGKT(**settings.pop("args", {}))
    return federation(method, folder, rounds=rounds, **settings)


def sigma(z):
    return 1 / (1 + math.exp(-z))


def test_two_rounds_by_hand(tmp_path):
    loop = toy(tmp_path, rounds=2, args={"weight": 0.5})
    loop.run()
    # Round 1. Clients: one step of CE, margin ½, so they say σ(1). Server: one sample of column 0, three of column 1,
    # at p = ½: CE pulls by ½, the clients' answers by ½ (σ(1) - ½); a quarter and three quarters of it.
    pull = 0.5 + 0.5 * (sigma(1.0) - 0.5)
    tail = [0.25 * pull, 0.75 * pull]
    # Round 2. Clients: CE from σ(1), and half of the way to the server's answers σ(2 tail).
    own = [0.5 + (1 - sigma(1.0)) + 0.5 * (sigma(2 * t) - sigma(1.0)) for t in tail]
    for share, c in ((0.25, 0), (0.75, 1)):
        p = sigma(2 * tail[c])
        tail[c] += share * ((1 - p) + 0.5 * (sigma(2 * own[c]) - p))
    clients = [client.state["specialist"]["linear.weight"] for client in loop.clients]
    torch.testing.assert_close(clients[0], torch.tensor([[own[0], 0.0], [-own[0], 0.0]]))
    torch.testing.assert_close(clients[1], torch.tensor([[0.0, -own[1]], [0.0, own[1]]]))
    torch.testing.assert_close(weight(loop.server.teacher), torch.tensor([[tail[0], -tail[1]], [-tail[0], tail[1]]]))
    answers = loop.server.state["predictions"]
    torch.testing.assert_close(answers["1"], torch.tensor([[-tail[1], tail[1]]] * 3))


def test_without_distillation_clients_train_alone(tmp_path):
    split = toy(tmp_path / "a", rounds=3, args={"weight": 0.0}, local_training=2)
    alone = toy(tmp_path / "b", rounds=3, method=SingleSite(), local_training=2)
    split.run(), alone.run()
    for one, other in zip(split.clients, alone.clients):
        assert torch.equal(one.state["specialist"]["linear.weight"], other.state["specialist"]["linear.weight"])


def test_the_models_that_are_evaluated_are_extractors_below_the_servers(tmp_path):
    loop = toy(tmp_path)
    loop.run()
    # a client alone knows one of the two test samples, and guesses class 0 for the other; the server's model knows both
    assert loop.history[0]["metrics"]["specialists/test/accuracy"] == 1.0
    with loop.clients[0].turn():
        joined = loop.method.client_model(loop.server, loop.clients[0])
        x, _ = loop.server.test.batch(torch.arange(2))
        torch.testing.assert_close(joined(x).logits, x.flatten(1) @ weight(loop.server.teacher).T)


def test_features_of_a_layer_keep_their_shape_for_the_server(tmp_path):
    class Convolution(FederatedModule):
        input_shape = (1, 3, 3)

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x, features=()):
            assert x.shape[1:] == (1, 3, 3)
            return Output(self.layer(x).flatten(1)[:, :2], x.flatten(1), {"here": x})

    method, module = FedGKT("here"), Convolution()
    features = method._features(module, torch.arange(18.0).view(2, 1, 3, 3))
    assert features.shape == (2, 9)
    assert torch.equal(method._reshape(module, features), torch.arange(18.0).view(2, 1, 3, 3))


def test_the_ledger_says_loudly_what_leaves(tmp_path):
    loop = toy(tmp_path, rounds=2)
    loop.run()
    assert set(loop.ledger.by_kind()) == {"up/private_features", "down/responses"}


@pytest.mark.parametrize("crash_in", [2, 3])
def test_a_resumed_run_equals_the_straight_one(tmp_path, crash_in):
    settings = {"rounds": 4, "local_training": 2, "server_distil": 2, "client_fraction": 0.5}
    straight = toy(tmp_path / "straight", **settings)
    straight.run()
    crashed = toy(tmp_path / "crashed", callbacks=[Crash(crash_in)], **settings)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = toy(tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert outcome(resumed) == outcome(straight)
    assert torch.equal(
        resumed.server.state["teacher"]["linear.weight"], straight.server.state["teacher"]["linear.weight"]
    )


def message(features=(3, 4), logits=(3, 2), labels=(0, 1, 1)):
    return PrivateFeatures(torch.rand(features), torch.rand(logits), torch.tensor(labels))


def test_the_message_crosses_the_wire():
    sent = message()
    for codec, tolerance in ((Codec(), 0.0), (Codec([Quantize(8), Deflate()]), 0.01)):
        packed = pack(sent, codec, client=1, round=2, rng=np.random.default_rng(0))
        got = unpack(packed, codec, client=1, round=2, limit=1 << 20)
        assert torch.equal(got.labels, sent.labels)
        torch.testing.assert_close(got.features, sent.features, atol=tolerance, rtol=0)
        torch.testing.assert_close(got.logits, sent.logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (message(features=(2, 4)), "2 features with 3 labels"),
        (message(logits=(3, 3)), "labels of 2 classes, got 3, 2"),
        (message(labels=(0, 1, 2)), "labels of 2 classes, got 2, 3"),
        (message(labels=(0, 1, -1)), "negative"),
        (message(features=(3, 5)), r"expected features \[n, 4\], got \[3, 5\]"),
        (PrivateFeatures(torch.full((1, 4), torch.nan), torch.zeros(1, 2), torch.tensor([0])), "not finite"),
    ],
)
def test_uploads_that_do_not_fit_are_refused(bad, reason):
    from fdl.methods.fedgkt import _FeatureCollection

    everything = _FeatureCollection(2, 4)
    with pytest.raises(RejectedMessageError, match=reason):
        everything.add(bad, 0)
    assert everything.result() is None


def test_a_server_model_for_other_inputs_is_refused(tmp_path):
    recipe = {
        "name": "gkt",
        "method": "fedgkt",
        "data": "digits",
        "specialists": [{"target": "mlp", "args": {"hidden": [32]}}],
        "teacher": "mlp",
        "callbacks": [],
    }
    loop = build(from_mapping(recipe), tmp_path)
    with pytest.raises(UserError, match=r"takes inputs of \[1, 8, 8\], but mlp sends 32 features"):
        loop.set_up()
