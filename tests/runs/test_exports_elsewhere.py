"""Exported students, through their libraries' own pipelines, reach the figures of the run on its own test set."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as pictures

from fdl import recipe
from fdl.build import build
from fdl.federation.snapshot import BEST
from fdl.runs import run as runs
from fdl.runs.export import export
from fdl.runs.redaction import LOCAL, without_paths
from fdl.state import checkpoint
from fdl.state.weights import load_into

WORDS = {"good": "fine lovely great", "bad": "awful poor terrible"}


def student_of(folder):
    loop = build(recipe.load(folder / runs.RECIPE), folder, launch=False)
    load_into(loop.server.student, checkpoint.load_best(folder / BEST)["student"])
    return loop.server.student.eval(), loop


def accuracy_of(summary):
    return summary["best"]["metrics"]["student/test/accuracy"]


def tree(data, student, steps=12, **more):
    return {
        "name": "elsewhere",
        "method": "fedavg",
        "data": data,
        "federation": {"clients": 2, "rounds": 2},
        "student": student,
        "local_training": {"steps": steps, "optimizer": {"target": "adam", "args": {"lr": 0.01}}},
        "callbacks": [],
        "fabric": {"accelerator": "cpu"},
        **more,
    }


def blobs(folder, size=20, classes=3, count=30):
    """Pictures of a bright square in a place of its own for each class, wider than high, with noise."""
    stream = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for i in range(count):
            pixels = stream.integers(0, 90, (size, size + 8, 3))
            pixels[4:12, 4 + 6 * label : 12 + 6 * label] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class {label}" / f"{i:02d}.png")


@pytest.mark.parametrize("weights", ["new", "normalised"])
def test_timms_own_transform_gives_the_runs_accuracy(tmp_path, weights):
    import timm

    blobs(tmp_path / "private pictures")
    data = {"path": str(tmp_path / "private pictures"), "size": 16, "validation": 12, "test": 30}
    if weights == "normalised":
        data |= {"normalize": True, "mean": [0.2, 0.3, 0.25], "std": [0.2, 0.1, 0.3]}
    student = {"target": "timm", "args": {"model": "test_vit", "kwargs": {"img_size": 16, "patch_size": 4}}}
    tree_ = tree({"target": "image_folder", "args": data}, student)
    summary = runs.run_recipe(recipe.from_mapping(tree_), tmp_path / "run")
    _, loop = student_of(tmp_path / "run")
    files, labels = loop.server.test.paths, loop.server.test.labels
    folder = export(tmp_path / "run", "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        found = model(x).argmax(1)
    assert float((found == labels).float().mean()) == pytest.approx(accuracy_of(summary), abs=1e-6)
    # to within what two ways of resizing and cutting differ by
    expected, _ = loop.server.test.batch(torch.arange(len(files)))
    assert float((x - expected).abs().mean()) < 0.05 * float(expected.std())
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bilinear")
    assert not config.keys() & {"tag", "url", "origin_url", "license", "paper_ids", "paper_name", "hf_hub_id"}


def texts(path):
    stream = np.random.default_rng(0)
    with open(path, "w") as file:
        for i in range(60):
            label = ("good", "bad")[i % 2]
            length = int(stream.integers(1, 14))
            words = " ".join(stream.choice(WORDS[label].split(), length))
            file.write(json.dumps({"text": words, "label": label}) + "\n")


SIZES = {
    "gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 16},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}


@pytest.mark.parametrize("family", list(SIZES))
def test_a_padded_and_cut_batch_gives_the_runs_answers(tmp_path, family):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    texts(tmp_path / "private texts.jsonl")
    data = {"path": str(tmp_path / "private texts.jsonl"), "context": 40, "test": 16, "validation": 10}
    student = {"target": "text_classifier", "args": {"model": family, "config": SIZES[family]}}
    settings = tree({"target": "text_classification", "args": data}, student, steps=10)
    summary = runs.run_recipe(recipe.from_mapping(settings), tmp_path / "run")
    folder = export(tmp_path / "run", "transformers")
    own, loop = student_of(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "private texts.jsonl").read_text().splitlines()]
    ids = [loop.server.test.batch(torch.tensor([i]))[0][0] for i in range(len(loop.server.test))]
    held = [loop.server.model_kwargs["tokenizer"].decode(row[row >= 0].tolist()) for row in ids]
    whole = {row["text"][:38]: row["text"] for row in rows}
    asked = [whole[text] for text in held]  # of unequal lengths, some beyond the context
    assert max(map(len, asked)) > 40 > min(map(len, asked))

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token != tokenizer.eos_token and tokenizer.model_max_length == 40
    batch = tokenizer(asked, padding=True, truncation=True, return_tensors="pt")
    inputs, labels = loop.server.test.batch(torch.arange(len(asked)))
    with torch.no_grad():
        logits, expected = model(**batch).logits, own(inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(accuracy_of(summary), abs=1e-6)
    classify = pipeline("text-classification", model=str(folder), truncation=True, padding=True, device="cpu")
    names = [answer["label"] for answer in classify(asked, batch_size=8)]
    assert names == [loop.server.classes[i] for i in expected.argmax(1).tolist()]


def test_a_language_model_reads_and_goes_on_as_it_was_trained(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts(tmp_path / "texts.jsonl")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    data = {"path": str(tmp_path / "texts.jsonl"), "context": 32, "test": 8, "validation": 4}
    student = {"target": "causal_lm", "args": {"model": "llama", "config": sizes}}
    settings = tree({"target": "text_table", "args": data}, student)
    runs.run_recipe(recipe.from_mapping(settings), tmp_path / "run")
    folder = export(tmp_path / "run", "transformers")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    own, loop = student_of(tmp_path / "run")
    ours = loop.server.model_kwargs["tokenizer"]
    prompts = ["good lov", "a"]
    assert tokenizer(prompts)["input_ids"] == [ours.encode(text) for text in prompts]
    ids = torch.tensor([ours.encode("lovely great")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, own.token_nll(ids).sum() / (ids.shape[1] - 1))
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        written = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        padded = torch.tensor([ours.encode(prompts[0]), ours.encode("a") + [-1] * 7])
        expected = own.generate(padded, 6)
    for row, answer in zip(written, expected):
        kept = answer[answer >= 0]
        assert torch.equal(row[: len(kept)], kept)


def test_open_clips_preprocessing_is_that_of_the_run(tmp_path):
    import open_clip

    towers = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 8, "head_width": 4, "patch_size": 4},
        "text_cfg": {"layers": 1, "width": 8, "heads": 2},
    }
    data = {"target": "captioned_digits", "args": {"channels": 3, "normalize": True}}
    settings = tree(data, {"target": "open_clip", "args": {"config": towers}}, steps=2)
    runs.run_recipe(recipe.from_mapping(settings), tmp_path / "run")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{export(tmp_path / 'run', 'open_clip')}")
    own, loop = student_of(tmp_path / "run")
    (images, _), _ = loop.server.test.batch(torch.arange(4))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in loop.server.model_kwargs["normalization"])
    raw = [pictures.to_pil_image((image * std + mean).clamp(0, 1)) for image in images]
    with torch.no_grad():
        found = model.eval().encode_image(torch.stack([preprocess(picture) for picture in raw]), normalize=True)
        # digits have 17 greys, of which a picture's 256 are not exact
        torch.testing.assert_close(found, own.encode_image(images), rtol=0, atol=2e-2)


@pytest.fixture
def private(tmp_path):
    """A finished run of arrays that are gone since."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), tmp_path / "st_mary_hospital"
    folder.mkdir()
    x, y = (digits.images * 15).astype(np.uint8), digits.target
    names = np.array([f"digit {i}" for i in range(10)])
    np.savez(
        folder / "cohort_2024.npz",
        x_train=x[:500],
        y_train=y[:500],
        x_test=x[500:600],
        y_test=y[500:600],
        classes=names,
    )
    data = {"path": str(folder / "cohort_2024.npz"), "proxy": 50, "validation": 50, "normalize": True}
    student = {"target": "mlp", "args": {"hidden": [16]}}
    summary = runs.run_recipe(
        recipe.from_mapping(tree({"target": "arrays", "args": data}, student, 30)), tmp_path / "run"
    )
    shutil.rmtree(folder)
    return tmp_path / "run", summary, x[500:600], y[500:600]


def contents(folder):
    """Every byte of an export, archives unpacked."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.name, path.read_bytes()
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((name, archive.read(name)) for name in archive.namelist())


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_an_export_needs_no_data_and_says_what_it_takes_but_not_whose_it_was(private, format):
    if format == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    run, summary, x, y = private
    folder = export(run, format)
    told = json.loads((folder / "inputs.json").read_text())
    assert told["classes"] == [f"digit {i}" for i in range(10)]
    shown = (x[:, None] / np.float32(255) - np.float32(told["images"]["mean"])) / np.float32(told["images"]["std"])
    if format == "onnx":
        session = runtime.InferenceSession(folder / "model.onnx")
        kept = session.get_modelmeta().custom_metadata_map
        assert json.loads(kept["classes"]) == told["classes"] and json.loads(kept["images"]) == told["images"]
        logits = session.run(None, {"inputs": shown.astype(np.float32)})[0]
    else:
        logits = torch.export.load(folder / "model.pt2").module()(torch.from_numpy(shown).float()).detach().numpy()
    assert float((logits.argmax(1) == y).mean()) == pytest.approx(accuracy_of(summary), abs=1e-6)
    for name, data in contents(folder):
        for secret in (str(run.parent), "st_mary_hospital", "cohort_2024", str(runs.__file__).rpartition("/")[0]):
            assert secret.encode() not in data, (name, secret)
    card = (folder / "README.md").read_text()
    assert LOCAL in card and "digit 3" in card and "normalised: mean" in card


def test_a_card_has_one_rounds_figures(private):
    run, summary, *_ = private
    for which, number in (("best", summary["best"]["round"]), ("last", summary["rounds"])):
        folder = export(run, "torch", run / which, which=which)
        record = summary["history"][number - 1]
        card = (folder / "README.md").read_text()
        table = dict(line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| `"))
        assert table == {
            f"`{k}`": f"{v:.4f}" for k, v in record["metrics"].items() if k.startswith(("student/", "spec"))
        }
        own = [metrics["test/accuracy"] for metrics in record["clients"].values() if "test/accuracy" in metrics]
        told = f"test/accuracy {sum(own) / len(own):.4f} on average" if own else "on average"
        assert (told in card) == bool(own)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"path": "data/x.npz"}, {"path": LOCAL}),
        ({"model": "org/model", "tokenizer": "bytes"}, {"model": "org/model", "tokenizer": "bytes"}),
        ({"model": "/srv/hospital/model"}, {"model": LOCAL}),
        (
            {"path": "hub:org/set", "tokenizer": "open_clip:ViT-B-32"},
            {"path": "hub:org/set", "tokenizer": "open_clip:ViT-B-32"},
        ),
        ({"model": "local-dir:weights"}, {"model": LOCAL}),
        ({"splits": {"train": "a.csv"}, "sizes": [8, "~/x"]}, {"splits": {"train": LOCAL}, "sizes": [8, LOCAL]}),
        ({"tokenizer": "C:\\users\\x"}, {"tokenizer": LOCAL}),
    ],
)
def test_paths_are_taken_out_and_names_stay(args, expected):
    assert without_paths(args) == expected
