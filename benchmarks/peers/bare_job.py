"""The job as anybody would write it by hand. Usage: python bare_job.py JOB.npz MODEL COHORT ROUNDS; prints JSON."""

import json
import sys
import time

import jobs
import numpy as np
import torch
from torch import nn


def main() -> None:
    """Run the job once and print its times."""
    path, name, cohort, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clients, test = jobs.load(path)
    model = jobs.MODELS[name]()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    rng, steps, times = np.random.default_rng(0), 0, [time.perf_counter()]
    for _ in range(rounds):
        asked = rng.choice(len(clients), cohort, replace=False)
        total = sum(len(clients[client][1]) for client in asked)
        mean = {key: torch.zeros_like(value) for key, value in weights.items()}
        for client in asked:
            x, y = clients[client]
            model.load_state_dict(weights)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=jobs.RATE)
            for indices in torch.randperm(len(y)).split(jobs.BATCH):
                nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
            for key, value in model.state_dict().items():
                mean[key] += value * (len(y) / total)
        weights = mean
        model.load_state_dict(weights)
        right = jobs.accuracy(model, test)
        times.append(time.perf_counter())
    print(json.dumps({"times": times, "steps": steps, "accuracy": right, "peak": jobs.peak_bytes()}))


if __name__ == "__main__":
    main()
