"""The job in Flower 1.42 on Ray. Usage: python flower_job.py JOB.npz MODEL COHORT ROUNDS; prints one JSON line."""

import json
import sys
import tempfile
import time
from pathlib import Path

import jobs
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

PATH, MODEL, COHORT, ROUNDS = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5])
DATA: list = []  # read once in every process


def train(message: Message, context: Context) -> Message:
    """One client's epoch."""
    torch.set_num_threads(1)
    if not DATA:
        DATA.extend(jobs.load(PATH)[0])
    x, y = DATA[int(context.node_config["partition-id"])]
    model = jobs.MODELS[MODEL]()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.train()
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=jobs.RATE), 0
    for indices in torch.randperm(len(y)).split(jobs.BATCH):
        nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    metrics = MetricRecord({"num-examples": len(y), "steps": steps})
    answer = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=answer, reply_to=message)


def main() -> None:
    """Run the job once and print its times."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clients, test = jobs.load(PATH)
    result = Path(tempfile.mkdtemp()) / "result.json"
    server, client = ServerApp(), ClientApp()
    client.train()(train)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        model, times, steps = jobs.MODELS[MODEL](), [time.perf_counter()], [0]

        def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
            model.load_state_dict(arrays.to_torch_state_dict())
            right = jobs.accuracy(model, test)
            times.append(time.perf_counter())
            return MetricRecord({"accuracy": right})

        def counted(records: list[RecordDict], key: str) -> MetricRecord:
            steps[0] += sum(int(record["metrics"]["steps"]) for record in records)
            return MetricRecord({})

        share = COHORT / len(clients)
        strategy = FedAvg(
            fraction_train=share, fraction_evaluate=0.0, min_train_nodes=COHORT, train_metrics_aggr_fn=counted
        )
        strategy.start(
            grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=ROUNDS, evaluate_fn=evaluate
        )
        # the first evaluation, of the initial model, comes before round 1
        result.write_text(json.dumps({"times": times[1:], "steps": steps[0], "accuracy": jobs.accuracy(model, test)}))

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app=server, client_app=client, num_supernodes=len(clients), backend_config=resources)
    print(json.dumps({**json.loads(result.read_text()), "peak": jobs.peak_bytes()}))


if __name__ == "__main__":
    main()
