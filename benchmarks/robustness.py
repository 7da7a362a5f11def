"""Attacks against defences, at several shares of liars: accuracy, and who is wrongly suppressed.

    python benchmarks/robustness.py [--data cifar10] [--space parameters] [--attacks A B] [--defences A B]
                                    [--shares 0.1 0.2 0.4] [--seeds 0 1 2] [--quick] [--output DIR]

The job: recipes/digits/robustness.yaml, whose variants with `adversaries` are the attacks and whose variants with
`method.args.robust` are the defences, among them four means: of answers by the confidence that clients declare, by it
up to two equal shares of a round or of each row, and of all alike. Every pair is run at every share; without liars,
every defence once. In the space of parameters the method is FedAvg in its place, which has one mean, and attacks on
answers are left out.

A cell's accuracy is the student's on test data after the last round. Its loss is in points against the same seed with
all clients honest and the plain mean. Liars withhold their data, too, which no defence can bring back: the row
`non_response`, where they just say nothing, is what is left to reach. A minority expert is an honest client that holds
more than four times an equal share of all clients' samples of a class; it is wrongly suppressed where its share of what
all honest clients weigh together is at most half of that in the plain mean without liars, on average over rounds.
Success is the share of triggered test images taken for the backdoor's target.

DIR gets robustness.md, robustness.csv (a row a cell, seeds averaged), robustness.png, the runs, and tensorboard/ with
table and figure. Cells that are complete in DIR are not run again.

--data cifar10 needs --file, or $FDL_DATA/cifar10_jpegq75_full60k.npz and weights/cifar10_resnet20_akamaster.npz there:
features of a frozen ResNet-20 are stored in DIR once, and clients train perceptrons on them.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import statistics
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from fdl.recipe import Recipe, load
from fdl.runs import run as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = Path(__file__).parents[1] / "recipes" / "digits" / "robustness.yaml"
HONEST, PLAIN, SILENT = "honest", "mean", "non_response"
BAR = ("least_likely", "class_confusion", "sign_flip")
ON_ANSWERS = ("fixed_class", "random_class", "least_likely", "class_confusion", "worst_replay")
FEDAVG = {
    "method": "fedavg",
    "federation.rounds": 10,
    "evaluation.every": 10,
    "local_training.steps": 20,
    "local_training.optimizer": {"target": "sgd", "args": {"lr": 0.1, "momentum": 0.9}},
}
CIFAR10 = ["evaluation.evaluators=[]", "server_distil.steps=200"]
QUICK = [
    "federation.clients=11",
    "federation.rounds=1",
    "local_training.steps=2",
    "server_distil.steps=2",
    "evaluation.every=1",
]
OF_CONFIDENCE = ("method.args.max_client_share", "method.args.max_client_share_over", "method.args.confidence")
"""Settings of how answers are weighed, which do not exist in the space of parameters."""
EXPERT = 4
"""How many equal shares of a class a minority expert has at least."""
COUNTS = {"train": 10_000, "test": 2_000}


class Cell(NamedTuple):
    """One run: an attack by a share of the clients against a defence."""

    attack: str
    share: float
    defence: str
    seed: int
    recipe: Recipe
    folder: Path


def crossed(
    space: str,
    attacks: Sequence[str] | None,
    defences: Sequence[str] | None,
    shares: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str],
    folder: Path,
) -> list[Cell]:
    """All cells of the grid, checked; those without liars come first.

    Raises:
        RecipeError: for a pair that does not fit together.
        SystemExit: for a name that the recipe does not have.
    """
    variants = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["compare"]["variants"]
    known = {
        "attack": [n for n, v in variants.items() if "adversaries" in v and n != HONEST],
        "defence": [n for n, v in variants.items() if "method.args.robust" in v],
    }
    if space == "parameters":
        variants[PLAIN] = {key: value for key, value in variants[PLAIN].items() if key not in OF_CONFIDENCE}
        rules = [n for n in known["defence"] if variants[n]["method.args.robust"] is not None]
        known["defence"] = [PLAIN, *rules]  # the other means would be the same
        known["attack"] = [n for n in known["attack"] if _attacker(variants[n]) not in ON_ANSWERS]
    if "evaluation.evaluators=[]" in overrides:
        known["attack"].remove("backdoor")
    for kind, wanted in (("attack", attacks), ("defence", defences)):
        if unknown := sorted(set(wanted or ()) - set(known[kind])):
            raise SystemExit(f"no such {kind}: {', '.join(unknown)}; there are {', '.join(known[kind])}")
    base = FEDAVG if space == "parameters" else {}
    wanted = [PLAIN, *(d for d in defences or known["defence"] if d != PLAIN)]
    pairs = {}
    for attack in [HONEST, *(attacks or known["attack"])]:
        # of those who say nothing, no defence can make a difference
        for defence in [PLAIN] if attack == SILENT else wanted:
            pairs[attack, defence] = load(RECIPE, overrides, {**base, **variants[defence], **variants[attack]})
    cells = []
    for seed in seeds:
        for share in (0.0, *shares):
            for (attack, defence), recipe in pairs.items():
                if (attack == HONEST) == (share == 0):
                    name = f"{attack}-{100 * share:g}-{defence}"
                    liars = [replace(entry, fraction=share) for entry in recipe.adversaries]
                    own = {"name": f"robustness-{name}-seed-{seed}", "seed": seed, "adversaries": liars}
                    place = folder / name / f"seed-{seed}"
                    cells.append(Cell(attack, share, defence, seed, replace(recipe, compare=None, **own), place))
    return cells


def _attacker(variant: Mapping[str, Any]) -> str:
    """What an attack does in the end, where it is wrapped."""
    entry = variant["adversaries"][0]
    inner = entry.get("args", {}).get("attack")
    return entry["target"] if inner is None else inner


def experts(cells: Sequence[Cell]) -> dict[int, list[int]]:
    """By seed, the clients that hold more than `EXPERT` equal shares of all clients' samples of a class."""
    from fdl.build import build

    found = {}
    for cell in cells:
        if cell.seed not in found:
            clients = build(replace(cell.recipe, adversaries=[], callbacks=[]), cell.folder).clients
            counts = np.stack([np.bincount(c.train.labels.numpy(), minlength=c.num_classes) for c in clients])
            held = (counts > EXPERT / len(clients) * counts.sum(0)).any(1)
            found[cell.seed] = [int(id) for id in np.flatnonzero(held)]
    return found


def suppressed(
    history: Sequence[Mapping[str, Any]],
    honest: Sequence[Mapping[str, Any]],
    minority: Sequence[int],
    liars: Set[int],
) -> float | None:
    """The share of honest minority experts that a defence suppressed; None where it weighs nobody, or there is none.

    Args:
        history: a run's records, whose metrics have each client's share in the plain mean, and its factor.
        honest: those of the same run without liars, which says what the plain mean would have been.
        minority: ids of minority experts.
        liars: ids of the adversaries.
    """
    ratios: dict[int, list[float]] = {}
    for record, other in zip(history, honest):
        factor, plain, wanted = _by_client(record, "weight"), _by_client(record, "plain"), _by_client(other, "plain")
        both = [id for id in factor if id in wanted and id not in liars]
        given, due = sum(factor[id] * plain[id] for id in both), sum(wanted[id] for id in both)
        for id in both:
            ratio = (factor[id] * plain[id] / given) / (wanted[id] / due) if given > 0 and wanted[id] > 0 else 0.0
            ratios.setdefault(id, []).append(ratio)
    own = [statistics.fmean(ratios[id]) for id in minority if id in ratios]
    return sum(ratio <= 0.5 for ratio in own) / len(own) if own else None


def _by_client(record: Mapping[str, Any], what: str) -> dict[int, float]:
    place = f"robust/{what}/"
    return {int(k.removeprefix(place)): v for k, v in record["metrics"].items() if k.startswith(place)}


def tabulate(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each attack, share and defence: means over seeds."""
    from fdl.adversaries.coalition import assign_adversaries

    minority = experts(cells)
    summaries = {cell[:4]: runs.read_summary(cell.folder) for cell in cells}
    accuracy = {key: summary["metrics"]["student/test/accuracy"] for key, summary in summaries.items()}
    rows = []
    for attack, share, defence in dict.fromkeys(cell[:3] for cell in cells):
        same = [cell for cell in cells if cell[:3] == (attack, share, defence)]
        scores = [accuracy[cell[:4]] for cell in same]
        losses = [accuracy[HONEST, 0.0, PLAIN, cell.seed] - accuracy[cell[:4]] for cell in same]
        gone, success = [], []
        for cell in same:
            entries, summary = cell.recipe.adversaries, summaries[cell[:4]]
            liars = {id for ids in assign_adversaries(entries, cell.recipe.federation.clients, cell.seed) for id in ids}
            honest = summaries[HONEST, 0.0, defence, cell.seed]["history"]
            gone.append(suppressed(summary["history"], honest, minority[cell.seed], liars))
            success.append(summary["metrics"].get("student/backdoor/success"))
        rows.append(
            {
                "attack": attack,
                "share": share,
                "defence": defence,
                "seeds": len(same),
                "accuracy": statistics.fmean(scores),
                "accuracy_std": statistics.stdev(scores) if len(scores) > 1 else None,
                "loss_points": 100 * statistics.fmean(losses),
                "suppressed_minority": _mean(gone),
                "backdoor_success": _mean(success),
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return statistics.fmean(given) if given else None


def bars(rows: Sequence[Mapping[str, Any]], share: float = 0.2) -> dict[str, float]:
    """By defence, the most points that it loses to the attacks of `BAR` at a share of liars, where all were run."""
    losses: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["attack"] in BAR and row["share"] == share:
            losses.setdefault(row["defence"], {})[row["attack"]] = row["loss_points"]
    return {defence: max(found.values()) for defence, found in losses.items() if len(found) == len(BAR)}


def markdown(rows: Sequence[Mapping[str, Any]], title: str) -> list[str]:
    """The tables for people: accuracy in percent, then wrongly suppressed minority experts in percent."""
    defences = list(dict.fromkeys(row["defence"] for row in rows))
    lines = [title, ""]
    parts = [("Test accuracy, % (± deviation over seeds)", "accuracy")]
    parts += [("Honest minority experts wrongly suppressed, %", "suppressed_minority")]
    if any(row["attack"] == "backdoor" for row in rows):
        parts += [("Triggered images taken for the target, %", "backdoor_success")]
    for heading, key in parts:
        lines += [
            heading,
            "",
            f"| attack | Byzantine clients | {' | '.join(defences)} |",
            "|---|---:|" + "---:|" * len(defences),
        ]
        for attack, share in dict.fromkeys((row["attack"], row["share"]) for row in rows):
            if key == "backdoor_success" and attack not in ("backdoor", HONEST):
                continue
            found = {r["defence"]: r for r in rows if (r["attack"], r["share"]) == (attack, share)}
            cells = " | ".join(_cell(found.get(defence), key) for defence in defences)
            lines.append(f"| {attack} | {100 * share:g} % | {cells} |")
        lines.append("")
    if worst := bars(rows):
        lines += [f"Most points lost at 20 % liars to {', '.join(BAR)}: "]
        lines[-1] += ", ".join(f"{d} {loss:.1f}" for d, loss in sorted(worst.items(), key=lambda pair: pair[1])) + "."
    return lines


def _cell(row: Mapping[str, Any] | None, key: str) -> str:
    if row is None or row[key] is None:
        return ""
    spread = row["accuracy_std"] if key == "accuracy" else None
    return f"{100 * row[key]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Points lost, a panel for each share of liars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = sorted({row["share"] for row in rows if row["share"] > 0}) or [0.0]
    defences = list(dict.fromkeys(row["defence"] for row in rows))
    drawn = Figure(figsize=(2 + 4 * len(shares), 6), layout="constrained")
    FigureCanvasAgg(drawn)
    for place, share in zip(np.atleast_1d(drawn.subplots(1, len(shares))), shares):
        part = [row for row in rows if row["share"] == share]
        attacks = list(dict.fromkeys(row["attack"] for row in part))
        lost = np.full((len(attacks), len(defences)), np.nan)
        for row in part:
            lost[attacks.index(row["attack"]), defences.index(row["defence"])] = row["loss_points"]
        image = place.imshow(lost, vmin=0, vmax=50, cmap="viridis_r", aspect="auto")
        place.set_xticks(range(len(defences)), defences, rotation=60, ha="right")
        place.set_yticks(range(len(attacks)), attacks)
        place.set_title(f"{100 * share:g} % Byzantine clients")
        for (y, x), value in np.ndenumerate(lost):
            if np.isfinite(value):
                place.text(x, y, f"{value:.0f}", ha="center", va="center", color="w" if value > 25 else "k", size=8)
    drawn.colorbar(image, ax=drawn.axes, label="points lost")
    drawn.suptitle(title)
    return drawn


def write(folder: Path, rows: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
    """The tables and the figure, as files and for TensorBoard."""
    from fdl.utils.files import write_atomically
    from fdl.utils.tensorboard import open_writer

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "robustness.csv", text.getvalue().encode())
    write_atomically(folder / "robustness.md", ("\n".join(lines) + "\n").encode())
    drawn = figure(rows, lines[0])
    drawn.savefig(folder / "robustness.png")
    events = open_writer(folder / "tensorboard")
    events.add_figure("robustness/points_lost", drawn, 0, close=False)
    events.add_text("robustness/table", "\n".join(lines), 0)
    events.close()


def features(file: Path, weights: Path, folder: Path) -> Path:
    """Features of a frozen ResNet-20 of CIFAR-10 images, [n, 64, 1, 1], as an .npz file; computed once.

    Args:
        file: jpeg_header and, for train and test, jpeg_*, offset_* and y_*.
        weights: of `cifar_resnet`.
        folder: where the result is kept.
    """
    target = folder / "cifar10_resnet20_features.npz"
    if target.exists():
        return target
    import torch
    from PIL import Image

    from fdl.modules.cifar_resnet import CifarResNet

    network = CifarResNet(20, str(weights), True, num_classes=10, input_shape=(3, 32, 32)).eval()
    arrays = {}
    with np.load(file) as stored:
        header = stored["jpeg_header"].tobytes()

        def picture(body: bytes) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(header + body)).convert("RGB"))

        for split, count in COUNTS.items():
            body, starts = stored[f"jpeg_{split}"], stored[f"offset_{split}"]
            found = []
            for first in range(0, count, 250):
                cuts = [slice(starts[i], starts[i + 1]) for i in range(first, first + 250)]
                pictures = [picture(body[cut].tobytes()) for cut in cuts]
                images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
                with torch.inference_mode():
                    found.append(network(images).embedding.numpy())
            arrays[f"x_{split}"] = np.concatenate(found)[:, :, None, None]
            arrays[f"y_{split}"] = stored[f"y_{split}"][:count].astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(target.with_suffix(".partial.npz"), **arrays)
    target.with_suffix(".partial.npz").rename(target)
    return target


def overrides(data: str, file: Path | None, quick: bool, folder: Path) -> list[str]:
    """What the arguments change in the recipe."""
    changes = []
    if data == "cifar10":
        home = Path(os.environ.get("FDL_DATA", "."))
        images = file or home / "cifar10_jpegq75_full60k.npz"
        path = features(images, home / "weights" / "cifar10_resnet20_akamaster.npz", folder)
        inner = f"path: {path}, layout: CHW, normalize: true, proxy: 1000, validation: 200"
        changes = [f"data={{target: arrays, args: {{{inner}}}}}", *CIFAR10]
    return [*changes, *(QUICK if quick else ())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cells that are not complete, and write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--file", type=Path, help="the images, for cifar10")
    parser.add_argument("--space", choices=["responses", "parameters"], default="responses", help="what is attacked")
    parser.add_argument("--attacks", nargs="+", metavar="A", help="default all of the recipe")
    parser.add_argument("--defences", nargs="+", metavar="D", help="default all of the recipe; mean always is run")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="of clients that lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="further changes to the recipe")
    parser.add_argument("--quick", action="store_true", help="few clients and steps: tells nothing, tests all")
    parser.add_argument("--output", type=Path, help="default runs/robustness-<data>-<space>")
    options = parser.parse_args(argv)
    folder = options.output or Path("runs") / f"robustness-{options.data}-{options.space}"
    changes = [*overrides(options.data, options.file, options.quick, folder), *options.set]
    shares = [0.4] if options.quick else options.shares
    grid = options.attacks, options.defences, shares, options.seeds
    cells = crossed(options.space, *grid, changes, folder)
    for number, cell in enumerate(cells, 1):
        done = runs.is_complete(cell.recipe, cell.folder)
        note = ", complete already" if done else ""
        print(f"{number} of {len(cells)}: {cell.recipe.name}{note}", flush=True)
        if not done:
            runs.run_recipe(cell.recipe, cell.folder, resume=runs.has_checkpoint(cell.folder))
    rows = tabulate(cells)
    recipe = cells[0].recipe
    what = "answers" if options.space == "responses" else "weights"
    title = f"{options.data}, {recipe.federation.clients} clients, {what}, {len(options.seeds)} seeds."
    lines = markdown(rows, title)
    write(folder, rows, lines)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
