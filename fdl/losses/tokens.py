"""Losses of language models, computed in chunks of tokens.

The logits of a full batch, ``[B, T, V]``, are the largest tensor by far: 8 windows of 1024 tokens and a vocabulary of
50k take 1.6 GB in float32, before any gradient. These functions therefore take the last hidden states and the layer
that maps them to logits, compute the logits of one chunk of tokens, reduce them to one number per token, and recompute
them for the gradient: O(chunk · V) memory besides the gradient of the head's weights, for one additional
multiplication by these.

The last hidden state of position t predicts token t+1. Padding is -1, on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdl.losses.responses import soften

Head = Callable[[Tensor], Tensor]
"""Function that maps hidden states ``[n, D]`` to logits ``[n, V]``."""

# --- next tokens


def token_nll(hidden: Tensor, head: Head, tokens: Tensor, chunk: int = 512) -> Tensor:
    """Compute the negative log-likelihood of every next token.

    Args:
        hidden: last hidden states, ``[B, T, D]``.
        head: layer that maps them to logits.
        tokens: int64 ``[B, T]``, padded on the right with -1.
        chunk: number of tokens whose logits are in memory at once.

    Returns:
        float32 ``[B, T-1]`` in nats, of token t+1 given those up to t; 0 at padding.
    """
    targets = tokens[:, 1:]
    nll = _by_chunks(_nll, head, chunk, hidden[:, :-1].flatten(0, 1), targets.flatten())
    return nll.view(targets.shape)


def next_token_loss(hidden: Tensor, head: Head, tokens: Tensor, chunk: int = 512) -> Tensor:
    """Compute the mean of `token_nll` over all real tokens; 0 if there are none.

    Args:
        hidden: last hidden states, ``[B, T, D]``.
        head: layer that maps them to logits.
        tokens: int64 ``[B, T]``, padded on the right with -1.
        chunk: number of tokens whose logits are in memory at once.
    """
    real = (tokens[:, 1:] >= 0).sum().clamp_min(1)
    return token_nll(hidden, head, tokens, chunk).sum() / real


# --- distillation


def token_distillation(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Tensor:
    """Compute Hinton's loss against a teacher in the same process: ``T² KL(teacher_T ‖ student_T)``.

    The teacher's logits are computed one chunk at a time as well, and get no gradient.

    Args:
        hidden: the student's last hidden states, ``[B, T, D]``.
        head: layer that maps them to logits.
        teacher_hidden: the teacher's last hidden states, ``[B, T, D']``.
        teacher_head: layer that maps them to logits, with the student's number of logits.
        weights: weight of each position, ``[B, T]``, e.g. 0 for padding; default 1.
        temperature: T > 0, applied to both sides.
        chunk: number of tokens whose logits are in memory at once.

    Returns:
        A scalar in nats: the weighted mean over positions; 0 if all weights are 0.
    """

    def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = torch.log_softmax(teacher_head(teacher).float() / temperature, -1)
        log_q = torch.log_softmax(logits / temperature, -1)
        return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    losses = _by_chunks(divergence, head, chunk, hidden.flatten(0, 1), teacher_hidden.detach().flatten(0, 1))
    return _weighted_mean(losses, weights)


def sparse_distillation(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    probabilities: Tensor,
    mode: Literal["tail", "sampled", "renormalised"] = "tail",
    weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Tensor:
    """Compute the distillation loss against a teacher of which only k of V probabilities per position are known.

    - ``"tail"``: the k tokens, and one outcome for all others: ``KL(p̃ ‖ q̃)`` of k + 1 outcomes, which is at most the
      divergence of the full distributions. A temperature softens the k + 1 outcomes of both sides.
    - ``"sampled"``: tokens sampled from the teacher, with their frequencies instead of probabilities: cross entropy.
      The expectation of its gradient over samples is that of the full divergence. The temperature divides the student's
      logits; the teacher must be sampled at the same temperature. Source: Anshumann et al., "Sparse Logit Sampling:
      Accelerating Knowledge Distillation in LLMs" (random sampling KD).
    - ``"renormalised"``: the k probabilities, scaled to sum to 1, as if no other token could follow: ``KL(p/Σp ‖ q)``.
      Biased: the student learns that the tail has no mass. A baseline, because it is common practice.

    All are multiplied by T².

    Args:
        hidden: the student's last hidden states, ``[B, T, D]``.
        head: layer that maps them to logits.
        ids: int64 ``[B, T, k]``, the tokens whose probabilities are known, each at most once; padded at the end with -1
            if there are fewer than k.
        probabilities: ``[B, T, k]``, probabilities within the full distribution: a row sums to at most 1.
        mode: treatment of the other tokens, see above.
        weights: weight of each position, ``[B, T]``, e.g. 0 for positions without prediction; default 1.
        temperature: T > 0.
        chunk: number of tokens whose logits are in memory at once.

    Returns:
        A scalar in nats: the weighted mean over positions; 0 if all weights are 0.
    """
    loss = SPARSE_LOSSES[mode]
    losses = _by_chunks(
        lambda logits, i, p: loss(logits, i, p.to(logits.dtype), temperature) * temperature**2,
        head,
        chunk,
        hidden.flatten(0, 1),
        ids.flatten(0, 1),
        probabilities.flatten(0, 1),
    )
    return _weighted_mean(losses, weights)


def next_token_and_sparse(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    mode: Literal["tail", "sampled", "renormalised"] = "tail",
    weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Compute `next_token_loss` and `sparse_distillation` from the same logits, which are half the cost of each.

    Args:
        hidden: the student's last hidden states, ``[B, T, D]``.
        head: layer that maps them to logits.
        tokens: int64 ``[B, T]``, padded on the right with -1.
        ids: int64 ``[B, T, k]``, the tokens whose teacher probabilities are known, padded at the end with -1.
        probabilities: ``[B, T, k]``, the teacher's probabilities of these tokens.
        mode: treatment of the other tokens, see `sparse_distillation`.
        weights: weight of each position in the distillation loss, ``[B, T]``; default 1.
        temperature: T > 0, of the distillation loss.
        chunk: number of tokens whose logits are in memory at once.

    Returns:
        Two scalars in nats: the loss of the next tokens, and the distillation loss.
    """
    loss = SPARSE_LOSSES[mode]
    targets = F.pad(tokens[:, 1:], (0, 1), value=-1)

    def both(logits: Tensor, target: Tensor, i: Tensor, p: Tensor) -> Tensor:
        sparse = loss(logits, i, p.to(logits.dtype), temperature) * temperature**2
        return torch.stack([_nll(logits, target), sparse], -1)

    columns = (hidden.flatten(0, 1), targets.flatten(), ids.flatten(0, 1), probabilities.flatten(0, 1))
    nll, sparse = _by_chunks(both, head, chunk, *columns).unbind(-1)
    return nll.sum() / (targets >= 0).sum().clamp_min(1), _weighted_mean(sparse, weights)


def _tail(logits: Tensor, ids: Tensor, p: Tensor, temperature: float) -> Tensor:
    p = p.masked_fill(ids < 0, 0)
    # an unused entry repeats the first one, which is always used if the position has a prediction
    used = F.pad(ids[:, 1:] >= 0, (1, 0), value=True)
    ids = torch.where(used, ids, ids[:, :1]).clamp_min(0)
    log_q = (logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)).masked_fill(~used, -torch.inf)
    if ids.shape[-1] < logits.shape[-1]:
        # not 1 - Σ q, which would round to 0 or below for a confident student that agrees with the teacher
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q, others - logits.logsumexp(-1, keepdim=True)], -1)
        p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp_min(0)], -1)
    return _kl(log_q, p, temperature)


def _sampled(logits: Tensor, ids: Tensor, p: Tensor, temperature: float) -> Tensor:
    log_q = torch.log_softmax(logits / temperature, -1).gather(-1, ids.clamp_min(0))
    return -torch.where(ids >= 0, p * log_q, 0).sum(-1)


def _renormalised(logits: Tensor, ids: Tensor, p: Tensor, temperature: float) -> Tensor:
    p = _normalised_at(p.masked_fill(ids < 0, 0), temperature)
    log_q = torch.log_softmax(logits / temperature, -1).gather(-1, ids.clamp_min(0))
    return torch.where(p > 0, p * (p.log() - log_q), 0).sum(-1)


def _kl(log_q: Tensor, p: Tensor, temperature: float) -> Tensor:
    """Return ``KL(p_T ‖ q_T)`` per row; an outcome with p = 0 contributes nothing."""
    p = _normalised_at(p, temperature)
    log_q = torch.log_softmax(log_q / temperature, -1)
    return torch.where(p > 0, p * (p.log() - log_q), 0).sum(-1)


def _normalised_at(p: Tensor, temperature: float) -> Tensor:
    """Return rows at a temperature, normalised, because quantised rows do not sum to 1; a row of zeros stays zero."""
    p = soften(p, temperature).nan_to_num(0)
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


SPARSE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "tail": _tail,
    "sampled": _sampled,
    "renormalised": _renormalised,
}
"""Losses of `sparse_distillation` per row of logits ``[n, V]``, by the name of the mode."""


# --- sampling


def sample_ids(probabilities: Tensor, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Sample n tokens with replacement, and return their frequencies.

    Args:
        probabilities: ``[…, V]``, rows sum to 1.
        n: number of samples.
        generator: random generator on the probabilities' device.

    Returns:
        ids, int64 ``[…, n]``, each at most once, most frequent first, padded with -1; and their frequencies (counts
        divided by n), float32 ``[…, n]``, padded with 0. The expectation of a frequency is the probability.
    """
    rows = probabilities.flatten(0, -2)
    drawn = torch.multinomial(rows, n, replacement=True, generator=generator).sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(-1, place, torch.ones_like(drawn))
    ids = torch.full_like(drawn, -1).scatter_(-1, place, drawn)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    shape = (*probabilities.shape[:-1], n)
    return ids.gather(-1, order).view(shape), (counts / n).view(shape)


# --- chunks


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def _by_chunks(function: Callable[..., Tensor], head: Head, chunk: int, hidden: Tensor, *others: Tensor) -> Tensor:
    """Apply a function to logits in float32, one chunk of rows at a time, with recomputation for the gradient.

    Args:
        function: function from (logits ``[n, V]``, rows of others…) to ``[n]``.
        head: layer that maps hidden states to logits.
        chunk: number of rows at once.
        hidden: hidden states ``[N, D]``.
        others: further tensors, each ``[N, …]``.
    """

    def step(states: Tensor, *rows: Tensor) -> Tensor:
        return function(head(states).float(), *rows).float()

    # split instead of slices, whose gradients would each be padded to the full size
    parts = zip(*(tensor.split(chunk) for tensor in (hidden, *others)))
    if not torch.is_grad_enabled():
        return torch.cat([step(*part) for part in parts])
    return torch.cat([checkpoint(step, *part, use_reentrant=False) for part in parts])


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses.mean()
    weights = weights.flatten().float()
    # a position with weight 0 may have any value, e.g. a divergence without a target
    losses = torch.where(weights > 0, losses * weights, 0)
    return losses.sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
