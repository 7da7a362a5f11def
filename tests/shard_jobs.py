"""What the processes of test_sharding.py run: ``python tests/shard_jobs.py FOLDER WHAT``, once for each rank.

A recipe refuses FSDP on a CPU, where nobody needs it; below the recipe it works there as on GPUs, over gloo.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fdl.build import build
from fdl.engine.distributed.batch_split import rank_share
from fdl.engine.steps import data_parallel
from fdl.errors import UserError
from fdl.state import checkpoint
from fdl.state.shards import local_shard
from tests import rank_jobs

SGD = "{target: sgd, args: {lr: 0.1}}"
LOCAL, DISTIL, DIGEST = (f"{part}.optimizer={SGD}" for part in ("local_training", "server_distil", "client_distil"))
PLAIN = ["channel.upload=[]", "channel.download=[]"]
LANGUAGE = [*rank_jobs.TEXT, rank_jobs.CLIENTS, "method={target: fedavg}", LOCAL, *PLAIN, "specialists=[]"]
LLAMA = f"{{target: causal_lm, args: {{model: llama, config: {rank_jobs.TINY}}}}}"
STILL = "embd_pdrop: 0, attn_pdrop: 0, resid_pdrop: 0"  # each rank draws its own samples' dropout
GPT2 = f"student={{target: causal_lm, args: {{model: gpt2, config: {{n_layer: 2, n_head: 2, n_embd: 16, {STILL}}}}}}}"
SMALLER = LLAMA.replace("intermediate_size: 16", "intermediate_size: 8")
POOLS = ["method={target: codistillation}", f"specialists=[{SMALLER}, {LLAMA}]", f"student={SMALLER}", DISTIL]
JOBS = {
    "fedavg": ("fedavg", []),
    "fedprox": ("fedprox", ["method.args.mu=5", "local_training.gradient_clip=0.3"]),
    "scaffold": ("scaffold", []),
    "batch_norm": ("batch_norm", []),
    "clipped": ("fedavg", ["local_training.gradient_clip=0.05"]),
    "adam": ("fedavg", ["local_training.optimizer={target: adamw, args: {lr: 0.01}}"]),
    "fml": ("fml", [LOCAL, "local_training.gradient_clip=0.05"]),
    "fed_lpfm": ("fed_lpfm", []),
    "distillation": ("distillation", [LOCAL, DISTIL]),
    "federated_distillation": ("federated_distillation", [LOCAL, DISTIL, DIGEST]),
    "disk": ("federated_distillation", [LOCAL, DISTIL, DIGEST, "federation.client_state=disk"]),
    "knowledge": ("knowledge", [LOCAL, DISTIL, DIGEST, "channel.upload=[]", "federation.rounds=2"]),
    "affinity_distillation": ("affinity_distillation", [LOCAL, DISTIL, DIGEST]),
    "token_distillation": ("token_distillation", [LOCAL, DISTIL, *PLAIN]),
    "fedlora": ("fedlora", []),
    "federated_prompts": ("federated_prompts", [LOCAL]),
    "pfedpg": ("pfedpg", [LOCAL]),
    "colluding": ("colluding", []),
    "tied": ("token_distillation", [*LANGUAGE, GPT2]),
    "pools": ("token_distillation", [*LANGUAGE, *POOLS]),
    "bf16": ("fedavg", ["fabric.precision=bf16-mixed", "student={target: vit}"]),
}
"""By name: a job of `rank_jobs`, and what is other here. Adam's rounding is as large as its smallest gradients."""

LONGER = ("disk", "fed_lpfm", "distillation", "affinity_distillation", "token_distillation", "federated_prompts")
LONGER += ("pfedpg", "colluding", "pools", "fml", "knowledge", "tied", "scaffold")
"""Jobs of the slow tier."""

QUICK = tuple(name for name in JOBS if name not in LONGER)


def recipe(name: str, folder: Path, more: tuple[str, ...] = (), sharded: bool = True):
    """The recipe of a job that runs in a folder."""
    base, changes = JOBS[name]
    made = rank_jobs.recipe(base, 2 if sharded else 1, (*changes, *more), folder)
    return replace(made, fabric=replace(made.fabric, strategy="fsdp")) if sharded else made


def run(name: str, folder: Path, more: tuple[str, ...] = (), resume: bool = False, sharded: bool = True) -> dict:
    """Run one job to its end, and say what this process held."""
    loop = build(recipe(name, folder, more, sharded), folder)
    found = rank_jobs.outcome(loop, loop.run(resume=resume))
    return {**found, "held": held(loop)}


def held(loop) -> dict:
    """Bytes of the student's template here and in all, and those of its optimiser's state."""
    module = loop.server.student if loop.server.student is not None else loop.runtime.shared_module("student")
    parameters = list(module.parameters())
    sizes = {"here": sum(local_shard(p).nbytes for p in parameters), "in all": sum(p.nbytes for p in parameters)}
    known = loop.runtime.steps.optimizers.reusable()
    states = [t for found in known for state in found.optimizer.state.values() for t in state.values()]
    tensors = [t for t in states if getattr(t, "ndim", 0)]
    moments = {"here": sum(local_shard(t).nbytes for t in tensors), "in all": sum(t.nbytes for t in tensors)}
    return {"parameters": sizes, "moments": moments, "names": [name for name, _ in module.named_parameters()]}


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """The student in a checkpoint."""
    return {name: tensor.float() for name, tensor in checkpoint.from_bytes(path.read_bytes())["student"].items()}


def rounded_weights(folder: Path, sharded: bool = True) -> int:
    """Bytes of rounded weights that a step under bf16-mixed holds between its way forward and backward."""
    loop = build(recipe("bf16", folder, sharded=sharded), folder)
    student, kept = loop.server.student, []
    shapes = {tuple(p.shape) for name, p in student.named_parameters() if "blocks" in name and p.ndim == 2}
    inputs = loop.server.test.batch(torch.arange(2))[0]
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        loop.runtime.fabric.autocast(),
    ):
        student.train()(inputs)
    rounded = [t for t in kept if t.dtype == torch.bfloat16 and {tuple(t.shape), tuple(t.shape)[::-1]} & shapes]
    assert rounded  # the blocks' products need their weights on the way back
    return sum(t.untyped_storage().nbytes() for t in rounded)


def all_jobs(place: Path) -> dict:
    """Every job, then runs that go on with those of one process."""
    found = {name: run(name, place / name) for name in QUICK}
    found["resumed"] = run("federated_distillation", place / "half", ("federation.rounds=2",), resume=True)
    parts = []
    data_parallel.rank_share = lambda *arguments: parts.append(rank_share(*arguments)) or parts[-1]
    run("federated_distillation", place / "parts", ("federation.rounds=1",))
    found["parts"] = len(parts)
    try:
        run("fedavg", place / "refused", ("local_training.optimizer={target: adafactor, args: {lr: 0.01}}",))
    except UserError as error:
        found["refused"] = str(error)
    return {**found, "rounded": rounded_weights(place / "rounded")}


def failing(method: str, place: Path) -> dict:
    """How a run ends here when the other rank fails."""
    more = (f"method.target=tests.rank_jobs.{method}", "method.args={}", "fabric.timeout=5")
    try:
        run("fedavg", place / method, more)
    except UserError as error:
        return {"error": str(error)}
    return {"error": "none"}


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    tasks = {"all": all_jobs, "longer": lambda place: {name: run(name, place / name) for name in LONGER}}
    result = tasks[what](folder) if what in tasks else failing(what, folder)
    (folder / f"{what}-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(result))
    os._exit(0)  # a rank that still sleeps is not waited for
