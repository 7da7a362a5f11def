"""The student, and what is trained with it to learn from responses, features and prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.knowledge.aggregation.bundle import RoundKnowledge
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.confidence.base import public_space
from fdl.knowledge.distillation.curriculum import Curriculum
from fdl.knowledge.distillation.feature_term import FeatureTerm
from fdl.knowledge.distillation.prototype_term import PrototypeTerm
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.knowledge.distillation.terms import (
    DistillationTerm,
    ParticipantAdapter,
    ResponseTerm,
    StudentOutput,
    StudentWidths,
    columns_of_batch,
    used_columns,
)
from fdl.knowledge.transfer.extraction import EMBEDDING, extract, layer_names
from fdl.knowledge.transfer.features import FeatureMean, FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypePool, PrototypeTransfer
from fdl.losses.responses import RESPONSE_LOSSES
from fdl.modules.adapter import ADAPTERS
from fdl.modules.objectives import mean_over, samples_of
from fdl.modules.types import Batch
from fdl.participants import Server, copy_of
from fdl.state.weights import load_into
from fdl.utils.arguments import not_negative, one_of
from fdl.utils.seeding import stream_seed

_ADAPTER = "adapter"


@dataclass(frozen=True)
class DistillationConfig:
    """The terms of the student's loss, ``α·response + β·feature + γ·prototype``; settings only.

    Args:
        loss: the response loss, a name among `fdl.losses.responses.RESPONSE_LOSSES`.
        temperature: of the response loss, > 0.
        alpha: α, weight of the response loss, ≥ 0.
        features: settings of feature distillation, β among them; None is without.
        prototypes: settings of prototype distillation, γ among them; None is without.
        adapter: a name among `fdl.modules.adapter.ADAPTERS`, or ``"identity"``.

    Raises:
        UserError: the settings do not go together.
    """

    loss: str
    temperature: float
    alpha: float
    features: FeatureTransfer | None
    prototypes: PrototypeTransfer | None
    adapter: str

    def __post_init__(self) -> None:
        """Check settings that depend on each other."""
        not_negative("alpha", self.alpha)
        one_of("adapter", self.adapter, ("identity", *ADAPTERS))
        if self._embedded_prototypes and self.adapter == "identity":
            raise UserError("adapter: identity, but prototypes in each specialist's own embedding need one; take film")

    @property
    def adapts(self) -> bool:
        """True if there is an adapter, and something for it to map."""
        return self.adapter != "identity" and (self.features is not None or self._embedded_prototypes)

    @property
    def _embedded_prototypes(self) -> bool:
        return self.prototypes is not None and self.prototypes.space == EMBEDDING

    @property
    def width(self) -> int:
        """Width of the space in which participants' features come to the adapter."""
        return 64 if self.features is None else self.features.width

    def feature_mean(self, server: Server, cap: Cap | None) -> FeatureMean | None:
        """An empty mean of the clients' features; None where they send none.

        Args:
            server: gives the size of the proxy set and the seed.
            cap: the most weight that one client may have; None for any.
        """
        if self.features is None:
            return None
        return FeatureMean(len(server.proxy), self.width, server.seed, self.adapts, cap)

    def prototype_pool(self, server: Server, cap: Cap | None) -> PrototypePool | None:
        """An empty pool of the clients' prototypes; None where they send none.

        Args:
            server: gives the number of classes and the public space.
            cap: the most weight that one client may have; None for any.
        """
        return None if self.prototypes is None else PrototypePool(server, self.prototypes, self.width, cap)

    def terms(
        self, server: Server, collected: RoundKnowledge, targets: Tensor, rows: Tensor | None
    ) -> list[DistillationTerm]:
        """The terms of one round: of what is switched on, what the clients sent.

        Args:
            server: holds the proxy set and its public space.
            collected: knowledge of the round.
            targets: soft labels of the samples that are learnt, [n, C].
            rows: of the proxy set that these samples are, int64 [n]; None for all.
        """
        terms: list[DistillationTerm] = [ResponseTerm(self.loss, self.temperature, self.alpha)]
        probabilities = torch.softmax(targets, dim=1) if RESPONSE_LOSSES[self.loss].form == "logits" else targets
        if self.features is not None and collected.features is not None:
            terms.append(FeatureTerm(self.features, collected.features, probabilities, rows))
        if self.prototypes is not None and collected.prototypes is not None:
            public = None
            if collected.prototypes.participants is None:
                public = torch.tensor(public_space(server).encode_public(server.proxy))
                public = public if rows is None else public[rows]
            terms.append(PrototypeTerm(self.prototypes, collected.prototypes, probabilities, public))
        return terms

    def teach(
        self,
        server: Server,
        collected: RoundKnowledge,
        targets: Tensor,
        rows: Tensor | None,
        curriculum: Curriculum | None,
    ) -> dict[str, float]:
        """Train the student for one round.

        Args:
            server: holds the student and the proxy set.
            collected: knowledge of the round.
            targets: soft labels, [n, C].
            rows: of the proxy set that they belong to, int64 [n]; None for all.
            curriculum: the order in which samples are learnt; None for none.

        Returns:
            The mean of each part of the loss, by name.
        """
        learner = StudentWithHeads(self, server, self.terms(server, collected, targets, rows))
        samples: Samples = SoftLabelled(server.proxy, targets, rows, learner.columns)
        if curriculum is not None:
            samples = curriculum.pace(samples, collected.responses, rows, server.server_distil, server.round)
        objective = learner.objective if learner.columns else learner.response_objective
        losses = server.fit(learner, samples, server.server_distil, objective, name="distil")
        learner.save_heads(server)
        return losses


class StudentWithHeads(nn.Module):
    """The student with the terms' heads and the adapter, which the server keeps and nobody needs at inference.

    Args:
        config: the settings.
        server: holds the student and, in its state, heads and adapter of earlier rounds.
        terms: of the loss.

    Attributes:
        columns: tensors with one row per sample that come with each batch after inputs and targets, term by term.
    """

    def __init__(self, config: DistillationConfig, server: Server, terms: Sequence[DistillationTerm]):
        super().__init__()
        self.student = server.student
        self.layers = [EMBEDDING] if config.features is None else layer_names(server.student, config.features.student)
        self.terms = nn.ModuleList(terms).to(server.runtime.device)
        used = [term.columns() for term in terms]
        self.columns = tuple(tensor for columns in used for tensor in used_columns(columns))
        self._used = [(type(columns), tuple(column is not None for column in columns)) for columns in used]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(server.seed, "learner"))
            heads = self._new_heads(config, server) if self.columns else {}
        self.heads = server.runtime.place(nn.ModuleDict(heads))
        for name, tensors in server.state.get("heads", {}).items():
            if name in self.heads:
                load_into(self.heads[name], tensors)
        self.train()  # the student may come from an evaluation

    def save_heads(self, server: Server) -> None:
        """Save heads and adapter in the server's state, until the next round."""
        saved = {name: copy_of(module) for name, module in self.heads.items()}
        if saved:
            server.state["heads"] = server.state.get("heads", {}) | saved

    def objective(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The named parts of the student's loss; ``loss`` is their weighted sum.

        Args:
            module: this module.
            batch: inputs, targets, and the columns of all terms.
        """
        inputs, targets, *rest = batch
        output = self.student(inputs, features=[name for name in self.layers if name != EMBEDDING])
        student, tensors = StudentOutput(output, self.layers, targets), iter(rest)
        total, parts, probes = None, {}, []
        heads = {name: self.heads[name] for name in self.heads}
        for term, used in zip(self.terms, self._used):
            columns = columns_of_batch(used, tensors)
            found = term.loss(student, columns, heads.get(term.name), heads.get(_ADAPTER))
            parts[term.name] = found.value
            total = term.weight * found.value if total is None else total + term.weight * found.value
            if found.adapter is not None:
                probes.append(found.adapter)
        if probes:
            parts[_ADAPTER] = torch.stack(probes).sum()
            total = total + parts[_ADAPTER]
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}

    @mean_over(samples_of)
    def response_objective(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`objective` where the response is the only term, so that samples are not compared with each other.

        Args:
            module: this module.
            batch: inputs and targets.
        """
        return self.objective(module, batch)

    def _new_heads(self, config: DistillationConfig, server: Server) -> dict[str, nn.Module]:
        """Heads of all terms and the adapter, as far as they are needed, with new weights."""
        one = extract(server, self.student, server.proxy.subset([0]), self.layers)
        activations = sum(values.shape[1] for values in one.layers.values())
        widths = StudentWidths(one.embedding.shape[1], activations)
        made = {term.name: term.head(widths) for term in self.terms}
        heads = {name: head for name, head in made.items() if head is not None}
        if any(term.adapted for term in self.terms):
            participants, classes = int(server.state["participants"]), server.num_classes
            heads[_ADAPTER] = ParticipantAdapter(config.adapter, participants, config.width, activations, classes)
        return heads
