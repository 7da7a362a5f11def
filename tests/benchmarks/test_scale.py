"""The benchmarks of scale run, on little, from end to end."""

import csv
import sys

import numpy as np
import pytest
import torch

from tests.benchmarks.scripts import load_script


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_scaling(tmp_path):
    """Both series: a fixed total is shared out, a fixed share adds up; bytes grow with the clients."""
    scaling = load_script("scaling")
    assert scaling.main(["--clients", "2", "4", "--rounds", "2", "--methods", "fedavg", "--output", str(tmp_path)]) == 0
    rows = {(row["fixed"], int(row["clients"])): row for row in rows_of(tmp_path / "scaling.csv")}
    assert set(rows) == {(fixed, clients) for fixed in scaling.SERIES for clients in (2, 4)}
    images = {key: int(row["images"]) for key, row in rows.items()}
    assert images["total", 2] == images["total", 4] == images["per client", 4] == 2 * images["per client", 2]
    for fixed in scaling.SERIES:
        assert float(rows[fixed, 4]["bytes"]) == 2 * float(rows[fixed, 2]["bytes"])
    assert all(float(row["round_s"]) > 0 and float(row["accuracy"]) > 0.1 for row in rows.values())
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="need more"):
        scaling.main(["--clients", "5000", "--output", str(tmp_path)])


@pytest.mark.slow
def test_memory(tmp_path, monkeypatch):
    """A peak for each run, in a process of its own, and the work is the same in all."""
    memory = load_script("memory")
    arguments = ["memory.py", "--clients", "5", "10", "--jobs", "mlp", "--in-memory", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    memory.main()
    rows = rows_of(tmp_path / "memory.csv")
    assert [(row["state"], row["clients"]) for row in rows] == [("disk", "5"), ("disk", "10")]
    assert all(2e8 < float(row["peak_rss_bytes"]) < 4e9 for row in rows)
    assert float(rows[0]["ratio"]) == 1
    with pytest.raises(AssertionError, match="turns differ"):
        memory.assert_equal_work([{"job": "a", "turns": n, "upload_bytes": 1, "parameters": 1} for n in (1, 2)])
    assert np.isclose(float(rows[1]["ratio"]), float(rows[1]["peak_rss_bytes"]) / float(rows[0]["peak_rss_bytes"]))


def test_many_classes():
    many_classes = load_script("many_classes")
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    try:
        rows = [many_classes.measure(what, 7, 80) for what in ("macro_f1", "figure of confusions", many_classes.PEER)]
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
    assert [tuple(row) for row in rows] == [many_classes.COLUMNS] * 3
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in rows)
    assert many_classes.table(rows).count("\n") == 5
