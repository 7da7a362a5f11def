"""Weights as other programs save them reach the network under its own names."""

import argparse
import logging
from pathlib import Path

import lightning
import numpy as np
import pytest
import timm
import torch
from torch import nn

from fdl.errors import UserError
from fdl.modules.checkpoints import read_weights
from fdl.modules.state_names import describe_mismatch, find_state_dict, strip_wrapper_prefixes
from fdl.modules.timm_model import Timm

WEIGHTS = {"stem.weight": torch.arange(6.0).reshape(2, 3), "head.module.bias": torch.ones(2)}


def same(found, weights=WEIGHTS):
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def under(prefix):
    return {f"{prefix}{name}": value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "net._orig_mod.",
        "_forward_module.my_own_attribute.",
        "encoder.",
        "model.model.module.",
    ],
)
def test_prefixes_go_in_any_order_and_are_named(prefix, caplog):
    with caplog.at_level(logging.INFO, "fdl"):
        assert same(strip_wrapper_prefixes(under(prefix), WEIGHTS, "w.pth"))
    # what torch.compile and Fabric put in the middle goes first
    assert "removed the prefix" in caplog.text and "w.pth" in caplog.text


def test_what_compiled_parts_are_called_goes_from_the_middle():
    assert same(
        strip_wrapper_prefixes(
            {"stem._orig_mod.weight": WEIGHTS["stem.weight"], "head.module.bias": torch.ones(2)}, WEIGHTS, "w"
        )
    )


def test_names_that_fit_stay_although_a_prefix_would_fit_too():
    own = {"a.b": torch.ones(1), "b": torch.zeros(1)}
    assert same(strip_wrapper_prefixes(own, own, "w"), own)


def test_other_parts_of_a_module_are_left_out(caplog):
    with caplog.at_level(logging.INFO, "fdl"):
        assert same(strip_wrapper_prefixes(under("net.") | {"loss.weight": torch.ones(3)}, WEIGHTS, "w.ckpt"))
    assert "removed the prefix 'net.' from 2 names; dropped 1 names without it" in caplog.text


def test_two_networks_in_one_file_are_not_guessed_between():
    with pytest.raises(UserError, match=r"fit under 'student\.' and under 'teacher\.'; save those that are meant"):
        strip_wrapper_prefixes(under("student.") | under("teacher."), WEIGHTS, "w.pth")


def test_an_average_goes_before_the_weights_it_is_of():
    zeros = {name: torch.zeros_like(value) for name, value in under("model.").items()}
    assert same(strip_wrapper_prefixes(zeros | under("model_ema.module."), WEIGHTS, "w.pth"))


@pytest.mark.parametrize(
    "found",
    [
        {"model_state_dict": WEIGHTS, "loss": 0.1},
        {"net": WEIGHTS, "acc": 91.2, "epoch": 3},
        {"params": WEIGHTS},
        {"weights": {"state_dict": WEIGHTS}},
        {"ema": {"module": WEIGHTS}, "model": {name: value * 0 for name, value in WEIGHTS.items()}},
        {"state_dict": WEIGHTS, "best": torch.tensor(0.9)},
        {"our_network": WEIGHTS, "optimizer": {"state": {"a": torch.ones(1)}}, "step": 3},
    ],
)
def test_containers_are_looked_into(found):
    assert same(find_state_dict(found))


def test_of_several_unknown_sets_none_is_taken():
    assert find_state_dict({"first": WEIGHTS, "second": WEIGHTS}) == {}


def test_values_beside_the_weights_are_read_and_objects_are_not(tmp_path):
    beside = {"args": argparse.Namespace(lr=0.1, out=Path("runs")), "best": np.float64(0.9)}
    torch.save({"state_dict": WEIGHTS, **beside}, tmp_path / "timm.pth.tar")
    assert same(read_weights(tmp_path / "timm.pth.tar"))
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"\(torch\.nn\.modules\.linear\.Linear\); save the weights alone") as caught:
        read_weights(tmp_path / "whole.pth")
    assert "\x1b" not in str(caught.value)


def test_a_misfit_names_three_of_each():
    names = [f"layer{i}.weight" for i in range(5)]
    assert describe_mismatch(names, names) == ""
    said = describe_mismatch(["head.weight", *(f"blk{i}.weight" for i in range(4))], ["head.weight", *names])
    assert said.startswith(
        "5 of 6 names missing (layer0.weight, layer1.weight, layer2.weight, …) and 4 of 5 names unexpected "
        "(blk0.weight, blk1.weight, blk2.weight, …); "
    )
    assert "another architecture" in said


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"lr": 0.1, "out": Path("runs")})
        self.network = timm.create_model("test_resnet", num_classes=3, in_chans=1)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))

    def training_step(self, batch, batch_idx):
        return self.criterion(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_a_checkpoint_of_lightning_is_a_students_weights(tmp_path, caplog):
    batch = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader([tuple(x) for x in zip(*batch)], batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, "fdl"):
        student = Timm("test_resnet", checkpoint=str(tmp_path / "last.ckpt"), num_classes=3, input_shape=(1, 16, 16))
    assert "removed the prefix 'network.'" in caplog.text
    with torch.no_grad():
        assert torch.equal(student.eval()(batch[0]).logits, module.network.eval()(batch[0]))


def test_weights_of_another_network_are_refused_with_names(tmp_path):
    state = timm.create_model("test_resnet", num_classes=3, in_chans=1).state_dict()
    torch.save({k.replace("layer", "blk"): v for k, v in state.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"72 of 92 names missing \(layer1.*and 72 of 92 names unexpected \(blk1.*; "):
        Timm("test_resnet", checkpoint=str(tmp_path / "w.pth"), num_classes=3, input_shape=(1, 16, 16))
