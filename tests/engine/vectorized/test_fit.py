import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fdl.build import build
from fdl.engine.vectorized.stack_batches import stacked
from fdl.engine.vectorized.stacked_models import StackedModels, unstackable
from fdl.errors import UserError
from fdl.federation.executors import Auto, Sequential, Vectorized
from fdl.messages import Parameters, Responses, parts_of
from fdl.recipe import from_mapping

MLP = {"target": "mlp", "args": {"hidden": [12]}}


def recipe(method="fedavg", overrides=(), **changes):
    tree = {
        "name": "batched",
        "method": method,
        "data": {"target": "digits", "args": {"proxy": 60, "validation": 0, "test": 1400}},
        "partition": {"target": "dirichlet", "args": {"alpha": 1.0}},
        "federation": {"clients": 5, "rounds": 2},
        "student": MLP,
        "specialists": [MLP],
        "local_training": {
            "epochs": 2,
            "batch_size": 16,
            "optimizer": {"target": "sgd", "args": {"lr": 0.1, "momentum": 0.9}},
        },
        "server_distil": {"epochs": 1},
        "evaluation": {"specialists": False},
        "checkpoint": {"every": 100},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
    }
    return from_mapping(tree | changes, list(overrides))


class Spy(Vectorized):
    """Notes what was done together, and everybody's upload."""

    def __init__(self, executor):
        super().__init__()
        self.executor, self.uploads = executor, []

    def __call__(self, method, turns):
        for client, upload in self.executor(method, turns):
            self.uploads.append({kind: _values(part) for kind, part in parts_of(upload).items()})
            yield client, upload


def _values(part):
    if isinstance(part, Parameters):
        return {name: tensor.clone() for name, tensor in part.tensors.items()}
    return {"values": part.values.clone()} if isinstance(part, Responses) else {}


def run(folder: Path, executor, rounds=2, prepare=None, **arguments):
    loop = build(recipe(**arguments), folder / type(executor).__name__)
    spy = loop.executor = Spy(executor)
    if prepare is not None:
        prepare(loop)
    loop.set_up()
    for number in range(1, rounds + 1):
        loop.run_round(number)
    return loop, spy


def assert_same(first, second, tolerance=1e-5):
    (one, a), (other, b) = first, second
    assert len(a.uploads) == len(b.uploads)
    for left, right in zip(a.uploads, b.uploads):
        assert left.keys() == right.keys()
        for kind in left:
            torch.testing.assert_close(left[kind], right[kind], rtol=0, atol=tolerance)
    for left, right in zip(one.clients, other.clients):
        assert left.state.keys() == right.state.keys()
        if "specialist" in left.state:
            torch.testing.assert_close(left.state["specialist"], right.state["specialist"], rtol=0, atol=tolerance)
    assert one.ledger.rows() == other.ledger.rows()
    for left, right in zip(one.history, other.history):
        assert left["clients"].keys() == right["clients"].keys()
        for client in left["clients"]:
            torch.testing.assert_close(left["clients"][client], right["clients"][client], rtol=1e-4, atol=1e-4)
            assert list(left["clients"][client]) == list(right["clients"][client])


def together(monkeypatch):
    """Counts the passes that serve several clients, and for how many."""
    import fdl.federation.executors

    seen = []
    for kind, function in list(fdl.federation.executors.TOGETHER.items()):

        def noted(runtime, jobs, function=function, kind=kind):
            result = function(runtime, jobs)
            seen.append((kind.__name__, len(jobs)))
            return result

        monkeypatch.setitem(fdl.federation.executors.TOGETHER, kind, noted)
    return seen


@pytest.mark.parametrize(
    ("method", "fits"),
    [
        ("fedavg", 1),
        ({"target": "fedprox", "args": {"mu": 0.5}}, 1),
        ("single_site", 1),
        ({"target": "feddf", "args": {"architectures": "specialists", "select": "last"}}, 1),
        ("federated_distillation", 2),
        ({"target": "fed_lpfm", "args": {"fine_tune": True}}, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_clients_that_train_together_end_where_they_would_alone(method, fits, tmp_path, monkeypatch):
    alone = run(tmp_path, Sequential(), method=method)
    seen = together(monkeypatch)
    assert_same(alone, run(tmp_path, Vectorized(), method=method))
    assert seen.count(("StackedFit", 5)) >= 2 * fits - 1


@pytest.mark.parametrize(
    "changes",
    [
        ["local_training.optimizer={target: adamw, args: {lr: 0.01}}", "local_training.gradient_clip=0.5"],
        ["local_training.epochs=null", "local_training.steps=7"],
        ["local_training.scheduler={target: step_lr, args: {step_size: 2, gamma: 0.5}, interval: step}"],
        ["local_training.scheduler={target: step_lr, args: {step_size: 1, gamma: 0.5}, interval: round}"],
        ["student={target: vit, args: {dim: 8, depth: 1, heads: 2}}"],
        ["student={target: cnn, args: {channels: [4], embedding: 8}}"],
        ["federation.client_fraction=0.6", "federation.dropout=0.3"],
        ["data.args.augment=crop_flip"],
        ["federation.learning_rates={0: 0.02, 3: 0.3}"],
        [
            "local_training.optimizer={target: adamw, args: {lr: 0.01}}",
            "partition={target: quantity_skew, args: {exponent: 1.0, min_samples: 4}}",
            "local_training.scheduler={target: step_lr, args: {step_size: 2, gamma: 0.5}, interval: step}",
            "local_training.gradient_clip=0.5",
            "federation.learning_rates={1: 0.001, 3: 0.02}",
        ],
    ],
    ids=lambda changes: changes[-1].partition("=")[0] + changes[-1][-12:],
)
def test_whatever_the_training_is(changes, tmp_path, monkeypatch):
    alone = run(tmp_path, Sequential(), overrides=changes)
    seen = together(monkeypatch)
    assert_same(alone, run(tmp_path, Vectorized(), overrides=changes), 3e-5)
    assert seen


def test_proxy_answers_are_given_together(tmp_path, monkeypatch):
    seen = together(monkeypatch)
    run(tmp_path, Vectorized(), method="federated_distillation", rounds=1)
    assert ("StackedPredict", 5) in seen


def test_a_mixed_federation_goes_by_architecture(tmp_path, monkeypatch):
    specialists = [MLP, {"target": "cnn", "args": {"channels": [4], "norm": "batch"}}, {"target": "mlp", "args": {}}]
    arguments = {
        "method": "federated_distillation",
        "specialists": specialists,
        "federation": {"clients": 7, "rounds": 2},
    }
    alone = run(tmp_path, Sequential(), **arguments)
    seen = together(monkeypatch)
    assert_same(alone, run(tmp_path, Vectorized(), **arguments))
    assert {count for kind, count in seen if kind == "StackedFit"} == {3, 2}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["student={target: cnn, args: {channels: [4], norm: batch}}"], "running statistics"),
        (["fabric.precision=bf16-mixed"], "32-bit"),
        (
            ["local_training.scheduler={target: step_lr, args: {step_size: 1, gamma: 0.5}, interval: epoch}"],
            "counts epochs",
        ),
    ],
)
def test_what_cannot_be_done_together_is_done_alone_and_said_once(changes, why, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fdl")
    alone = run(tmp_path, Sequential(), overrides=changes)
    seen = together(monkeypatch)
    assert_same(alone, run(tmp_path, Vectorized(), overrides=changes), 0.0)
    assert not seen
    assert len([record for record in caplog.records if why in record.message]) == 1


def test_a_model_that_cannot_be_vectorised_is_found_out_without_harm(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fdl")

    def branch(loop):
        template = loop.runtime.shared_module("student")

        class Branching(type(template)):
            def training_step(self, batch, batch_idx=0):
                loss = super().training_step(batch)["loss"]
                return {"loss": 2 * loss if loss > 1 else loss}

        template.__class__ = Branching

    alone = run(tmp_path, Sequential(), prepare=branch)
    assert_same(alone, run(tmp_path, Vectorized(), prepare=branch), 0.0)
    assert len([record for record in caplog.records if "one after another" in record.message]) == 1


def test_groups_that_fit_into_memory_give_what_the_whole_cohort_gives(tmp_path, monkeypatch):
    method = "federated_distillation"
    whole = run(tmp_path, Vectorized(), method=method)
    cost = next(iter(whole[1].executor.stacks.costs.values()))
    seen = together(monkeypatch)
    assert_same(whole, run(tmp_path, Vectorized(memory=2 * cost + 1), method=method))
    assert {count for kind, count in seen if kind == "StackedFit"} == {2}


def test_auto_trains_small_models_together_and_others_alone(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fdl")
    seen = together(monkeypatch)
    run(tmp_path, Auto(), rounds=1)
    assert seen == [("StackedFit", 5)]
    monkeypatch.setattr("fdl.federation.executors.SMALL", {"cpu": 10})
    run(tmp_path, Auto(), rounds=1)
    assert seen == [("StackedFit", 5)] and not caplog.records


def test_an_error_names_its_client_and_leaves_nobody_behind(tmp_path):
    def spoil(loop):
        def local_update(client, download, update=loop.method.local_update):
            message = yield from update(client, download)
            if client.id == 3:
                raise UserError("no power")
            return message

        loop.method.local_update = local_update

    with pytest.raises(UserError, match=r"client 3 \(student\) in round 1: no power"):
        run(tmp_path, Vectorized(), prepare=spoil)
    loop, _ = run(tmp_path, Vectorized())
    with pytest.raises(UserError, match="client 3"):
        spoil(loop)
        loop.run_round(3)
    assert all(client.modules is loop.runtime for client in loop.clients)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    arguments = {
        "method": "federated_distillation",
        "client_execution": "vectorized",
        "federation": {"clients": 5, "rounds": 3, "client_fraction": 0.6},
        "checkpoint": {"every": 1, "keep": 9},
    }
    straight = build(recipe(**arguments), tmp_path)
    straight.run()
    for newest in sorted((tmp_path / "checkpoints").glob("*"))[-1:]:
        newest.unlink()
    resumed = build(recipe(**arguments), tmp_path)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    for one, other in zip(straight.server.student.parameters(), resumed.server.student.parameters()):
        assert torch.equal(one, other)


def test_torchs_own_stream_is_each_clients_own(tmp_path):
    """What a client draws between two fits does not depend on who else takes part."""
    drawn = {}

    def draw(loop):
        def local_update(client, download, update=loop.method.local_update):
            before = torch.rand(1)
            message = yield from update(client, download)
            drawn.setdefault(type(loop.executor.executor), []).append((client.id, before, torch.rand(1)))
            return message

        loop.method.local_update = local_update

    for executor in (Sequential(), Vectorized()):
        run(tmp_path, executor, rounds=1, prepare=draw)
    assert drawn[Sequential] == sorted(drawn[Vectorized], key=lambda row: row[0])


def test_padding_repeats_a_row_that_counts_for_nothing():
    x, y = torch.arange(6.0).reshape(3, 2), torch.tensor([1, 0, 1])
    inputs, labels = stacked([(x, y), (x[:1], y[:1])])
    assert inputs.tolist() == [x.tolist(), [[0.0, 1.0]] * 3]
    assert labels.tolist() == [[1, 0, 1], [1, -100, -100]]
    texts = torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9]])
    assert stacked([((texts[0],), None), ((texts[1],), None)])[0][0].tolist() == [[[5, 6, -1]], [[7, 8, 9]]]


def test_tied_and_frozen_weights_stay_tied_and_frozen():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = frozenset({"base.weight"})
            self.base, self.up = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
            self.down = nn.Linear(3, 3)
            self.down.weight = self.up.weight
            self.base.weight.requires_grad_(False)

        def forward(self, x):
            return self.down(self.up(self.base(x)))

    torch.manual_seed(0)
    module = Tied()
    assert unstackable(module) is None
    stack = StackedModels(module, 2)
    stack.whole.normal_()
    assert (
        stack.modules[0].base.weight is module.base.weight
        and stack.modules[1].up.weight is stack.modules[1].down.weight
    )
    x = torch.randn(2, 4, 3)
    answers = stack.together(lambda m, x: m(x), stack.pieces(stack.whole), (x,))
    torch.testing.assert_close(answers, torch.stack([m(part) for m, part in zip(stack.modules, x)]))
