"""Aggregation of low-rank updates: its algebra, one round by hand, sites that miss rounds, and a real network.

In the toy federation every weight is W = W0 + s b aᵀ with W0 = 0, b = 0, a = (1, 1) and s = 2 at the start.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fdl.errors import UserError
from fdl.federation.executors import EXECUTORS
from fdl.knowledge.aggregation.lora import FFA, FedEx, FedIT, FlexLoRA, FLoRA, low_rank_layers, merged
from fdl.methods.fedavg import FedAvg
from fdl.methods.fedlora import FedLoRA
from fdl.modules.tuning import apply_tuning
from tests.test_loop import Crash
from tests.toy import Linear, federation

RECIPES = Path(__file__).parents[2] / "recipes/methods"
EVERY = [FedIT, FFA, FLoRA, FedEx, FlexLoRA]
SCALE = 2.0
A, B = "linear.lora_A.default.weight", "linear.lora_B.default.weight"


class LowRank(Linear):
    """The toy's linear model with an update of rank 1."""

    freeze_a = False

    def __init__(self):
        super().__init__()
        self.frozen = apply_tuning(self, "lora", lora={"rank": 1, "alpha": SCALE, "freeze_a": self.freeze_a})
        nn.init.ones_(self.linear.lora_A["default"].weight)


class HalfFrozen(LowRank):
    freeze_a = True


def toy(method, folder, **settings):
    loop = federation(method, folder, **settings)
    model = HalfFrozen if isinstance(getattr(method, "aggregation", None), FFA) else LowRank
    loop.runtime.factories |= {"student": model, "linear": model}
    loop.server.student = loop.runtime.create("student", 0)
    return loop


def run(method, folder, **settings):
    loop = toy(method, folder, **settings)
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    return loop


def effective(module):
    """W0 + s B A of the toy's layer, by peft."""
    layer = module.linear
    return (layer.base_layer.weight + layer.get_delta_weight("default")).detach().clone()


# -- the algebra


def combined(aggregation, factors, shares, scale):
    """The update that a layer has afterwards: what W gained and s B A."""
    mean = tuple(sum(p * f[i] for p, f in zip(shares, factors)) for i in (0, 1))
    result = aggregation.combine(factors, shares, mean, scale)
    b, a = result.factors
    assert b.shape == factors[0][0].shape and a.shape == factors[0][1].shape
    gained = 0 if result.update is None else result.update[0] @ result.update[1]
    return scale * b @ a + gained, result


def test_the_product_of_means_is_not_the_mean_of_products():
    one = torch.ones(1, 1)
    found = {c: combined(c(), [(one, one), (-one, -one)], [0.5, 0.5], SCALE)[0].item() for c in EVERY}
    # FFA's A is the same everywhere, which this one is not
    assert found == pytest.approx({FedIT: 0.0, FFA: 0.0, FLoRA: SCALE, FedEx: SCALE, FlexLoRA: SCALE})


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_exact_aggregations_are_exact(sites):
    torch.manual_seed(sites)
    rank, shares = 2, torch.softmax(torch.randn(sites), 0).tolist()
    factors = [(torch.randn(12, rank), torch.randn(9, rank).T) for _ in range(sites)]
    exact = SCALE * sum(p * b @ a for p, (b, a) in zip(shares, factors))
    for aggregation in (FLoRA(), FedEx()):
        update, result = combined(aggregation, factors, shares, SCALE)
        torch.testing.assert_close(update, exact, rtol=1e-5, atol=1e-5)
    assert result.update is None if sites == 1 else result.update[0].shape == (12, (sites - 1) * rank)
    if sites > 1:
        assert (combined(FedIT(), factors, shares, SCALE)[0] - exact).abs().max() > 0.1
    shared = [(b, factors[0][1]) for b, _ in factors]
    exact = SCALE * sum(p * b @ a for p, (b, a) in zip(shares, shared))
    torch.testing.assert_close(combined(FFA(), shared, shares, SCALE)[0], exact, rtol=1e-5, atol=1e-5)


def test_flexlora_is_the_best_approximation_of_its_rank():
    torch.manual_seed(0)
    factors, shares = [(torch.randn(8, 2), torch.randn(2, 6)) for _ in range(3)], [0.2, 0.3, 0.5]
    exact = SCALE * sum(p * b @ a for p, (b, a) in zip(shares, factors))
    u, s, vh = torch.linalg.svd(exact)
    update, result = combined(FlexLoRA(), factors, shares, SCALE)
    torch.testing.assert_close(update, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.factors[1] @ result.factors[1].T, torch.eye(2), rtol=1e-5, atol=1e-5)
    # a sum of no more than rank 2, and layers that are narrower than the rank
    low = [(b @ torch.ones(2, 4), torch.cat([a, a])) for (b, _), (_, a) in zip(factors, factors[:1] * 3)]
    exact = SCALE * sum(p * b @ a for p, (b, a) in zip(shares, low))
    torch.testing.assert_close(combined(FlexLoRA(), low, shares, SCALE)[0], exact, rtol=1e-4, atol=1e-4)
    narrow = [(torch.randn(3, 4), torch.randn(4, 2)) for _ in range(2)]
    exact = SCALE * sum(b @ a for b, a in narrow) / 2
    torch.testing.assert_close(combined(FlexLoRA(), narrow, [0.5, 0.5], SCALE)[0], exact, rtol=1e-4, atol=1e-4)


# -- one round by hand


def two_steps():
    """What both clients have after two steps of gradient descent: b is along (1, -1), a grows in the own column.

    First step: b = ± s ½ (1, -1). Second: the right class has σ(s²), and with q = 1 - σ(s²) b becomes ± s (½ + q), a's
    own entry 1 + s² q.
    """
    q = 1 - 1 / (1 + math.exp(-(SCALE**2)))
    side = torch.tensor([[1.0], [-1.0]])
    size, grown = SCALE * (0.5 + q), 1 + SCALE**2 * q
    return [(size * side, torch.tensor([[grown, 1.0]])), (-size * side, torch.tensor([[1.0, grown]]))]


def test_one_round_by_hand(tmp_path):
    (b0, a0), (b1, a1) = two_steps()
    exact = SCALE * (0.25 * b0 @ a0 + 0.75 * b1 @ a1)
    apart = SCALE * (0.25 * b0 + 0.75 * b1) @ (0.25 * a0 + 0.75 * a1)
    assert (exact - apart).abs().max() > 0.02
    for aggregation, expected in ((FedIT(), apart), (FedEx(), exact), (FlexLoRA(), exact)):
        loop = run(FedLoRA(aggregation), tmp_path / aggregation.name, local_training=2)
        torch.testing.assert_close(effective(loop.server.student), expected)
    # with a held, both steps go into b: logits after the first are ± s² ½, so b = ± s (½ + q) as above
    held = SCALE * (0.25 * b0 + 0.75 * b1) @ torch.ones(1, 2)
    loop = run(FedLoRA(FFA()), tmp_path / "ffa", local_training=2)
    torch.testing.assert_close(effective(loop.server.student), held)


@pytest.mark.parametrize("aggregation", [FLoRA(), FedEx()])
def test_the_student_is_the_mean_of_what_sites_have_in_every_round(tmp_path, aggregation):
    method, sites, found = FedLoRA(aggregation), [], []
    loop = toy(method, tmp_path, rounds=3, local_training=2)
    update, learn = method.local_update, method.server_update

    def seen(client, download):
        message = yield from update(client, download)
        total = client.state.get("base", {}).get("total", {}).get("linear", torch.zeros(2, 2))
        sites.append(client.samples / 4 * (total + SCALE * message.tensors[B] @ message.tensors[A]))
        return message

    def learnt(server, knowledge):
        log = learn(server, knowledge)
        found.append(effective(server.student))
        return log

    method.local_update, method.server_update = seen, learnt
    loop.run()
    for round, student in enumerate(found):
        torch.testing.assert_close(student, sites[2 * round] + sites[2 * round + 1])
    assert (found[2] - found[0]).abs().max() > 0.05


def test_averaging_apart_is_fedavg(tmp_path):
    settings = {"rounds": 3, "local_training": 2}
    ours, plain = run(FedLoRA(), tmp_path / "a", **settings), run(FedAvg(), tmp_path / "b", **settings)
    assert torch.equal(effective(ours.server.student), effective(plain.server.student))
    assert [list(row) for row in ours.ledger.rows()] == [list(row) for row in plain.ledger.rows()]


# -- additions to the original weights


@pytest.mark.parametrize("aggregation", [FLoRA(), FedEx()])
def test_sites_that_missed_rounds_have_the_servers_weights_when_they_train(tmp_path, aggregation):
    method = FedLoRA(aggregation)
    loop = toy(method, tmp_path, rounds=12, local_training=2, dropout=0.4)
    update, versions = method.local_update, []

    def checked(client, download):
        before = client.state.get("base", {"version": 0})["version"]
        message = yield from update(client, download)
        base, own = loop.server.state["base"], client.state.get("base", {"version": 0, "total": {}})
        assert own["version"] == base["version"] and own["total"].keys() == base["total"].keys()
        for layer, total in base["total"].items():
            assert torch.equal(total, own["total"][layer])
        assert not loop.runtime.shared_module("student").linear.base_layer.weight.any()  # nothing of it stays behind
        versions.append(own["version"] - before)
        return message

    def begun(client, fit):
        def train(module, *arguments):
            assert torch.equal(effective(module), effective(loop.server.student))
            return fit(module, *arguments)

        client.fit = train

    for client in loop.clients:
        begun(client, client.fit)
    method.local_update = checked
    loop.run()
    assert loop.server.state["base"]["version"] > 3 and min(versions) == 0
    if aggregation.name == "flora":  # of two sites, a residual needs both, so that neither can miss one
        assert max(versions) > 1


def test_only_what_is_missing_is_sent_and_in_the_smaller_form(tmp_path):
    method = FedLoRA(FLoRA())
    loop = toy(method, tmp_path, rounds=1)
    loop.run()
    server = loop.server
    server.start_round(2)
    names = set(method.download(server, 0).tensors)
    # two sites of rank 1 take 2 · 2 + 2 · 2 numbers, more than the 4 of the matrix itself
    assert names == {"merge/1/whole/linear"} and A not in names
    server.state["base"]["log"] = {"1": {"linear": {"left": torch.ones(2, 1), "right": torch.ones(1, 2)}}}
    server.start_round(3)
    assert set(method.download(server, 0).tensors) == {"merge/1/left/linear", "merge/1/right/linear"}
    server.state["base"]["confirmed"]["1"] = 1
    assert set(method.download(server, 1).tensors) == set()


def test_an_addition_is_taken_in_once_though_its_receipt_was_not_confirmed(tmp_path):
    method = FedLoRA(FedEx())
    loop = toy(method, tmp_path, rounds=4, local_training=2)
    update = method.local_update

    def spoilt(client, download):
        message = yield from update(client, download)
        base = loop.server.state["base"]
        if base["version"]:
            assert torch.equal(client.state["base"]["total"]["linear"], base["total"]["linear"])
        if client.id == 1 and client.round == 2:
            return replace(message, tensors={name: tensor * math.nan for name, tensor in message.tensors.items()})
        return message

    method.local_update = spoilt
    loop.run()
    assert [list(record["refused"]) for record in loop.history] == [[], ["1"], [], []]
    # alone in round 2, client 0 left no residual; both did in the others
    assert loop.server.state["base"]["version"] == 3


@pytest.mark.parametrize("aggregation", EVERY)
@pytest.mark.parametrize("crash_in", [1, 3])
def test_a_resumed_run_equals_the_straight_one(tmp_path, aggregation, crash_in):
    settings = {"rounds": 4, "local_training": 2, "dropout": 0.3, "seed": 3}
    method = FedLoRA(aggregation())
    straight = run(method, tmp_path / "straight", **settings)
    crashed = toy(method, tmp_path / "crashed", callbacks=[Crash(crash_in)], **settings)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = toy(method, tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert torch.equal(effective(resumed.server.student), effective(straight.server.student))
    assert [list(row) for row in resumed.ledger.rows()] == [list(row) for row in straight.ledger.rows()]
    metrics = [[r["metrics"] for r in loop.history] for loop in (resumed, straight)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("aggregation", EVERY)
def test_clients_that_train_together_end_where_those_do_that_take_turns(tmp_path, aggregation):
    settings = {"rounds": 4, "local_training": 2}
    method = FedLoRA(aggregation())
    turns, together = run(method, tmp_path / "turns", **settings), toy(method, tmp_path / "together", **settings)
    together.executor = EXECUTORS["vectorized"]()
    together.run()
    torch.testing.assert_close(effective(together.server.student), effective(turns.server.student))


# -- what it refuses


def test_a_student_that_does_not_fit_the_aggregation(tmp_path):
    with pytest.raises(UserError, match=r"no low-rank updates to aggregate; set student.args.tuning: lora"):
        federation(FedLoRA(), tmp_path).run()
    for aggregation, model, wanted in ((FFA(), LowRank, "true"), (FLoRA(), HalfFrozen, "false")):
        loop = federation(FedLoRA(aggregation), tmp_path)
        loop.runtime.factories |= {"student": model, "linear": model}
        loop.server.student = loop.runtime.create("student", 0)
        with pytest.raises(UserError, match=f"{aggregation.name} .*: set student.args.lora.freeze_a: {wanted}"):
            loop.run()


# -- real networks


def lines(path, count, pairs=False):
    """A table of sentences with classes."""
    rows = []
    for i in range(count):
        text = {"text_a": f"a {i}", "text_b": "good"} if pairs else {"text": ("good", "bad")[i % 2] + f" number {i}"}
        rows.append(json.dumps({"split": "dev" if i % 4 == 0 else "train", **text, "label": i % 2}))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("recipe", ["fedlora_glue", "federated_foundation_glue"])
def test_the_recipes_for_texts_run_with_a_small_encoder(tmp_path, recipe):
    from fdl.build import build
    from fdl.modules.text_classifier import TextClassifier
    from fdl.recipe import load
    from tests.modules.text_models import BYTES, ENCODERS, saved

    torch.manual_seed(0)
    model = TextClassifier("roberta", config=ENCODERS["roberta"], num_classes=2, tokenizer=BYTES, context=32)
    overrides = [
        f"student.args.model={saved(model, tmp_path / 'model')}",
        f"data.args.path={lines(tmp_path / 'glue.jsonl', 120, pairs=recipe.startswith('federated'))}",
        "data.args.tokenizer=bytes",
        "data.args.context=32",
        "data.args.validation=8",
        "federation={clients: 2, rounds: 2}",
        "local_training={steps: 2, batch_size: 8}",
        "server_distil={steps: 2, batch_size: 8}",
        "fabric={accelerator: cpu, threads: 1}",
        "callbacks=[]",
    ]
    overrides += ["data.args.text=[text_a,text_b]"] if recipe.startswith("federated") else []
    loop = build(load(RECIPES / f"{recipe}.yaml", overrides), tmp_path / "run")
    summary = loop.run()
    assert all(record["refused"] == {} for record in summary["history"])
    layers = low_rank_layers(loop.server.student)
    assert sorted({layer.name.rpartition(".")[2] for layer in layers}) == ["query", "value"] and len(layers) == 4
    if recipe == "fedlora_glue":
        exported(loop, tmp_path)
        assert loop.server.state["base"]["version"] == 2
        totals = loop.server.state["base"]["total"]
        assert all(totals[layer.name].any() for layer in layers)


def exported(loop, folder):
    """An exported student has what was added to its frozen weights, as the run's own has."""
    from transformers import AutoModelForSequenceClassification

    from fdl.federation.summary import summarise
    from fdl.runs.export import export
    from fdl.runs.report import write_summary
    from fdl.state.run_folder import RECIPE, SUMMARY

    (loop.folder / RECIPE).write_text(loop.recipe.to_yaml())
    write_summary(loop.folder / SUMMARY, summarise(loop))
    model = AutoModelForSequenceClassification.from_pretrained(
        export(loop.folder, "transformers", folder / "exported", which="last")
    )
    tokens, _ = loop.server.test.batch(torch.arange(4))
    expected = loop.server.student.eval()(tokens).logits
    mask = (tokens >= 0).long()
    found = model.eval()(input_ids=tokens.clamp_min(0), attention_mask=mask).logits
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora", "fedit"])
def test_a_vision_transformer(tmp_path, name):
    import timm
    from safetensors.torch import save_file

    from fdl.build import build
    from fdl.recipe import from_mapping

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=10, img_size=8, in_chans=1, patch_size=4)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    student = {
        "model": "test_vit",
        "checkpoint": str(tmp_path / "weights.safetensors"),
        "kwargs": {"patch_size": 4},
        "tuning": "lora",
        "lora": {"rank": 2, "targets": ["blocks.*.attn.qkv"]},
    }
    recipe = from_mapping(
        {
            "name": "vit",
            "method": {"target": "fedlora", "args": {"aggregation": name}},
            "data": {"target": "digits", "args": {"proxy": 0, "validation": 50, "test": 100, "limit": 300}},
            "partition": "iid",
            "federation": {"clients": 2, "rounds": 2, "calibration_fraction": 0},
            "student": {"target": "timm", "args": student},
            "local_training": {"steps": 3, "batch_size": 16, "optimizer": {"target": "sgd", "args": {"lr": 0.5}}},
            "fabric": {"accelerator": "cpu", "threads": 1},
            "callbacks": [],
        }
    )
    loop = build(recipe, tmp_path / "run")
    method, update, uploads = loop.method, loop.method.local_update, []

    def seen(client, download):
        message = yield from update(client, download)
        layer = low_rank_layers(client.runtime.shared_module("student"))[0]
        total = client.state.get("base", {}).get("total", {}).get(layer.name, 0)
        delta = 2.0 * message.tensors[layer.b] @ message.tensors[layer.a]
        uploads.append((client.samples, delta.detach() + total))
        return message

    method.local_update = seen
    loop.run()
    first = low_rank_layers(loop.server.student)[0]
    assert len(low_rank_layers(loop.server.student)) == 6 and first.scale == 2.0
    mean = sum(n * delta for n, delta in uploads[-2:]) / sum(n for n, _ in uploads[-2:])
    pretrained = network.get_submodule(first.name.removeprefix("backbone.")).weight.detach()
    found = first.weight + first.layer.get_delta_weight("default").detach() - pretrained
    error = float((found - mean).norm() / mean.norm())
    assert error < 1e-4 if name in ("flora", "fedex") else 1e-3 < error < 1
    if name == "flora":  # the head, and two sites' factors of rank 2 for each of 6 layers, in the second round
        down = {row.round: row.bytes for row in loop.ledger.rows() if row.direction == "down" and row.client == 0}
        sides = sum(first.weight.shape)
        assert down[2] - down[1] == pytest.approx(4 * 6 * 2 * 2 * sides, rel=0.05)


def test_layers_that_hold_their_weights_transposed():
    from transformers.pytorch_utils import Conv1D

    network = nn.Sequential(Conv1D(5, 3), nn.Linear(5, 2))  # 3 inputs, 5 outputs
    apply_tuning(network, "lora", lora={"rank": 2, "targets": ["0"]})
    (layer,) = low_rank_layers(network)
    nn.init.normal_(layer.layer.lora_B["default"].weight)
    x = torch.randn(4, 3)
    with_update = network(x)
    product = layer.scale * layer.layer.lora_B["default"].weight @ layer.layer.lora_A["default"].weight
    nn.init.zeros_(layer.layer.lora_B["default"].weight)
    before = layer.weight.clone()
    assert before.shape == product.shape == (5, 3)
    copied = merged(network, {layer.name: product.detach()})
    torch.testing.assert_close(copied(x), with_update)
    assert torch.equal(layer.weight, before)
    assert copied[1].weight is network[1].weight and merged(network, {}) is network
