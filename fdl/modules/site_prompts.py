"""Generator of personalised prompts, one set per site."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SitePromptGenerator(nn.Module):
    """Prompts P_k = B + h_k W of site k, where h_k is the attention of the site's query q_k over the shared tokens B.

    h_k = gelu(softmax((T + q_k) Tᵀ / √w) T + q_k) / √(M w) with T = layer_norm(B) R, so that a query with entries near
    1 yields an h_k, [M, w], with a norm near 1: the M rows of h_k are similar, so that without this factor W would
    learn M times as fast as B. W is initialised with 0: the initial prompts are those of the student.

    Args:
        start: initial value of B, [M, D].
        clients: K, number of sites.
        width: w, width of the queries.
        stream: random generator for the initial R and queries.
    """

    def __init__(self, start: Tensor, clients: int, width: int, stream: torch.Generator):
        super().__init__()
        self.base = nn.Parameter(start.clone())
        self.queries = nn.Parameter(torch.randn(clients, width, generator=stream))
        self.read = nn.Parameter(torch.randn(start.shape[1], width, generator=stream) / math.sqrt(start.shape[1]))
        self.out = nn.Parameter(torch.zeros(width, start.shape[1]))

    def forward(self, client: int | None) -> Tensor:
        """Return the prompts [M, D] of a site.

        Args:
            client: number of the site; None for a site without a query, for which 0 is used.
        """
        query = torch.zeros_like(self.queries[0]) if client is None else self.queries[client]
        tokens = F.layer_norm(self.base, self.base.shape[-1:]) @ self.read
        found = torch.softmax((tokens + query) @ tokens.T / math.sqrt(len(query)), dim=1) @ tokens
        return self.base + F.gelu(found + query) / math.sqrt(tokens.numel()) @ self.out
