"""The recipes of dual encoders, at the size of a test, and real pairs of icons and names."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdl.build import build
from fdl.cli.check import describe_federation
from fdl.recipe import load

ROOT = Path(__file__).parents[2] / "recipes"
CPU = ["fabric.accelerator=cpu", "fabric.precision=32-true", "fabric.threads=1", "callbacks=[]"]
DATA = os.environ.get("FDL_DATA")
TINY = (
    "{target: open_clip, args: {config: {embed_dim: 8, vision_cfg: {layers: 1, width: 16, head_width: 8, "
    "patch_size: 8}, text_cfg: {width: 16, heads: 2, layers: 1}}}}"
)


@pytest.fixture
def photographs(tmp_path):
    """A folder of images in three sites' tables."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 90), ("test", 20)):
        lines = []
        for i in range(count):
            name, shade = f"{split}{i}.png", int(rng.integers(4))
            Image.fromarray(np.full((20, 24, 3), 60 * shade, dtype=np.uint8)).save(tmp_path / name)
            lines.append(json.dumps({"file": name, "caption": f"shade number {shade}", "site": f"site {i % 3}"}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_quickstart_runs_every_part_of_its_method(tmp_path):
    path = ROOT / "quickstart_dual_encoder.yaml"
    short = [
        "local_training.steps=3",
        "server_distil.steps=3",
        "client_distil.steps=3",
        "federation.rounds=2",
        "data.args.proxy=60",
    ]
    loop = build(load(path, [*CPU, *short]), tmp_path / "run")
    assert {client.architecture for client in loop.clients} == {
        "tiny_dual_encoder",
        "tiny_dual_encoder-1",
        "tiny_dual_encoder-2",
    }
    summary = loop.run()
    metrics = summary["history"][-1]["metrics"]
    assert 0 <= metrics["student/zero_shot/accuracy"] <= 1
    assert metrics["specialists/test/mean_recall"] > 0
    assert {"up/responses", "down/responses"} <= set(loop.ledger.by_kind())


def test_the_recipe_for_a_large_model_runs_with_small_ones(photographs, tmp_path):
    path = ROOT / "dual_encoder/clip_vit_b32.yaml"
    overrides = [
        *CPU,
        f"data.args={{path: {photographs}, size: 16, group: site, context: 24, proxy: 20, validation: 10}}",
        f"student={TINY}",
        f"specialists=[{TINY}]",
        "federation.clients=3",
        "federation.rounds=2",
        "federation.calibration_fraction=0.2",
        "local_training.epochs=1",
        "local_training.batch_size=8",
        "client_distil.steps=2",
        "server_distil.epochs=1",
        "server_distil.batch_size=10",
    ]
    recipe = load(path, overrides)
    assert "a later round sends" in describe_federation(recipe, tmp_path / "check")
    loop = build(recipe, tmp_path / "run")
    summary = loop.run()
    assert summary["rounds"] == 2 and summary["metrics"]["student/retrieval/image_to_text_recall_at_1"] >= 0
    assert all(not record["refused"] for record in summary["history"])


def test_the_recipe_for_a_large_model_names_models_that_there_are():
    import open_clip

    recipe = load(ROOT / "dual_encoder/clip_vit_b32.yaml")
    for component in (recipe.student, *recipe.specialists):
        known = open_clip.list_pretrained_tags_by_model(component.args["model"])
        assert component.args["pretrained"] in known
    assert recipe.data.args["tokenizer"].removeprefix("open_clip:") in open_clip.list_models()


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="FDL_DATA names no folder of real data")
def test_real_icons_and_names_by_artist(tmp_path):
    """Two small rounds: the student finds names of unseen icons better than the specialists do on average."""
    recipe = tmp_path / "icons.yaml"
    recipe.write_text(
        f"""
name: icons
method: {{target: affinity_distillation, args: {{confidence: own_pair, contrastive: 1.0}}}}
data:
  target: image_text_arrays
  args:
    path: {DATA}/gameicons_imagetext_32.npz
    groups: author_train
    tokenizer: "open_clip:ViT-B-32"
    context: 12
    proxy: 500
    validation: 50
    limit: 1800
partition: by_group
federation: {{clients: 4, rounds: 2}}
specialists: [{{target: tiny_dual_encoder, args: {{dim: 32, widths: [8, 16, 32], text: bag}}}}]
student: {{target: tiny_dual_encoder, args: {{dim: 32, widths: [8, 16, 32], text: bag}}}}
local_training: {{steps: 60, batch_size: 64, optimizer: {{target: adam, args: {{lr: 0.002}}}}}}
server_distil: {{steps: 120, batch_size: 64, optimizer: {{target: adam, args: {{lr: 0.002}}}}}}
"""
    )
    loop = build(load(recipe, CPU), tmp_path / "run")
    held = sum(len(client.train) + len(client.calibration) for client in loop.clients)
    assert (len(loop.server.test), held) == (634, 1250)
    loop.run()
    metrics = loop.history[-1]["metrics"]
    chance = (1 + 5 + 10) / 3 / 634
    assert metrics["student/test/mean_recall"] > 2 * chance
    assert metrics["student/test/mean_recall"] > metrics["specialists/test/mean_recall"]
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()
