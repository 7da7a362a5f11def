"""Students are read back by the library alone, and answer as they did in the run."""

import json

import pytest
import torch

from fdl import checkpoint, recipe, runs
from fdl.__main__ import main
from fdl.build import build
from fdl.cli import FORMATS as NAMES
from fdl.errors import UserError
from fdl.exporting import FORMATS, export
from fdl.modules.weights import load_into
from fdl.snapshot import BEST

DIGITS = {
    "name": "exported",
    "method": "fedavg",
    "data": {"target": "digits", "args": {"normalize": True}},
    "federation": {"clients": 2, "rounds": 2},
    "student": {"target": "timm", "args": {"model": "test_resnet"}},
    "callbacks": [],
}


def finished(tree, folder):
    runs.fit(recipe.from_mapping(tree), folder)
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
    assert tuple(FORMATS) == NAMES


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
