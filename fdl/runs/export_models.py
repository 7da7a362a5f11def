"""Export of a student in the format of its architecture's library: timm, transformers, open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.timm_model import Timm
from fdl.modules.tuning import merge_lora
from fdl.runs.exported_student import ExportedStudent
from fdl.runs.exported_text import save_for_classifier, save_for_generation
from fdl.utils.files import write_atomically

if TYPE_CHECKING:
    from lightning import LightningModule


def save_timm(student: LightningModule, subject: ExportedStudent, folder: Path) -> str:
    """Write a folder that timm loads.

    Args:
        student: the student.
        subject: the student's run and inputs.
        folder: the folder to write to.

    Returns:
        Lines of Python that load the model.

    Raises:
        UserError: the student is no model of timm.
    """
    from timm.models import save_for_hf

    if type(student) is not Timm:  # nor one with prompts, which timm does not support
        raise UserError(f"{type(student).__name__} is no model of timm; --format torch takes any student")
    network, preprocessing = merge_lora(student.backbone), subject.preprocessing()
    if not subject.recipe.student.args.get("pretrained"):
        # origin and licence of the architecture's published weights do not apply to weights trained from scratch
        network.pretrained_cfg = {key: network.pretrained_cfg[key] for key in _OWN if key in network.pretrained_cfg}
    data_config = {
        "input_size": tuple(preprocessing["input_size"]),
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
        "interpolation": preprocessing["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "center" if preprocessing["cut"] else "squash",
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
"""Keys of timm's configuration that describe the network itself, not published weights."""


def save_transformers(student: LightningModule, subject: ExportedStudent, folder: Path) -> str:
    """Write a folder that transformers loads.

    Args:
        student: the student.
        subject: the student's run and inputs.
        folder: the folder to write to.

    Returns:
        Lines of Python that load the model.

    Raises:
        UserError: the student is no model of transformers.
    """
    network = getattr(student, "network", None)
    if network is None or not hasattr(network, "save_pretrained"):
        raise UserError(f"{type(student).__name__} is no model of transformers; --format torch takes any student")
    network, model_kwargs, classes = merge_lora(network), subject.model_kwargs, subject.inputs.classes
    network.config._name_or_path = ""  # may be a local path
    if subject.inputs.task == "classification":
        network.config.id2label = dict(enumerate(classes))
        network.config.label2id = {name: i for i, name in enumerate(classes)}
        save_for_classifier(network, model_kwargs["tokenizer"], model_kwargs["context"], folder)
        kind = "AutoModelForSequenceClassification"
        use = [
            'batch = tokenizer(["a text", "a longer text"], padding=True, truncation=True, return_tensors="pt")',
            "names = [model.config.id2label[i] for i in model(**batch).logits.argmax(1).tolist()]",
        ]
    else:
        positions = getattr(network.config, "max_position_embeddings", None) or model_kwargs["context"]
        save_for_generation(model_kwargs["tokenizer"], positions, folder)
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


def save_open_clip(student: LightningModule, subject: ExportedStudent, folder: Path) -> str:
    """Write a folder that open_clip loads.

    Args:
        student: the student.
        subject: the student's run and inputs.
        folder: the folder to write to.

    Returns:
        Lines of Python that load the model.

    Raises:
        UserError: the student is no model of open_clip.
    """
    if not hasattr(student, "open_clip_state"):
        raise UserError(f"{type(student).__name__} is no model of open_clip; --format torch takes any student")
    preprocessing, tokenizer = subject.preprocessing(), subject.model_kwargs["tokenizer"]
    if preprocessing["input_size"][0] != 3:
        raise UserError("open_clip builds models for colour images only; --format torch takes any student")
    sizes = {**student.sizes, "quick_gelu": bool(student.sizes.get("quick_gelu"))}
    preprocess = {
        "size": list(preprocessing["input_size"][1:]),
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "interpolation": preprocessing["interpolation"],
        "resize_mode": "shortest" if preprocessing["cut"] else "squash",
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
