"""Chunked losses against plain formulas on all logits at once."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fdl.losses.responses import kd_loss
from fdl.losses.tokens import (
    next_token_and_sparse,
    next_token_loss,
    sample_ids,
    sparse_distillation,
    token_distillation,
    token_nll,
)

B, T, D, V = 3, 7, 5, 11


def states(seed: int = 0, scale: float = 1.0, grad: bool = True):
    torch.manual_seed(seed)
    hidden = (scale * torch.randn(B, T, D)).requires_grad_(grad)
    return hidden, nn.Linear(D, V)


def windows() -> torch.Tensor:
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    tokens[1, 4:] = -1
    return tokens


def gradients(loss, hidden, head) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


def same(first, second, hidden, head) -> None:
    torch.testing.assert_close(first, second)
    for a, b in zip(gradients(first, hidden, head), gradients(second, hidden, head)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_next_token_loss_is_cross_entropy_over_real_tokens_with_its_gradient(chunk):
    hidden, head = states()
    tokens = windows()
    plain = F.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1)
    same(next_token_loss(hidden, head, tokens, chunk), plain, hidden, head)
    nll = token_nll(hidden, head, tokens, chunk)
    expected = -head(hidden[0, :-1]).log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(nll[0], expected)
    assert nll.shape == (B, T - 1)
    assert bool((nll[1, 3:] == 0).all())
    assert bool((nll[1, :3] > 0).all())


def test_a_batch_without_next_tokens_costs_nothing():
    hidden, head = states()
    loss = next_token_loss(hidden, head, torch.full((B, T), -1))
    assert float(loss.detach()) == 0
    assert all(bool((g == 0).all()) for g in gradients(loss, hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("chunk", [2, 1000])
def test_dense_distillation_is_hintons_over_weighted_positions(temperature, chunk):
    hidden, head = states()
    theirs, teacher = states(seed=5, grad=False)
    weights = torch.rand(B, T)
    weights[1, 4:] = 0
    probabilities = teacher(theirs).softmax(-1)
    rows = torch.stack(
        [kd_loss(head(hidden[b, t])[None], probabilities[b, t][None], temperature) for b in range(B) for t in range(T)]
    )
    plain = (rows * weights.flatten()).sum() / weights.sum()
    loss = token_distillation(hidden, head, theirs, teacher, weights, temperature, chunk)
    same(loss, plain, hidden, head)
    assert all(p.grad is None for p in teacher.parameters())


def teacher_probabilities(seed: int = 9) -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


@pytest.mark.parametrize("mode", ["tail", "renormalised"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_tokens_known_the_sparse_losses_are_the_dense_one(mode, temperature):
    hidden, head = states()
    p = teacher_probabilities()
    values, ids = p.topk(V, -1)
    dense = kd_loss(head(hidden).flatten(0, 1), p.flatten(0, 1), temperature)
    same(sparse_distillation(hidden, head, ids, values, mode, None, temperature, 4), dense, hidden, head)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_tail_is_the_divergence_of_k_plus_one_outcomes(k):
    hidden, head = states()
    p = teacher_probabilities()
    values, ids = p.topk(k, -1)
    q = head(hidden).softmax(-1).gather(-1, ids)
    rest_p, rest_q = 1 - values.sum(-1), 1 - q.sum(-1)
    plain = ((values * (values / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()
    loss = sparse_distillation(hidden, head, ids, values, "tail", chunk=5)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(loss, hidden, head), gradients(plain, hidden, head)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_merging_the_tail_never_adds_to_the_divergence():
    for seed in range(20):
        hidden, head = states(seed)
        p = teacher_probabilities(seed)
        dense = float(kd_loss(head(hidden).flatten(0, 1), p.flatten(0, 1)).detach())
        sparse = []
        for k in (1, 2, 5, V):
            values, ids = p.topk(k, -1)
            sparse.append(float(sparse_distillation(hidden, head, ids, values).detach()))
        assert sparse[0] >= 0
        assert all(a <= b + 1e-6 for a, b in zip(sparse, [*sparse[1:], dense]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_tail_vanishes_where_student_and_teacher_agree_and_renormalised_does_not(temperature):
    hidden, head = states()
    values, ids = head(hidden).softmax(-1).detach().topk(3, -1)
    tail = sparse_distillation(hidden, head, ids, values, "tail", None, temperature)
    biased = sparse_distillation(hidden, head, ids, values, "renormalised", None, temperature)
    assert abs(float(tail.detach())) < 1e-5
    assert all(float(g.abs().max()) < 1e-5 for g in gradients(tail, hidden, head))
    assert float(biased.detach()) > 0.1
    assert any(float(g.abs().max()) > 1e-2 for g in gradients(biased, hidden, head))


def test_the_optimum_of_renormalised_targets_is_inflated():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    logits = nn.Parameter(torch.zeros(1, 1, 4))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    values, ids = p.topk(2)
    for _ in range(300):
        optimizer.zero_grad()
        sparse_distillation(logits, nn.Identity(), ids[None, None], values[None, None], "renormalised").backward()
        optimizer.step()
    q = logits.detach().softmax(-1)[0, 0]
    assert float(q[0]) == pytest.approx(0.5 / float(values.sum()), abs=0.02)  # p / Σ_top p, not p


def test_places_without_a_token_change_nothing():
    hidden, head = states()
    values, ids = teacher_probabilities().topk(3, -1)
    wide = F.pad(ids, (0, 2), value=-1), F.pad(values, (0, 2))
    for mode in ("tail", "sampled", "renormalised"):
        same(
            sparse_distillation(hidden, head, *wide, mode, None, 2.0),
            sparse_distillation(hidden, head, ids, values, mode, None, 2.0),
            hidden,
            head,
        )


@pytest.mark.parametrize("mode", ["tail", "sampled", "renormalised"])
def test_unanswered_positions_neither_count_nor_harm(mode):
    hidden, head = states()
    values, ids = teacher_probabilities().topk(3, -1)
    weights = torch.ones(B, T)
    weights[0] = 0
    ids[0], values[0] = -1, 0
    loss = sparse_distillation(hidden, head, ids, values, mode, weights, 2.0)
    plain = sparse_distillation(hidden[1:], head, ids[1:], values[1:], mode, None, 2.0)
    same(loss, plain, hidden, head)
    nothing = sparse_distillation(hidden, head, ids, values, mode, torch.zeros(B, T))
    assert float(nothing.detach()) == 0
    assert all(bool((g == 0).all()) for g in gradients(nothing, hidden, head))


def test_probabilities_of_few_bits_still_give_a_divergence():
    hidden, head = states()
    values, ids = teacher_probabilities().topk(4, -1)
    loss = sparse_distillation(hidden, head, ids, values * 1.1)  # may sum to more than 1
    assert math.isfinite(float(loss.detach()))
    assert float(loss.detach()) >= 0


def test_a_student_that_is_sure_keeps_a_finite_loss_and_gradient():
    hidden = torch.zeros(1, 1, 4)
    hidden[..., 0] = 60.0  # 1 - q rounds to 0
    hidden.requires_grad_()
    loss = sparse_distillation(hidden, nn.Identity(), torch.tensor([[[0]]]), torch.tensor([[[0.5]]]))
    expected = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(3) + 60)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert bool(torch.autograd.grad(loss, hidden)[0].isfinite().all())


def test_sampled_is_cross_entropy_against_the_frequencies():
    hidden, head = states()
    ids, frequencies = sample_ids(teacher_probabilities(), 6, torch.Generator().manual_seed(0))
    dense = torch.zeros(B, T, V + 1).scatter_add_(-1, torch.where(ids < 0, V, ids), frequencies)[..., :V]
    plain = -(dense * head(hidden).log_softmax(-1)).sum(-1).mean()
    same(sparse_distillation(hidden, head, ids, frequencies, "sampled", chunk=4), plain, hidden, head)


@pytest.mark.parametrize("mode", ["tail", "sampled", "renormalised"])
def test_both_losses_from_the_same_logits_are_each_alone(mode):
    hidden, head = states()
    tokens, weights = windows(), torch.rand(B, T)
    values, ids = teacher_probabilities().topk(3, -1)
    both = next_token_and_sparse(hidden, head, tokens, ids, values, mode, weights, 2.0, 4)
    alone = next_token_loss(hidden, head, tokens), sparse_distillation(hidden, head, ids, values, mode, weights, 2.0)
    torch.testing.assert_close(both, alone)
    same(both[0] + 3 * both[1], alone[0] + 3 * alone[1], hidden, head)


def test_the_mean_of_sampled_targets_is_the_teacher():
    p = teacher_probabilities()[0, 0]
    draws, times = 5, 4000
    ids, frequencies = sample_ids(p.expand(times, V), draws, torch.Generator().manual_seed(3))
    mean = torch.zeros(V + 1).scatter_add_(0, torch.where(ids < 0, V, ids).flatten(), frequencies.flatten()) / times
    assert bool(((mean[:V] - p).abs() <= 4 * (p * (1 - p) / (draws * times)).sqrt()).all())


def test_sampled_ids_come_once_each_the_most_frequent_first():
    ids, frequencies = sample_ids(teacher_probabilities(), 20, torch.Generator().manual_seed(3))
    torch.testing.assert_close(frequencies.sum(-1), torch.ones(B, T))
    assert bool((frequencies[..., :-1] >= frequencies[..., 1:]).all())
    assert torch.equal(ids < 0, frequencies == 0)
    for row in ids.flatten(0, 1).tolist():
        real = [id for id in row if id >= 0]
        assert len(set(real)) == len(real)


class Memory(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the most bytes that were alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = self.now = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage) -> None:
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


@pytest.mark.parametrize("loss", ["next", "dense", "tail", "sampled", "both"])
def test_memory_is_that_of_a_few_chunks_of_logits(loss):
    rows, vocabulary, chunk = 256, 2000, 8
    hidden, head = torch.randn(1, rows, 4, requires_grad=True), nn.Linear(4, vocabulary)
    tokens = torch.randint(0, vocabulary, (1, rows))
    values, ids = torch.randn(1, rows, vocabulary).softmax(-1).topk(3, -1)

    def run(chunk: int) -> Memory:
        with Memory() as memory:
            if loss == "next":
                value = next_token_loss(hidden, head, tokens, chunk)
            elif loss == "dense":
                value = token_distillation(hidden, head, hidden.detach() + 1, head, chunk=chunk)
            elif loss == "both":
                value = sum(next_token_and_sparse(hidden, head, tokens, ids, values, chunk=chunk))
            else:
                value = sparse_distillation(hidden, head, ids, values, loss, chunk=chunk)
            value.backward()
        return memory

    chunked, whole = run(chunk), run(rows)
    assert chunked.largest <= chunk * vocabulary
    assert whole.largest >= (rows - 1) * vocabulary
    assert chunked.peak < 12 * 4 * chunk * vocabulary  # bytes
    assert whole.peak > 2 * 4 * (rows - 1) * vocabulary


def test_what_is_kept_for_the_gradient_has_no_vocabulary():
    hidden, head = torch.randn(1, 64, 4, requires_grad=True), nn.Linear(4, 500)
    tokens, kept = torch.randint(0, 500, (1, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        next_token_loss(hidden, head, tokens, 8)
    assert sum(kept) < 8 * 500


def test_sixteen_bits_are_computed_in_thirty_two():
    hidden, _ = states()
    low = nn.Linear(D, V).to(torch.bfloat16)
    nll = token_nll(hidden.to(torch.bfloat16), low, windows())
    assert nll.dtype == torch.float32
    expected = token_nll(low(hidden.to(torch.bfloat16)).float(), nn.Identity(), windows())
    torch.testing.assert_close(nll, expected)
