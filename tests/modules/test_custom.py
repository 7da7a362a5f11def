"""Custom networks by import path."""

import pytest
import torch

from fdl.errors import UserError
from fdl.modules.custom import CustomNetwork
from tests.modules.makers import COLOUR, GREY

HERE = "tests.modules.makers"


def test_logits_alone_are_enough():
    module = CustomNetwork(f"{HERE}.logits_alone", {"width": 12}, **GREY)
    assert (module.head, module.embedding_dim) == ("3", 12)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(module(x).logits, module.backbone(x))
    assert torch.equal(module(x).embedding, module.backbone[:3](x))


def test_the_embedding_may_be_taken_before_another_layer():
    module = CustomNetwork(f"{HERE}.logits_alone", {"width": 12}, head="1", **GREY)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(module(x).embedding, x.flatten(1))


def test_a_pair_is_taken_as_it_is():
    module = CustomNetwork(f"{HERE}.Pair", **GREY)
    x = torch.randn(3, 1, 8, 8)
    logits, embedding = module.backbone(x)
    assert torch.equal(module(x).logits, logits)
    assert torch.equal(module(x).embedding, embedding)


@pytest.mark.parametrize(
    ("backbone", "args", "size", "message"),
    [
        (f"{HERE}.Pare", {}, GREY, r"tests.modules.makers has no 'Pare'; did you mean 'Pair'"),
        (f"{HERE}.GREY", {}, GREY, "makers.GREY is a dict, expected what builds a torch.nn.Module"),
        (f"{HERE}.not_a_network", {}, GREY, "not_a_network returns a int, expected a torch.nn.Module"),
        (f"{HERE}.logits_alone", {}, GREY, "logits_alone refuses its arguments: .*width"),
        (f"{HERE}.Pair", {}, COLOUR, r"custom \(Pair\) cannot take images of 3×32×32"),
        (f"{HERE}.Rows", {}, GREY, r"returns logits of shape \[1, 8, 8\] for one image, expected \[1, 10\]"),
    ],
)
def test_bad_arguments_are_named(backbone, args, size, message):
    with pytest.raises(UserError, match=message):
        CustomNetwork(backbone, args, **size)
