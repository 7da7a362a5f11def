"""What the processes of tests/test_sharding.py run: ``python tests/shard_jobs.py FOLDER``, once for each rank.

The recipe refuses FSDP on a CPU, where nobody needs it; below the recipe it works there as on GPUs, over gloo.
"""

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from fdl.build import build
from tests import rank_jobs


def run(name: str, devices: int, folder: Path, more: tuple[str, ...] = (), resume: bool = False) -> dict:
    """Run one job of `rank_jobs` to its end, its models spread over the devices."""
    recipe = rank_jobs.recipe(name, devices, more)
    if devices > 1:
        recipe = replace(recipe, fabric=replace(recipe.fabric, strategy="fsdp"))
    loop = build(recipe, folder)
    return rank_jobs.outcome(loop, loop.run(resume=resume))
if __name__ == "__main__":
    place = Path(sys.argv[1])
    found = {}
    import time
    names = sys.argv[2:] or rank_jobs.JOBS
    for name in names:
        t = time.time()
        try:
            two = run(name, 2, place / name)
        except Exception as e:
            traceback.print_exc()
            print(name, "FAILED", flush=True)
            os._exit(1)
        if os.environ["LOCAL_RANK"] == "0":
            t1 = time.time()
            env = {k: os.environ.pop(k) for k in ("WORLD_SIZE",)}
            one = rank_jobs.run(name, 1, place / "one" / name)
            os.environ.update(env)
            import numpy as np
            f = lambda o: np.concatenate([np.ravel(v) for v in o["student"].values()] or [np.zeros(1)])
            same = [a["metrics"] == b["metrics"] for a, b in zip(one["history"], two["history"])]
            print(name, "max diff", np.abs(f(one) - f(two)).max() if f(one).shape == f(two).shape else "SHAPE", "bytes", one["communication"] == two["communication"], same, f"{t1-t:.1f}s {time.time()-t1:.1f}s", flush=True)
    os._exit(0)
