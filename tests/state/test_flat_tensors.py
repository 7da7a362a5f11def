import copy

import pytest
import torch
from torch import nn

from fdl.state.flat_tensors import FlatTensors, flat_view, flatten_module_
from fdl.state.model_handle import ModelHandle
from fdl.state.weights import load_into, module_state


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_pieces_are_views_of_their_vector():
    pieces = FlatTensors(torch.arange(10.0), {"a": (2, 3), "b": (), "c": (3,)})
    assert list(pieces) == ["a", "b", "c"] and len(pieces) == 3
    assert torch.equal(pieces["a"], torch.arange(6.0).reshape(2, 3))
    assert pieces["b"] == 6 and torch.equal(pieces["c"], torch.tensor([7.0, 8.0, 9.0]))
    pieces.buffer[7] = -1
    assert dict(pieces.items())["c"][0] == -1
    assert torch.equal(flat_view(pieces.values()), pieces.buffer)


def test_as_one_sees_only_what_lies_side_by_side_in_order():
    base = torch.arange(6.0)
    left, right = base[:2], base[2:]
    assert torch.equal(flat_view([left, right]), base)
    for tensors in ([right, left], [left, right.clone()], [left, base[3:]], [base[::2]], []):
        assert flat_view(tensors) is None


def test_a_module_laid_side_by_side_answers_and_learns_as_before():
    laid, plain = net(), net()
    state = flatten_module_(laid)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for module in (laid, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(laid(x), plain(x))
    assert torch.equal(flat_view(laid.state_dict().values()), state.buffer)
    torch.testing.assert_close(dict(state.items()), dict(plain.state_dict()))


def tied():
    module = net()
    module.append(nn.Linear(4, 2))
    module[3].weight = module[2].weight
    return module


@pytest.mark.parametrize("make", [tied, lambda: nn.Sequential(nn.BatchNorm1d(3)), lambda: nn.ReLU()])
def test_what_cannot_be_one_vector_is_left_alone(make):
    module = make()
    before = {name: (value.data_ptr(), value.clone()) for name, value in module.state_dict().items()}
    assert flatten_module_(module) is None
    for name, value in module.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])


def test_arrays_are_views_of_the_memory_of_pieces():
    pieces = FlatTensors(torch.arange(7.0), {"a": (2, 3), "b": (), "none": (0, 2)})
    arrays = pieces.arrays
    assert {name: array.shape for name, array in arrays.items()} == pieces.shapes
    arrays["b"][...] = -1
    arrays["a"][1, 2] = 9
    assert pieces.buffer.tolist() == [0, 1, 2, 3, 4, 9, -1]
    assert FlatTensors.of(arrays)["a"].data_ptr() == pieces.buffer.data_ptr()
    assert all(
        FlatTensors(torch.zeros(1, dtype=dtype), {"a": (1,)}).arrays is None for dtype in (torch.half, torch.double)
    )


def test_a_copy_of_pieces_has_memory_of_its_own():
    pieces = FlatTensors(torch.arange(3.0), {"a": (3,)})
    assert pieces.arrays is not None
    copied = copy.deepcopy(pieces)
    pieces.buffer.zero_()
    assert copied["a"].tolist() == copied.arrays["a"].tolist() == [0, 1, 2]


def test_loading_in_one_piece_equals_loading_by_name():
    module, other = net(), net()
    ModelHandle(module)
    shapes = {name: tuple(value.shape) for name, value in module_state(module).items()}
    pieces = FlatTensors(torch.randn(sum(value.numel() for value in module_state(module).values())), shapes)
    load_into(module, pieces)
    load_into(other, dict(pieces.items()))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))
    wrong = FlatTensors(pieces.buffer, dict(reversed(shapes.items())))
    load_into(module, wrong)  # another order: by name, not by place
    assert torch.equal(module[0].weight, wrong["0.weight"])
    with pytest.raises(ValueError, match="missing"):
        load_into(module, FlatTensors(pieces.buffer, {"other": (len(pieces.buffer),)}))
