"""Runs in which clients and the server fail end with the result of those in which the lost uploads were never sent."""

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fdl.callbacks import csv_log
from fdl.callbacks.base import CallbackList
from fdl.comm import authentication
from fdl.comm.authentication import Authentication
from fdl.comm.bandwidth import Bandwidth
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import Deflate
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.row_cache import Cache
from fdl.comm.stages.sparsify import TopK
from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.errors import RecipeError, UserError
from fdl.faults.base import Schedule
from fdl.faults.channel import FaultyChannel, without_numbers
from fdl.faults.clients import LateJoin, NotFinite, Straggle, Vanish
from fdl.federation.executors import Sequential
from fdl.loop import FederatedLoop
from fdl.messages import Bundle, Parameters, Responses, UploadStatus
from fdl.methods.fedavg import FedAvg
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.modules.small_classifiers import MLP
from fdl.participants import Client, Server
from fdl.recipe import Component, Fit, Recipe, from_mapping
from fdl.recipe.config import Evaluation, FederationConfig
from fdl.state import checkpoint
from fdl.utils import files

CLIENTS, ROUNDS, DEADLINE = 4, 3, 60.0
FIT = Fit(epochs=None, steps=2, batch_size=16, optimizer=Component("sgd", {"lr": 0.1}))

CHAINS = {
    "raw": ([], []),
    "delta": ([Delta(), Quantize(4, "stochastic"), Deflate()], [Delta(), Quantize(8)]),
    "cache": ([Cache(0.01, 2), Quantize(8)], [Cache()]),
    "top_k": ([TopK(0.3, error_feedback=True), Deflate()], []),
}


@pytest.fixture(scope="module")
def world():
    """Digits, dealt out to four clients in order, and one runtime for all runs."""
    bunch = load_digits()
    x, y = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1), torch.from_numpy(bunch.target)
    runtime = Runtime(accelerator="cpu")
    for name, hidden in (("student", [8]), ("small", [6])):
        runtime.factories[name] = lambda hidden=hidden: MLP(hidden, num_classes=10, input_shape=(1, 8, 8))
    samples = lambda rows: TensorSamples(x[rows], y[rows])  # noqa: E731
    private = [samples(range(24 * i, 24 * i + 24)) for i in range(CLIENTS)]
    return SimpleNamespace(
        runtime=runtime, private=private, proxy=samples(range(100, 130)).unlabelled(), test=samples(range(200, 230))
    )


class Counted:
    """Adds up what crosses."""

    bytes = 0

    def transmit(self, data, client, round, direction):
        self.bytes += len(data)
        return super().transmit(data, client, round, direction)


class Faulty(Counted, FaultyChannel):
    pass


class Spared(Counted, Channel):
    """The link of a run in which some uploads are never sent."""

    def __init__(self, schedule, **channel):
        super().__init__(**channel)
        self.schedule = schedule

    def reach(self, asked, dropped, round):
        return self.schedule.cohort(asked, dropped, round)

    def upload(self, message, client, round):
        lost = is_lost(self.schedule.fault_of(round, client))
        return None if lost else super().upload(message, client, round)


def is_lost(fault):
    return fault.arrives < 1 or not fault.finite or fault.seconds > DEADLINE


def federation(world, folder, link, schedule, method="fedavg", chain="raw", authenticate=True, narrow=False, seed=0):
    """A small federation with a link of some kind."""
    method = {"fedavg": FedAvg, "federated_distillation": FederatedDistillation}[method]()
    common = {
        "runtime": world.runtime,
        "seed": seed,
        "local_training": FIT,
        "server_distil": FIT,
        "client_distil": FIT,
        "proxy": world.proxy,
        "num_classes": 10,
        "encoder": None,
    }
    none = world.private[0].subset(torch.arange(0))
    own = "small" if "specialists" in method.requires else "student"
    clients = [
        Client(id=i, architecture=own, train=train, calibration=none, **common) for i, train in enumerate(world.private)
    ]
    student = world.runtime.create("student", seed)
    server = Server(validation=world.test, test=world.test, student=student, **common)
    federation = FederationConfig(clients=CLIENTS, rounds=ROUNDS, client_fraction=0.75, dropout=0.1, deadline=DEADLINE)
    recipe = Recipe(
        seed=seed,
        method=Component(method.name),
        federation=federation,
        evaluation=Evaluation(metrics=["accuracy"], specialists=False),
    )
    channel = link(
        schedule=schedule,
        upload=Codec(CHAINS[chain][0]),
        download=Codec(CHAINS[chain][1]),
        ledger=Ledger(),
        seed=seed,
        bandwidth=Bandwidth({"upload": {"bytes_per_round": 900}}) if narrow else None,
        authentication=Authentication(authentication.simulated_keys(seed)) if authenticate else None,
        deadline=DEADLINE,
    )
    return FederatedLoop(
        recipe, folder, method, server, clients, channel, Sequential(), CallbackList([csv_log.CsvLog()])
    )


def drawn_schedule(rng, seed):
    """Faults of every kind, some of the time."""
    chance = lambda: float(rng.choice([0.0, 0.2, 0.5]))  # noqa: E731
    faults = [Vanish(chance(), when, int(rng.integers(0, 3))) for when in ("before", "during", "after")]
    faults += [Straggle(chance(), float(rng.choice([1.0, 100.0]))), NotFinite(chance())]
    late = rng.permutation(CLIENTS)[: rng.integers(0, 3)].tolist()
    return Schedule([*faults, LateJoin(late, int(rng.integers(1, ROUNDS + 1)))], seed)


def same(a, b):
    """Equal to the bit: tensors, arrays and all that holds them."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def assert_same_result(loop, other):
    """Weights and states of all, codecs' memories, and what was measured."""
    assert same(dict(loop.server.student.state_dict()), dict(other.server.student.state_dict()))
    assert same(loop.server.state, other.server.state)
    assert same([client.state for client in loop.clients], [client.state for client in other.clients])
    assert same(*({link: kept for link, kept in one.channel.state_dict().items() if kept} for one in (loop, other)))
    for a, b in zip(loop.history, other.history, strict=True):
        for part in ("cohort", "dropped", "clients", "metrics"):
            assert same(a[part], b[part])


def finish(loop, resume=False):
    """Run to the end, which is an error where nobody was heard in any round, and only there."""
    try:
        loop.run(resume=resume)
    except UserError as error:
        if "no client sent anything" in str(error):  # a spared run of which every upload was to be lost
            assert not loop.ledger.totals()["upload_bytes"]
            return
        assert "no message of any client" in str(error)
        left = [set(map(str, r["cohort"])) - set(map(str, r["dropped"])) - r["refused"].keys() for r in loop.history]
        assert len(left) == ROUNDS and not any(left)


def test_a_hundred_random_schedules_give_the_result_of_runs_without_the_lost_uploads(world, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nobody pulls the plug
    reasons, lost_in_all, killed, narrowed = set(), 0, 0, 0
    for number in range(100):
        rng = np.random.default_rng(number)
        schedule = drawn_schedule(rng, number)
        settings = {
            "schedule": schedule,
            "method": ("fedavg", "federated_distillation")[number % 2],
            "chain": str(rng.choice(list(CHAINS))),
            "authenticate": bool(rng.random() < 0.5),
            "narrow": bool(rng.random() < 0.25),
            "seed": number,
        }
        spared = federation(world, tmp_path / f"{number}-spared", Spared, **settings)
        loop = federation(world, tmp_path / f"{number}", Faulty, **settings)
        finish(spared)
        if number % 4 == 0:  # the server, too, dies once, at some write, and goes on
            with pytest.raises(Killed), dying(int(rng.integers(10, 40)), monkeypatch):
                loop.run()
            resumed = checkpoint.exists(loop.folder / "checkpoints")
            loop = federation(world, tmp_path / f"{number}", Faulty, **settings)
            killed += 1
            finish(loop, resumed)
        else:
            finish(loop)
            assert sum(row.bytes for row in loop.ledger.rows() if row.direction != "setup") == loop.channel.bytes

        # it ends, and nothing is lost: who was asked was heard, was silent, or was refused with a reason
        assert loop.round == ROUNDS
        lost = {}
        for record in loop.history:
            heard = [client for client in record["cohort"] if client not in record["dropped"]]
            assert record["clients"].keys() == {str(client) for client in heard}
            fates = {client: schedule.fault_of(record["round"], client) for client in heard}
            bad = {client for client in heard if is_lost(fates[client])}
            assert record["refused"].keys() == {str(client) for client in bad} and all(record["refused"].values())
            lost |= {(record["round"], client): fates[client] for client in bad}
            reasons.update(record["refused"].values())
        refusals = [(refusal.round, refusal.client) for refusal in loop.ledger.refusals]
        assert sorted(refusals) == sorted(lost)

        # the ledger balances: it has the spared run's rows, and those of the lost uploads
        rows, spared_rows = loop.ledger.rows(), spared.ledger.rows()
        extra = [row for row in rows if row.direction == "up" and (row.round, row.client) in lost]
        assert [row for row in rows if row not in extra] == spared_rows
        assert {(row.round, row.client) for row in extra} == lost.keys() and all(row.bytes > 0 for row in extra)

        assert_same_result(loop, spared)
        lost_in_all, narrowed = lost_in_all + len(lost), narrowed + len(loop.ledger.notes)
    assert killed == 25 and lost_in_all > 100 and narrowed > 20
    for kind in ("late: ", "not authentic: ", "checksum does not match", "is not finite"):
        assert any(kind in reason for reason in reasons)


# --- what each fault does


def fates(fault, rounds=200, clients=3, seed=1):
    schedule = Schedule([fault], seed)
    places = [(round, client) for round in range(1, rounds + 1) for client in range(clients)]
    return {place: schedule.fault_of(*place) for place in places}


def test_fates_depend_on_seed_round_and_client_only():
    faults = [Vanish(0.3, "before"), Vanish(0.3, "during", 2), NotFinite(0.3)]
    places = [(round, client) for round in range(1, 30) for client in range(5)]
    once, again, other = (Schedule(faults, seed) for seed in (1, 1, 2))
    expected = {place: once.fault_of(*place) for place in places}
    assert {place: again.fault_of(*place) for place in reversed(places)} == expected
    assert {place: other.fault_of(*place) for place in places} != expected
    silent = [fault.silent for fault in expected.values()]
    assert silent != [not fault.finite for fault in expected.values()]  # every fault has a stream of its own


def test_chances_are_met():
    found = fates(Vanish(0.25, "during"), rounds=1000)
    struck = [fault.arrives for fault in found.values() if fault.arrives < 1]
    assert len(struck) / len(found) == pytest.approx(0.25, abs=0.02)
    assert np.mean(struck) == pytest.approx(0.5, abs=0.05)  # breaks off anywhere
    assert not any(fault.absent or fault.silent or fault.seconds for fault in found.values())
    assert {fault.finite for fault in fates(NotFinite(1.0)).values()} == {False}
    assert {fault.seconds for fault in fates(Straggle(0.5, 3.0)).values()} == {0.0, 3.0}


def test_who_vanishes_stays_away_for_some_rounds_and_comes_back():
    for when in ("before", "during", "after"):
        gone, away = fates(Vanish(0.1, when)), fates(Vanish(0.1, when, away=2))
        after = fates(Vanish(0.1, "before"))  # the same draws, and they show
        for (round, client), fault in away.items():
            expected = any(after[earlier, client].silent for earlier in (round - 1, round - 2) if earlier >= 1)
            assert fault.absent == expected
            assert fault.silent == gone[round, client].silent == (when == "before" and after[round, client].silent)


def test_who_joins_late_is_not_asked_before():
    schedule = Schedule([LateJoin([1, 3], 4)], 0)
    assert schedule.cohort([0, 1, 2, 3], [2], 3) == ([0, 2], [2])
    assert schedule.cohort([0, 1, 2, 3], [2], 4) == ([0, 1, 2, 3], [2])


def test_a_client_that_was_away_goes_on_from_its_old_state(world, tmp_path):
    class Away(LateJoin):
        def apply(self, fault, round, stream):
            fault.absent = round == 2

    loop = federation(world, tmp_path, Faulty, Schedule([Away([0], 1)], 0), "federated_distillation")
    loop.recipe.federation.client_fraction, loop.recipe.federation.dropout = 1.0, 0.0
    states = []
    end = loop.callbacks.on_round_end
    loop.callbacks.on_round_end = lambda *a: (states.append(dict(loop.clients[0].state["specialist"])), end(*a))
    loop.run()
    assert [record["cohort"] for record in loop.history] == [[0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert same(states[0], states[1]) and not same(states[1], states[2])
    assert not any(row.client == 0 for row in loop.ledger.rows() if row.round == 2)


def test_the_clock_counts_computing_and_both_transfers(world, tmp_path):
    link = {"bits_per_second": 8000.0, "latency": 0.5}  # 1000 bytes a second
    for extra, refused in ((-0.01, {}), (0.01, {"0"})):
        loop = federation(world, tmp_path / str(extra), Faulty, Schedule([Straggle(1.0, 7.0, clients=[0])], 0))
        loop.recipe.federation.client_fraction, loop.recipe.federation.dropout = 1.0, 0.0
        loop.rounds, loop.channel.bandwidth = 1, Bandwidth(link)
        weights = Parameters(dict(loop.server.student.state_dict()), 24)
        sent = loop.channel._size(weights, Codec(), "up", 0, 1), loop.channel._size(weights, Codec(), "down", 0, 1)
        loop.channel._deadline = 7.0 + sum(0.5 + size / 1000 for size in sent) - extra
        loop.run()
        assert loop.history[0]["refused"].keys() == set(refused)
        assert all(reason.startswith("late: arrived after ") for reason in loop.history[0]["refused"].values())


def test_without_numbers_every_real_number_is_nan_and_nothing_else():
    parameters = Parameters({"w": torch.ones(2, 3), "n": torch.tensor(4), "h": torch.ones(3).bfloat16()}, samples=5)
    responses = Responses(torch.ones(2, 3).half(), "logits", torch.tensor([4, 7]))
    spoilt = without_numbers(Bundle((parameters, responses, UploadStatus(3)))).parts
    assert spoilt[0].tensors["w"].isnan().all() and spoilt[0].tensors["h"].isnan().all()
    assert spoilt[0].tensors["n"] == 4 and spoilt[0].samples == 5
    assert spoilt[1].values.dtype == torch.float16 and spoilt[1].values.isnan().all()
    assert spoilt[1].rows.tolist() == [4, 7] and spoilt[2].round == 3
    assert parameters.tensors["w"].sum() == 6 and without_numbers(None) is None


# --- the server


class Killed(BaseException):
    """What ends a process: nobody catches it."""


class dying:
    """Within this context the process dies at the n-th step of writing a file: half a write, no clean-up.

    Args:
        last: the number of the step; math.inf lets all pass.
        monkeypatch: pytest's.
    """

    def __init__(self, last, monkeypatch):
        self.last, self.patch, self.steps = last, monkeypatch, []

    def __enter__(self):
        self.context = self.patch.context()
        patch, real = self.context.__enter__(), files.os
        replaced = {name: self.step(name, getattr(real, name)) for name in ("fsync", "replace", "open")}
        patch.setattr(files, "os", SimpleNamespace(O_RDONLY=os.O_RDONLY, close=os.close, **replaced))
        for module in (files, csv_log):
            patch.setattr(module, "open", self.open, raising=False)
        patch.setattr(pathlib.Path, "unlink", self.step("unlink", pathlib.Path.unlink))
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def step(self, name, call):
        def stepped(*args, **kwargs):
            self.count(name)
            return call(*args, **kwargs)

        return stepped

    def count(self, name):
        self.steps.append(name)
        if len(self.steps) >= self.last:
            raise Killed

    def open(self, path, mode, **options):
        self.count("create")
        file = open(path, mode, **options)  # noqa: SIM115  closed by what is returned
        write = file.write

        class Torn:
            def __enter__(inner):
                return inner

            def __exit__(inner, *error):
                file.close()

            def __getattr__(inner, name):
                return getattr(file, name)

            def write(inner, data):
                try:
                    self.count("write")
                except Killed:
                    write(data[: len(data) // 2])
                    raise
                return write(data)

        return Torn()


SOME = Schedule([Vanish(0.3, "during"), NotFinite(0.2)], 3)


@pytest.mark.parametrize("method", ["fedavg", pytest.param("federated_distillation", marks=pytest.mark.slow)])
def test_a_server_killed_at_any_write_goes_on_to_the_same_result(world, tmp_path, monkeypatch, method):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    straight = federation(world, tmp_path / "straight", Faulty, SOME, method, "delta")
    with dying(math.inf, monkeypatch) as watch:
        straight.run()
    assert {"create", "write", "fsync", "replace", "open", "unlink"} == set(watch.steps)
    rows = metrics(tmp_path / "straight")
    for last in range(1, len(watch.steps) + 1):
        folder = tmp_path / str(last)
        loop = federation(world, folder, Faulty, SOME, method, "delta")
        with pytest.raises(Killed), dying(last, monkeypatch):
            loop.run()
        resumed = federation(world, folder, Faulty, SOME, method, "delta")
        resumed.run(resume=checkpoint.exists(folder / "checkpoints"))
        assert_same_result(resumed, straight)
        assert resumed.ledger.rows() == straight.ledger.rows()
        assert resumed.ledger.refusals == straight.ledger.refusals
        assert metrics(folder) == rows
        if resumed.resumed_from != ROUNDS:
            assert not list((folder / "checkpoints").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_process_killed_at_a_write_goes_on_to_the_same_result(tmp_path, step):
    """SIGKILL, which no code sees, at the second checkpoint."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, "callbacks": ["csv"], "faults": FAULTS}))
    kill = tmp_path / "kill.py"
    kill.write_text(KILL)
    fit = ["fit", "--recipe", str(path), "--output-dir"]
    python = [sys.executable, "-m", "fdl", *fit]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, kill, step, *fit, tmp_path / "killed"], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob(".*.partial"))
    for arguments in ([tmp_path / "killed", "--resume"], [tmp_path / "straight"]):
        assert subprocess.run([*python, *arguments], env=environment, capture_output=True).returncode == 0
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*.partial"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    found = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("killed", "straight")]
    for part in ("metrics", "communication", "rounds", "best"):
        assert found[0][part] == found[1][part]


KILL = """
import os, signal, sys
from types import SimpleNamespace
from fdl.utils import files
from fdl.__main__ import main

step, arguments = sys.argv[1], sys.argv[2:]

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

replace = files._replace

def replacing(path, data):
    if path.name.startswith("round-000001"):
        if step == "write":
            path.with_name(f".{path.name}.partial").write_bytes(data[:100])
            die()
        names = ("fsync", "replace", "open", "close", "O_RDONLY")
        files.os = SimpleNamespace(**({name: getattr(os, name) for name in names} | {step: die}))
    replace(path, data)

files._replace = replacing
sys.exit(main(arguments))
"""


def metrics(folder):
    """metrics.csv without the columns that the clock fills."""
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    keep = [i for i, name in enumerate(lines[0]) if not name.startswith("seconds/")]
    return [[line[i] for i in keep] for line in lines]


@pytest.mark.parametrize("where", ["metrics.csv", "best", "round-000002"])
def test_a_full_disk_ends_the_run_with_one_message_and_it_goes_on(world, tmp_path, monkeypatch, where):
    straight = federation(world, tmp_path / "straight", Faulty, SOME)
    straight.run()
    loop, full = federation(world, tmp_path / "run", Faulty, SOME), [False]
    loop.callbacks.on_round_start = lambda loop, round: full.__setitem__(0, round == 2)

    def refusing(path, *args, **kwargs):
        if full[0] and where in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        for module in ("fdl.utils.files", "fdl.callbacks.csv_log"):
            patch.setattr(f"{module}.open", refusing, raising=False)
        patch.setattr(
            "fdl.federation.snapshot.best_round", lambda history, task: len(history)
        )  # every round is the best
        with pytest.raises(UserError, match=rf"{where}.*: cannot be written: No space left on device"):
            loop.run()
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints")[0]["round"] == 1
    resumed = federation(world, tmp_path / "run", Faulty, SOME)
    resumed.run(resume=True)
    assert resumed.resumed_from == 1
    assert_same_result(resumed, straight)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(world, tmp_path, caplog):
    straight = federation(world, tmp_path, Faulty, SOME, chain="delta")
    straight.run()
    newest = max((tmp_path / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    resumed = federation(world, tmp_path, Faulty, SOME, chain="delta")
    resumed.run(resume=True)
    assert resumed.resumed_from == ROUNDS - 1
    assert f"{newest}: damaged checkpoint passed over" in caplog.text
    assert_same_result(resumed, straight)


# --- recipes


RECIPE = {
    "name": "small",
    "method": "federated_distillation",
    "data": {"target": "digits", "args": {"proxy": 40, "validation": 0, "test": 1600}},
    "federation": {"clients": 3, "rounds": 2, "deadline": 5.0},
    "specialists": [{"target": "mlp", "args": {"hidden": [4]}}],
    "student": {"target": "mlp", "args": {"hidden": [4]}},
    "local_training": {"steps": 1},
    "server_distil": {"steps": 1},
    "fabric": {"accelerator": "cpu", "threads": 1},
    "callbacks": [],
}


FAULTS = [
    {"target": "straggler", "args": {"chance": 1.0, "seconds": 6.0, "clients": [1]}},
    {"target": "late_join", "args": {"clients": [2], "round": 2}},
]


def test_faults_in_a_recipe_and_a_proxy_set_that_changed(tmp_path, monkeypatch):
    from fdl.datamodules.digits import Digits
    from fdl.runs import run as runs

    recipe = from_mapping({**RECIPE, "faults": FAULTS})
    summary = runs.run_recipe(recipe, tmp_path)
    assert [record["cohort"] for record in summary["history"]] == [[0, 1], [0, 1, 2]]
    assert [list(record["refused"]) for record in summary["history"]] == [["1"], ["1"]]
    assert json.loads((tmp_path / "summary.json").read_text())["rounds"] == 2

    setup = Digits.setup

    def changed(self, stage=None):
        setup(self, stage)
        self.proxy = self.proxy.subset(np.r_[1, 0, 2 : len(self.proxy)])  # two samples changed places

    monkeypatch.setattr(Digits, "setup", changed)
    with pytest.raises(UserError, match="the data, or who holds which of them, changed since this checkpoint"):
        runs.run_recipe(from_mapping({**RECIPE, "faults": FAULTS}, ["federation.rounds=3"]), tmp_path, resume=True)


def test_mistakes_in_faults_are_named():
    faults = [
        {"target": "dropout", "args": {"chance": 1.5}},
        {"target": "straggler", "args": {"chance": 0.5, "seconds": 0.0}},
        {"target": "late_join", "args": {"clients": [0], "round": 0}},
        {"target": "dropout", "args": {"chance": 0.5, "when": "later"}},
        {"target": "dropout", "args": {"chance": 0.5, "away": -1}},
        {"target": "dropouts"},
    ]
    with pytest.raises(RecipeError) as caught:
        from_mapping({**RECIPE, "faults": faults, "federation": {"clients": 3, "deadline": 0}})
    text = str(caught.value)
    for part in (
        "federation.deadline",
        "faults.0.args.chance: chance must be in [0, 1], got 1.5",
        "faults.1.args.seconds: seconds must be > 0",
        "faults.2.args.round: round must be at least 1",
        "faults.3.args.when",
        "faults.4.args.away: away must be at least 0",
        "faults.5",
        "'dropout'",
    ):
        assert part in text
    with pytest.raises(RecipeError, match=r"faults\.0\.args\.clients: there is no client 3: the ids are 0 … 2"):
        from_mapping({**RECIPE, "faults": [{"target": "nan_upload", "args": {"chance": 0.5, "clients": [3]}}]})
