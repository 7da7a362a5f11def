"""Model metrics against independent implementations; federated metrics against hand-worked numbers."""

import math
import time

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, top_k_accuracy_score
from torch.utils._python_dispatch import TorchDispatchMode

from fdl.errors import UserError
from fdl.metrics import classification as metrics
from fdl.metrics.federation import (
    bytes_by_round,
    equity,
    knowledge_transfer_efficiency,
    metric_by_round,
    paired_difference,
    recovered_gap,
    rounds_to_target,
)

EVERY = list(metrics.CLASSIFICATION_METRICS)


@pytest.fixture(scope="module")
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (360,), generator=generator)
    logits = torch.randn(360, 10, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 10)
    return logits, labels


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[which == b].sum() - confidence[which == b].sum()) for b in range(bins)]
    return sum(gaps) / len(labels)


def test_every_metric_equals_an_independent_implementation(answers):
    logits, labels = answers
    got = metrics.classification(logits, labels, EVERY)
    z, y = logits.numpy(), labels.numpy()
    expected = {
        "accuracy": accuracy_score(y, z.argmax(1)),
        "nll": -log_softmax(z.astype(np.float64), axis=1)[np.arange(len(y)), y].mean(),
        "macro_f1": f1_score(y, z.argmax(1), average="macro"),
        "ece": calibration_error(z, y),
        "top5": top_k_accuracy_score(y, z, k=5),
    }
    assert list(got) == EVERY
    assert got == pytest.approx(expected, rel=1e-5)


def test_macro_f1_leaves_out_classes_that_never_occur():
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0]), 10).float()
    labels = torch.tensor([0, 1, 0, 0])
    expected = f1_score(labels.numpy(), logits.argmax(1).numpy(), average="macro")
    assert metrics.classification(logits, labels, ["macro_f1"])["macro_f1"] == pytest.approx(expected)


def test_logits_within_0_and_1_are_still_logits():
    logits = torch.rand(200, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 4
    got = metrics.classification(logits, labels, ["ece"])["ece"]
    assert got == pytest.approx(calibration_error(logits.numpy(), labels.numpy()), rel=1e-5)


def test_top5_of_three_classes_is_one():
    assert metrics.classification(torch.randn(6, 3), torch.arange(6) % 3, ["top5"]) == {"top5": 1.0}


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.fixture
def deterministic():
    """As a run sets torch: this is where some libraries count by comparing everything with everything."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_many_classes_take_no_more_memory_than_answers_or_pairs_of_classes(deterministic):
    count, classes = 900, 300
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[::2] += 6 * torch.nn.functional.one_hot(labels[::2], classes)
    with Largest() as largest:
        got = metrics.classification(logits, labels, EVERY)
        matrix = metrics.confusion_matrix(logits.argmax(1), labels, classes)
    assert largest.elements == count * classes  # counting by comparison would make 900 * 300 * 300
    z, y = logits.numpy(), labels.numpy()
    np.testing.assert_array_equal(matrix, confusion_matrix(y, z.argmax(1), labels=range(classes)))
    assert got["macro_f1"] == pytest.approx(f1_score(y, z.argmax(1), average="macro"), rel=1e-12)
    assert got["top5"] == pytest.approx(top_k_accuracy_score(y, z, k=5, labels=range(classes)), rel=1e-6)
    assert got["ece"] == pytest.approx(calibration_error(z, y), rel=1e-4)


def test_half_precision_is_measured_in_float32(answers):
    logits, labels = answers
    half = logits.bfloat16()
    assert metrics.classification(half, labels, EVERY) == metrics.classification(half.float(), labels, EVERY)


def test_no_rows_give_nan():
    got = metrics.classification(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), EVERY)
    assert list(got) == EVERY
    assert all(math.isnan(value) for value in got.values())


def test_an_unknown_metric_is_named_with_a_suggestion(answers):
    with pytest.raises(UserError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        metrics.classification(*answers, ["nll", "acuracy"])


def test_accuracy_costs_less_than_a_third_of_a_millisecond(answers):
    def once() -> float:
        start = time.perf_counter()
        metrics.classification(*answers, ["accuracy"])
        return time.perf_counter() - start

    assert min(once() for _ in range(50)) < 3e-4


# --- a federation


def test_transfer_efficiency_is_a_share_of_the_centralised_score():
    assert knowledge_transfer_efficiency(80.69, 86) == pytest.approx(0.938, abs=5e-4)
    assert knowledge_transfer_efficiency(71.36, 86) == pytest.approx(0.830, abs=5e-4)
    assert math.isnan(knowledge_transfer_efficiency(0.5, 0.0))


def test_recovered_gap_is_0_alone_and_1_centralised_for_scores_and_losses():
    assert recovered_gap(2.0, 2.0, 1.0) == 0
    assert recovered_gap(2.0, 1.0, 1.0) == 1
    assert recovered_gap(2.0, 1.25, 1.0) == 0.75
    assert recovered_gap(2.0, 2.5, 1.0) == -0.5
    assert recovered_gap(0.5, 0.875, 1.0) == 0.75
    assert recovered_gap(0.5, 0.25, 1.0) == -0.5
    assert math.isnan(recovered_gap(1.0, 0.9, 1.0))


def test_a_paired_difference_has_the_interval_of_scipy_s_paired_t_test():
    ours, theirs = [0.91, 0.88, 0.95, 0.90], [0.90, 0.86, 0.96, 0.85]
    mean, low, high = paired_difference(ours, theirs)
    assert mean == pytest.approx(np.mean(np.subtract(ours, theirs)))
    assert (low, high) == pytest.approx(tuple(ttest_rel(ours, theirs).confidence_interval(0.95)))
    low, high = paired_difference(ours, theirs, level=0.5)[1:]
    assert (low, high) == pytest.approx(tuple(ttest_rel(ours, theirs).confidence_interval(0.5)))
    # 12.7062 is the 97.5th percentile of Student's t with one degree of freedom
    assert paired_difference([1.0, 3.0], [0.0, 0.0]) == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), abs=1e-4)
    assert paired_difference([0.5, 0.7], [0.4, 0.6]) == pytest.approx((0.1, 0.1, 0.1))


def test_one_pair_has_no_interval():
    mean, low, high = paired_difference([0.5], [0.25])
    assert mean == 0.25 and math.isnan(low) and math.isnan(high)
    assert all(math.isnan(value) for value in paired_difference([], []))


def test_equity_of_equal_and_of_one_sided_gains():
    assert equity([0.2] * 4) == pytest.approx({"variance": 0.0, "minimum": 0.2, "jain": 1.0})
    assert equity([1.0, 0.0, 0.0, 0.0]) == pytest.approx({"variance": 3 / 16, "minimum": 0.0, "jain": 0.25})
    gains = [0.1, 0.4, 0.25]
    assert equity(gains)["variance"] == pytest.approx(np.var(gains))


@pytest.mark.parametrize("gains", [[0.3, -0.1], [0.0, 0.0]])
def test_jain_is_undefined_with_a_loser_or_without_gain(gains):
    got = equity(gains)
    assert math.isnan(got["jain"])
    assert (got["minimum"], got["variance"]) == (min(gains), pytest.approx(np.var(gains)))


def test_equity_of_nobody_is_undefined():
    assert all(math.isnan(value) for value in equity([]).values())


def test_rounds_to_target_wants_the_mean_of_three_rounds():
    history = {0: 0.99, 1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.9}
    assert rounds_to_target(history, 0.7) == 4
    assert rounds_to_target(history, 0.75) == 6
    assert rounds_to_target(history, 0.7, window=1) == 2
    assert rounds_to_target(history, 0.85) is None
    assert rounds_to_target({5: 0.7, 10: 0.7, 15: 0.7}, 0.7) == 15
    assert rounds_to_target({1: 1.0, 2: 1.0}, 0.7) is None


def record(round: int, accuracy: float | None, upload: int, download: int) -> dict:
    measured = {} if accuracy is None else {"student/test/accuracy": accuracy}
    sent = {"upload_bytes": upload, "download_bytes": download, "setup_bytes": 1000}
    return {"round": round, "metrics": measured, "communication": sent}


def test_a_series_leaves_out_rounds_without_measurement_and_traffic_counts_both_directions():
    records = [record(0, None, 0, 0), record(1, 0.5, 10, 1), record(2, 0.9, 20, 2), record(3, 0.9, 30, 3)]
    history, sent = metric_by_round(records, "student/test/accuracy"), bytes_by_round(records)
    assert history == {1: 0.5, 2: 0.9, 3: 0.9}
    assert sent == {0: 0, 1: 11, 2: 22, 3: 33}
