import csv
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fdl import report
from tests.callbacks.fakes import FakeLoop, record
from tests.callbacks.test_tensorboard import curves, hparams, read

STUDENT, VALIDATION = "student/test/accuracy", "student/validation/accuracy"


@pytest.fixture
def loop(tmp_path):
    loop = FakeLoop(tmp_path)
    loop.history = [record(round) for round in (1, 2, 3)]
    loop.round = 3
    return loop


def text_of(show, *arguments):
    console = Console(file=io.StringIO(), width=300)
    show(*arguments[:1], console, *arguments[1:])
    return console.file.getvalue()


# --- one run


def test_summary_has_its_stable_keys(loop):
    summary = report.summarise(loop)
    keys = "name method seed rounds metrics best history communication time memory participants environment"
    assert " ".join(summary) == keys
    assert (summary["name"], summary["method"], summary["seed"], summary["rounds"]) == ("tiny", "fedprox", 4, 3)
    assert summary["metrics"] == record(3)["metrics"]
    assert summary["history"] == [record(1), record(2), record(3)]
    assert summary["communication"] == {**loop.ledger.totals(), "by_kind": loop.ledger.by_kind()}
    assert set(summary["environment"]) == {"python", "torch", "lightning", "fdl", "platform", "device", "cpus"}
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["environment"]["device"] == "cpu"


def test_times_are_the_parts_and_their_sum_unless_the_total_is_given(loop):
    assert report.summarise(loop)["time"] == {"total_s": 1.875, "clients_s": 1.0, "server_s": 0.5, "evaluate_s": 0.25}
    assert report.summarise(loop, 9.0)["time"]["total_s"] == 9.0


def test_memory_is_in_bytes(loop):
    block = np.ones(8 << 20)  # 64 MiB
    memory = report.summarise(loop)["memory"]
    assert block.nbytes < memory["peak_rss_bytes"] < 1 << 36
    assert (memory["peak_device_bytes"] is None) == (not torch.cuda.is_available())


def test_best_round_is_the_first_of_the_highest_validation_accuracy(loop):
    loop.history.append(record(4))  # as good as round 2 on validation data, better on test data
    best = report.summarise(loop)["best"]
    assert best == {key: record(2)[key] for key in ("round", "metrics", "communication")}


@pytest.mark.parametrize("value", [None, math.nan])
def test_without_validation_the_last_round_is_the_best(loop, value):
    for one in loop.history:
        one["metrics"].pop(VALIDATION)
        if value is not None:
            one["metrics"][VALIDATION] = value
    assert report.summarise(loop)["best"]["round"] == 3


def test_run_without_any_round_has_a_summary(tmp_path):
    summary = report.summarise(FakeLoop(tmp_path))
    assert (summary["rounds"], summary["metrics"], summary["best"]["round"]) == (0, {}, 0)


def test_participants_have_the_newest_value_of_each_metric(loop):
    del loop.history[2]["clients"]["1"]  # not asked in round 3
    first, second, _ = report.summarise(loop)["participants"]
    assert first == {
        "id": 0,
        "samples": 2,
        "architecture": "mlp",
        "parameters": 4 * 3 + 3,
        "metrics": {"fit/loss": 0.3, "test/accuracy": 0.0},
    }
    assert second["metrics"] == {"fit/loss": 1.2, "test/accuracy": 1 / 3}


def test_clients_without_a_specialist_count_as_the_student(loop):
    for client in loop.clients:
        client.state = {}
    entry = report.summarise(loop)["participants"][0]
    assert (entry["architecture"], entry["parameters"]) == ("student", 10 * 3 + 3)


def test_written_summary_is_strict_json_in_full_precision(tmp_path):
    path = tmp_path / "summary.json"
    values = {"third": 1 / 3, "nan": math.nan, "list": [math.inf, np.float64(0.1), np.int64(3), torch.tensor(True)]}
    report.write_summary(path, values | {"folder": tmp_path, "none": None, "text": "α"})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse) == {
        "third": 1 / 3,
        "nan": None,
        "list": [None, 0.1, 3, True],
        "folder": str(tmp_path),
        "none": None,
        "text": "α",
    }
    assert list(tmp_path.iterdir()) == [path]


def test_closing_table_says_all_that_matters(loop, tmp_path):
    text = text_of(report.print_table, report.summarise(loop), tmp_path)
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert "0.8000  (0.7000 in round 2, best on validation)" in lines["Student, test accuracy"]
    assert "0.4000 on average  (0.0000 to 0.6667)" in lines["Specialists, test accuracy"]
    assert "4.1 kB  (4,096 bytes)" in lines["Sent up by clients"]
    assert "1.0 kB  (1,024 bytes)" in lines["Sent down to clients"]
    assert "7 bytes" in lines["Sent once, before (encoder)"]
    assert "1, of client 1" in lines["Messages refused"]
    assert lines["Rounds"].split()[-1] == "3"
    assert "1.9  (clients 1.0, server 0.5, evaluate 0.2)" in lines["Seconds"]
    assert f"Run folder: {tmp_path}\n" in text
    assert f"To look at it: tensorboard --logdir {tmp_path}\n" in text
    assert "tiny (fedprox)" in text


def test_closing_table_reads_a_stored_summary_and_leaves_out_what_there_is_not(loop, tmp_path):
    for one in loop.history:
        one["metrics"] = {STUDENT: math.nan, "specialists/test/accuracy": 0.5}
        one["refused"] = {}
    report.write_summary(tmp_path / "summary.json", report.summarise(loop))
    text = text_of(report.print_table, json.loads((tmp_path / "summary.json").read_text()), tmp_path)
    assert "Student" not in text and "refused" not in text
    assert "Specialists, test accuracy" in text


def test_closing_table_needs_no_unicode_terminal(loop, tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    report.print_table(report.summarise(loop), Console(file=stream, width=200), tmp_path)
    stream.flush()
    assert b"Student, test accuracy" in raw.getvalue()


# --- many runs


def run(variant, seed, student, last=None, up=1000, total=2000, best=3, seconds=10.0, specialists=0.5):
    """A row whose best round has sent `up` bytes and its last `total`."""

    def metrics(value):
        return {"specialists/test/accuracy": specialists} | ({} if value is None else {STUDENT: value})

    def sent(nbytes):
        return {"upload_bytes": nbytes - nbytes // 4, "download_bytes": nbytes // 4, "setup_bytes": 11}

    summary = {
        "method": f"method of {variant}",
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
    return {line["variant"]: line for line in report.compare_table(rows, reference, bytes_reference)}


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
    lines = report.compare_table(ROWS, "centralized", "fedavg")
    report.write_compare_csv(tmp_path / "compare.csv", lines)
    with open(tmp_path / "compare.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    for row, line in zip(stored, lines, strict=True):
        assert set(row) == set(line)
        for key, value in line.items():
            text = row[key]
            assert text == "" if value is None else text == value if isinstance(value, str) else float(text) == value


def test_markdown_is_a_table_and_a_legend(tmp_path):
    lines = report.compare_table(ROWS, "centralized", "fedavg")
    report.write_compare_markdown(tmp_path / "compare.md", lines, "centralized", "fedavg")
    head, rule, *body = (tmp_path / "compare.md").read_text(encoding="utf-8").splitlines()
    assert head.count("|") == rule.count("|") == body[0].count("|")
    cells = dict(zip(head.strip("| ").split(" | "), body[2].strip("| ").split(" | "), strict=True))
    assert cells["Variant"] == "ours" and cells["Seeds"] == "2"
    assert cells["Student, best round"] == "0.8350 ± 0.0778"
    assert cells["Bytes, all rounds"] == "4.0 kB" and cells["% all rounds"] == "3.00 ± 1.41"
    assert body[3].startswith("| single_site | 2 | - | - | 0.5000 ± 0.0000 | - |")
    assert "share of centralized's" in body[-1] and "fedavg's bytes" in body[-1]


def test_columns_that_say_nothing_are_left_out_of_what_people_read(tmp_path):
    lines = report.compare_table(ROWS)
    report.write_compare_markdown(tmp_path / "compare.md", lines)
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "KTE" not in text and "%" not in text
    assert "KTE" not in text_of(report.print_compare, lines)


@pytest.mark.parametrize("width", [40, 300])
def test_printed_comparison_is_whole_on_any_screen(width):
    lines = report.compare_table([*ROWS, run("with[brackets]", 0, 0.5)], "centralized", "fedavg")
    console = Console(file=io.StringIO(), width=width)
    report.print_compare(lines, console, "centralized", "fedavg")
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


def test_what_people_copy_is_not_broken_over_lines(loop):
    folder = Path("/a/rather/long/[folder] of runs") / ("x" * 90)
    console = Console(file=io.StringIO(), width=60)
    report.print_table(report.summarise(loop), console, folder)
    assert f"tensorboard --logdir '{folder}'\n" in console.file.getvalue()


def test_comparison_in_tensorboard_has_a_run_a_row_however_often_it_is_written(tmp_path):
    rows = [run("ours", 0, 0.9), run("ours", 1, 0.8)]
    for row in rows:
        row["summary"]["history"] = [record(1), record(2) | {"metrics": {STUDENT: 0.7, "distil/loss": None}}]
    report.log_compare(tmp_path, rows)
    report.log_compare(tmp_path, rows)
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["ours-seed0", "ours-seed1"]
    events = read(tmp_path / "tensorboard" / "ours-seed1")
    shown = curves(events)
    assert shown[STUDENT] == pytest.approx({1: 0.6, 2: 0.7})
    assert shown[f"by_kilobytes/{STUDENT}"] == pytest.approx({9: 0.6, 18: 0.7})
    assert not any(tag.startswith("clients/") for tag in shown)
    values, metrics = hparams(events)
    assert values == {"variant": "ours", "method": "method of ours", "seed": 1}
    assert STUDENT in metrics
