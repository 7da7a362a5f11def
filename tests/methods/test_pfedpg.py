"""Prompts made at the server on the toy federation, where the weights of a linear model are the prompts."""

import pytest
import torch
from torch import nn

import tests.toy
from fdl.errors import RejectedMessageError, UserError
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.messages import Parameters
from fdl.methods.fedavg import FedAvg
from fdl.methods.pfedpg import PFedPG
from fdl.modules.site_prompts import SitePromptGenerator
from tests.test_loop import outcome
from tests.toy import E0, Linear, federation, samples, weight


class Headed(Linear):
    """A linear model and a bias, which no generator makes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(2))

    def forward(self, x, features=()):
        output = super().forward(x)
        return type(output)(logits=output.logits + self.head, embedding=output.embedding, features={})


def run(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.run()
    return loop


def random_generator():
    generator = SitePromptGenerator(
        torch.randn(3, 4), clients=2, width=5, stream=torch.Generator().manual_seed(0)
    ).double()
    with torch.no_grad():
        generator.out.normal_()
    return generator


def test_the_shared_tokens_move_as_in_fedavg_at_first(tmp_path):
    """Nothing is added to them yet: ∂P_k / ∂B is then the identity."""
    made, plain = (
        run(PFedPG(steps=1, lr=1.0), tmp_path / "a", local_training=3),
        run(FedAvg(), tmp_path / "b", local_training=3),
    )
    torch.testing.assert_close(made.server.state["generator"]["base"], weight(plain.server.student))
    assert made.server.state["generator"]["out"].any()


def test_a_step_follows_the_slope_of_what_the_sites_asked_for(tmp_path):
    torch.manual_seed(0)
    loop = federation(PFedPG(width=5, steps=1, lr=0.003), tmp_path)
    method, server = loop.method, loop.server
    method.setup(server, loop.clients)
    server.state["generator"]["out"].normal_()
    before = {name: tensor.clone() for name, tensor in server.state["generator"].items()}
    changes, counts = torch.randn(2, 2, 2), (1, 3)
    aggregate = method.aggregate(server)
    for client, count in enumerate(counts):
        aggregate.add(Parameters({"linear.weight": changes[client]}, samples=count), client)

    def asked(state):
        generator = SitePromptGenerator(state["base"], 2, 5, torch.Generator()).double()
        generator.load_state_dict(state)
        with torch.no_grad():
            return sum(n / 4 * (generator(k) * changes[k]).sum().item() for k, n in enumerate(counts))

    method.server_update(server, aggregate.result())
    for name, index in (("base", (1, 0)), ("queries", (0, 2)), ("queries", (1, 4)), ("read", (1, 3)), ("out", (2, 1))):
        ends = []
        for sign in (1, -1):
            state = {key: tensor.double() for key, tensor in before.items()}
            state[name][index] += sign * 1e-5
            ends.append(asked(state))
        moved = server.state["generator"][name][index] - before[name][index]
        assert moved.item() == pytest.approx(0.003 * (ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("lr", [0.5, 8.0])
def test_a_round_never_leads_away_from_what_the_sites_asked_for(lr):
    torch.manual_seed(0)
    generator = SitePromptGenerator(
        0.1 * torch.randn(20, 6), clients=2, width=16, stream=torch.Generator().manual_seed(0)
    )
    for _ in range(6):
        with torch.no_grad():
            wanted = {k: generator(k) + torch.randn(20, 6) for k in (0, 1)}
        PFedPG(lr=lr)._descend(generator, wanted, {0: 0.25, 1: 0.75})
        with torch.no_grad():
            left = sum(share * (generator(k) - wanted[k]).square().mean() for k, share in ((0, 0.25), (1, 0.75)))
        assert left < 0.95


def test_sites_that_disagree_get_prompts_of_their_own(tmp_path):
    """Both see x = (1, 0), and call it by different names: a mean of prompts is right for one of them at most."""
    loop = federation(PFedPG(width=16, steps=20), tmp_path, rounds=12)
    loop.clients[1]._train = samples([E0] * 3, [1] * 3)
    loop.clients[1].update_data()
    loop.run()
    for client, label in enumerate((0, 1)):
        made = loop.method.download(loop.server, client).tensors["linear.weight"]
        assert made[label, 0] > made[1 - label, 0]
    misfits = [record["metrics"]["misfit"] for record in loop.history]
    assert misfits[-1] < misfits[0] / 2


def test_what_is_not_made_stays_at_the_site(tmp_path, monkeypatch):
    monkeypatch.setattr(tests.toy, "Linear", Headed)
    method = PFedPG(prompts=["linear.*"])
    sizes = estimate_bytes(federation(method, tmp_path / "estimate"))
    loop = run(method, tmp_path / "run")
    sent = {d: {r.client: r.bytes for r in loop.ledger.rows() if r.direction == d} for d in ("down", "up")}
    assert sizes == sent
    assert not loop.server.student.head.any()
    first, second = (client.state["specialist"]["head"] for client in loop.clients)
    assert first[0] > 0 > second[0]


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    settings = {"rounds": 4, "local_training": 2, "client_fraction": 0.5, "dropout": 0.2}
    straight = run(PFedPG(), tmp_path / "straight", **settings)
    crashed = federation(PFedPG(), tmp_path / "crashed", **settings)
    crashed.rounds = 2
    crashed.run()
    resumed = federation(PFedPG(), tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2 and outcome(resumed) == outcome(straight)
    for name, tensor in straight.server.state["generator"].items():
        assert torch.equal(resumed.server.state["generator"][name], tensor)


def test_without_a_query_there_are_prompts_too():
    generator = random_generator()
    zero = random_generator()
    with torch.no_grad():
        zero.load_state_dict(generator.state_dict())
        zero.queries[0] = 0
    assert torch.equal(generator(None), zero(0)) and not torch.allclose(generator(None), generator(1))


def test_what_does_not_fit_is_refused_and_settings_are_checked(tmp_path):
    loop = federation(PFedPG(), tmp_path)
    aggregate = loop.method.aggregate(loop.server)
    with pytest.raises(RejectedMessageError, match="shape"):
        aggregate.add(Parameters({"linear.weight": torch.zeros(3, 2)}, samples=1), 0)
    assert aggregate.result() is None
    with pytest.raises(UserError, match=r"prompts: nothing .* called '\*\.shared'; there are linear.weight"):
        run(PFedPG(prompts=["*.shared"]), tmp_path / "other")
    for settings, reason in (
        ({"width": 0}, "width must be"),
        ({"steps": 0}, "steps must be"),
        ({"lr": 0.0}, "lr must be"),
    ):
        with pytest.raises(UserError, match=reason):
            PFedPG(**settings)
