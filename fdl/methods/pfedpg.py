"""Prompts that a network at the server makes for every site, and learns to make from what training changed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fdl.engine.requests import FitRequest, Requests
from fdl.errors import UserError
from fdl.knowledge.aggregation.base import Aggregate
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.messages import Message, Parameters
from fdl.methods.base import Method
from fdl.modules.site_prompts import SitePromptGenerator
from fdl.participants import Client, Server, copy_of
from fdl.state.weights import load_into, module_state


class PFedPG(Method):
    """A generator at the server makes each site's prompts; sites train them and send the change (Yang et al., 2023).

    The server keeps a query for every site and tokens that all share. A site trains the prompts P_k that it is sent,
    and whatever else of the student is trained, such as a head, which stays with it; it sends Δ_k, what training has
    changed of P_k. With shares p_k of the samples, the generator's weights φ then descend on
    Σ p_k |P_k(φ) - (P_k + Δ_k)|² / 2, the distance to what the sites made of their prompts; the first step is along
    ∂/∂φ Σ p_k ⟨P_k(φ), Δ_k⟩. The student has the prompts of a site that has no query yet, and every site's own model is
    evaluated beside it. We know the paper's generator from a summary: `SitePromptGenerator` is ours.

    The server looks at the changes one by one: unlike a mean they cannot be summed under secure aggregation.

    Args:
        prompts: names or globs of the student's tensors that are made, all of one last dimension D; None for all that
            the student trains.
        width: w, numbers in a query.
        steps: of the descent, a round.
        lr: its learning rate, halved within a round where it overshoots. With 1, a single first step moves what all
            share as FedAvg does.

    Raises:
        UserError: values out of range; from `setup`, a pattern that matches nothing, or tensors that do not fit.
    """

    name = "pfedpg"
    sends = (Parameters,)
    uploads_are_deltas = True

    def __init__(self, prompts: list[str] | None = None, width: int = 32, steps: int = 10, lr: float = 0.5):
        for key, value in (("width", width), ("steps", steps)):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}")
        if not lr > 0:
            raise UserError(f"lr must be > 0, got {lr}")
        self.prompts, self.width, self.steps, self.lr = tuple(prompts or ("*",)), width, steps, lr

    def setup(self, server: Server, clients: Sequence[Client]) -> None:
        """See that the patterns fit the student, and draw the generator."""
        state = module_state(server.student)
        for pattern in self.prompts:
            if not any(fnmatchcase(name, pattern) for name in state):
                shown = ", ".join(list(state)[:8]) + (", …" if len(state) > 8 else "")
                raise UserError(f"prompts: nothing that the student trains is called {pattern!r}; there are {shown}")
        made = self._made(state)
        if len({tensor.shape[-1:] for tensor in made.values()}) > 1 or any(t.ndim == 0 for t in made.values()):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in made.items())
            raise UserError(f"prompts: what is made must have one last dimension; there are {shapes}")
        start = torch.cat([t.detach().float().cpu().reshape(-1, t.shape[-1]) for t in made.values()])
        generator = SitePromptGenerator(start, len(clients), self.width, server.rng("prompts"))
        server.state["generator"] = copy_of(generator)

    def download(self, server: Server, client: int) -> Message:
        """The site's own prompts."""
        with torch.no_grad():
            return Parameters(self._split(server, self._generator(server)(client)))

    def local_update(self, client: Client, download: Parameters) -> Requests[Parameters]:
        """Train prompts and head on private data, keep the head, return what changed of the prompts."""
        module = client.specialist()  # at first a fresh one, whose head nobody else has
        load_into(module, {**module_state(module), **download.tensors})
        yield FitRequest(module, client.train, client.local_training)
        client.save_specialist(module)
        after = client.state["specialist"]
        return Parameters(
            {k: after[k] - before.cpu() for k, before in download.tensors.items()}, client.reported_samples
        )

    def aggregate(self, server: Server) -> _Changes:
        """All changes, by site."""
        return _Changes(self._made(module_state(server.student)))

    def server_update(self, server: Server, knowledge: _Changes | None) -> dict[str, float]:
        """Bring the generator nearer to what the sites want; then the student gets the prompts of a new site."""
        if knowledge is None:
            return {}
        generator, total = self._generator(server), sum(knowledge.samples.values())
        with torch.no_grad():
            wanted = {client: generator(client) + change for client, change in knowledge.changes.items()}
        self._descend(generator, wanted, {client: n / total for client, n in knowledge.samples.items()})
        with torch.no_grad():
            server.state["generator"] = copy_of(generator)
            load_into(server.student, {**module_state(server.student), **self._split(server, generator(None))})
            return {"misfit": sum(float((generator(k) - w).square().mean()) for k, w in wanted.items()) / len(wanted)}

    def _descend(
        self, generator: SitePromptGenerator, wanted: Mapping[int, Tensor], shares: Mapping[int, float]
    ) -> None:
        """Steps along the slope; one that leads uphill is taken back, and the next is half as long."""
        parameters, rate = list(generator.parameters()), self.lr
        distance = lambda: sum(shares[k] * (generator(k) - w).square().sum() / 2 for k, w in wanted.items())  # noqa: E731
        loss = distance()
        for _ in range(self.steps):
            slope, before = torch.autograd.grad(loss, parameters), [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for parameter, gradient in zip(parameters, slope):
                    parameter -= rate * gradient
            after = distance()
            if not after <= loss:  # also where it is no number any more
                rate /= 2
                with torch.no_grad():
                    for parameter, old in zip(parameters, before):
                        parameter.copy_(old)
                after = distance()
            loss = after

    def _made(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a model's state the server makes."""
        return {k: v for k, v in state.items() if any(fnmatchcase(k, pattern) for pattern in self.prompts)}

    def _generator(self, server: Server) -> SitePromptGenerator:
        state = server.state["generator"]
        generator = SitePromptGenerator(state["base"], len(state["queries"]), self.width, torch.Generator())
        load_into(generator, state)
        return generator

    def _split(self, server: Server, tokens: Tensor) -> dict[str, Tensor]:
        """The student's tensors, of rows [M, D] that the generator gives."""
        made = self._made(module_state(server.student))
        rows = tokens.split([tensor.numel() // tensor.shape[-1] for tensor in made.values()])
        return {k: part.reshape(tensor.shape).to(tensor.dtype) for (k, tensor), part in zip(made.items(), rows)}


class _Changes(Aggregate):
    """One round's uploads by site: 4 · M · D bytes each."""

    def __init__(self, like: Mapping[str, Tensor]):
        self._fits = ParameterMean(like)  # it sums nothing, it only knows what fits
        self._names = list(like)
        self.changes: dict[int, Tensor] = {}
        self.samples: dict[int, int] = {}

    def add(self, message: Parameters, client: int) -> None:
        self._fits.check(message)
        message.validate()
        parts = [message.tensors[name] for name in self._names]
        self.changes[client] = torch.cat([part.float().cpu().reshape(-1, part.shape[-1]) for part in parts])
        self.samples[client] = message.samples

    def result(self) -> _Changes | None:
        return self if self.changes else None
