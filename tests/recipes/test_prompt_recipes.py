"""The recipes of prompts and of streams, at the size of a test."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fdl.build import build
from fdl.cli.check import describe_federation
from fdl.recipe import load
from fdl.state.weights import count_parameters, module_state

ROOT = Path(__file__).parents[2] / "recipes"
CPU = ["fabric.accelerator=cpu", "fabric.precision=32-true", "fabric.threads=1", "callbacks=[]"]
OVERHEAD = 600  # names, shapes and framing of a message with a few tensors


def payloads(loop):
    return [row.bytes for row in loop.ledger.rows() if row.direction in ("up", "down")]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A dual encoder that has learnt what captions say of digits for a moment."""
    from fdl.datamodules.captioned_digits import CaptionedDigits
    from fdl.modules.small_dual_encoder import SmallDualEncoder

    torch.manual_seed(0)
    data = CaptionedDigits()
    data.setup()
    student = load(ROOT / "prompts/digits.yaml").student.args["encoder"]["args"]
    module = SmallDualEncoder(**student, input_shape=(1, 8, 8), tokenizer=data.tokenizer, context=64)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.002)
    for rows in (torch.randint(len(data.train), (64,)) for _ in range(120)):
        optimizer.zero_grad()
        module.training_step(data.train.batch(rows))["loss"].backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("towers") / "towers.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in module_state(module).items()}, path)
    return path


def test_prompts_of_digits(towers, tmp_path):
    short = [f"student.args.checkpoint={towers}", "federation.rounds=2", "local_training.steps=4"]
    loop = build(load(ROOT / "prompts/digits.yaml", [*CPU, *short]), tmp_path / "run")
    shared = module_state(loop.server.student)["backbone.prompt.shared"]
    summary = loop.run()
    assert summary["metrics"].keys() >= {f"student/base_new/{k}" for k in ("base", "new", "base_gain", "new_gain")}
    assert all(set(client.train.labels.tolist()) <= set(range(5)) for client in loop.clients)
    # a round of five clients: the shared vectors down and up, and nothing else
    sizes = payloads(loop)
    assert len(sizes) == 2 * 2 * 5
    assert all(4 * shared.numel() < size < 4 * shared.numel() + OVERHEAD for size in sizes)
    assert 100 * shared.numel() < 4 * count_parameters(loop.server.student)
    own = [client.state["specialist"]["backbone.prompt.personal"] for client in loop.clients]
    assert not torch.equal(own[0], own[1])


def test_a_generator_in_the_place_of_vectors(towers, tmp_path):
    path = ROOT / "prompts/digits.yaml"
    args = {k: v for k, v in load(path).student.args.items() if k != "personal"} | {"checkpoint": str(towers)}
    student = {"target": "prompt_generator", "args": args | {"width": 8, "heads": 2}}
    short = ["federation.rounds=1", "local_training.steps=4"]
    loop = build(load(path, [*CPU, *short], {"method": "fedavg", "student": student}), tmp_path / "run")
    loop.run()
    sent = 4 * sum(tensor.numel() for tensor in module_state(loop.server.student).values())
    assert all(sent < size < sent + 2 * OVERHEAD for size in payloads(loop))
    assert all(name.startswith("backbone.prompt.") for name in module_state(loop.server.student))


def test_prompts_that_the_server_makes_for_each_site(towers, tmp_path):
    short = [f"student.args.checkpoint={towers}", "federation.rounds=2", "local_training.steps=4"]
    loop = build(load(ROOT / "prompts/digits_per_site.yaml", [*CPU, *short]), tmp_path / "run")
    loop.run()
    shared = module_state(loop.server.student)["backbone.prompt.shared"]
    # a round of five clients: their vectors down, and what changed of them up
    assert all(4 * shared.numel() < size < 4 * shared.numel() + OVERHEAD for size in payloads(loop))
    first, second = (loop.method.download(loop.server, i).tensors["backbone.prompt.shared"] for i in (0, 1))
    assert not torch.equal(first, second) and not torch.equal(first, shared)


def test_photographs_from_towers_to_prompts(tmp_path):
    rng, y = np.random.default_rng(0), np.arange(120) % 10
    x, names = rng.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8), load(ROOT / "prompts/photos.yaml").student.args
    sentences = np.array([f"a photo of a {names['classes'][label]}" for label in y])
    images = {"x_train": x, "y_train": y, "x_test": x[:40], "y_test": y[:40], "classes": np.array(names["classes"])}
    np.savez(tmp_path / "photos.npz", **images)
    np.savez(tmp_path / "pairs.npz", **images, captions_train=sentences, captions_test=sentences[:40])
    short = [
        *CPU,
        "data.args.validation=20",
        "federation.rounds=1",
        "local_training.steps=1",
        "local_training.batch_size=8",
    ]
    towers = build(
        load(ROOT / "prompts/photo_towers.yaml", [*short, f"data.args.path={tmp_path / 'pairs.npz'}"]),
        tmp_path / "towers",
    )
    assert "student/zero_shot/accuracy" in towers.run()["metrics"]
    short += [f"data.args.path={tmp_path / 'photos.npz'}"]
    short += [f"student.args.checkpoint={tmp_path / 'towers/best.safetensors'}", "federation.clients=2"]
    variants = load(ROOT / "prompts/photos.yaml").compare.variants
    assert len(variants) == 4
    for name, changes in variants.items():
        loop = build(load(ROOT / "prompts/photos.yaml", short, changes), tmp_path / name)
        assert loop.run()["metrics"].keys() >= {"student/base_new/base_gain", "student/base_new/new_gain"}
        assert all(set(client.train.labels.tolist()) <= set(range(5)) for client in loop.clients)


def test_promptfl_with_a_small_clip(tmp_path):
    import open_clip

    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (tmp_path / "fdl-prompts.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "fdl-prompts.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("fdl-prompts").state_dict(), tmp_path / "weights.pt")
    rng = np.random.default_rng(0)
    for i in range(96):
        folder = tmp_path / "images" / f"site{i % 2}" / ("airplane", "bicycle", "cat", "dog")[i // 2 % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    overrides = [
        *CPU,
        f"data.args.path={tmp_path}/images",
        "data.args.size=16",
        "federation.clients=2",
        "federation.rounds=1",
        "student.args.model=fdl-prompts",
        "student.args.pretrained=null",
        f"student.args.checkpoint={tmp_path}/weights.pt",
    ]
    recipe = load(ROOT / "prompts/clip_vit_b16.yaml", overrides)
    assert "a round of all clients sends" in describe_federation(recipe, tmp_path / "check")
    loop = build(recipe, tmp_path / "run")
    loop.run()
    assert {k: tuple(v.shape) for k, v in module_state(loop.server.student).items()} == {
        "backbone.prompt.shared": (16, 8)
    }
    assert all(4 * 16 * 8 < size < 4 * 16 * 8 + OVERHEAD for size in payloads(loop))


def test_visual_prompts_with_a_small_vit(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=100, img_size=32).state_dict(), tmp_path / "vit.pth")
    rng, y = np.random.default_rng(0), np.arange(400) % 100
    x = rng.integers(0, 256, (400, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])
    overrides = [
        *CPU,
        f"data={{target: arrays, args: {{path: {tmp_path}/images.npz, layout: CHW, validation: 100}}}}",
        "partition=iid",
        "federation={clients: 2, rounds: 1}",
        f"student.args={{model: test_vit, checkpoint: {tmp_path}/vit.pth, prompts: 10}}",
        "local_training.batch_size=50",
    ]
    loop = build(load(ROOT / "prompts/vit_b16_cifar100.yaml", overrides), tmp_path / "run")
    loop.run()
    trained = 6 * 10 * 64 + 100 * 64 + 100
    assert all(4 * trained < size < 4 * trained + OVERHEAD for size in payloads(loop))


def test_the_recipes_name_models_that_there_are():
    import open_clip

    clip = load(ROOT / "prompts/clip_vit_b16.yaml").student.args
    assert clip["pretrained"] in open_clip.list_pretrained_tags_by_model(clip["model"])
    vit = load(ROOT / "prompts/vit_b16_cifar100.yaml").student.args
    assert vit["model"] in timm.list_models("vit_base*", pretrained=True)
    with torch.device("meta"):
        network = timm.create_model(vit["model"], num_classes=100)
    # what the first comments say
    assert 16 * 512 * 4 == 32768 and round(4 * count_parameters(network) / 1e6) == 344
    assert round(4 * (12 * 10 * 768 + 100 * 768 + 100) / 1e6, 1) == 0.7


@pytest.mark.parametrize("name", ["digits", "rotated_digits"])
def test_streams(tmp_path, name):
    recipe = load(ROOT / f"continual/{name}.yaml", [*CPU, "arrival.args.rounds=1", "federation.rounds=2"])
    loop = build(recipe, tmp_path / "run")
    metrics = loop.run()["metrics"]
    assert {f"student/continual/{k}" for k in ("average_accuracy", "forgetting", "forward_transfer")} <= metrics.keys()
    assert {"down/parameters", "down/responses", "up/parameters"} <= set(loop.ledger.by_kind())
    assert loop.server.test_stages.max() == loop.server.arrival.stages - 1


@pytest.mark.parametrize("path", [*ROOT.glob("prompts/*.yaml"), *ROOT.glob("continual/*.yaml")], ids=lambda p: p.stem)
def test_the_first_comment_is_the_command(path):
    first, second, third, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# python -m fdl fit --recipe {path.relative_to(ROOT.parent)}"
    assert second == "#" and third.startswith("# ") and third[2].isupper()
    assert load(path).name == "-".join(path.relative_to(ROOT).with_suffix("").parts).replace("_", "-")
