"""Networks built from a file's own list of layers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fdl.errors import UserError
from fdl.modules.layer_graph import LayerGraph, SameConv2d

DATA = os.environ.get("FDL_DATA")
SIZE = {"num_classes": 6, "input_shape": (3, 9, 9)}


def conv(name, inputs, output, op="conv", stride=1, act="relu6", padding="SAME"):
    wires = {"op": op, "name": name, "inputs": inputs, "output": output}
    return wires | {"stride": stride, "act": act, "padding": padding}


LAYERS = [
    conv("a", [0], 1, stride=2),
    conv("b", [1], 2, op="dwconv", act=None),
    {"op": "add", "inputs": [2, 1], "output": 3},
    {"op": "avgpool", "inputs": [3], "output": 4},
    conv("c", [4], 5, act=None),
    {"op": "reshape", "inputs": [5], "output": 6},
    {"op": "softmax", "inputs": [6], "output": 7},
]


def stored(path, layers=LAYERS, **changes):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3, 3, 3), "b": (4, 1, 3, 3), "c": (6, 4, 1, 1)}
    arrays = {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    arrays |= {f"{n}.bias": rng.normal(size=s[0]).astype(np.float32) for n, s in shapes.items()}
    graph = json.dumps({"input": 0, "input_shape": [1, 9, 9, 3], "layers": layers})
    arrays = {name: value for name, value in (arrays | {"layers_json": graph} | changes).items() if value is not None}
    np.savez(path, **arrays)
    return {name: torch.from_numpy(value) for name, value in arrays.items() if name != "layers_json"}


def test_the_network_is_the_files(tmp_path):
    w = stored(tmp_path / "w.npz")
    module = LayerGraph(str(tmp_path / "w.npz"), **SIZE).eval()
    x = torch.randn(2, 3, 9, 9)
    # 9 pixels at stride 2 make 5, which needs one more on every side
    a = F.relu6(F.conv2d(F.pad(x, (1, 1, 1, 1)), w["a.weight"], w["a.bias"], stride=2))
    b = F.conv2d(F.pad(a, (1, 1, 1, 1)), w["b.weight"], w["b.bias"], groups=4)
    pooled = (a + b).mean((2, 3))
    output = module(x)
    torch.testing.assert_close(output.embedding, pooled)
    torch.testing.assert_close(output.logits, pooled @ w["c.weight"].flatten(1).T + w["c.bias"])
    assert module.adapter is None and module.head == "c"


@pytest.mark.parametrize(("side", "stride", "kernel"), [(8, 2, 3), (9, 2, 3), (7, 1, 5), (8, 3, 2), (6, 1, 4)])
def test_padding_is_tensorflows(side, stride, kernel):
    layer = SameConv2d(1, 1, kernel, stride, act=nn.Identity())
    x = torch.randn(1, 1, side, side)
    rows = -(-side // stride)
    total = max((rows - 1) * stride + kernel - side, 0)
    padded = torch.zeros(side + total, side + total)
    padded[total // 2 : total // 2 + side, total // 2 : total // 2 + side] = x[0, 0]
    expected = torch.zeros(rows, rows)
    for i in range(rows):
        for j in range(rows):
            window = padded[i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            expected[i, j] = (window * layer.weight[0, 0]).sum() + layer.bias[0]
    torch.testing.assert_close(layer(x)[0, 0], expected)


def test_images_of_another_size_are_brought_to_the_files(tmp_path):
    stored(tmp_path / "w.npz")
    plain = LayerGraph(str(tmp_path / "w.npz"), **SIZE).eval()
    module = LayerGraph(str(tmp_path / "w.npz"), num_classes=6, input_shape=(1, 5, 5)).eval()
    x = torch.rand(2, 1, 5, 5)
    seen = F.interpolate(x, size=9, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1) * 2 - 1
    torch.testing.assert_close(module(x).logits, plain(seen).logits, rtol=1e-4, atol=1e-4)
    other = LayerGraph(str(tmp_path / "w.npz"), adapt=False, num_classes=3, input_shape=(3, 16, 16))
    assert other.adapter is None and other(torch.randn(2, 3, 16, 16)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        (LAYERS, {"layers_json": None}, "w.npz holds no graph of layers in layers_json: KeyError"),
        (LAYERS, {"layers_json": "{"}, "w.npz holds no graph of layers in layers_json: JSONDecodeError"),
        ([{**LAYERS[0], "op": "exec"}], {}, "layer 0 is 'exec', expected one of conv, dwconv, add"),
        ([conv("a", [9], 1)], {}, "layer 0 .conv. needs a tensor that no layer before it makes"),
        ([conv("z", [0], 1)], {}, "z.weight is missing"),
        ([conv("a", [0], 1, padding="VALID")], {}, "a has padding 'VALID', expected SAME"),
        ([conv("a", [0], 1, act="swish")], {}, "a has activation 'swish', expected relu6, relu or null"),
        (LAYERS[3:4], {}, "needs a tensor"),
        (LAYERS, {"c.bias": None}, "w.npz does not fit its own graph: 1 of 6 names missing .c.bias."),
    ],
)
def test_bad_files_are_named(tmp_path, layers, changes, message):
    stored(tmp_path / "w.npz", layers, **changes)
    with pytest.raises(UserError, match=message):
        LayerGraph(str(tmp_path / "w.npz"), **SIZE)


@pytest.mark.skipif(DATA is None, reason="FDL_DATA is not set")
def test_mobilenet_knows_dogs_in_small_photographs():
    """ImageNet's 118 dogs among its 1,001 classes, in 48-pixel photographs enlarged to 128: chance would be 0.12."""
    with np.load(Path(DATA) / "pacs_48.npz") as file:
        photos = (file["domain_test"] == list(file["domains"]).index("photo")) & (file["y_test"] == 0)
        x = torch.from_numpy(file["x_test"][photos]).permute(0, 3, 1, 2).float() / 255
    weights = str(Path(DATA) / "weights/mobilenet_v1_0.25_128_imagenet_dequant.npz")
    module = LayerGraph(weights, num_classes=1001, input_shape=(3, 48, 48)).eval()
    with torch.inference_mode():
        answers = module(x).logits.argmax(1)
    assert module.adapter.output_shape == (3, 128, 128)
    assert ((answers >= 152) & (answers < 270)).float().mean() > 0.55
