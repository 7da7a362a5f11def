"""Every recipe that comes with fdl is read, built and measured."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fdl.catalog import KINDS, short_names
from fdl.inspection import describe
from fdl.recipe import load

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]

# What stands in for data that are not on this machine: images of the same shape and number of classes.
SHAPES = {"cifar10": (3, 32, 32, 10)}


@pytest.fixture
def overrides(tmp_path):
    """What lets a recipe be built on this machine, offline and on the CPU."""

    def find(path: Path) -> list[str]:
        recipe = load(path)
        found = ["fabric.accelerator=cpu", "fabric.precision=32-true", "fabric.threads=1", f"output={tmp_path}"]
        encoder = recipe.encoder
        if encoder is not None and encoder.args.get("module", {}).get("args", {}).get("pretrained"):
            found.append("encoder.args.module.args.pretrained=false")
        if recipe.data.target in SHAPES:
            *shape, classes = SHAPES[recipe.data.target]
            rng, n = np.random.default_rng(0), 40 * classes
            np.savez(
                tmp_path / "images.npz",
                x_train=rng.integers(0, 256, (n, *shape), dtype=np.uint8),
                y_train=np.arange(n) % classes,
                x_test=rng.integers(0, 256, (classes, *shape), dtype=np.uint8),
                y_test=np.arange(classes),
            )
            arguments = {"path": tmp_path / "images.npz", "layout": "CHW", "proxy": 2 * classes, "validation": classes}
            if "augment" in recipe.data.args:
                arguments["augment"] = recipe.data.args["augment"]
            inner = ", ".join(f"{key}: {value}" for key, value in arguments.items())
            found.append(f"data={{target: arrays, args: {{{inner}}}}}")
        return found

    return find


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_builds_what_it_names(path, overrides, tmp_path):
    from fdl.build import build

    recipe = load(path, overrides(path))
    loop = build(recipe, tmp_path / "run")
    assert len(loop.clients) == recipe.federation.clients
    assert loop.method.name == recipe.method.target
    trained = {client.architecture for client in loop.clients}
    if "specialists" in loop.method.requires:
        assert trained == {component.args.get("model", component.target) for component in recipe.specialists}
    else:
        assert trained == {"student"}
    assert (loop.server.student is None) == (recipe.student is None)
    assert (loop.server.teacher is None) == (recipe.teacher is None)
    assert len(loop.server.test) and len(loop.server.validation)
    assert all(len(client.train) for client in loop.clients)
    total = sum(len(client.train) + len(client.calibration) for client in loop.clients)
    held_out = len(loop.server.proxy) + len(loop.server.validation)
    assert total + held_out == {"digits": 1797 - 360, "rotated_digits": 1797 - 360}.get(recipe.data.target, 400)
    if loop.server.student is not None:
        images, labels = loop.server.test.batch(torch.arange(2))
        output = loop.server.student.eval()(images)
        assert output.logits.shape == (2, loop.server.num_classes) and labels.shape == (2,)
    assert not (tmp_path / "run").exists()


SENDERS = {"fedavg", "fedprox", "feddf", "federated_distillation"}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_check_tells_the_bytes_of_a_round(path, overrides, tmp_path):
    # the frozen encoder would embed every client's images, which takes long and sends nothing
    cheap = ["federation.clients=3"] if load(path).data.target in SHAPES else []
    cheap += ["encoder.args.image_size=32"] if "image_size" in (load(path).encoder or _Nothing).args else []
    recipe = load(path, [*overrides(path), *cheap])
    text = describe(recipe, tmp_path / "run")
    if recipe.method.target in SENDERS:
        first, later = text.find("the first round of all clients"), text.find("a later round sends")
        if recipe.method.target == "federated_distillation":  # where nothing is known yet, nothing is sent down
            assert 0 < first < later
        else:
            assert first == later == -1 and "a round of all clients sends " in text
        assert " kB down and " in text or " MB down and " in text
    else:
        assert "nothing is sent" in text
    assert not (tmp_path / "run").exists()


class _Nothing:
    args = ()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_first_comment_is_the_command_and_the_name_is_unique(path):
    first, second, third, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# python -m fdl fit --recipe {path.relative_to(ROOT)}"
    assert second == "#" and third.startswith("# ") and third[2].isupper()
    assert load(path).name == "-".join(path.relative_to(ROOT / "recipes").with_suffix("").parts).replace("_", "-")


def test_equal_specialists_share_a_template_and_others_have_names_of_their_own(tmp_path):
    from fdl.build import build

    some = "[mlp, {target: timm, args: {model: resnet18}}, mlp, {target: mlp, args: {hidden: [4]}}]"
    recipe = load(ROOT / "recipes/digits/single_site.yaml", [f"specialists={some}", "federation.clients=4"])
    loop = build(recipe, tmp_path)
    assert [client.architecture for client in loop.clients] == ["mlp", "resnet18", "mlp", "mlp-3"]


def test_every_method_has_a_recipe():
    covered = {load(path).method.target for path in RECIPES}
    assert covered >= set(short_names(KINDS["method"]))
