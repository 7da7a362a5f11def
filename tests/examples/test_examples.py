"""The examples: each recipe runs, and does what its file and docs/extending.md say."""

import re
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch

from examples.codecs import LogQuantize, Lzma
from examples.majority_vote import Votes
from examples.table_data import Tumours
from examples.table_model import TableNet
from fdl.build import build
from fdl.comm.codec import Codec
from fdl.errors import RejectedMessageError
from fdl.messages import TensorMessage
from fdl.recipe import load

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").glob("*.yaml"))
QUIET = ["callbacks=[]", "fabric.accelerator=cpu"]


def run(name, folder, *overrides, resume=False):
    loop = build(load(ROOT / "examples" / f"{name}.yaml", [*QUIET, *overrides]), folder)
    loop.run(resume)
    return loop


def weights(loop):
    return torch.cat([tensor.flatten().double() for tensor in loop.server.student.state_dict().values()])


@pytest.mark.parametrize(
    ("name", "least"), [("majority_vote", 0.6), ("scaffold", 0.6), ("table", 0.9), ("codecs", 0.6)]
)
def test_its_recipe_runs_and_the_student_learns(tmp_path, name, least):
    assert {path.stem for path in RECIPES} == {"majority_vote", "scaffold", "table", "codecs"}
    assert run(name, tmp_path).history[-1]["metrics"]["student/test/accuracy"] >= least


def test_scaffolds_control_variates_and_its_two_executors(tmp_path):
    loops = [run("scaffold", tmp_path / name, f"client_execution={name}") for name in ("sequential", "vectorized")]
    for loop in loops:
        common = loop.server.state["control"]
        for name, control in common.items():  # all clients were heard, so the server's is the mean of theirs
            own = torch.stack([client.state["control"][name] for client in loop.clients])
            assert control.abs().max() > 0
            torch.testing.assert_close(control, own.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(loops[0]), weights(loops[1]), rtol=1e-4, atol=1e-5)


def test_scaffold_goes_on_where_it_stopped(tmp_path):
    straight = run("scaffold", tmp_path / "straight", "federation.rounds=3")
    run("scaffold", tmp_path / "resumed", "federation.rounds=1")
    resumed = run("scaffold", tmp_path / "resumed", "federation.rounds=3", resume=True)
    assert torch.equal(weights(straight), weights(resumed))


def test_the_table_model_and_data_work_under_a_plain_trainer(tmp_path):
    data = Tumours(proxy=0, validation=60, test=120)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = TableNet(num_classes=2, input_shape=(30,))
    trainer.fit(module, data)
    x, y = data.test.batch(torch.arange(len(data.test)))
    assert (module.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_a_method_that_needs_embeddings_finds_them_in_the_table_model(tmp_path):
    method = ["method=fedproto", "specialists=[{target: examples.table_model.TableNet}]", "student=null"]
    loop = build(load(ROOT / "examples" / "table.yaml", [*QUIET, *method, "federation.rounds=1"]), tmp_path)
    with loop.clients[0].turn():
        assert loop.clients[0].specialist().embedding_dim == 32
    loop.run()


def test_votes_that_make_no_sense_are_rejected_before_they_count():
    votes = Votes(3, 2)
    for bad in (torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.zeros(3)):
        bad = bad if bad.is_floating_point() else bad.to(torch.uint8)
        with pytest.raises(RejectedMessageError, match="one of 2 classes for each of 3 samples"):
            votes.add(TensorMessage({"votes": {"class": bad}}), 0)
    assert votes.result() is None
    votes.add(TensorMessage({"votes": {"class": torch.tensor([0, 1, 1], dtype=torch.uint8)}}), 0)
    assert votes.result().tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_log_quantize_has_an_error_relative_to_each_value(dtype):
    stage = LogQuantize(octaves=10)
    x = np.concatenate([np.geomspace(1e-2, 4, 200), -np.geomspace(1e-2, 4, 200), np.zeros(9)]).astype(dtype)
    codec = Codec([stage, Lzma()])
    blob = codec.encode({"x": x})
    back = codec.decode(blob, 1 << 16)["x"]
    assert back.dtype == x.dtype and len(blob) < x.nbytes
    assert np.abs(back[:400] / x[:400] - 1).max() < 2 ** (10 / 126 / 2) - 1 + 2e-3
    assert (back[400:] == 0).all()
    zeros = np.zeros(20, dtype)
    assert (codec.decode(codec.encode({"x": zeros}), 1 << 16)["x"] == 0).all()
    with pytest.raises(RejectedMessageError, match="another codec chain"):
        Codec([LogQuantize(octaves=11), Lzma()]).decode(blob, 1 << 16)


def test_lzma_rejects_what_is_damaged_or_of_another_size():
    data = bytes(range(200)) * 20
    coded = Lzma().compress(data)
    assert len(coded) < len(data) and Lzma().expand(memoryview(coded), len(data)) == data
    for broken, size in ((coded, len(data) - 1), (coded, len(data) + 1), (coded[:-20], len(data)), (b"\xff" * 9, 5)):
        with pytest.raises(RejectedMessageError, match="lzma"):
            Lzma().expand(memoryview(broken), size)


def test_each_file_is_short_and_stands_in_the_guide():
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "examples").glob("[!_]*.py"))
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 95, path.name
        assert f"(../examples/{path.name})" in guide, path.name
    for path in re.findall(r"\]\((\.\./[^)#]+)\)", guide):
        assert (ROOT / "docs" / path).exists(), path
