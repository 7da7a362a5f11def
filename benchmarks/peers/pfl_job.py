"""The digits job in pfl-research: run by overhead.py in an environment that has pfl 0.6, prints one JSON line.

Usage: python benchmarks/pfl_digits.py DATA.npz CLIENTS COHORT ROUNDS
where DATA.npz holds x_train, y_train, x_test, y_test and `share`, the client of every training sample.
"""

import json
import sys
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn


class MLP(nn.Module):
    """64-128-64-10 with the two functions that pfl asks of a model."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(self, x, y, eval=False):
        """Mean cross-entropy of one batch."""
        self.eval() if eval else self.train()
        self.steps += 1
        return nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x, y, eval=False):
        """Accuracy of one batch."""
        self.eval() if eval else self.train()
        return {"accuracy": Weighted((self.net(x).argmax(1) == y).sum().item(), len(y))}


def main() -> None:
    """Run the job once and print its time and final accuracy."""
    path, clients, cohort, rounds = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    data = np.load(path)
    x, y = torch.from_numpy(data["x_train"]), torch.from_numpy(data["y_train"])
    users = {i: (x[data["share"] == i], y[data["share"] == i]) for i in range(clients)}
    train = FederatedDataset(lambda i: Dataset(raw_data=users[i]), get_user_sampler("minimize_reuse", list(users)))
    test = Dataset(
        raw_data=[torch.from_numpy(data["x_test"]), torch.from_numpy(data["y_test"])], eval_kwargs={"eval": True}
    )
    network = MLP()
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    evaluation = NNEvalHyperParams(local_batch_size=512)
    start = time.perf_counter()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=10**9, train_cohort_size=cohort, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=train, val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=32),
        model_eval_params=evaluation,
        callbacks=[CentralEvaluationCallback(test, model_eval_params=evaluation, frequency=1)],
    )
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = (network.net(test.raw_data[0]).argmax(1) == test.raw_data[1]).float().mean().item()
    print(json.dumps({"seconds": seconds, "accuracy": accuracy, "steps": network.steps}))


if __name__ == "__main__":
    main()
