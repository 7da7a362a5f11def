"""Students are read back by the library alone, and answer as they did in the run."""

import json

import pytest
import torch

from fdl import recipe
from fdl.__main__ import main
from fdl.build import build
from fdl.cli.main import FORMATS
from fdl.errors import UserError
from fdl.federation.snapshot import BEST
from fdl.runs import run as runs
from fdl.runs.export import WRITERS, export
from fdl.runs.model_card import model_card
from fdl.state import checkpoint
from fdl.state.weights import load_into

DIGITS = {
    "name": "exported",
    "method": "fedavg",
    "data": {"target": "digits", "args": {"normalize": True}},
    "federation": {"clients": 2, "rounds": 2},
    "student": {"target": "timm", "args": {"model": "test_resnet"}},
    "callbacks": [],
}


def finished(tree, folder):
    runs.run_recipe(recipe.from_mapping(tree), folder)
    return folder


def student_of(folder):
    """The student of the best round, and the federation around it."""
    loop = build(recipe.load(folder / runs.RECIPE), folder)
    load_into(loop.server.student, checkpoint.load_best(folder / BEST)["student"])
    return loop.server.student.eval(), loop


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return finished(DIGITS, tmp_path_factory.mktemp("images") / "run")


def test_the_command_line_knows_all_formats():
    assert tuple(WRITERS) == FORMATS


def test_timm_reads_its_own_model_back(images, tmp_path):
    import timm

    folder = export(images, "timm", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    student, loop = student_of(images)
    x, _ = loop.server.test.batch(torch.arange(8))
    assert torch.equal(model(x), student(x).logits)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, 8, 8)
    assert config["mean"] == pytest.approx(loop.server.test.mean)
    assert json.loads((folder / "config.json").read_text())["label_names"] == [str(i) for i in range(10)]


def test_torch_reads_a_program_without_fdl(images, tmp_path):
    folder = export(images, "torch", tmp_path / "torch")
    model = torch.export.load(folder / "model.pt2").module()
    student, loop = student_of(images)
    for size in (1, 5):
        x, _ = loop.server.test.batch(torch.arange(size))
        assert torch.allclose(model(x), student(x).logits, atol=1e-5)


def test_onnx_runs_elsewhere(images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = export(images, "onnx", tmp_path / "onnx")
    session = runtime.InferenceSession(folder / "model.onnx")
    student, loop = student_of(images)
    x, _ = loop.server.test.batch(torch.arange(5))
    (logits,) = session.run(None, {"inputs": x.numpy()})
    assert torch.allclose(torch.from_numpy(logits), student(x).logits, atol=1e-4)


def test_the_card_says_what_a_reader_must_know(images, tmp_path):
    card = (export(images, "timm", tmp_path / "timm") / "README.md").read_text()
    summary = runs.read_summary(images)
    best = summary["best"]
    assert f"round {best['round']} of 2, seed 0" in card
    assert f"{best['metrics']['student/test/accuracy']:.4f}" in card
    assert "ε = ∞" in card
    samples = sum(participant["samples"] for participant in summary["participants"])
    assert f"2 clients with {samples} private training samples" in card
    assert "target: fedavg" in card
    assert 'timm.create_model("local-dir:FOLDER"' in card


def test_the_last_round_can_be_asked_for(images, tmp_path):
    export(images, "torch", tmp_path / "last", which="last")
    assert "round 2 of 2" in (tmp_path / "last" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "message"),
    [("transformers", "is no model of transformers"), ("open_clip", "is no model of open_clip")],
)
def test_a_format_of_another_family_is_refused_and_leaves_nothing(images, tmp_path, format, message):
    with pytest.raises(UserError, match=message):
        export(images, format, tmp_path / "no")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(images, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="is there already"):
        export(images, "torch", tmp_path)


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["export", "--run", str(tmp_path), "--format", "torch"]) == 2
    assert "holds no finished run" in capsys.readouterr().err


TOWERS = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 8, "head_width": 4, "patch_size": 4},
    "text_cfg": {"layers": 1, "width": 8, "heads": 2},
}


def language(**student):
    return {
        "name": "exported-text",
        "method": "fedavg",
        "data": {"target": "python_docstrings", "args": {"packages": ["omegaconf", "tensorboard"], "context": 32}},
        "federation": {"clients": 2},
        "student": {"target": "causal_lm", "args": student},
        "local_training": {"steps": 2},
        "callbacks": [],
        "evaluation": {"metrics": ["nll"]},
    }


def test_transformers_reads_model_and_tokenizer_back(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tree = language(model="gpt2", config={"n_layer": 1, "n_head": 2, "n_embd": 16})
    tree["data"]["args"] |= {"validation": 20, "test": 20, "limit_bytes": 20_000}
    run = finished(tree, tmp_path / "run")
    folder = export(run, "transformers")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    student, loop = student_of(run)
    tokens, _ = loop.server.test.batch(torch.arange(3))
    tokens = tokens.clamp_min(0)
    assert torch.equal(model.eval()(input_ids=tokens).logits, student(tokens).logits)
    text = "naïve text, 3 × 4"
    assert tokenizer(text)["input_ids"] == loop.server.model_kwargs["tokenizer"].encode(text)
    program = torch.export.load(export(run, "torch") / "model.pt2").module()
    assert torch.allclose(program(tokens), student(tokens).logits, atol=1e-5)


def test_transformers_reads_a_classifier_back(tmp_path):
    from transformers import AutoModelForSequenceClassification

    lines = [{"text": word * n, "label": word} for word in ("good ", "bad ") for n in range(1, 21)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    data = {"path": str(tmp_path / "texts.jsonl"), "context": 16, "test": 8, "validation": 8}
    tree = language(model="bert", config=sizes) | {"evaluation": {}}
    tree["student"]["target"], tree["data"] = "text_classifier", {"target": "text_classification", "args": data}
    run = finished(tree, tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(export(run, "transformers")).eval()
    student, loop = student_of(run)
    tokens, _ = loop.server.test.batch(torch.arange(4))
    mask = (tokens >= 0).long()
    expected = student(tokens).logits
    assert torch.allclose(model(input_ids=tokens.clamp_min(0), attention_mask=mask).logits, expected, atol=1e-6)
    assert model.config.id2label == dict(enumerate(loop.server.classes))


def test_open_clip_reads_its_own_model_back(tmp_path):
    import open_clip

    tree = language() | {"evaluation": {}}
    tree["data"] = {"target": "captioned_digits", "args": {"channels": 3, "normalize": True}}
    tree["student"] = {"target": "open_clip", "args": {"config": TOWERS}}
    run = finished(tree, tmp_path / "run")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{export(run, 'open_clip')}")
    student, loop = student_of(run)
    (images, tokens), _ = loop.server.test.batch(torch.arange(4))
    from fdl.modules.open_clip_model import add_start_and_end

    texts = add_start_and_end(tokens, student.start, student.end, student.context)
    model.eval()
    assert torch.allclose(model.encode_image(images, normalize=True), student.encode_image(images), atol=1e-6)
    assert torch.allclose(model.encode_text(texts, normalize=True), student.encode_text(tokens), atol=1e-6)
    assert torch.equal(model.logit_scale, student.logit_scale)
    folder = export(run, "torch")
    program = torch.export.load(folder / "encode_image.pt2").module()
    assert torch.allclose(program(images), student.encode_image(images), atol=1e-5)


def test_a_card_speaks_of_one_round_only():
    """The specialists' line is of the same round as the table, not of the last one."""
    accuracy = {1: [0.75, 0.25], 2: [0.5, 0.875]}
    history = [
        {
            "round": round,
            "metrics": {"student/test/accuracy": round / 10, "specialists/test/accuracy": sum(own) / 2},
            "communication": {"upload_bytes": round, "download_bytes": round},
            "clients": {str(client): {"test/accuracy": value} for client, value in enumerate(own)},
        }
        for round, own in accuracy.items()
    ]
    people = [{"samples": 5, "metrics": {"test/accuracy": value}} for value in accuracy[2]]
    summary = {"name": "n", "method": "fedavg", "seed": 0, "rounds": 2, "history": history, "participants": people}
    summary |= {"score": {"metric": "accuracy"}, "communication": {"setup_bytes": 0, "by_kind": {}}}
    summary["metrics"] = history[1]["metrics"]
    card = model_card(recipe.from_mapping(DIGITS), summary, 1, "", {})
    assert "| `specialists/test/accuracy` | 0.5000 |" in card
    assert "test/accuracy 0.5000 on average, 0.2500 to 0.7500." in card and "0.8750" not in card
