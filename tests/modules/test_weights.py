import pytest
import torch
from torch import nn

from fdl.state.weights import count_parameters, load_into, module_state
from tests.modules.makers import FAMILIES


@pytest.fixture
def module():
    return FAMILIES["cnn"]()


def test_the_state_refers_to_the_modules_own_tensors_without_gradient(module):
    state = module_state(module)
    assert state.keys() == module.state_dict().keys()
    assert any(name.endswith("running_var") for name in state)
    assert not any(value.requires_grad for value in state.values())
    with torch.no_grad():
        module.backbone.head.bias.fill_(5.0)
    assert (state["backbone.head.bias"] == 5).all()


def test_loading_copies_in_place_and_exactly(module):
    torch.manual_seed(1)
    other = FAMILIES["cnn"]()
    other(torch.randn(8, 1, 8, 8))  # moves the running statistics and the batch counters
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    load_into(module, module_state(other))
    assert all(torch.equal(value, module_state(module)[name]) for name, value in module_state(other).items())
    assert before == {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module_state(module)["backbone.trunk.0.1.num_batches_tracked"].item() == 1


def test_loading_converts_floating_point_types(module):
    load_into(module, {k: v.double() if v.is_floating_point() else v.int() for k, v in module_state(module).items()})
    assert {v.dtype for v in module_state(module).values()} == {torch.float32, torch.int64}


def spoil(state, name, value):
    return {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("backbone.head.bias", None, "tensors do not fit CNN: missing 'backbone.head.bias'"),
        ("extra", torch.zeros(1), "tensors do not fit CNN: unknown 'extra'"),
        ("backbone.head.bias", torch.zeros(9), r"'backbone.head.bias' has shape \[9\], expected \[10\]"),
        ("backbone.head.bias", torch.zeros(10, dtype=torch.int64), "'backbone.head.bias' is torch.int64"),
        ("backbone.trunk.0.1.num_batches_tracked", torch.tensor(1.5), "num_batches_tracked' is torch.float32"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(module, name, value, message):
    before = {key: tensor.clone() for key, tensor in module_state(module).items()}
    sent = spoil({key: tensor + 1 for key, tensor in before.items()}, name, value)
    with pytest.raises(ValueError, match=message):
        load_into(module, sent)
    assert all(torch.equal(before[key], tensor) for key, tensor in module_state(module).items())


def test_parameters_are_counted_once_and_buffers_are_not():
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.BatchNorm1d(3), shared)
    assert count_parameters(network) == 12 + 6
    assert count_parameters(nn.ReLU()) == 0


def test_an_empty_module_has_nothing_to_load():
    load_into(nn.ReLU(), {})
    assert module_state(nn.ReLU()) == {}


def test_every_family_survives_a_round_trip_through_numpy():
    for name, make in FAMILIES.items():
        source, target = make(), make()
        load_into(target, {k: torch.from_numpy(v.numpy().copy()) for k, v in module_state(source).items()})
        assert all(torch.equal(v, module_state(target)[k]) for k, v in module_state(source).items()), name
