"""Models of which every process holds a part: the result of whole ones, half of the memory, an end in words."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fdl.cli.main import run as command
from fdl.engine.distributed.devices import require_gpus
from fdl.errors import RecipeError, UserError
from fdl.knowledge.aggregation.lora import FedEx, FedIT, FLoRA
from fdl.methods import fedlora
from fdl.modules.cifar_resnet import CifarResNet
from fdl.recipe import load
from fdl.state.shards import LARGEST, sharding_units
from tests import shard_jobs
from tests.methods import test_fedlora
from tests.shared_runs import made_once

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes/quickstart.yaml"
LOOSE = {"adam": 1e-4, "bf16": 2e-3}
SHARDED = ("fabric.strategy=fsdp", "fabric.devices=2")


def pair(folder, what):
    """Two processes, and what each of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/shard_jobs.py", str(folder), what],
            cwd=ROOT,
            env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "NODE_RANK": "0", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=280)[0] for process in processes]
    found = [folder / f"{what}-{rank}.json" for rank in (0, 1)]
    assert all(file.is_file() for file in found), "\n".join(said)
    return [json.loads(file.read_text()) for file in found]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes made of the quick jobs; the folder has their runs. Workers of one test run share it."""

    def make(folder):
        shard_jobs.run("federated_distillation", folder / "half", ("federation.rounds=1",), sharded=False)
        pair(folder, "all")

    folder = made_once(tmp_path_factory, "shards", "all-1.json", make)
    first, second = (json.loads((folder / f"all-{rank}.json").read_text()) for rank in (0, 1))
    return {"first": first, "second": second, "folder": folder}


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """What both processes made of the other jobs."""
    first, second = pair(tmp_path_factory.mktemp("longer"), "longer")
    return {"first": first, "second": second}


def flat(outcome):
    return np.concatenate([np.ravel(values) for values in outcome["student"].values()])


def assert_same_traffic(found, alone):
    """Bytes by kind, exactly but for answers: they are deflated, and their size follows the last bits of weights."""
    assert found.keys() == alone.keys() and found["by_kind"].keys() == alone["by_kind"].keys()
    for kind, size in alone["by_kind"].items():
        answers = kind.endswith("/responses")
        assert found["by_kind"][kind] == (pytest.approx(size, rel=2e-3) if answers else size), kind
    if not any(kind.endswith("/responses") for kind in alone["by_kind"]):
        assert found == alone


def is_one_with_a_whole_one(two, name, folder):
    """Weights, up to rounding; names, bytes and rounds, to the last. Both processes come to the same."""
    alone = json.loads(json.dumps(shard_jobs.run(name, folder, sharded=False)))
    found = two["first"][name]
    assert list(found["student"]) == list(alone["student"])
    np.testing.assert_allclose(flat(found), flat(alone), rtol=0, atol=LOOSE.get(name, 1e-6))
    assert_same_traffic(found["communication"], alone["communication"])
    assert [r["cohort"] for r in found["history"]] == [r["cohort"] for r in alone["history"]]
    for key, value in alone["history"][-1]["metrics"].items():
        assert found["history"][-1]["metrics"][key] == pytest.approx(value, abs=0.05 if name in LOOSE else 1e-3), key
    assert {**found, "held": None} == {**two["second"][name], "held": None}
    assert found["held"]["names"] == alone["held"]["names"]


def holds_half(two, name):
    """Of parameters and of the optimiser's state; what cannot be cut evenly differs by a row a tensor.

    Scalars are everywhere, and so is normalisation in mixed precision.
    """
    for part in ("parameters", "moments"):
        first, second = (two[rank][name]["held"][part] for rank in ("first", "second"))
        twice = 0.01 * first["in all"] if name == "bf16" else 16
        assert first["here"] + second["here"] == pytest.approx(first["in all"], abs=twice)
        assert first["here"] == pytest.approx(first["in all"] / 2, rel=0.03)
    if name == "adam":
        held = two["first"][name]["held"]
        assert held["moments"]["in all"] == 2 * held["parameters"]["in all"]


@pytest.mark.parametrize("name", shard_jobs.QUICK)
def test_two_processes_with_half_a_model_each_are_one_with_a_whole_one(two, name, tmp_path):
    is_one_with_a_whole_one(two, name, tmp_path)
    holds_half(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", shard_jobs.LONGER)
def test_so_they_are_for_other_methods(longer, name, tmp_path):
    is_one_with_a_whole_one(longer, name, tmp_path)
    holds_half(longer, name)


def test_mixed_precision_keeps_no_rounded_copies_of_blocks(two, tmp_path):
    """Autocast alone would hold a whole model in 16 bits from the way forward to the way back."""
    assert two["first"]["rounded"] == two["second"]["rounded"] == 0
    assert shard_jobs.rounded_weights(tmp_path, sharded=False) > 10_000


def test_clipping_looks_at_the_whole_gradient(two):
    """The jobs that clip would come out otherwise if nothing were clipped, or each half by itself."""
    clipped, plain = (flat(two["first"][name]) for name in ("clipped", "fedavg"))
    assert np.abs(clipped - plain).max() > 1e-3


def test_batches_are_shared_out(two):
    """Three steps each of the student and of three of five clients; two have batch normalisation."""
    assert two["first"]["parts"] == two["second"]["parts"] == (3 + 1) * 3


def test_a_run_goes_on_with_another_strategy(two, tmp_path):
    """From whole models to parts and back: checkpoints are the same."""
    whole = shard_jobs.run("federated_distillation", tmp_path / "whole", sharded=False)
    np.testing.assert_allclose(flat(two["first"]["resumed"]), flat(whole), rtol=0, atol=1e-6)
    more = ("federation.rounds=3",)
    folder = two["folder"] / "federated_distillation"
    resumed = shard_jobs.run("federated_distillation", folder, more, resume=True, sharded=False)
    longer = shard_jobs.run("federated_distillation", tmp_path / "longer", more, sharded=False)
    np.testing.assert_allclose(flat(resumed), flat(longer), rtol=0, atol=1e-6)
    assert_same_traffic(resumed["communication"], longer["communication"])


@pytest.mark.parametrize("how", ["FailsOnce", pytest.param("Sleeps", marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_the_run_in_words(tmp_path, how):
    """The one says what went wrong, the other that somebody is gone; nobody waits longer than the timeout."""
    leader, other = (end["error"] for end in pair(tmp_path, how))
    assert "rank 0 of 2: another process of this run has ended or did not answer" in leader
    assert "fabric.timeout" in leader and "--resume" in leader
    assert "its scanner is broken" in other if how == "FailsOnce" else "fabric.timeout" in other


@pytest.mark.parametrize("verb", ["fit", "check"])
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_without_gpus_there_is_one_message(verb, accelerator, tmp_path, capsys, monkeypatch):
    """Before data are read, which this recipe could not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = [verb, "--recipe", str(QUICKSTART), "--output-dir", str(tmp_path / "run"), *SHARDED]
    code = command([*line, f"fabric.accelerator={accelerator}", "data.args.test=1000000"])
    said = capsys.readouterr().err
    assert code == 2 and said.count("error: ") == 1 and not (tmp_path / "run").exists()
    assert "fabric.strategy" in said and "GPUs" in said and "auto or ddp" in said.replace("fabric.strategy=", "")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("client_execution=vectorized", "client_execution"),
        ("evaluation.attacks=[lira]", "evaluation.attacks"),
        ("privacy={noise_multiplier: 1}", "privacy.training"),
        ("fabric.precision=16-mixed", "fabric.precision"),
        ("local_training.compile=default", "local_training.compile"),
        ("inference.compile=true", "inference.compile"),
    ],
)
def test_what_does_not_go_with_parts_of_models(change, key):
    """It is said of the recipe."""
    load(QUICKSTART, SHARDED)
    with pytest.raises(RecipeError, match=rf"{key}: must be .*fabric.strategy: fsdp"):
        load(QUICKSTART, [*SHARDED, change])


def test_an_optimizer_that_needs_whole_tensors(two):
    """It is named, with others that do not."""
    assert "client 0 (student) in round 1: fabric.strategy: fsdp leaves Adafactor" in two["first"]["refused"]
    assert two["first"]["refused"] == two["second"]["refused"]


@pytest.mark.parametrize(("aggregation", "refused"), [(FLoRA, True), (FedEx, True), (FedIT, False)])
def test_adding_to_frozen_weights_needs_them_whole(aggregation, refused, tmp_path, monkeypatch):
    """It is said before the first round."""
    monkeypatch.setattr(fedlora, "is_sharded", lambda module: True)
    loop = test_fedlora.toy(fedlora.FedLoRA(aggregation()), tmp_path)
    if refused:
        with pytest.raises(UserError, match=rf"fabric.strategy: aggregation {aggregation.name} adds"):
            loop.run()
    else:
        loop.run()


class Model(nn.Module):
    """Layers in a list, an embedding outside of it that the head shares, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2 * LARGEST))
        self.shared = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head.weight = self.embedding.weight
        self.shared[0].weight = self.layers[0][0].weight


def test_blocks_are_what_can_be_gathered_alone():
    """Children of lists, but for those that share weights with others; small ones are not cut further."""
    model = Model()
    assert sharding_units(model) == [*model.layers[1:], model.shared[1]][: len(model.layers)]


def test_large_blocks_are_cut_further():
    """The stages of a network, and the blocks within the larger ones, inner ones first."""
    network = CifarResNet(num_classes=10, input_shape=[3, 8, 8], depth=20)
    found = sharding_units(network)
    sizes = {id(block): sum(p.numel() for p in block.parameters()) for block in found}
    total = sum(p.numel() for p in network.parameters())
    inner = lambda b: sum(sizes.get(id(m), 0) for m in b.modules() if m is not b)  # noqa: E731
    assert max(sizes[id(b)] - inner(b) for b in found) < total / 2
    assert all(found.index(m) < found.index(b) for b in found for m in b.modules() if m is not b and id(m) in sizes)


def test_gpus_are_asked_for_only_where_models_are_sharded(monkeypatch):
    """All other recipes run anywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_gpus(load(QUICKSTART))
    with pytest.raises(UserError, match="torch finds none here"):
        require_gpus(load(QUICKSTART, SHARDED))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_recipe_on_gpus(precision, tmp_path):
    """On as many as there are, one included: the command line starts them, and an unsharded run comes to the same."""
    count = torch.cuda.device_count()
    quick = [
        "federation.rounds=2",
        "local_training.steps=5",
        "local_training.epochs=null",
        "server_distil.steps=5",
        "server_distil.epochs=null",
    ]
    quick += [f"{part}.optimizer={shard_jobs.SGD}" for part in ("local_training", "server_distil")]
    students = []
    for strategy, devices in (("fsdp", count), ("auto", 1)):
        folder = tmp_path / strategy
        own = [f"fabric.strategy={strategy}", f"fabric.devices={devices}", f"fabric.precision={precision}"]
        line = [sys.executable, "-m", "fdl", "fit", "--recipe", str(QUICKSTART), "--output-dir", str(folder)]
        ended = subprocess.run(
            [*line, *quick, *own, "fabric.accelerator=gpu"], cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert ended.returncode == 0, ended.stderr
        (newest,) = sorted((folder / "checkpoints").glob("round-000002-*"))
        students.append(shard_jobs.weights_in(newest))
    tolerance = {"32-true": 1e-4, "bf16-mixed": 4e-2, "bf16-true": 4e-2}[precision]
    torch.testing.assert_close(*students, rtol=0, atol=tolerance)
