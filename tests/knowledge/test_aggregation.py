import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.errors import RejectedMessageError
from fdl.knowledge.aggregation.means import ParameterMean, ResponseMean
from fdl.knowledge.aggregation.shares import Cap
from fdl.messages import Parameters, QuantizedLogWeights, Responses

ROWS, CLASSES = 7, 4


def random_answers(seed, clients=5, form="logits", limit=8.0, subsets=False):
    """Answers with confidences, for all rows or for random ones."""
    g = torch.Generator().manual_seed(seed)
    answers = []
    for _ in range(clients):
        rows = torch.randperm(ROWS, generator=g)[: int(torch.randint(1, ROWS + 1, (1,), generator=g))]
        count = len(rows) if subsets else ROWS
        values = torch.randn(count, CLASSES, generator=g) * 3
        confidence = QuantizedLogWeights.quantize((torch.rand(count, generator=g) * 2 - 1) * limit)
        values = values.softmax(1) if form == "probabilities" else values
        answers.append(Responses(values, form, rows if subsets else None, confidence))
    return answers


def mean_of(answers, space="probabilities", **options):
    mean = ResponseMean(ROWS, CLASSES, space, **options)
    for i, answer in enumerate(answers):
        mean.add(answer, i)
    return mean


def by_formula(answers, space, cap=None):
    """The weighted mean row by row, all at once, in numpy; what is above a cap goes to the others in proportion."""
    result = np.full((ROWS, CLASSES), 1 / CLASSES if space == "probabilities" else 0.0)
    for row in range(ROWS):
        weights, values = [], []
        for answer in answers:
            rows = np.arange(ROWS) if answer.rows is None else answer.rows.numpy()
            for at in np.flatnonzero(rows == row):
                z = answer.values[at].double().numpy()
                values.append(np.exp(z) / np.exp(z).sum() if space == "probabilities" else z)
                weights.append(math.exp(float(answer.confidence.values()[at])))
        if weights:
            shares = np.array(weights) / np.sum(weights)
            most, cut = min(1.0, (cap or len(shares)) / len(shares)), np.zeros(len(shares), dtype=bool)
            while (shares > most * (1 + 1e-9)).any():
                cut |= shares > most * (1 + 1e-9)
                shares[~cut] *= (1 - cut.sum() * most) / shares[~cut].sum()
                shares[cut] = most
            result[row] = shares @ np.array(values)
    return result


@pytest.mark.parametrize("space", ["probabilities", "logits"])
def test_without_confidence_it_is_the_mean(space):
    values = torch.randn(3, ROWS, CLASSES)
    knowledge = mean_of([Responses(v, "logits") for v in values], space).result()
    expected = values.softmax(-1) if space == "probabilities" else values
    torch.testing.assert_close(knowledge.values, expected.mean(0))
    assert knowledge.form == space and knowledge.coverage.tolist() == [3] * ROWS


def test_equal_confidences_are_no_confidences():
    values = torch.randn(3, ROWS, CLASSES).softmax(-1)
    same = QuantizedLogWeights.quantize(torch.full((ROWS,), -21.0))
    weighted = mean_of([Responses(v, "probabilities", confidence=same) for v in values]).result()
    torch.testing.assert_close(weighted.values, values.mean(0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans(), st.sampled_from(["probabilities", "logits"]))
def test_streaming_is_the_weighted_mean_of_all_at_once(seed, clients, subsets, space):
    answers = random_answers(seed, clients, subsets=subsets)
    streamed = mean_of(answers, space, cap=None).result().values
    np.testing.assert_allclose(streamed, by_formula(answers, space), atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans(), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_with_a_cap_it_is_the_mean_of_shares_that_were_cut(seed, clients, subsets, cap):
    answers = random_answers(seed, clients, subsets=subsets)
    capped = mean_of(answers, cap=Cap(cap, "row")).result().values
    np.testing.assert_allclose(capped, by_formula(answers, "probabilities", cap), atol=2e-6)


@pytest.mark.parametrize("clients", [3, 5, 20])
def test_by_default_nobody_moves_a_row_by_more_than_two_equal_shares(clients):
    honest = [
        Responses(
            torch.randn(ROWS, CLASSES), "logits", confidence=QuantizedLogWeights.quantize(torch.full((ROWS,), -32.0))
        )
        for _ in range(clients - 1)
    ]
    results = {}
    for cap in (2.0, None):
        for favourite in (0, 1):
            lie = torch.full((ROWS, CLASSES), -1e4)
            lie[:, favourite] = 1e4
            sure = QuantizedLogWeights.quantize(torch.full((ROWS,), 32.0))
            options = {} if cap == 2.0 else {"cap": cap}
            answers = [*honest, Responses(lie, "logits", confidence=sure)]
            results[cap, favourite] = mean_of(answers, weighted=True, **options).result()
    moved = {cap: (results[cap, 0].values - results[cap, 1].values).norm(dim=1) for cap in (2.0, None)}
    torch.testing.assert_close(moved[2.0], torch.full((ROWS,), math.sqrt(2) * 2 / clients))
    torch.testing.assert_close(moved[None], torch.full((ROWS,), math.sqrt(2)))
    # nor can it say that a row is known better than all others together say: Σ w = w_honest / (1 − 2 / K)
    known = -32.0 + math.log(clients - 1) - math.log(1 - 2 / clients)
    torch.testing.assert_close(results[2.0, 0].log_weight, torch.full((ROWS,), known))


def test_two_clients_and_one_have_a_proper_mean_under_the_cap():
    values = torch.randn(2, ROWS, CLASSES).softmax(-1)
    sure = [QuantizedLogWeights.quantize(torch.full((ROWS,), level)) for level in (2.0, 0.0)]
    answers = [Responses(p, "probabilities", confidence=c) for p, c in zip(values, sure)]
    torch.testing.assert_close(mean_of(answers[:1]).result().values, values[0])
    share = 1 / (1 + math.exp(-2.0))
    torch.testing.assert_close(mean_of(answers).result().values, share * values[0] + (1 - share) * values[1])


def test_the_capped_mean_is_the_same_to_the_bit_in_any_order():
    answers = random_answers(11, 6, limit=32.0, subsets=True)
    forth, back, apart = (ResponseMean(ROWS, CLASSES) for _ in range(3))
    other = ResponseMean(ROWS, CLASSES)
    for i in range(6):
        forth.add(answers[i], i)
        back.add(answers[5 - i], 5 - i)
        (apart if i % 2 else other).add(answers[i], i)
    apart.merge(other)
    assert torch.equal(forth.result().values, back.result().values)
    assert torch.equal(forth.result().values, apart.result().values)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.integers(0, 6))
def test_order_and_processes_do_not_matter(seed, random, split):
    answers = random_answers(seed, 6, limit=32.0, subsets=True)
    at_once = mean_of(answers).result()
    random.shuffle(answers)
    first, second = mean_of(answers[:split]), mean_of(answers[split:])
    first.merge(second)
    merged = first.result()
    assert first.clients == 6 and torch.equal(merged.coverage, at_once.coverage)
    for field in ("values", "log_weight", "agreement"):
        torch.testing.assert_close(getattr(merged, field), getattr(at_once, field), rtol=1e-6, atol=1e-7)


def test_means_of_different_things_do_not_merge():
    with pytest.raises(ValueError, match="do not merge"):
        ResponseMean(ROWS, CLASSES).merge(ResponseMean(ROWS, CLASSES, "logits"))


def test_mean_of_logits_is_not_mean_of_probabilities():
    answers = [Responses(torch.tensor([z]), "logits") for z in ([4.0, 0.0], [0.0, 1.0])]
    found = {}
    for space in ("logits", "probabilities"):
        mean = ResponseMean(1, 2, space)
        for i, answer in enumerate(answers):
            mean.add(answer, i)
        found[space] = float(mean.result().probabilities[0, 0])
    assert found == pytest.approx({"logits": 0.8176, "probabilities": 0.6255}, abs=5e-5)


def test_weights_of_a_row_sum_to_one():
    p = torch.randn(ROWS, CLASSES).softmax(1)
    answers = [Responses(p, "probabilities", confidence=a.confidence) for a in random_answers(3, 6, limit=32.0)]
    torch.testing.assert_close(mean_of(answers).result().values, p)


def test_permuted_rows_and_classes_come_out_permuted():
    answers, rows, classes = random_answers(5), torch.randperm(ROWS), torch.randperm(CLASSES)
    permuted = [
        Responses(
            a.values[rows][:, classes], a.form, confidence=QuantizedLogWeights.quantize(a.confidence.values()[rows])
        )
        for a in answers
    ]
    expected = mean_of(answers).result().values[rows][:, classes]
    torch.testing.assert_close(mean_of(permuted).result().values, expected, rtol=1e-5, atol=1e-6)


def test_one_client_moves_the_mean_of_probabilities_by_no_more_than_its_share():
    honest = [Responses(torch.randn(ROWS, CLASSES), "logits") for _ in range(4)]
    results = []
    for favourite in (0, 1):
        lie = torch.full((ROWS, CLASSES), -1e4)
        lie[:, favourite] = 1e4
        results.append(mean_of([*honest, Responses(lie, "logits")]).result().values)
    assert (results[0] - results[1]).norm(dim=1).max() <= math.sqrt(2) / 5 + 1e-6


def test_rows_that_nobody_answered_are_uniform_and_known_as_such():
    mean = ResponseMean(3, 2)
    mean.add(Responses(torch.tensor([[0.9, 0.1]]), "probabilities", rows=torch.tensor([1])), 0)
    knowledge = mean.result()
    assert knowledge.coverage.tolist() == [0, 1, 0]
    torch.testing.assert_close(knowledge.values, torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]))
    torch.testing.assert_close(knowledge.log_weight, torch.tensor([-math.inf, 0.0, -math.inf]))


def test_log_weight_is_the_logarithm_of_the_summed_weights():
    answers = random_answers(8, limit=32.0)
    expected = torch.stack([a.confidence.values() for a in answers]).logsumexp(0)
    torch.testing.assert_close(mean_of(answers, cap=None).result().log_weight, expected)


@pytest.mark.parametrize("space", ["probabilities", "logits"])
def test_agreement_is_one_where_all_are_sure_and_zero_where_the_mean_is_uniform(space):
    sure, unsure = [1e3, 0.0], [0.0, 0.0]
    mean = ResponseMean(2, 2, space)
    mean.add(Responses(torch.tensor([sure, unsure]), "logits"), 0)
    torch.testing.assert_close(mean.result().agreement, torch.tensor([1.0, 0.0]))


def test_probabilities_become_logits_that_give_them_back():
    p = torch.randn(ROWS, CLASSES).softmax(1)
    torch.testing.assert_close(mean_of([Responses(p, "probabilities")], "logits").result().probabilities, p)


def test_probabilities_rounded_on_the_way_still_are_one_vote():
    rounded = (torch.randn(ROWS, CLASSES).softmax(1) * 15).round() / 15
    values = mean_of([Responses(rounded, "probabilities")]).result().values
    torch.testing.assert_close(values.sum(1), torch.ones(ROWS))


def test_nobody_knows_nothing():
    assert ResponseMean(ROWS, CLASSES).result() is None


def test_memory_does_not_grow_with_clients():
    def size(mean):
        return sum(v.numel() for v in vars(mean).values() if isinstance(v, torch.Tensor))

    assert size(mean_of(random_answers(0, 1))) == size(mean_of(random_answers(0, 9)))


GOOD = torch.full((ROWS, CLASSES), 0.25)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Responses(GOOD, "embeddings"), "expected logits or probabilities"),
        (Responses(GOOD[:, :3], "logits"), r"expected answers \[n, 4\]"),
        (Responses(GOOD[0], "logits"), r"expected answers \[n, 4\]"),
        (Responses(GOOD[:3], "logits"), "all 7 proxy rows, got 3"),
        (Responses(GOOD[:2], "logits", rows=torch.tensor([0, 7])), "outside of 0 … 6"),
        (Responses(GOOD[:2], "logits", rows=torch.tensor([-1, 2])), "outside of 0 … 6"),
        (Responses(GOOD[:2], "logits", rows=torch.tensor([2, 2])), "twice"),
        (Responses(GOOD[:2], "logits", rows=torch.tensor([1])), "2 answers for rows"),
        (Responses(GOOD * math.nan, "logits"), "not finite"),
        (Responses(GOOD * 8, "probabilities"), "outside of 0 … 1"),
        (Responses(GOOD * 0, "probabilities"), "all 0"),
        (Responses(GOOD, "logits", confidence=QuantizedLogWeights.quantize(torch.zeros(3))), "3 confidences"),
        (
            Responses(GOOD, "logits", confidence=QuantizedLogWeights.quantize(torch.full((ROWS,), 40.0))),
            "outside of ±32",
        ),
        (
            Responses(GOOD, "logits", confidence=QuantizedLogWeights.quantize(torch.full((ROWS,), math.nan))),
            "outside of ±32",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(answer, reason):
    mean = mean_of(random_answers(1, 2))
    before = mean.result()
    with pytest.raises(RejectedMessageError, match=reason):
        mean.add(answer, 2)
    after = mean.result()
    assert mean.clients == 2 and torch.equal(before.values, after.values)
    assert torch.equal(before.coverage, after.coverage) and torch.equal(before.log_weight, after.log_weight)


def test_a_client_cannot_choose_whether_it_is_weighed():
    plain = Responses(GOOD, "logits")
    weighed = Responses(GOOD, "logits", confidence=QuantizedLogWeights.quantize(torch.zeros(ROWS)))
    with pytest.raises(RejectedMessageError, match="without confidence"):
        mean_of([plain], weighted=True)
    with pytest.raises(RejectedMessageError, match="not asked for"):
        mean_of([weighed], weighted=False)
    assert mean_of([weighed], weighted=True).clients == mean_of([plain], weighted=False).clients == 1


# --- parameters


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "linear.weight": torch.randn(3, 2, generator=g),
        "half": torch.randn(5, generator=g).bfloat16(),
        "norm.num_batches_tracked": torch.tensor(seed * 10),
        "scalar": torch.randn((), generator=g),
        "mask": torch.tensor([seed % 2 == 0, False]),
    }


def parameter_mean(shares):
    mean = ParameterMean(state(0))
    for i, (tensors, count) in enumerate(shares):
        mean.add(Parameters(tensors, samples=count), i)
    return mean


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_parameters_are_averaged_by_sample_counts():
    shares = [(state(1), 10), (state(2), 30), (state(3), 5)]
    found = parameter_mean(shares).result()
    for name in ("linear.weight", "scalar", "half"):
        stacked = torch.stack([tensors[name].double() for tensors, _ in shares])
        expected = np.average(stacked.numpy(), axis=0, weights=[10, 30, 5])
        torch.testing.assert_close(found[name], torch.as_tensor(expected).to(found[name].dtype))


def test_counters_are_not_averaged():
    found = parameter_mean([(state(1), 1), (state(4), 99), (state(2), 1)]).result()
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    assert found["norm.num_batches_tracked"] == 40 and found["mask"].tolist() == [True, False]


def test_the_mean_of_equal_models_is_that_model_to_the_bit():
    assert_same(parameter_mean([(state(7), 3), (state(7), 11), (state(7), 1)]).result(), state(7))


def test_order_and_processes_do_not_matter_for_parameters():
    shares = [(state(i), 3 + i) for i in range(9)]
    left, right = parameter_mean(shares[:4][::-1]), parameter_mean(shares[4:])
    right.merge(left)
    assert right.samples == sum(count for _, count in shares)
    expected = parameter_mean(shares).result()
    for name, tensor in right.result().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_models_that_differ_do_not_merge():
    with pytest.raises(ValueError, match="do not merge"):
        ParameterMean({"a": torch.zeros(1)}).merge(ParameterMean({"a": torch.zeros(2)}))


def test_no_parameters_no_mean():
    assert ParameterMean(state(0)).result() is None


def test_result_does_not_share_memory_with_what_came():
    sent = state(1)
    mean = parameter_mean([(sent, 1)])
    expected = {name: tensor.clone() for name, tensor in sent.items()}
    for tensor in sent.values():
        tensor.zero_()
    first = mean.result()
    for tensor in first.values():
        tensor.zero_()
    assert_same(mean.result(), expected)


@pytest.mark.parametrize(
    ("change", "samples", "reason"),
    [
        ({"linear.weight": torch.zeros(2, 3)}, 5, r"'linear.weight' has shape \[2, 3\], expected \[3, 2\]"),
        ({"linear.weight": torch.zeros(3, 2, dtype=torch.int64)}, 5, "expected torch.float32"),
        ({"linear.weight": torch.zeros(3, 2, dtype=torch.complex64)}, 5, "expected torch.float32"),
        ({"norm.num_batches_tracked": torch.tensor(1.5)}, 5, "expected torch.int64"),
        ({"linear.weight": torch.full((3, 2), math.inf)}, 5, "not finite"),
        ({"linear.weight": None}, 5, r"missing: \['linear.weight'\]"),
        ({"backdoor": torch.zeros(1)}, 5, r"unknown: \['backdoor'\]"),
        ({}, 0, "trained on 0 samples"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_and_change_nothing(change, samples, reason):
    tensors = {name: tensor for name, tensor in {**state(2), **change}.items() if tensor is not None}
    mean = parameter_mean([(state(1), 4)])
    with pytest.raises(RejectedMessageError, match=reason):
        mean.add(Parameters(tensors, samples=samples), 1)
    assert mean.samples == 4
    assert_same(mean.result(), parameter_mean([(state(1), 4)]).result())
