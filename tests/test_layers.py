"""Every package imports only what lies below it, and no two files import each other in a circle.

Imports inside functions and under ``TYPE_CHECKING`` count: a file that names another one knows it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fdl"

ALLOWED = {
    "__main__": {"cli"},
    # what starts runs
    "cli": {"runs", "build", "federation", "loop", "recipe", "registry", "engine", "metrics", "datamodules", "utils"},
    "runs": {
        *("build", "attacks", "loop", "callbacks", "federation", "engine", "recipe", "metrics", "modules"),
        *("methods", "participants", "datamodules", "registry", "state", "utils"),
    },
    "build": {
        *("attacks", "loop", "callbacks", "federation", "evaluators", "adversaries", "methods", "privacy", "knowledge"),
        *("participants", "engine", "recipe", "encoders", "metrics", "faults", "datamodules", "comm", "modules"),
        *("registry", "state", "utils"),
    },
    "attacks": {
        *("loop", "callbacks", "federation", "methods", "privacy", "knowledge", "participants", "engine", "recipe"),
        *("encoders", "metrics", "datamodules", "comm", "modules", "messages", "state", "utils"),
    },
    # the round and its parts
    "loop": {
        *("callbacks", "federation", "evaluators", "adversaries", "methods", "participants", "engine", "recipe"),
        *("comm", "messages", "state", "utils"),
    },
    "callbacks": {"federation", "metrics", "state", "utils"},
    "federation": {
        *(
            "evaluators",
            "adversaries",
            "methods",
            "privacy",
            "knowledge",
            "participants",
            "engine",
            "recipe",
            "metrics",
        ),
        *("datamodules", "comm", "modules", "messages", "state", "utils"),
    },
    "evaluators": {"adversaries", "participants", "metrics", "datamodules", "modules", "state", "utils"},
    "adversaries": {"methods", "knowledge", "participants", "recipe", "datamodules", "modules", "messages", "utils"},
    "methods": {
        *("robust", "knowledge", "participants", "engine", "recipe", "datamodules", "modules", "messages", "losses"),
        *("state", "utils"),
    },
    "privacy": {
        "knowledge",
        "participants",
        "engine",
        "recipe",
        "datamodules",
        "modules",
        "messages",
        "state",
        "utils",
    },
    "robust": {"knowledge", "participants", "engine", "datamodules", "messages", "state", "utils"},
    "knowledge": {
        *("participants", "engine", "recipe", "encoders", "metrics", "datamodules", "modules", "registry"),
        *("messages", "losses", "state", "utils"),
    },
    "participants": {"engine", "recipe", "encoders", "datamodules", "modules", "messages", "state", "utils"},
    # what computes
    "engine": {"recipe", "encoders", "datamodules", "modules", "state", "utils"},
    "recipe": {"metrics", "comm", "registry", "utils"},
    "encoders": {"datamodules", "modules", "utils"},
    "metrics": {"datamodules", "modules", "utils"},
    "faults": {"comm", "messages", "state", "utils"},
    "datamodules": {"modules", "utils"},
    "comm": {"messages", "state", "utils"},
    "modules": {"registry", "losses", "state", "utils"},
    "registry": {"utils"},
    "messages": {"state"},
    "state": {"utils"},
    "losses": set(),
    "utils": set(),
    "errors": set(),
    # what it offers is imported on first use
    "__init__": {
        *(
            "build",
            "callbacks",
            "comm",
            "datamodules",
            "engine",
            "evaluators",
            "knowledge",
            "loop",
            "messages",
            "methods",
        ),
        *("modules", "participants", "recipe", "runs"),
    },
}
"""What each package may import besides itself; ``errors`` is everybody's."""


def name_of(path: Path) -> str:
    """A file's dotted name; that of a package for its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of every module of ours that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((node.lineno, whole if whole in MODULES else node.module))
    # the package itself names what it offers, lazily; it is imported with whatever lies in it
    return [(line, name) for line, name in found if name.startswith("fdl.") and name in MODULES]


def package_of(name: str) -> str:
    """The first part below ``fdl``."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_package_has_a_rule():
    assert {package_of(name) for name in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_what_lies_below_it(package):
    offenders = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if package_of(module) == package
        for line, name in imports(path)
        if package_of(name) not in ALLOWED[package] | {package, "errors", "__init__"}
    ]
    assert not offenders, "\n".join(offenders)


def test_the_rules_themselves_have_no_circle():
    """Packages can be put in an order in which each imports only later ones."""
    left = dict(ALLOWED)
    while left:
        free = [package for package in left if not any(package in others for p, others in left.items() if p != package)]
        assert free, f"a circle among {sorted(left)}"
        for package in free:
            del left[package]


def test_no_files_import_each_other_in_a_circle():
    graph = {module: {name for _, name in imports(path)} - {module} for module, path in MODULES.items()}
    while True:  # whoever imports nothing that is left cannot be part of a circle
        free = {module for module, others in graph.items() if not others & graph.keys()}
        if not free:
            break
        graph = {module: others for module, others in graph.items() if module not in free}
    # nor whoever is imported by nothing that is left
    while idle := graph.keys() - set().union(*graph.values()):
        graph = {module: others for module, others in graph.items() if module not in idle}
    assert not graph, f"a circle among {sorted(graph)}"
