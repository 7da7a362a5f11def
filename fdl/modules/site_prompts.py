"""A network that makes prompts for each of several sites."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SitePromptGenerator(nn.Module):
    """P_k = B + h_k W, where h_k is what a site's query finds when it looks at the shared tokens B.

    h_k = gelu(softmax((T + q_k) Tᵀ / √w) T + q_k) / √(M w) with T = layer_norm(B) R, so that a query of numbers near 1
    gives an h_k, [M, w], of a norm near 1: M rows that a query makes alike would else make W learn M times as fast as
    B. W starts at 0: the first prompts are those that the student starts with.

    Args:
        start: B at first, [M, D].
        clients: K, how many sites there are.
        width: w.
        stream: of the first R and queries.
    """

    def __init__(self, start: Tensor, clients: int, width: int, stream: torch.Generator):
        super().__init__()
        self.base = nn.Parameter(start.clone())
        self.queries = nn.Parameter(torch.randn(clients, width, generator=stream))
        self.read = nn.Parameter(torch.randn(start.shape[1], width, generator=stream) / math.sqrt(start.shape[1]))
        self.out = nn.Parameter(torch.zeros(width, start.shape[1]))

    def forward(self, client: int | None) -> Tensor:
        """Return the prompts [M, D] of a site, or of one that has no query, which counts as 0."""
        query = torch.zeros_like(self.queries[0]) if client is None else self.queries[client]
        tokens = F.layer_norm(self.base, self.base.shape[-1:]) @ self.read
        found = torch.softmax((tokens + query) @ tokens.T / math.sqrt(len(query)), dim=1) @ tokens
        return self.base + F.gelu(found + query) / math.sqrt(tokens.numel()) @ self.out
