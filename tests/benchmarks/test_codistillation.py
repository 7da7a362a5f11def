"""benchmarks/codistillation.py on its smallest job, with random images in the place of other data sets."""

import csv
import gzip
import json
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from fdl.runs.compare import plan
from tests.benchmarks.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("codistillation")


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    data, place = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    for name, size in (("usps_16", 16), ("omniglot_small1_28", 28)):
        np.savez(data / f"{name}.npz", x_train=rng.integers(0, 256, (410, size, size), dtype=np.uint8))
    short = ["federation.rounds=2", "local_training.steps=2", "server_distil.steps=2"]
    options = ["--data", str(data), "--seeds", "0", "--output", str(place)]
    assert script.main(["digits", *short, *options, "--only", "merged_far", "periodic_3"]) == 0
    return place


def test_the_table_says_what_the_runs_say(folder):
    with open(folder / "codistillation.csv", encoding="utf-8", newline="") as file:
        table = {(line["variant"], line["pool"]): line for line in csv.DictReader(file)}
    references = {"fedadam": "fedadam", "merged_far": "fedadam", "fedadam_3": "fedadam_3", "periodic_3": "fedadam_3"}
    assert list(dict.fromkeys(variant for variant, _ in table)) == list(references)
    assert [pool for variant, pool in table if variant == "periodic_3"] == ["mlp", "mlp-1", "mlp-2"]

    def score(variant, pool):
        rounds = json.loads((folder / variant / "seed-0/summary.json").read_text())["history"]
        return fmean(record["metrics"][f"pools/{pool}/test/accuracy"] for record in rounds[-3:])

    for (variant, pool), line in table.items():
        assert float(line["score"]) == pytest.approx(score(variant, pool), abs=6e-4)
        assert float(line["gain"]) == pytest.approx(score(variant, pool) - score(references[variant], pool), abs=6e-4)
        assert int(line["server_steps"]) == (0 if variant.startswith("fedadam") else 4)
    text = (folder / "codistillation.md").read_text()
    assert text.startswith("digits, 9 clients, 2 rounds.") and "| merged_far | 0." in text


def test_the_server_has_nothing_of_the_clients_and_the_same_amount_of_everything(folder):
    stored = {path.stem: np.load(path) for path in (folder / "data").glob("*.npz")}
    private = stored.pop("private")
    assert set(stored) == {"in", "half", "near", "far", "noise"}
    assert {file["x_train"].shape for file in stored.values()} == {(400, 1, 8, 8)}
    assert all(file.files == ["x_train"] for file in stored.values())
    assert len(private["x_train"]) + len(private["x_test"]) + 400 == 1797
    clients = {image.tobytes() for key in ("x_train", "x_test") for image in private[key]}
    assert sum(image.tobytes() in clients for image in stored["in"]["x_train"]) <= 1  # two scans may be alike
    assert (stored["half"]["x_train"][:200] == stored["in"]["x_train"][:200]).all()
    assert (stored["half"]["x_train"][200:] == stored["far"]["x_train"][:200]).all()


def test_unequal_work_is_refused(script, folder):
    planned = plan(script.RECIPES["digits"], [f"output_dir={folder}"], ["merged", "periodic_5"], [0], folder)
    script.assert_equal_work(planned)
    assert [script.server_steps(run) for run in planned] == [200, 200]
    periodic = planned[1].recipe
    longer = replace(periodic, server_distil=replace(periodic.server_distil, steps=51))
    with pytest.raises(AssertionError, match=r"unequal server steps: .*'merged': 200, 'periodic_5': 204"):
        script.assert_equal_work([planned[0], planned[1]._replace(recipe=longer)])
    other = replace(periodic, local_training=replace(periodic.local_training, steps=3))
    with pytest.raises(AssertionError, match=r"periodic_5 differs from merged in \['local_training.steps'\]"):
        script.assert_equal_work([planned[0], planned[1]._replace(recipe=other)])


def test_images_are_reduced_by_areas(script):
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert script.reduced(image, 2, 1).tolist() == [[[[2, 4], [10, 12]]]]  # 2.5, 4.5, 10.5 and 12.5 to even
    assert script.reduced(np.stack([image] * 3, -1), 2, 1).shape == (1, 1, 2, 2)
    assert script.reduced(image, 4, 3).tolist() == [[image[0].tolist()] * 3]


@pytest.mark.slow
def test_photographs_take_the_same_variants(script, folder):
    changes = script.overrides("photographs", folder)
    planned = plan(script.RECIPES["photographs"], changes, ["merged", "merged_3"], [0], folder)
    sizes = {run.variant: [one.args["channels"] for one in run.recipe.specialists] for run in planned}
    assert sizes["merged"] == [[16, 32], [32, 64, 64]]
    assert sizes["merged_3"] == [[16, 32], [24, 48], [32, 64, 64]]
    assert all(run.recipe.student.args == {"channels": [16, 32]} for run in planned)


def test_texts_are_cut_and_dealt_out(script, tmp_path):
    for name, file in script.TEXTS.items():
        texts = [f"{name} {i} " * 60 for i in range(4000)]
        plain = "\n".join(json.dumps({"text": text}) for text in texts) if ".jsonl" in file else " ".join(texts)
        (tmp_path / file).write_bytes(gzip.compress(plain.encode()))
    script.prepare_texts(tmp_path, tmp_path)
    lines = list(map(json.loads, (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()))
    sizes = {}
    for line in lines:
        assert len(line["text"]) <= script.PIECE
        sizes[line["source"]] = sizes.get(line["source"], 0) + len(line["text"])
    private, public = {"imdb", "shakespeare", "wikipedia"}, {"in_a", "in_b", "web_a", "web_b"}
    assert set(sizes) == private | public | {"questions_a", "questions_b"}
    assert all(script.PRIVATE <= sizes[name] < script.PRIVATE + script.PIECE for name in private)
    assert all(script.SERVED <= sizes[name] < script.SERVED + 3 * script.PIECE for name in public)
    texts = [line["text"] for line in lines if line["source"] in private]
    assert not {line["text"] for line in lines if line["source"] in public} & set(texts)
