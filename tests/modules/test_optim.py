import pytest
import torch
from torch import nn

from fdl.errors import UserError
from fdl.modules.optim import build_optimizer, build_scheduler


@pytest.fixture
def parameters():
    return list(nn.Linear(3, 2).parameters())


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
        ("torch.optim.NAdam", torch.optim.NAdam),
    ],
)
def test_optimizers_by_short_name_and_by_path(parameters, target, kind):
    optimizer = build_optimizer(parameters, target, {"lr": 0.25})
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["params"] == parameters


def test_arguments_are_optional_and_groups_are_taken(parameters):
    groups = [{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:]}]
    assert [g["lr"] for g in build_optimizer(groups, "sgd", {"lr": 0.5}).param_groups] == [1.0, 0.5]
    assert build_optimizer(iter(parameters), "adamw").param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("target", "args", "kind"),
    [
        ("cosine_annealing_lr", {"T_max": 10}, torch.optim.lr_scheduler.CosineAnnealingLR),
        ("step_lr", {"step_size": 2}, torch.optim.lr_scheduler.StepLR),
        ("one_cycle_lr", {"max_lr": 1.0, "total_steps": 5}, torch.optim.lr_scheduler.OneCycleLR),
        ("torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.9}, torch.optim.lr_scheduler.ExponentialLR),
    ],
)
def test_schedulers_by_short_name_and_by_path(parameters, target, args, kind):
    optimizer = build_optimizer(parameters, "sgd", {"lr": 0.1})
    scheduler = build_scheduler(optimizer, target, args)
    assert type(scheduler) is kind
    assert scheduler.optimizer is optimizer


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("sdg", {}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ("torch.optim.Adm", {}, "has no 'Adm'; did you mean 'Adam'"),
        ("torch.nn.Linear", {}, "does not derive from torch.optim.Optimizer"),
        ("sgd", {"lrr": 0.1}, "optimizer sgd takes no 'lrr'; did you mean 'lr'"),
        ("sgd", {"lr": -1.0}, "optimizer sgd refuses its arguments: Invalid learning rate: -1.0"),
        ("lbfgs", {}, r"LBFGS cannot be used: its step\(\) needs 'closure'"),
    ],
)
def test_bad_optimizers_are_named(parameters, target, args, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(parameters, target, args)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("cosine_anealing_lr", {}, "unknown scheduler 'cosine_anealing_lr'; did you mean 'cosine_annealing_lr'"),
        ("step_lr", {"step": 3}, "scheduler step_lr takes no 'step'; did you mean 'step_size'"),
        ("step_lr", {}, "scheduler step_lr refuses its arguments: .*step_size"),
        ("reduce_lr_on_plateau", {}, r"ReduceLROnPlateau cannot be used: its step\(\) needs 'metrics'"),
    ],
)
def test_bad_schedulers_are_named(parameters, target, args, message):
    with pytest.raises(UserError, match=message):
        build_scheduler(build_optimizer(parameters, "sgd", {"lr": 0.1}), target, args)


def test_no_parameters_are_refused():
    with pytest.raises(UserError, match="optimizer sgd refuses its arguments: optimizer got an empty parameter list"):
        build_optimizer([], "sgd", {"lr": 0.1})
