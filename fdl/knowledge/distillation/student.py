"""The student with what it needs to learn from three kinds of knowledge: ``α·response + β·feature + γ·prototype``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdl.datamodules.samples import Samples
from fdl.errors import UserError
from fdl.knowledge.aggregation.bundle import RoundKnowledge
from fdl.knowledge.confidence.base import public_space
from fdl.knowledge.distillation.curriculum import Curriculum
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.knowledge.transfer.extraction import EMBEDDING, extract, layer_names, pool
from fdl.knowledge.transfer.features import FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypeTransfer
from fdl.losses.features import FEATURE_LOSSES
from fdl.losses.responses import RESPONSE_LOSSES
from fdl.modules.adapter import ADAPTERS
from fdl.modules.objectives import mean_over, samples_of
from fdl.modules.output import Output
from fdl.modules.types import Batch
from fdl.participants import Server, copy_of
from fdl.state.weights import load_into
from fdl.utils.arguments import not_negative, one_of
from fdl.utils.seeding import stream_seed


@dataclass(frozen=True)
class DistillationConfig:
    """What the student learns from, and how much of each; settings only.

    Args:
        loss: the response loss, a name among `fdl.losses.responses.RESPONSE_LOSSES`.
        temperature: of the response loss.
        alpha: α, weight of the response loss, ≥ 0.
        features: β and what belongs to it; None or weight 0 is without.
        prototypes: γ and what belongs to it; None or weight 0 is without.
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
        if self._own_space and self.adapter == "identity":
            raise UserError("adapter: identity, but prototypes in each specialist's own embedding need one; take film")

    @property
    def adapts(self) -> bool:
        """Whether there is an adapter, and something for it to do."""
        return self.adapter != "identity" and (self.features is not None or self._own_space)

    @property
    def _own_space(self) -> bool:
        return self.prototypes is not None and self.prototypes.space == EMBEDDING

    @property
    def width(self) -> int:
        """Width of the space in which participants' features come to the adapter."""
        return 64 if self.features is None else self.features.width

    def teach(
        self,
        server: Server,
        collected: RoundKnowledge,
        answers: Tensor,
        rows: Tensor | None,
        curriculum: Curriculum | None,
    ) -> dict[str, float]:
        """Train the student for one round.

        Args:
            server: holds the student and the proxy set.
            collected: features and prototypes of the round.
            answers: what the student is to answer, [n, C].
            rows: of the proxy set, for which these are; None for all.
            curriculum: in what order they are learnt; None for any.

        Returns:
            The mean of every part of the loss.
        """
        features = collected.features if self.features is not None else None
        prototypes = collected.prototypes if self.prototypes is not None else None
        probabilities = answers
        if RESPONSE_LOSSES[self.loss].form == "logits":
            probabilities = torch.softmax(answers, dim=1)
        columns, constants = {}, {}
        if features is not None:
            columns["seen"] = _of_rows(features.values, rows)
            if not bool(_of_rows(features.known, rows).all()):
                columns["known"] = _of_rows(features.known, rows)
            if features.shares is not None:
                columns["shares"], constants["participants"] = _of_rows(features.shares, rows), features.participants
        if prototypes is not None:
            merged = prototypes.participants is None
            public = torch.tensor(public_space(server).encode_public(server.proxy)) if merged else None
            columns["belongs"] = prototypes.assignment(
                probabilities, None if public is None else _of_rows(public, rows)
            )
            constants |= {"centres": prototypes.values, "labels": prototypes.labels}
            constants |= {} if merged else {"owners": prototypes.participants}
        if "participants" in constants or "owners" in constants:
            columns["probabilities"] = probabilities
        learner = StudentWithHeads(self, server, columns, constants)
        samples: Samples = SoftLabelled(server.proxy, answers, rows, tuple(columns.values()))
        if curriculum is not None:
            samples = curriculum.paced(samples, collected.responses, rows, server.server_distil, server.round)
        objective = learner.objective if columns else learner.response
        losses = server.fit(learner, samples, server.server_distil, objective, name="distil")
        learner.leave(server)
        return losses


class StudentWithHeads(nn.Module):
    """The student, with projectors and adapter that are trained with it, saved by the server, and left behind.

    Args:
        teaching: the settings.
        server: holds the student and, in its state, what earlier rounds left of the others.
        columns: what comes with each sample after its answers, by name.
        constants: what all samples share, by name.
    """

    def __init__(
        self,
        teaching: DistillationConfig,
        server: Server,
        columns: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
    ):
        super().__init__()
        self.student, self.teaching, self.columns = server.student, teaching, list(columns)
        self.layers = (
            [EMBEDDING] if teaching.features is None else layer_names(server.student, teaching.features.student)
        )
        for name, tensor in constants.items():
            self.register_buffer(name, tensor.to(server.runtime.device), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(server.seed, "learner"))
            helpers = self._helpers(server, columns, constants)
        self.helpers = server.runtime.place(nn.ModuleDict(helpers))
        for role, tensors in server.state.get("learner", {}).items():
            if role in self.helpers:
                load_into(self.helpers[role], tensors)
        self.train()  # the student may come from an evaluation

    def leave(self, server: Server) -> None:
        """Save projectors and adapter in the server's state, until the next round."""
        kept = {role: copy_of(module) for role, module in self.helpers.items()}
        if kept:
            server.state["learner"] = server.state.get("learner", {}) | kept

    def objective(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The named parts of the server's loss; ``loss`` is their weighted sum.

        Args:
            module: this learner.
            batch: inputs, answers, and the columns in their order.
        """
        inputs, answers, *rest = batch
        columns, teaching = dict(zip(self.columns, rest)), self.teaching
        output = self.student(inputs, features=[name for name in self.layers if name != EMBEDDING])
        response = RESPONSE_LOSSES[teaching.loss](output.logits, answers, teaching.temperature)
        total, parts, anchors = teaching.alpha * response, {"response": response}, []
        if "seen" in columns:
            parts["feature"] = self._feature(output, columns, anchors)
            total = total + teaching.features.weight * parts["feature"]
        if "belongs" in columns:
            parts["prototype"] = self._prototype(output, columns["belongs"], anchors)
            total = total + teaching.prototypes.weight * parts["prototype"]
        if anchors:
            parts["adapter"] = torch.stack(anchors).sum()
            total = total + parts["adapter"]
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}

    @mean_over(samples_of)
    def response(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """As `objective`, where there is nothing to learn from but answers, so that samples are not compared."""
        return self.objective(module, batch)

    def _feature(self, output: Output, columns: Mapping[str, Tensor], anchors: list[Tensor]) -> Tensor:
        seen, own = columns["seen"], self._own(output)
        if "shares" in columns:
            mapped, shares = self.helpers["adapter"](seen, self.participants), columns["shares"]
            # what keeps the space meaningful: one probe tells the answers from any participant's features in it
            losses = -(columns["probabilities"].unsqueeze(1) * self._probed(mapped)).sum(2)
            anchors.append((shares * losses).sum() / shares.sum().clamp_min(1e-12))
            # the student moves towards the participants, not they towards it: else both could meet at a constant
            seen = (mapped * shares.unsqueeze(2)).sum(1).detach()
        if "features" in self.helpers:
            own = self.helpers["features"](own)
        if "known" in columns:  # of a sample that only earlier rounds answered there are no features
            own, seen = own[columns["known"]], seen[columns["known"]]
            if len(own) < 2:
                return own.sum() * 0.0
        return FEATURE_LOSSES[self.teaching.features.loss](own, seen)

    def _prototype(self, output: Output, belongs: Tensor, anchors: list[Tensor]) -> Tensor:
        centres, embedding = self.centres, output.embedding
        if "prototypes" in self.helpers:
            embedding = self.helpers["prototypes"](embedding)
        else:
            centres = self.helpers["adapter"](centres.unsqueeze(0), self.owners).squeeze(0)
            if self.teaching.prototypes.by == "class":
                anchors.append(nn.functional.nll_loss(self._probed(centres), self.labels))
            centres = centres.detach()
            embedding = self._own(output)
        return self.teaching.prototypes.function(embedding, centres, belongs)

    def _own(self, output: Output) -> Tensor:
        layers = [output.embedding if name == EMBEDDING else pool(output.features[name]) for name in self.layers]
        return torch.cat(layers, dim=1)

    def _probed(self, mapped: Tensor) -> Tensor:
        return torch.log_softmax(self.helpers["probe"](mapped), dim=-1)

    def _helpers(
        self, server: Server, columns: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> dict[str, nn.Module]:
        """Projectors, adapter and probe, as far as they are needed."""
        if not columns:
            return {}
        one = extract(server, self.student, server.proxy.subset([0]), self.layers)
        own, helpers = sum(values.shape[1] for values in one.layers.values()), {}
        adapted = "participants" in constants or "owners" in constants
        if "seen" in columns and "shares" not in columns and FEATURE_LOSSES[self.teaching.features.loss].projected:
            helpers["features"] = nn.Linear(own, columns["seen"].shape[-1])
        if "belongs" in columns and "owners" not in constants:
            helpers["prototypes"] = nn.Linear(one.embedding.shape[1], constants["centres"].shape[1])
        if adapted:
            adapter = ADAPTERS[self.teaching.adapter]
            helpers["adapter"] = adapter(int(server.state["participants"]), self.teaching.width, own)
            helpers["probe"] = nn.Linear(own, server.num_classes)
        return helpers


def _of_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]
