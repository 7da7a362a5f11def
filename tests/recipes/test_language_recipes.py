"""Recipes for language models and texts, run for two rounds with small models that have tokenizers of their own."""

import json
import math
from itertools import cycle
from pathlib import Path

import pytest

from fdl.build import build
from fdl.modules.aligner import AlignedLanguageModel
from fdl.modules.tokenizers import train_bpe
from fdl.recipe import Component, Recipe, load
from tests.modules.text_models import DECODERS, ENCODERS

ROOT = Path(__file__).parents[2]
SHORT = [
    "fabric.accelerator=cpu",
    "fabric.precision=32-true",
    "fabric.threads=1",
    "federation.rounds=2",
    "local_training.steps=2",
    "client_distil.steps=1",
    "server_distil.steps=2",
    "data.args.context=48",
]

_TEXTS = 800

_WORDS = ("a gripping film", "a dull film", "with wit", "without wit", "from start to end", "at its best")
_AUTO = {
    "text_classifier": ("AutoModelForSequenceClassification", "bert", ENCODERS["bert"]),
    "causal_lm": ("AutoModelForCausalLM", "gpt2", DECODERS["gpt2"]),
    "aligned_causal_lm": ("AutoModelForCausalLM", "gpt_neox", DECODERS["gpt_neox"]),
}


def stand_ins(recipe: Recipe, models: dict[str, Component], folder: Path) -> list[str]:
    """Changes to a recipe for texts: models of the same kind and with the same options, of a few thousand weights.

    Args:
        recipe: for text_classification or text_table.
        models: its modules by their key; those of `codistillation` differ in their number of layers.
        folder: where to write to.
    """
    records = _classified() if recipe.data.target == "text_classification" else _written(recipe.data.args)
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = [f"data.args.path={folder / 'texts.jsonl'}", f"data.args.tokenizer={_saved('data', 300, folder)}"]
    known = []
    for key, component in models.items():
        if "pretrained" not in component.args:  # a new and small model, which has the data's tokenizer
            continue
        size = 280 if component.target.startswith("aligned") else 300
        if component.args not in known:
            known.append(component.args)
        deeper = known.index(component.args) if recipe.method.target == "codistillation" else 0
        changes.append(f"{key}.args.model={_model(component.target, size, folder, deeper)}")
    return changes


def _texts(count: int) -> list[str]:
    return [f"{one}, {two}." for one, two, _ in zip(cycle(_WORDS), cycle(_WORDS[:-1]), range(count))]


def _classified() -> list[dict]:
    splits = ["train"] * _TEXTS + ["test"] * 40
    return [{"split": s, "text": text, "label": i % 2} for i, (s, text) in enumerate(zip(splits, _texts(_TEXTS + 40)))]


def _written(given: dict) -> list[dict]:
    group = given["group"]
    sites = given.get("where", {}).get(group) or [f"site{i}" for i in range(9)] + ["public"]
    return [{"text": 20 * text, group: site} for site, text in zip(cycle(sites), _texts(_TEXTS))]


def _saved(name: str, size: int, folder: Path) -> Path:
    if not (folder / name / "tokenizer.json").is_file():
        train_bpe(_WORDS, size, folder / name)
    return folder / name


def _model(kind: str, size: int, folder: Path, deeper: int = 0) -> Path:
    import transformers

    auto, family, settings = _AUTO[kind]
    place = _saved(f"{kind}{deeper or ''}", size, folder)
    if not (place / "config.json").is_file():
        config = transformers.CONFIG_MAPPING[family](
            **settings, vocab_size=size, max_position_embeddings=512, bos_token_id=0, eos_token_id=0
        )
        config.num_hidden_layers += deeper
        getattr(transformers, auto).from_config(config).save_pretrained(place)
    return place


def built(name, folder):
    path = ROOT / f"recipes/language/{name}.yaml"
    recipe = load(path)
    models = {f"specialists.{i}": component for i, component in enumerate(recipe.specialists)}
    models |= {"student": recipe.student}
    return build(load(path, [*SHORT, *stand_ins(recipe, models, folder)]), folder / "run")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes/language").glob("*.yaml")))
def test_a_recipe_runs_with_stand_ins(name, tmp_path):
    loop = built(name, tmp_path)
    loop.run()
    assert len(loop.history) == 2
    assert all(record["refused"] == {} for record in loop.history)
    assert all(math.isfinite(value) for value in loop.history[-1]["metrics"].values())


def test_specialists_with_tokenizers_of_their_own_have_them(tmp_path):
    loop = built("gpt2_student", tmp_path)
    models = [loop.runtime.shared_module(client.architecture) for client in loop.clients]
    assert [isinstance(model, AlignedLanguageModel) for model in models] == [False, True, True] * 2
    assert [model.tokenizer.matches(model.data_tokenizer) for model in models] == [True, False, False] * 2
