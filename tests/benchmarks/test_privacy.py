"""benchmarks/privacy.py on its smallest job: noise covers what is claimed, and a broken claim fails the script."""

import csv
import json
import math

import pytest

from tests.benchmarks.scripts import load_script

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")


@pytest.fixture(scope="module")
def script():
    return load_script("privacy")


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    place = tmp_path_factory.mktemp("privacy")
    assert script.main(arguments(place)) == 0
    return place


def arguments(folder):
    return ["--quick", "--seeds", "0", "--output", str(folder)]


def summary(folder, name):
    return json.loads((folder / name / "seed-0/summary.json").read_text(encoding="utf-8"))


def rows(folder):
    with open(folder / "privacy.csv", encoding="utf-8", newline="") as file:
        return {f"{row['mechanism']}-{float(row['epsilon']):g}": row for row in csv.DictReader(file)}


def test_the_table_says_what_the_runs_say(folder):
    table = rows(folder)
    assert set(table) == {f"{mechanism}-{ε}" for mechanism in ("dp_sgd", "votes", "responses") for ε in ("1", "inf")}
    free = summary(folder, "dp_sgd-inf")["metrics"]["student/test/accuracy"]
    for name, row in table.items():
        found = summary(folder, name)
        accuracy = found["metrics"]["student/test/accuracy"]
        assert float(row["accuracy"]) == accuracy and float(row["relative"]) == pytest.approx(accuracy / free)
        attack = found["audit"]["attacks"]["loss_threshold"]["metrics"]
        assert float(row["student_tpr"]) == attack["student/tpr_at_resolved_fpr"]
        assert float(row["specialists_auc"]) == attack["specialists/auc"]
        # 460 held-out digits do not tell 1 %; ten false positives are the least that count
        assert float(row["student_fpr"]) == pytest.approx(10 / 460)
        if row["epsilon"] == "inf":
            assert math.isinf(float(row["spent"])) and row["student_ceiling"] == ""
        else:
            assert 0.97 < float(row["spent"]) <= 1
            allowed = math.exp(float(row["spent"])) * 10 / 460 + 1e-5
            assert float(row["student_ceiling"]) == pytest.approx(allowed, rel=1e-6)
    # noise on what is sent does not protect a specialist from whoever gets it
    assert table["dp_sgd-1"]["specialists_ceiling"] and not table["votes-1"]["specialists_ceiling"]


def test_noise_covers_the_claim_by_the_exact_curve_of_gaussian_mechanisms(script):
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) of distance μ over deviation (Balle and Wang, 2018, theorem 8)."""
    from scipy.stats import norm

    def delta(epsilon, μ):
        return norm.cdf(μ / 2 - epsilon / μ) - math.exp(epsilon) * norm.cdf(-μ / 2 - epsilon / μ)

    for job in script.JOBS.values():
        for epsilon in (1.0, 2.0, 4.0, 8.0):
            voting = script.votes(job, epsilon)["method"]["args"]
            count = round(voting["proxy_fraction"] * job.public)
            # two counts of one row change by one vote each
            apart = math.sqrt(2 * count) / voting["private_release"]["args"]["noise"]
            answers = script.responses(job, epsilon)["method"]["args"]["private_release"]["args"]
            for μ in (apart, 1 / answers["noise_multiplier"]):
                assert 0.95e-5 < delta(epsilon, μ) <= 1e-5


def test_files_for_people(folder):
    text = (folder / "privacy.md").read_text(encoding="utf-8")
    assert text.startswith("digits, 4 sites, one round.") and "With ε = 1 for an example" in text
    assert (folder / "privacy.png").read_bytes().startswith(b"\x89PNG") and any((folder / "tensorboard").iterdir())


def test_a_broken_claim_fails(script, folder, capsys):
    """Complete runs are not run again; what they say is judged again."""
    place = folder / "dp_sgd-1/seed-0/summary.json"
    kept = place.read_text(encoding="utf-8")
    for change, sentence in (
        (lambda found: found["audit"].update(violations=["shows ε ≥ 3"]), "shows ε ≥ 3"),
        (lambda found: found["privacy"].update(epsilon=1.5), "its account says ε = 1.5, and 1 was asked for"),
    ):
        found = json.loads(kept)
        change(found)
        place.write_text(json.dumps(found), encoding="utf-8")
        assert script.main(arguments(folder)) == 1
        said = capsys.readouterr().out
        assert sentence in said and "FAILED" in said and said.count("complete already") == 6
    place.write_text(kept, encoding="utf-8")
