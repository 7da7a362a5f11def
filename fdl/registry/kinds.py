"""Kinds of plug-ins that a recipe can name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of plug-in.

    Attributes:
        name: as in ``fdl list``, in the singular.
        base: dotted path of the base class.
        search_paths: packages and modules whose classes have short names.
        injected: arguments that fdl passes to the constructor, so that they are optional in a recipe.
        forbidden: the injected arguments that a recipe must not give.
        required_method: a method that fdl calls without arguments, so that it may not require any.
        short_name: converts a class name to a short name, for classes without an attribute `name`.
    """

    name: str
    base: str
    search_paths: tuple[str, ...] = ()
    injected: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    required_method: str | None = None
    short_name: Callable[[str], str] | None = None

    @property
    def plural(self) -> str:
        """Its name in ``fdl list``."""
        return f"{self.name[:-1]}ies" if self.name.endswith("y") else f"{self.name}s"

    @property
    def label(self) -> str:
        """Its name in a sentence."""
        return self.name.replace("_", " ")

    def __str__(self) -> str:
        return f"{'an' if self.name[0].lower() in 'aeiou' else 'a'} {self.label}"


def snake_case(name: str) -> str:
    """Convert ``"CosineAnnealingLR"`` to ``"cosine_annealing_lr"``.

    Args:
        name: a class name.
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


_DATA = ("num_classes", "input_shape", "tokenizer", "context", "normalization")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("method", "fdl.methods.base.Method", ("fdl.methods",)),
        Kind("module", "lightning.LightningModule", ("fdl.modules",), injected=_DATA),
        Kind("datamodule", "fdl.datamodules.base.FederatedDataModule", ("fdl.datamodules",)),
        Kind("partitioner", "fdl.datamodules.partition.Partitioner", ("fdl.datamodules.partition",)),
        Kind("arrival", "fdl.datamodules.arrivals.Arrival", ("fdl.datamodules.arrivals",)),
        Kind("codec", "fdl.comm.stages.base.Stage", ("fdl.comm.stages",)),
        Kind("fault", "fdl.faults.base.Fault", ("fdl.faults",)),
        Kind("confidence", "fdl.knowledge.confidence.base.Confidence", ("fdl.knowledge.confidence",)),
        Kind("encoder", "fdl.encoders.base.Encoder", ("fdl.encoders",), injected=_DATA),
        Kind("evaluator", "fdl.evaluators.base.Evaluator", ("fdl.evaluators",)),
        Kind("attack", "fdl.attacks.base.Attack", ("fdl.attacks",)),
        Kind("aligner", "fdl.modules.aligner.Aligner", ("fdl.modules.aligner",)),
        Kind("adversary", "fdl.adversaries.base.Adversary", ("fdl.adversaries",)),
        Kind(
            "token_confidence", "fdl.knowledge.confidence.tokens.TokenConfidence", ("fdl.knowledge.confidence.tokens",)
        ),
        Kind("lora_aggregation", "fdl.knowledge.aggregation.lora.LoraAggregation", ("fdl.knowledge.aggregation.lora",)),
        Kind(
            "phase_schedule",
            "fdl.knowledge.distillation.phase_schedule.PhaseSchedule",
            ("fdl.knowledge.distillation.phase_schedule",),
        ),
        Kind(
            "feature_transfer", "fdl.knowledge.transfer.features.FeatureTransfer", ("fdl.knowledge.transfer.features",)
        ),
        Kind(
            "layer_selection",
            "fdl.knowledge.transfer.layer_selection.LayerSelection",
            ("fdl.knowledge.transfer.layer_selection",),
        ),
        Kind(
            "prototype_transfer",
            "fdl.knowledge.transfer.prototypes.PrototypeTransfer",
            ("fdl.knowledge.transfer.prototypes", "fdl.privacy"),
        ),
        Kind(
            "client_weighting",
            "fdl.knowledge.distillation.personalization.AdaptiveWeights",
            ("fdl.knowledge.distillation.personalization",),
        ),
        Kind(
            "personalization",
            "fdl.knowledge.distillation.personalization.Similarity",
            ("fdl.knowledge.distillation.personalization",),
        ),
        Kind(
            "curriculum", "fdl.knowledge.distillation.curriculum.Curriculum", ("fdl.knowledge.distillation.curriculum",)
        ),
        Kind(
            "upload_policy",
            "fdl.knowledge.distillation.upload_on_change.UploadOnChange",
            ("fdl.knowledge.distillation.upload_on_change",),
        ),
        Kind("private_release", "fdl.knowledge.release.Release", ("fdl.privacy",)),
        Kind(
            "server_optimizer",
            "fdl.knowledge.aggregation.server_optimizers.ServerOptimizer",
            ("fdl.knowledge.aggregation.server_optimizers",),
        ),
        Kind("robust_rule", "fdl.robust.base.RobustRule", ("fdl.robust",)),
        Kind("callback", "fdl.callbacks.base.Callback", ("fdl.callbacks",)),
        Kind("optimizer", "torch.optim.Optimizer", ("torch.optim",), ("params",), ("params",), "step", str.lower),
        Kind(
            "scheduler",
            "torch.optim.lr_scheduler.LRScheduler",
            ("torch.optim.lr_scheduler",),
            ("optimizer",),
            ("optimizer",),
            "step",
            snake_case,
        ),
    )
}
