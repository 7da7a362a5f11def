from collections import Counter

import pytest

from fdl.build.models import assign_specialists
from fdl.errors import RecipeError
from fdl.recipe import Component, from_mapping

BASE = {
    "method": "federated_distillation",
    "data": "digits",
    "student": "mlp",
    "federation": {"clients": 6},
}


def recipe(specialists, **federation):
    return from_mapping({**BASE, "specialists": specialists, "federation": {**BASE["federation"], **federation}})


def dealt(made):
    return [f"{made.specialists[entry].target}-{entry}" for entry in assign_specialists(made)]


def test_entries_are_dealt_in_turn():
    made = recipe(["mlp", "cnn"])
    assert dealt(made) == ["mlp-0", "cnn-1"] * 3


def test_named_clients_have_what_they_name_and_the_rest_goes_on_in_turn():
    made = recipe(["mlp", {"target": "cnn", "clients": [0, 4]}, "vit"])
    assert dealt(made) == ["cnn-1", "vit-2", "mlp-0", "vit-2", "cnn-1", "vit-2"]


def test_random_entries_follow_their_weights_and_the_seed_alone():
    made = recipe([{"target": "mlp", "weight": 3}, "cnn"], clients=400, assignment="random")
    drawn = dealt(made)
    # 4 standard deviations of a binomial share
    assert abs(Counter(drawn)["mlp-0"] / 400 - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    assert dealt(made) == drawn
    fewer = recipe([{"target": "mlp", "weight": 3}, "cnn"], clients=40, assignment="random")
    assert dealt(fewer) == drawn[:40]


@pytest.mark.parametrize(
    ("specialists", "message"),
    [
        ([{"target": "mlp", "clients": [6]}, "cnn"], "specialists.0.clients: there is no client 6: the ids are 0 … 5"),
        (
            [{"target": "mlp", "clients": [1]}, {"target": "cnn", "clients": [1]}, "vit"],
            "specialists.1.clients: client 1 has specialists.0 already",
        ),
        ([{"target": "mlp", "clients": [0, 1]}], "every entry names its clients, and none names client 2"),
        ([{"target": "mlp", "weight": 0}], "specialists.0.weight: must be > 0"),
        ([{"target": "mlp", "client": [0]}], "did you mean 'clients'"),
    ],
)
def test_what_cannot_be_assigned_is_refused(specialists, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        recipe(specialists)


def test_the_student_can_be_the_model_of_a_specialist():
    made = from_mapping({**BASE, "specialists": [{"target": "cnn", "weight": 2.0}], "student": "${specialists.0}"})
    assert made.student == Component("cnn", {})
