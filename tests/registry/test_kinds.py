import importlib
import inspect
import subprocess
import sys
import textwrap

import pytest

from fdl.errors import UserError
from fdl.registry.installed import kind_of_class
from fdl.registry.kinds import KINDS, snake_case
from fdl.registry.plugins import entries, short_names
from fdl.registry.static_signatures import signature
from fdl.registry.static_source import Definition, derives, lookup
from fdl.registry.targets import find
from fdl.utils.imports import import_dotted
from fdl.utils.suggest import suggest

BUILT_IN = [(kind.name, entry) for kind in KINDS.values() for entry in entries(kind)]


@pytest.mark.parametrize(("kind", "entry"), BUILT_IN, ids=[f"{k}-{e.name}" for k, e in BUILT_IN])
def test_what_the_source_says_is_what_python_sees(kind, entry):
    found = find(entry.name, KINDS[kind])
    imported = import_dotted(entry.path)
    assert found.definition is not None, "resolved without import"
    assert issubclass(imported, import_dotted(KINDS[kind].base))
    if KINDS[kind].short_name is None:
        assert imported.name == entry.name
    if entry.path.startswith("fdl."):  # torch renames the modules of its optimisers
        assert entry.file.samefile(inspect.getsourcefile(imported))
        assert inspect.getsourcelines(imported)[1] == entry.line
        assert entry.summary == inspect.getdoc(imported).partition("\n")[0] != ""
    runtime = [p for p in inspect.signature(imported).parameters.values() if p.name != "self"]
    static = found.signature.parameters
    for parameter in runtime:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue  # its meaning, the base class's parameters, is tested below
        assert parameter.name in static
        assert static[parameter.name].required == (parameter.default is parameter.empty)
    open_at_run_time = any(p.kind is p.VAR_KEYWORD for p in runtime)
    assert set(static) == {p.name for p in runtime} or open_at_run_time


def test_every_class_with_a_short_name_is_listed():
    """The other direction: classes found by importing all of fdl's plug-in modules."""
    for kind in KINDS.values():
        if kind.short_name is not None:
            continue
        base = import_dotted(kind.base)
        classes = set()
        for place in kind.search_paths:
            module = importlib.import_module(place)
            folder = getattr(module, "__path__", [None])[0]
            names = [f"{place}.{f.stem}" for f in sorted(map_files(folder))] if folder else [place]
            for name in names:
                for cls in vars(importlib.import_module(name)).values():
                    own = isinstance(cls, type) and issubclass(cls, base)
                    if own and cls.__module__ == name and vars(cls).get("name"):
                        classes.add((cls.name, f"{name}.{cls.__qualname__}"))
        assert classes == set(short_names(kind).items())


def map_files(folder):
    from pathlib import Path

    return [f for f in Path(folder).glob("*.py") if f.stem != "__init__"]


def test_listing_and_finding_import_no_torch():
    code = """
        import sys
        from fdl.registry.kinds import KINDS
        from fdl.registry.plugins import entries
        from fdl.registry.targets import find
        for kind in KINDS.values():
            for entry in entries(kind):
                find(entry.name, kind)
        assert entries(KINDS["optimizer"]) and entries(KINDS["method"])
        print([name for name in ("torch", "lightning", "sklearn", "torchvision") if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StepLR", "step_lr"),
        ("CosineAnnealingLR", "cosine_annealing_lr"),
        ("ReduceLROnPlateau", "reduce_lr_on_plateau"),
        ("OneCycleLR", "one_cycle_lr"),
    ],
)
def test_snake_case(name, expected):
    assert snake_case(name) == expected


def test_torch_short_names():
    assert find("adamw", KINDS["optimizer"]).path == "torch.optim.AdamW"
    assert find("cosine_annealing_lr", KINDS["scheduler"]).path == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert "optimizer" not in short_names(KINDS["optimizer"])
    assert "lr_scheduler" not in short_names(KINDS["scheduler"])


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("fedvg", "method", ["unknown method 'fedvg'", "did you mean 'fedavg'?"]),
        ("xyz", "server_optimizer", ["unknown server optimizer 'xyz'", "known: adagrad, adam"]),
        ("nosuchpackage.Method", "method", ["there is no module 'nosuchpackage'"]),
        ("torch.optim.SDG", "optimizer", ["torch.optim has no 'SDG'", "did you mean 'SGD'?"]),
        ("fdl.methods.fedavg.FedAvgg", "method", ["fdl.methods.fedavg has no 'FedAvgg'", "did you mean 'FedAvg'?"]),
        ("fdl.methods.fedvg.FedAvg", "method", ["fdl.methods has no 'fedvg'", "did you mean 'fedavg'?"]),
        ("torch.optim", "optimizer", ["torch.optim is a module, expected an optimizer in it"]),
        ("torch.nn.Linear", "optimizer", ["is not an optimizer", "does not derive from torch.optim.Optimizer"]),
        ("torchvision.models.resnet18", "module", ["is not a module", "lightning.LightningModule"]),
        ("fdl.methods.fedavg.FedAvg", "module", ["is not a module", "lightning.LightningModule"]),
        ("lbfgs", "optimizer", ["cannot be used: its step() needs 'closure'"]),
        ("reduce_lr_on_plateau", "scheduler", ["cannot be used: its step() needs 'metrics'"]),
    ],
)
def test_what_cannot_be_found_is_explained(target, kind, words):
    with pytest.raises(UserError) as caught:
        find(target, KINDS[kind])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "torch.optim.SGD",
        "torch.nn.Linear",
        "torch.nn.Conv2d",
        "sklearn.decomposition.PCA",
        "torchvision.datasets.CIFAR10",
    ],
)
def test_signatures_of_other_packages(path):
    runtime = inspect.signature(import_dotted(path)).parameters
    static = signature(lookup(path)).parameters
    assert [(p.name, p.default is p.empty) for p in runtime.values()] == [(p.name, p.required) for p in static.values()]


def test_reexports_and_stars_are_followed():
    assert lookup("lightning.LightningModule").dotted == "lightning.pytorch.core.module.LightningModule"
    assert lookup("torch.nn.Linear").dotted == "torch.nn.modules.linear.Linear"
    assert lookup("torchvision.models.resnet18").dotted == "torchvision.models.resnet.resnet18"


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A package of a user's own plug-ins, as odd as Python allows."""
    folder = tmp_path_factory.mktemp("plugins")
    package = folder / "catalog_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("from .own import *\nfrom . import own as alias\n")
    (package / "own.py").write_text(
        textwrap.dedent(
            '''
            from __future__ import annotations
            import dataclasses
            from dataclasses import dataclass, field
            from typing import ClassVar, TYPE_CHECKING
            from fdl.methods import fedavg
            from fdl.methods.base import Method
            if TYPE_CHECKING:
                from fdl.knowledge.aggregation.server_optimizers import ServerOptimizer
            try:
                import nothing_of_this_name
            except ImportError:
                nothing_of_this_name = None

            class Plain(fedavg.FedAvg):
                """Inherits its constructor."""

            class Forwarding(fedavg.FedAvg):
                def __init__(self, *, extra: int = 1, **kwargs):
                    super().__init__(**kwargs)

            class Fixing(fedavg.FedAvg):
                def __init__(self, **kwargs):
                    super().__init__(optimizer=None, **kwargs)

            class Swallowing(fedavg.FedAvg):
                def __init__(self, **kwargs):
                    self.kwargs = kwargs

            @dataclass
            class Base(Method):
                lr: float
                shared: ClassVar[int] = 3
                hidden: list[int] = field(default_factory=list)
                derived: int = field(init=False, default=0)

                def local_update(self, client, download):
                    return None

            @dataclasses.dataclass
            class Derived(Base):
                more: str = "x"

            def factory(lr: float, steps: int = 2) -> Method:
                return Derived(lr)

            def untyped(lr): return Derived(lr)

            def wrong() -> int: return 1

            Renamed = Derived
            Made = type("Made", (fedavg.FedAvg,), {})
            '''
        )
    )
    sys.path.insert(0, str(folder))
    yield "catalog_plugins"
    sys.path.remove(str(folder))


@pytest.mark.parametrize(
    ("name", "parameters", "is_open"),
    [
        ("Plain", ["optimizer", "robust"], False),
        ("Forwarding", ["extra", "optimizer", "robust"], False),
        ("Fixing", ["robust"], False),
        ("Swallowing", [], True),
        ("Derived", ["lr", "hidden", "more"], False),
        ("Renamed", ["lr", "hidden", "more"], False),
        ("alias.Derived", ["lr", "hidden", "more"], False),
        ("factory", ["lr", "steps"], False),
        ("untyped", ["lr"], False),
    ],
)
def test_own_plugins(plugins, name, parameters, is_open):
    found = find(f"{plugins}.{name}", KINDS["method"])
    assert found.definition is not None
    assert sorted(found.signature.parameters) == sorted(parameters)
    assert found.signature.open == is_open
    imported = found.load()
    if not is_open:
        values = dict.fromkeys(parameters, 1.0)
        inspect.signature(imported).bind(**values)


def test_what_the_source_does_not_tell_is_imported(plugins):
    found = find(f"{plugins}.own.Made", KINDS["method"])
    assert found.definition is None
    assert list(found.signature.parameters) == ["optimizer", "robust"]


def test_a_function_that_makes_something_else_is_refused(plugins):
    with pytest.raises(UserError, match=r"wrong is not a method"):
        find(f"{plugins}.wrong", KINDS["method"])


def test_literal_attributes_are_inherited(plugins):
    assert lookup(f"{plugins}.Plain").constant("requires") == ("student",)
    assert lookup("fdl.methods.federated_distillation.FederatedDistillation").constant("requires") == (
        "student",
        "specialists",
        "proxy",
    )
    assert lookup(f"{plugins}.Plain").constant("nothing") is None


def test_derives_knows_what_it_does_not_know(plugins):
    method = lookup("fdl.methods.base.Method")
    assert derives(lookup(f"{plugins}.Plain"), method) is True
    assert derives(lookup("torch.nn.Linear"), lookup("torch.nn.Module")) is True
    assert derives(lookup("torch.Tensor"), method) is None  # its base is compiled
    assert isinstance(method, Definition) and derives(lookup("fractions.Fraction"), method) is False


def test_kind_of_a_base_class():
    assert kind_of_class(lookup("fdl.comm.stages.base.Stage")).name == "codec"
    assert kind_of_class(lookup("fdl.modules.classifier.ImageClassifier")).name == "module"
    assert kind_of_class(lookup("pathlib.PurePath")) is None


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("cleints", ["clients", "rounds"], "; did you mean 'clients'?"),
        ("Clients", ["clients"], "; did you mean 'clients'?"),
        ("SDG", ["sgd", "SGD"], "; did you mean 'SGD'?"),
        ("q", ["b", "a"], "; known: a, b"),
        ("q", [], ""),
    ],
)
def test_suggest(word, known, expected):
    assert suggest(word, known) == expected
