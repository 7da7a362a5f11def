"""A run's student as other libraries load it."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fdl.build.federation import build
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.federation.snapshot import BEST
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.foreign import conforming
from fdl.modules.timm_model import Timm
from fdl.modules.tuning import merge_lora
from fdl.participants import Server
from fdl.recipe.loading import load
from fdl.registry.instantiate import instantiate
from fdl.runs import run as runs
from fdl.runs.exported_text import save_for_classifier, save_for_generation
from fdl.runs.inputs import Inputs, read
from fdl.runs.model_card import model_card
from fdl.runs.redaction import LOCAL, without_paths
from fdl.state import checkpoint, run_folder
from fdl.state.weights import load_into
from fdl.utils.files import write_atomically
from fdl.utils.libraries import library
from fdl.utils.seeding import stream_seed

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.methods.base import Method
    from fdl.recipe.config import Recipe


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
    subject = _subject(run, summary, which)
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


@dataclass
class Subject:
    """A run's student and what it takes.

    Attributes:
        recipe: of the run.
        student: filled with the weights of the round.
        inputs: what it was told of the data.
        round: the round.
    """

    recipe: Recipe
    student: LightningModule
    inputs: Inputs
    round: int

    @property
    def provides(self) -> dict[str, Any]:
        """What the data told the model."""
        return self.inputs.provides

    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel that the exported images come with; 0 and 1 without any."""
        channels = self.provides["input_shape"][0]
        mean, std = self.provides.get("normalization") or ([0.0] * channels, [1.0] * channels)
        return list(map(float, mean)), list(map(float, std))

    def pictures(self) -> dict[str, Any]:
        """How a picture becomes what the network itself takes, behind the adapter where there is one."""
        adapter = getattr(self.student, "adapter", None)
        (mean, std), size = self.normalization(), self.provides["input_shape"]
        if adapter is not None:
            mean, std, size = adapter.mean, adapter.std, adapter.output_shape
        # data without a size of their own are all of one shape: nothing is cut off
        cut = self.recipe.data.args.get("size") is not None or size[1] == size[2]
        interpolation = "bilinear" if adapter is None else adapter.interpolation
        return {"input_size": size, "mean": mean, "std": std, "interpolation": interpolation, "cut": cut}

    def told(self) -> dict[str, Any]:
        """What the exported model takes and answers, for people and programs."""
        provides, told = self.provides, {"task": self.inputs.task}
        if "input_shape" in provides:
            mean, std = self.normalization()
            told["images"] = {
                "shape": ["batch", *provides["input_shape"]],
                "range": "0 (black) to 1 (white), then (x - mean) / std for each channel",
                "mean": mean,
                "std": std,
                "resize": "central square, then bilinear with antialiasing",
            }
        if "context" in provides:
            told["texts"] = {
                "shape": ["batch", provides["context"]],
                "ids": f"of the tokenizer ({_public(provides['tokenizer'])}), padded on the right with -1",
            }
        if self.inputs.classes and self.inputs.task == "classification":
            told["classes"] = self.inputs.classes
        return told


def _subject(run: Path, summary: Mapping[str, Any], which: str) -> Subject:
    """Build a run's student, without the data where the run kept what is needed of them.

    Raises:
        UserError: the run's method has no student, or it cannot be built.
    """
    recipe, inputs = load(run / runs.RECIPE), read(run)
    if inputs is None:  # of an earlier version, or of data that tell models more than can be written down
        loop = build(recipe, run, launch=False)
        server, method = loop.server, loop.method
        inputs = Inputs(server.task, list(server.classes), dict(server.provides))
    else:
        method = instantiate(recipe.method, "method", "method")
        server = _server(recipe, method, inputs)
    if server.student is None:
        raise UserError(f"{run}: method {recipe.method.target} has no student")
    state = _saved(run, summary, which)
    load_into(server.student, state["student"])
    server.state = state["server"]
    method.restored(server)
    return Subject(recipe, server.student, inputs, state["round"])


def _server(recipe: Recipe, method: Method, inputs: Inputs) -> Server:
    """A server with a student and no data."""
    runtime = Runtime(accelerator="cpu", precision=recipe.fabric.precision, launch=False)
    student = None
    if "student" in method.requires:
        runtime.factories["student"] = lambda: conforming(
            instantiate(recipe.student, "module", "student", **inputs.provides), "student", inputs.example
        )
        student = runtime.create("student", stream_seed(recipe.seed, "init"))
    return Server(
        runtime=runtime,
        seed=recipe.seed,
        local_training=recipe.local_training,
        server_distil=recipe.server_distil,
        client_distil=recipe.client_distil or recipe.server_distil,
        proxy=None,
        validation=None,
        test=None,
        student=student,
        classes=inputs.classes,
        num_classes=len(inputs.classes),
        task=inputs.task,
        provides=inputs.provides,
    )


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


def _public(tokenizer: Any) -> str:
    """What a tokenizer may be called elsewhere: its own name, or its place in the export."""
    return without_paths(tokenizer.label).replace(LOCAL, "tokenizer.json beside this file")


def _shape(example: Tensor) -> str:
    rest = "×".join(str(size) for size in example.shape[1:])
    return f"{str(example.dtype).removeprefix('torch.')} batch×{rest}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
