"""The grid of attacks and defences: which cells there are, and how its figures are worked out."""

import csv

import pytest

from tests.benchmarks.scripts import load_script

robustness = load_script("robustness")


def test_the_recipe_has_every_adversary_and_the_grid_every_pair(tmp_path):
    from fdl.registry.kinds import KINDS
    from fdl.registry.plugins import short_names

    cells = robustness.crossed("responses", None, ["cronus"], [0.1, 0.4], [0, 3], robustness.QUICK, tmp_path)
    attacks = {cell.attack for cell in cells}
    assert attacks == {*short_names(KINDS["adversary"]), "honest"}
    # for each seed: without liars once, of the silent only the mean, else both defences at each share
    assert len(cells) == 2 * (2 + 2 * (1 + 2 * (len(attacks) - 2)))
    assert cells[0][:3] == ("honest", 0.0, "mean") and cells[0].recipe.adversaries == []
    one = next(cell for cell in cells if cell[:4] == ("sybil", 0.4, "cronus", 3)).recipe
    assert (one.seed, one.adversaries[0].fraction) == (3, 0.4) and one.method.args["robust"]["target"] == "cronus"
    assert len({cell.folder for cell in cells}) == len({cell.recipe.name for cell in cells}) == len(cells)


def test_in_the_space_of_parameters_nobody_attacks_answers(tmp_path):
    few = ["sign_flip", "backdoor"]
    cells = robustness.crossed("parameters", few, ["median"], [0.2], [0], robustness.QUICK, tmp_path)
    assert {cell.recipe.method.target for cell in cells} == {"fedavg"}
    assert {cell.recipe.method.args.get("robust") is None for cell in cells} == {True, False}
    assert {cell.attack for cell in cells} == {"honest", *few}
    for attack in ("least_likely", "sybil"):  # the sybils of the recipe are of one that attacks answers
        with pytest.raises(SystemExit, match=f"no such attack: {attack}"):
            robustness.crossed("parameters", [attack], None, [0.2], [0], robustness.QUICK, tmp_path)


def test_who_is_wrongly_suppressed():
    def record(plain, *factors):
        named = {f"robust/plain/{i}": share for i, share in enumerate(plain)}
        return {
            "metrics": {
                "student/test/accuracy": 0.5,
                **named,
                **{f"robust/weight/{i}": f for i, f in enumerate(factors)},
            }
        }

    even = [record([0.25] * 4, 1, 1, 1, 1)] * 2
    # of the honest 0, 1, 2 all are due a third; 2 is given 0.6 / 2.6, then 0.1 / 2.1: 0.42 of its third on average
    history = [record([0.25] * 4, 1.0, 1.0, 0.6, 0.1), record([1e-9] * 3 + [1.0], 2e9, 2e9, 0.2e9, 0.1)]
    assert robustness.suppressed(history, even, minority=[1, 2, 3], liars={3}) == 0.5
    assert robustness.suppressed(history, even, minority=[0, 1], liars={3}) == 0.0
    assert robustness.suppressed(history, even, minority=[3], liars={3}) is None
    assert robustness.suppressed([record([])], even, minority=[0], liars=set()) is None
    # who has little in the plain mean, too, is not suppressed
    uneven = [record([0.6, 0.3, 0.1], 1, 1, 1)]
    assert robustness.suppressed(uneven, uneven, minority=[2], liars=set()) == 0.0
    assert robustness.suppressed([record([0.6, 0.3, 0.1], 1, 1, 0)], uneven, minority=[2], liars=set()) == 1.0


def test_an_expert_has_more_than_four_equal_shares_of_a_class(tmp_path):
    from fdl.build import build

    cell = robustness.crossed("responses", ["least_likely"], ["mean"], [0.2], [1], robustness.QUICK, tmp_path)[0]
    found = robustness.experts([cell])[1]
    counts = [client.train.labels.bincount(minlength=10) for client in build(cell.recipe, tmp_path).clients]
    total = sum(counts)
    expected = [i for i, own in enumerate(counts) if any(11 * own[c] > 4 * total[c] for c in range(10))]
    assert found == expected and 0 < len(found) < 11


def test_the_bar_is_the_worst_of_its_attacks():
    rows = [
        {"attack": attack, "share": 0.2, "defence": "fltrust", "loss_points": loss}
        for attack, loss in (
            ("least_likely", 0.5),
            ("class_confusion", 1.5),
            ("sign_flip", -0.5),
            ("random_class", 9.0),
        )
    ]
    assert robustness.bars(rows) == {"fltrust": 1.5}
    assert robustness.bars(rows[1:]) == {}


@pytest.mark.slow
def test_the_grid_is_run_once_and_written(tmp_path, capsys):
    arguments = ["--quick", "--attacks", "least_likely", "backdoor", "--defences", "median", "--seeds", "0"]
    assert robustness.main([*arguments, "--output", str(tmp_path)]) == 0
    first = (tmp_path / "robustness.csv").read_text()
    with open(tmp_path / "robustness.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["attack"], row["defence"]) for row in rows][:2] == [("honest", "mean"), ("honest", "median")]
    assert len(rows) == 6 and rows[0]["loss_points"] == "0.0"
    for row in rows:
        assert float(row["loss_points"]) == pytest.approx(100 * (float(rows[0]["accuracy"]) - float(row["accuracy"])))
        assert (row["suppressed_minority"] == "") == (row["defence"] == "mean")
    assert (tmp_path / "robustness.png").stat().st_size > 1000 and list((tmp_path / "tensorboard").iterdir())
    assert "| least_likely | 40 % |" in (tmp_path / "robustness.md").read_text()
    capsys.readouterr()
    assert robustness.main([*arguments, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("complete already") == 6
    assert (tmp_path / "robustness.csv").read_text() == first
