"""benchmarks/teacher_inference.py on its smallest job."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

SCRIPT = Path(__file__).parents[2] / "benchmarks/teacher_inference.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("teacher_inference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
