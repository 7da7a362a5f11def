"""Codistillation: which mode, how many pools, which server data, how often.

    python benchmarks/codistillation.py digits|photographs|texts [KEY=VALUE …] [--data FOLDER] [--seeds 0 1 2]
        [--only A B] [--output D]

Jobs: digits (8 × 8) and photographs (Tiny ImageNet, 100 classes, 16 × 16) are benchmarks/codistillation.yaml, pools by
capacity whose clients have data of one kind; texts is recipes/language/codistillation_sources.yaml, a pool for each
kind of text. Server data, always the same number of samples: `in` the clients' domain, `half` of these and half of
`far`, `near` and `far` from it, and `noise`:

    digits         held out digits, digits of other writers (USPS), letters (Omniglot), uniform noise
    photographs    held out photographs, others of other classes (CIFAR-10), sketches (PACS), uniform noise

FOLDER, default $FDL_DATA, has usps_16.npz and omniglot_small1_28.npz; tinyimagenet100a_32.npz, cifar10_lossless_7k.npz
and pacs_48.npz; for texts, those that `TEXTS` names. Of all, only samples without labels are server data, and none of
them is private data or test data of a client.

Equal work is asserted before anything runs: in each seed all variants have the same recipe but for pools, method,
server data and server steps, the same private samples at the same clients, and, where they distil, as many server
steps in all. A pool's score is that of its model on all test data, accuracy or nats a byte, the mean of the last three
evaluations; its gain is over the same pool of the variant `fedadam` with the same seed, which does not distil. D, by
default runs/codistillation-<job>, gets the runs, codistillation.md and codistillation.csv. Runs that are complete in D
are not run again.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdl.recipe import difference, load
from fdl.runs import run as runs
from fdl.runs.compare import PlannedRun, plan

HERE = Path(__file__).parent
RECIPES = {
    "digits": HERE / "codistillation.yaml",
    "photographs": HERE / "codistillation.yaml",
    "texts": HERE.parent / "recipes/language/codistillation_sources.yaml",
}
# photographs take the same variants with other models
SIZES = ("[16, 32]", "[24, 48]", "[32, 64, 64]")
CLIENTS = {2: ("[0, 1, 2, 3, 4]", "[5, 6, 7, 8]"), 3: ("[0, 1, 2, 3, 4]", "[5, 6]", "[7, 8]")}
PHOTOGRAPHS = [
    f"student={{target: cnn, args: {{channels: {SIZES[0]}}}}}",
    "data.args.validation=500",
    "evaluation.every=2",
]
LAST = 3
SERVER = {"digits": 400, "photographs": 2000}
MAY_DIFFER = (
    "name",
    "method",
    "specialists",
    "server_distil.steps",
    "data.args.proxy",
    "data.args.proxy_groups",
    "data.args.where",
)
TEXTS = {
    "imdb": "lm_imdb_unsup_10k.jsonl.gz",
    "shakespeare": "tinyshakespeare.txt.gz",
    "wikipedia": "lm_wiki_demo.txt.gz",
    "web": "lm_c4_demo.jsonl.gz",
    "questions": "stackoverflow_titles20.jsonl.gz",
}
PIECE, PRIVATE, SERVED = 1000, 300_000, 60_000  # characters: of a document, of a private source, of a server's half


def reduced(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Images of any size and depth, uint8 [n, H, W] or [n, H, W, 3], as uint8 [n, channels, size, size]."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images)).float()
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    x = torch.nn.functional.interpolate(x, size=(size, size), mode="area" if x.shape[2] >= size else "bilinear")
    return x.round().clamp(0, 255).byte().numpy()


def prepare_images(job: str, data: Path, folder: Path) -> None:
    """Write private.npz, and one file for each kind of server data."""
    rng = np.random.default_rng(0)
    if job == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y, size, channels = reduced(digits.images * 15.9, 8, 1), digits.target, 8, 1
        order = rng.permutation(len(x))
        test, train = order[:360], order[360:]
        x_test, y_test, x, y = x[test], y[test], x[train], y[train]
        near, far = (np.load(data / name)["x_train"] for name in ("usps_16.npz", "omniglot_small1_28.npz"))
    else:
        with np.load(data / "tinyimagenet100a_32.npz") as file:
            x, y, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
        size, channels = 16, 3
        x, x_test = reduced(x, size, channels), reduced(x_test, size, channels)
        near = np.load(data / "cifar10_lossless_7k.npz")["x_train"]
        with np.load(data / "pacs_48.npz") as file:
            sketches = list(file["domains"]).index("sketch")
            far = file["x_train"][file["domain_train"] == sketches]
    order, count = rng.permutation(len(x)), SERVER[job]
    served = x[order[:count]]
    near, far = (reduced(some[rng.permutation(len(some))[:count]], size, channels) for some in (near, far))
    noise = rng.integers(0, 256, served.shape, dtype=np.uint8)
    assert len(near) == len(far) == count
    half = np.concatenate([served[: count // 2], far[: count - count // 2]])
    kept = np.sort(order[count:])
    np.savez(folder / "private.npz", x_train=x[kept], y_train=y[kept], x_test=x_test, y_test=y_test)
    for name, images in {"in": served, "half": half, "near": near, "far": far, "noise": noise}.items():
        np.savez(folder / f"{name}.npz", x_train=images)


def pieces(texts: Iterable[str]) -> list[str]:
    """Documents of at most `PIECE` characters."""
    return [text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE)]


def prepare_texts(data: Path, folder: Path) -> None:
    """Write texts.jsonl: private sources, and public pieces of these (in_a, in_b) and of others."""

    def read(name: str) -> list[str]:
        with gzip.open(data / TEXTS[name], "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file] if ".jsonl" in TEXTS[name] else [file.read()]

    rng = np.random.default_rng(0)
    found: dict[str, list[str]] = {}

    def take(source: list[str], name: str, size: int) -> None:
        taken = 0
        while source and taken < size:
            found.setdefault(name, []).append(source.pop())
            taken += len(found[name][-1])

    for name in ("imdb", "shakespeare", "wikipedia"):
        source = pieces(read(name))
        rng.shuffle(source)
        take(source, name, PRIVATE)
        for public in ("in_a", "in_b"):
            take(source, public, SERVED // 3)
    for name in ("web", "questions"):
        titles = read(name)
        rng.shuffle(titles)
        # titles are short: many make a document
        source = pieces(["\n".join(titles)] if name == "questions" else titles)
        for half in ("a", "b"):
            take(source, f"{name}_{half}", SERVED)
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as file:
        for name, texts in found.items():
            file.writelines(json.dumps({"source": name, "text": text}) + "\n" for text in texts)


def overrides(job: str, folder: Path) -> list[str]:
    """What the job changes in its recipe."""
    if job == "texts":
        return [f"data.args.path={folder / 'data/texts.jsonl'}", "callbacks=[csv]", "evaluation.every=1000"]
    changes = [f"output_dir={folder}"]
    if job == "photographs":
        changes += PHOTOGRAPHS
        for name in load(RECIPES[job], changes).compare.variants:
            clients = CLIENTS[3 if name.endswith("_3") else 2]
            sizes = SIZES if len(clients) == 3 else (SIZES[0], SIZES[-1])
            models = [
                f"{{target: cnn, args: {{channels: {size}}}, clients: {who}}}" for size, who in zip(sizes, clients)
            ]
            changes.append(f"compare.variants.{name}.specialists=[{', '.join(models)}]")
    return changes


def server_steps(run: PlannedRun) -> int:
    """How many steps each pool's model is distilled for in all; 0 where it is not."""
    args, rounds = run.recipe.method.args, run.recipe.federation.rounds
    if args.get("mode") == "periodic":
        return rounds // args.get("period", 1) * run.recipe.server_distil.steps
    return rounds * run.recipe.server_distil.steps if args["alpha"] > 0 else 0


def assert_equal_work(planned: Sequence[PlannedRun]) -> None:
    """Same recipe but for what is asked about, the same private samples at the same clients, equal server steps."""
    from fdl.build import build

    first = planned[0]
    for run in planned:
        changed = [
            key
            for key in difference(first.recipe.to_dict(), run.recipe.to_dict())
            if key != "seed" and not any(f"{key}.".startswith(f"{allowed}.") for allowed in MAY_DIFFER)
        ]
        assert not changed, f"{run.variant} differs from {first.variant} in {changed}"
    steps = {run.variant: server_steps(run) for run in planned}
    assert len(set(steps.values()) - {0}) <= 1, f"unequal server steps: {steps}"
    private = {}
    for run in planned:
        if run.seed == first.seed:
            clients = build(run.recipe, run.folder).clients
            private[run.variant] = [client.train.content_hash() for client in clients]
    assert len({tuple(hashes) for hashes in private.values()}) == 1, "clients have different data"


def scores(run: PlannedRun) -> dict[str, float]:
    """By pool, its model's score on test data: the mean of the last evaluations."""
    history = [record["metrics"] for record in runs.read_summary(run.folder)["history"]]
    last = [metrics for metrics in history if "student/test/nll" in metrics][-LAST:]
    pools = dict.fromkeys(key.split("/")[1] for key in last[0] if key.startswith("pools/"))
    score = "accuracy" if "student/test/accuracy" in last[0] else "nll"
    return {pool: statistics.fmean(metrics[f"pools/{pool}/test/{score}"] for metrics in last) for pool in pools}


def reference(variant: str, variants: Iterable[str]) -> str:
    """The variant without distillation that has the same pools."""
    return "fedadam_3" if variant.endswith("_3") and "fedadam_3" in variants else "fedadam"


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean and deviation of a score."""
    text = f"{statistics.fmean(values):{'+' if signed else ''}.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tabulate(planned: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """A row for each pool of each variant."""
    found = {(run.variant, run.seed): scores(run) for run in planned}
    variants, seeds = (list(dict.fromkeys(part)) for part in zip(*found))
    table = []
    for variant in variants:
        run = next(run for run in planned if run.variant == variant)
        sent = runs.read_summary(run.folder)["communication"]
        for pool in found[variant, seeds[0]]:
            values = [found[variant, seed][pool] for seed in seeds]
            base = [found[reference(variant, variants), seed][pool] for seed in seeds]
            table.append(
                {
                    "variant": variant,
                    "pool": pool,
                    "score": spread(values),
                    "gain": spread([a - b for a, b in zip(values, base)], signed=True),
                    "server_steps": server_steps(run),
                    "bytes": sent["upload_bytes"] + sent["download_bytes"],
                }
            )
    return table


def markdown(table: Sequence[dict[str, Any]], title: str) -> list[str]:
    """A line for each variant, its pools side by side, the smallest first."""
    most = max(sum(row["variant"] == one["variant"] for row in table) for one in table)
    pools = [f"pool {number + 1} | gain" for number in range(most)]
    lines = [title, "", f"| variant | {' | '.join(pools)} | server steps | MB |"]
    lines.append("|---" + "|---:" * (2 * most + 2) + "|")
    for variant in dict.fromkeys(row["variant"] for row in table):
        rows = [row for row in table if row["variant"] == variant]
        cells = [cell for row in rows for cell in (row["score"], row["gain"])] + ["", ""] * (most - len(rows))
        lines.append(f"| {variant} | {' | '.join(cells)} | {rows[0]['server_steps']} | {rows[0]['bytes'] / 1e6:.1f} |")
    return [*lines, "", "Mean ± standard deviation over seeds; what columns mean: benchmarks/codistillation.py.", ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the files, check that work is equal, run everything, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=list(RECIPES))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe, for every variant")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FDL_DATA", ".")), help="default $FDL_DATA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants, and fedadam")
    parser.add_argument("--output", type=Path, help="default runs/codistillation-<job>")
    options = parser.parse_intermixed_args(argv)
    folder = options.output or Path("runs") / f"codistillation-{options.job}"
    if not (folder / "data").is_dir():
        (folder / "data").mkdir(parents=True)
        if options.job == "texts":
            prepare_texts(options.data, folder / "data")
        else:
            prepare_images(options.job, options.data, folder / "data")
    changes = [*overrides(options.job, folder), *options.overrides]
    wanted = options.only
    if wanted:
        known = load(RECIPES[options.job], changes).compare.variants
        wanted = list(dict.fromkeys([name for v in wanted for name in (reference(v, known), v)]))
    planned = plan(RECIPES[options.job], changes, wanted, options.seeds, folder)
    assert_equal_work(planned)
    for number, run in enumerate(planned, 1):
        print(f"{number} of {len(planned)}: {run.variant}, seed {run.seed}", flush=True)
        runs.run_recipe(run.recipe, run.folder, resume=runs.has_checkpoint(run.folder))
    table = tabulate(planned)
    recipe = planned[0].recipe
    title = f"{options.job}, {recipe.federation.clients} clients, {recipe.federation.rounds} rounds."
    lines = markdown(table, title)
    (folder / "codistillation.md").write_text("\n".join(lines), encoding="utf-8")
    with open(folder / "codistillation.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
