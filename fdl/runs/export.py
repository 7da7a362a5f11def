"""A run's student as other libraries load it."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.timm_model import Timm
from fdl.modules.tuning import merge_lora
from fdl.runs import run as runs
from fdl.runs.exported_text import save_for_classifier, save_for_generation
from fdl.runs.model_card import model_card
from fdl.runs.student import Subject, trained_student
from fdl.state import run_folder
from fdl.utils.files import write_atomically
from fdl.utils.libraries import library
from fdl.utils.paths import expanded
from fdl.utils.suggest import suggest

if TYPE_CHECKING:
    from lightning import LightningModule


def export(run: str | Path, format: str, output: str | Path | None = None, which: str = "best") -> Path:
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
    if format not in FORMATS:
        raise UserError(f"format: {format!r} is none of {', '.join(FORMATS)}{suggest(format, FORMATS)}")
    run = expanded(run)
    output = run / f"export-{format}" if output is None else expanded(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output-dir, or delete it")
    runs.require_finished(run)
    runs.require_usable(output)
    summary = runs.read_summary(run)
    subject = trained_student(run, summary, which)
    student = subject.student
    student.to("cpu").eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place and then moved, so that nothing half-written is ever taken for a model
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        usage = FORMATS[format](student, subject, folder)
        card = model_card(subject.recipe, summary, subject.round, usage, subject.told())
        write_atomically(folder / "README.md", card.encode())
        try:
            os.rename(folder, output)  # takes the place of an empty folder, and of no other
        except OSError as error:
            raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    run_folder.note_export(run, output)
    return output


# --- formats: each writes a folder and returns the lines of Python that read it


def _timm(student: LightningModule, subject: Subject, folder: Path) -> str:
    from timm.models import save_for_hf

    if type(student) is not Timm:  # not one with prompts either, which timm knows nothing of
        raise UserError(f"{type(student).__name__} is no model of timm; --format torch takes any student")
    network, pictures = merge_lora(student.backbone), subject.pictures()
    if not subject.recipe.student.args.get("pretrained"):
        # who made the architecture's published weights, and under which licence, says nothing of these
        network.pretrained_cfg = {key: network.pretrained_cfg[key] for key in _OWN if key in network.pretrained_cfg}
    data_config = {
        "input_size": tuple(pictures["input_size"]),
        "mean": tuple(pictures["mean"]),
        "std": tuple(pictures["std"]),
        "interpolation": pictures["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "center" if pictures["cut"] else "squash",
    }
    labels = {"label_names": subject.inputs.classes}
    save_for_hf(network, str(folder), model_config=labels, safe_serialization=True, data_config=data_config)
    mode = "L" if data_config["input_size"][0] == 1 else "RGB"
    return "\n".join(
        [
            "import timm",
            "import torch",
            "from PIL import Image",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            "with torch.no_grad():",
            f'    logits = model(transform(Image.open(FILE).convert("{mode}"))[None])',
            'name = model.pretrained_cfg["label_names"][int(logits.argmax())]',
        ]
    )


_OWN = ("architecture", "num_classes", "input_size", "pool_size", "fixed_input_size", "first_conv", "classifier")
"""What timm says of a network itself, and not of published weights."""


def _transformers(student: LightningModule, subject: Subject, folder: Path) -> str:
    network = getattr(student, "network", None)
    if network is None or not hasattr(network, "save_pretrained"):
        raise UserError(f"{type(student).__name__} is no model of transformers; --format torch takes any student")
    network, provides, classes = merge_lora(network), subject.provides, subject.inputs.classes
    network.config._name_or_path = ""  # a local folder, where the weights came from one
    if subject.inputs.task == "classification":
        network.config.id2label = dict(enumerate(classes))
        network.config.label2id = {name: i for i, name in enumerate(classes)}
        save_for_classifier(network, provides["tokenizer"], provides["context"], folder)
        kind = "AutoModelForSequenceClassification"
        use = [
            'batch = tokenizer(["a text", "a longer text"], padding=True, truncation=True, return_tensors="pt")',
            "names = [model.config.id2label[i] for i in model(**batch).logits.argmax(1).tolist()]",
        ]
    else:
        positions = getattr(network.config, "max_position_embeddings", None) or provides["context"]
        save_for_generation(provides["tokenizer"], positions, folder)
        kind = "AutoModelForCausalLM"
        use = [
            'batch = tokenizer(["A text", "A longer text"], padding=True, return_tensors="pt")',
            "texts = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20), skip_special_tokens=True)",
        ]
    network.save_pretrained(folder, safe_serialization=True)
    return "\n".join(
        [
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f'model = {kind}.from_pretrained("FOLDER").eval()',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            *use,
        ]
    )


def _open_clip(student: LightningModule, subject: Subject, folder: Path) -> str:
    if not hasattr(student, "open_clip_state"):
        raise UserError(f"{type(student).__name__} is no model of open_clip; --format torch takes any student")
    pictures, tokenizer = subject.pictures(), subject.provides["tokenizer"]
    if pictures["input_size"][0] != 3:
        raise UserError("open_clip builds models for colour images only; --format torch takes any student")
    sizes = {**student.sizes, "quick_gelu": bool(student.sizes.get("quick_gelu"))}
    preprocess = {
        "size": list(pictures["input_size"][1:]),
        "mean": pictures["mean"],
        "std": pictures["std"],
        "interpolation": pictures["interpolation"],
        "resize_mode": "shortest" if pictures["cut"] else "squash",
    }
    write_atomically(folder / "open_clip_config.json", _json({"model_cfg": sizes, "preprocess_cfg": preprocess}))
    save_file(student.open_clip_state(), folder / "open_clip_model.safetensors")
    tokenizer.save(folder)
    lines = ["import open_clip", "", 'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")']
    if isinstance(tokenizer, ClipTokenizer):
        lines.append('tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")')
    else:
        lines.append(f"# texts: ids of the tokenizer in this folder between {student.start} and {student.end}, then 0")
    return "\n".join(lines)


def _torch(student: LightningModule, subject: Subject, folder: Path) -> str:
    lines = ["import torch", ""]
    for name, (part, example) in _parts(student, subject).items():
        batch = torch.export.Dim("batch", min=1, max=65536)
        program = torch.export.export(part, (example,), dynamic_shapes=({0: batch},), strict=False)
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if hasattr(graph, "graph") else ():
                node.meta.pop("stack_trace", None)  # it names the files of whoever exports
        with warnings.catch_warnings():
            # torch looks for whole tensors among those that share memory, and finds that views are all there is
            warnings.filterwarnings("ignore", message="No complete tensor found")
            torch.export.save(program, folder / f"{name}.pt2")
        lines.append(f'{name} = torch.export.load("FOLDER/{name}.pt2").module()  # takes {_shape(example)}')
    return "\n".join([*lines, *_describe(subject, folder)])


def _onnx(student: LightningModule, subject: Subject, folder: Path) -> str:
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
            del node.metadata_props[:]  # it names the files of whoever exports
        told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in subject.told().items()}
        onnx.helper.set_model_props(model, told)
        onnx.save(model, path)
        lines.append(f'{name} = onnxruntime.InferenceSession("FOLDER/{name}.onnx")  # takes {_shape(example)}')
    lines.append("# the same as in inputs.json: session.get_modelmeta().custom_metadata_map")
    return "\n".join([*lines, *_describe(subject, folder)])


def _describe(subject: Subject, folder: Path) -> list[str]:
    """Write what a graph takes and answers beside it; the lines that read it."""
    write_atomically(folder / "inputs.json", _json(subject.told()))
    if "tokenizer" in subject.provides:
        subject.provides["tokenizer"].save(folder)
    return ["# what it takes (mean, std), and the names of the classes: inputs.json"]


FORMATS: dict[str, Callable[[LightningModule, Subject, Path], str]] = {
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
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self._ask(self.module, inputs)


def _parts(student: LightningModule, subject: Subject) -> dict[str, tuple[nn.Module, Tensor]]:
    """What can be run of a student by itself, each with an example of its input; two rows, so that no size is one."""
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
