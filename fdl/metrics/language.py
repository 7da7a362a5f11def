"""How well a language model predicts held-out text."""

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
"""Positions whose logits exist at once: with 50,000 tokens in the vocabulary, 400 MB of float32."""

_ROWS = 512
"""Windows read at a time to count tokens and bytes."""


def language(predictor: Predictor, module: LightningModule, samples: Samples, names: Sequence[str]) -> dict[str, float]:
    """Measure a language model on packed windows of text.

    Every predicted token counts alike, however the windows fall into batches; padding does not count, and neither does
    the first token of a window, which nothing predicts.

    Args:
        predictor: whose runtime answers, and whose data have the tokenizer that ``bits_per_byte`` needs.
        module: gives ``token_nll(tokens)``, and for ``token_accuracy`` also ``hidden(tokens)`` and ``head``.
        samples: windows of one length, int64 [T], padded on the right with -1.
        names: of the metrics. ``nll``: negative log-likelihood in nats a token; ``perplexity``: its exponential;
            ``bits_per_byte``: the nll in bits over the bytes of the predicted text, so that models with different
            tokenizers compare; ``token_accuracy``: share of the tokens that had the largest probability.

    Returns:
        One number a name, in the order asked; ``nan`` for each where nothing is predicted.
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
    """Count what is predicted.

    Args:
        predictor: whose data have the tokenizer.
        samples: as in `language`.
        measure: whether the bytes are wanted too.

    Returns:
        Number of predicted tokens, and bytes of the text that they stand for (0 where not wanted).
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
    """Score every prediction of a batch in one pass, a few thousand positions at a time.

    Args:
        module: a language model with ``hidden(tokens)`` [B, T, D] and ``head``.
        tokens: int64 [B, T], padded on the right with -1.

    Returns:
        float32 [B, T-1, 2]: the nll of token t+1 in nats, and 1 where it had the largest probability; 0 for padding.
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
    """The exponential; infinity where a float cannot hold it, as for a model that has diverged."""
    return math.exp(value) if not value > 700 else math.inf
