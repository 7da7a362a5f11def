import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from fdl.callbacks.tensorboard import TensorBoard
from fdl.utils.tensorboard import Curves, hyperparameters, open_writer
from tests.callbacks.fakes import FakeLoop, record


@pytest.fixture(autouse=True)
def file_names(monkeypatch):
    """Files of one second and process are told apart by a count, and read by name: 10 would come before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}, tensor_size_guidance={"scalars": 0})
    events.Reload()
    return events


def curve(events, tag):
    points = [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]
    assert [step for step, _ in points] == sorted({step for step, _ in points}), f"{tag} shows a step twice"
    return dict(points)


def curves(events):
    scalars = events.PluginTagToContent("scalars")
    return {tag: curve(events, tag) for tag in scalars}


def hparams(events):
    content = events.PluginTagToContent("hparams")
    parsed = {tag: HParamsPluginData.FromString(data) for tag, data in content.items()}
    start = parsed["_hparams_/session_start_info"].session_start_info.hparams
    metrics = parsed["_hparams_/experiment"].experiment.metric_infos
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in start.items()}, [
        metric.name.tag for metric in metrics
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    loop = FakeLoop(tmp_path_factory.mktemp("run"))
    loop.run(TensorBoard())
    return loop, read(loop.folder / "tensorboard")


def test_curves_by_round(finished):
    shown = curves(finished[1])
    rounds = [1, 2, 3, 4]
    assert shown["student/test/accuracy"] == pytest.approx({r: 0.5 + 0.1 * r for r in rounds})
    assert shown["clients/2/fit/loss"] == pytest.approx({r: 2 + r / 10 for r in rounds})
    assert shown["distil/loss"] == pytest.approx({3: 1 / 3, 4: 1 / 4})
    assert shown["communication/upload_bytes"] == {r: 6144 * r for r in rounds}
    assert shown["communication_per_round/download_bytes"] == dict.fromkeys(rounds, 3072)
    assert shown["seconds_per_round/server"] == dict.fromkeys(rounds, 0.5)
    assert shown["cohort/dropped"] == {1: 0, 2: 1, 3: 0, 4: 0}
    assert shown["cohort/refused"] == {1: 0, 2: 0, 3: 1, 4: 0}


def test_student_by_kilobytes(finished):
    shown = curves(finished[1])
    assert shown["by_kilobytes/student/test/accuracy"] == pytest.approx({9 * r: 0.5 + 0.1 * r for r in (1, 2, 3, 4)})
    by_bytes = {tag for tag in shown if tag.startswith("by_kilobytes/")}
    assert by_bytes == {"by_kilobytes/student/test/accuracy", "by_kilobytes/student/validation/accuracy"}


def test_everything_is_one_run(finished):
    loop, _ = finished
    assert all(path.is_file() for path in (loop.folder / "tensorboard").iterdir())


def test_hyperparameters_stand_beside_final_metrics(finished):
    loop, events = finished
    values, metrics = hparams(events)
    assert values == hyperparameters(loop.recipe.to_dict())
    assert set(metrics) <= set(curves(events)), "a metric without a curve of that tag would show nothing"
    assert {"student/test/accuracy", "communication/upload_bytes"} <= set(metrics)


def test_recipe_is_text_in_a_fence(finished):
    loop, events = finished
    (event,) = events.Tensors("recipe/text_summary")
    text = tensor_util.make_ndarray(event.tensor_proto).item().decode()
    assert text == f"```yaml\n{loop.recipe.to_yaml()}```"


def test_figures_are_there(finished):
    _, events = finished
    assert [e.step for e in events.Tensors("clients/labels")] == [0]
    assert [e.step for e in events.Tensors("student/test/confusion")] == [4]


def test_figures_get_the_right_counts(tmp_path, monkeypatch):
    seen = {}
    from fdl.utils import figures

    histogram, confusion = figures.label_histogram, figures.confusion
    monkeypatch.setattr(figures, "label_histogram", lambda c, *n: seen.update(labels=c) or histogram(c, *n))
    monkeypatch.setattr(figures, "confusion", lambda m, n, t: seen.update(matrix=m) or confusion(m, n, t))
    FakeLoop(tmp_path).run(TensorBoard())
    np.testing.assert_array_equal(seen["labels"], [[2, 0, 0], [0, 3, 0], [0, 0, 4]])
    np.testing.assert_array_equal(seen["matrix"], [[3, 0, 1], [0, 4, 0], [0, 0, 4]])


def test_a_figure_that_fails_is_left_out_and_the_rest_is_written(tmp_path, monkeypatch, caplog):
    from fdl.utils import figures

    def fails(*arguments):
        raise RuntimeError("no paint")

    monkeypatch.setattr(figures, "label_histogram", fails)
    monkeypatch.setattr(figures, "confusion", fails)
    FakeLoop(tmp_path).run(TensorBoard())
    assert "the figure clients/labels is left out: it cannot be drawn (RuntimeError('no paint'))" in caplog.text
    assert "the figure student/test/confusion is left out" in caplog.text
    events = read(tmp_path / "tensorboard")
    assert {"student/test/accuracy", "cohort/invited"} <= set(curves(events))
    assert hparams(events)[0]["method"] == "fedprox"


@pytest.mark.filterwarnings("error")
def test_any_class_and_client_name_is_drawn(tmp_path, caplog):
    loop = FakeLoop(tmp_path)
    loop.server.classes = ["$5 to $10", "日本 🫀", "50%_a/b"]
    loop.clients[0].name = "$ite_$"
    loop.run(TensorBoard())
    assert not caplog.text
    assert {"clients/labels", "student/test/confusion"} <= set(read(tmp_path / "tensorboard").Tags()["tensors"])


def test_a_sharded_student_is_not_asked_by_one_rank_alone(tmp_path, monkeypatch):
    from fdl.callbacks import tensorboard
    from fdl.utils import figures

    monkeypatch.setattr(tensorboard, "is_sharded", lambda module: True)
    monkeypatch.setattr(figures, "confusion", lambda *arguments: pytest.fail("the other ranks are not there"))
    FakeLoop(tmp_path).run(TensorBoard())
    assert "clients/labels" in read(tmp_path / "tensorboard").Tags()["tensors"]


def test_resumed_run_shows_what_the_uninterrupted_one_shows(tmp_path, finished):
    loop = FakeLoop(tmp_path)
    loop.run(TensorBoard(), until=3)
    again = loop.resume_after(1)  # rounds 2 and 3 were lost
    again.run(TensorBoard(), first=2, until=2)
    again.resume_after(2).run(TensorBoard(), first=3)
    events = read(tmp_path / "tensorboard")
    assert curves(events) == curves(finished[1])
    assert len(events.Tensors("recipe/text_summary")) == len(events.Tensors("clients/labels")) == 1
    assert hparams(events) == hparams(finished[1])


def test_a_run_that_fails_leaves_its_rounds(tmp_path):
    loop, callback = FakeLoop(tmp_path), TensorBoard()
    loop.run(callback, until=2)
    callback.on_exception(loop, RuntimeError())
    callback.on_exception(loop, RuntimeError())
    assert len(curves(read(tmp_path / "tensorboard"))["student/test/accuracy"]) == 2


def test_no_student_no_confusion_matrix(tmp_path):
    loop = FakeLoop(tmp_path)
    loop.server.student = None
    loop.run(TensorBoard())
    assert "student/test/confusion" not in read(tmp_path / "tensorboard").Tags()["tensors"]


def test_many_clients_are_shown_as_distributions(tmp_path):
    loop = FakeLoop(tmp_path, clients=51, rounds=1)
    loop.run(TensorBoard())
    events = read(tmp_path / "tensorboard")
    shown = curves(events)
    assert not any(tag.startswith("clients/0/") for tag in shown)
    assert shown["clients/fit/loss/mean"] == pytest.approx({1: 25.1})
    assert shown["clients/fit/loss/min"] == pytest.approx({1: 0.1})
    assert shown["clients/fit/loss/max"] == pytest.approx({1: 50.1})
    buckets = tensor_util.make_ndarray(events.Tensors("clients/fit/loss")[0].tensor_proto)
    assert buckets[:, 2].sum() == 51


def test_distribution_leaves_out_what_is_not_finite(tmp_path):
    writer = open_writer(tmp_path)
    broken = record(1, clients=3)
    broken["clients"]["0"]["fit/loss"] = float("nan")
    for metrics in broken["clients"].values():
        metrics["test/accuracy"] = float("inf")
    Curves(writer, many=True).log(broken)
    writer.close()
    shown = curves(read(tmp_path))
    assert shown["clients/fit/loss/mean"] == pytest.approx({1: 1.6})
    assert "clients/test/accuracy/mean" not in shown


def test_bytes_that_do_not_grow_by_a_kilobyte_give_no_second_point(tmp_path):
    writer = open_writer(tmp_path)
    lines = Curves(writer)
    for round, total in enumerate([0, 500, 900, 1100, 1200, 5000], 1):
        lines.log(record(round) | {"communication": {"upload_bytes": total, "download_bytes": 0, "setup_bytes": 0}})
    writer.close()
    shown = curves(read(tmp_path))["by_kilobytes/student/test/accuracy"]
    assert list(shown) == [0, 1, 4]


def test_hyperparameters_are_flat_and_leave_out_where_and_how_it_ran(tmp_path):
    recipe = FakeLoop(tmp_path).recipe.to_dict() | {"output_dir": "runs", "fabric": {"devices": 1}, "callbacks": []}
    assert hyperparameters(recipe) == {
        "seed": 4,
        "method": "fedprox",
        "method.mu": 0.01,
        "local_training.epochs": 2,
        "local_training.optimizer": "sgd",
        "local_training.optimizer.lr": 0.1,
        "local_training.optimizer.nesterov": "True",
        "channel.upload": "quantize(bits=8), zstd",
        "channel.download": "none",
        "student": "mlp",
        "student.hidden": "32, 16",
    }
