import csv
import io
import statistics

import numpy as np
import pytest
from rich.console import Console

from fdl import compare_report
from tests.callbacks.fakes import record
from tests.callbacks.test_tensorboard import curves, hparams, read

STUDENT = "student/test/accuracy"


def text_of(show, *arguments):
    console = Console(file=io.StringIO(), width=300)
    show(*arguments[:1], console, *arguments[1:])
    return console.file.getvalue()


def run(variant, seed, student, last=None, up=1000, total=2000, best=3, seconds=10.0, specialists=0.5):
    """A row whose best round has sent `up` bytes and its last `total`."""

    def metrics(value):
        return {"specialists/test/accuracy": specialists} | ({} if value is None else {STUDENT: value})

    def sent(nbytes):
        return {"upload_bytes": nbytes - nbytes // 4, "download_bytes": nbytes // 4, "setup_bytes": 11}

    summary = {
        "method": f"method of {variant}",
        "score": {"metric": "accuracy", "higher_is_better": True},
        "best": {"round": best, "metrics": metrics(student), "communication": sent(up)},
        "metrics": metrics(student if last is None else last),
        "communication": {**sent(total), "by_kind": {}},
        "time": {"total_s": seconds},
        "history": [],
    }
    return {"variant": variant, "seed": seed, "summary": summary}


ROWS = [
    run("centralized", 0, 0.90, up=0, total=0),
    run("centralized", 1, 0.80, up=0, total=0),
    run("fedavg", 0, 0.81, up=100_000, total=300_000),
    run("fedavg", 1, 0.76, up=200_000, total=300_000),
    run("ours", 0, 0.89, last=0.88, up=1_000, total=4_000, best=2, seconds=4.0),
    run("ours", 1, 0.78, last=0.79, up=1_000, total=4_000, best=5, seconds=8.0),
    run("single_site", 0, None, up=0, total=0),
    run("single_site", 1, None, up=0, total=0),
]


def table(rows=ROWS, reference="centralized", bytes_reference="fedavg"):
    return {line["variant"]: line for line in compare_report.compare_table(rows, reference, bytes_reference)}


def test_means_and_deviations_over_seeds():
    ours = table()["ours"]
    assert (ours["method"], ours["seeds"]) == ("method of ours", 2)
    expected = {"student_best": [0.89, 0.78], "student_last": [0.88, 0.79], "rounds_to_best": [2, 5], "seconds": [4, 8]}
    for name, values in expected.items():
        assert ours[f"{name}_mean"] == pytest.approx(np.mean(values))
        assert ours[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
    assert list(table()) == ["centralized", "fedavg", "ours", "single_site"]


def test_transfer_efficiency_is_taken_seed_by_seed():
    lines = table()
    ratios = [0.89 / 0.90, 0.78 / 0.80]
    assert lines["ours"]["kte_mean"] == pytest.approx(statistics.fmean(ratios))
    assert lines["ours"]["kte_std"] == pytest.approx(statistics.stdev(ratios))
    assert (lines["centralized"]["kte_mean"], lines["centralized"]["kte_std"]) == (1.0, 0.0)


def test_bytes_are_both_ways_and_relative_to_the_references_best_round():
    lines = table()
    assert lines["ours"]["bytes_to_best_mean"] == 1_000 and lines["ours"]["bytes_total_mean"] == 4_000
    assert lines["ours"]["bytes_to_best_percent_mean"] == pytest.approx((1.0 + 0.5) / 2)
    assert lines["ours"]["bytes_total_percent_mean"] == pytest.approx((4.0 + 2.0) / 2)
    assert lines["fedavg"]["bytes_to_best_percent_mean"] == 100
    assert lines["centralized"]["bytes_total_percent_mean"] == 0
    assert lines["ours"]["setup_bytes_mean"] == 11


def test_variant_without_student_reports_its_specialists_only():
    line = table()["single_site"]
    assert line["specialists_mean"] == 0.5
    assert line["student_best_mean"] is line["student_last_mean"] is line["kte_mean"] is None


def test_ratio_uses_the_seeds_that_the_reference_has():
    lines = table([*ROWS, run("ours", 2, 0.1)])
    assert lines["ours"]["seeds"] == 3
    assert lines["ours"]["kte_mean"] == pytest.approx((0.89 / 0.90 + 0.78 / 0.80) / 2)


@pytest.mark.parametrize("reference", [None, "absent", "single_site"])
def test_without_reference_there_are_no_ratios(reference):
    line = table(reference=reference, bytes_reference=reference)["ours"]
    assert line["kte_mean"] is line["bytes_total_percent_mean"] is None
    assert line["student_best_mean"] is not None


def test_one_seed_has_no_deviation_and_a_worthless_reference_no_ratio():
    line = table([run("centralized", 0, 0.0), run("ours", 0, 0.5)])["ours"]
    assert line["student_best_mean"] == 0.5
    assert line["student_best_std"] is line["kte_mean"] is None


def test_null_of_a_stored_summary_is_left_out():
    row = run("ours", 0, 0.5)
    row["summary"]["metrics"][STUDENT] = None
    assert table([row, run("ours", 1, 0.7)])["ours"]["student_last_mean"] == 0.7


def test_csv_keeps_every_number(tmp_path):
    lines = compare_report.compare_table(ROWS, "centralized", "fedavg")
    compare_report.write_compare_csv(tmp_path / "compare.csv", lines)
    with open(tmp_path / "compare.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    for row, line in zip(stored, lines, strict=True):
        assert set(row) == set(line)
        for key, value in line.items():
            text = row[key]
            assert text == "" if value is None else text == value if isinstance(value, str) else float(text) == value


def test_markdown_is_a_table_and_a_legend(tmp_path):
    lines = compare_report.compare_table(ROWS, "centralized", "fedavg")
    compare_report.write_compare_markdown(tmp_path / "compare.md", lines, "centralized", "fedavg")
    head, rule, *body = (tmp_path / "compare.md").read_text(encoding="utf-8").splitlines()
    assert head.count("|") == rule.count("|") == body[0].count("|")
    cells = dict(zip(head.strip("| ").split(" | "), body[2].strip("| ").split(" | "), strict=True))
    assert cells["Variant"] == "ours" and cells["Seeds"] == "2"
    assert cells["Student, best round"] == "0.8350 ± 0.0778"
    assert cells["Bytes, all rounds"] == "4.0 kB" and cells["% all rounds"] == "3.00 ± 1.41"
    assert body[3].startswith("| single_site | 2 | - | - | 0.5000 ± 0.0000 | - |")
    assert "share of centralized's" in body[-1] and "fedavg's bytes" in body[-1]


def test_columns_that_say_nothing_are_left_out_of_what_people_read(tmp_path):
    lines = compare_report.compare_table(ROWS)
    compare_report.write_compare_markdown(tmp_path / "compare.md", lines)
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "KTE" not in text and "%" not in text
    assert "KTE" not in text_of(compare_report.print_compare, lines)


@pytest.mark.parametrize("width", [40, 300])
def test_printed_comparison_is_whole_on_any_screen(width):
    lines = compare_report.compare_table([*ROWS, run("with[brackets]", 0, 0.5)], "centralized", "fedavg")
    console = Console(file=io.StringIO(), width=width)
    compare_report.print_compare(lines, console, "centralized", "fedavg")
    text = console.file.getvalue()
    ours = next(line.split("  ") for line in text.splitlines() if line.strip().startswith("ours"))
    cells = [cell.strip() for cell in ours if cell.strip()]
    assert cells == [
        "ours",
        "2",
        "0.8350 ± 0.0778",
        "0.5000 ± 0.0000",
        "0.9819 ± 0.0098",
        "1.0 kB",
        "0.75 ± 0.35",
        "6.0 ± 2.8",
    ]
    assert "with[brackets]" in text
    assert "share of centralized's" in " ".join(text.split())


def test_comparison_in_tensorboard_has_a_run_a_row_however_often_it_is_written(tmp_path):
    rows = [run("ours", 0, 0.9), run("ours", 1, 0.8)]
    for row in rows:
        row["summary"]["history"] = [record(1), record(2) | {"metrics": {STUDENT: 0.7, "distil/loss": None}}]
    compare_report.log_compare(tmp_path, rows)
    compare_report.log_compare(tmp_path, rows)
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["ours-seed0", "ours-seed1"]
    events = read(tmp_path / "tensorboard" / "ours-seed1")
    shown = curves(events)
    assert shown[STUDENT] == pytest.approx({1: 0.6, 2: 0.7})
    assert shown[f"by_kilobytes/{STUDENT}"] == pytest.approx({9: 0.6, 18: 0.7})
    assert not any(tag.startswith("clients/") for tag in shown)
    values, metrics = hparams(events)
    assert values == {"variant": "ours", "method": "method of ours", "seed": 1}
    assert STUDENT in metrics


def test_transfer_of_a_loss_counts_from_the_mean_specialist_to_the_reference():
    rows = []
    for variant, student in (("centralized", 2.0), ("ours", 2.25)):
        row = run(variant, 0, None)
        row["summary"]["score"] = {"metric": "nll", "higher_is_better": False}
        for part in (row["summary"]["metrics"], row["summary"]["best"]["metrics"]):
            part |= {"student/test/nll": student, "specialists/test/nll": 3.0}
        rows.append(row)
    table = compare_report.compare_table(rows, "centralized")
    assert [line["score"] for line in table] == ["nll", "nll"]
    assert [line["kte_mean"] for line in table] == pytest.approx([1.0, 0.75])
    assert "NLL on test data, less is better" in compare_report.compare_caption("centralized", None, "nll")
