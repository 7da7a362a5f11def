"""benchmarks/teacher_inference.py on its smallest job."""

import re

import pytest
from lightning.fabric import Fabric

from tests.benchmarks.scripts import load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script("teacher_inference")


def test_the_table_has_a_row_for_every_teacher(benchmark, tmp_path, threads):
    text = benchmark.main(["--quick", "--device", "cpu", "--repeats", "2", "--output", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text() == text + "\n"
    rows = text.splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == ["timm test_resnet", "transformers BERT 1×32"]
    for row in rows:
        median, low, high = map(float, re.search(r"([\d.]+) \[([\d.]+)–([\d.]+)\] \| \d+ %", row).groups())
        assert 0 < low <= median <= high


def test_different_answers_are_never_timed(benchmark):
    job, fabric = benchmark.timm_job("test_resnet", 4, 32, 2), Fabric(accelerator="cpu", devices=1)
    benchmark.assert_same_answers(job, fabric)
    other = job._replace(network=benchmark.timm_job("test_resnet", 4, 32, 2).network)
    with pytest.raises(AssertionError, match="not close"):
        benchmark.assert_same_answers(other, fabric)


def test_work_is_counted_once_a_sample(benchmark):
    fabric = Fabric(accelerator="cpu", devices=1)
    few, many = (benchmark.flops(benchmark.timm_job("test_resnet", count, 32, 2), fabric) for count in (2, 6))
    assert many == 3 * few > 0
