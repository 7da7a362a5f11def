"""Every recipe that comes with fdl is read, built and measured."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from fdl.cli.check import describe_federation
from fdl.recipe import Recipe, load
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from fdl.registry.targets import find
from tests import stand_ins

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]

# Recipes that need files of their own are built by these.
ELSEWHERE = {
    "recipes/prompts/": "tests/recipes/test_prompt_recipes.py",
    "recipes/continual/": "tests/recipes/test_prompt_recipes.py",
    "recipes/dual_encoder/": "tests/recipes/test_dual_encoder_recipes.py",
    "recipes/methods/fedlora_glue": "tests/methods/test_fedlora.py",
}
HERE = [path for path, name in zip(RECIPES, NAMES) if not name.startswith(tuple(ELSEWHERE))]
HERE_NAMES = [str(path.relative_to(ROOT)) for path in HERE]


@pytest.fixture
def overrides(tmp_path):
    """What lets a recipe be built on this machine, offline and on the CPU."""
    return lambda path: stand_ins.overrides(path, tmp_path)


@pytest.mark.parametrize(("name", "place"), ELSEWHERE.items())
def test_recipes_with_files_of_their_own_are_built_elsewhere(name, place):
    text = (ROOT / place).read_text(encoding="utf-8")
    assert "build(" in text
    assert any(part in text for part in (name.removeprefix("recipes/"), Path(name).name))


@pytest.mark.parametrize("path", HERE, ids=HERE_NAMES)
def test_a_recipe_builds_what_it_names(path, overrides, tmp_path):
    from fdl.build import build

    recipe = load(path, overrides(path))
    loop = build(recipe, tmp_path / "run")
    assert len(loop.clients) == recipe.federation.clients
    assert loop.method.name == recipe.method.target
    trained = {client.architecture for client in loop.clients}
    if "specialists" in loop.method.requires:
        different = {json.dumps([component.target, component.args], sort_keys=True) for component in recipe.specialists}
        assert len(trained) == min(len(different), len(loop.clients))
        for key in trained:
            assert type(loop.runtime.shared_module(key)) in {
                find(component.target, KINDS["module"]).load() for component in recipe.specialists
            }
    else:
        assert trained == {"student"}
    assert (loop.server.student is None) == (recipe.student is None)
    assert (loop.server.teacher is None) == (recipe.teacher is None)
    assert len(loop.server.test) and len(loop.server.validation)
    assert all(len(client.train) for client in loop.clients)
    few = min(2, len(loop.server.test))
    samples, _ = loop.server.test.batch(torch.arange(few))
    if loop.server.student is not None:
        output = loop.server.student.eval()(samples)
        assert len(output.logits) == len(output.embedding) == few
        if loop.server.task == "classification":
            assert output.logits.shape == (2, loop.server.num_classes)
    assert not (tmp_path / "run").exists()
    if loop.server.task != "classification":
        return
    total = sum(len(client.train) + len(client.calibration) for client in loop.clients)
    held_out = len(loop.server.proxy) + len(loop.server.validation) + len(loop.server.public)
    known = {"digits": 1797 - 360, "rotated_digits": 1797 - 360, "arrays": 40 * loop.server.num_classes}
    if recipe.data.target in known:  # nobody's sample is lost
        assert total + held_out == known[recipe.data.target]


SILENT = {"centralized", "single_site", "distillation"}


LIKE_OTHERS = ("recipes/ablations/", "recipes/digits/robustness.yaml")
"""Recipes that differ from another, whose bytes are looked at, in one key, or in who lies."""


def slow_if_like_others(path, name):
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name.startswith(LIKE_OTHERS) else [])


@pytest.mark.parametrize("path", map(slow_if_like_others, HERE, HERE_NAMES))
def test_check_tells_the_bytes_of_a_round(path, overrides, tmp_path):
    # the frozen encoder would embed every client's images, which takes long and sends nothing
    cheap = []
    if loaded(path).data.target in stand_ins.SHAPES:
        cheap = ["federation.clients=3", "federation.client_fraction=1", "partition=iid"]
    cheap += ["encoder.args.image_size=32"] if "image_size" in (loaded(path).encoder or _Nothing).args else []
    recipe = load(path, [*overrides(path), *cheap])
    text = describe_federation(recipe, tmp_path / "run")
    if recipe.method.target in SILENT:
        assert "nothing is sent" in text
    else:
        first, later = text.find("the first round of all clients"), text.find("a later round sends")
        if recipe.method.target == "federated_distillation" and recipe.federation.rounds > 1:
            assert 0 < first < later  # where nothing is known yet, nothing is sent down
        else:
            assert 0 < first < later or "a round of all clients" in text
        assert re.search(r"sends \d[\d.]* \S+ down and \d[\d.]* \S+ up", text)
    assert not (tmp_path / "run").exists()


@cache
def loaded(path: Path) -> Recipe:
    """A recipe as it stands, read once for all tests; no test changes it."""
    return load(path)


class _Nothing:
    args = ()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_first_comment_is_the_command_and_the_name_is_unique(path):
    first, second, third, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == f"# python -m fdl fit --recipe {path.relative_to(ROOT)}"
    assert second == "#" and third.startswith("# ") and third[2].isupper()
    assert loaded(path).name == "-".join(path.relative_to(ROOT / "recipes").with_suffix("").parts).replace("_", "-")


def test_equal_specialists_share_a_template_and_others_have_names_of_their_own(tmp_path):
    from fdl.build import build

    some = "[mlp, {target: timm, args: {model: resnet18}}, mlp, {target: mlp, args: {hidden: [4]}}]"
    recipe = load(ROOT / "recipes/digits/single_site.yaml", [f"specialists={some}", "federation.clients=4"])
    loop = build(recipe, tmp_path)
    assert [client.architecture for client in loop.clients] == ["mlp", "resnet18", "mlp", "mlp-3"]


def test_every_method_has_a_recipe():
    covered = {loaded(path).method.target for path in RECIPES}
    assert covered >= set(short_names(KINDS["method"]))


PROBED = [path for path in RECIPES if "probes:" in (text := path.read_text(encoding="utf-8")) and "variants:" in text]


@pytest.mark.parametrize("path", PROBED, ids=lambda path: path.stem)
def test_no_variant_asks_a_student_that_its_method_does_not_have(path):
    # a probe of the recipe is asked in all of its variants, and building refuses it without a student
    for name, changes in loaded(path).compare.variants.items():
        recipe = load(path, [], changes)
        method = find(recipe.method.target, KINDS["method"]).load()
        assert not recipe.evaluation.evaluators or "student" in method.requires, name
