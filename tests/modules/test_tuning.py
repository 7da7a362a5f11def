"""What is trained and what is not, on networks of torch, transformers and timm."""

import pytest
import timm
import torch
from torch import nn

from fdl.errors import UserError
from fdl.modules.tuning import apply_tuning, frozen_names, keep_frozen_in_eval, linear_layers, merge_lora

pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.second, self.head = nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.second(self.drop(torch.relu(self.norm(self.first(x))))))


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def step(network: nn.Module, x: torch.Tensor) -> set[str]:
    """One step in training mode; returns what it changed."""
    network.train()
    keep_frozen_in_eval(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    network(x).square().sum().backward()
    optimizer.step()
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def test_full_tuning_leaves_everything_as_it_was():
    network = Net()
    assert apply_tuning(network, "full", ["head"], pretrained=False) == frozenset()
    assert trained(network) == {name for name, _ in network.named_parameters()}


def test_head_tuning_changes_the_head_alone_and_no_running_statistics():
    network = Net()
    frozen = apply_tuning(network, "head", ["head"])
    changed = step(network, torch.randn(16, 6))
    assert changed == {"head.1.weight", "head.1.bias"}
    assert frozen == set(network.state_dict()) - changed
    assert not network.norm.training
    assert not network.first.training
    assert network.head[0].training


def test_a_head_may_be_a_single_parameter():
    network = Net()
    apply_tuning(network, "head", ["second.bias"])
    assert trained(network) == {"second.bias"}


def test_frozen_changes_nothing_and_answers_the_same_in_training():
    network, x = Net(), torch.randn(16, 6)
    expected = network.eval()(x)
    frozen = apply_tuning(network, "frozen", ["head"])
    network.train()
    keep_frozen_in_eval(network)
    assert torch.equal(network(x), expected)
    assert frozen == set(network.state_dict())


@pytest.mark.parametrize("train_head", [True, False])
def test_lora_starts_as_the_network_and_changes_only_what_it_added(train_head):
    network, x = Net(), torch.randn(16, 6)
    expected = network.eval()(x)
    frozen = apply_tuning(network, "lora", ["head"], {"rank": 2}, train_head=train_head)
    torch.testing.assert_close(network.eval()(x), expected)
    changed = step(network, x) | step(network, x)  # A moves once B is not zero
    added = {f"{layer}.lora_{m}.default.weight" for layer in ("first", "second") for m in "AB"}
    assert changed == added | ({"head.1.weight", "head.1.bias"} if train_head else set())
    assert frozen == set(network.state_dict()) - changed
    assert frozen == frozen_names(network)
    assert not network.norm.training


def test_lora_computes_its_formula_and_merges_into_it():
    layer = nn.Sequential(nn.Linear(6, 5))
    weight, bias = layer[0].weight.clone(), layer[0].bias.clone()
    apply_tuning(layer, "lora", [], {"rank": 2, "alpha": 6})
    nn.init.normal_(layer[0].lora_B.default.weight)
    a, b = layer[0].lora_A.default.weight, layer[0].lora_B.default.weight
    x = torch.randn(4, 6)
    expected = x @ (weight + 6 / 2 * b @ a).T + bias
    torch.testing.assert_close(layer(x), expected)
    merged = merge_lora(layer)
    assert set(merged.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(merged(x), expected)


def test_with_a_frozen_the_mean_of_products_is_the_product_of_means():
    sites = []
    for seed in (1, 2):  # sites draw from different streams, and still have one A
        network = Net()
        torch.manual_seed(seed)
        frozen = apply_tuning(network, "lora", ["head"], {"rank": 2, "freeze_a": True})
        sites.append(network)
    name = "first.lora_A.default.weight"
    first, second = (site.state_dict()[name] for site in sites)
    assert torch.equal(first, second)
    assert float(first.abs().max()) > 0
    assert not torch.equal(first[:, :6], sites[0].state_dict()["second.lora_A.default.weight"][:, :6])
    assert name in frozen
    assert step(sites[0], torch.randn(16, 6)) & {name} == set()


def test_targets_are_names_or_globs_of_linear_layers():
    network = Net()
    apply_tuning(network, "lora", ["head"], {"targets": ["sec*"]})
    assert {name.split(".")[0] for name in trained(network)} == {"second", "head"}
    # a name is not taken for the end of a longer one
    nested = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    apply_tuning(nested, "lora", [], {"targets": ["a"]})
    assert all(name.startswith("a.") for name in trained(nested))


def test_layers_that_attention_does_not_call_are_no_targets():
    network = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "mlp": nn.Linear(4, 4)})
    assert linear_layers(network) == ["mlp"]
    with pytest.raises(UserError, match="names no linear layer that LoRA"):
        apply_tuning(network, "lora", [], {"targets": ["attention.out_proj"]})


def test_a_vision_transformer_of_timm():
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=4).eval()
    x = torch.randn(2, 3, 160, 160)
    expected = network(x)
    apply_tuning(network, "lora", ["head"], {"rank": 2})
    assert any("qkv.lora_A" in name for name in trained(network))
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(merge_lora(network)(x), expected)


def test_a_convolutional_network_has_no_layers_for_lora():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(UserError, match="no linear layers but its head"):
        apply_tuning(network, "lora", ["2"])


def test_what_is_tied_to_the_head_is_trained_with_it():
    network = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 5)})
    network["out"].weight = network["embedding"].weight
    frozen = apply_tuning(network, "head", ["out"])
    assert frozen == {"body.weight", "body.bias"}


@pytest.mark.parametrize(
    ("tuning", "lora", "message"),
    [
        ("half", None, "must be one of full, head, frozen, lora"),
        ("head", {"rank": 2}, "lora is for tuning: lora"),
        ("lora", {"rnk": 2}, "lora takes no 'rnk'"),
        ("lora", {"rank": 0}, r"lora\.rank must be"),
        ("lora", {"init": "zeros"}, r"lora\.init must be"),
        ("lora", {"targets": "first"}, r"lora\.targets must be a list"),
        ("lora", {"targets": ["third"]}, r"lora\.targets: no submodule matches 'third'"),
        ("lora", {"targets": ["norm"]}, "'norm' names no linear layer"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tuning, lora, message):
    with pytest.raises(UserError, match=message):
        apply_tuning(Net(), tuning, ["head"], lora)


@pytest.mark.parametrize("tuning", ["head", "frozen", "lora"])
def test_random_weights_are_not_frozen(tuning):
    with pytest.raises(UserError, match="needs pretrained weights"):
        apply_tuning(Net(), tuning, ["head"], pretrained=False)


def test_pretrained_weights_that_are_not_finite_are_refused_wherever_they_come_from():
    network = Net()
    with torch.no_grad():
        network.second.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"pretrained weights of Net: 1 of 8 numbers in second\.bias are not finite"):
        apply_tuning(network, "full", ["head"], pretrained=True)
    apply_tuning(network, "full", ["head"], pretrained=False)  # new ones are nobody's promise
