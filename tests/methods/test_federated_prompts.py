"""Shared and personal parts on the toy federation, where both are weights of one linear model."""

import json
import math

import pytest
import torch
from torch import nn

import tests.toy
from fdl.errors import UserError
from fdl.knowledge.aggregation.server_optimizers import Adam
from fdl.methods.fedavg import FedAvg
from fdl.methods.federated_prompts import FederatedPrompts
from fdl.modules.output import Output
from tests.test_loop import Crash, outcome
from tests.toy import Linear, federation


class Both(Linear):
    """Logits are those of a shared linear model plus those of a personal one; both start at zero."""

    def __init__(self):
        super().__init__()
        self.personal = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x, features=()):
        x = x.flatten(1)
        return Output(logits=self.linear(x) + x @ self.personal.T, embedding=x, features={})


@pytest.fixture
def both(monkeypatch):
    monkeypatch.setattr(tests.toy, "Linear", Both)


def run(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.run()
    return loop


@pytest.mark.parametrize("optimizer", [None, Adam])
def test_with_nothing_personal_it_is_fedavg_to_the_bit(tmp_path, both, optimizer):
    settings = {"rounds": 3, "local_training": 2, "client_fraction": 0.5, "dropout": 0.2}
    runs = [
        run(make(optimizer=optimizer and optimizer()), tmp_path / make.name, **settings)
        for make in (FedAvg, FederatedPrompts)
    ]
    assert outcome(runs[0]) == outcome(runs[1])
    assert torch.equal(*(loop.server.student.personal for loop in runs))


def test_two_rounds_by_hand(tmp_path, both):
    """Both parts get the same gradient p - 1 = -1/2 at first; then the shared one is averaged, 1 to 3."""
    loop = run(FederatedPrompts(personal_parameters=["pers*"]), tmp_path, rounds=2)
    # client 0 sees x = (1, 0) of class 0: its margin in the second round is that of mean and own part
    a = 0.25 * 0.5 + 0.5
    b = 0.75 * 0.5 + 0.5
    more_a, more_b = (1 / (1 + math.exp(2 * margin)) for margin in (a, b))
    own = [client.state["specialist"] for client in loop.clients]
    first, second = 0.5 + more_a, 0.5 + more_b
    torch.testing.assert_close(own[0]["personal"], torch.tensor([[first, 0.0], [-first, 0.0]]))
    torch.testing.assert_close(own[1]["personal"], torch.tensor([[0.0, -second], [0.0, second]]))
    left = 0.25 * (0.125 + more_a) + 0.75 * 0.125
    right = 0.75 * (0.375 + more_b) + 0.25 * 0.375
    torch.testing.assert_close(
        loop.server.student.linear.weight.detach(), torch.tensor([[left, -right], [-left, right]])
    )
    assert torch.equal(loop.server.student.personal.detach(), torch.zeros(2, 2))


def test_personal_parts_never_leave_their_site(tmp_path, both):
    loop = federation(FederatedPrompts(personal_parameters=["personal"]), tmp_path)
    sent = []
    for name in ("upload", "download"):
        carry = getattr(loop.channel, name)

        def spy(message, *rest, carry=carry):
            sent.append(set(message.tensors))
            return carry(message, *rest)

        setattr(loop.channel, name, spy)
    loop.run()
    assert sent == [{"linear.weight"}] * 4
    shared = run(FederatedPrompts(), tmp_path / "all")
    fewer, all = ([row.bytes for row in one.ledger.rows()] for one in (loop, shared))
    assert all[0] - fewer[0] >= 16 and len(all) == len(fewer)


def test_what_sites_keep_survives_a_restart(tmp_path, both):
    make = lambda: FederatedPrompts(personal_parameters=["personal"])  # noqa: E731
    straight = run(make(), tmp_path / "straight", rounds=4, local_training=2)
    crashed = federation(make(), tmp_path / "crashed", rounds=4, local_training=2, callbacks=[Crash(3)])
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = federation(make(), tmp_path / "crashed", rounds=4, local_training=2)
    resumed.run(resume=True)
    kept = [
        json.dumps([client.state["specialist"]["personal"].tolist() for client in loop.clients])
        for loop in (straight, resumed)
    ]
    assert outcome(resumed) == outcome(straight) and kept[0] == kept[1]
    assert "specialists/test/accuracy" in straight.history[-1]["metrics"]


def test_patterns_must_fit(tmp_path, both):
    with pytest.raises(UserError, match=r"called 'prompt\*'; there are personal, linear.weight"):
        run(FederatedPrompts(personal_parameters=["prompt*"]), tmp_path / "a")
    with pytest.raises(UserError, match="nothing is left to share"):
        run(FederatedPrompts(personal_parameters=["*"]), tmp_path / "b")
