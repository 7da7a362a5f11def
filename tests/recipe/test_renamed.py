"""A recipe in former words gets errors that name the new ones, wherever it uses them."""

import pytest

from fdl.errors import RecipeError, UserError
from fdl.recipe import from_mapping
from fdl.recipe.config import Recipe
from fdl.recipe.renamed import KEYS, NAMES, VALUES, explain
from fdl.recipe.validate import keys
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from fdl.registry.targets import find

BASE = {
    "method": {"target": "fedavg"},
    "data": {"target": "digits"},
    "student": "mlp",
    "federation": {"clients": 4},
    "privacy": {"epsilon": 8.0},
    "adversaries": [{"target": "sign_flip", "clients": [0]}],
}


def problems(*overrides, tree=BASE):
    with pytest.raises(RecipeError) as caught:
        from_mapping(tree, overrides)
    return caught.value.problems


def test_the_recipe_in_new_words_is_right():
    from_mapping(BASE)


@pytest.mark.parametrize(("former", "new"), KEYS.items())
def test_a_former_key_is_told_the_new_one(former, new):
    known = {key for key, *_ in keys(Recipe)} | {"adversaries.*.fraction"}
    assert new in known and former not in known
    former, new = former.replace("*", "0"), new.replace("*", "0")
    (said,) = problems(f"{former}=3")
    assert said == f"{former}: unknown key; it is called {new} (from the override '{former}=3')"
    (said,) = problems(tree={**BASE, "compare": {"variants": {"one": {former: 3}}}})
    assert said.startswith(f"compare.variants.one: {former}: unknown key; it is called {new}")


def test_in_a_file_and_below_a_former_section(tmp_path):
    tree = BASE | {"federation": {"clients": 4, "participation": 0.5}, "digest": {"steps": 3, "optimizer": "adam"}}
    assert problems(tree=tree) == [
        "federation.participation: unknown key; it is called federation.client_fraction",
        "digest: unknown key; it is called client_distil",
    ]
    (said,) = problems("local.optimizer.args.lr=0.1")
    assert said == ("local: unknown key; it is called local_training (from the override 'local.optimizer.args.lr=0.1')")
    (said,) = problems(tree=BASE | {"server_distil": {"batch_size": "${local.batch_size}"}})
    assert said.startswith("server_distil.batch_size: ") and said.endswith("; local is called local_training")


@pytest.mark.parametrize(("former", "new"), VALUES.items())
def test_a_former_value_is_told_the_new_one(former, new):
    key, value = former
    (said,) = problems(f"{key}={value}")
    assert said.startswith(f"{key}: unknown value {value!r}; it is called {new!r}")


PLACES = {"fault": "faults", "adversary": "adversaries", "module": "specialists"}


@pytest.mark.parametrize(("former", "new"), NAMES.items())
def test_a_former_short_name_is_told_the_new_one(former, new):
    kind, name = former
    assert new in short_names(KINDS[kind]) and name not in short_names(KINDS[kind])
    if kind not in PLACES:  # it is an argument of a method
        with pytest.raises(UserError) as caught:
            find(name, KINDS[kind])
        assert explain("method.args.x", str(caught.value), {}).endswith(f" {name!r}; it is called {new!r}")
        return
    (said,) = problems(tree={**BASE, PLACES[kind]: [{"target": name}]})
    assert said == f"{PLACES[kind]}.0: unknown {kind} {name!r}; it is called {new!r}"


def test_also_inside_another_plug_in():
    entry = {"target": "sybil", "clients": [0], "args": {"attack": "cpa"}}
    (said,) = problems(tree={**BASE, "adversaries": [entry]})
    assert said == "adversaries.0.args.attack: unknown adversary 'cpa'; it is called 'class_confusion'"


def test_a_share_is_called_a_fraction_everywhere():
    (said,) = problems("channel.upload=[{target: top_k, args: {share: 0.1}}]")
    assert "takes no 'share'; did you mean 'fraction'?" in said
