"""What the loop makes of a method that breaks its contract: an error that names method, function and type."""

import logging

import pytest
import torch

from fdl.build import build
from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.means import ParameterMean
from fdl.knowledge.aggregation.tensor_mean import WeightedMean
from fdl.messages import Parameters, Responses, TensorMessage
from fdl.methods.base import Method
from fdl.recipe import from_mapping
from fdl.state.weights import module_state
from tests.federation.test_refused_uploads import RECIPE


class Sends(Method):
    """Sends what it is given; its aggregate is a mean of weights."""

    name = "sends"
    upload = staticmethod(lambda client: None)

    def local_update(self, client, download):
        return self.upload(client)

    def aggregate(self, server):
        return ParameterMean(module_state(server.student))


class Trains(Sends):
    """Has clients train, and no more."""

    def aggregate(self, server):
        return None


class Nothing(Sends):
    sends = ()

    def aggregate(self, server):
        return None


def run(folder, kind=Sends, upload=None, **more):
    method = {"target": f"{__name__}.{kind.__name__}"}
    loop = build(from_mapping({**RECIPE, "method": method, "federation": {"clients": 2, "rounds": 2}, **more}), folder)
    if upload is not None:
        loop.method.upload = upload
    return loop


@pytest.mark.parametrize(
    ("kind", "sends", "upload", "error"),
    [
        (Sends, None, {"w": 1}, r"method Sends: local_update of client 0 returned a dict, which is not a Message"),
        (Sends, (Responses,), Parameters({}), "returned Parameters, and the method's `sends` declares Responses"),
        (Trains, None, Parameters({}), r"method Trains: client 0 sent a message, and aggregate\(\) returns nothing"),
        (Nothing, (), Parameters({}), "returned Parameters, and the method's `sends` declares no message"),
    ],
)
def test_an_upload_that_nothing_can_be_done_with(tmp_path, kind, sends, upload, error):
    loop = run(tmp_path, kind, lambda client: upload)
    loop.method.sends = sends
    with pytest.raises(UserError, match=error):
        loop.run()


def test_an_aggregate_that_is_none(tmp_path):
    loop = run(tmp_path)
    loop.method.aggregate = lambda server: {}
    with pytest.raises(UserError, match=r"method Sends: aggregate\(\) returned a dict; derive it from fdl.knowledge"):
        loop.run()


def test_a_download_that_is_no_message(tmp_path):
    loop = run(tmp_path)
    loop.method.download = lambda server, client: [1]
    with pytest.raises(UserError, match="method Sends: download for client 0 returned a list"):
        loop.run()


@pytest.mark.parametrize("sends", [None, (Parameters,)])
def test_a_federation_in_which_no_client_uploads_warns_at_once_and_fails_in_the_end(tmp_path, caplog, sends):
    loop = run(tmp_path)
    loop.method.sends = sends
    with caplog.at_level(logging.WARNING, "fdl"), pytest.raises(UserError, match="no client sent anything in any of 2"):
        loop.run()
    assert [line for line in caplog.messages if "no client sent anything" in line] == [
        "round 1: no client sent anything: Sends.local_update returned None for every client, and Sends.aggregate "
        "waits for messages; return a Message from the one, or let the method declare `sends = ()`"
    ]


@pytest.mark.parametrize("kind", [Trains, Nothing])
def test_a_method_whose_clients_have_nothing_to_send_runs(tmp_path, caplog, kind):
    run(tmp_path, kind).run()
    assert not [line for line in caplog.messages if "no client" in line]


def message(value, samples, **more):
    return TensorMessage({"a": {"x": torch.full((2,), value), "n": torch.tensor(samples)}, "b": more}, samples)


@pytest.mark.parametrize(("by", "mean"), [("samples", 2.5), ("clients", 2.0)])
def test_a_mean_of_any_named_tensors_also_in_parts(by, mean):
    like = message(0.0, 0).groups
    whole, parts = WeightedMean(like, by), [WeightedMean(like, by) for _ in range(2)]
    for client, (part, value, samples) in enumerate(zip(parts, (1.0, 3.0), (1, 3))):
        whole.add(message(value, samples), client)
        part.add(message(value, samples), client)
    parts[0].merge(parts[1])
    for result in (whole.result(), parts[0].result()):
        assert torch.equal(result.groups["a"]["x"], torch.full((2,), mean))
        assert int(result.groups["a"]["n"]) == 3  # of integers the largest
        assert result.groups["b"] == {} and (result.clients, result.samples) == (2, 4)
    assert WeightedMean(like, by).result() is None


def test_a_mean_rejects_what_does_not_fit_before_it_changes():
    mean = WeightedMean(message(0.0, 0).groups)
    for bad, reason in [
        (Parameters({}), "expected groups of tensors, got parameters"),
        (TensorMessage({"a": {}}), "groups missing: \\['b'\\]"),
        (message(1.0, 1, y=torch.ones(1)), "unknown: \\['b/y'\\]"),
        (message(1.0, 0), "trained on 0 samples"),
    ]:
        with pytest.raises(RejectedMessageError, match=reason):
            mean.add(bad, 0)
    assert mean.result() is None
    with pytest.raises(ValueError, match="do not merge"):
        mean.merge(WeightedMean(message(0.0, 0).groups, "clients"))


def test_an_adversary_needs_to_know_what_clients_send(tmp_path):
    with pytest.raises(UserError, match=r"method sends does not declare what its clients send: add to Sends a line"):
        run(tmp_path, adversaries=[{"target": "sign_flip", "clients": [0]}])
