import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fdl.federation import summary as report
from fdl.runs.report import print_summary, write_summary
from fdl.utils.stopwatch import PARTS
from tests.callbacks.fakes import FakeLoop, record

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


def test_summary_has_its_stable_keys(loop):
    summary = report.summarise(loop)
    keys = "name method seed score rounds metrics best history communication privacy time memory participants left_out"
    assert " ".join(summary) == f"{keys} environment audit"
    assert (summary["name"], summary["method"], summary["seed"], summary["rounds"]) == ("tiny", "fedprox", 4, 3)
    assert summary["metrics"] == record(3)["metrics"]
    assert summary["history"] == [record(1), record(2), record(3)]
    # the student has 4 · 3 weights and 3 biases in 4 bytes each, for three sites
    everything = {"student_delivery_bytes": 3 * 15 * 4, "total_bytes": 4096 + 1024 + 7 + 180}
    assert summary["communication"] == {**loop.ledger.totals(), **everything, "by_kind": loop.ledger.by_kind()}
    assert set(summary["environment"]) == {"python", "torch", "lightning", "fdl", "platform", "device", "cpus"}
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["environment"]["device"] == "cpu"


def test_times_are_the_parts_and_their_sum_unless_the_total_is_given(loop):
    parts = {"clients_s": 1.0, "server_s": 0.5, "evaluate_s": 0.25, "transfer_s": 0.0}
    parts["parts"] = dict.fromkeys(PARTS, 0.0)
    assert report.summarise(loop)["time"] == {"total_s": 1.875, **parts}
    loop.history[-1]["communication"]["transfer_s"] = 4.5
    assert report.summarise(loop)["time"]["transfer_s"] == 4.5
    assert report.summarise(loop, 9.0)["time"]["total_s"] == 9.0


def test_memory_is_in_bytes(loop):
    block = np.ones(8 << 20)  # 64 MiB
    memory = report.summarise(loop)["memory"]
    assert block.nbytes < memory["peak_rss_bytes"] < 1 << 36
    assert (memory["peak_device_bytes"] is None) == (not torch.cuda.is_available())


def test_best_round_is_the_first_of_the_highest_validation_accuracy(loop):
    loop.history.append(record(4))  # as good as round 2 on validation data, better on test data
    best = report.summarise(loop)["best"]
    assert best == {key: record(2)[key] for key in ("round", "metrics", "communication")} | {"validation_samples": 8}


def test_of_rounds_that_tie_the_most_likely_is_the_best(loop):
    for one in loop.history:
        one["metrics"][VALIDATION] = 0.9
        one["metrics"]["student/validation/nll"] = {1: 0.3, 2: 0.2, 3: 0.4}[one["round"]]
    assert report.summarise(loop)["best"]["round"] == 2


@pytest.mark.parametrize("value", [None, math.nan])
def test_without_validation_the_last_round_is_the_best(loop, value):
    for one in loop.history:
        one["metrics"].pop(VALIDATION)
        if value is not None:
            one["metrics"][VALIDATION] = value
    best = report.summarise(loop)["best"]
    assert (best["round"], best["validation_samples"]) == (3, 0)


def test_without_a_student_nothing_is_delivered(loop, tmp_path):
    loop.server.student = None
    sent = report.summarise(loop)["communication"]
    assert (sent["student_delivery_bytes"], sent["total_bytes"]) == (0, 4096 + 1024 + 7)
    assert "Delivery of the student" not in text_of(print_summary, report.summarise(loop), tmp_path)


def test_frozen_public_weights_are_not_delivered_and_tied_ones_once(loop):
    student = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10), torch.nn.Linear(10, 10))
    student[2].weight = student[1].weight
    student.frozen = ("0.weight", "0.bias")
    loop.server.student = student
    assert report.summarise(loop)["communication"]["student_delivery_bytes"] == 3 * 4 * (100 + 10 + 10)


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


def test_written_summary_is_strict_json_in_full_precision(tmp_path):
    path = tmp_path / "summary.json"
    values = {"third": 1 / 3, "nan": math.nan, "list": [math.inf, np.float64(0.1), np.int64(3), torch.tensor(True)]}
    write_summary(path, values | {"folder": tmp_path, "none": None, "text": "α"})

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
    text = text_of(print_summary, report.summarise(loop), tmp_path)
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert "0.8000  (0.7000 in round 2, best on 8 validation samples)" in lines["Student, test accuracy"]
    assert "0.4000 on average  (0.0000 to 0.6667)" in lines["Specialists, test accuracy"]
    assert "4.1 kB  (4,096 bytes)" in lines["Sent up by clients"]
    assert "1.0 kB  (1,024 bytes)" in lines["Sent down to clients"]
    assert "7 bytes" in lines["Sent once, before round 1 (encoder)"]
    assert "180 bytes" in lines["Delivery of the student to all sites"]
    assert "5.3 kB  (5,307 bytes)" in lines["Total bytes"]
    assert "1, of client 1  (not finite)" in lines["Messages refused"]
    assert lines["Rounds"].split()[-1] == "3"
    assert "1.9  (clients 1.0, server 0.5, evaluate 0.2)" in lines["Seconds"]
    assert f"Run folder: {tmp_path}\n" in text
    assert f"To view it: tensorboard --logdir {tmp_path}\n" in text
    assert "tiny (fedprox)" in text


def test_closing_table_reads_a_stored_summary_and_leaves_out_what_there_is_not(loop, tmp_path):
    for one in loop.history:
        one["metrics"] = {STUDENT: math.nan, "specialists/test/accuracy": 0.5}
        one["refused"] = {}
    write_summary(tmp_path / "summary.json", report.summarise(loop))
    text = text_of(print_summary, json.loads((tmp_path / "summary.json").read_text()), tmp_path)
    assert "Student" not in text and "refused" not in text
    assert "Specialists, test accuracy" in text


def test_closing_table_needs_no_unicode_terminal(loop, tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(report.summarise(loop), Console(file=stream, width=200), tmp_path)
    stream.flush()
    assert b"Student, test accuracy" in raw.getvalue()


def test_what_people_copy_is_not_broken_over_lines(loop):
    folder = Path("/a/rather/long/[folder] of runs") / ("x" * 90)
    console = Console(file=io.StringIO(), width=60)
    print_summary(report.summarise(loop), console, folder)
    assert f"tensorboard --logdir '{folder}'\n" in console.file.getvalue()


def test_a_summary_of_an_earlier_version_can_be_read(loop, tmp_path):
    summary = report.summarise(loop)
    del summary["best"]["validation_samples"]
    del summary["communication"]["student_delivery_bytes"], summary["communication"]["total_bytes"]
    text = text_of(print_summary, summary, tmp_path)
    assert "(0.7000 in round 2, best on validation)" in text and "Total bytes" not in text
