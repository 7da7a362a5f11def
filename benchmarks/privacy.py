"""What privacy costs a student, and what is left for an attacker to find, by mechanism and ε.

    python benchmarks/privacy.py [--data cifar10] [--file FILE.npz --weights FILE.npz] [--epsilons 1 2 4 8]
        [--only dp_sgd votes responses] [--seeds 0 1 2] [--shadows N] [--sites N] [--quick] [--output D]

Sites (IID) train linear specialists on frozen public features; these answer a public proxy set, and a linear
student learns from the answers, in one round. Three mechanisms:

- `dp_sgd`: the specialists train with noise. ε hides one *example*, from everybody but its site.
- `votes`: GNMax. The server adds noise to counts of votes. ε hides all of one *institution*, from everybody but the
  server.
- `responses`: the server adds noise to the mean of clipped logits. The level is the same.

An ε of one level says nothing of the other: compare within a mechanism. With ε = ∞, `dp_sgd` is training without noise
or clipping, by settings that are the best for it; this *student without privacy* is what `relative` divides by. `votes`
and `responses` without noise are answers to the whole proxy set.

Public are the proxy images and, for photographs, the network. Digits are raw pixels. Photographs are a CIFAR-10 subset
of 12,500 and 3,000 test images, as a MobileNetV2 trained on ImageNet, and on none of them, sees them at 96 × 96 pixels;
these features are computed once and kept in D. Either are projected on the principal components of the *proxy* set and
divided by their norm. FILE.npz for images has JPEG streams (jpeg_header, and jpeg_*, offset_*, y_* for train and test),
that for weights is one of `layer_graph`; by default both are looked for in $FDL_DATA.

Every run is attacked: membership inference by loss threshold, or with `--shadows` by LiRA, on the student, on the
specialists and on what they answer, with the largest true-positive rate that (ε, δ) allows any attack beside it. Where
an account exceeds the ε that was asked for, or an attack shows more than the account says, with 99 % confidence, the
script fails. Such an attack can refute an account, and cannot prove one.

D gets privacy.md and privacy.csv (the table), privacy.png, the runs, and tensorboard/ with the same figure. Runs that
are complete in D are not run again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fdl.attacks.roc import ceiling
from fdl.privacy.accounting import solve_noise
from fdl.recipe import from_mapping
from fdl.runs import run as runs
from fdl.runs.compare import PlannedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DELTA, BAR, RATE = 1e-5, 0.85, 0.01
LINEAR = {"target": "mlp", "args": {"hidden": []}}
TRAIN, TEST = 12500, 3000


class Job(NamedTuple):
    """Data and settings; the latter were chosen on validation data, with seeds that are not reported.

    Attributes:
        sites: how many share the private images, IID.
        public: size of the proxy set.
        validation: number of images held out for the choice of settings, and as non-members.
        components: principal components that are kept.
        plain: training without privacy, steps and Adam's learning rate.
        steps: of DP-SGD; each takes in all examples.
        rate: learning rate of DP-SGD.
        votes: proxy images that are voted on, by ε; each costs.
        responses: proxy images that are answered, by ε; each costs.
    """

    sites: int
    public: int
    validation: int
    components: int
    plain: tuple[int, float]
    steps: int
    rate: float
    votes: dict[float, int]
    responses: dict[float, int]


JOBS = {
    "digits": Job(
        sites=20,
        public=400,
        validation=100,
        components=24,
        plain=(200, 0.1),
        steps=20,
        rate=10.0,
        votes={1: 5, 2: 20, 4: 40, 8: 40},
        responses={1: 5, 2: 5, 4: 40, 8: 100},
    ),
    "cifar10": Job(
        sites=10,
        public=2000,
        validation=500,
        components=128,
        plain=(200, 0.1),
        steps=20,
        rate=20.0,
        votes={1: 5, 2: 5, 4: 20, 8: 100},
        responses={1: 40, 2: 40, 4: 40, 8: 40},
    ),
}


# --- data


def neighbour(name: str) -> ModuleType:
    """Another script of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photographs(file: Path, weights: Path, folder: Path) -> dict[str, np.ndarray]:
    """Features of a frozen network, [n, D], and labels of both splits; computed once.

    Args:
        file: of JPEG streams.
        weights: of `layer_graph`.
        folder: where the result is kept.
    """
    target = folder / "features.npz"
    if not target.exists():
        import torch
        from PIL import Image

        from fdl.modules.layer_graph import LayerGraph

        network = LayerGraph(str(weights), {"size": 96}, num_classes=10, input_shape=(3, 32, 32)).eval()
        arrays = {}
        with np.load(file) as stored:
            header = stored["jpeg_header"].tobytes()
            for split, count in (("train", TRAIN), ("test", TEST)):
                body, starts = stored[f"jpeg_{split}"].tobytes(), stored[f"offset_{split}"]
                found = []
                for first in range(0, count, 250):
                    streams = [header + body[starts[i] : starts[i + 1]] for i in range(first, first + 250)]
                    images = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in streams])
                    with torch.inference_mode():
                        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
                        found.append(network(batch).embedding.numpy())
                arrays[f"x_{split}"] = np.concatenate(found)
                arrays[f"y_{split}"] = stored[f"y_{split}"][:count].astype(np.int64)
        np.savez(target.with_suffix(".partial.npz"), **arrays)
        target.with_suffix(".partial.npz").rename(target)
    with np.load(target) as stored:
        return dict(stored)


def pixels() -> dict[str, np.ndarray]:
    """Scikit-learn's digits, [n, 64] with black 0 and white 1, and labels of both splits."""
    arrays = neighbour("scaling").images(None)
    return {n: a.reshape(len(a), -1) / np.float32(255) if n.startswith("x") else a for n, a in arrays.items()}


def prepare(arrays: dict[str, np.ndarray], job: Job, folder: Path) -> dict[str, Any]:
    """Write public and private features apart, and return what a recipe says of them.

    Args:
        arrays: x_* [n, D] and y_*, the first training samples being the public ones.
        job: says how many these are, and to how many components all are brought.
        folder: where the files go.
    """
    public = arrays["x_train"][: job.public].astype(np.float64)
    mean = public.mean(0)
    basis = np.linalg.svd(public - mean, full_matrices=False)[2][: job.components].T

    def project(x: np.ndarray) -> np.ndarray:
        y = (x - mean) @ basis
        return (y / np.linalg.norm(y, axis=1, keepdims=True)).astype(np.float32)[:, :, None, None]

    outside, inside = folder / "public.npz", folder / "private.npz"
    np.savez(outside, x_train=project(public))
    labels = {"y_train": arrays["y_train"][job.public :], "y_test": arrays["y_test"]}
    np.savez(inside, x_train=project(arrays["x_train"][job.public :]), x_test=project(arrays["x_test"]), **labels)
    proxy = {"path": str(outside), "layout": "CHW", "y_train": None, "x_test": None}
    own = {"path": str(inside), "layout": "CHW", "validation": job.validation}
    return {"target": "arrays", "args": own | {"proxy": {"target": "arrays", "args": proxy}}}


# --- recipes


def plain(job: Job) -> dict[str, Any]:
    """Training and answers without privacy."""
    steps, rate = job.plain
    return {
        "method": {"target": "federated_distillation", "args": {"space": "logits", "feedback": "none"}},
        "local_training": {"steps": steps, "batch_size": 64, "optimizer": {"target": "adam", "args": {"lr": rate}}},
    }


def dp_sgd(job: Job, epsilon: float) -> dict[str, Any]:
    """Specialists that train with noise, a few steps on all their examples."""
    if math.isinf(epsilon):
        return {}
    every = {"steps": job.steps, "batch_size": 1 << 20}
    return {
        "privacy": {"epsilon": epsilon, "delta": DELTA, "clip": 1.0},
        "local_training": every | {"optimizer": {"target": "sgd", "args": {"lr": job.rate}}},
    }


def votes(job: Job, epsilon: float) -> dict[str, Any]:
    """Noisy counts of votes on some of the proxy set, or exact ones on all of it."""
    rows = _asked(job.votes, epsilon, job.public)
    # an answer is a Gaussian mechanism of noise multiplier σ / √2
    noise = 0.0 if math.isinf(epsilon) else math.sqrt(2) * solve_noise(epsilon, DELTA, 1.0, rows)
    return _released("noisy_votes", {"noise": noise}, "probabilities", rows / job.public, epsilon)


def responses(job: Job, epsilon: float) -> dict[str, Any]:
    """A noisy mean of clipped logits of some of the proxy set, or an exact one of all of it."""
    rows = _asked(job.responses, epsilon, job.public)
    noise = 0.0 if math.isinf(epsilon) else solve_noise(epsilon, DELTA, 1.0, 1)
    args = {"noise_multiplier": noise, "clip": 3.0, "by": "server"}
    return _released("noisy_responses", args, "logits", rows / job.public, epsilon)


def _asked(rows: dict[float, int], epsilon: float, public: int) -> int:
    """How many proxy images are asked about: what was chosen for the nearest ε, and all where nothing is private."""
    if math.isinf(epsilon):
        return public
    return rows[min(rows, key=lambda known: abs(math.log(known / epsilon)))]


def _released(name: str, args: dict[str, Any], space: str, share: float, epsilon: float) -> dict[str, Any]:
    release = {"target": name, "args": args}
    settings = {"space": space, "feedback": "none", "proxy_fraction": share, "private_release": release}
    limit = {} if math.isinf(epsilon) else {"epsilon": epsilon}
    return {
        "method": {"target": "federated_distillation", "args": settings},
        "privacy": {"training": "none", "delta": DELTA} | limit,
    }


MECHANISMS: dict[str, tuple[str, Callable[[Job, float], dict[str, Any]]]] = {
    "dp_sgd": ("example", dp_sgd),
    "votes": ("institution", votes),
    "responses": ("institution", responses),
}


class Cell(NamedTuple):
    """A mechanism at one ε, and its run with one seed."""

    mechanism: str
    epsilon: float
    run: PlannedRun


def plan(options: argparse.Namespace, folder: Path) -> list[Cell]:
    """All runs; their data are written to `folder`."""
    job = JOBS[options.data]
    folder.mkdir(parents=True, exist_ok=True)
    attack: dict[str, Any] = {"target": "loss_threshold"}
    if options.shadows:
        attack = {"target": "lira", "args": {"shadows": options.shadows}}
    arrays = pixels() if options.data == "digits" else photographs(*_files(options), folder)
    data = prepare(arrays, job, folder)
    base = {
        "data": data,
        "federation": {"clients": options.sites or job.sites, "rounds": 1, "calibration_fraction": 0.0},
        "specialists": [LINEAR],
        "student": LINEAR,
        "server_distil": {"steps": 100, "batch_size": 256, "optimizer": {"target": "adam", "args": {"lr": 0.05}}},
        "evaluation": {"metrics": ["accuracy"], "attacks": [attack]},
        "fabric": {"accelerator": "cpu", "threads": 1},
        "callbacks": [],
    }
    planned = []
    cells = [*product(options.only, sorted({*options.epsilons, math.inf})), ("dp_sgd", math.inf)]
    for mechanism, epsilon in dict.fromkeys(cells):
        tree = base | plain(job) | MECHANISMS[mechanism][1](job, epsilon)
        for seed in options.seeds:
            name = f"{mechanism}-{epsilon:g}"
            recipe = from_mapping(tree | {"name": f"privacy-{options.data}-{name}-seed-{seed}", "seed": seed})
            planned.append(Cell(mechanism, epsilon, PlannedRun(name, seed, recipe, folder / name / f"seed-{seed}")))
    return planned


def _files(options: argparse.Namespace) -> tuple[Path, Path]:
    home = Path(os.environ.get("FDL_DATA", "."))
    weights = home / "weights" / "mobilenet_v2_1.0_224_imagenet_dequant.npz"
    return options.file or home / "cifar10_jpegq75_full60k.npz", options.weights or weights


# --- results


def measure(cell: Cell) -> dict[str, Any]:
    """What one run came to.

    Returns:
        ``accuracy``; ``spent``, its account's ε; ``violations``; and for ``student`` and ``specialists`` the attack's
        ``_fpr`` (1 %, or the smallest rate that so many non-members tell), ``_tpr`` there, ``_ceiling`` (None where
        nothing is claimed), ``_auc`` and ``_shown``, the ε that the attack shows.
    """
    summary = runs.read_summary(cell.run.folder)
    (found,) = (attack["metrics"] for attack in summary["audit"]["attacks"].values())
    spent = summary["privacy"]["epsilon"]
    line = {
        "accuracy": summary["metrics"]["student/test/accuracy"],
        "spent": math.inf if spent is None else float(spent),
        "violations": [f"{cell.run.folder}: {sentence}" for sentence in summary["audit"]["violations"]],
    }
    if not line["spent"] <= cell.epsilon * (1 + 1e-9):
        line["violations"].append(
            f"{cell.run.folder}: its account says ε = {spent}, and {cell.epsilon:g} was asked for"
        )
    for target in ("student", "specialists"):
        own = {name.partition("/")[2]: value for name, value in found.items() if name.startswith(f"{target}/")}
        rate = max(RATE, own["resolved_fpr"])
        at = "tpr_at_1pct_fpr" if rate == RATE else "tpr_at_resolved_fpr"
        proven = own.get("epsilon")
        line |= {f"{target}_fpr": rate, f"{target}_tpr": own[at], f"{target}_auc": own["auc"]}
        line[f"{target}_ceiling"] = None if proven is None else float(ceiling(np.array(rate), proven, DELTA))
        line[f"{target}_shown"] = own["epsilon_lower"]
    return line


def tabulate(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a mechanism and ε: means over seeds; the deviations of accuracy and of what is left of it."""
    measured = {(cell.mechanism, cell.epsilon, cell.run.seed): measure(cell) for cell in cells}
    table = []
    for mechanism, epsilon in dict.fromkeys((cell.mechanism, cell.epsilon) for cell in cells):
        mine = {seed: line for (m, e, seed), line in measured.items() if (m, e) == (mechanism, epsilon)}
        relative = [m["accuracy"] / measured["dp_sgd", math.inf, seed]["accuracy"] for seed, m in mine.items()]
        lines = list(mine.values())
        row: dict[str, Any] = {"mechanism": mechanism, "level": MECHANISMS[mechanism][0], "epsilon": epsilon}
        row |= {"spent": max(m["spent"] for m in lines), "seeds": len(lines)}
        for key, values in (("accuracy", [m["accuracy"] for m in lines]), ("relative", relative)):
            row[key] = statistics.fmean(values)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        for key in (f"{target}_{what}" for target in ("student", "specialists") for what in ("fpr", "tpr", "auc")):
            row[key] = statistics.fmean(m[key] for m in lines)
        for target in ("student", "specialists"):
            claims = [m[f"{target}_ceiling"] for m in lines]
            row[f"{target}_ceiling"] = None if None in claims else max(claims)
            row[f"{target}_shown"] = max(m[f"{target}_shown"] for m in lines)
        row["violations"] = [sentence for m in lines for sentence in m["violations"]]
        table.append(row)
    return table


def verdict(table: Sequence[dict[str, Any]]) -> str:
    """Whether the bar is met: how much of the student's accuracy ε = 1 leaves, at the level of examples."""
    one = next((row for row in table if row["mechanism"] == "dp_sgd" and row["epsilon"] == 1), None)
    if one is None:
        return "ε = 1 with dp_sgd was not run."
    met = "met" if one["relative"] >= BAR else "not met"
    kept = f"the student keeps {one['relative']:.3f} of its accuracy; the bar of {BAR} is {met}"
    return f"With ε = 1 for an example, δ = {DELTA:g}, {kept}."


def markdown(table: Sequence[dict[str, Any]], title: str) -> list[str]:
    """The table for people."""
    rate = table[0]["student_fpr"], table[0]["specialists_fpr"]
    lines = [
        title,
        "",
        "| mechanism | hides one | ε | spent | seeds | test accuracy | relative "
        f"| student: TPR at {rate[0]:.1%} FPR | allowed | AUC | specialists: TPR at {rate[1]:.1%} FPR | allowed | AUC "
        "| ε shown |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        spread = {k: "" if row[f"{k}_std"] is None else f" ± {row[f'{k}_std']:.3f}" for k in ("accuracy", "relative")}
        attacks = []
        for target in ("student", "specialists"):
            allowed = row[f"{target}_ceiling"]
            attacks += [f"{row[f'{target}_tpr']:.3f}", "–" if allowed is None else f"{allowed:.3f}"]
            attacks.append(f"{row[f'{target}_auc']:.3f}")
        shown = max(row["student_shown"], row["specialists_shown"])
        cells = [
            *(row["mechanism"], row["level"], _number(row["epsilon"]), _number(row["spent"], ".3f")),
            *(str(row["seeds"]), f"{row['accuracy']:.3f}{spread['accuracy']}"),
            *(f"{row['relative']:.3f}{spread['relative']}", *attacks, f"≥ {shown:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = "Mean ± standard deviation over seeds; what the columns mean: benchmarks/privacy.py."
    broken = [f"FAILED: {sentence}" for row in table for sentence in row["violations"]]
    return [*lines, "", verdict(table), notes, *broken, ""]


def _number(value: float, form: str = "g") -> str:
    return "∞" if math.isinf(value) else format(value, form)


def figure(table: Sequence[dict[str, Any]], title: str) -> Figure:
    """Accuracy, and what membership inference finds, over ε."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    drawn = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    left, right = drawn.subplots(1, 2)
    finite = sorted({row["epsilon"] for row in table if math.isfinite(row["epsilon"])})
    for number, mechanism in enumerate(dict.fromkeys(row["mechanism"] for row in table)):
        rows = [row for row in table if row["mechanism"] == mechanism]
        some = [row for row in rows if math.isfinite(row["epsilon"])]
        ε, look = [row["epsilon"] for row in some], {"color": f"C{number}", "marker": "o"}
        label = f"{mechanism}, ε per {rows[0]['level']}"
        left.errorbar(
            ε, [row["accuracy"] for row in some], [row["accuracy_std"] or 0.0 for row in some], **look, label=label
        )
        for row in rows:
            if math.isinf(row["epsilon"]):
                left.axhline(row["accuracy"], color=f"C{number}", linestyle=":", label=f"{mechanism}, ε = ∞")
                right.axhline(row["student_tpr"], color=f"C{number}", linestyle=":", label=f"{mechanism}, ε = ∞")
        right.plot(ε, [row["student_tpr"] for row in some], **look, label=label)
    rate = table[0]["student_fpr"]
    right.plot(finite, ceiling(np.array([rate] * len(finite)), 0, 0), color="grey", label="a guess")
    allowed = [float(ceiling(np.array(rate), ε, DELTA)) for ε in finite]
    right.plot(finite, allowed, color="black", linestyle="--", label=f"most that ε allows, δ = {DELTA:g}")
    left.set(ylabel="test accuracy of the student", title=title)
    right.set(ylabel=f"true-positive rate at {rate:.1%} FPR", title="Membership inference on the student", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="ε", xscale="log", xticks=finite, xticklabels=[f"{ε:g}" for ε in finite])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return drawn


def write(folder: Path, table: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    """Table and figure, as files and for TensorBoard."""
    from fdl.utils.tensorboard import open_writer

    (folder / "privacy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open(folder / "privacy.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"violations": " ".join(row["violations"])} for row in table)
    drawn = figure(table, lines[0].rstrip("."))
    drawn.savefig(folder / "privacy.png")
    events = open_writer(folder / "tensorboard")
    events.add_figure("privacy/accuracy", drawn, 0, close=False)
    events.add_text("privacy/table", "\n".join(lines), 0)
    events.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, and write and print the table; returns 1 where an account or a ceiling was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(JOBS), default="digits")
    parser.add_argument("--file", type=Path, help="the images, for cifar10")
    parser.add_argument("--weights", type=Path, help="of the frozen network, for cifar10")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1, 2, 4, 8], help="besides ∞")
    parser.add_argument("--only", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS), metavar="MECHANISM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shadows", type=int, help="attack with LiRA and so many shadow federations")
    parser.add_argument("--sites", type=int, help="how many share the private images; default 20, or 10 for cifar10")
    parser.add_argument("--quick", action="store_true", help="four sites and one ε: tells nothing, tests all")
    parser.add_argument("--output", type=Path, help="default runs/privacy-<data>")
    options = parser.parse_args(argv)
    if options.quick:
        options.epsilons, options.sites = [1.0], 4
    folder = options.output or Path("runs") / f"privacy-{options.data}"
    cells = plan(options, folder)
    for number, cell in enumerate(cells, 1):
        done = runs.is_complete(cell.run.recipe, cell.run.folder)
        note = ", complete already" if done else ""
        print(f"{number} of {len(cells)}: {cell.run.variant}, seed {cell.run.seed}{note}", flush=True)
        if not done:
            runs.run_recipe(cell.run.recipe, cell.run.folder, resume=runs.has_checkpoint(cell.run.folder))
    table = tabulate(cells)
    lines = markdown(table, f"{options.data}, {cells[0].run.recipe.federation.clients} sites, one round.")
    write(folder, table, lines)
    print("\n".join(lines))
    return int(any(row["violations"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
