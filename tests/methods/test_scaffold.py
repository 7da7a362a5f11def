"""SCAFFOLD on quadratic clients, whose local updates have a closed form, and on small models in full runs.

A client's loss is ½ mean ‖W x − e_y‖² over its samples, with gradient W H − B, H = mean x xᵀ, B = mean e_y xᵀ. With a
correction d added, K steps of rate η from W end at W* + (W − W*) (I − η H)^K, where W* H = B − d.
"""

import numpy as np
import pytest
import torch
from torch import nn

from fdl.build import build
from fdl.comm.codec import Codec
from fdl.comm.wire import pack
from fdl.errors import UserError
from fdl.messages import TensorMessage
from fdl.methods.fedavg import FedAvg
from fdl.methods.scaffold import Scaffold, local_steps
from fdl.recipe import Component, Fit, load
from fdl.state.weights import module_state
from tests.rank_jobs import JOBS, RECIPES, SMALL
from tests.toy import Linear, federation, weight

PRIVATE = (
    (([1.0, 0.5], [0.25, 1.0]), (0, 1)),
    (([0.5, -1.0], [1.0, 1.0], [-0.5, 0.75]), (1, 1, 0)),
    (([1.25, 0.25], [-0.75, 1.0]), (1, 0)),
)
ETA, K = 0.2, 4


class Quadratic(Linear):
    """A linear model with a squared error, which starts away from zero."""

    def __init__(self):
        super().__init__(scale=0.3)

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        error = self(x).logits - nn.functional.one_hot(y, 2)
        return {"loss": error.square().sum(1).mean() / 2}


def quadratics(method, folder, rounds, **settings):
    loop = federation(method, folder, rounds, module=Quadratic, private=PRIVATE, **settings)
    for client in loop.clients:
        client.local_training = Fit(steps=K, batch_size=64, optimizer=Component("sgd", {"lr": ETA}))
    loop.run()
    return loop


def moments(client):
    x, y = np.array(PRIVATE[client][0]), np.eye(2)[list(PRIVATE[client][1])]
    return x.T @ x / len(x), y.T @ x / len(x)


def expected(cohorts, server_lr=1.0):
    """Global weights, the server's control variate and the clients', after rounds with these cohorts."""
    w, c, own = np.full((2, 2), 0.3), np.zeros((2, 2)), [np.zeros((2, 2)) for _ in PRIVATE]
    for cohort in cohorts:
        displacements, changes = [], []
        for i in cohort:
            h, b = moments(i)
            optimum = (b - (c - own[i])) @ np.linalg.pinv(h)
            y = optimum + (w - optimum) @ np.linalg.matrix_power(np.eye(2) - ETA * h, K)
            change = (w - y) / (K * ETA) - c
            own[i] = own[i] + change
            displacements.append(y - w)
            changes.append(change)
        w = w + server_lr * np.mean(displacements, axis=0)
        c = c + len(cohort) / len(PRIVATE) * np.mean(changes, axis=0)
    return w, c, own


def assert_as_expected(loop, server_lr=1.0):
    w, c, own = expected([record["cohort"] for record in loop.history], server_lr)
    close = {"rtol": 1e-4, "atol": 2e-6}
    np.testing.assert_allclose(weight(loop.server.student).numpy(), w, **close)
    np.testing.assert_allclose(loop.server.state["control"]["linear.weight"].numpy(), c, **close)
    for client, control in zip(loop.clients, own):
        kept = client.state.get("control", {"linear.weight": torch.zeros(2, 2)})
        np.testing.assert_allclose(kept["linear.weight"].numpy(), control, **close)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_of_k_local_steps_have_a_closed_form(tmp_path, rounds):
    assert_as_expected(quadratics(Scaffold(), tmp_path, rounds))


def test_the_servers_learning_rate_scales_the_mean_displacement(tmp_path):
    assert_as_expected(quadratics(Scaffold(server_lr=0.5), tmp_path, 3), server_lr=0.5)


def test_control_variates_of_clients_that_sit_out_stay(tmp_path):
    loop = quadratics(Scaffold(), tmp_path, 4, client_fraction=0.67)
    cohorts = [record["cohort"] for record in loop.history]
    assert all(len(cohort) == 2 for cohort in cohorts) and len({tuple(cohort) for cohort in cohorts}) > 1
    assert_as_expected(loop)


def test_it_reaches_the_optimum_that_fedavg_misses(tmp_path):
    h, b = np.mean([moments(i)[0] for i in range(3)], axis=0), np.mean([moments(i)[1] for i in range(3)], axis=0)
    optimum = b @ np.linalg.inv(h)
    errors = [
        np.abs(weight(quadratics(method, tmp_path / method.name, 80).server.student).numpy() - optimum).max()
        for method in (Scaffold(), FedAvg())
    ]
    assert errors[0] < 1e-4 < 1e-2 < errors[1]


def test_every_byte_of_weights_and_control_variates_is_counted(tmp_path):
    ledger = quadratics(Scaffold(), tmp_path / "scaffold", 2).ledger
    four = {"linear.weight": torch.zeros(2, 2)}
    one = len(pack(TensorMessage({"weights": four, "control": four}, kind="scaffold"), Codec(), client=0, round=1))
    assert one > 2 * 4 * 4
    assert ledger.by_kind() == {"up/scaffold": 2 * 3 * one, "down/scaffold": 2 * 3 * one}


def recipe(*more):
    file, overrides = JOBS["scaffold"]
    return load(RECIPES / file, [*SMALL, *overrides, *more])


def run(folder, *more, resume=False):
    loop = build(recipe(*more), folder)
    loop.run(resume)
    return loop


def flat(loop):
    tensors = [*module_state(loop.server.student).values(), *loop.server.state["control"].values()]
    tensors += [t for client in loop.clients for t in client.state.get("control", {}).values()]
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def test_it_resumes_to_the_bit_with_states_on_disk(tmp_path):
    whole = run(tmp_path / "whole", "federation.rounds=3", "federation.client_state=memory")
    run(tmp_path / "parts", "federation.rounds=1", "federation.client_state=disk")
    parts = run(tmp_path / "parts", "federation.rounds=3", "federation.client_state=disk", resume=True)
    assert torch.equal(flat(whole), flat(parts))


def test_vectorised_clients_end_where_sequential_ones_do(tmp_path):
    loops = [run(tmp_path / name, f"client_execution={name}") for name in ("sequential", "vectorized")]
    torch.testing.assert_close(flat(loops[0]), flat(loops[1]), rtol=1e-4, atol=1e-5)
    assert loops[0].ledger.totals() == loops[1].ledger.totals()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("local_training.optimizer.args.momentum=0.9", r"local_training\.optimizer\.args\.momentum: must be left out"),
        ("local_training.optimizer={target: adam, args: {lr: 0.01}}", r"local_training\.optimizer: must be sgd"),
        ("local_training.optimizer={target: sgd}", r"local_training\.optimizer\.args\.lr: must be given"),
        ("local_training.gradient_clip=1", r"local_training\.gradient_clip: must be null"),
        (
            "local_training.scheduler={target: cosine_annealing_lr, args: {T_max: 9}}",
            r"local_training\.scheduler: must be null",
        ),
        ("privacy={epsilon: 8, delta: 1.0e-3}", r"privacy\.training: scaffold does not train under dp_sgd"),
    ],
)
def test_training_that_is_no_plain_sgd_is_refused_before_the_first_round(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, more)


def test_a_server_learning_rate_is_positive():
    with pytest.raises(UserError, match="server_lr must be > 0, got 0"):
        Scaffold(server_lr=0)


@pytest.mark.parametrize(
    ("samples", "config", "norm", "steps"),
    [
        (10, Fit(steps=7), False, 7),
        (9, Fit(epochs=3, batch_size=4), False, 9),
        (9, Fit(epochs=3, batch_size=4), True, 6),  # the last batch of one sample is left out
        (1, Fit(epochs=2, batch_size=4), False, 2),
        (0, Fit(steps=7), False, 0),
        (9, Fit(epochs=0), False, 0),
    ],
)
def test_local_steps_are_those_that_training_takes(samples, config, norm, steps):
    module = nn.BatchNorm1d(2) if norm else nn.Linear(2, 2)
    assert local_steps(module, samples, config) == steps


def test_a_client_without_samples_uploads_nothing(tmp_path):
    loop = federation(Scaffold(), tmp_path)
    client = loop.clients[0]
    client.train = client.train.subset(torch.arange(0))
    loop.run()
    assert "control" not in client.state and loop.ledger.by_kind()["up/scaffold"] > 0
    assert torch.equal(weight(loop.server.student)[:, 0], torch.zeros(2))
