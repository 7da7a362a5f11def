"""Greedy continuation of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fdl.errors import UserError
from fdl.state.shards import full_parameters

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server

_BATCH = 32
"""Number of prompts per batch."""


def continuations(
    server: Server, module: LightningModule, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """Continue prompts greedily.

    Args:
        server: the server, on whose device and in whose precision the model runs.
        module: a language model with ``generate(tokens, max_new_tokens)``, which takes int64 [B, T], padded on the
            right with -1, and returns the new tokens only, int64 [B, N], with -1 from the end of text on.
        prompts: token ids, at least one per prompt.
        new_tokens: maximum number of tokens to add.

    Returns:
        The new ids up to the end of text, in the order of the prompts.
    """
    module.eval()
    # sorted by length, so that batches have little padding
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    added: dict[int, list[int]] = {}
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        width = len(prompts[rows[-1]])
        tokens = torch.tensor([[*prompts[i], *[-1] * (width - len(prompts[i]))] for i in rows])
        with full_parameters(module), torch.inference_mode(), server.runtime.fabric.autocast():
            made = module.generate(tokens.to(server.runtime.device), new_tokens)
        added.update((i, cut_before(ids, -1)) for i, ids in zip(rows, made.tolist(), strict=True))
    return [added[i] for i in range(len(prompts))]


def cut_before(ids: list[int], end: int | None) -> list[int]:
    """Cut a list of ids before the first `end`; return all of it if there is none."""
    return ids[: ids.index(end)] if end in ids else ids


def require_tokenizer(server: Server, new_tokens: int, evaluator: str) -> Any:
    """Check that the server's student can generate enough tokens, and return its tokenizer.

    Args:
        server: the server.
        new_tokens: number of tokens to generate.
        evaluator: name of the evaluator, for error messages.

    Raises:
        UserError: the data have no tokenizer, or the student has too few positions.
    """
    if "tokenizer" not in server.model_kwargs:
        raise UserError(f"{evaluator} needs data with a tokenizer")
    positions = None if server.student is None else server.student.positions
    if positions is not None and new_tokens >= positions:
        raise UserError(f"{evaluator}: new_tokens must be below the student's {positions} positions, got {new_tokens}")
    return server.model_kwargs["tokenizer"]
