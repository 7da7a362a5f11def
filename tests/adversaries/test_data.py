"""Poisoned data, the recipe's keys, and what a backdoor's evaluator counts."""

import numpy as np
import pytest
import torch

from fdl.adversaries.data import Backdoor, LabelFlip, Triggered
from fdl.datamodules.arrivals import ClassIncremental, ScheduledSamples
from fdl.datamodules.samples import TensorSamples
from fdl.errors import RecipeError, UserError
from fdl.evaluators.backdoor import BackdoorSuccess
from fdl.methods.fedavg import FedAvg
from fdl.recipe import from_mapping
from tests.toy import federation

RECIPE = {
    "method": "fedavg",
    "data": {"target": "digits", "args": {"proxy": 50, "validation": 20, "test": 50}},
    "federation": {"clients": 10, "rounds": 1},
    "student": {"target": "mlp", "args": {"hidden": [4]}},
    "local_training": {"steps": 2},
    "callbacks": [],
    "fabric": {"threads": 1},
}


def images(count=4, side=3):
    x = torch.arange(count * side * side, dtype=torch.float32).reshape(count, 1, side, side) / 100
    return TensorSamples(x, torch.arange(count) % 3, mean=[0.5], std=[0.25])


class Client:
    num_classes, train, seed, id = 3, images(), 0, 0


def test_flipped_labels_run_backwards():
    adversary = LabelFlip()
    adversary.prepare(Client())
    flipped = adversary.corrupt(images(), torch.Generator())
    assert flipped.labels.tolist() == [2, 1, 0, 2]
    inputs, labels = flipped.batch(torch.tensor([2, 0]))
    torch.testing.assert_close(inputs, images().batch(torch.tensor([2, 0]))[0])
    assert labels.tolist() == [0, 2]
    assert flipped.subset([1, 3]).labels.tolist() == [1, 2] and len(flipped.subset([1, 3])) == 2
    assert flipped.content_hash() == images().content_hash() and flipped.nbytes == images().nbytes


def test_a_trigger_is_a_white_square_over_the_normalised_image():
    chosen = torch.tensor([True, False, True, False])
    stamped = Triggered(images(), chosen, target=1, size=2)
    inputs, labels = stamped.batch(torch.tensor([0, 1, 2]))
    clean = images().batch(torch.tensor([0, 1, 2]))[0]
    expected = clean.clone()
    for i in (0, 2):
        expected[i, 0, 1:, 1:] = (1 - 0.5) / 0.25
    torch.testing.assert_close(inputs, expected)
    assert labels.tolist() == [1, 1, 1] and stamped.labels.tolist() == [1, 1, 1, 0]
    assert stamped.subset([2, 3]).labels.tolist() == [1, 0]
    assert stamped.content_hash() != images().content_hash() and stamped.unlabelled().labels is None
    torch.testing.assert_close(stamped.unlabelled().batch(torch.tensor([0]))[0], expected[:1])


def test_a_backdoor_marks_its_share_and_the_same_ones_every_time():
    adversary = Backdoor(target=2, fraction=0.5, size=1)
    marked = [adversary.corrupt(images(8), torch.Generator().manual_seed(seed)).chosen.tolist() for seed in (1, 1, 2)]
    assert marked[0] == marked[1] and sum(marked[0]) == 4
    for arguments, message in (({"target": 3}, "no class 3"), ({"size": 4}, "size: 4, but images are 3×3")):
        with pytest.raises(UserError, match=message):
            Backdoor(**arguments).prepare(Client())
    with pytest.raises(UserError, match="fraction"):
        Backdoor(fraction=0.0)


def test_data_are_poisoned_from_a_round_on_whatever_arrives(tmp_path):
    loop = federation(FedAvg(), tmp_path)
    client = loop.clients[1]
    arrival = ClassIncremental(stages=2, rounds=2, keep=True)
    pool = TensorSamples(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    client.arrival, client._train = arrival, ScheduledSamples(pool, np.array([0, 0, 1, 1]), arrival)
    client.update_data()
    client.cache["density"] = "of honest data"
    client.data_corruption, client.corruption_start = lambda samples, purpose: LabelFlipped(samples), 2
    seen = []
    for round in (0, 1, 2, 3, 4):
        client.start_round(round)
        seen.append(client.train.labels.tolist())
    assert seen == [[0, 0], [0, 0], [1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert client.cache == {}
    client.start_round(0)  # as a dry run does
    assert client.train.labels.tolist() == [0, 0]


def LabelFlipped(samples):
    adversary = LabelFlip()
    adversary._classes = 2
    return adversary.corrupt(samples, torch.Generator())


class Server:
    """Answers class 1 wherever the last pixel is brighter than any clean one."""

    num_classes, classes = 3, ["a", "b", "c"]
    test = images(6)

    def predict(self, module, samples):
        inputs = samples.batch(torch.arange(len(samples)))[0]
        hit = inputs[:, 0, -1, -1] > 1.5
        return torch.stack([~hit, hit, torch.zeros_like(hit)], 1).float()


def test_the_success_of_a_backdoor_is_counted_without_the_target_class():
    probe = BackdoorSuccess(target=1, size=1)
    probe.prepare(Server())
    assert probe.evaluate(Server(), None) == {"success": 1.0, "untriggered": 0.0}
    # of classes 0 1 2 0 1 2 four are not of class 1; what is always answered 0 is right for the target 0
    assert BackdoorSuccess(target=0, size=1).evaluate(Server(), None) == {"success": 0.0, "untriggered": 1.0}
    with pytest.raises(UserError, match="backdoor: target: there is no class 7"):
        BackdoorSuccess(target=7).prepare(Server())


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{"target": "least_likely", "fraction": 1.5}], r"adversaries.0.fraction: .* in \[0, 1\]"),
        ([{"target": "least_likely"}], "adversaries.0: give clients or fraction, one of the two"),
        ([{"target": "least_likely", "fraction": 0.1, "clients": [1]}], "adversaries.0: give clients or fraction"),
        (
            [{"target": "least_likely", "clients": [10]}],
            "adversaries.0.clients: there is no client 10: the ids are 0 … 9",
        ),
        (
            [{"target": "least_likely", "clients": [1]}, {"target": "class_confusion", "clients": [2, 1]}],
            "adversaries.1.clients: client 1 is in adversaries.0 already",
        ),
        (
            [{"target": "least_likely", "fraction": 0.6}, {"target": "class_confusion", "fraction": 0.5}],
            "11 clients are to be dishonest, .* 10",
        ),
        ([{"target": "least_likly", "fraction": 0.1}], "unknown adversary 'least_likly'; did you mean 'least_likely'"),
        ([{"target": "least_likely", "fraction": 0.1, "start": 0}], "adversaries.0.start"),
        (
            [{"target": "sybil", "fraction": 0.2, "args": {"attack": {"target": "label_flip", "args": {"x": 1}}}}],
            "no 'x'",
        ),
    ],
)
def test_recipes_that_make_no_sense(entries, problem):
    with pytest.raises(RecipeError, match=problem):
        from_mapping({**RECIPE, "adversaries": entries})


def test_a_recipe_with_adversaries_runs(tmp_path):
    from fdl.build import build

    probe = {"target": "backdoor", "args": {"target": 3}}
    entries = [{"target": "backdoor", "fraction": 0.2, "args": {"target": 3}}, {"target": "sign_flip", "clients": [4]}]
    loop = build(from_mapping({**RECIPE, "adversaries": entries, "evaluation": {"evaluators": [probe]}}), tmp_path)
    drawn, named = (sorted(group.clients) for group in loop.adversaries.groups)
    assert len(drawn) == 2 and named == [4] and 4 not in drawn
    metrics = loop.run()["metrics"]
    assert 0 <= metrics["student/backdoor/success"] <= 1
    poisoned = [client.id for client in loop.clients if isinstance(client.train, Triggered)]
    assert poisoned == drawn
    wrong = from_mapping({**RECIPE, "adversaries": [{"target": "least_likely", "fraction": 0.1}]})
    with pytest.raises(
        UserError, match=r"adversaries\.0: least_likely attacks responses, and clients of method fedavg send"
    ):
        build(wrong, tmp_path / "wrong")
