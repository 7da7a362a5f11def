"""One process and two: the same result, and an end in words when one of them fails."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger, LedgerEntry
from fdl.engine.distributed.batch_split import rank_share
from fdl.federation.scheduling import SLACK, largest_first
from fdl.modules.objectives import mean_over, next_tokens_of, samples_of
from tests import rank_jobs
from tests.cluster_jobs import NO_STEP, slurm
from tests.shared_runs import made_once

pytestmark = pytest.mark.timeout(600)  # two processes with all jobs one after the other, on whatever cores are free
ROOT = Path(__file__).parents[3]
SUMMED = ("fedavg", "fedadam", "fedprox", "batch_norm", "batched", "one_client", "fml", "fed_lpfm")
SUMMED += ("codistillation", "federated_prompts", "colluding", "scaffold")
EXACT = tuple(name for name in rank_jobs.JOBS if name not in SUMMED)
SLOW = {"marks": pytest.mark.slow}


def start(folder, command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made of all jobs, and how they ended where one had to fail. Workers of a test run share it."""
    folder = made_once(tmp_path_factory, "ranks", "found.json", both)
    found = json.loads((folder / "found.json").read_text())
    found["ends"] = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1)]
    return found


def both(folder, *what):
    if not what:
        rank_jobs.run("knowledge", 1, folder / "half", ("federation.rounds=2",))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [start(folder, ["tests/rank_jobs.py", str(folder), *what], LOCAL_RANK=str(r), **shared) for r in (0, 1)]
    said = [process.communicate(timeout=560)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """What two processes made of the jobs of the slow tier."""
    folder = tmp_path_factory.mktemp("longer")
    both(folder, "longer")
    return json.loads((folder / "found.json").read_text())


@pytest.fixture
def twice(name, request):
    """What two processes made of a job."""
    return request.getfixturevalue("longer" if name in rank_jobs.LONGER else "two")[name]


def quick_first(names):
    """Parameters, of which those of the longer jobs are slow."""
    return [pytest.param(name, **(SLOW if name in rank_jobs.LONGER else {})) for name in names]


def flat(outcome):
    return np.concatenate([np.ravel(values) for values in outcome["student"].values()])


def without_scores(history):
    return [{key: record[key] for key in ("round", "cohort", "dropped", "refused")} for record in history]


@pytest.mark.parametrize("name", quick_first(EXACT))
def test_two_processes_are_one(twice, name, tmp_path):
    """Where uploads are added in the cohort's order, to the last bit: weights, metrics, bytes, clients."""
    alone = json.loads(json.dumps(rank_jobs.run(name, 1, tmp_path)))
    assert twice == alone
    assert alone["history"][-1]["cohort"]


@pytest.mark.parametrize("name", quick_first(SUMMED))
def test_two_processes_sum_weights(twice, name, tmp_path):
    """Where partial sums are reduced, up to rounding; what is counted is the same."""
    alone = json.loads(json.dumps(rank_jobs.run(name, 1, tmp_path)))
    assert flat(twice).size > 100
    np.testing.assert_allclose(flat(twice), flat(alone), rtol=0, atol=1e-6)
    assert twice["communication"] == alone["communication"]
    assert without_scores(twice["history"]) == without_scores(alone["history"])


def test_more_processes_go_on_with_the_run_of_one(two, tmp_path):
    """A checkpoint does not say how many processes wrote it."""
    alone = json.loads(json.dumps(rank_jobs.run("knowledge", 1, tmp_path)))
    assert two["resumed"]["student"] == alone["student"]
    assert two["resumed"]["communication"] == alone["communication"]


def test_ranks_that_share_batches_learn_what_one_learns(two, tmp_path):
    """Gradients of a batch's parts, weighted by their share of its samples, sum to the whole batch's."""
    name, more = rank_jobs.JOINT
    alone = rank_jobs.run(name, 1, tmp_path, tuple(m for m in more if "strategy" not in m))
    np.testing.assert_allclose(flat(two["joint"]), flat(alone), rtol=0, atol=1e-6)
    assert two["parts"] == 3  # one a step: the batches really were shared out


@pytest.mark.parametrize("when", ["mistake", "mistake_seen"])
def test_a_mistake_on_one_rank_ends_all(two, when):
    """The leader tells it once; the rank that made it ends without another word."""
    leader, other = (ends[when] for ends in two["ends"])
    assert leader.startswith("UserError") and "client " in leader and "its scanner is broken (on rank 1)" in leader
    assert other == "exit 2"


def test_a_rank_that_does_not_answer_is_not_waited_for(two):
    """After the timeout there is one message that names the key."""
    leader, _ = (ends["hang"] for ends in two["ends"])
    assert "rank 0 of 2" in leader and "fabric.timeout" in leader
    assert int(leader.split("after ")[1].split(" s")[0]) < 30


def test_the_command_line_starts_the_other_processes(tmp_path):
    """One command for all devices; a killed process ends the run in words, and --resume goes on."""
    small = [o for o in rank_jobs.SMALL if not o.startswith("checkpoint")]
    recipe = ["--recipe", "recipes/digits/fedavg.yaml", "--output-dir", str(tmp_path / "run")]
    both = [*small, "federation.clients=3", "federation.rounds=3"]
    two = ["fabric.devices=2"]
    dies = ["method.target=tests.rank_jobs.Dies", "method.args={}"]
    # also in a batch script of Slurm's, which has the variables of tasks that nobody has started
    batch = slurm(15000, 2, 2, 1, 0, 0, 0, step=NO_STEP)
    process = start(tmp_path, ["-m", "fdl", "fit", *recipe, *both, *two, *dies], **batch)
    began = time.monotonic()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2, said
    assert "--resume" in said and "Traceback" not in said, said
    assert time.monotonic() - began < 110
    assert "another process of this run has ended" in said or "was killed by signal 9" in said
    assert list((tmp_path / "run/checkpoints").glob("round-000001-*")), said


def test_comparisons_and_outside_launchers_do_not_mix(tmp_path):
    """Which run is complete is for one process to say."""
    command = ["-m", "fdl", "compare", "--recipe", "recipes/quickstart.yaml", "--output-dir", str(tmp_path)]
    process = start(tmp_path, command, LOCAL_RANK="0", WORLD_SIZE="2")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "fdl compare" in said and "fdl fit" in said


def test_the_largest_first():
    """No rank does more than the longest-processing-time rule gives, and clients stay where they can."""
    costs = [7.0, 1.0, 6.0, 2.0, 3.0, 5.0]
    placed = largest_first(range(6), costs, 2)
    loads = [sum(costs[c] for c in placed if placed[c] == rank) for rank in (0, 1)]
    assert loads == [12.0, 12.0]
    homes = [0, 0, 1, 0, 1, 1]
    stayed = largest_first(range(6), costs, 2, homes)
    loads = [sum(costs[c] for c in stayed if stayed[c] == rank) for rank in (0, 1)]
    assert max(loads) <= SLACK * 12.0
    assert sum(stayed[c] == homes[c] for c in range(6)) >= 4
    assert largest_first([5], costs, 4, homes) == {5: 0}  # alone it is more than a fair share, wherever it was


@pytest.mark.parametrize("size,ranks", [(8, 2), (7, 2), (7, 3), (2, 3), (1, 2)])
def test_parts_of_a_batch_make_it_whole(size, ranks):
    """Every sample is some rank's once, and shares of the mean sum to one."""
    batch = (torch.arange(size).float().unsqueeze(1), torch.arange(size))
    parts = [rank_share(batch, samples_of, rank, ranks) for rank in range(ranks)]
    assert sum(share for _, share in parts) == pytest.approx(1)
    mean = sum(part[0].mean() * share for part, share in parts)
    assert float(mean) == pytest.approx(float(batch[0].mean()))
    seen = sorted(int(i) for part, share in parts if share for i in part[1])
    assert seen == list(range(size))


def test_texts_count_by_their_tokens():
    """A short text is a smaller share of a mean over tokens."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, -1, -1]])
    assert next_tokens_of((tokens, None)) == 4
    shares = [rank_share((tokens, None), next_tokens_of, rank, 2)[1] for rank in (0, 1)]
    assert shares == [0.75, 0.25]
    assert mean_over(samples_of)(lambda m, b: None).terms is samples_of


def test_a_link_moves_with_its_client():
    """What both ends remember can be taken out for one client, and put in elsewhere."""
    one, other = (Channel(Codec(), Codec(), Ledger(), seed=0) for _ in range(2))
    for client in (3, 30):
        one._memory("up", client, "responses")
    assert set(one.state_dict([3])) == {"up/3/responses"}
    other.restore(3, one.state_dict())
    assert set(other.state_dict()) == {"up/3/responses"}
    one.restore(3, {})
    assert set(one.state_dict()) == {"up/30/responses"}


def test_a_ledger_includes_what_others_counted():
    """Totals are those of a ledger that counted all."""
    one, other, whole = Ledger(), Ledger(), Ledger()
    for ledger in (one, whole):
        ledger.add(1, 0, "up", "responses", 10)
    for ledger in (other, whole):
        ledger.add(1, 1, "up", "responses", 7)
        ledger.add(1, 1, "up", "responses", 7)
    assert other.of_round(1) == [LedgerEntry(1, 1, "up", "responses", 14, 2)]
    one.include(other.of_round(1))
    assert one.rows() == whole.rows() and one.totals() == whole.totals()
