"""Language-model metrics on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.datamodules.samples import Samples
    from fdl.metrics.predictor import Predictor

_TOKENS = 2048
"""Number of positions whose logits are in memory at a time: 400 MB of float32 for a vocabulary of 50,000 tokens."""

_ROWS = 512
"""Number of windows read at a time to count tokens and bytes."""


def language(predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]) -> dict[str, float]:
    """Compute metrics of a language model on packed windows of text.

    All predicted tokens have equal weight, regardless of the batches; padding and the first token of each window, which
    is not predicted, do not count.

    Args:
        predictor: the participant that runs the model; for ``bits_per_byte`` its data must have a tokenizer.
        module: the model, with a method ``token_nll(tokens)``, and for ``token_accuracy`` ``hidden(tokens)`` and
            ``head``.
        samples: windows of equal length, int64 [T], padded on the right with -1.
        names: the metrics to compute. ``nll``: negative log-likelihood in nats per token; ``perplexity``: its
            exponential; ``bits_per_byte``: the total nll in bits divided by the bytes of the predicted text, which is
            comparable across tokenizers; ``token_accuracy``: fraction of tokens that had the largest probability.

    Returns:
        One number per name, in the given order; ``nan`` if no token is predicted.
    """
    tokens, size = count(predictor, samples, "bits_per_byte" in names)
    if not tokens:
        return dict.fromkeys(names, math.nan)
    hits = math.nan
    if "token_accuracy" in names:
        nll, hit = predictor.predict(module, samples, token_scores).double().sum((0, 1)).tolist()
        hits = hit / tokens
    else:
        nll = float(predictor.predict(module, samples, _token_nll).double().sum())
    values = {
        "nll": nll / tokens,
        "perplexity": _exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / size if size else math.nan,
        "token_accuracy": hits,
    }
    return {name: values[name] for name in names}


def count(predictor: Predictor, samples: Samples, measure: bool = True) -> tuple[int, int]:
    """Count the predicted tokens of windows, and their bytes of text.

    Args:
        predictor: the participant whose data have the tokenizer.
        samples: windows of equal length, int64 [T], padded on the right with -1.
        measure: count bytes, too.

    Returns:
        Number of predicted tokens, and number of bytes of the text they encode (0 unless `measure`).
    """
    tokens = size = 0
    for rows in torch.arange(len(samples)).split(_ROWS):
        targets = samples.batch(rows)[0][:, 1:]
        targets = targets[targets >= 0]
        tokens += len(targets)
        if measure:
            size += predictor.model_kwargs["tokenizer"].token_bytes(targets.tolist())
    return tokens, size


def token_scores(module: LightningModule, tokens: Tensor) -> Tensor:
    """Score every next-token prediction of a batch in one forward pass, a few thousand positions at a time.

    Args:
        module: a language model with ``hidden(tokens)`` [B, T, D] and ``head``.
        tokens: int64 [B, T], padded on the right with -1.

    Returns:
        float32 [B, T-1, 2]: the nll of token t+1 in nats, and 1 if it had the largest probability, else 0; both are 0
        for padding.
    """
    targets = tokens[:, 1:]
    known = targets >= 0
    states, wanted = module.hidden(tokens)[:, :-1][known], targets[known]
    scores = torch.zeros(*targets.shape, 2, dtype=torch.float32, device=tokens.device)
    parts = []
    for state, target in zip(states.split(_TOKENS), wanted.split(_TOKENS)):
        logits = module.head(state).float()
        nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        parts.append(torch.stack([nll, (logits.argmax(1) == target).float()], dim=1))
    scores[known] = torch.cat(parts) if parts else scores[known]
    return scores


def _token_nll(module: LightningModule, tokens: Tensor) -> Tensor:
    return module.token_nll(tokens)


def _exp(value: float) -> float:
    """Compute the exponential; infinity if it overflows, as for a diverged model."""
    return math.exp(value) if not value > 700 else math.inf
