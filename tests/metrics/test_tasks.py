import pytest
import torch
from torch import nn

from fdl.build import build
from fdl.datamodules.samples import Samples
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.metrics.tasks import TASKS
from fdl.modules.output import Output
from fdl.recipe import from_mapping
from fdl.state.model_handle import ModelHandle
from fdl.state.weights import load_into, module_state


class Pairs(Samples):
    """Inputs of two parts, as images with captions are."""

    labels = None

    def __len__(self):
        return 5

    nbytes = 0

    def batch(self, indices, generator=None):
        return (indices.float().unsqueeze(1), 10 * indices.unsqueeze(1)), None

    def subset(self, indices):
        return self

    def unlabelled(self):
        return self

    def content_hash(self):
        return ""


class Sum(nn.Module):
    def forward(self, inputs):
        left, right = inputs
        return Output(left + right, left, {})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.backbone, self.head = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = frozenset({"backbone.weight", "backbone.bias"})


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_score_is_always_measured(task):
    assert task.score in task.metrics
    assert set(task.default) <= set(task.metrics)
    assert task.select(None) == task.default
    other = next(name for name in task.metrics if name != task.score)
    assert task.select([other]) == (task.score, other)


def test_a_metric_of_another_task_is_refused():
    with pytest.raises(UserError, match=r"evaluation\.metrics\.1: 'accuracy' is no metric of language data"):
        TASKS["language"].select(["nll", "accuracy"])


def test_a_model_answers_any_question_on_inputs_of_several_parts():
    runtime = Runtime(accelerator="cpu", batch_size=2)
    expected = 11.0 * torch.arange(5).unsqueeze(1)
    assert runtime.predict(Sum(), Pairs()).equal(expected)
    assert runtime.predict(Sum(), Pairs(), lambda module, inputs: 2 * module(inputs).logits).equal(2 * expected)


@pytest.mark.parametrize("pinned", [False, True])
def test_neither_frozen_nor_tied_weights_are_stated_twice(pinned):
    module = Tied()
    if pinned:
        ModelHandle(module)
    assert list(module_state(module)) == ["embedding.weight"]
    load_into(module, {"embedding.weight": torch.ones(4, 3)})
    assert module.head.weight.equal(torch.ones(4, 3))


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("federated_distillation", "captioned_digits", "is for classification data, and captioned_digits is for image"),
        ("token_distillation", "digits", "is for language data, and digits is for classification"),
        ("codistillation", "captioned_digits", "is for classification and language data, and captioned_digits is for"),
        *(
            (method, "captioned_digits", f"method: {method} is for classification data")
            for method in ("fed_lpfm", "fedproto", "fml", "feddf", "cfed")
        ),
    ],
)
def test_a_method_for_other_data_is_refused(tmp_path, method, data, message):
    tree = {"method": method, "data": data, "student": "mlp", "specialists": ["mlp"]}
    with pytest.raises(UserError, match=message):
        build(from_mapping(tree), tmp_path)
