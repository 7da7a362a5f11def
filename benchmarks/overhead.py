"""What the framework costs: FedAvg on digits in fdl and in a bare PyTorch loop, in one process.

    python benchmarks/overhead.py [--repeats 5] [--output FILE.md]

The job: scikit-learn's digits, MLP 64-128-64-10, 10 of 10 and 10 of 50 clients, IID, SGD 0.1, batch 32, one local
epoch, the global model evaluated on the test set every round, one CPU thread. Equal work is asserted before anything
is timed: fdl and the bare loop end with the same weights. fdl counts every byte it encodes; nobody writes to disk
while the clock runs.

First rounds are the first 20 of a run, in which fdl builds what later ones use again: medians over repeats. Later
rounds are those of federations that live on, after 150: medians over blocks of 20. The loops take turns, repeat by
repeat and block by block, since neighbours on a shared machine slow all of them for seconds at a time; figures are
comparable within one run only. Other systems are measured by peers.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fdl.build import build
from fdl.datamodules.samples import Samples
from fdl.loop import FederatedLoop
from fdl.recipe import load
from fdl.utils.seeding import torch_stream

RECIPE = Path(__file__).with_name("overhead.yaml")
ROUNDS = 20
SETTLED = 150
"""Rounds after which there is nothing new in a round."""


def federation(clients: int, folder: Path, executor: str = "sequential") -> FederatedLoop:
    """The job in fdl, built and ready."""
    overrides = [
        f"federation.clients={clients}",
        f"federation.client_fraction={10 / clients}",
        f"client_execution={executor}",
    ]
    return build(load(RECIPE, overrides), folder)


def run_fdl(loop: FederatedLoop) -> float:
    """Seconds of all rounds; setting up and the checkpoint at the end are left out."""
    loop.set_up()
    return go_on(loop, ROUNDS)


def go_on(loop: FederatedLoop, rounds: int) -> float:
    """Seconds of further rounds."""
    start = time.perf_counter()
    for _ in range(rounds):
        loop.run_round(loop.round + 1)
    return time.perf_counter() - start


def run_bare(loop: FederatedLoop) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of the same rounds as anybody would write them by hand, and the weights they end with."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    names = list(model.state_dict())
    weights = dict(zip(names, (p.detach().clone() for p in loop.server.student.parameters())))
    data = [everything(client.train) for client in loop.clients]
    inputs, labels = everything(loop.server.test)
    cohorts = [loop.cohort(round)[0] for round in range(1, ROUNDS + 1)]
    start = time.perf_counter()
    for round, cohort in enumerate(cohorts, 1):
        total = sum(len(data[client][1]) for client in cohort)
        mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for client in cohort:
            x, y = data[client]
            model.load_state_dict(weights)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            generator = torch_stream(loop.recipe.seed, "fit", round, client)
            for indices in torch.randperm(len(y), generator=generator).split(32):
                loss = nn.functional.cross_entropy(model(x[indices]), y[indices])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            for name, weight in model.state_dict().items():
                mean[name] += weight * (len(y) / total)
        weights = mean
        model.load_state_dict(weights)
        model.eval()
        with torch.inference_mode():
            accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.1
    return time.perf_counter() - start, weights


def everything(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs, flat, and labels."""
    x, y = samples.batch(torch.arange(len(samples)))
    return x.flatten(1), y


def assert_equal_work(loop: FederatedLoop, weights: dict[str, torch.Tensor]) -> None:
    """The two loops ended with the same model, so they did the same."""
    for ours, bare in zip(loop.server.student.parameters(), weights.values()):
        torch.testing.assert_close(ours.detach(), bare, rtol=1e-4, atol=1e-5)


def measure(clients: int, repeats: int) -> list[str]:
    """Rows of the table for one number of clients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = federation(clients, folder / "first")
        bare = federation(clients, folder / "bare")
        run_fdl(loop)
        weights = run_bare(bare)[1]
        assert_equal_work(loop, weights)
        together = federation(clients, folder / "together", "vectorized")
        run_fdl(together)
        assert_equal_work(together, weights)
        sent = loop.ledger.totals()
        jobs: dict[str, Callable[[int], float]] = {
            "bare PyTorch": lambda i: run_bare(bare)[0],
            "fdl": lambda i: run_fdl(federation(clients, folder / f"fdl-{i}")),
            "fdl, batched": lambda i: run_fdl(federation(clients, folder / f"batched-{i}", "vectorized")),
        }
        rows = rows_of(f"10 of {clients}, first rounds", in_turn(jobs, repeats), sum(sent.values()))
        settled = {"fdl": loop, "fdl, batched": together}
        for one in settled.values():
            go_on(one, SETTLED - ROUNDS)
        blocks = {job: lambda i, one=one: go_on(one, ROUNDS) for job, one in settled.items()}
        later = in_turn({"bare PyTorch": jobs["bare PyTorch"], **blocks}, 4 * repeats)
        return rows + rows_of(f"10 of {clients}, later rounds", later, sum(sent.values()))


def in_turn(jobs: dict[str, Callable[[int], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every job, one after the other, several times."""
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for i in range(repeats):
        for job, run in jobs.items():
            seconds[job].append(run(i))
    return seconds


def rows_of(what: str, seconds: dict[str, list[float]], sent: int) -> list[str]:
    """Rows of the table, with ratios to the bare loop's time of the same turn."""
    rows = []
    for job, values in seconds.items():
        ratios = sorted(value / other for value, other in zip(values, seconds["bare PyTorch"]))
        each = [1000 * value / ROUNDS for value in values]
        rows.append(
            f"| {what} | {job} | {statistics.median(each):.2f} [{min(each):.2f}–{max(each):.2f}] "
            f"| {statistics.median(ratios):.2f} [{ratios[0]:.2f}–{ratios[-1]:.2f}] "
            f"| {sent if job.startswith('fdl') else 'not counted'} |"
        )
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = [
        f"FedAvg on digits, one thread, torch {torch.__version__}; {arguments.repeats} repeats of the first {ROUNDS} "
        f"rounds, {4 * arguments.repeats} blocks of {ROUNDS} later ones.",
        "",
        "| clients | system | ms a round, median [min–max] | ratio to bare, median [min–max] | bytes sent |",
        "|---|---|---|---|---|",
    ]
    for clients in (10, 50):
        table += measure(clients, arguments.repeats)
    text = "\n".join(table)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
