"""Optimisers, schedules and batches that cannot do are told before anything is trained."""

import io

import pytest
from rich.console import Console

from fdl import recipe
from fdl.build import build
from fdl.cli.check import describe_federation
from fdl.errors import UserError
from fdl.runs import run as runs
from fdl.runs.report import print_summary

NORM = {"target": "cifar_resnet", "args": {"depth": 8}}
FLAT = {"target": "custom", "args": {"backbone": f"{__name__}.flat"}}


def flat():
    """Batch normalisation of vectors, which one sample alone cannot train."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def tree(local, student=FLAT, **more):
    return {
        "name": "fits",
        "method": "fedavg",
        "data": {"target": "digits", "args": {"test": 60, "proxy": 40, "validation": 20, "limit": 320}},
        "federation": {"clients": 2, "calibration_fraction": 0.0},
        "student": student,
        "local_training": local,
        "callbacks": [],
        "fabric": {"accelerator": "cpu"},
        **more,
    }


def one_cycle(steps, interval="step"):
    return {"target": "one_cycle_lr", "args": {"max_lr": 0.1, "total_steps": steps}, "interval": interval}


def sgd(**args):
    return {"steps": 2, "optimizer": {"target": "sgd", "args": args}}


@pytest.mark.parametrize(
    ("local", "message"),
    [
        (
            {"steps": 20, "scheduler": one_cycle(10)},
            r"ing\.scheduler: one_cycle_lr ends after 10 steps, and client ",
        ),
        ({"epochs": 5, "scheduler": one_cycle(4, "epoch")}, r"ends after 4 steps.*takes 5 \(interval: epoch\)"),
        (sgd(lr=-0.1), r"local_training\.optimizer: optimizer sgd refuses its arguments: Invalid learning rate: -0\.1"),
        (sgd(lr=float("nan")), r"local_training\.optimizer: optimizer sgd: lr must be a number, got nan"),
        (sgd(lr="fast"), r"local_training\.optimizer\.args\.lr: expected float or Tensor, got 'fast'"),
        (sgd(lr=0.1, weight_decay=float("nan")), r"weight_decay must be a number, got nan"),
        (
            {"steps": 2, "batch_size": 1},
            r"local_training\.batch_size: 1, and client 0 trains student: batch norm",
        ),
    ],
)
def test_what_cannot_do_is_told_when_it_is_built(local, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(recipe.from_mapping(tree(local)), tmp_path)


def test_a_schedule_may_end_with_its_fit(tmp_path):
    summary = runs.run_recipe(recipe.from_mapping(tree({"steps": 10, "scheduler": one_cycle(10)})), tmp_path / "run")
    assert summary["rounds"] == 1


def test_images_with_many_positions_train_one_by_one(tmp_path):
    summary = runs.run_recipe(recipe.from_mapping(tree({"steps": 2, "batch_size": 1}, NORM)), tmp_path / "run")
    assert summary["rounds"] == 1


def small(choice, **federation):
    """Five clients of very uneven sizes, of whom one has a single sample."""
    more = {"partition": {"target": "quantity_skew", "args": {"exponent": 4}}}
    settings = tree({"steps": 2, "batch_size": 16}, **more)
    settings["federation"] |= {"clients": 5, "rounds": 2, "too_small": choice, **federation}
    return recipe.from_mapping(settings)


def test_a_site_of_one_sample_is_told_with_the_key_by_check_and_fit(tmp_path):
    for command in (describe_federation, runs.run_recipe):
        with pytest.raises(UserError, match=r"federation\.too_small: client \d is too small.*=leave_out"):
            command(small("refuse"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("executor", ["sequential", "vectorized"])
def test_the_others_run_without_it_if_the_recipe_says_so(executor, tmp_path):
    settings = small("leave_out").to_dict() | {"client_execution": executor}
    summary = runs.run_recipe(recipe.from_mapping(settings), tmp_path / "run")
    (left,) = summary["left_out"]
    assert [p["samples"] for p in summary["participants"] if str(p["id"]) == left] == [1]
    for record in summary["history"]:
        assert int(left) not in record["cohort"] and left not in record["clients"]
    console = Console(record=True, width=160, file=io.StringIO())
    print_summary(summary, console, tmp_path)
    assert "Clients left out" in console.export_text()
    assert f"client {left} is left out" in describe_federation(recipe.from_mapping(settings), tmp_path / "other")
