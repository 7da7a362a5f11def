"""What stands in for data and public weights that a recipe names and this machine does not have."""

import json
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from fdl.recipe import Component, Recipe, load

# images of the same shape and number of classes
SHAPES = {
    "cifar10": (3, 32, 32, 10),
    "cifar100": (3, 32, 32, 100),
    "flowers102": (3, 32, 32, 102),
    "arrays": (3, 32, 32, 100),
}
FOLDERS = (4, 3, 40)  # institutions, classes, images of each

_TOWERS = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
    "text_cfg": {"layers": 1, "width": 8, "heads": 2},
}
_GPT = {"model": "gpt2", "config": {"n_layer": 1, "n_embd": 8, "n_head": 2}}
_BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MODELS = {
    "timm": ("timm", {"model": "test_vit"}),
    "torchvision": ("torchvision", {"model": "shufflenet_v2_x0_5"}),
    "open_clip": ("open_clip", {"config": _TOWERS}),
    "zero_shot_classifier": ("mlp", {"hidden": [4]}),
    "causal_lm": ("causal_lm", _GPT),
    "aligned_causal_lm": ("causal_lm", _GPT),
    "text_classifier": ("text_classifier", {"model": "bert", "config": _BERT}),
    "cifar_resnet": ("mlp", {"hidden": [4]}),
}
PUBLIC = {"pretrained", "weights", "checkpoint"}


def overrides(path: Path, folder: Path) -> list[str]:
    """What lets a recipe be built offline and on the CPU; files that it reads are written to `folder`."""
    recipe = load(path)
    found = ["fabric.accelerator=cpu", "fabric.precision=32-true", "fabric.threads=1", f"output_dir={folder}"]
    return [*found, *_models(recipe), *_data(recipe, folder)]


def _models(recipe: Recipe) -> list[str]:
    places = {f"specialists.{i}": component for i, component in enumerate(recipe.specialists)}
    places |= {"student": recipe.student, "teacher": recipe.teacher}
    if recipe.encoder is not None and "module" in recipe.encoder.args:
        places["encoder.args.module"] = Component(**recipe.encoder.args["module"])
    found, known = [], []
    for key, component in places.items():
        if component is not None and component.args.keys() & PUBLIC:
            target, args = MODELS[component.target]
            # pools are told apart by their models, and the student is the first pool's
            if recipe.method.target == "codistillation":
                known += [component.args] if component.args not in known else []
                args = {**args, "config": _wider(args["config"], known.index(component.args))}
            found += [f"{key}.target={target}", f"{key}.args={json.dumps(args)}"]
    return found


def _wider(config: dict, times: int) -> dict:
    """A configuration whose width is doubled so many times."""
    return {name: size * 2**times if name in ("n_embd", "hidden_size") else size for name, size in config.items()}


def _data(recipe: Recipe, folder: Path) -> list[str]:
    target, given = recipe.data.target, recipe.data.args
    if target == "image_folder":
        for institution, label, image in product(*map(range, FOLDERS)):
            place = folder / f"images/site_{institution}/class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (60 * institution, 80 * label, 6 * image)).save(place / f"{image}.png")
        return [f"data.args.path={folder / 'images'}", "data.args.size=32"]
    if target in ("text_classification", "text_table"):
        group, where = given.get("group") or "site", given.get("where") or {}
        sites = where.get(group) or [*(f"site {i}" for i in range(7)), "public"]
        lines = [
            {"text": f"{word} text {i}", "label": label, group: site}
            | ({"split": "test" if i % 5 == 0 else "train"} if target == "text_classification" else {})
            for i, (label, word) in product(range(80), enumerate(("bad", "good")))
            for site in (sites[-1] if i % 4 == 0 else sites[(i - i // 4) % (len(sites) - 1)],)
        ]
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found = [f"data.args.path={folder / 'texts.jsonl'}", "data.args.tokenizer=bytes", "data.args.context=16"]
        return found + (["data.args.validation=4"] if target == "text_classification" else [])
    if target == "python_docstrings":
        return ["data.args.limit_bytes=20000", "data.args.packages=[omegaconf, tensorboard, yaml, rich]"]
    if target not in SHAPES:
        return []
    *shape, classes = SHAPES[target]
    rng, n = np.random.default_rng(0), 40 * classes
    np.savez(
        folder / "images.npz",
        x_train=rng.integers(0, 256, (n, *shape), dtype=np.uint8),
        y_train=np.arange(n) % classes,
        x_test=rng.integers(0, 256, (classes, *shape), dtype=np.uint8),
        y_test=np.arange(classes),
    )
    arguments = {"path": folder / "images.npz", "layout": "CHW", "proxy": 2 * classes, "validation": classes}
    arguments |= {"augment": given["augment"]} if "augment" in given else {}
    arguments |= {"public": 4 * classes} if "public" in given else {}
    inner = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return [f"data={{target: arrays, args: {{{inner}}}}}"]
