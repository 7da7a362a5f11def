"""A handle finds what a walk over the module finds, whatever becomes of the module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fdl.state.flat_tensors import FlatTensors
from fdl.state.model_handle import ModelHandle, RowHandle, named_state
from fdl.state.weights import load_into, module_state, trainable


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def assert_same_memory(module):
    """Both ways of asking give the same names and the same memory, and the handle fills what forward uses."""
    known = module_state(module)  # first: it may move what has changed into one vector again
    walked = named_state(module)
    assert list(walked) == list(known)
    assert [t.data_ptr() for t in walked.values()] == [t.data_ptr() for t in known.values()]
    assert list(map(id, trainable(module))) == [id(p) for p in module.parameters() if p.requires_grad]
    load_into(module, {name: torch.full_like(tensor, 7) for name, tensor in known.items()})
    assert all(bool((p == 7).all()) for p in module.parameters())


def replace_layer(module):
    module[2] = nn.Linear(2, 5)


def replace_parameter(module):
    module[0].weight = nn.Parameter(torch.ones(4, 3))


def drop_bias(module):
    module[0].bias = None


def add_buffer(module):
    module[0].register_buffer("count", torch.zeros(2))


def replace_memory(module):
    module[0].weight.data = torch.ones(2, 3)


def add_bias(module):
    module[2] = nn.Linear(2, 2, bias=False)
    module[2].bias = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    "change",
    [
        *(nn.Module.double, nn.Module.half, replace_layer, replace_parameter, replace_memory),
        *(drop_bias, add_bias, add_buffer),
    ],
    ids=lambda change: change.__name__,
)
def test_a_module_may_change_under_its_handle(change):
    module = model()
    ModelHandle(module)
    assert isinstance(module_state(module), FlatTensors)
    assert_same_memory(module)
    change(module)
    assert_same_memory(module)


@pytest.mark.parametrize("change", [replace_layer, replace_parameter, drop_bias, add_bias, add_buffer])
def test_trainable_parameters_follow_a_replaced_tensor(change):
    module = model()
    handle = ModelHandle(module)
    change(module)
    assert list(map(id, handle.trainable)) == [id(p) for p in module.parameters()]


def test_copies_have_no_handle():
    module = model()
    handle = ModelHandle(module)
    assert ModelHandle.of(module) is handle and handle.module is module
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert ModelHandle.of(other) is None
    copied = copy.deepcopy(module)
    load_into(copied, {name: torch.zeros_like(tensor) for name, tensor in module_state(copied).items()})
    assert bool(module[0].weight.any())


def test_a_handle_does_not_keep_its_module():
    handle = ModelHandle(model())
    with pytest.raises(ReferenceError):
        handle.module  # noqa: B018


def test_a_row_refuses_to_be_moved():
    module = model()
    row = torch.zeros(sum(p.numel() for p in module.parameters()))
    state = FlatTensors(row, {name: tuple(p.shape) for name, p in module.named_parameters()})
    for name, view in state.items():
        dict(module.named_parameters())[name].data = view
    RowHandle(module, state)
    load_into(module, {name: torch.ones_like(view) for name, view in state.items()})
    assert bool((row == 1).all())
    module.double()
    with pytest.raises(RuntimeError, match="trained side by side with others"):
        module_state(module)
