"""What a run asks a frozen model, it asks once."""

import torch
from torch import nn

from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.modules.output import Output


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self._calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self._calls += 1
        return Output(self.layer(x), x, {})


def test_a_frozen_model_is_asked_once_and_again_when_it_changes(tmp_path):
    samples = TensorSamples(torch.rand(5, 3))
    module = Counting()
    runtime = Runtime(accelerator="cpu", cache=str(tmp_path))
    first = runtime.predict(module, samples)
    assert runtime.predict(module, samples).equal(first)
    assert module._calls == 2  # it could still be trained
    module.requires_grad_(False)
    assert all(runtime.predict(module, samples).equal(first) for _ in range(3))
    assert module._calls == 3
    another = Runtime(accelerator="cpu", cache=str(tmp_path))
    assert another.predict(module, samples).equal(first)
    assert module._calls == 3
    module.layer.weight.data += 1
    assert not another.predict(module, samples).equal(first)
    assert module._calls == 4
