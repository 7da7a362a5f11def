"""benchmarks/student_update.py on its smallest job."""

import pytest
from torch.nn import functional as F

from fdl.engine.compile import Compiler
from fdl.engine.runtime import Runtime
from fdl.modules.small_classifiers import MLP
from fdl.state.weights import module_state
from tests.benchmarks.scripts import load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script("student_update")


def test_both_tables_are_whole(benchmark, tmp_path, threads):
    text = benchmark.main(["--quick", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text() == text + "\n"
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert names == ["student", "timm test_resnet", "transformers GPT-2 1×16", "open_clip CLIP", "tokens", "64"]
    dense, sparse = map(float, text.splitlines()[-1].split("|")[-2].split("→"))
    assert sparse < dense / 2


def broken(graph, inputs):
    raise OSError("there is no compiler here")


@pytest.mark.parametrize("backend", ["eager", broken])  # torch traces, and generates no code
def test_compiled_steps_are_compared_where_there_are_any(benchmark, backend):
    job = benchmark.timm_job("test_resnet", 32, 4, 2)._replace(
        module=MLP([8], num_classes=100, input_shape=(3, 32, 32)),
        loss=lambda module, batch: F.cross_entropy(module.backbone(batch[0])[0], batch[1]),
    )
    runtime = Runtime(accelerator="cpu")
    runtime.steps.compiler = Compiler(backend)
    row = benchmark.measure(lambda: job, runtime, 1, 1e9, "default")
    *_, speed, ratio, end = (cell.strip() for cell in row.split("|"))
    assert row.count("|") == 10 and end == ""
    if backend is broken:
        assert (speed, ratio) == ("not compiled", "")
    else:
        assert float(speed.split()[0]) > 0 and float(ratio.split()[0]) > 0


def test_unequal_work_is_never_timed(benchmark):
    job = benchmark.timm_job("test_resnet", 32, 4, 2)
    other = job._replace(loss=lambda module, batch: F.cross_entropy(-module.backbone(batch[0]), batch[1]))
    start = {name: tensor.clone() for name, tensor in module_state(job.module).items()}
    runtime = Runtime(accelerator="cpu")
    benchmark.assert_same_weights(job, runtime, start)
    with pytest.raises(AssertionError):
        benchmark.assert_same_weights(other, runtime, start)
