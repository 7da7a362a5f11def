import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fdl.errors import RecipeError, UserError
from fdl.recipe import Component, Fit, Recipe, Scheduler, difference, from_mapping, instantiate, load
from fdl.recipe.config import Specialist
from fdl.recipe.fields import Bounds
from fdl.recipe.overrides import Override, apply
from fdl.recipe.validate import keys

BASE = {
    "method": "fedavg",
    "data": "digits",
    "partition": {"target": "dirichlet", "args": {"alpha": 0.5}},
    "federation": {"clients": 5, "rounds": 3},
    "specialists": ["mlp", {"target": "cnn", "args": {"channels": [8]}}],
    "student": {"target": "mlp", "args": {"hidden": [32]}},
}


def recipe(*overrides, **changes) -> Recipe:
    return from_mapping({**BASE, **changes}, overrides)


def problems(*overrides, **changes) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe(*overrides, **changes)
    return caught.value.problems


# --- what a right recipe gives


def test_shorthand_defaults_and_types():
    result = recipe()
    assert result.method == Component("fedavg", {})
    assert result.partition == Component("dirichlet", {"alpha": 0.5})
    assert result.specialists == [Specialist("mlp", {}), Specialist("cnn", {"channels": [8]})]
    assert (
        result.local_training
        == result.server_distil
        == Fit(epochs=1, batch_size=32, optimizer=Component("sgd", {"lr": 0.1}))
    )
    assert result.client_distil is None and result.teacher is None and result.compare is None
    assert [c.target for c in result.callbacks] == ["tensorboard", "csv", "progress"]
    assert result.channel.max_message_bytes == 2**31
    assert result.name == "run"


def test_nested_components_are_written_in_full():
    result = recipe(
        "method={target: federated_distillation, args: {confidence: {target: product, args: {factors: [entropy]}}}}"
    )
    assert result.method.args["confidence"] == {
        "target": "product",
        "args": {"factors": [{"target": "entropy", "args": {}}]},
    }


def test_yaml_and_back(tmp_path):
    result = recipe(
        "local_training.scheduler={target: step_lr, args: {step_size: 2}, interval: round}",
        "local_training.optimizer.args.lr=1e-5",
        "channel.upload=[{target: quantize, args: {bits: 4}}, zstd]",
        "compare={variants: {fedprox: {method: fedprox, federation.rounds: 7}}}",
        "client_distil={steps: 10}",
        "fabric.threads=2",
        "name=there-and-back",
    )
    assert result.local_training.scheduler == Scheduler("step_lr", {"step_size": 2}, "round")
    assert result.client_distil.epochs is None and result.client_distil.steps == 10
    path = tmp_path / "recipe.yaml"
    path.write_text(result.to_yaml())
    assert load(path) == result
    assert difference(result.to_dict(), load(path).to_dict()) == []


def test_the_name_is_the_file_s_by_default(tmp_path):
    path = tmp_path / "my-run.yaml"
    path.write_text("method: single_site\ndata: digits\nspecialists: [mlp]\n")
    assert load(path).name == "my-run"
    assert load(path, ["name=other"]).name == "other"


def test_interpolation():
    result = recipe(
        "seed=7",
        "name=clients-${federation.clients}",
        "data={target: digits, args: {seed: '${seed}'}}",
        server_distil="${local_training}",
    )
    assert result.name == "clients-5"
    assert result.data.args == {"seed": 7}
    assert result.server_distil == result.local_training


def test_interpolation_follows_overrides():
    changed = recipe(
        "federation.clients=9",
        "local_training.batch_size=64",
        server_distil={"batch_size": "${local_training.batch_size}"},
    )
    assert changed.server_distil.batch_size == 64


def test_a_named_optimizer_does_not_inherit_the_default_s_arguments():
    assert recipe(local_training={"optimizer": "adam"}).local_training.optimizer == Component("adam", {})
    assert recipe(local_training={"optimizer": {"target": "sgd"}}).local_training.optimizer == Component("sgd", {})
    # without a target it is the default optimiser, with these arguments besides
    expected = Component("sgd", {"lr": 0.1, "momentum": 0.9})
    assert recipe(local_training={"optimizer": {"args": {"momentum": 0.9}}}).local_training.optimizer == expected


def test_fit_made_in_python_has_one_epoch():
    assert Fit().epochs == 1
    assert Fit(steps=4).epochs is None


def test_null_for_the_default_epochs_leaves_steps():
    fit = recipe(local_training={"steps": 5}).local_training
    assert (fit.epochs, fit.steps) == (None, 5)


# --- overrides


def test_overrides_reach_into_lists():
    result = recipe("specialists.1.args.channels=[4, 4]", "callbacks.0.target=csv", "specialists.0=vit")
    assert result.specialists == [Specialist("vit", {}), Specialist("cnn", {"channels": [4, 4]})]
    assert result.callbacks[0].target == "csv"


def test_the_later_override_wins():
    assert recipe("seed=1", "seed=2").seed == 2


def test_a_new_target_drops_the_old_arguments():
    assert recipe("partition.target=iid").partition == Component("iid", {})
    assert recipe("partition=iid").partition == Component("iid", {})
    assert recipe("specialists.1.target=mlp").specialists[1] == Specialist("mlp", {})


def test_the_same_target_keeps_its_arguments():
    assert recipe("partition.target=dirichlet").partition.args == {"alpha": 0.5}


def test_arguments_of_an_earlier_override_survive_a_new_target():
    changed = recipe("partition.args.exponent=2.0", "partition.target=quantity_skew").partition
    assert changed == Component("quantity_skew", {"exponent": 2.0})
    whole = recipe("partition.args={exponent: 3.0}", "partition.target=quantity_skew").partition
    assert whole.args == {"exponent": 3.0}


def test_overrides_reach_through_shorthand_and_null():
    result = recipe("method=federated_distillation", "method.args.confidence=entropy", "teacher.target=mlp")
    changed = recipe(
        "method=federated_distillation",
        "method.args.confidence=entropy",
        "method.args.confidence.args.temperature=2.0",
    )
    assert result.teacher == Component("mlp", {})
    assert changed.method.args["confidence"] == {"target": "entropy", "args": {"temperature": 2.0}}


def test_mappings_merge_into_sections_and_replace_components():
    result = recipe("federation={rounds: 9}", "local_training={optimizer: {args: {momentum: 0.5}}, batch_size: 8}")
    assert (result.federation.clients, result.federation.rounds) == (5, 9)
    assert result.local_training.batch_size == 8
    assert result.local_training.optimizer == Component("sgd", {"momentum": 0.5})
    assert recipe("partition={target: shards}").partition == Component("shards", {})
    nested = {"variants": {"long": {"federation": {"rounds": 9}, "method": {"target": "fedprox"}}}}
    assert recipe(compare=nested).compare.variants == nested["variants"]
    changed = from_mapping(BASE, variant=nested["variants"]["long"])
    assert (changed.federation.clients, changed.federation.rounds, changed.method.target) == (5, 9, "fedprox")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1e-4", 1e-4),
        ("a=null", None),
        ("a=", None),
        ("a=[1, {b: c}]", [1, {"b": "c"}]),
        ("a=b=c", "b=c"),
        ("a=true", True),
        ("a='1'", "1"),
        ("a=${seed}", "${seed}"),
    ],
)
def test_override_values_are_yaml(text, value):
    assert Override.parse(text).value == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("--federation.rounds=3", "no dashes, write federation.rounds=3"),
        ("a=[1", "not valid YAML"),
        ("a=${", "not valid YAML"),
        ("a=!!python/name:os.system", "not valid YAML"),
    ],
)
def test_bad_overrides(text, words):
    with pytest.raises(UserError, match="override") as caught:
        Override.parse(text)
    assert words in str(caught.value)


def test_apply_changes_only_what_is_named():
    tree = {"a": {"b": [1, {"c": 2}]}, "d": None}
    assert apply(tree, [Override.parse(t) for t in ("a.b.1.c=5", "d.e=6", "a.b.0=7")]) == []
    assert tree == {"a": {"b": [7, {"c": 5}]}, "d": {"e": 6}}


# --- what a wrong recipe gives: key, reason, and where it came from


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.cleints=4", ["federation.cleints: unknown key", "did you mean 'clients'?"]),
        ("clients=4", ["clients: unknown key", "did you mean 'federation.clients'?"]),
        ("federation.clients=five", ["federation.clients: expected int, got 'five'"]),
        ("federation.clients=2.5", ["federation.clients: expected int, got 2.5 (float)"]),
        ("federation.clients=true", ["federation.clients: expected int, got True (bool)"]),
        ("federation.clients=null", ["federation.clients: expected int, got null"]),
        ("federation.clients=0", ["federation.clients: must be ≥ 1, got 0"]),
        ("federation.rounds=0", ["federation.rounds: must be ≥ 1, got 0"]),
        ("federation.client_fraction=0", ["federation.client_fraction: must be in (0, 1], got 0"]),
        ("federation.client_fraction=1.5", ["federation.client_fraction: must be in (0, 1], got 1.5"]),
        ("federation.client_fraction=0.01", ["federation.client_fraction: 0.01 of 5 clients selects nobody"]),
        ("federation.dropout=1", ["federation.dropout: must be in [0, 1), got 1"]),
        ("federation.calibration_fraction=-0.1", ["federation.calibration_fraction: must be in [0, 1)"]),
        ("federation.dropout=.nan", ["federation.dropout: expected float, got nan"]),
        ("federation=3", ["federation: expected a mapping with keys such as clients, got 3 (int)"]),
        ("seed=-1", ["seed: must be ≥ 0"]),
        ("local_training.batch_size=0", ["local_training.batch_size: must be ≥ 1"]),
        ("local_training.gradient_clip=0", ["local_training.gradient_clip: must be > 0"]),
        ("local_training={epochs: 1, steps: 1}", ["local_training: give epochs or steps, not both"]),
        ("local_training.optimizer=sdg", ["local_training.optimizer: unknown optimizer 'sdg'", "did you mean 'sgd'?"]),
        (
            "local_training.optimizer.args.lr=fast",
            ["local_training.optimizer.args.lr: expected float or Tensor, got 'fast'"],
        ),
        (
            "local_training.optimizer.args.lrr=1",
            ["local_training.optimizer.args.lrr: torch.optim.SGD takes no 'lrr'", "did you mean 'lr'?"],
        ),
        ("local_training.optimizer.args.params=[]", ["local_training.optimizer.args.params: params is given by fdl"]),
        ("local_training.scheduler=step_lr", ["local_training.scheduler.args.step_size: missing", "StepLR needs it"]),
        (
            "local_training.scheduler={target: step_lr, args: {step_size: 1}, interval: day}",
            ["local_training.scheduler.interval: expected one of 'step', 'epoch', 'round', got 'day'"],
        ),
        ("method=fedvg", ["method: unknown method 'fedvg'", "did you mean 'fedavg'?"]),
        ("method=3", ["method: expected a method: a name, or target and args; got 3 (int)"]),
        ("student={target: null}", ["student.target: missing: the name or dotted path of a module"]),
        ("method={target: fedprox, mu: 1}", ["method.mu: unknown key", "under method.args"]),
        ("method={target: fedprox, arg: {}}", ["method.arg: unknown key", "did you mean 'args'?"]),
        ("method={target: fedprox, args: [1]}", ["method.args: expected a mapping"]),
        ("method={target: fedprox, args: {mu: x}}", ["method.args.mu: expected float, got 'x'"]),
        ("method={target: fedavg, args: {optimizer: adm}}", ["method.args.optimizer: unknown server optimizer 'adm'"]),
        (
            "method={target: fedavg, args: {optimizer: {target: adam, args: {lr: x}}}}",
            ["method.args.optimizer.args.lr: expected float, got 'x'"],
        ),
        (
            "method={target: federated_distillation,"
            " args: {confidence: {target: product, args: {factors: [entropi]}}}}",
            ["method.args.confidence.args.factors.0: unknown confidence 'entropi'", "did you mean 'entropy'?"],
        ),
        (
            "method={target: federated_distillation, args: {space: logit}}",
            ["method.args.space: expected one of 'probabilities', 'logits', got 'logit'"],
        ),
        ("method=torch.nn.Linear", ["method: torch.nn.Linear is not a method"]),
        ("data=digit", ["data: unknown datamodule 'digit'", "did you mean 'digits'?"]),
        (
            "data.args.proxi=4",
            ["data.args.proxi: fdl.datamodules.digits.Digits takes no 'proxi'", "did you mean 'proxy'?"],
        ),
        ("partition=dirichlt", ["partition: unknown partitioner 'dirichlt'", "did you mean 'dirichlet'?"]),
        ("partition=dirichlet", ["partition.args.alpha: missing: fdl.datamodules.partition.Dirichlet needs it"]),
        ("partition.args.alpha=0", ["partition.args.alpha: alpha must be", "> 0, got 0"]),
        ("partition.args.alpha=-1", ["partition.args.alpha: alpha must be", "> 0, got -1"]),
        ("partition.args.by=clas", ["partition.args.by: expected one of 'class', 'client', got 'clas'"]),
        ("student=mlpp", ["student: unknown module 'mlpp'", "did you mean 'mlp'?"]),
        ("student=null", ["student: missing: method fedavg needs student"]),
        ("student=torch.optim.SGD", ["student: torch.optim.SGD is not a module"]),
        ("student.args.hiden=[3]", ["student.args.hiden:", "did you mean 'hidden'?"]),
        ("specialists=mlp", ["specialists: expected a list, each entry a module; got 'mlp'"]),
        ("specialists.1=mlpp", ["specialists.1: unknown module 'mlpp'"]),
        ("specialists.7.target=mlp", ["specialists is a list of 2: there is no entry 7"]),
        ("specialists.first=mlp", ["specialists is a list of 2: name an entry by its number, such as specialists.0"]),
        ("seed.x=1", ["seed is 0, which has no 'x' inside"]),
        ("channel.upload=[quantise]", ["channel.upload.0: unknown codec 'quantise'", "did you mean 'quantize'?"]),
        (
            "channel.upload=[{target: quantize, args: {bits: 3}}]",
            ["channel.upload.0.args.bits: expected one of 8, 4, 2, 1"],
        ),
        ("channel.upload=[zstd, quantize]", ["channel.upload:", "zstd"]),
        (
            "evaluation.metrics=[acuracy]",
            ["evaluation.metrics.0: unknown metric 'acuracy'", "did you mean 'accuracy'?"],
        ),
        ("evaluation.metrics=[1]", ["evaluation.metrics.0: expected str, got 1 (int)"]),
        ("evaluation.specialists=yes please", ["evaluation.specialists: expected bool, got 'yes please'"]),
        ("checkpoint.every=0", ["checkpoint.every: must be ≥ 1"]),
        ("fabric.precision=fp32", ["fabric.precision: expected one of '32-true'"]),
        (
            "client_execution=parallel",
            ["client_execution: expected one of 'auto', 'sequential', 'vectorized', got 'parallel'"],
        ),
        ("callbacks.0=tensorbord", ["callbacks.0: unknown callback 'tensorbord'", "did you mean 'tensorboard'?"]),
        ("name=a/b", ["name: 'a/b' names a folder"]),
        ("name=..", ["name: '..' names a folder"]),
        ("seed=${nothing}", ["seed: Interpolation key 'nothing' not found"]),
        ("seed=${name}", ["seed: expected int"]),
        ("compare={seeds: []}", ["compare.seeds: expected different seeds, at least one"]),
        ("compare={seeds: [1, 1]}", ["compare.seeds: expected different seeds"]),
        ("compare={reference: centralised}", ["compare.reference: 'centralised' is neither a variant nor a method"]),
        ("compare={variants: {a/b: {}}}", ["compare.variants.a/b: 'a/b' names a folder"]),
        ("compare={variants: {v: 3}}", ["compare.variants.v: expected dict[str, Any], got 3 (int)"]),
    ],
)
def test_one_mistake_is_one_problem(override, words):
    found = problems(override)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize("missing", ["method", "data"])
def test_what_must_be_given(missing):
    changes = {missing: {}} if missing == "data" else {missing: None}
    found = problems(**changes)
    assert len(found) == 1 and found[0].startswith(missing)


def test_an_empty_recipe_lacks_what_must_be_given():
    with pytest.raises(RecipeError) as caught:
        from_mapping({})
    assert [p.partition(":")[0] for p in caught.value.problems] == ["method.target", "data.target"]


def test_everything_is_reported_at_once():
    found = problems(
        "federation.cleints=4",
        "local_training.batch_size=x",
        "partition.args.alpha=-1",
        "method.args.x=1",
        "nonsense",
        "student=mlpp",
        "federation.client_fraction=0.01",
    )
    heads = ["override 'nonsense'", "federation.cleints", "local_training.batch_size", "method.args.x", "student"]
    # participation is not judged while its section is in doubt; alpha is, since nothing is wrong beside it
    assert [sum(p.startswith(head) for p in found) for head in heads] == [1] * 5
    assert sum(p.startswith("partition.args.alpha") for p in found) == 1
    assert len(found) == 6


def test_a_problem_names_its_override():
    assert problems("seed=x") == ["seed: expected int, got 'x' (from the override 'seed=x')"]
    assert "(from the override 'local_training={batch_size: x}')" in problems("local_training={batch_size: x}")[0]


def test_a_target_s_override_is_blamed_and_not_the_recipe_s_line():
    with pytest.raises(RecipeError) as caught:
        from_mapping(
            {**BASE, "specialists": [{"target": "mlp"}]}, ["specialists.0.target=mpl"], lines={"specialists.0": 16}
        )
    assert caught.value.problems == [
        "specialists.0: unknown module 'mpl'; did you mean 'mlp'? (from the override 'specialists.0.target=mpl')"
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.args.root=x", "takes no 'root'; known: "),
        ("data={target: text_files, args: {root: x, context: 8}}", "takes no 'root'; did you mean 'path'?"),
        ("data={target: text_files, args: {path: x, max_length: 8}}", "takes no 'max_length'; did you mean 'context'?"),
        ("data.args.colour=x", "takes no 'colour'; known: augment, background, batch_size, channels,"),
        (
            "data={target: image_folder, args: {root: x, size: 8}}",
            "data.args.root: fdl.datamodules.image_folder.ImageFolder takes no 'root'; it is called 'path'",
        ),
        ("data={target: image_text, args: {path: x, size: 8, root: y}}", "takes no 'root'; it is called 'image_root'"),
        ("data.args.proxy=a/b.txt", "to read it, write {target: text_files, args: {path: a/b.txt, context: 64}}"),
        (
            "data.args.proxy=b.csv",
            "to read it, write {target: text_table, args: {path: b.csv, context: 64, text: text}}",
        ),
        ("data.args.proxy=~/b.npz", "to read it, write {target: arrays, args: {path: ~/b.npz}}"),
        ("data.args.proxy=shards/", "to read it, write {target: NAME, args: {path: shards/}}"),
        ("data=a/b.parquet", "'a/b.parquet' is a path; expected the name of a datamodule; to read it, write"),
        ("student=a/b", "'a/b' is a path; expected the name of a module, or a dotted path"),
    ],
)
def test_what_to_write_instead(override, words):
    assert any(words in problem for problem in problems(override)), problems(override)


def test_a_renamed_argument_is_not_said_to_be_missing_as_well():
    (problem,) = [p for p in problems("data={target: image_folder, args: {root: x, size: 8}}") if "data.args" in p]
    assert "'path'" in problem


@pytest.mark.parametrize(
    ("method", "data", "wanted"),
    [
        ("federated_distillation", "{target: text_classification, args: {path: x, context: 8}}", True),
        ("federated_distillation", "{target: text_classification, args: {path: x, context: 8, proxy: 0}}", True),
        ("federated_distillation", "{target: text_classification, args: {path: x, context: 8, proxy: 0.3}}", False),
        ("token_distillation", "{target: text_files, args: {path: x, context: 8, proxy_groups: [a]}}", False),
        ("federated_distillation", "digits", False),  # which has one unasked
        ("fedavg", "{target: text_classification, args: {path: x, context: 8}}", False),
    ],
)
def test_a_proxy_set_that_the_method_needs(method, data, wanted):
    found = problems(f"method={method}", f"data={data}", "seed=x", specialists=["mlp"])
    told = [problem for problem in found if problem.startswith("data.args.proxy: missing: ")]
    assert bool(told) is wanted
    assert all("or a share such as 0.3, which are held out for it, or another data set" in one for one in told)


def test_what_is_missing_is_described():
    assert (
        "data.args.context: missing: fdl.datamodules.text_files.TextFiles needs it (int, tokens of a window)"
        " (from the override 'data=text_files')"
    ) in problems("data=text_files")


def test_a_long_override_is_cut_in_messages():
    (problem,) = problems(f"name={'x' * 3000}")
    assert "has 3000 bytes" in problem and len(problem) < 400


def test_the_message_is_whole():
    with pytest.raises(RecipeError) as caught:
        from_mapping({**BASE, "seed": "x"}, source="my.yaml")
    assert str(caught.value) == "my.yaml: one problem\n  - seed: expected int, got 'x'"


# --- compare


def test_variants_are_checked_like_recipes():
    variants = {
        "right": {"method": "fedprox", "federation.rounds": 9},
        "typo": {"federation.rouds": 9},
        "name": {"partition": "iidd"},
        "needy": {"method": "distillation"},
    }
    found = problems(compare={"variants": variants})
    assert [p.partition(" (line")[0] for p in found] == [
        "compare.variants.typo: federation.rouds: unknown key; did you mean 'rounds'?",
        "compare.variants.name: partition: unknown partitioner 'iidd'; did you mean 'iid'?",
        "compare.variants.needy: teacher: missing: method distillation needs teacher",
    ]


def test_a_mistake_of_the_recipe_is_not_repeated_for_every_variant():
    found = problems("seed=x", compare={"variants": {"a": {"method": "fedprox"}, "b": {"method": "feddf"}}})
    assert len(found) == 1


def test_a_variant_comes_before_overrides():
    result = from_mapping(BASE, ["federation.rounds=4"], variant={"method": "fedprox", "federation.rounds": 9})
    assert result.method.target == "fedprox" and result.federation.rounds == 4


def test_overrides_reach_into_variants():
    compare = {"variants": {"prox": {"method": "fedprox", "federation.rounds": 9}}}
    result = recipe("compare.variants.prox.federation.rounds=2", compare=compare)
    assert result.compare.variants == {"prox": {"method": "fedprox", "federation.rounds": 2}}


# --- files


def written(tmp_path, text) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: [fedavg\n", ["not valid YAML in line 2, column 1"]),
        ("seed: 1\nseed: 2\n", ["not valid YAML in line 2", "duplicate key seed"]),
        ("seed: 1\n\tname: x\n", ["not valid YAML in line 2", "this is a tab, and YAML is indented with spaces"]),
        ("method:\tfedavg\ndata: digits\nstudent:\tmlpp\n", ["unknown module 'mlpp'", "(line 3)"]),
        ("- method\n- data\n", ["expected a mapping of keys to values"]),
        ("seed: ${name\n", ["seed: ", "${name"]),
        ("seed: !!python/name:os.system ''\n", ["not valid YAML in line 1"]),
        ("method: fedavg\ndata: digits\nstudent: mlp\n\nfederation:\n  cleints: 3\n", ["(line 6)"]),
        (
            "method: fedavg\ndata: digits\nstudent:\n  target: mlp\n  args:\n    depth: 3\n",
            ["student.args.depth", "(line 6)"],
        ),
        ("method: fedavg\ndata: digits\nstudent: mlp\n1: 2\n", ["1: unknown key", "(line 4)"]),
    ],
)
def test_file_problems_name_file_and_line(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert len(caught.value.problems) == 1
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match="not a text file"):
        load(path)


def test_a_missing_file_suggests_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("")
    for wrong in ("quickstart.yaml", "recipes/quikstart.yaml", "recipes/quickstart", "quickstart"):
        with pytest.raises(UserError, match=r"did you mean recipes/quickstart\.yaml\?"):
            load(wrong)
    with pytest.raises(UserError, match=r"there are recipes/quickstart\.yaml"):
        load("zzz")


def test_no_torch_is_imported_before_a_recipe_is_right(tmp_path):
    path = written(
        tmp_path,
        """
        method: {target: fedprox, args: {mu: 0.1, optimizer: {target: adam, args: {lr: 0.1}}}}
        data: digits
        partition: {target: dirichlet, args: {alpha: 0.1}}
        student: mlp
        local_training: {optimizer: adamw, scheduler: {target: cosine_annealing_lr, args: {T_max: 5}}}
        channel: {upload: [{target: quantize, args: {bits: 4}}, zstd]}
        """,
    )
    code = f"""
        import sys
        from fdl.errors import RecipeError
        from fdl.recipe import load
        load({str(path)!r})
        try:
            load({str(path)!r}, ["federation.cleints=3", "partition.args.alpha=0", "student=torch.nn.Linear"])
        except RecipeError as error:
            assert len(error.problems) == 3, error
        print([name for name in ("torch", "lightning", "sklearn") if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# --- difference


def test_difference_names_keys():
    a, b = recipe(), recipe("federation.rounds=9", "partition.args.alpha=1.0", "specialists.1.args.channels=[4]")
    expected = ["partition.args.alpha", "federation.rounds", "specialists.1.args.channels.0"]
    assert difference(a.to_dict(), b.to_dict()) == expected
    assert difference({"x": 1}, {"x": 1.0}) == []
    assert difference({"x": {}}, {"x": {"y": None}}) == ["x", "x.y"]


# --- building


def test_instantiate_builds_what_is_nested():
    method = instantiate(
        Component(
            "federated_distillation",
            {"confidence": {"target": "product", "args": {"factors": ["entropy", {"target": "margin"}]}}},
        ),
        "method",
        "method",
    )
    assert type(method).__name__ == "FederatedDistillation"
    assert [type(f).name for f in method.uploads.confidence.factors] == ["entropy", "margin"]


def test_instantiate_supplies_what_the_constructor_takes():
    module = instantiate(
        Component("mlp", {"hidden": [4]}), "module", "student", num_classes=3, input_shape=(1, 2, 2), nothing=1
    )
    assert module.num_classes == 3
    own = instantiate(
        Component("mlp", {"hidden": [4], "num_classes": 7}), "module", "student", num_classes=3, input_shape=(1, 2, 2)
    )
    assert own.num_classes == 7


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "recipe_plugins.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path
            from typing import Literal, Optional, Union
            from fdl.datamodules.partition import Partitioner
            Shade = Literal["light", "dark"]

            class Part(Partitioner):
                def __init__(self, size: tuple[int, int], where: Path, *, shade: Shade = "dark",
                             inner: "Optional[Partitioner]" = None, table: dict[str, float] = {},
                             either: Union[int, list[str]] = 1, exact: tuple[int, ...] = ()):
                    if size[0] < 0:
                        raise ValueError("size must not be negative")
                    self.given = (size, where, shade, inner, table, either, exact)
                    self.wrong = size[0] + "x" if size[0] == 99 else None

                def assign(self, labels, clients, rng, groups):
                    return []

            def make(size: int):
                return Part((size, size), Path("x"))

            def make_wrong():
                return 3
            """
        )
    )
    (folder / "recipe_broken.py").write_text(
        "import package_that_is_not_there\nfrom fdl.datamodules.partition import IID\nclass Part(IID): pass\n"
    )
    (folder / "recipe_garbled.py").write_text("class Part(:\n")
    sys.path.insert(0, str(folder))
    yield "recipe_plugins"
    sys.path.remove(str(folder))


def test_values_take_the_types_of_their_annotations(plugins):
    tree = {
        "target": f"{plugins}.Part",
        "args": {
            "size": [1, 2],
            "where": "a/b",
            "inner": "iid",
            "table": {"k": 1},
            "either": ["a"],
            "exact": [1, 2, 3],
        },
    }
    size, where, shade, inner, table, either, exact = instantiate(tree, "partitioner", "partition").given
    assert (size, where, shade) == ((1, 2), Path("a/b"), "dark")
    assert type(inner).name == "iid"
    assert (table, either, exact) == ({"k": 1}, ["a"], (1, 2, 3))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"size": [1], "where": "x"}, "partition.args.size: expected tuple[int, int], got [1] (list)"),
        ({"size": [1, "a"], "where": "x"}, "partition.args.size.1: expected int, got 'a'"),
        ({"size": [1, 2], "where": 3}, "partition.args.where: expected a path, got 3 (int)"),
        ({"size": [1, 2], "where": "x", "shade": "grey"}, "partition.args.shade: expected one of 'light', 'dark'"),
        ({"size": [1, 2], "where": "x", "inner": "ii"}, "partition.args.inner: unknown partitioner 'ii'"),
        ({"size": [1, 2], "where": "x", "inner": 4}, "partition.args.inner: expected Partitioner or null, got 4 (int)"),
        ({"size": [1, 2], "where": "x", "table": {"a": "b"}}, "partition.args.table.a: expected float, got 'b'"),
        (
            {"size": [1, 2], "where": "x", "either": {}},
            "partition.args.either: expected int or list[str], got {} (dict)",
        ),
        ({"size": [1, 2]}, "partition.args.where: missing"),
    ],
)
def test_annotations_of_own_plugins_are_checked(plugins, args, words):
    found = problems(partition={"target": f"{plugins}.Part", "args": args})
    assert len(found) == 1 and words in found[0]


def test_what_a_constructor_raises_comes_with_its_key(plugins):
    with pytest.raises(UserError, match=r"^partition\.args\.size: size must not be negative \(ValueError, .*:\d+\)$"):
        instantiate(Component(f"{plugins}.Part", {"size": [-1, 2], "where": "x"}), "partitioner", "partition")
    with pytest.raises(UserError, match=r"^partition: .*\(TypeError, .*recipe_plugins.py:\d+\)$"):
        instantiate(Component(f"{plugins}.Part", {"size": [99, 2], "where": "x"}), "partitioner", "partition")
    with pytest.raises(UserError, match=r"^p: recipe_plugins.make_wrong made a int, expected a partitioner"):
        instantiate(Component(f"{plugins}.make_wrong", {}), "partitioner", "p")


def test_nothing_is_constructed_before_all_arguments_are_checked(plugins):
    inner = {"target": f"{plugins}.Part", "args": {"size": [-1, 2], "where": "x"}}
    args = {"size": [1, 2], "where": "x", "inner": inner, "table": {"a": "b"}}
    with pytest.raises(UserError, match=r"^partition\.args\.table\.a: expected float, got 'b'$"):
        instantiate(Component(f"{plugins}.Part", args), "partitioner", "partition")
    with pytest.raises(UserError, match=r"^partition\.args\.inner\.args\.size: size must not be negative "):
        instantiate(Component(f"{plugins}.Part", {**args, "table": {}}), "partitioner", "partition")


def test_a_function_may_make_a_component(plugins):
    assert recipe(partition={"target": f"{plugins}.make", "args": {"size": 3}}).partition.args == {"size": 3}
    assert instantiate(Component(f"{plugins}.make", {"size": 3}), "partitioner", "partition").given[0] == (3, 3)


def test_a_target_that_cannot_be_imported_is_explained(plugins):
    with pytest.raises(UserError, match="importing recipe_broken failed: No module named 'package_that_is_not_there'"):
        instantiate(Component("recipe_broken.Part"), "partitioner", "partition")


def test_a_target_whose_file_is_no_python_is_explained(plugins):
    found = problems(partition="recipe_garbled.Part")
    assert len(found) == 1
    assert "importing recipe_garbled failed: invalid syntax (recipe_garbled.py, line 1)" in found[0]


def test_instantiate_checks_what_was_never_loaded():
    with pytest.raises(UserError, match=r"^method\.args\.mu: expected float, got 'x'$"):
        instantiate(Component("fedprox", {"mu": "x"}), "method", "method")


# --- the schema itself


def test_every_key_has_help():
    assert [path for path, _, _, doc in keys(Recipe) if not doc] == []
    assert {f.name for f in dataclasses.fields(Recipe)} <= {path for path, *_ in keys(Recipe)}


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Bounds(1), [1, 5], [0], "≥ 1"),
        (Bounds(0, open_low=True), [0.1], [0], "> 0"),
        (Bounds(0, 1, open_low=True), [1, 0.1], [0, 1.1], "in (0, 1]"),
        (Bounds(0, 1, open_high=True), [0, 0.9], [1, -1], "in [0, 1)"),
    ],
)
def test_bounds(bounds, inside, outside, text):
    assert all(v in bounds for v in inside) and not any(v in bounds for v in outside)
    assert str(bounds) == text


def test_an_override_need_not_suit_a_variant_that_is_not_run():
    tree = {
        "method": "single_site",
        "data": "digits",
        "specialists": ["mlp"],
        "local_training": {"optimizer": {"target": "adam", "args": {"lr": 0.1}}},
        "compare": {"variants": {"other": {"local_training.optimizer": {"target": "sgd", "args": {"lr": 0.1}}}}},
    }
    override = "local_training.optimizer.args.betas=[0.9,0.99]"  # which sgd does not know
    assert from_mapping(tree, [override]).local_training.optimizer.args["betas"] == [0.9, 0.99]
    with pytest.raises(RecipeError, match="betas"):
        from_mapping(tree, [override], variant=tree["compare"]["variants"]["other"])
