"""What a run's models take, kept in its folder: an export then needs none of the data, which are private."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.state.run_folder import INPUTS, TOKENIZER
from fdl.utils.files import write_atomically

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop


@dataclass(frozen=True)
class Inputs:
    """What the data told the models, without any sample.

    Attributes:
        task: which of `fdl.metrics.tasks.TASKS` the data are for.
        classes: names of the classes; empty where there are none.
        model_kwargs: what the constructors of models are given, by the argument's name.
    """

    task: str
    classes: list[str]
    model_kwargs: dict[str, Any]

    def example(self, rows: int = 2) -> Tensor | tuple[Tensor, Tensor]:
        """Inputs of blank samples: images ``[rows, C, H, W]``, tokens ``[rows, context]``, or both."""
        tokens = images = None
        if "context" in self.model_kwargs:
            tokens = torch.ones(rows, self.model_kwargs["context"], dtype=torch.int64)
        if "input_shape" in self.model_kwargs:
            images = torch.zeros(rows, *self.model_kwargs["input_shape"])
        if self.task == "image_text":
            return images, tokens
        return images if tokens is None else tokens


def keep(loop: FederatedLoop) -> None:
    """Write down what the run's models take; nothing where it cannot be written, as for data of one's own.

    Args:
        loop: freshly built; its folder is there.

    Raises:
        UserError: the disk refuses.
    """
    server, folder = loop.server, loop.folder
    model_kwargs = dict(server.model_kwargs)
    tokenizer = model_kwargs.pop("tokenizer", None)
    told = {"task": server.task, "classes": list(server.classes), "model_kwargs": model_kwargs, "tokenizer": None}
    if tokenizer is not None:
        told["tokenizer"] = tokenizer.label if _has_name(tokenizer.label) else TOKENIZER
    try:
        text = json.dumps(told, indent=1)
    except (TypeError, ValueError):  # a data module of one's own may tell its models anything
        return
    if told["tokenizer"] == TOKENIZER:
        tokenizer.save(folder / TOKENIZER)
    write_atomically(folder / INPUTS, f"{text}\n".encode())


def read(folder: Path) -> Inputs | None:
    """What `keep` wrote, None where it wrote nothing.

    Raises:
        UserError: the file, or the tokenizer beside it, is damaged.
    """
    path = folder / INPUTS
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        model_kwargs, name = dict(told["model_kwargs"]), told["tokenizer"]
        if "input_shape" in model_kwargs:
            model_kwargs["input_shape"] = tuple(model_kwargs["input_shape"])
        inputs = Inputs(told["task"], list(told["classes"]), model_kwargs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it to export with the data at hand") from error
    if name is not None:
        from fdl.modules.tokenizers import make_tokenizer

        model_kwargs["tokenizer"] = make_tokenizer(name if _has_name(name) else str(folder / TOKENIZER))
    return inputs


def _has_name(label: str) -> bool:
    """Whether a tokenizer comes with fdl's own libraries, so that its name suffices."""
    return label == "bytes" or label.startswith("open_clip:")
