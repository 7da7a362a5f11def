"""Ballots out of plain tensors."""

import torch

from fdl.robust.votes import ClientUpdates, UpdateBlock


class NoServer:
    """A server of which a rule may use nothing but its memory."""

    def __init__(self):
        self.state, self.metrics, self.round = {}, {}, 1


def votes(x, shares=None, block=None):
    """Votes of vectors [n, R, D]; NaN rows are not answered."""
    x = torch.as_tensor(x, dtype=torch.float64)
    x = x[:, None, None] if x.ndim == 1 else x[:, None] if x.ndim == 2 else x
    answered = ~x.isnan().any(2)
    if shares is None:
        shares = torch.ones(x.shape[:2], dtype=torch.float64)
    shares = torch.as_tensor(shares, dtype=torch.float64)
    shares = (shares[:, None] if shares.ndim == 1 else shares).where(answered, 0.0)
    shares = shares / shares.sum(0).clamp_min(1e-300)
    return UpdateBlock(shares, answered, lambda: iter(x.nan_to_num(0.0).split(block or x.shape[2], dim=2)))


def ballot(x, shares=None, reference=None, bounded=False, server=None, block=None):
    """A ballot whose votes ignore the cap."""
    one = votes(x, shares, block)
    reference = None if reference is None else torch.as_tensor(reference, dtype=torch.float64)
    clients = list(range(len(one.shares)))
    return ClientUpdates(clients, server or NoServer(), lambda cap: iter([one]), lambda: reference, bounded, "test")


def decide(rule, x, **options):
    """What a rule makes of vectors [n, D], one row: [D]."""
    return rule.decide(ballot(x, **options)).values[0]
