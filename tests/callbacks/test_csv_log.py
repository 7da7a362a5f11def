import csv
import os
import time

from fdl.callbacks.csv_log import CsvLog, flatten
from tests.callbacks.fakes import FakeLoop, record


def read(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_a_round_with_values_in_full_precision(tmp_path):
    FakeLoop(tmp_path).run(CsvLog())
    rows = read(tmp_path)
    assert [row["round"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        expected = record(int(row["round"]))
        assert float(row["student/test/accuracy"]) == expected["metrics"]["student/test/accuracy"]
        assert int(row["communication/upload_bytes"]) == expected["communication"]["upload_bytes"]
        assert float(row["seconds/clients"]) == expected["seconds"]["clients"]
    assert [(row["cohort"], row["dropped"], row["refused"]) for row in rows][1:3] == [("3", "1", "0"), ("3", "0", "1")]


def test_a_column_that_comes_later_is_empty_above(tmp_path):
    FakeLoop(tmp_path).run(CsvLog())
    assert [row["distil/loss"] for row in read(tmp_path)] == ["", "", repr(1 / 3), "0.25"]


def test_file_is_complete_after_every_round(tmp_path):
    FakeLoop(tmp_path).run(CsvLog(), until=3)
    assert len(read(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_resumed_file_equals_the_uninterrupted_one(tmp_path):
    straight, broken = FakeLoop(tmp_path / "straight"), FakeLoop(tmp_path / "broken")
    straight.run(CsvLog())
    broken.run(CsvLog(), until=4)
    path = tmp_path / "broken/metrics.csv"
    os.truncate(path, path.stat().st_size - 5)  # killed while writing
    broken.resume_after(2).run(CsvLog(), first=3)
    assert path.read_text() == (tmp_path / "straight/metrics.csv").read_text()


def test_a_new_run_in_a_used_folder_starts_an_empty_file(tmp_path):
    FakeLoop(tmp_path).run(CsvLog())
    CsvLog().on_fit_start(FakeLoop(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == ""


def test_flatten_leaves_out_clients_own_metrics():
    assert not any("fit/loss" in column for column in flatten(record(1)))


def test_overhead_is_small(tmp_path):
    loop, callback = FakeLoop(tmp_path), CsvLog()
    callback.on_fit_start(loop)
    callback.on_round_end(loop, record(4))
    start = time.perf_counter()
    for _ in range(200):
        callback.on_round_end(loop, record(4))
    assert (time.perf_counter() - start) / 200 < 5e-3  # seldom above 0.1 ms; the margin is for a busy machine
