"""Forgetting and transfer of matrices that were written by hand."""

import numpy as np
import pytest
import torch

from fdl.datamodules.arrivals import ClassIncremental
from fdl.datamodules.samples import TensorSamples
from fdl.errors import UserError
from fdl.evaluators.base_new import BaseNew
from fdl.evaluators.continual import Continual, accuracy_among, transfer
from tests.evaluators.worlds import server
from tests.toy import Linear

R = np.array([[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.5, 0.9, 0.6]])
CHANCE = np.array([0.5, 0.25, 0.1])


def test_a_matrix_by_hand():
    got = transfer(R, CHANCE)
    assert got == pytest.approx(
        {
            "average_accuracy": (0.5 + 0.9 + 0.6) / 3,
            "forgetting": ((0.9 - 0.5) + (0.8 - 0.9)) / 2,
            "backward_transfer": ((0.5 - 0.9) + (0.9 - 0.8)) / 2,
            "forward_transfer": ((0.3 - 0.25) + (0.4 - 0.1)) / 2,
        }
    )


def test_the_best_before_may_have_been_neither_first_nor_just_learnt():
    matrix = np.array([[0.4, 0, 0], [0.8, 0.5, 0], [0.6, 0.5, 0.7]])
    assert transfer(matrix, CHANCE)["forgetting"] == pytest.approx((0.8 - 0.6 + 0.0) / 2)


def test_in_the_first_stage_there_is_nothing_to_forget():
    assert transfer(R[:1], CHANCE) == {"average_accuracy": 0.9}


def test_what_was_not_measured_is_left_out():
    matrix = R.copy()
    matrix[0] = np.nan
    got = transfer(matrix, CHANCE)
    assert got["forgetting"] == pytest.approx(((0.7 - 0.5) + (0.8 - 0.9)) / 2)
    assert got["forward_transfer"] == pytest.approx(0.4 - 0.1)
    assert transfer(matrix[:2], CHANCE) == {"average_accuracy": pytest.approx(0.75)}


def test_accuracy_among_some_classes():
    logits, labels = torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]), torch.tensor([2, 2])
    assert accuracy_among(logits, labels, torch.tensor([0, 1, 2])) == 0
    assert accuracy_among(logits, labels, torch.tensor([1, 2])) == 0.5
    assert np.isnan(accuracy_among(logits[:0], labels[:0], torch.tensor([1, 2])))


class Table(Linear):
    """Input i, a vector of one value, has the logits of row i."""

    def __init__(self, rows):
        super().__init__()
        self.linear = torch.nn.Linear(len(rows), len(rows[0]), bias=False)
        self.linear.weight.data = torch.tensor(rows).T.contiguous()


def world(labels, stages=2):
    asked = server(TensorSamples(torch.eye(4), torch.tensor(labels)), classes=["a", "b", "c", "d"])
    asked.arrival = ClassIncremental(stages=stages)
    asked.test_stages = asked.arrival.assign(np.array(labels), None, 4)
    return asked


def test_rows_are_gathered_over_the_rounds_and_the_last_of_a_stage_counts():
    asked, probe = world([0, 1, 2, 3]), Continual()
    probe.prepare(asked)
    asked.start_round(1)
    good = [[9.0, 0, 0, 0], [0, 9.0, 0, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0]]  # knows a and b, takes all else for a
    half = [[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 0, 9.0, 0], [0, 0, 0, 9.0]]
    assert probe.evaluate(asked, Table(half))["average_accuracy"] == 0.5
    assert probe.evaluate(asked, Table(good)) == {"accuracy_0": 1, "accuracy_1": 0, "average_accuracy": 1}
    asked.start_round(2)
    got = probe.evaluate(asked, Table(half))
    assert got == {
        "accuracy_0": 0.5,
        "accuracy_1": 1.0,
        "average_accuracy": 0.75,
        "forgetting": 0.5,
        "backward_transfer": -0.5,
        "forward_transfer": -0.25,
    }
    assert asked.state == {"evaluator/continual": {"0": [1.0, 0.0], "1": [0.5, 1.0]}}


def test_among_a_stage_s_own_classes():
    asked, probe = world([0, 1, 2, 3]), Continual(among="stage", label="own")
    asked.start_round(1)
    table = Table([[0, 1.0, 9.0, 0], [0, 1.0, 9.0, 0], [9.0, 0, 1.0, 0], [9.0, 0, 0, 1.0]])
    assert probe.evaluate(asked, table) == {"accuracy_0": 0.5, "accuracy_1": 1.0, "average_accuracy": 0.5}
    asked.start_round(2)
    assert probe.evaluate(asked, table)["forward_transfer"] == pytest.approx(1.0 - 1 / 2)


def test_it_needs_stages():
    with pytest.raises(UserError, match="continual: the test samples belong to no stages"):
        Continual().prepare(server(TensorSamples(torch.eye(4), torch.arange(4)), classes=list("abcd")))
    with pytest.raises(UserError, match="among must be all or stage, got 'own'"):
        Continual(among="own")


def test_base_and_new_classes_and_what_became_of_them():
    asked, probe = world([0, 1, 2, 3]), BaseNew(new=["c", "d"])
    asked.student = Table([[1.0, 0, 9.0, 0], [1.0, 0, 9.0, 0], [9.0, 0, 1.0, 0], [9.0, 0, 0, 1.0]])  # base 0.5, new 1
    probe.prepare(asked)
    after = [[1.0, 0, 9.0, 0], [0, 1.0, 9.0, 0], [9.0, 0, 1.0, 0], [9.0, 0, 1.0, 0]]  # base 1, new 0.5
    asked.student.linear.weight.data = torch.tensor(after).T.contiguous()
    for _ in range(2):
        got = probe.evaluate(asked, asked.student)
        assert got == pytest.approx(
            {"base": 1.0, "new": 0.5, "harmonic_mean": 2 * 0.5 / 1.5, "base_gain": 0.5, "new_gain": -0.5}
        )
    assert torch.equal(asked.student.linear.weight.T, torch.tensor(after))


def test_new_classes_must_be_some_of_the_classes():
    asked = world([0, 1, 2, 3])
    with pytest.raises(UserError, match="new must name at least two classes"):
        BaseNew(new=["a"])
    with pytest.raises(UserError, match="base_new: the data have no class 'e'"):
        BaseNew(new=["a", "e"]).prepare(asked)
    with pytest.raises(UserError, match="of 4 classes, 3 new ones leave no base"):
        BaseNew(new=["a", "b", "c"]).prepare(asked)
