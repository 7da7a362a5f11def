"""Student of a run with the description of its inputs, common to all export formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdl.runs.redaction import LOCAL, without_paths

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.recipe.config import Recipe
    from fdl.runs.inputs import InputSpec


@dataclass
class ExportedStudent:
    """Student of a run with the description of its inputs.

    Attributes:
        recipe: the recipe of the run.
        student: the student, with the weights of the round.
        inputs: the task, the classes, and the constructor arguments that depend on the data.
        round: the round.
    """

    recipe: Recipe
    student: LightningModule
    inputs: InputSpec
    round: int

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the model that depend on the data."""
        return self.inputs.model_kwargs

    def normalization(self) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation per channel by which images are normalised; 0 and 1 by default."""
        channels = self.model_kwargs["input_shape"][0]
        mean, std = self.model_kwargs.get("normalization") or ([0.0] * channels, [1.0] * channels)
        return list(map(float, mean)), list(map(float, std))

    def preprocessing(self) -> dict[str, Any]:
        """Describe the preprocessing of images for the network itself, after the adapter if the student has one."""
        adapter = getattr(self.student, "adapter", None)
        (mean, std), size = self.normalization(), self.model_kwargs["input_shape"]
        if adapter is not None:
            mean, std, size = adapter.mean, adapter.std, adapter.output_shape
        # images of data without the argument `size` all have one shape, so they are not cropped
        cut = self.recipe.data.args.get("size") is not None or size[1] == size[2]
        interpolation = "bilinear" if adapter is None else adapter.interpolation
        return {"input_size": size, "mean": mean, "std": std, "interpolation": interpolation, "cut": cut}

    def description(self) -> dict[str, Any]:
        """Describe the exported model's inputs and outputs, for the model card and inputs.json."""
        model_kwargs, described = self.model_kwargs, {"task": self.inputs.task}
        if "input_shape" in model_kwargs:
            mean, std = self.normalization()
            described["images"] = {
                "shape": ["batch", *model_kwargs["input_shape"]],
                "range": "0 (black) to 1 (white), then (x - mean) / std for each channel",
                "mean": mean,
                "std": std,
                "resize": "central square, then bilinear with antialiasing",
            }
        if "context" in model_kwargs:
            described["texts"] = {
                "shape": ["batch", model_kwargs["context"]],
                "ids": f"of the tokenizer ({_public_name(model_kwargs['tokenizer'])}), padded on the right with -1",
            }
        if self.inputs.classes and self.inputs.task == "classification":
            described["classes"] = self.inputs.classes
        return described


def _public_name(tokenizer: Any) -> str:
    """Return a tokenizer's public name, or its file in the export."""
    return without_paths(tokenizer.label).replace(LOCAL, "tokenizer.json beside this file")
