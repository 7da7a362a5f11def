"""Copies of clients and servers for experiments beside a run."""

import numpy as np

from fdl.datamodules.guarded import GuardedSamples
from fdl.methods.fedavg import FedAvg
from tests.toy import E0, federation, samples


def test_a_clone_has_a_state_of_its_own_and_the_streams_of_its_client(tmp_path):
    loop = federation(FedAvg(), tmp_path)
    loop.start_round(2)
    client = loop.clients[1]
    client.state["mark"] = 1
    client.secret_seed("noise")
    twin = client.clone()
    twin.state["mark"], twin.cache["x"], twin.metrics["y"] = 2, 1, 1.0
    assert client.state == {"mark": 1} and not client.cache and not client.metrics
    assert twin.rng("fit").initial_seed() == client.rng("fit").initial_seed()
    assert twin.secret_seed("noise") == loop.clients[1].clone().secret_seed("noise") != client.secret_seed("noise")
    assert client.clone(seed=7).rng("fit").initial_seed() != client.rng("fit").initial_seed()
    assert client.clone(client.state).state is client.state


def test_a_clone_with_other_samples_is_corrupted_and_guarded_like_its_client(tmp_path):
    client = federation(FedAvg(), tmp_path).clients[1]
    client.data_corruption = lambda own, purpose: own.subset(np.arange(min(len(own), 1)))
    client.start_round(1)
    client.dp_sgd = object()
    other = samples([E0] * 2, [0] * 2)
    twin = client.clone(train=other)
    assert isinstance(twin.train, GuardedSamples) and len(twin.train) == 1
    assert len(client.clone(train=other, honest=True).train) == 2
    assert len(client.clone(honest=True).train) == 3 and len(client.train) == 1


def test_a_server_s_clone_forgets_what_the_server_computed(tmp_path):
    server = federation(FedAvg(), tmp_path).server
    server.state["phase"], server.cache["x"], server.cohort = 3, 1, [0]
    twin = server.clone()
    twin.cohort.append(1)
    assert twin.state == {} == twin.cache and server.cohort == [0] and twin.student is server.student
    assert len(server.clone(pooled=samples([E0], [0])).pooled) == 1 and len(server.pooled) == 4
