"""Greedy continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fdl.errors import UserError
from fdl.state.shards import gathered

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.participants import Server

_BATCH = 32
"""Prompts that are continued side by side."""


def continuations(
    server: Server, module: LightningModule, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """Continue prompts with the likeliest token each time.

    Args:
        server: whose device and precision are used.
        module: a language model with ``generate(tokens, max_new_tokens)``, which takes int64 [B, T], padded on the
            right with -1, and gives int64 [B, N] of what comes next alone, with -1 from the end of text on.
        prompts: token ids, at least one each.
        new_tokens: how many tokens to add at most.

    Returns:
        The added ids up to the end of text, in the order of the prompts.
    """
    module.eval()
    # neighbours of like length: little is padded
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    added: dict[int, list[int]] = {}
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        width = len(prompts[rows[-1]])
        tokens = torch.tensor([[*prompts[i], *[-1] * (width - len(prompts[i]))] for i in rows])
        with gathered(module), torch.inference_mode(), server.runtime.fabric.autocast():
            made = module.generate(tokens.to(server.runtime.device), new_tokens)
        added.update((i, until(ids, -1)) for i, ids in zip(rows, made.tolist(), strict=True))
    return [added[i] for i in range(len(prompts))]


def until(ids: list[int], end: int | None) -> list[int]:
    """What stands before the first `end`; everything where there is none."""
    return ids[: ids.index(end)] if end in ids else ids


def text_model(server: Server, new_tokens: int, asker: str) -> Any:
    """Make sure that the server's student can write so many tokens, and return the tokenizer.

    Raises:
        UserError: there is no tokenizer, or the student has too few positions.
    """
    if "tokenizer" not in server.provides:
        raise UserError(f"{asker} needs data with a tokenizer")
    positions = getattr(server.student, "positions", None)
    if positions is not None and new_tokens >= positions:
        raise UserError(f"{asker}: new_tokens must be below the student's {positions} positions, got {new_tokens}")
    return server.provides["tokenizer"]
