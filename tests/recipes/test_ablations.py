"""The ablation recipes: each leaves out one thing of recipes/knowledge.yaml, and nothing else."""

from functools import cache
from pathlib import Path

import pytest

from fdl.recipe import difference, load

RECIPES = Path(__file__).parents[2] / "recipes"
ABLATIONS = sorted((RECIPES / "ablations").glob("*.yaml"))
WITHOUT = {
    "no_features": {"method.args.features"},
    "no_prototypes": {"method.args.prototypes"},
    "no_adaptation": {"method.args.adapter"},
    "no_curriculum": {"method.args.curriculum"},
    "no_communication_efficiency": {
        "method.args.features.args.components",
        "method.args.proxy_fraction",
        "method.args.soft_label_cache_rounds",
        "method.args.upload_policy",
        "channel.upload",
        "channel.download",
    },
    "uniform_weights": {"method.args.confidence", "method.args.adaptive_client_weights"},
}


@cache
def loaded(name, variant=None):
    changes = None if variant is None else loaded(name).compare.variants[variant]
    return load(RECIPES / f"{name}.yaml", variant=changes)


@pytest.mark.parametrize("name", WITHOUT)
def test_an_ablation_leaves_out_what_its_name_says(name):
    full, ablation = loaded("knowledge"), loaded(f"ablations/{name}")
    changed = [key for key in difference(full.to_dict(), ablation.to_dict()) if not key.startswith("compare")]
    changed.remove("name")
    assert changed and all(any(f"{key}.".startswith(f"{part}.") for part in WITHOUT[name]) for key in changed)
    assert {part for part in WITHOUT[name] if any(f"{key}.".startswith(f"{part}.") for key in changed)} == WITHOUT[name]


@pytest.mark.parametrize("name", WITHOUT)
def test_the_variants_of_the_comparison_are_the_same(name):
    changed = difference(loaded("knowledge", name).to_dict(), loaded(f"ablations/{name}").to_dict())
    assert [key for key in changed if not key.startswith("compare")] == ["name"]


def test_every_ablation_is_known():
    assert {path.stem for path in ABLATIONS} == set(WITHOUT)
    assert set(loaded("knowledge").compare.variants) > set(WITHOUT)
