"""Description of a run's model inputs, stored in its folder, so that exports do not need the private data."""

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
class InputSpec:
    """Description of the inputs of a run's models, without any sample.

    Attributes:
        task: the task of the data, one of `fdl.metrics.tasks.TASKS`.
        classes: names of the classes; empty for tasks without classes.
        model_kwargs: constructor arguments of models that depend on the data, by name.
    """

    task: str
    classes: list[str]
    model_kwargs: dict[str, Any]

    def example(self, rows: int = 2) -> Tensor | tuple[Tensor, Tensor]:
        """Create inputs of blank samples: images ``[rows, C, H, W]``, tokens ``[rows, context]``, or both.

        Args:
            rows: number of samples.
        """
        tokens = images = None
        if "context" in self.model_kwargs:
            tokens = torch.ones(rows, self.model_kwargs["context"], dtype=torch.int64)
        if "input_shape" in self.model_kwargs:
            images = torch.zeros(rows, *self.model_kwargs["input_shape"])
        if self.task == "image_text":
            return images, tokens
        return images if tokens is None else tokens


def write_input_spec(loop: FederatedLoop) -> None:
    """Write the description of the inputs of a run's models, unless user-defined data have arguments no JSON can hold.

    Args:
        loop: the federation before its first round; its folder exists.

    Raises:
        UserError: the file cannot be written.
    """
    server, folder = loop.server, loop.folder
    model_kwargs = dict(server.model_kwargs)
    tokenizer = model_kwargs.pop("tokenizer", None)
    content = {"task": server.task, "classes": list(server.classes), "model_kwargs": model_kwargs, "tokenizer": None}
    if tokenizer is not None:
        content["tokenizer"] = tokenizer.label if _has_name(tokenizer.label) else TOKENIZER
    try:
        text = json.dumps(content, indent=1)
    except (TypeError, ValueError):  # a user-defined data module may pass any object to its models
        return
    if content["tokenizer"] == TOKENIZER:
        tokenizer.save(folder / TOKENIZER)
    write_atomically(folder / INPUTS, f"{text}\n".encode())


def read_input_spec(folder: Path) -> InputSpec | None:
    """Read the file that `write_input_spec` wrote.

    Args:
        folder: the run's folder.

    Returns:
        The description; None if the file does not exist.

    Raises:
        UserError: the file or the tokenizer is damaged.
    """
    path = folder / INPUTS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model_kwargs, name = dict(content["model_kwargs"]), content["tokenizer"]
        if "input_shape" in model_kwargs:
            model_kwargs["input_shape"] = tuple(model_kwargs["input_shape"])
        inputs = InputSpec(content["task"], list(content["classes"]), model_kwargs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it to export with the data at hand") from error
    if name is not None:
        from fdl.modules.tokenizers import make_tokenizer

        model_kwargs["tokenizer"] = make_tokenizer(name if _has_name(name) else str(folder / TOKENIZER))
    return inputs


def _has_name(label: str) -> bool:
    """Return True for a tokenizer that fdl's libraries provide by name."""
    return label == "bytes" or label.startswith("open_clip:")
