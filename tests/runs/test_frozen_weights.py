"""Frozen weights are neither sent nor stored, so a resumed run must find the same ones."""

import pytest
import torch

from fdl import recipe
from fdl.build import build
from fdl.errors import UserError
from fdl.runs import run as runs
from fdl.state.checkpoint import load_best
from fdl.state.weights import load_into, module_state


@pytest.fixture
def weights(tmp_path):
    import timm

    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", in_chans=1).state_dict(), path)
    return path


def tree(weights, rounds=1, tuning="head"):
    args = {"model": "test_resnet", "checkpoint": str(weights), "tuning": tuning}
    return recipe.from_mapping(
        {
            "name": "frozen",
            "method": "fedavg",
            "data": "digits",
            "federation": {"clients": 2, "rounds": rounds},
            "student": {"target": "timm", "args": args},
            "callbacks": [],
        }
    )


def test_only_the_head_is_sent(weights, tmp_path):
    summary = runs.run_recipe(tree(weights), tmp_path / "run")
    student = build(tree(weights), tmp_path / "other").server.student
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in student.parameters())
    assert trained < total / 50
    assert 4 * trained < summary["communication"]["upload_bytes"] / 2 < 4 * trained + 500
    best = (tmp_path / "run" / "best.safetensors").stat().st_size
    assert best < 4 * trained + 2000


def test_other_frozen_weights_are_another_run(weights, tmp_path):
    import timm

    runs.run_recipe(tree(weights), tmp_path / "run")
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", in_chans=1).state_dict(), weights)
    with pytest.raises(UserError, match="changed since this checkpoint was written"):
        runs.run_recipe(tree(weights, rounds=2), tmp_path / "run", resume=True)


def test_a_model_that_is_all_frozen_trains_nothing(weights, tmp_path):
    loop = build(tree(weights), tmp_path / "run")
    client, student = loop.clients[0], loop.server.student.requires_grad_(False)
    assert client.fit(student, client.train, client.local_training) == {}


def test_an_optimizer_of_the_server_moves_what_is_trained_alone(weights, tmp_path):
    made = tree(weights)
    made.method.args["optimizer"] = {"target": "adam", "args": {"lr": 0.1}}
    runs.run_recipe(made, tmp_path / "run")
    before, after = (build(tree(weights), tmp_path / "other").server.student for _ in range(2))
    load_into(after, load_best(tmp_path / "run" / "best.safetensors")["student"])
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == set(module_state(after))
