"""Equal to the bit, whatever the threads, and wherever in memory, or on disk, a state lies in between."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from fdl.build import build
from fdl.comm.link_state import LinkState
from fdl.comm.stages.base import CodecContext
from fdl.encoders.base import PCA
from fdl.engine.runtime import Runtime
from fdl.federation import snapshot
from fdl.loop import FederatedLoop
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import entries
from fdl.state import checkpoint
from fdl.utils.threads import pinned
from tests.rank_jobs import JOBS, outcome, recipe, run

ROOT = Path(__file__).parents[2]
FEW = ("knowledge", "fedproto", "fedlora")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in JOBS if name not in FEW]
COUNTS = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"


# -- layout ---------------------------------------------------------------------------------------------------------


def leaves(state):
    """All tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def plain(tensor):
    return tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 and not tensor.requires_grad


def test_a_state_is_as_a_file_gives_it_back():
    """Values, types, ties; strides, addresses and tuples go."""
    vector, tied = torch.arange(40.0), torch.ones(3, 2).T
    state = {
        "across": torch.arange(12.0).view(3, 4).T,
        "within": {"view": vector[1:9], "learnt": torch.ones(2, requires_grad=True)},
        "pair": (tied, tied),
        "none": None,
        "empty": torch.empty(0, 3),
        "number": torch.tensor(3),
    }
    kept, read = checkpoint.as_saved(state), checkpoint.from_bytes(checkpoint.to_bytes(state))
    for one in (kept, read):
        assert all(plain(leaf) for leaf in leaves(one)) and one["pair"][0] is one["pair"][1]
        assert isinstance(one["pair"], list) and one["none"] is None
        assert torch.equal(one["across"], state["across"]) and torch.equal(one["within"]["view"], vector[1:9])
        assert one["empty"].shape == (0, 3) and one["number"].shape == ()
    again = checkpoint.as_saved(kept)
    where = [leaf.data_ptr() for leaf in leaves(kept)]
    assert [leaf.data_ptr() for leaf in leaves(again)] == where  # nothing is copied in vain


def test_tensors_of_a_file_lie_as_new_ones_do(tmp_path):
    """After names of any length and neighbours of any size."""
    for length in range(8):
        data = checkpoint.to_bytes({"a" * (length + 1): torch.rand(5), "b": torch.rand(length + 1, 3).double()})
        (tmp_path / "state").write_bytes(data)
        for read in (checkpoint.from_file(tmp_path / "state"), checkpoint.from_bytes(data)):
            assert all(plain(leaf) for leaf in leaves(read))


def test_what_a_link_remembers_lies_row_by_row():
    """As what a checkpoint gives back."""
    memory, across = LinkState(), np.arange(12.0).reshape(3, 4).T
    memory.begin()
    memory.turn("values", "stage", CodecContext()).draft.update(last=across, number=1)
    memory.commit()
    kept = memory.turn("values", "stage", CodecContext()).kept
    assert kept["last"].flags.c_contiguous and np.array_equal(kept["last"], across) and kept["number"] == 1


@pytest.mark.parametrize("name", [*FEW, *OTHERS])
def test_a_run_whose_states_are_read_back_is_the_same(name, tmp_path):
    """All that is checkpointed comes back from a file between any two rounds; in memory it had no layout of its own."""
    straight = build(recipe(name, 1, folder=tmp_path / "straight"), tmp_path / "straight")
    expected = outcome(straight, straight.run())
    for state in (straight.server.state, *(client.state for client in straight.clients)):
        assert all(plain(leaf) for leaf in leaves(state))
    loop = build(recipe(name, 1, ("checkpoint.every=1",), tmp_path / "read"), tmp_path / "read")
    take_round = loop.run_round

    def run_round(round):
        take_round(round)
        snapshot.restore(loop)

    loop.run_round = run_round
    assert json.dumps(outcome(loop, loop.run())) == json.dumps(expected)


def test_where_a_vector_lies_changes_no_product():
    """Which MKL does not promise by itself; fdl asks for it before MKL is first used."""
    assert os.environ["MKL_CBWR"]
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 16), (3, 16), (17, 33), (64, 129)):
        matrix, vector = torch.randn(rows, columns, generator=generator), torch.randn(columns, generator=generator)
        for offset in range(16):
            moved = torch.empty(columns + 16)[offset : offset + columns].copy_(vector)
            apart = torch.empty(rows * columns + 16)[offset : offset + rows * columns].view(rows, columns).copy_(matrix)
            assert torch.equal(apart @ moved, matrix @ vector)
            assert torch.equal(moved @ moved, vector @ vector)


# -- threads --------------------------------------------------------------------------------------------------------


def all_with(count, folder, *jobs):
    """The outcomes of jobs in a process whose environment asks for so many threads."""
    code = (
        "import json, sys, pathlib; from tests.rank_jobs import run; folder = pathlib.Path(sys.argv[1])\n"
        "found = {name: run(name, 1, folder / name) for name in sys.argv[2:]}\n"
        "(folder / 'found.json').write_text(json.dumps(found))"
    )
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(COUNTS, str(count))}
    subprocess.run([sys.executable, "-c", code, str(folder), *jobs], cwd=ROOT, env=environment, check=True)
    return json.loads((folder / "found.json").read_text())


def test_whatever_a_run_computes_it_computes_with_the_recipes_threads(tmp_path, monkeypatch):
    """While the encoder is fitted, private samples are encoded, and clients train; and then it is as it was."""
    seen = {}

    def watched(kind, name):
        original = getattr(kind, name)

        def call(*arguments, **settings):
            blas = {count for api, _, count in counts() if api == "blas"}
            seen[f"{kind.__name__}.{name}"] = (blas, torch.get_num_threads())
            return original(*arguments, **settings)

        monkeypatch.setattr(kind, name, call)

    for kind, name in ((PCA, "fit"), (PCA, "_encode"), (Runtime, "fit"), (FederatedLoop, "run_round")):
        watched(kind, name)
    torchs = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"):
            outside = counts()
            run("federated_distillation", 1, tmp_path, ("federation.rounds=1", "fabric.threads=3"))
            assert counts() == outside
    finally:
        torch.set_num_threads(torchs)
    parts = "PCA.fit", "PCA._encode", "Runtime.fit", "FederatedLoop.run_round"
    assert seen == dict.fromkeys(parts, ({1}, 3))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_method_depends_on_threads(tmp_path):
    """Every method there is, with 1, 2 and 4."""
    assert {recipe(name, 1, folder=tmp_path / "x").method.target for name in JOBS} >= {
        method.name for method in entries(KINDS["method"])
    }
    one, two, four = (all_with(count, tmp_path / str(count), *JOBS) for count in (1, 2, 4))
    for name in JOBS:
        assert json.dumps(two[name]) == json.dumps(one[name]) == json.dumps(four[name])


def counts():
    """The threads of all libraries, as they say themselves."""
    return sorted((one["user_api"], one["filepath"], one["num_threads"]) for one in threadpool_info())


def test_within_a_run_the_recipe_says_how_many_threads_there_are():
    """Nested, in two of Python's threads that end in either order, and afterwards it is as before."""
    with threadpool_limits(2, user_api="blas"):
        before, torchs = counts(), torch.get_num_threads()
        torch.set_num_threads(2)
        outside = counts()
        entered, leave, left = (threading.Event() for _ in range(3))

        def other():
            with pinned(3):
                entered.set()
                leave.wait()
            left.set()

        with pinned(3):
            assert {n for api, _, n in counts() if api == "blas"} == {1} and torch.get_num_threads() == 3
            with pinned(3):
                pass
            assert {n for api, _, n in counts() if api == "blas"} == {1} and torch.get_num_threads() == 3
            thread = threading.Thread(target=other)
            thread.start()
            entered.wait()
        assert {n for api, _, n in counts() if api == "blas"} == {1}  # the other run goes on
        leave.set()
        left.wait()
        thread.join()
        assert counts() == outside
        torch.set_num_threads(torchs)
        assert counts() == before
