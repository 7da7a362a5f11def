"""Loading of models of transformers: from the hub, from a local folder, or new ones from a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdl.errors import UserError
from fdl.modules.checkpoints import one_line, read_weights
from fdl.modules.hub import hub_or_cache
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ZeroDivisionError, ImportError)


def load_model(
    auto: str,
    model: str,
    pretrained: bool,
    checkpoint: str | None,
    config: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    always: Mapping[str, Any] | None = None,
    fresh_head: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model in float32, or create one with random weights.

    Args:
        auto: transformers' class that selects the architecture, e.g. ``"AutoModelForCausalLM"``.
        model: a local folder with ``config.json``, a family (``model_type``), or an id of the hub.
        pretrained: load the weights of the folder or the hub.
        checkpoint: local file of weights instead; None for none.
        config: settings that override those of the folder, the hub or the family; None for none.
        new: defaults of settings for a model without weights; `config` overrides them.
        always: settings of any model, unless `config` overrides them.
        fresh_head: allow new weights for the head on top of the base model and for a pooler within it, if the file has
            none, or weights of other shapes.

    Returns:
        The model, and the names in its state whose weights are new although the others come from a file.

    Raises:
        UserError: the model is unknown, settings are unknown, or weights do not match the model.
    """
    import transformers

    if pretrained and checkpoint is not None:
        raise UserError("give pretrained or checkpoint, not both")
    weights = pretrained or checkpoint is not None
    settings = _config(model, pretrained, config or {}, {} if weights else new, always or {})
    maker = getattr(transformers, auto)
    try:
        if not weights:
            return maker.from_config(settings), []
    except _FAULTS as error:
        raise UserError(f"transformers cannot build {model}: {one_line(error)}") from error
    state = None
    try:
        if checkpoint is not None:
            with torch.device("meta"):  # only for its class and the names of its state
                blank = maker.from_config(settings)
            maker, base = type(blank), f"{blank.base_model_prefix}."
            # in the file of a base model, names have no prefix
            state = read_weights(
                checkpoint, {n for name in blank.state_dict() for n in (name, name.removeprefix(base))}
            )
        with _quiet(), nullcontext() if state is not None or _is_path(model) else hub_or_cache():
            network, seen = maker.from_pretrained(
                str(Path(model).expanduser()) if state is None else None,
                config=settings,
                state_dict=state,
                dtype=torch.float32,  # not the file's: optimisers need more than 16 bits, and Fabric sets the precision
                ignore_mismatched_sizes=True,  # mismatches are reported below
                output_loading_info=True,
            )
    except _FAULTS as error:
        raise UserError(f"{_label(model, checkpoint)} does not fit: {one_line(error)}") from error
    names = sorted({*seen["missing_keys"], *(entry[0] for entry in seen["mismatched_keys"])})
    lost = [name for name in names if not (fresh_head and _is_head(network, name))]
    if lost:
        few = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        extra = sorted(seen["unexpected_keys"])
        rest = f"; unexpected: {', '.join(extra[:3])}{', …' if len(extra) > 3 else ''}" if extra else ""
        raise UserError(
            f"{_label(model, checkpoint)} does not fit: no weights of the right shape for {few}{rest}; they are of "
            "another family or size than model and config say"
        )
    return network, names


def head_children(network: PreTrainedModel) -> list[str]:
    """List the submodules with weights on top of the base model, by name.

    Args:
        network: model of transformers.
    """
    return [
        name
        for name, child in network.named_children()
        if name != network.base_model_prefix and any(True for _ in child.parameters())
    ]


def _is_head(network: PreTrainedModel, name: str) -> bool:
    return name.split(".")[0] in head_children(network) or "pooler" in name.split(".")


def _config(
    model: str, pretrained: bool, given: Mapping[str, Any], new: Mapping[str, Any], always: Mapping[str, Any]
) -> PretrainedConfig:
    """Return the configuration of a model, including the settings of the recipe and those derived from the data."""
    from transformers import CONFIG_MAPPING, AutoConfig

    base: dict[str, Any] = {}
    why = ""
    try:
        if not Path(model).expanduser().is_dir() and model in CONFIG_MAPPING and not pretrained:
            known = CONFIG_MAPPING[model]()
        elif _is_path(model) and not (Path(model).expanduser() / "config.json").is_file():
            raise UserError(f"model: {model} is no folder with a config.json")
        else:
            with nullcontext(why) if _is_path(model) else hub_or_cache() as why:
                known = AutoConfig.from_pretrained(str(Path(model).expanduser()) if _is_path(model) else model)
            base = _changed_settings(known)
    except _FAULTS as error:
        raise UserError(
            f"model: {model!r} is no local folder and no family of transformers, and the Hugging Face hub does not "
            f"give it ({why or one_line(error)}); give the path of a folder with its config.json and weights, or a "
            f"family and config{suggest(model, CONFIG_MAPPING)}"
        ) from error
    names = {*known.to_dict(), *known.attribute_map}
    for key in given:
        if key not in names:
            raise UserError(f"config: {known.model_type} has no setting {key!r}{suggest(str(key), sorted(names))}")
    renamed = {known.attribute_map.get(key, key): value for key, value in given.items()}
    for key, value in {**{key: value for key, value in new.items() if key in names}, **always}.items():
        renamed.setdefault(known.attribute_map.get(key, key), value)
    if "num_labels" in renamed:  # label names would contradict it
        base = {key: value for key, value in base.items() if key not in ("id2label", "label2id")}
    try:
        # constructed again instead of modified, because the constructor derives some settings from others
        return type(known)(**{**base, **renamed})
    except Exception as error:  # its checks raise errors of several libraries
        raise UserError(f"config: {known.model_type} refuses its settings: {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bar, and its report of mismatches, which the caller handles."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _changed_settings(config: PretrainedConfig) -> dict[str, Any]:
    kept = config.to_diff_dict()
    for key in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
        kept.pop(key, None)
    return kept


def _is_path(model: str) -> bool:
    return Path(model).expanduser().is_dir() or model.startswith(("/", "./", "../", "~"))


def _label(model: str, checkpoint: str | None) -> str:
    return f"model: {model}" if checkpoint is None else f"checkpoint: {checkpoint} for {model}"
