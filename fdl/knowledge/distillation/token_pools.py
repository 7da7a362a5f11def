"""Codistillation between pools of language models, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from lightning import LightningModule
from torch import Tensor

from fdl.errors import UserError
from fdl.knowledge.aggregation.pools import Weights, stream_of
from fdl.knowledge.distillation.token_upload import translates, vocabulary
from fdl.losses.tokens import token_distillation
from fdl.modules.base import HiddenStateModel
from fdl.modules.objectives import Objective
from fdl.modules.types import Batch
from fdl.participants import Participant, Server, copy_of
from fdl.state.shards import full_parameters


def require_equal_tokens(participant: Participant, module: LightningModule, pool: str) -> None:
    """Make sure that a pool's model is a language model of the data's own tokens.

    Raises:
        UserError: it is none.
    """
    if not isinstance(module, HiddenStateModel) or translates(module):
        raise UserError(
            f"specialists: {pool} is no language model of the data's tokens, by which pools learn from each other; "
            "take causal_lm, or add what fdl.modules.base.HiddenStateModel declares"
        )
    if module.vocab_size < vocabulary(participant):
        raise UserError(
            f"specialists: {pool} has a vocabulary of {module.vocab_size} tokens, the data one of "
            f"{vocabulary(participant)}"
        )


def codistill_tokens(server: Server, weights: Mapping[str, Weights], temperature: float = 1.0) -> dict[str, Weights]:
    """Every pool's weights after it has learnt from the others' mean distribution over next tokens.

    As `codistill`: all teach as they were before any of them learnt. Distributions over a vocabulary are too
    large to be kept for a whole proxy set, so that teachers answer the windows that a learner is about to see.

    Args:
        server: its proxy windows are learnt on with its `server_distil` settings.
        weights: by pool, where teachers stand and learners start.
        temperature: T > 0.
    """
    learnt = {}
    for pool in weights:
        with ExitStack() as borrowed:
            modules = {
                other: borrowed.enter_context(server.runtime.borrow(other, tensors))
                for other, tensors in weights.items()
            }
            teachers = [module.eval() for other, module in modules.items() if other != pool]
            objective = mixture_objective(teachers, vocabulary(server), temperature)
            with full_parameters(*teachers):
                server.fit(
                    modules[pool], server.proxy, server.server_distil, objective, stream_of(server, "distil", pool)
                )
            learnt[pool] = copy_of(modules[pool])
    return learnt


def mixture_objective(teachers: Sequence[LightningModule], vocab: int, temperature: float = 1.0) -> Objective:
    """T² KL from the teachers' mean distribution at every token that is no padding.

    Args:
        teachers: models in evaluation mode, with `hidden` and `head`.
        vocab: tokens of the data; ids above, which only pad a model's vocabulary, are left out on both sides.
        temperature: T > 0; the teachers' mean is softened, not each of them.
    """

    def mean_of(states: Tensor) -> Tensor:
        """Logits of the mean of all teachers' probabilities, given their hidden states side by side."""
        parts = states.split(widths, dim=-1)
        said = [torch.log_softmax(t.head(part)[:, :vocab].float(), -1) for t, part in zip(teachers, parts)]
        return torch.stack(said).logsumexp(0)

    widths: list[int] = []

    def objective(module: LightningModule, batch: Batch) -> Mapping[str, Tensor]:
        tokens = batch[0]
        with torch.no_grad():
            states = [teacher.hidden(tokens) for teacher in teachers]
        widths[:] = [state.shape[-1] for state in states]
        loss = token_distillation(
            module.hidden(tokens),
            lambda hidden: module.head(hidden)[:, :vocab],
            torch.cat(states, dim=-1),
            mean_of,
            weights=tokens >= 0,
            temperature=temperature,
        )
        return {"loss": loss}

    return objective
