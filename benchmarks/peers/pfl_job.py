"""The job in pfl-research 0.6. Usage: python pfl_job.py JOB.npz MODEL COHORT ROUNDS; prints one JSON line."""

import json
import sys
import time

import jobs
import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn


class Network(nn.Module):
    """The job's model with the two functions that pfl asks of one."""

    def __init__(self, name: str):
        super().__init__()
        self.steps = 0
        self.net = jobs.MODELS[name]()

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


class Times(TrainingProcessCallback):
    """When rounds end; called after the evaluation."""

    def __init__(self):
        self.times = []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """A round is over."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Run the job once and print its times."""
    path, name, cohort, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    clients, (x_test, y_test) = jobs.load(path)
    users = dict(enumerate(clients))
    train = FederatedDataset(lambda i: Dataset(raw_data=users[i]), get_user_sampler("minimize_reuse", list(users)))
    test = Dataset(raw_data=[x_test, y_test], eval_kwargs={"eval": True})
    network = Network(name)
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    evaluation, watch = NNEvalHyperParams(local_batch_size=512), Times()
    start = time.perf_counter()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=10**9, train_cohort_size=cohort, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=train, val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=jobs.RATE, local_batch_size=jobs.BATCH
        ),
        model_eval_params=evaluation,
        callbacks=[CentralEvaluationCallback(test, model_eval_params=evaluation, frequency=1), watch],
    )
    print(
        json.dumps(
            {
                "times": [start, *watch.times],
                "steps": network.steps,
                "accuracy": jobs.accuracy(network.net, (x_test, y_test)),
                "peak": jobs.peak_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
