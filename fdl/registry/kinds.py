"""What can be plugged into a recipe: kinds, short names, and what a `target` means."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fdl.errors import UserError
from fdl.registry.static_source import (
    Definition,
    Parameter,
    Signature,
    SourceModule,
    ancestors,
    derives,
    lookup,
    member,
    signature,
    top_level,
)
from fdl.utils.imports import _near_package, import_dotted
from fdl.utils.suggest import suggest


@dataclass(frozen=True)
class Kind:
    """One kind of plug-in.

    Attributes:
        name: as in ``fdl list``, in the singular.
        base: dotted path of the base class.
        places: packages and modules whose classes have short names.
        supplied: arguments that fdl gives to the constructor, so that a recipe need not.
        reserved: those of them that a recipe must not give.
        called: a method that fdl calls without arguments, so that it may not need any.
        short: makes a short name of a class name, where the classes have no attribute `name` of their own.
    """

    name: str
    base: str
    places: tuple[str, ...] = ()
    supplied: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    called: str | None = None
    short: Callable[[str], str] | None = None

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
    """``"CosineAnnealingLR"`` to ``"cosine_annealing_lr"``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


_DATA = ("num_classes", "input_shape", "tokenizer", "context", "normalization")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("method", "fdl.methods.base.Method", ("fdl.methods",)),
        Kind("module", "lightning.LightningModule", ("fdl.modules",), supplied=_DATA),
        Kind("datamodule", "fdl.datamodules.base.FederatedDataModule", ("fdl.datamodules",)),
        Kind("partitioner", "fdl.datamodules.partition.Partitioner", ("fdl.datamodules.partition",)),
        Kind("arrival", "fdl.datamodules.arrivals.Arrival", ("fdl.datamodules.arrivals",)),
        Kind("codec", "fdl.comm.stages.base.Stage", ("fdl.comm.stages",)),
        Kind("fault", "fdl.faults.base.Fault", ("fdl.faults",)),
        Kind("confidence", "fdl.knowledge.confidence.base.Confidence", ("fdl.knowledge.confidence",)),
        Kind("encoder", "fdl.encoders.base.Encoder", ("fdl.encoders",), supplied=_DATA),
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


@dataclass(frozen=True)
class PluginInfo:
    """A built-in plug-in, as ``fdl list`` prints it.

    Attributes:
        name: its short name.
        path: its dotted path.
        summary: one line on what it is.
        file: where it is defined.
        line: and on which line.
    """

    name: str
    path: str
    summary: str
    file: Path
    line: int


def entries(kind: Kind) -> list[PluginInfo]:
    """All built-in plug-ins of a kind, by name."""
    found = []
    for name, path in sorted(short_names(kind).items()):
        definition = lookup(path)
        if isinstance(definition, Definition) and not _missing_in_call(definition, kind):
            node = definition.node
            found.append(PluginInfo(name, path, definition.summary, definition.module.file, node.lineno))
    return found


@cache
def short_names(kind: Kind) -> dict[str, str]:
    """Dotted path by short name, for the built-in plug-ins of a kind."""
    base = lookup(kind.base)
    found: dict[str, str] = {}
    for place in kind.places if isinstance(base, Definition) else ():
        for module in _files(place):
            for name, node in module.names.items():
                found.update(_named(kind, base, place, module, name, node))
    return found


def _named(kind: Kind, base: Definition, place: str, module: SourceModule, name: str, node: ast.AST) -> dict[str, str]:
    """The short name and dotted path of one name in a module; empty when it is none of the kind."""
    if isinstance(node, ast.ClassDef):
        definition = Definition(module, node)
        own = definition.own_constant("name") if kind.short is None else None if name[0] == "_" else kind.short(name)
        if own and derives(definition, base) and (kind.short is None or definition.dotted != base.dotted):
            return {str(own): f"{place}.{name}" if kind.short else definition.dotted}
    elif kind.short and isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(f"{place}."):
        # imported by its package under a class's name: read only once it is asked for
        return {kind.short(name): f"{place}.{name}"} if name[0].isupper() and name not in base.dotted.split(".") else {}
    return {}


def _files(place: str) -> list[SourceModule]:
    """The modules of one of our packages; else the module itself, whose imports are its public names."""
    module = lookup(place)
    if not isinstance(module, SourceModule):
        return []
    if not place.startswith("fdl.") or not module.folders:
        return [module]
    stems = sorted({file.stem for folder in module.folders for file in folder.glob("*.py")} - {"__init__"})
    return [m for m in map(module.submodule, stems) if m is not None]


@dataclass(frozen=True)
class ResolvedTarget:
    """What a recipe's `target` means.

    Attributes:
        path: its dotted path.
        definition: its source, None where only an import could tell.
        signature: what it takes, None for a compiled class that does not say.
    """

    path: str
    definition: Definition | None
    signature: Signature | None

    def load(self) -> Any:
        """Import it."""
        return import_dotted(self.path)


@cache
def find(target: str, kind: Kind, base: str = "") -> ResolvedTarget:
    """Resolve a `target` without importing it, as far as its source tells.

    Args:
        target: a short name of the kind, or a dotted path.
        kind: what it has to be.
        base: dotted path of the class that it has to derive from; default the kind's.

    Raises:
        UserError: when there is no such thing, or it is something else; without the recipe's key.
    """
    if _is_path(target):
        raise UserError(f"{target!r} is a path; expected the name of {kind}{_reader(target, kind)}")
    if "." not in target:
        names = short_names(kind)
        if target not in names:
            raise UserError(f"unknown {kind.label} {target!r}{suggest(target, names) or '; or give a dotted path'}")
        target = names[target]
    base = base or kind.base
    found = lookup(target)
    if isinstance(found, SourceModule):
        raise UserError(f"{target} is a module, expected {kind} in it")
    if found is None:
        return _import_target(target, kind, base)
    fits = _fits(found, lookup(base))
    if fits is None:
        return _import_target(target, kind, base)
    if not fits:
        raise UserError(f"{target} is not {kind}: it does not derive from {base}")
    if missing := _missing_in_call(found, kind):
        raise UserError(f"{target} cannot be used: its {kind.called}() needs {missing!r}")
    arguments = signature(found)
    return ResolvedTarget(target, found, arguments if arguments is not None else _inspect(import_dotted(target)))


_READERS = {
    (".txt", ".md", ".txt.gz", ".md.gz"): "text_files, args: {path: PATH, context: 64}",
    (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz", ".parquet"): (
        "text_table, args: {path: PATH, context: 64, text: text}"
    ),
    (".npz",): "arrays, args: {path: PATH}",
    (".tar", ".tar.gz", ".tgz"): "image_text_shards, args: {path: PATH, size: 224}",
}
"""Which data module reads files of an ending, as one would write it."""


def _is_path(target: str) -> bool:
    """Whether a file or folder stands where a name or dotted path should."""
    return "/" in target or target.lower().endswith(tuple(end for ends in _READERS for end in ends))


def _reader(target: str, kind: Kind) -> str:
    """What to write in place of a path, where a data module reads it."""
    if kind.name != "datamodule":
        return ", or a dotted path"
    found = next((how for ends, how in _READERS.items() if target.lower().endswith(ends)), None)
    if found is None:
        found = "NAME, args: {path: PATH}"
    return f"; to read it, write {{target: {found.replace('PATH', target)}}}"


def _missing_in_call(found: Definition, kind: Kind) -> str | None:
    """The argument that a class's `kind.called` would need, which fdl does not have."""
    for cls in ancestors(found) if kind.called and found.is_class else ():
        method = member(cls, kind.called) if cls is not None else None
        if method is not None:
            parameters = signature(method).parameters.values()
            return next((p.name for p in parameters if p.required), None)
    return None


def _fits(found: Definition, base: Definition | SourceModule | None) -> bool | None:
    """Whether calling `found` makes a `base`; None when the source does not tell."""
    if not isinstance(base, Definition):
        return None
    if found.is_class:
        return derives(found, base)
    if found.node.returns is None:
        return True  # a function without annotation: what it makes is checked once it is made
    made = found.module.resolve(found.node.returns)
    if made is None and hasattr(builtins, ast.unparse(found.node.returns)):
        return False
    return not (isinstance(made, Definition) and made.is_class and derives(made, base) is False)


def _import_target(target: str, kind: Kind, base: str) -> ResolvedTarget:
    """Resolve by import what the source does not tell."""
    _refuse_missing(target)
    found = import_dotted(target)
    if not callable(found):
        raise UserError(f"{target} is a {type(found).__name__}, expected {kind}")
    if inspect.isclass(found) and not issubclass(found, import_dotted(base)):
        raise UserError(f"{target} is not {kind}: it does not derive from {base}")
    return ResolvedTarget(target, None, _inspect(found))


def _refuse_missing(target: str) -> None:
    """Say that a dotted path leads nowhere, without importing, where its source shows that."""
    parts = target.split(".")
    if top_level(parts[0]) is None and importlib.util.find_spec(parts[0]) is None:
        raise UserError(f"{target}: there is no module {parts[0]!r}{_near_package(parts[0])}")
    for i in range(1, len(parts)):
        owner, part = lookup(".".join(parts[:i])), parts[i]
        readable = isinstance(owner, SourceModule) and not owner.dynamic and part not in owner.names
        if readable and lookup(".".join(parts[: i + 1])) is None and not _compiled(owner, part):
            raise UserError(f"{target}: {owner.name} has no {part!r}{suggest(part, owner.public(), few=0)}")


def _compiled(package: SourceModule, part: str) -> bool:
    return any(any(folder.glob(f"{part}.*")) for folder in package.folders)


def _inspect(found: Any) -> Signature | None:
    """The signature of an imported callable."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return Signature(
        {p.name: Parameter(p.name, p.default is inspect.Parameter.empty) for p in parameters if p.kind in named},
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def kind_of(base: Definition) -> Kind | None:
    """The kind whose base class `base` is, or derives from."""
    for kind in KINDS.values():
        root = lookup(kind.base)
        if isinstance(root, Definition) and derives(base, root):
            return kind
    return None
