"""The comparison of Fed-LPFM with published ResNets as teachers, cut to a round on a few photographs."""

import pytest

from fdl.build import build
from fdl.recipe import load
from tests.real.data import FOLDER, real

pytestmark = real

RECIPE = "recipes/cifar10/fed_lpfm_small.yaml"


def loop_of(folder, variant):
    data = {
        "path": str(FOLDER / "cifar10_lossless_7k.npz"),
        "validation": 50,
        "limit": 350,
        "normalize": True,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    changes = dict(load(RECIPE).compare.variants[variant])
    common = [
        "fabric.accelerator=cpu",
        "callbacks=[]",
        "inference.cache=null",
        "federation.rounds=1",
        "local_training.steps=2",
    ]
    plain = load(RECIPE, common, changes)
    weights = [
        f"specialists.{i}.args.checkpoint={FOLDER / 'weights'}/cifar10_resnet{entry.args['depth']}_akamaster.npz"
        for i, entry in enumerate(plain.specialists)
        if "checkpoint" in entry.args
    ]
    return build(load(RECIPE, [*common, *weights], {**changes, "data": {"target": "arrays", "args": data}}), folder)


@pytest.mark.parametrize("variant", ["weight_07", "mixed_07", "fine_tuned_07"])
def test_teachers_know_the_photographs_and_do_not_travel(tmp_path, variant):
    loop, plain = loop_of(tmp_path / variant, variant), loop_of(tmp_path / "fedavg", "fedavg")
    loop.run()
    plain.run()
    assert loop.ledger.by_kind() == plain.ledger.by_kind()
    for client in loop.clients:
        assert len(client.train.labels.unique()) == 2
        kept = client.state if variant == "fine_tuned_07" else client.cache
        right = (kept["predictions"].argmax(1) == client.train.labels).float().mean()
        assert right > 0.9  # they were trained on these
    noted = [loop.history[0]["clients"][str(client.id)] for client in loop.clients]
    assert all(note["flops/foundation_models_once"] > note["flops/training_a_round"] for note in noted)
    assert len({note["bytes/foundation_models"] for note in noted}) == (4 if variant == "mixed_07" else 1)


def test_mutual_learning_is_as_light(tmp_path):
    loop = loop_of(tmp_path, "fml")
    loop.run()
    assert len({client.architecture for client in loop.clients}) == 1
    assert all(record["refused"] == {} for record in loop.history)
