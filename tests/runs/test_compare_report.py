import csv
import io
import json
import math
import statistics

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from fdl.runs import compare_report
from fdl.runs.comparison import References
from tests.callbacks.fakes import record
from tests.callbacks.test_tensorboard import curves, hparams, read

STUDENT = "student/test/accuracy"
REFERENCES = References("centralized", "fedavg", "single_site")


def text_of(show, *arguments):
    console = Console(file=io.StringIO(), width=300)
    show(*arguments[:1], console, *arguments[1:])
    return console.file.getvalue()


def run(variant, seed, scores, sent=0, best=None, setup=11, delivery=100, seconds=10.0, clients=(), score="accuracy"):
    """A row whose student has these scores after each round, each of which sends as many bytes.

    Args:
        variant: its name.
        seed: its seed.
        scores: of the student on test data, by round from 1; empty where there is no student.
        sent: bytes a round, a quarter of them down.
        best: the best round on validation data; the last one by default.
        setup: bytes before round 1.
        delivery: bytes of bringing the student to all sites.
        seconds: in all.
        clients: scores of the clients' own models on test data.
        score: the metric.
    """
    rounds = len(scores) or 3
    own = {f"specialists/test/{score}": statistics.fmean(clients)} if clients else {}

    def one(round):
        metrics = own | ({f"student/test/{score}": scores[round - 1]} if scores else {})
        total = round * sent
        communication = {"upload_bytes": total - total // 4, "download_bytes": total // 4, "setup_bytes": setup}
        return {"round": round, "metrics": metrics, "communication": communication}

    history = [one(round) for round in range(1, rounds + 1)]
    best = history[(best or rounds) - 1]
    summary = {
        "method": f"method of {variant}",
        "score": {"metric": score, "higher_is_better": score == "accuracy"},
        "rounds": rounds,
        "best": {**best, "validation_samples": 50},
        "metrics": history[-1]["metrics"],
        "communication": {
            **history[-1]["communication"],
            "student_delivery_bytes": delivery if scores else 0,
            "by_kind": {},
        },
        "time": {"total_s": seconds},
        "participants": [{"id": i, "metrics": {f"test/{score}": value}} for i, value in enumerate(clients)],
        "history": history,
    }
    return {"variant": variant, "seed": seed, "summary": summary}


ROWS = [
    run("centralized", 0, [0.90], clients=()),
    run("centralized", 1, [0.50, 0.80]),
    run("fedavg", 0, [0.5, 0.86, 0.87, 0.81], 1_000, best=3),
    run("fedavg", 1, [0.77, 0.78, 0.70, 0.76], 1_000, best=1),
    run("ours", 0, [0.80, 0.87, 0.88], 20, best=2, seconds=4.0, clients=(0.3, 0.5, 0.7)),
    run("ours", 1, [0.76, 0.70, 0.79], 20, best=3, seconds=8.0, clients=(0.2, 0.3, 0.4)),
    run("single_site", 0, [], clients=(0.2, 0.4, 0.6), setup=0),
    run("single_site", 1, [], clients=(0.3, 0.3, 0.3), setup=0),
]


def table(rows=ROWS, reference="centralized", bytes_reference="fedavg", single_site="single_site"):
    lines = compare_report.compare_table(rows, References(reference, bytes_reference, single_site))
    return {line["variant"]: line for line in lines}


def test_means_and_deviations_over_seeds():
    ours = table()["ours"]
    assert (ours["method"], ours["seeds"], ours["validation_samples"]) == ("method of ours", 2, 50)
    expected = {"student_best": [0.87, 0.79], "student_last": [0.88, 0.79], "rounds_to_best": [2, 3], "seconds": [4, 8]}
    for name, values in expected.items():
        assert ours[f"{name}_mean"] == pytest.approx(np.mean(values))
        assert ours[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
    assert list(table()) == ["centralized", "fedavg", "ours", "single_site"]


def test_transfer_efficiency_is_of_the_last_round_and_taken_seed_by_seed():
    lines = table()
    ratios = [0.88 / 0.90, 0.79 / 0.80]
    assert lines["ours"]["kte_mean"] == pytest.approx(statistics.fmean(ratios))
    assert lines["ours"]["kte_std"] == pytest.approx(statistics.stdev(ratios))
    assert (lines["centralized"]["kte_mean"], lines["centralized"]["kte_std"]) == (1.0, 0.0)


def test_recovered_gap_counts_from_the_single_sites_of_the_same_seed():
    lines = table()
    gaps = [(0.88 - 0.4) / (0.90 - 0.4), (0.79 - 0.3) / (0.80 - 0.3)]
    assert lines["ours"]["recovered_gap_mean"] == pytest.approx(statistics.fmean(gaps))
    assert lines["centralized"]["recovered_gap_mean"] == 1
    assert table(single_site=None)["ours"]["recovered_gap_mean"] is None


@pytest.mark.parametrize("own", [(2.5, 2.5), (2.26, 2.26), (4.0, 4.0)], ids=["left alone", "taught", "harmed"])
def test_what_became_of_a_variant_s_own_models_does_not_move_the_zero_of_a_loss(own):
    rows = [
        run("centralized", 0, [2.0], score="nll"),
        run("single_site", 0, [], clients=(2.4, 2.6), score="nll"),
        run("ours", 0, [2.25], clients=own, score="nll"),
        run("fedavg", 0, [2.2], score="nll"),
    ]
    lines = table(rows)
    assert lines["ours"]["kte_mean"] == lines["ours"]["recovered_gap_mean"] == pytest.approx(0.5)
    assert lines["fedavg"]["recovered_gap_mean"] == pytest.approx(0.6)
    assert lines["ours"]["score"] == "nll"
    without = table(rows, single_site=None)["ours"]
    assert without["kte_mean"] is without["recovered_gap_mean"] is None


def test_the_loss_of_a_classifier_has_a_recovered_gap_too():
    rows = [run("centralized", 0, [0.9]), run("single_site", 0, [], clients=(0.5,)), run("ours", 0, [0.8])]
    for row, value in zip(rows, (0.5, 2.5, 1.0)):
        owner = "specialists" if row["variant"] == "single_site" else "student"
        row["summary"]["metrics"][f"{owner}/test/nll"] = value
    assert table(rows)["ours"]["recovered_gap_nll_mean"] == 0.75


def test_bytes_are_of_messages_and_together_with_what_goes_before_and_after_them():
    lines = table()
    ours = lines["ours"]
    assert (ours["bytes_total_mean"], ours["setup_bytes_mean"], ours["student_delivery_bytes_mean"]) == (60, 11, 100)
    assert ours["bytes_all_mean"] == 60 + 11 + 100
    assert ours["bytes_to_best_mean"] == (40 + 60) / 2
    # all rounds of both: FedAvg's is not cut at the round that happened to be best
    assert ours["bytes_total_percent_mean"] == pytest.approx(100 * 60 / 4_000)
    assert ours["bytes_all_percent_mean"] == pytest.approx(100 * 171 / 4_111)
    assert lines["fedavg"]["bytes_total_percent_mean"] == lines["fedavg"]["bytes_all_percent_mean"] == 100
    assert lines["centralized"]["bytes_total_percent_mean"] == 0


def test_bytes_to_an_equal_target_end_with_the_first_round_that_reaches_it():
    # 95 % of 0.90 is 0.855 and of 0.80 is 0.76; 98 % are 0.882 and 0.784
    lines = table()
    ours, fedavg = lines["ours"], lines["fedavg"]
    assert (ours["reached_95"], ours["reached_98"]) == (2, 1)
    assert ours["rounds_to_95_mean"] == (2 + 1) / 2 and fedavg["rounds_to_95_mean"] == (2 + 1) / 2
    assert ours["bytes_to_95_mean"] == (40 + 20) / 2
    assert ours["bytes_to_95_all_mean"] == (40 + 20) / 2 + 111
    assert ours["bytes_to_95_percent_mean"] == pytest.approx(50 * (40 / 2_000 + 20 / 1_000))
    assert ours["bytes_to_95_all_percent_mean"] == pytest.approx(50 * (151 / 2_111 + 131 / 1_111))
    # a mean over the seeds that got there would flatter
    assert ours["bytes_to_98_mean"] is ours["rounds_to_98_mean"] is ours["bytes_to_98_percent_mean"] is None
    assert fedavg["reached_98"] == 0
    assert lines["centralized"]["rounds_to_98_mean"] == (1 + 2) / 2


def test_a_loss_reaches_a_target_on_the_way_from_the_single_sites():
    rows = [
        run("centralized", 0, [2.0], score="nll"),
        run("single_site", 0, [], clients=(3.0,), score="nll"),
        run("ours", 0, [2.5, 2.06, 2.04, 2.03], 10, score="nll"),
    ]
    line = table(rows)["ours"]
    assert (line["rounds_to_95_mean"], line["bytes_to_95_mean"]) == (3, 30)  # 3 - 0.95 is 2.05, 3 - 0.98 is 2.02
    assert (line["reached_98"], line["rounds_to_98_mean"]) == (0, None)
    assert table(rows, single_site=None)["ours"]["rounds_to_95_mean"] is None


def test_differences_are_paired_by_seed():
    line = table([*ROWS, run("ours", 2, [0.1])])["ours"]  # a seed that the others lack does not count
    for key, theirs in (("vs_reference", [0.90, 0.80]), ("vs_bytes_reference", [0.81, 0.76])):
        found = ttest_rel([0.88, 0.79], theirs)
        assert line[f"{key}_mean"] == pytest.approx(np.mean(np.subtract([0.88, 0.79], theirs)))
        assert (line[f"{key}_low"], line[f"{key}_high"]) == pytest.approx(tuple(found.confidence_interval(0.95)))
    lines = table()
    assert lines["centralized"]["vs_reference_mean"] is lines["single_site"]["vs_reference_mean"] is None
    one = table([row for row in ROWS if row["seed"] == 0])["ours"]
    assert one["vs_reference_mean"] == pytest.approx(-0.02) and one["vs_reference_low"] is None


def test_gains_are_by_client_against_its_own_model_trained_alone():
    line = table()["ours"]
    student = [np.array([0.68, 0.48, 0.28]), np.array([0.49] * 3)]
    own = [np.array([0.1, 0.1, 0.1]), np.array([-0.1, 0.0, 0.1])]
    for name, gains in (("student", student), ("specialist", own)):
        assert line[f"{name}_gain_mean"] == pytest.approx(np.mean([g.mean() for g in gains]))
        assert line[f"{name}_gain_min_mean"] == pytest.approx(np.mean([g.min() for g in gains]))
        assert line[f"{name}_gain_variance_mean"] == pytest.approx(np.mean([g.var() for g in gains]))
    jain = [g.sum() ** 2 / (3 * (g**2).sum()) for g in student]
    assert line["student_gain_jain_mean"] == pytest.approx(np.mean(jain))
    assert line["specialist_gain_jain_mean"] == pytest.approx(1)  # with seed 1 somebody loses: it is not defined
    fedavg = table()["fedavg"]
    assert fedavg["student_gain_mean"] == pytest.approx(np.mean([0.81 - 0.4, 0.76 - 0.3]))
    assert fedavg["specialist_gain_mean"] is None
    assert (
        table()["single_site"]["specialist_gain_mean"] is table(single_site=None)["ours"]["student_gain_mean"] is None
    )


def test_of_losses_less_is_a_gain():
    rows = [run("single_site", 0, [], clients=(3.0, 2.0), score="nll"), run("ours", 0, [2.5], score="nll")]
    line = table(rows)["ours"]
    assert (line["student_gain_mean"], line["student_gain_min_mean"]) == (0.0, -0.5)


def test_variant_without_student_reports_its_specialists_only():
    line = table()["single_site"]
    assert line["specialists_mean"] == pytest.approx((0.4 + 0.3) / 2)
    assert line["student_best_mean"] is line["student_last_mean"] is line["kte_mean"] is None


def test_ratio_uses_the_seeds_that_the_reference_has():
    lines = table([*ROWS, run("ours", 2, [0.1])])
    assert lines["ours"]["seeds"] == 3
    assert lines["ours"]["kte_mean"] == pytest.approx((0.88 / 0.90 + 0.79 / 0.80) / 2)


@pytest.mark.parametrize("reference", [None, "absent", "single_site"])
def test_without_reference_there_are_no_ratios(reference):
    line = table(reference=reference, bytes_reference=reference)["ours"]
    assert line["kte_mean"] is line["bytes_total_percent_mean"] is line["bytes_to_95_mean"] is None
    assert line["student_best_mean"] is not None


def test_one_seed_has_no_deviation_and_a_worthless_reference_no_ratio():
    line = table([run("centralized", 0, [0.0]), run("ours", 0, [0.5])])["ours"]
    assert line["student_best_mean"] == 0.5
    assert line["student_best_std"] is line["kte_mean"] is None


def test_null_of_a_stored_summary_is_left_out():
    row = run("ours", 0, [0.5])
    row["summary"]["metrics"][STUDENT] = None
    row["summary"]["history"][0]["metrics"][STUDENT] = None
    assert table([*ROWS[:2], row, run("ours", 1, [0.7])])["ours"]["student_last_mean"] == 0.7


def test_a_run_of_a_version_that_did_not_count_the_delivery_has_no_bytes_in_all():
    row = run("ours", 0, [0.9], 10)
    del row["summary"]["communication"]["student_delivery_bytes"], row["summary"]["best"]["validation_samples"]
    line = table([*ROWS[:4], row])["ours"]
    assert line["bytes_total_mean"] == line["bytes_to_95_mean"] == 10
    assert line["bytes_all_mean"] is line["bytes_to_95_all_mean"] is None


def test_csv_keeps_every_number(tmp_path):
    lines = compare_report.compare_table(ROWS, REFERENCES)
    compare_report.write_compare_csv(tmp_path / "compare.csv", lines)
    with open(tmp_path / "compare.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    for row, line in zip(stored, lines, strict=True):
        assert set(row) == {*line, "failed"} and row["failed"] == ""
        for key, value in line.items():
            text = row[key]
            assert text == "" if value is None else text == value if isinstance(value, str) else float(text) == value


def test_json_has_every_seed_and_every_client(tmp_path):
    compare_report.write_compare_json(tmp_path / "compare.json", ROWS, REFERENCES)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert list(found["references"].values()) == list(REFERENCES)
    ours = next(one for one in found["runs"] if (one["variant"], one["seed"]) == ("ours", 1))
    assert ours["recovered_gap"] == pytest.approx(0.98)
    assert ours["gains"]["specialist"] == pytest.approx({"0": -0.1, "1": 0.0, "2": 0.1})
    assert ours["gains"]["student"] == pytest.approx(dict.fromkeys("012", 0.49))
    alone = next(one for one in found["runs"] if one["variant"] == "single_site")
    assert alone["gains"] == {} and alone["student_last"] is None


def parts(text):
    """Each table of a page: title to rows, by the name of the variant, of cells by their titles."""
    found = {}
    for part in text.split("## ")[1:]:
        title, head, rule, *body = [line for line in part.splitlines() if line]
        names = head.strip("| ").split(" | ")
        rows = [line.strip("| ").split(" | ") for line in body if line.startswith("|")]
        assert head.count("|") == rule.count("|")
        found[title] = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    return found


def test_markdown_is_tables_and_a_legend(tmp_path):
    lines = compare_report.compare_table(ROWS, REFERENCES)
    compare_report.write_compare_markdown(tmp_path / "compare.md", lines, REFERENCES)
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    found = parts(text)
    assert list(found) == list(compare_report.REPORT_SECTIONS)
    quality = found["Quality"]["ours"]
    assert quality["Seeds"] == "2" and quality["Student, last round"] == "0.8350 ± 0.0636"
    assert quality["Δ fedavg"] == "+0.0500 [-0.2041, +0.3041]" and quality["Δ centralized"].startswith("-0.0150 [")
    assert quality["Student, best round"] == "0.8300 ± 0.0566"
    sent = found["Bytes, all rounds"]["ours"]
    assert (sent["Messages"], sent["Messages, %"], sent["Together"]) == ("60 bytes", "1.50 ± 0.00", "171 bytes")
    target = found["Bytes to an equal target"]
    assert target["ours"]["Messages, 95 %"] == "30 bytes" and target["ours"]["Round, 98 %"] == "by 1 of 2 seeds only"
    assert target["single_site"]["Messages, 95 %"] == "-"
    gain = found["Gain of each site from participation"]["ours"]
    assert gain["Student: least"] == "0.3850 ± 0.1485" and gain["Own model: Jain"] == "1.0000"
    legend = text.splitlines()[-1]
    assert "share of centralized's" in legend and "fedavg's bytes" in legend and "50 validation samples" in legend
    assert "from the mean model of single_site to centralized" in legend


def test_columns_that_say_nothing_are_left_out_of_what_people_read(tmp_path):
    lines = compare_report.compare_table(ROWS)
    compare_report.write_compare_markdown(tmp_path / "compare.md", lines)
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert not any(word in text for word in ("KTE", "%", "Δ", "gain", "target"))
    assert "KTE" not in text_of(compare_report.print_compare, lines)


@pytest.mark.parametrize("width", [40, 300])
def test_printed_comparison_is_whole_on_any_screen(width):
    lines = compare_report.compare_table([*ROWS, run("with[brackets]", 0, [0.5])], REFERENCES)
    console = Console(file=io.StringIO(), width=width)
    compare_report.print_compare(lines, console, REFERENCES)
    text = console.file.getvalue()
    ours = next(line.split("  ") for line in text.splitlines() if line.strip().startswith("ours"))
    cells = [cell.strip() for cell in ours if cell.strip()]
    assert cells == [
        "ours",
        "2",
        "0.8350 ± 0.0636",
        "0.9826 ± 0.0069",
        "0.9700 ± 0.0141",
        "60 bytes",
        "171 bytes",
        "4.16 ± 0.00",
        "9.47 ± 3.28",
        "6.0 ± 2.8",
    ]
    assert "with[brackets]" in text
    assert "share of centralized's" in " ".join(text.split())


def test_comparison_in_tensorboard_has_a_run_a_row_however_often_it_is_written(tmp_path):
    rows = [run("ours", 0, [0.9]), run("ours", 1, [0.8]), run("single_site", 1, [], clients=(0.2, 0.4))]
    for row in rows[:2]:
        row["summary"]["history"] = [record(1), record(2) | {"metrics": {STUDENT: 0.7, "distil/loss": None}}]
        row["summary"]["rounds"] = 2
    for row in rows:
        for one in row["summary"]["history"]:
            one |= {key: record(1)[key] for key in ("cohort", "dropped", "refused", "seconds")}
    compare_report.log_compare(tmp_path, rows)
    compare_report.log_compare(tmp_path, rows, References(single_site="single_site"))
    folders = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert folders == ["ours-seed0", "ours-seed1", "single_site-seed1"]
    events = read(tmp_path / "tensorboard" / "ours-seed1")
    shown = curves(events)
    assert shown[STUDENT] == pytest.approx({1: 0.6, 2: 0.7})
    assert shown[f"by_kilobytes/{STUDENT}"] == pytest.approx({9: 0.6, 18: 0.7})
    assert shown["compare/student_gain"] == pytest.approx({2: 0.5}) and "compare/kte" not in shown
    assert shown["best_on_validation/validation_samples"] == {2: 50}
    assert not any(tag.startswith("clients/") for tag in shown)
    values, metrics = hparams(events)
    assert values == {"variant": "ours", "method": "method of ours", "seed": 1}
    assert {STUDENT, "compare/student_gain_min", f"best_on_validation/{STUDENT}"} <= set(metrics)


def test_legend_of_a_loss():
    rows = [run(name, 0, [2.0], score="nll") for name in ("centralized", "ours")]
    lines = compare_report.compare_table(rows, References("centralized"))
    legend = compare_report.compare_caption(lines, References("centralized"))
    assert "NLL on test data, less is better" in legend and "KTE" not in legend
    assert not any(math.isfinite(line["kte_mean"] or math.nan) for line in lines)
