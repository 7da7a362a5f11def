"""Digests of some forty small runs: what a change of the code's structure must leave as it is.

    python -m tests.golden write BEFORE.json
    python -m tests.golden compare BEFORE.json [NAME …]     # some runs only, e.g. fedavg resumed

Every method, both executors, two processes, a resumed run, clients' states on disk, DP-SGD, robust rules, adversaries,
audits, and each export that these models allow. A digest is of the student's bytes, of every round's record without
its seconds, and of what was counted. Digests hold on one machine and one set of library versions, so they are
written before a change and compared after it, and never committed.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import rank_jobs

MORE = {
    "federated_distillation_stacked": ("federated_distillation", ("client_execution=vectorized",)),
    "federated_distillation_on_disk": ("federated_distillation", ("federation.client_state=disk",)),
    "fedavg_stacked": ("fedavg", ("client_execution=vectorized",)),
    "fedprox_stacked": ("fedprox", ("client_execution=vectorized",)),
    "knowledge_on_disk": ("knowledge", ("federation.client_state=disk",)),
    "dp_sgd": ("fedavg", ("privacy={epsilon: 8, delta: 1.0e-3}", "local_training.batch_size=16")),
    "krum": ("fedavg", ("federation.clients=6", "method.args.robust={target: krum, args: {num_attackers: 1}}")),
    "two_processes": ("federated_distillation", ("fabric.devices=2",)),
}
"""Further runs: which job, and what is set differently."""

EXPORTS = {
    "timm": ("student={target: timm, args: {model: test_resnet}}",),
    "torch": (),
    "onnx": (),
}


def digest(value: object) -> str:
    """A hex digest of anything that JSON can hold; floats by their shortest exact form."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def outcome(run: Callable[[], dict]) -> dict[str, str]:
    """One digest for each part of what a run gives; an error's text in their place."""
    try:
        return {part: digest(value) for part, value in run().items()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def resumed(folder: Path) -> dict:
    """A run that stops after its first round and goes on."""
    rank_jobs.run("knowledge", 1, folder, ("federation.rounds=1",))
    return rank_jobs.run("knowledge", 1, folder, ("federation.rounds=3",), resume=True)


def apart(name: str, folder: Path, more: tuple[str, ...]) -> dict:
    """A run as the command line starts it, with its processes."""
    from fdl.runs import run as runs
    from fdl.state import checkpoint

    summary = runs.run_recipe(rank_jobs.recipe(name, 2, more, folder), folder)
    student = checkpoint.load_newest(folder / "checkpoints")[0]["student"]
    kept = ("communication", "participants")
    return {"student": {n: t.double().tolist() for n, t in student.items()}, **{key: summary[key] for key in kept}}


def exported(format: str, folder: Path, more: tuple[str, ...]) -> dict:
    """The tensors of an export, or its graph's bytes."""
    from safetensors.torch import load_file

    from fdl.runs import run as runs
    from fdl.runs.export import export

    runs.run_recipe(rank_jobs.recipe("fedavg", 1, more, folder), folder)
    written = export(folder, format)
    found = {}
    for path in sorted(written.rglob("*")):
        if path.suffix == ".safetensors":
            found[path.name] = {name: tensor.double().tolist() for name, tensor in load_file(path).items()}
        elif path.name == "config.json":
            found[path.name] = path.read_text()
        else:
            found[path.name] = path.stat().st_size if path.suffix == ".onnx" else "there"
    return found


def runs_of(folder: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Name and run of each."""
    for name in rank_jobs.JOBS:
        yield name, lambda name=name: rank_jobs.run(name, 1, folder / name)
    for name, (job, more) in MORE.items():
        if name == "two_processes":
            yield name, lambda name=name, job=job, more=more: apart(job, folder / name, more)
        else:
            yield name, lambda name=name, job=job, more=more: rank_jobs.run(job, 1, folder / name, more)
    yield "resumed", lambda: resumed(folder / "resumed")
    for format, more in EXPORTS.items():
        yield f"export_{format}", lambda f=format, m=more: exported(f, folder / f"export_{f}", m)


def main(command: str, file: str, *names: str) -> int:
    """Write the digests, or compare with those written before (of the named runs, default all); 1 if any differs."""
    before = json.loads(Path(file).read_text()) if command == "compare" else {}
    found, differ = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, run in runs_of(Path(folder)):
            if names and name not in names:
                continue
            found[name] = outcome(run)
            same = not before or found[name] == before.get(name)
            differ += not same
            print(f"{name:32} {'as before' if before and same else 'DIFFERS' if not same else found[name]}", flush=True)
            if not same:
                print(f"    before {before.get(name)}\n    now    {found[name]}", flush=True)
    if command == "write":
        Path(file).write_text(json.dumps(found, indent=1))
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
