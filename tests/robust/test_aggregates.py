"""Robust aggregates: what they take, what they make of it, and that they hold where the mean does not."""

import math
from dataclasses import replace

import pytest
import torch

from fdl.comm.channel import Channel
from fdl.datamodules.samples import TensorSamples
from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.means import ParameterMean, ResponseMean
from fdl.knowledge.aggregation.pools import PoolAggregates, prefix_names
from fdl.knowledge.confidence.base import SampleCount
from fdl.messages import Parameters, QuantizedLogWeights, Responses
from fdl.methods.fedavg import FedAvg
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.methods.fedprox import FedProx
from fdl.recipe import from_mapping
from fdl.robust.answers import RobustAnswers
from fdl.robust.base import Plain
from fdl.robust.coordinate_wise import Median
from fdl.robust.distance_based import GeometricMedian, Krum
from fdl.robust.history import ExpGuard
from fdl.robust.parameters import RobustParameters
from fdl.robust.trust import FLTrust
from tests.toy import E0, E1, federation, samples, weight

ROWS, CLASSES = 6, 4


class Somewhere:
    """A server that has a proxy set and a memory, and no model."""

    def __init__(self, dry=False):
        self.state, self.metrics, self.round, self.seed, self.cache = {}, {}, 1, 0, {}
        self.proxy, self.num_classes = TensorSamples(torch.zeros(ROWS, 1)), CLASSES
        self.runtime = type("Runtime", (), {"is_dry_run": dry})()


def answers(seed, clients=5, limit=6.0, subsets=True):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(clients):
        rows = torch.randperm(ROWS, generator=g)[: int(torch.randint(2, ROWS + 1, (1,), generator=g))]
        rows = rows if subsets else torch.arange(ROWS)
        confidence = QuantizedLogWeights.quantize((torch.rand(len(rows), generator=g) * 2 - 1) * limit)
        values = torch.randn(len(rows), CLASSES, generator=g) * 2
        made.append(Responses(values, "logits", rows, confidence))
    return made


def taken(aggregate, messages, order=None):
    for client in order or range(len(messages)):
        aggregate.add(messages[client], client)
    return aggregate.result()


@pytest.mark.parametrize("space", ["probabilities", "logits"])
def test_without_a_rule_it_is_the_mean_of_answers(space):
    messages = answers(0)
    ours = taken(RobustAnswers(Plain(max_client_share=None), Somewhere(), space), messages)
    theirs = taken(ResponseMean(ROWS, CLASSES, space, cap=None), messages)
    torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.agreement, theirs.agreement, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.coverage, theirs.coverage)


@pytest.mark.parametrize(
    "rule", [Median(), GeometricMedian(), ExpGuard(), Krum(num_attackers=0)], ids=lambda r: type(r).__name__
)
def test_the_order_of_arrival_does_not_change_a_bit(rule):
    messages = answers(1, subsets=False)
    found = [taken(RobustAnswers(rule, Somewhere()), messages, order) for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2])]
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[0].log_weight, found[1].log_weight)
    assert torch.allclose(found[0].values.sum(1), torch.ones(ROWS)) and found[0].values.min() >= 0


def test_rows_that_nobody_or_too_few_answer_stay_open():
    every, first = torch.arange(ROWS), torch.arange(3)
    messages = [Responses(torch.randn(len(rows), CLASSES), "logits", rows) for rows in (every, first, first)]
    known = taken(RobustAnswers(Krum(num_attackers=0), Somewhere()), messages)
    assert known.coverage.tolist() == [3, 3, 3, 0, 0, 0]
    assert torch.equal(known.values[3:], torch.full((3, CLASSES), 1 / CLASSES))
    assert torch.isinf(known.log_weight[3:]).all()
    assert taken(RobustAnswers(Krum(num_attackers=0), Somewhere()), messages[:1]) is None


def test_a_loud_liar_has_no_more_than_its_cap():
    honest = [Responses(torch.tensor([[0.9, 0.1, 0, 0]]).repeat(ROWS, 1), "probabilities") for _ in range(4)]
    calm = QuantizedLogWeights.quantize(torch.zeros(ROWS))
    liar = Responses(torch.tensor([[0.0, 0, 0, 1]]).repeat(ROWS, 1), "probabilities")
    messages = [replace(m, confidence=calm) for m in honest]
    messages.append(replace(liar, confidence=QuantizedLogWeights.quantize(torch.full((ROWS,), 32.0))))
    server = Somewhere()
    plain, capped, median = (
        taken(aggregate, messages)
        for aggregate in (
            ResponseMean(ROWS, CLASSES, cap=None),
            RobustAnswers(Plain(max_client_share=2.0), Somewhere()),
            RobustAnswers(Median(), server),
        )
    )
    assert plain.values[0].argmax() == 3
    torch.testing.assert_close(capped.values[0], torch.tensor([0.54, 0.06, 0, 0.4]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(median.values[0], torch.tensor([0.9, 0.1, 0, 0]), rtol=1e-5, atol=1e-6)
    # it has a part in the one of four classes in which it says what all say
    weights = [server.metrics[f"robust/weight/{client}"] for client in range(5)]
    assert weights[4] < 0.2 and min(weights[:4]) > 1e6 and server.metrics["robust/suppressed"] == 1
    assert median.log_weight.max() < math.log(5) + 0.2 * 32  # nor does its 32 count for more than that


def test_one_of_k_moves_a_mean_of_probabilities_by_no_more_than_root_two_over_k():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        one, other = (torch.softmax(torch.randn(ROWS, CLASSES, generator=g) * 20, 1) for _ in range(2))
        rest = [Responses(torch.randn(ROWS, CLASSES, generator=g), "logits") for _ in range(4)]
        found = [
            taken(ResponseMean(ROWS, CLASSES), [*rest, Responses(p, "probabilities")]).values for p in (one, other)
        ]
        assert (found[0] - found[1]).norm(dim=1).max() <= math.sqrt(2) / 5 + 1e-6


def like():
    return {"w": torch.ones(2, 3), "count": torch.tensor(4), "b": torch.zeros(2, dtype=torch.bfloat16)}


def updates(n=5):
    g = torch.Generator().manual_seed(0)
    return [
        Parameters(
            {"w": torch.randn(2, 3, generator=g), "count": torch.tensor(5 + i), "b": torch.zeros(2).bfloat16() + i}, 10
        )
        for i in range(n)
    ]


def test_weights_take_their_places_again():
    messages = updates()
    found = taken(RobustParameters(Median(), Somewhere(), like()), messages, [4, 0, 2, 1, 3])
    expected = torch.stack([m.tensors["w"] for m in messages]).median(0).values
    torch.testing.assert_close(found["w"], expected)
    assert found["count"].item() == 7 and found["count"].dtype == torch.int64  # the largest would be a liar's to choose
    assert found["b"].dtype == torch.bfloat16 and found["b"].tolist() == [2.0, 2.0]


def test_every_pool_has_a_rule_of_its_own():
    server, messages = Somewhere(), updates()
    trained = {client: ["small", "large"][: 1 + client % 2] for client in range(5)}
    make = lambda pool, like: RobustParameters(Median(), server, like, pool, pool)  # noqa: E731
    means = PoolAggregates({"small": like(), "large": like()}, trained, make)
    for client, message in enumerate(messages):
        means.add(Parameters(prefix_names(dict.fromkeys(trained[client], message.tensors)), 1), client)
    found = means.result()
    for pool, members in (("small", range(5)), ("large", (1, 3))):
        stacked = torch.stack([messages[client].tensors["w"] for client in members])
        torch.testing.assert_close(found[pool]["w"], torch.quantile(stacked, 0.5, dim=0))
        assert f"robust/{pool}/weight/1" in server.metrics
    assert "robust/large/weight/0" not in server.metrics


def test_sample_counts_are_claims():
    messages = updates()
    messages[4] = replace(messages[4], samples=10**9)
    found = taken(RobustParameters(Plain(), Somewhere(), like()), messages)
    torch.testing.assert_close(found["w"], torch.stack([m.tensors["w"] for m in messages]).mean(0))


def test_what_does_not_fit_is_refused_and_too_few_change_nothing(caplog):
    aggregate = RobustParameters(Krum(num_attackers=1), Somewhere(), like())
    for wrong in (Responses(torch.zeros(1, 2), "logits"), Parameters({"w": torch.ones(2, 3)}, 1)):
        with pytest.raises(RejectedMessageError):
            aggregate.add(wrong, 0)
    with pytest.raises(RejectedMessageError):
        aggregate.add(replace(updates()[0], tensors={**updates()[0].tensors, "w": torch.full((2, 3), math.nan)}), 0)
    assert aggregate.result() is None
    assert taken(aggregate, updates(4)) is None and "it needs 5 uploads and got 4" in caplog.text


def test_in_a_dry_run_every_rule_is_the_mean():
    found = taken(RobustParameters(Krum(num_attackers=1), Somewhere(dry=True), like()), updates(2))
    torch.testing.assert_close(found["w"], torch.stack([m.tensors["w"] for m in updates(2)]).mean(0))


@pytest.mark.parametrize("make", [FedAvg, FedProx, lambda **o: FederatedDistillation(SampleCount(), **o)])
def test_no_rule_is_the_mean_to_the_bit(tmp_path, make):
    method = make(robust=None)
    loop = federation(method, tmp_path, rounds=1)
    mean = getattr(method.aggregate(loop.server), "responses", method.aggregate(loop.server))
    assert type(mean) in (ParameterMean, ResponseMean)
    loop.run()
    assert not any(key.startswith("robust") for key in loop.history[0]["metrics"])


def test_trust_in_weights_by_hand(tmp_path):
    # the server's samples are client 0's and client 1's: one step of its own gives D_0 = (W_0 + W_1) / 2 of length ½;
    # W_0 and W_1 lie at 45° to it and are as long as √½, so each is scaled by √½ and they are averaged
    loop = federation(FedAvg(robust=FLTrust()), tmp_path)
    loop.server.validation = samples([E0, E1], [0, 1])
    loop.run()
    half = math.sqrt(0.5) / 4
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[half, -half], [-half, half]]))
    assert loop.history[0]["metrics"]["robust/weight/0"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("robust", "needs"),
    [
        ({"target": "krum", "args": {"num_attackers": 2}}, 7),
        ({"target": "expguard", "args": {"rule": {"target": "multi_krum"}}}, 5),
        ("krum", 5),
        ({"target": "median"}, 0),
    ],
)
def test_a_cohort_that_is_too_small_for_a_rule_is_told_before_the_run(robust, needs):
    tree = {"method": {"target": "fedavg", "args": {"robust": robust}}, "data": {"target": "digits"}, "student": "mlp"}
    for clients, problem in ((max(needs, 1), False), (needs - 1, True))[: 2 if needs else 1]:
        tree["federation"] = {"clients": 2 * clients, "client_fraction": 0.5}
        if problem:
            with pytest.raises(UserError, match=f"needs {needs} uploads in a round"):
                from_mapping(tree)
        else:
            from_mapping(tree)


def test_trust_needs_samples_of_the_server(tmp_path):
    with pytest.raises(UserError, match=r"set data\.args\.public or validation"):
        federation(FedAvg(robust=FLTrust()), tmp_path).run()


def test_what_would_go_around_a_rule_is_refused():
    from fdl.knowledge.distillation.personalization import Similarity
    from fdl.knowledge.transfer.prototypes import PrototypeTransfer

    with pytest.raises(UserError, match="personalization would go around it"):
        FederatedDistillation(robust=Median(), personalization=Similarity())
    with pytest.raises(UserError, match="prototypes would go around it"):
        FederatedDistillation(robust=Median(), prototypes=PrototypeTransfer())


class Liars(Channel):
    """A link on which some clients' uploads say the opposite, and claim to be sure of it."""

    liars = (1, 4)

    def upload(self, message, client, round):
        return super().upload(self.turned(message) if client in self.liars else message, client, round)

    def turned(self, message):
        if isinstance(message, Parameters):
            return Parameters({name: -5 * tensor for name, tensor in message.tensors.items()}, message.samples)
        logits = -message.values.clamp_min(1e-6).log()
        sure = None if message.confidence is None else QuantizedLogWeights.quantize(torch.full((len(logits),), 32.0))
        return replace(message, values=torch.softmax(logits, 1), confidence=sure)


def digits(method, tmp_path, rounds, **more):
    from fdl.build import build

    tree = {
        "method": method,
        "data": {"target": "digits", "args": {"proxy": 300, "validation": 100, "test": 360}},
        "federation": {"clients": 10, "rounds": rounds},
        "student": {"target": "mlp", "args": {"hidden": [32]}},
        "local_training": {"steps": 40, "batch_size": 32, "optimizer": {"target": "adam", "args": {"lr": 0.005}}},
        "server_distil": {"steps": 80, "batch_size": 64, "optimizer": {"target": "adam", "args": {"lr": 0.005}}},
        "fabric": {"threads": 1, "accelerator": "cpu"},
        "evaluation": {"specialists": False, "every": rounds},
        "callbacks": [],
        **more,
    }
    loop = build(from_mapping(tree), tmp_path)
    loop.channel.__class__ = Liars
    return loop


def score(loop):
    loop.run()
    return loop.history[-1]["metrics"]["student/test/accuracy"]


def test_weights_of_digits_survive_two_liars_of_ten(tmp_path):
    means = digits({"target": "fedavg"}, tmp_path / "mean", 2)
    robust = digits({"target": "fedavg", "args": {"robust": {"target": "median"}}}, tmp_path / "robust", 2)
    broken, held = score(means), score(robust)
    assert broken < 0.5 < 0.8 < held


def test_answers_of_digits_survive_two_liars_of_ten(tmp_path):
    more = {"specialists": [{"target": "mlp", "args": {"hidden": [32]}}]}
    confidence = {"confidence": {"target": "entropy"}, "max_client_share": None}
    broken = digits({"target": "federated_distillation", "args": confidence}, tmp_path / "mean", 1, **more)
    args = {**confidence, "robust": {"target": "geometric_median"}}
    held = digits({"target": "federated_distillation", "args": args}, tmp_path / "robust", 1, **more)
    assert score(broken) < 0.3 < 0.8 < score(held)
    metrics = held.history[-1]["metrics"]
    weights = [metrics[f"robust/weight/{client}"] for client in range(10)]
    assert max(weights[1], weights[4]) < 0.3 < min(w for i, w in enumerate(weights) if i not in Liars.liars)


def test_a_resumed_run_remembers_whom_it_trusts(tmp_path):
    method = {"target": "fedavg", "args": {"robust": {"target": "expguard"}}}
    whole, first = digits(method, tmp_path / "a", 2), digits(method, tmp_path / "b", 2)
    whole.run()
    first.rounds = 1
    first.run()
    second = digits(method, tmp_path / "b", 2)
    second.run(resume=True)
    assert second.server.state["robust"] == whole.server.state["robust"]
    a, b = (dict(loop.server.student.state_dict()) for loop in (whole, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.server.state["robust"]["parameters"]["1"] < -1
