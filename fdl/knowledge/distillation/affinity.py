"""Distillation of dual encoders from the affinities of proxy pairs (CLIP-KD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from fdl.engine.requests import FitRequest, Requests
from fdl.knowledge.distillation.targets import SoftLabelled
from fdl.knowledge.transfer.embeddings import TeacherEmbeddings
from fdl.losses.contrastive import affinity_distillation, info_nce, interactive_info_nce
from fdl.participants import Participant, copy_of
from fdl.state.weights import load_into
from fdl.utils.arguments import not_negative
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from fdl.recipe.config import Fit


@dataclass(frozen=True)
class AffinityLosses:
    """Weights of the losses besides that of the teachers' affinities; settings only.

    Args:
        contrastive: weight of the learner's own contrastive loss on the pairs, ≥ 0.
        features: weight of ``1 - cos`` between the learner's vectors, projected into each teacher's space, and the
            teacher's, ≥ 0 (CLIP-KD's feature distillation).
        interactive: weight of the contrast between the projected vectors of one side and the teacher's of the other,
            ≥ 0 (CLIP-KD's interactive contrastive learning).

    Raises:
        UserError: a weight is negative.
    """

    contrastive: float = 0.0
    features: float = 0.0
    interactive: float = 0.0

    def __post_init__(self) -> None:
        """Check the weights."""
        for name in ("contrastive", "features", "interactive"):
            not_negative(name, getattr(self, name))

    def learn(
        self, who: Participant, module: LightningModule, teachers: TeacherEmbeddings, config: Fit, name: str
    ) -> Requests[None]:
        """Train a module on the proxy pairs, in new random batches each time; call it with ``yield from``.

        A server, which computes at once, drives it with `Participant.run_all`.

        Args:
            who: the participant that trains; it holds the pairs, and its state the projectors.
            module: the learner, a dual encoder.
            teachers: the teachers' embeddings of the pairs.
            config: settings of the fit.
            name: name of the losses in the participant's metrics.
        """
        guided = GuidedStudent(who, module, teachers) if self.features or self.interactive else None

        def objective(_: nn.Module, batch: tuple[Any, Tensor]) -> Mapping[str, Tensor]:
            inputs, rows = batch
            output, rows = module(inputs), rows.cpu()
            to_texts, to_images, known = teachers.targets(rows, output.logits.device)
            parts = {"affinity": affinity_distillation(output.logits, to_texts, to_images, known)}
            total = parts["affinity"]
            if self.contrastive:
                parts["contrastive"] = info_nce(output.logits)
            if guided is not None:
                scale = module.logit_scale.exp()
                parts["features"], parts["interactive"] = guided.terms(output.embedding, rows, teachers, scale)
            for part in ("contrastive", "features", "interactive"):
                if part in parts:
                    total = total + getattr(self, part) * parts[part]
            return {"loss": total, **({key: part.detach() for key, part in parts.items()} if len(parts) > 1 else {})}

        pairs = SoftLabelled(who.proxy, torch.arange(len(who.proxy)))
        yield FitRequest(module if guided is None else guided, pairs, config, objective, name)
        if guided is not None:
            guided.save_projectors(who)


class GuidedStudent(nn.Module):
    """A learner with a linear projector into each teacher's space, one for images and texts alike.

    Args:
        who: the participant, whose state keeps the projectors from round to round.
        module: the learner, a dual encoder.
        teachers: the teachers' embeddings, which give the widths of the projectors.
    """

    def __init__(self, who: Participant, module: LightningModule, teachers: TeacherEmbeddings):
        super().__init__()
        self.module, projectors = module, {}
        for client, answer in zip(teachers.clients, teachers.answers):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(stream_seed(who.seed, "projector", 0, client))
                projectors[str(client)] = nn.Linear(module.embedding_dim, answer.shape[1] // 2, bias=False)
        self.projectors = who.runtime.place(nn.ModuleDict(projectors))
        for client, tensors in who.state.get("projectors", {}).items():
            if client in self.projectors:
                load_into(self.projectors[client], tensors)
        self.train()

    def save_projectors(self, who: Participant) -> None:
        """Save the projectors, and keep those of clients without an upload in this round.

        Args:
            who: the participant, in whose state they are saved.
        """
        kept = {client: copy_of(projector) for client, projector in self.projectors.items()}
        who.state["projectors"] = who.state.get("projectors", {}) | kept

    def terms(
        self, embedding: Tensor, rows: Tensor, teachers: TeacherEmbeddings, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Feature and interactive loss, each a mean over pairs of the sum over teachers by their weights.

        Args:
            embedding: the learner's unit vectors, images and then texts, [B, 2 D].
            rows: numbers of the pairs in the proxy set, int64 [B], on the CPU.
            teachers: the teachers' embeddings of the pairs.
            scale: the learner's logit scale.
        """
        features = interactive = embedding.sum() * 0.0
        for projector, answer, answered, weights in zip(
            self.projectors.values(), teachers.answers, teachers.answered[:, rows], teachers.weights[:, rows]
        ):
            if not bool(answered.any()):
                continue
            weights = weights[answered].to(embedding.device)
            theirs = [F.normalize(s, dim=1) for s in answer[rows[answered]].to(embedding.device).float().chunk(2, 1)]
            own = [
                F.normalize(projector(s).float(), dim=1) for s in embedding[answered.to(embedding.device)].chunk(2, 1)
            ]
            cosines = sum((mine * other).sum(1) for mine, other in zip(own, theirs)) / 2
            features = features + (weights * (1 - cosines)).sum() / len(rows)
            interactive = interactive + weights.sum() / len(rows) * interactive_info_nce(*own, *theirs, scale)
        return features, interactive
