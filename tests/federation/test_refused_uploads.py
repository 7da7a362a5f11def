"""What a link remembers of an upload that the aggregate refuses: nothing."""

import pytest
import torch

from fdl.build import build
from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.recipe import from_mapping
from fdl.state import checkpoint

RECIPE = {
    "name": "refused",
    "method": "fedavg",
    "data": {"target": "digits", "args": {"proxy": 40, "validation": 20, "test": 40}},
    "federation": {"clients": 2, "rounds": 3, "calibration_fraction": 0.0},
    "student": {"target": "mlp", "args": {"hidden": [4]}},
    "local_training": {"steps": 2, "batch_size": 16, "optimizer": {"target": "sgd", "args": {"lr": 0.1}}},
    "evaluation": {"every": 9},
    "callbacks": [],
    "fabric": {"threads": 1, "accelerator": "cpu"},
}


@pytest.mark.parametrize("chain", [["delta"], [{"target": "top_k", "args": {"fraction": 0.1, "error_feedback": True}}]])
def test_a_link_goes_on_from_the_upload_before_the_refused_one(tmp_path, monkeypatch, chain):
    loop = build(from_mapping({**RECIPE, "channel": {"upload": chain}}), tmp_path)
    take, refused = ParameterMean.add, []

    def picky(self, parameters, client):
        if (loop.server.round, client) == (2, 0):
            refused.append(client)
            raise RejectedMessageError("not today")
        take(self, parameters, client)

    monkeypatch.setattr(ParameterMean, "add", picky)

    def remembered(client):
        return checkpoint.to_bytes(loop.channel.state_dict([client]))

    loop.run_round(1)
    before = remembered(0), remembered(1)
    loop.run_round(2)
    assert refused == [0] and loop.history[-1]["refused"] == {"0": "not today"}
    assert remembered(0) == before[0] and remembered(1) != before[1]
    loop.run_round(3)
    assert loop.history[-1]["refused"] == {} and remembered(0) != before[0]
    assert all(torch.isfinite(t).all() for t in loop.server.student.state_dict().values())
