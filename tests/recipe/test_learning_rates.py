"""Clients with a learning rate of their own."""

import pytest
import torch

from fdl.build import build
from fdl.errors import RecipeError, UserError
from fdl.recipe import from_mapping
from fdl.recipe.learning_rates import alike_but_for_rates, local_fits, rates_by_client

BASE = {
    "method": "single_site",
    "data": {"target": "digits", "args": {"proxy": 100, "validation": 0}},
    "specialists": [{"target": "mlp", "args": {"hidden": [8]}}],
    "federation": {"clients": 3, "rounds": 2},
    "local_training": {"optimizer": {"target": "sgd", "args": {"lr": 0.1, "momentum": 0.9}}},
    "fabric": {"accelerator": "cpu"},
    "callbacks": [],
}


def recipe(**changes):
    return from_mapping({**BASE, **changes})


def rates(made, entries):
    return [fit.optimizer.args["lr"] for fit in local_fits(made, entries)]


def test_the_nearest_rate_counts():
    specialists = [{"target": "mlp", "lr": 0.5}, {"target": "cnn"}]
    federation = {"clients": 6, "learning_rates": {0: 0.02, "3": 0.03}}
    made = recipe(specialists=specialists, federation=federation)
    assert rates(made, [0, 1, 0, 1, 0, 1]) == [0.02, 0.1, 0.5, 0.03, 0.5, 0.1]
    assert rates(made, None) == [0.02, 0.1, 0.1, 0.03, 0.1, 0.1]


def test_clients_that_train_alike_share_their_settings():
    made = recipe(federation={"clients": 4, "learning_rates": {1: 0.2, 2: 0.2}})
    fits = local_fits(made, None)
    assert fits[0] is fits[3] is made.local_training and fits[1] is fits[2]
    assert fits[1].optimizer.args == {"lr": 0.2, "momentum": 0.9} and made.local_training.optimizer.args["lr"] == 0.1
    assert alike_but_for_rates(fits[0], fits[1])
    assert not alike_but_for_rates(
        fits[0], recipe(local_training={"optimizer": {"target": "sgd", "args": {"lr": 0.1}}}).local_training
    )


PRETRAINED = {
    "method": {"target": "federated_distillation", "args": {"pretrain": 1}},
    "student": {"target": "mlp", "args": {"hidden": [8]}},
    "data": {"target": "digits", "args": {"proxy": 100, "validation": 0, "public": 60}},
}


@pytest.mark.parametrize(
    ("method", "local_training"), [({}, {}), (PRETRAINED, {"epochs": 0})], ids=["alone", "pretrained"]
)
def test_every_client_trains_as_if_its_rate_were_everybodys(method, local_training, tmp_path):
    def trained(name, **changes):
        settings = {**BASE["local_training"], **changes.pop("local_training", {}), **local_training}
        loop = build(recipe(**method, local_training=settings, **changes), tmp_path / name)
        loop.run()
        return [client.state["specialist"] for client in loop.clients]

    federation = {**BASE["federation"], "rounds": 1 if method else 2}

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    own = trained("own", federation={**federation, "learning_rates": {1: 0.02}})
    common = trained("common", federation=federation)
    slower = {"optimizer": {"target": "sgd", "args": {"lr": 0.02, "momentum": 0.9}}}
    slow = trained("slow", federation=federation, local_training=slower)
    entry = trained("entry", federation=federation, specialists=[{**BASE["specialists"][0], "lr": 0.02}])
    assert [same(a, b) for a, b in zip(own, common)] == [True, False, True]
    assert [same(a, b) for a, b in zip(own, slow)] == [False, True, False]
    assert all(map(same, entry, slow))


@pytest.mark.parametrize("given", [[0.1], {"a": 0.1}, {-1: 0.1}, {0: 0}, {0: "fast"}, {0: True}, {0: float("nan")}])
def test_what_is_no_rate_is_named(given):
    with pytest.raises(UserError, match=r"^learning_rates"):
        rates_by_client(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"clients": 2, "learning_rates": {2: 0.1}}}, "learning_rates.2: there is no such client: .* 1"),
        ({"federation": {"learning_rates": {0: -1}}}, "federation.learning_rates.0: expected a number above 0, got -1"),
        ({"specialists": [{"target": "mlp", "lr": 0}]}, "specialists.0.lr: must be"),
        (
            {
                "specialists": [{"target": "mlp", "lr": 0.1}],
                "local_training": {"optimizer": {"target": f"{__name__}.Fixed", "args": {}}},
            },
            "specialists.0.lr: local_training.optimizer is .*Fixed, which takes no lr",
        ),
    ],
)
def test_a_recipe_says_what_is_wrong(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


class Fixed(torch.optim.SGD):
    """An optimiser whose learning rate nobody chooses."""

    def __init__(self, params):
        super().__init__(params, 0.1)
