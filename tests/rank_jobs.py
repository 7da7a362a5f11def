"""What the processes of test_ranks.py run: ``python tests/rank_jobs.py FOLDER [longer]``, once for each rank.

Small federations one after the other, each built and run as `fdl fit` does; rank 0 leaves what came of them in FOLDER.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fdl.build import build
from fdl.engine.distributed.batch_split import rank_share
from fdl.engine.steps import data_parallel
from fdl.errors import UserError
from fdl.knowledge.aggregation.pools import prefix_names
from fdl.methods.fedavg import FedAvg
from fdl.modules.small_classifiers import MLP
from fdl.modules.small_dual_encoder import SmallDualEncoder
from fdl.modules.tokenizers import ByteTokenizer
from fdl.modules.tuning import apply_tuning
from fdl.recipe import load
from fdl.state.weights import module_state

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = [
    "federation.rounds=2",
    "local_training.steps=3",
    "local_training.epochs=null",
    "server_distil.steps=3",
    "server_distil.epochs=null",
    "callbacks=[]",
    "fabric.accelerator=cpu",
    "checkpoint.every=2",
]
DIGITS = ["data.args.proxy=64", "data.args.validation=50", "data.args.test=100"]
NO_PROXY = ["data.args.validation=50", "data.args.test=100"]
CLIENTS = "federation.clients=3"
PUBLIC = [*NO_PROXY, CLIENTS, "data.args.public=60"]
DIGEST = ["client_distil.steps=3", "client_distil.epochs=null"]
TEXT = ["data.args.packages=[json, email, logging]", "data.args.proxy_packages=[unittest]", "data.args.validation=4"]
TINY = "{num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 16, intermediate_size: 16}"
WORDS = [f"specialists.0.args.config={TINY}", f"student.args.config={TINY}", "data.args.context=32"]
LORA = ["method.target=fedlora", "student={target: tests.rank_jobs.Adapted, args: {}}"]
TOWERS = "a checkpoint made on the spot"
COLLUDING = (
    "adversaries=[{target: sybil, args: {attack: {target: alie}}, clients: [1, 2]}, {target: sign_flip, clients: [3]}, "
    "{target: inner_product, clients: [4], start: 2}]"
)
ATTACKS = "evaluation.attacks=[loss_threshold, {target: lira, args: {shadows: 2}}, label_leakage]"
INVERSION = [
    "evaluation.attacks=[{target: gradient_inversion, args: {steps: 3, moment: last, clients: 3}}]",
    "channel.upload=[{target: delta}, {target: quantize}]",
    "method.args.robust=median",
]
JOBS = {
    "fedavg": ("digits/fedavg.yaml", [*DIGITS, CLIENTS]),
    "fedadam": ("digits/fedadam.yaml", [*DIGITS, CLIENTS]),
    "fedprox": ("digits/fedprox.yaml", [*DIGITS, CLIENTS]),
    "scaffold": ("digits/scaffold.yaml", [*DIGITS, "federation.clients=4", "federation.client_fraction=0.75"]),
    "batch_norm": ("digits/fedavg.yaml", [*DIGITS, CLIENTS, "student={target: tests.rank_jobs.Normed, args: {}}"]),
    "batched": ("digits/fedavg.yaml", [*DIGITS, "federation.clients=4", "client_execution=vectorized"]),
    "one_client": (
        "digits/fedavg.yaml",
        [*DIGITS, "federation.clients=1", "adversaries=[{target: alie, fraction: 1}]"],
    ),
    "cfed": ("continual/digits.yaml", [*DIGITS, CLIENTS, "arrival.args.rounds=1"]),
    "fml": ("digits/fml.yaml", [*DIGITS, CLIENTS]),
    "fed_lpfm": ("digits/fed_lpfm.yaml", [*DIGITS, CLIENTS]),
    "federated_foundation": ("digits/federated_foundation.yaml", PUBLIC),
    "centralized": ("digits/centralized.yaml", [*DIGITS, CLIENTS]),
    "single_site": ("digits/single_site.yaml", [*DIGITS, CLIENTS]),
    "distillation": ("digits/distillation.yaml", [*DIGITS, CLIENTS]),
    "federated_distillation": ("digits/federated_distillation.yaml", [*DIGITS, "federation.clients=5"]),
    "few_asked": (
        "digits/federated_distillation.yaml",
        [*DIGITS, "federation.clients=6", "federation.client_fraction=0.5"],
    ),
    "knowledge": (
        "knowledge.yaml",
        [
            *DIGITS,
            "federation.clients=4",
            "federation.rounds=3",
            "channel.upload=[{target: delta}, {target: quantize}]",
        ],
    ),
    "codistillation": ("digits/codistillation.yaml", [*DIGITS, CLIENTS, "local_training.steps=2"]),
    "robust_pools": (
        "digits/codistillation.yaml",
        [*DIGITS, CLIENTS, "local_training.steps=2", "method.args.robust=median"],
    ),
    "feddf": ("digits/feddf_heterogeneous.yaml", [*DIGITS, CLIENTS]),
    "fedproto": ("digits/fedproto.yaml", [*DIGITS, CLIENTS, "partition.target=iid"]),
    "fedgems": ("digits/fedgems.yaml", [*PUBLIC, *DIGEST]),
    "fedgkt": ("digits/fedgkt.yaml", [*NO_PROXY, CLIENTS]),
    "token_distillation": ("quickstart_language.yaml", [*TEXT, *WORDS, CLIENTS]),
    "affinity_distillation": ("quickstart_dual_encoder.yaml", [*DIGITS, CLIENTS, *DIGEST]),
    "robust": ("digits/fedavg.yaml", [*DIGITS, CLIENTS, "method.args.robust=median"]),
    "fedlora": ("digits/fedavg.yaml", [*DIGITS, CLIENTS, *LORA, "method.args.aggregation=fedit"]),
    "fedlora_merged": (
        "digits/fedavg.yaml",
        [*DIGITS, "federation.clients=5", "federation.client_fraction=0.6", *LORA, "method.args.aggregation=flora"],
    ),
    "federated_prompts": ("prompts/digits.yaml", [*DIGITS, CLIENTS, TOWERS]),
    "pfedpg": ("prompts/digits_per_site.yaml", [*DIGITS, CLIENTS, TOWERS]),
    "colluding": ("digits/fedavg.yaml", [*DIGITS, "federation.clients=6", COLLUDING]),
    "colluding_robust": (
        "digits/fedavg.yaml",
        [*DIGITS, "federation.clients=6", "method.args.robust=trimmed_mean", COLLUDING],
    ),
    "liars": (
        "knowledge.yaml",
        [*DIGITS, "federation.clients=5", "adversaries=[{target: least_likely, fraction: 0.4}]"],
    ),
    "attacked": ("digits/audit.yaml", [*DIGITS, CLIENTS, *DIGEST, ATTACKS]),
    "updates_attacked": ("digits/fedprox.yaml", [*DIGITS, CLIENTS, *INVERSION]),
    "votes": ("digits/private_votes.yaml", [*DIGITS, "federation.clients=4"]),
}
LONGER = ("fedadam", "one_client", "few_asked", "robust_pools", "robust", "fedlora_merged", "colluding_robust", "liars")
LONGER += ("attacked", "updates_attacked", "votes")
"""Jobs of the slow tier: further settings of methods that the others have."""

QUICK = tuple(name for name in JOBS if name not in LONGER)
JOINT = (
    "federated_distillation",
    # Adam divides by a gradient's own size, which makes rounding of those near 0 as large as any other
    [CLIENTS, "federation.rounds=1", "fabric.strategy=ddp", "server_distil.optimizer={target: sgd, args: {lr: 0.1}}"],
)


class Normed(MLP):
    """A perceptron whose inputs are normalised over the batch; its count of batches is no average."""

    def __init__(self, num_classes: int, input_shape: list[int]):
        super().__init__(hidden=[8], num_classes=num_classes, input_shape=input_shape)
        self.norm = torch.nn.BatchNorm2d(input_shape[0])

    def forward(self, x, features=()):
        """Normalise, then as the perceptron."""
        return super().forward(self.norm(x), features)


class Adapted(MLP):
    """A perceptron whose weights everybody has, and of which updates of rank 2 are trained."""

    def __init__(self, num_classes: int, input_shape: list[int]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            super().__init__(hidden=[8], num_classes=num_classes, input_shape=input_shape)
        self.frozen = apply_tuning(self, "lora", lora={"rank": 2, "alpha": 4.0})


def towers(folder: Path) -> Path:
    """A file, beside the run's folder, with a dual encoder that everybody has."""
    encoder = load(RECIPES / "prompts/digits.yaml").student.args["encoder"]["args"]
    torch.manual_seed(7)
    module = SmallDualEncoder(**encoder, input_shape=(1, 8, 8), tokenizer=ByteTokenizer(), context=64)
    path = folder.with_name(f"{folder.name}-{os.environ.get('LOCAL_RANK', 0)}.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in module_state(module).items()}, path)
    return path


class FailsOnce(FedAvg):
    """A client of the second process makes a mistake that its user should hear of."""

    name = "fails_once"

    def local_update(self, client, download):
        if os.environ.get("LOCAL_RANK") == "1":
            raise UserError("its scanner is broken")
        return super().local_update(client, download)


class Sleeps(FedAvg):
    """The second process never comes back."""

    name = "sleeps"

    def local_update(self, client, download):
        if os.environ.get("LOCAL_RANK") == "1":
            time.sleep(8)  # twice as long as the others wait
        return super().local_update(client, download)


class Dies(FedAvg):
    """The second process is killed in round 2."""

    name = "dies"

    def local_update(self, client, download):
        if os.environ.get("LOCAL_RANK") == "1" and client.round == 2:
            os.kill(os.getpid(), 9)
        return super().local_update(client, download)


def recipe(name: str, devices: int, more: tuple[str, ...] = (), folder: Path = Path("run")):
    """The small recipe of a job that runs in a folder."""
    file, overrides = JOBS[name]
    overrides = [f"student.args.checkpoint={towers(folder)}" if one == TOWERS else one for one in overrides]
    return load(RECIPES / file, [*SMALL, *overrides, f"fabric.devices={devices}", *more])


def outcome(loop, summary) -> dict:
    """All that must not depend on the number of processes."""
    student = {} if loop.server.student is None else module_state(loop.server.student)
    state = loop.server.state  # what some methods have beside the student
    student = {**student, **prefix_names(state.get("pools", {})), **state.get("base", {}).get("total", {})}
    return {
        "student": {name: tensor.double().tolist() for name, tensor in student.items()},
        "history": [{key: value for key, value in record.items() if key != "seconds"} for record in summary["history"]],
        "communication": summary["communication"],
        "participants": summary["participants"],
        "audit": summary["audit"],
    }


def run(name: str, devices: int, folder: Path, more: tuple[str, ...] = (), resume: bool = False) -> dict:
    """Run one job to its end."""
    loop = build(recipe(name, devices, more, folder), folder)
    return outcome(loop, loop.run(resume=resume))


def error_of(method: str, folder: Path, timeout: float, *more: str) -> str:
    """Run a federation that fails, and say how it ended here."""
    more += (f"method.target=tests.rank_jobs.{method}", "method.args={}", f"fabric.timeout={timeout}")
    start = time.monotonic()
    try:
        run("fedavg", 2, folder, more)
    except UserError as error:
        return f"UserError after {time.monotonic() - start:.0f} s: {error}"
    except SystemExit as end:
        return f"exit {end.code}"
    return "no error"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    leader = os.environ["LOCAL_RANK"] == "0"
    if sys.argv[2:] == ["longer"]:
        found = {name: run(name, 2, place / name) for name in LONGER}
        if leader:
            (place / "found.json").write_text(json.dumps(found))
        sys.exit()
    found = {name: run(name, 2, place / name) for name in QUICK}
    # a run of two processes goes on from a checkpoint that one process wrote, and moves clients between them
    found["resumed"] = run("knowledge", 2, place / "half", ("federation.rounds=3",), resume=True)
    parts = []
    data_parallel.rank_share = lambda *arguments: parts.append(rank_share(*arguments)) or parts[-1]
    found["joint"] = run(*JOINT[:1], 2, place / "joint", tuple(JOINT[1]))
    found["parts"] = len(parts)
    ends = {"mistake": error_of("FailsOnce", place / "mistake", 60.0)}
    seen = "adversaries=[{target: alie, clients: [0]}]"  # all wait for what others are about to send
    ends["mistake_seen"] = error_of("FailsOnce", place / "seen", 60.0, seen)
    ends["hang"] = error_of("Sleeps", place / "hang", 4.0)
    (place / f"ends-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(ends))
    if leader:
        (place / "found.json").write_text(json.dumps(found))
    os._exit(0)  # a rank that still sleeps is not waited for
