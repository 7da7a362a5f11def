"""Which samples a run measures on and which are public: of its own seed, unless the data are given one."""

from pathlib import Path

import pytest

from fdl.build import build
from fdl.errors import UserError
from fdl.recipe import from_mapping, load
from fdl.runs.run import run_recipe

SETS = ("test", "validation", "proxy")


def tree(method="fedavg", seed=0, **data):
    return {
        "method": method,
        "data": {"target": "digits", "args": {"proxy": 100, "validation": 50, "test": 100, "limit": 600, **data}},
        "federation": {"clients": 2, "rounds": 1},
        "student": {"target": "mlp", "args": {"hidden": [8]}},
        "specialists": ["mlp"],
        "local_training": {"steps": 1},
        "server_distil": {"steps": 1},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
        "seed": seed,
    }


def drawn(folder, **options):
    """Hashes of the held-out sets of a run."""
    server = build(from_mapping(tree(**options)), folder).server
    return [getattr(server, name).content_hash() for name in SETS]


def test_every_seed_of_a_run_draws_samples_of_its_own_and_every_method_the_same(tmp_path):
    first = drawn(tmp_path, seed=0)
    assert all(one != other for one, other in zip(first, drawn(tmp_path, seed=1)))
    assert first == drawn(tmp_path, seed=0, method="federated_distillation")


def test_data_with_a_seed_of_their_own_are_the_same_in_every_run(tmp_path):
    one, other = (build(from_mapping(_pinned(seed)), tmp_path) for seed in (0, 3))
    for name in SETS:
        assert getattr(one.server, name).content_hash() == getattr(other.server, name).content_hash()
    assert drawn(tmp_path, seed=1) == [getattr(one.server, name).content_hash() for name in SETS]


def _pinned(seed):
    recipe = tree(seed=seed)
    recipe["data"]["args"]["seed"] = 1
    return recipe


def test_nested_proxy_sets_follow_the_run_too(tmp_path):
    nested = {"target": "digits", "args": {"limit": 60}}
    one, again, other = (drawn(tmp_path, seed=seed, proxy=nested)[2] for seed in (2, 2, 3))
    assert one == again != other


def test_a_probes_data_follow_the_run_too(tmp_path):
    def asked(seed):
        recipe = tree(seed=seed)
        probe = {"target": "linear_probe", "args": {"shots": [1], "data": {"target": "digits", "args": {}}}}
        recipe["evaluation"] = {"evaluators": [probe]}
        return build(from_mapping(recipe), tmp_path).probes[0].data.test.content_hash()

    assert asked(0) == asked(0) != asked(1)


def test_a_run_is_not_resumed_with_samples_of_another_seed(tmp_path):
    run_recipe(from_mapping(tree(seed=0)), tmp_path / "run")
    changed = from_mapping(_pinned(0) | {"federation": {"clients": 2, "rounds": 2}})
    with pytest.raises(UserError, match=r"data\.args\.seed: absent there, 1 here"):
        run_recipe(changed, tmp_path / "run", resume=True)
    longer = tree(seed=0) | {"federation": {"clients": 2, "rounds": 2}}
    assert run_recipe(from_mapping(longer), tmp_path / "run", resume=True)["rounds"] == 2


def test_a_proxy_set_of_packages_is_one():
    recipe = load(Path(__file__).parents[2] / "recipes/quickstart_language.yaml")
    assert "proxy" not in recipe.data.args and recipe.data.args["proxy_packages"]
