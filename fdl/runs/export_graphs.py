"""Export of a student as graphs that run without its code: torch.export and ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fdl.runs.exported_student import ExportedStudent
from fdl.utils.files import write_atomically
from fdl.utils.libraries import library

if TYPE_CHECKING:
    from lightning import LightningModule


def save_torch(student: LightningModule, subject: ExportedStudent, folder: Path) -> str:
    """Write ``<part>.pt2`` for every part of a student.

    Args:
        student: the student.
        subject: the student's run and inputs.
        folder: the folder to write to.

    Returns:
        Lines of Python that load the parts.
    """
    lines = ["import torch", ""]
    for name, (part, example) in _parts(student, subject).items():
        batch = torch.export.Dim("batch", min=1, max=65536)
        program = torch.export.export(part, (example,), dynamic_shapes=({0: batch},), strict=False)
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if hasattr(graph, "graph") else ():
                node.meta.pop("stack_trace", None)  # it contains local paths of the exporting machine
        with warnings.catch_warnings():
            # torch warns if all tensors that share memory are views
            warnings.filterwarnings("ignore", message="No complete tensor found")
            torch.export.save(program, folder / f"{name}.pt2")
        lines.append(f'{name} = torch.export.load("FOLDER/{name}.pt2").module()  # takes {_shape(example)}')
    return "\n".join([*lines, *_describe(subject, folder)])


def save_onnx(student: LightningModule, subject: ExportedStudent, folder: Path) -> str:
    """Write ``<part>.onnx`` for every part of a student.

    Args:
        student: the student.
        subject: the student's run and inputs.
        folder: the folder to write to.

    Returns:
        Lines of Python that load the parts.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    onnx = library("onnx", "onnx", "--format onnx", has="ModelProto")
    library("onnxscript", "onnx", "--format onnx", has="script")
    lines = ["import onnxruntime", ""]
    for name, (part, example) in _parts(student, subject).items():
        batch, path = torch.export.Dim("batch", min=1, max=65536), str(folder / f"{name}.onnx")
        torch.onnx.export(
            part,
            (example,),
            path,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        model = onnx.load(path)
        for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
            del node.metadata_props[:]  # they contain local paths of the exporting machine
        metadata = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in subject.description().items()
        }
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, path)
        lines.append(f'{name} = onnxruntime.InferenceSession("FOLDER/{name}.onnx")  # takes {_shape(example)}')
    lines.append("# the same as in inputs.json: session.get_modelmeta().custom_metadata_map")
    return "\n".join([*lines, *_describe(subject, folder)])


def _describe(subject: ExportedStudent, folder: Path) -> list[str]:
    """Write the description of a graph's inputs and outputs, and the tokenizer; return lines for the model card."""
    write_atomically(folder / "inputs.json", (json.dumps(subject.description(), indent=2) + "\n").encode())
    if "tokenizer" in subject.model_kwargs:
        subject.model_kwargs["tokenizer"].save(folder)
    return ["# what it takes (mean, std), and the names of the classes: inputs.json"]


class _Part(nn.Module):
    """One function of a module as a network with one input and one output."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.module, self._function = module, function
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self._function(self.module, inputs)


def _parts(student: LightningModule, subject: ExportedStudent) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the parts of a student to export, each with example inputs of two rows, since size 1 is specialised."""
    example = subject.inputs.example()
    if isinstance(example, tuple):
        images, tokens = example
        return {
            "encode_image": (_Part(student, lambda m, x: m.encode_image(x)), images),
            "encode_text": (_Part(student, lambda m, x: m.encode_text(x)), tokens),
        }
    return {"model": (_Part(student, lambda m, x: m(x).logits), example)}


def _shape(example: Tensor) -> str:
    rest = "×".join(str(size) for size in example.shape[1:])
    return f"{str(example.dtype).removeprefix('torch.')} batch×{rest}"
