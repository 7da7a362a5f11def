"""The recipes of GLUE with an encoder that is made on the spot, on SST-2 and on MRPC's pairs."""

import gzip
import json

import pytest

from fdl.build import build
from fdl.recipe import load
from fdl.runs import run as runs
from fdl.runs.export import export
from tests.real.data import FOLDER, real

pytestmark = real

RECIPES = "recipes/methods"
CPU = ["fabric.accelerator=cpu", "fabric.precision=32-true", "fabric.threads=1", "callbacks=[]"]
TASKS = {"sst2": ["data.args.context=32"], "mrpc": ["data.args.context=48", "data.args.text=[text_a,text_b]"]}


def first(name, folder, counts):
    """A file with the first texts of each class of some splits: tokenising all would take longer than all else."""
    left = {(split, label): count // 2 for split, count in counts.items() for label in (0, 1)}
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt") as lines, open(folder / f"{name}.jsonl", "w") as few:
        for line in lines:
            record = json.loads(line)
            if left.get((record["split"], record["label"])):
                left[record["split"], record["label"]] -= 1
                few.write(line)
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Two layers of BERT that have read 640 film reviews."""
    folder = tmp_path_factory.mktemp("encoder")
    data = [
        f"data.args.path={first('imdb_6k3k', folder, {'train': 800, 'test': 100})}",
        f"data.args.tokenizer={FOLDER / 'tokenizers/bert_base_uncased_vocab.txt.gz'}",
        "data.args.context=48",
    ]
    recipe = load(f"{RECIPES}/text_encoder.yaml", [*CPU, *data, "federation.rounds=1", "local_training.steps=20"])
    runs.run_recipe(recipe, folder / "run")
    return export(folder / "run", "transformers", folder / "encoder")


def short(recipe, encoder, name, folder, variant=None):
    path = first(name, folder, {"train": 1500, "dev": 400} if name == "sst2" else {"train": 1500, "test": 400})
    overrides = [
        *CPU,
        *TASKS[name],
        f"student.args.model={encoder}",
        f"data.args.tokenizer={encoder}",
        f"data.args.path={path}",
        "federation={clients: 3, rounds: 2}",
        "local_training={steps: 4, batch_size: 16}",
        "server_distil={steps: 4, batch_size: 16}",
    ]
    return load(f"{RECIPES}/{recipe}.yaml", overrides, variant)


@pytest.mark.parametrize("name", TASKS)
def test_phases_alternate(tmp_path, encoder, name):
    switch = {"target": "fixed_phases", "args": {"centralized": 1, "federated": 1}}
    recipe = short("federated_foundation_glue", encoder, name, tmp_path, {"method.args.switch": switch})
    loop = build(recipe, tmp_path / "run")
    metrics = loop.run()["metrics"]
    assert [record["metrics"]["phase"] for record in loop.history] == [1.0, 0.0]
    assert {row.round for row in loop.ledger.rows()} == {1}
    assert 0.3 < metrics["student/test/accuracy"] < 1 and metrics["student/test/nll"] < 1.5


@pytest.mark.parametrize("variant", ["fedit", "ffa", "flora", "fedex", "flexlora"])
def test_low_rank_updates_are_all_that_is_sent(tmp_path, encoder, variant):
    changes = load(f"{RECIPES}/fedlora_glue.yaml").compare.variants[variant]
    loop = build(short("fedlora_glue", encoder, "sst2", tmp_path, changes), tmp_path / "run")
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    network = 4 * sum(parameter.numel() for parameter in loop.server.student.parameters())
    assert max(row.bytes for row in loop.ledger.rows() if row.direction == "up") < network / 100
