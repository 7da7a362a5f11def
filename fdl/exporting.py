"""A run's student as other libraries load it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fdl import checkpoint, run_folder, runs
from fdl.build import build
from fdl.checkpoint import write_atomically
from fdl.errors import UserError
from fdl.libraries import library
from fdl.model_card import model_card
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.timm_model import Timm
from fdl.modules.tuning import merge_lora
from fdl.modules.weights import load_into
from fdl.recipe import load
from fdl.snapshot import BEST

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.loop import FederatedLoop


def export(run: Path, format: str, output: Path | None = None, which: str = "best") -> Path:
    """Write a finished run's student for another library, with a model card.

    Args:
        run: the run's folder.
        format: a name among `FORMATS`.
        output: a new or empty folder; default ``export-<format>`` in the run's folder.
        which: ``"best"``: the round that was best on validation data, or the last where none was validated, as the
            run's report names it; ``"last"``: the last.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds no finished run, or no student of that round any more, its student cannot be had in
            this format, or files are in the way.
    """
    output = output or run / f"export-{format}"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output-dir, or delete it")
    runs.require_finished(run)
    runs.require_usable(output)
    summary = runs.read_summary(run)
    loop = build(load(run / runs.RECIPE), run, launch=False)
    student = loop.server.student
    if student is None:
        raise UserError(f"{run}: method {summary['method']} has no student")
    state = _saved(run, summary, which)
    load_into(student, state["student"])
    loop.server.state = state["server"]
    loop.method.restored(loop.server)
    student.to("cpu").eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place and then moved, so that nothing half-written is ever taken for a model
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        usage = FORMATS[format](student, loop, folder)
        write_atomically(folder / "README.md", model_card(loop.recipe, summary, state["round"], usage).encode())
        try:
            os.rename(folder, output)  # takes the place of an empty folder, and of no other
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    run_folder.note_export(run, output)
    return output


def _saved(run: Path, summary: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    """The ``round``, the ``student``, and what belongs to it of the ``server``'s state.

    Raises:
        UserError: the round that is asked for is not there any more, or damaged.
    """
    number = summary["best"]["round"] if which == "best" else summary["rounds"]
    if which == "best" and checkpoint.round_of(run / BEST) == number:
        return checkpoint.load_best(run / BEST)
    if (state := checkpoint.load_round(run / runs.CHECKPOINTS, number)) is not None:
        return state
    raise UserError(
        f"{run}: the student of round {number}, the run's {which}, is not there: neither {BEST} nor a whole checkpoint "
        "has it; run again, or export another round with --which"
    )


# --- formats: each writes a folder and returns the lines of Python that read it


def _timm(student: LightningModule, loop: FederatedLoop, folder: Path) -> str:
    from timm.models import save_for_hf

    if type(student) is not Timm:  # not one with prompts either, which timm knows nothing of
        raise UserError(f"{type(student).__name__} is no model of timm; --format torch takes any student")
    network = merge_lora(student.backbone)
    data_config = {"input_size": _images(student, loop)}
    mean, std = loop.server.provides.get("normalization", (None, None))
    if mean is not None and getattr(student, "adapter", None) is None:
        data_config |= {"mean": tuple(mean), "std": tuple(std)}
    labels = {"label_names": loop.server.classes}
    save_for_hf(network, str(folder), model_config=labels, safe_serialization=True, data_config=data_config)
    return 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'


def _transformers(student: LightningModule, loop: FederatedLoop, folder: Path) -> str:
    network = getattr(student, "network", None)
    if network is None or not hasattr(network, "save_pretrained"):
        raise UserError(f"{type(student).__name__} is no model of transformers; --format torch takes any student")
    network = merge_lora(network)
    if loop.server.task == "classification":
        network.config.id2label = dict(enumerate(loop.server.classes))
        network.config.label2id = {name: i for i, name in enumerate(loop.server.classes)}
    network.save_pretrained(folder, safe_serialization=True)
    loop.server.provides["tokenizer"].save(folder)
    kind = "AutoModelForSequenceClassification" if loop.server.task == "classification" else "AutoModelForCausalLM"
    return (
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )


def _open_clip(student: LightningModule, loop: FederatedLoop, folder: Path) -> str:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    if not hasattr(student, "open_clip_state"):
        raise UserError(f"{type(student).__name__} is no model of open_clip; --format torch takes any student")
    if _images(student, loop)[0] != 3:
        raise UserError("open_clip builds models for colour images only; --format torch takes any student")
    tokenizer, normalization = loop.server.provides["tokenizer"], loop.server.provides.get("normalization")
    if student.adapter is not None:
        normalization = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    mean, std = normalization or ([0.0] * 3, [1.0] * 3)
    sizes = {**student.sizes, "quick_gelu": bool(student.sizes.get("quick_gelu"))}
    pictures = {"mean": list(mean), "std": list(std)}
    write_atomically(folder / "open_clip_config.json", _json({"model_cfg": sizes, "preprocess_cfg": pictures}))
    save_file(student.open_clip_state(), folder / "open_clip_model.safetensors")
    tokenizer.save(folder)
    lines = ["import open_clip", "", 'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")']
    if isinstance(tokenizer, ClipTokenizer):
        lines.append('tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")')
    else:
        lines.append(f"# texts: ids of the tokenizer in this folder between {student.start} and {student.end}, then 0")
    return "\n".join(lines)


def _torch(student: LightningModule, loop: FederatedLoop, folder: Path) -> str:
    lines = ["import torch", ""]
    for name, (part, example) in _parts(student, loop).items():
        batch = torch.export.Dim("batch", min=1, max=65536)
        program = torch.export.export(part, (example,), dynamic_shapes=({0: batch},), strict=False)
        torch.export.save(program, folder / f"{name}.pt2")
        lines.append(f'{name} = torch.export.load("FOLDER/{name}.pt2").module()  # takes {_shape(example)}')
    return "\n".join(lines)


def _onnx(student: LightningModule, loop: FederatedLoop, folder: Path) -> str:
    library("onnx", "onnx", "--format onnx", has="ModelProto")
    library("onnxscript", "onnx", "--format onnx", has="script")
    lines = ["import onnxruntime", ""]
    for name, (part, example) in _parts(student, loop).items():
        batch = torch.export.Dim("batch", min=1, max=65536)
        torch.onnx.export(
            part,
            (example,),
            str(folder / f"{name}.onnx"),
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        lines.append(f'{name} = onnxruntime.InferenceSession("FOLDER/{name}.onnx")  # takes {_shape(example)}')
    return "\n".join(lines)


FORMATS: dict[str, Callable[[LightningModule, FederatedLoop, Path], str]] = {
    "timm": _timm,
    "transformers": _transformers,
    "open_clip": _open_clip,
    "torch": _torch,
    "onnx": _onnx,
}
"""What writes each format."""


class _Part(nn.Module):
    """One question to a module, as a network of one input and one output."""

    def __init__(self, module: nn.Module, ask: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.module, self._ask = module, ask

    def forward(self, inputs: Tensor) -> Tensor:
        return self._ask(self.module, inputs)


def _parts(student: LightningModule, loop: FederatedLoop) -> dict[str, tuple[nn.Module, Tensor]]:
    """What can be run of a student by itself, each with an example of its input; two rows, so that no size is one."""
    provides = loop.server.provides
    if "context" in provides:
        tokens = torch.ones(2, provides["context"], dtype=torch.int64)
    if loop.server.task == "image_text":
        return {
            "encode_image": (_Part(student, lambda m, x: m.encode_image(x)), torch.zeros(2, *provides["input_shape"])),
            "encode_text": (_Part(student, lambda m, x: m.encode_text(x)), tokens),
        }
    example = tokens if "context" in provides else torch.zeros(2, *provides["input_shape"])
    return {"model": (_Part(student, lambda m, x: m(x).logits), example)}


def _images(student: LightningModule, loop: FederatedLoop) -> tuple[int, ...]:
    """Shape of the images that the network itself takes."""
    adapter = getattr(student, "adapter", None)
    return tuple(loop.server.provides["input_shape"] if adapter is None else adapter.output_shape)


def _shape(example: Tensor) -> str:
    rest = "×".join(str(size) for size in example.shape[1:])
    return f"{str(example.dtype).removeprefix('torch.')} batch×{rest}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
