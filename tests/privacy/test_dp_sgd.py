"""DP-SGD against a loop over examples, ordinary SGD on the same batches, and its own account."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional as F

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")

from fdl.build import build
from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.errors import RecipeError, UserError
from fdl.federation import snapshot
from fdl.federation.executors import Sequential
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.methods.fedprox import ProximalObjective
from fdl.modules.output import Output
from fdl.modules.tuning import apply_tuning
from fdl.participants import Client, copy_of
from fdl.privacy.accounting import Policy, events_of
from fdl.privacy.dp_sgd import DPSGD, poisson
from fdl.recipe import Component, Fit, from_mapping
from fdl.runs.model_card import model_card

N, B = 12, 4


class Net(LightningModule):
    """A small network with a normalisation that looks at one example."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, tuning: str = "full"):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        if tuning != "full":
            lora = {"rank": 2} if tuning == "lora" else None
            apply_tuning(self, tuning, ("head",), lora, pretrained=True)

    def forward(self, x, features=()):
        embedding = self.body(x.flatten(1))
        return Output(self.head(embedding), embedding, {})

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        return {"loss": F.cross_entropy(self(x).logits, y)}


def client_of(factory=Net, n=N, steps=1, batch_size=B, optimizer=None, **settings):
    generator = torch.Generator().manual_seed(0)
    train = TensorSamples(torch.randn(n, 6, generator=generator), torch.arange(n) % 3)
    local = Fit(epochs=None, steps=steps, batch_size=batch_size, optimizer=optimizer or Component("sgd", {"lr": 0.5}))
    policy = Policy(1e-5, settings.pop("epsilon", None), "rdp")
    settings = {"clip": 0.5, "noise_multiplier": 0.0, "turns": Counter({0: 1}), **settings}
    runtime = Runtime(accelerator="cpu")
    runtime.factories["net"] = factory
    client = Client(
        id=0, architecture="net", train=train, calibration=train.subset([0]), runtime=runtime, seed=3,
        local_training=local, server_distil=local, client_distil=local, proxy=train.unlabelled(), num_classes=3,
        privacy=policy, dp_sgd=DPSGD(policy, **settings),
    )  # fmt: skip
    client.start_round(1)
    return client, train


def fitted(client, objective=None, samples=None):
    with client.turn():
        module = client.specialist()
        before = copy_of(module)
        client.fit(module, client.train if samples is None else samples, client.local_training, objective)
        client.save_specialist(module)
        after = copy_of(module)
    return module, before, {name: after[name] - before[name] for name in after}


def reset(module, before):
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in before:
                value.copy_(before[name])


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("tuning", ["full", "head", "lora"])
def test_step_is_the_sum_of_clipped_gradients_of_single_examples(tuning, ghost):
    client, train = client_of(lambda: Net(tuning=tuning), ghost=ghost)
    module, before, change = fitted(client)
    reset(module, before)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert (len(trained) < len(list(module.parameters()))) == (tuning != "full")
    sums, norms = {name: torch.zeros_like(p) for name, p in trained.items()}, []
    for index in next(poisson(N, B / N, 1, client.rng("fit"))):
        loss = module.training_step(train.batch(index.view(1)))["loss"]
        gradients = torch.autograd.grad(loss, list(trained.values()))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        for name, gradient in zip(trained, gradients):
            sums[name] += gradient * min(1.0, 0.5 / norms[-1])
    assert max(norms) > 0.5  # or nothing was clipped
    for name in change:
        expected = -0.5 * sums[name] / B if name in sums else torch.zeros_like(change[name])
        torch.testing.assert_close(change[name], expected, rtol=1e-4, atol=1e-6)


def test_without_noise_and_clipping_it_is_sgd_on_the_same_batches():
    momentum = Component("sgd", {"lr": 0.1, "momentum": 0.9})
    client, train = client_of(steps=7, optimizer=momentum, clip=1e9)
    module, before, change = fitted(client)
    reset(module, before)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for indices in poisson(N, B / N, 7, client.rng("fit")):
        optimizer.zero_grad()
        if len(indices):
            (module.training_step(train.batch(indices))["loss"] * len(indices) / B).backward()
        else:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, value in copy_of(module).items():
        torch.testing.assert_close(before[name] + change[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ghost", [False, True])
def test_noise_has_its_size_and_batches_may_be_empty(ghost):
    big = lambda: Net(tuning="full")  # noqa: E731
    steps, batches = 40, poisson(N, 1 / N, 40, client_of(big)[0].rng("fit"))
    assert any(len(indices) == 0 for indices in batches)
    settings = {"steps": steps, "batch_size": 1, "clip": 1e-4, "ghost": ghost}
    change = fitted(client_of(big, noise_multiplier=2.0, **settings)[0])[2]
    noise = torch.cat([value.flatten() for value in change.values()])
    # each step adds lr · z · C / B; gradients of norm C are far less
    assert float(noise.std()) == pytest.approx(0.5 * 2.0 * 1e-4 * math.sqrt(steps), rel=0.25)
    again = fitted(client_of(big, noise_multiplier=2.0, **settings)[0])[2]
    assert all(torch.equal(change[name], again[name]) for name in change)


@pytest.mark.parametrize("ghost", [False, True])
def test_batches_may_be_taken_in_parts(ghost):
    whole, parts = (fitted(client_of(steps=3, chunk=c, ghost=ghost, noise_multiplier=1.0)[0])[2] for c in (None, 2))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_both_ways_of_clipping_agree():
    fast, ghost = (fitted(client_of(steps=5, ghost=way, noise_multiplier=1.0)[0])[2] for way in (False, True))
    for name in fast:
        torch.testing.assert_close(fast[name], ghost[name], rtol=1e-4, atol=1e-6)


def test_an_objective_is_clipped_whole():
    # FedProx: the gradient of an example is that of its loss and of the proximal term
    client, train = client_of()
    anchor = [torch.ones_like(parameter) for parameter in Net().parameters()]
    module, before, change = fitted(client, ProximalObjective(anchor, 0.1, False))
    reset(module, before)
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for index in next(poisson(N, B / N, 1, client.rng("fit"))):
        loss = ProximalObjective(anchor, 0.1, False)(module, train.batch(index.view(1)))["loss"]
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for name, gradient in zip(expected, gradients):
            expected[name] -= 0.5 / B * gradient * min(1.0, 0.5 / norm)
    for name, value in expected.items():
        torch.testing.assert_close(change[name], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"privacy\.ghost_clipping.*looks at weights.*set it to false"):
        fitted(client_of(ghost=True)[0], ProximalObjective(anchor, 0.1, False))


def test_answers_beside_private_samples_are_private_and_public_samples_are_not():
    client, _ = client_of(noise_multiplier=1.0)
    teach = lambda module, batch: {"loss": (module(batch[0]).logits - batch[1]).square().mean()}  # noqa: E731
    fitted(client, teach, SoftLabelled(client.train, torch.zeros(N, 3)))
    assert sum(one["count"] for one in events_of(client)) == 1
    fitted(client, teach, SoftLabelled(client.proxy, torch.zeros(N, 3)))
    assert sum(one["count"] for one in events_of(client)) == 1


class Tokens(Net):
    """Its layers see all positions of all examples in one row, and its loss only some of them."""

    def forward(self, x, features=()):
        logits = super().forward(x.repeat_interleave(2, dim=0)).logits
        return Output(logits[0::2] + logits[1::2], logits, {})

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        chosen = (y >= 0).nonzero().squeeze(1)  # how many there are depends on the data
        return {"loss": F.cross_entropy(self(x).logits[chosen], y[chosen])}


def test_examples_go_one_by_one_where_they_cannot_go_together():
    client, train = client_of(Tokens)
    module, before, change = fitted(client)
    assert list(client.dp_sgd._known.values()) == [True]
    reset(module, before)
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for index in next(poisson(N, B / N, 1, client.rng("fit"))):
        loss = module.training_step(train.batch(index.view(1)))["loss"]
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for name, gradient in zip(expected, gradients):
            expected[name] -= 0.5 / B * gradient * min(1.0, 0.5 / norm)
    for name, value in expected.items():
        torch.testing.assert_close(change[name], value, rtol=1e-4, atol=1e-6)


class Shuffled(Net):
    """Its layers see the examples in another order."""

    def forward(self, x, features=()):
        mixed = x.flatten(1)[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
        logits = self.head(self.body(mixed))
        back = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).argsort()
        return Output(logits[back] * torch.tensor([1.0, 2.0, 3.0]), logits, {})


@pytest.mark.parametrize("factory", [Tokens, Shuffled])
def test_ghost_clipping_is_refused_where_rows_are_not_examples(factory):
    # rows in another order: norms would be those of other examples
    assert torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist() != list(range(8))
    with pytest.raises(UserError, match=r"privacy\.ghost_clipping: does not fit .*set it to false"):
        fitted(client_of(factory, ghost=True)[0])


def test_ghost_clipping_is_refused_where_examples_have_weights():
    weights = torch.tensor([1.0, 2.0, 5.0])
    weighted = lambda module, batch: {"loss": F.cross_entropy(module(batch[0]).logits, batch[1], weights)}  # noqa: E731
    with pytest.raises(UserError, match=r"privacy\.ghost_clipping: does not fit Net: its loss is no plain mean"):
        fitted(client_of(ghost=True)[0], weighted)
    fitted(client_of()[0], weighted)


def test_private_samples_are_read_by_nothing_else():
    client, _ = client_of()
    with client.turn():
        module = client.specialist()
        for read in (
            lambda: client.train.labels,
            lambda: client.predict(module, client.train),
            lambda: client.calibration_accuracy(),
            lambda: client.runtime.fit(module, client.train, client.local_training, client.rng("fit")),
            lambda: client.train.subset([0]).batch(torch.tensor([0])),
            lambda: client.train.augment,
        ):
            with pytest.raises(UserError, match="reads private samples outside of a training with noise"):
                read()
    assert len(client.train) == N == client.samples
    with client.data_gate.open():
        assert client.train.labels.tolist() == [i % 3 for i in range(N)]


@pytest.mark.parametrize("ghost", [False, True])
def test_batch_normalisation_is_refused(ghost):
    with pytest.raises(UserError, match=r"body\.1.*BatchNorm1d.*GroupNorm.*LayerNorm"):
        fitted(client_of(lambda: Net(nn.BatchNorm1d), ghost=ghost)[0])


def test_losses_that_compare_examples_are_refused():
    def contrastive(module, batch):
        z = module(batch[0]).embedding
        return {"loss": F.cross_entropy(z @ z.T, torch.arange(len(z)))}

    with pytest.raises(UserError, match="loss of Net compares the examples of a batch"):
        fitted(client_of()[0], contrastive)


def test_budget_ends_training_of_a_client():
    client, _ = client_of(steps=5, noise_multiplier=1.0, epsilon=8.0)
    spent, changed = [], []
    for round in (1, 2, 3):
        client.start_round(round)
        change = fitted(client)[2]
        changed.append(any(bool(value.any()) for value in change.values()))
        spent.append((client.metrics.get("privacy/epsilon"), client.metrics.get("privacy/exhausted")))
    account = events_of(client)
    assert changed == [True, False, False]
    assert spent == [(client.privacy.spent(account), None), (None, 1.0), (None, 1.0)]
    assert account[0]["count"] == 5
    assert spent[0][0] < 8 < client.privacy.spent([{**account[0], "count": 10}])


def recipe(*overrides, **sections):
    small = {
        "name": "private",
        "method": "federated_distillation",
        "data": {"target": "digits", "args": {"proxy": 40, "validation": 20, "test": 40}},
        "federation": {"clients": 2, "rounds": 2},
        "privacy": {"epsilon": 4.0, "delta": 1e-4, "accountant": "rdp"},
        "specialists": [{"target": "mlp", "args": {"hidden": [8]}}],
        "student": {"target": "mlp", "args": {"hidden": [8]}},
        "local_training": {"steps": 3, "batch_size": 32},
        "server_distil": {"steps": 2},
        "evaluation": {"metrics": ["accuracy"]},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
    }
    return from_mapping({**small, **sections}, overrides)


def test_spend_is_told_everywhere(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    made = recipe(callbacks=["tensorboard"], client_execution="vectorized")
    loop = build(made, tmp_path)
    assert isinstance(loop.executor, Sequential)
    summary = loop.run()
    for client in loop.clients:
        spent = client.privacy.spent(events_of(client))
        assert 0.95 * 4.0 <= spent <= 4.0  # noise was found for all rounds
        assert summary["privacy"]["clients"][str(client.id)] == spent
        assert summary["participants"][client.id]["metrics"]["privacy/epsilon"] == spent
        assert not any(key.startswith("fit/") for key in client.metrics)  # losses are not private
    first, last = (record["privacy"] for record in summary["history"])
    assert all(0 < first[client] < last[client] for client in ("0", "1"))
    assert summary["metrics"]["privacy/epsilon"] == max(last.values()) == summary["privacy"]["epsilon"]
    card = model_card(made, json.loads(json.dumps(summary, default=str)), 2, "", {})
    assert f"ε ≤ {summary['privacy']['epsilon']:.3f} at δ = 0.0001, of a budget of 4" in card
    assert "one example of a client, in or out" in card
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("clients/1/privacy/epsilon")
    assert [point.tensor_proto.float_val[0] for point in written] == pytest.approx([first["1"], last["1"]])


def test_nothing_is_private_without_an_account(tmp_path):
    summary = build(recipe("privacy=null", "federation.rounds=1"), tmp_path).run()
    assert summary["privacy"] == {"epsilon": math.inf}
    assert "ε = ∞" in model_card(recipe("privacy=null"), {**summary, "privacy": {"epsilon": None}}, 1, "", {})
    bare = recipe("privacy.noise_multiplier=0.0", "privacy.epsilon=null", "federation.rounds=1")
    summary = build(bare, tmp_path / "bare").run()
    assert summary["privacy"]["epsilon"] == math.inf
    assert "Not all that clients sent had noise: ε = ∞" in model_card(bare, summary, 1, "", {})


def test_account_survives_a_restart(tmp_path):
    whole = build(recipe(), tmp_path / "whole")
    whole.run()
    begun = build(recipe(), tmp_path / "parts")
    begun.set_up()
    begun.run_round(1)
    resumed = build(recipe(), tmp_path / "parts")
    snapshot.restore(resumed)
    assert [events_of(c) for c in resumed.clients] == [events_of(c) for c in begun.clients]
    resumed.run_round(2)
    assert [c.state["privacy"] for c in resumed.clients] == [c.state["privacy"] for c in whole.clients]
    assert resumed.history[-1]["privacy"] == whole.history[-1]["privacy"]
    for one, other in zip(whole.clients, resumed.clients):
        for name, value in one.state["specialist"].items():
            assert torch.equal(value, other.state["specialist"][name])


def test_budget_ends_the_run(tmp_path):
    ends = "privacy.on_exhausted=stop_run", "federation.rounds=9"
    loop = build(recipe("privacy.noise_multiplier=0.6", "privacy.epsilon=5", *ends), tmp_path)
    summary = loop.run()
    assert 1 < summary["rounds"] < 9
    assert loop.stopped == "the privacy budget of client 0, client 1 is spent"
    assert 0 < summary["privacy"]["epsilon"] <= 5.0


@pytest.mark.parametrize(
    ("args", "reader"),
    [
        ({"calibrate": True}, r"fdl\.knowledge\.distillation\.client_upload"),
        ({"confidence": "validation"}, r"fdl\.knowledge\.confidence"),
        ({"confidence": "density"}, r"fdl\.knowledge\.confidence\.density"),
        ({"prototypes": "prototype_transfer"}, r"fdl\.knowledge\.distillation\.client_upload"),
    ],
)
def test_what_else_is_made_of_private_data_is_refused(args, reader, tmp_path):
    loop = build(recipe(method={"target": "federated_distillation", "args": args}), tmp_path)
    with pytest.raises(UserError, match=rf"client 0.*privacy: {reader}.* reads private samples"):
        loop.run()


@pytest.mark.parametrize("method", ["fedavg", "fml", "fed_lpfm"])
def test_methods_that_only_train_work_as_they_are(method, tmp_path):
    summary = build(recipe("federation.rounds=1", method=method), tmp_path).run()
    assert 0 < summary["privacy"]["epsilon"] < 4.0


def test_rules():
    for override, problem in (
        ("privacy.epsilon=null", "privacy.epsilon: missing: give a budget"),
        ("local_training.gradient_clip=1.0", "local_training.gradient_clip: must be null under privacy"),
        ("fabric.precision=16-mixed", "fabric.precision: training with noise needs"),
        ("method=centralized", "privacy: method centralized trains on all private data in one place"),
        ("privacy.delta=1.0", "privacy.delta: must be in"),
    ):
        with pytest.raises(RecipeError, match=problem):
            recipe(override)


def test_models_with_batch_normalisation_are_refused_before_the_first_round(tmp_path):
    specialists = [{"target": "cnn", "args": {"norm": "batch"}}]
    with pytest.raises(UserError, match=r"of cnn is BatchNorm2d.*GroupNorm"):
        build(recipe(specialists=specialists), tmp_path)


def test_two_fits_of_one_name_in_a_round_have_noise_and_batches_of_their_own(monkeypatch):
    def drawn(client, fits=2):
        seen = []

        def watch(std, reference, generator=None, secure_mode=False):
            seen.append(noise_of(std=std, reference=reference, generator=generator, secure_mode=secure_mode))
            return seen[-1]

        noise_of = optimizer._generate_noise
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_generate_noise", watch)
            with client.turn():
                for _ in range(fits):
                    client.fit(client.specialist(), client.train, client.local_training)
        return torch.stack([noise.norm() for noise in seen]).view(fits, -1)

    import opacus.optimizers.optimizer as optimizer

    client, _ = client_of(noise_multiplier=1.0)
    first, second = drawn(client)
    assert not torch.equal(first, second)
    # a round that is run again, e.g. after a restart, draws what it drew, and the next round draws other noise
    client.start_round(1)
    assert torch.equal(drawn(client), torch.stack([first, second]))
    client.start_round(2)
    assert not torch.isin(drawn(client), torch.stack([first, second])).any()
    again, _ = client_of(noise_multiplier=1.0)
    assert torch.equal(drawn(again), torch.stack([first, second]))
    # who takes part is drawn anew, too
    streams = [again.noise("fit").initial_seed() for _ in range(3)]
    assert len({*streams, client_of()[0].noise("fit").initial_seed()}) == 4


def test_a_noise_seed_comes_from_a_file_or_the_environment_and_from_no_recipe(tmp_path, monkeypatch):
    secret = tmp_path / "noise"
    secret.write_text("ab" * 32 + "\n")
    secret.chmod(0o600)
    name = f"privacy.noise_seed={{file: {secret}}}"
    plain, kept = build(recipe(), tmp_path / "a"), build(recipe(name), tmp_path / "b")
    seeds = {loop.clients[0].secret_seed("fit") for loop in (plain, kept)}
    assert len(seeds) == 2
    monkeypatch.setenv("FDL_NOISE_SEED", "ab" * 32)
    given = build(recipe(), tmp_path / "c")
    assert given.clients[0].secret_seed("fit") in seeds and given.clients[0].noise("fit").initial_seed() not in seeds
    assert given.server.has_noise_seed and not plain.server.has_noise_seed
    assert given.clients[0].rng("fit").initial_seed() == plain.clients[0].rng("fit").initial_seed()
    summary = given.run()
    assert summary["privacy"]["noise"] == "secret" and "secret noise seed" in model_card(recipe(), summary, 2, "", {})
    assert "abab" not in json.dumps(summary, default=str) + str(recipe(name).to_dict())
    monkeypatch.delenv("FDL_NOISE_SEED")
    summary = build(recipe(), tmp_path / "d").run()
    assert summary["privacy"]["noise"] == "recipe" and "as in a simulation" in model_card(recipe(), summary, 2, "", {})

    def refused(*overrides):
        with pytest.raises(UserError) as caught:
            build(recipe(*overrides), tmp_path / "e")
        return str(caught.value)

    assert "must not stand in a recipe" in refused("privacy.noise_seed=12345")
    assert "must not stand in a recipe" in refused("privacy.noise_seed={file: a, more: b}")
    assert "cannot be read" in refused(f"privacy.noise_seed={{file: {tmp_path / 'none'}}}")
    secret.write_text("short")
    assert "at least 32 characters" in refused(name) and "short" not in refused(name).replace("at least", "")
    secret.chmod(0o644)
    assert "chmod 600" in refused(name)


@pytest.mark.parametrize("method", ["fedavg", "federated_distillation"])
def test_how_many_samples_a_client_has_does_not_go_up(method, tmp_path, monkeypatch):
    loop = build(recipe(f"method={method}", "federation.rounds=1"), tmp_path)
    told, carry = [], loop.channel.upload

    def upload(message, client, round):
        told.append(message.samples)
        return carry(message, client, round)

    monkeypatch.setattr(loop.channel, "upload", upload)
    loop.run()
    assert told == [1, 1] if method == "fedavg" else told == [0, 0]
