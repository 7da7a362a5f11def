"""Terms of the student's loss, soft labels and ensembles: closed forms."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.ensembles import GroupEnsemble, MeanAndEnsemble
from fdl.knowledge.aggregation.means import AggregatedResponses, ParameterMean
from fdl.knowledge.distillation.feature_term import FeatureTerm
from fdl.knowledge.distillation.feedback import Feedback, SoftLabels
from fdl.knowledge.distillation.initialization import Initialization
from fdl.knowledge.distillation.prototype_term import PrototypeTerm
from fdl.knowledge.distillation.terms import (
    ParticipantAdapter,
    ResponseTerm,
    StudentOutput,
    StudentWidths,
    columns_of_batch,
    used_columns,
)
from fdl.knowledge.transfer.features import FeatureKnowledge, FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypeKnowledge, PrototypeTransfer
from fdl.messages import Parameters
from fdl.modules.output import Output


def student_output(logits=None, embedding=None, targets=None):
    embedding = torch.zeros(2, 2) if embedding is None else embedding
    logits = torch.zeros(len(embedding), 2) if logits is None else logits
    return StudentOutput(Output(logits, embedding, {}), ["embedding"], targets)


def aggregated(values, coverage):
    return AggregatedResponses.of(values, "probabilities", coverage, torch.zeros(len(values)))


def test_the_response_term_is_the_divergence_from_the_targets():
    targets = torch.tensor([[0.75, 0.25]])
    term = ResponseTerm("kl", 1.0, 0.5)
    loss = term.loss(student_output(torch.zeros(1, 2), torch.zeros(1, 2), targets), term.columns(), None, None)
    expected = (targets * (targets / 0.5).log()).sum()
    torch.testing.assert_close(loss.value, expected)
    assert loss.adapter is None and term.weight == 0.5


def test_unused_columns_are_skipped_and_restored_as_none():
    features = FeatureKnowledge(torch.tensor([[1.0], [2.0]]), torch.tensor([True, False]))
    columns = FeatureTerm(FeatureTransfer(loss="mse"), features, torch.ones(2, 1), None).columns()
    tensors = used_columns(columns)
    assert len(tensors) == 2 and columns.shares is None and columns.probabilities is None
    restored = columns_of_batch((type(columns), tuple(column is not None for column in columns)), iter(tensors))
    assert restored.shares is None and torch.equal(restored.features, columns.features)


def test_rows_without_features_do_not_count():
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    known = torch.tensor([True, True, False])
    term = FeatureTerm(FeatureTransfer(loss="mse"), FeatureKnowledge(values, known), torch.ones(3, 1), None)
    assert term.head(StudentWidths(2, 2)).out_features == 2
    student = student_output(embedding=torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]]))
    loss = term.loss(student, term.columns(), nn.Identity(), None)
    torch.testing.assert_close(loss.value, torch.tensor((1.0 + 4.0) / 4))
    single = term.columns()._replace(known=torch.tensor([True, False, False]))
    assert float(term.loss(student, single, nn.Identity(), None).value) == 0


def test_rows_of_the_proxy_set_select_features():
    knowledge = FeatureKnowledge(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([True, True, True]))
    columns = FeatureTerm(FeatureTransfer(loss="mse"), knowledge, torch.ones(2, 1), torch.tensor([2, 0])).columns()
    assert columns.features.flatten().tolist() == [3.0, 1.0] and columns.known is None


def test_adapted_features_are_weighted_by_shares_and_probe_the_classes():
    values, shares = torch.tensor([[[1.0], [3.0]], [[2.0], [6.0]]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    knowledge = FeatureKnowledge(values, torch.tensor([True, True]), shares, torch.tensor([0, 1]))
    term = FeatureTerm(FeatureTransfer(loss="mse"), knowledge, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None)
    adapter = ParticipantAdapter("film", 2, 1, 1, 2)
    adapter.adapter = SimpleIdentity()
    nn.init.zeros_(adapter.probe.weight)
    nn.init.zeros_(adapter.probe.bias)
    student = student_output(embedding=torch.zeros(2, 1, requires_grad=True))
    loss = term.loss(student, term.columns(), None, adapter)
    assert term.adapted and term.head(StudentWidths(1, 1)) is None
    torch.testing.assert_close(loss.value, torch.tensor((2.0**2 + 2.0**2) / 2))
    torch.testing.assert_close(loss.adapter, torch.tensor(2.0).log())


class SimpleIdentity(nn.Module):
    def forward(self, features, participants):
        return features


def test_the_prototype_term_compares_with_the_assigned_centroids():
    knowledge = PrototypeKnowledge(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.ones(2))
    transfer = PrototypeTransfer(loss="mse", weight=0.3)
    public = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    term = PrototypeTerm(transfer, knowledge, torch.eye(2), public)
    assert torch.equal(term.columns().assignment, torch.eye(2)) and term.weight == 0.3 and not term.adapted
    assert not term.state_dict()  # constants are not saved
    exact = term.loss(student_output(embedding=public), term.columns(), nn.Identity(), None)
    swapped = term.loss(student_output(embedding=public.flip(0)), term.columns(), nn.Identity(), None)
    assert float(exact.value) == 0 < float(swapped.value)


def test_soft_labels_leave_out_rows_without_predictions():
    labels = SoftLabels("kl", "probabilities", None, "power", None)
    fresh = labels.of(aggregated(torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([1, 0])))
    assert fresh.rows.tolist() == [0] and torch.equal(fresh.values, torch.tensor([[0.8, 0.2]]))
    assert labels.of(aggregated(torch.eye(2), torch.tensor([1, 3]))).rows is None


def test_soft_labels_are_sharpened_by_a_power():
    labels = SoftLabels("kl", "probabilities", 2.0, "power", None)
    fresh = labels.of(aggregated(torch.tensor([[0.8, 0.2]]), torch.tensor([1])))
    torch.testing.assert_close(fresh.values, torch.tensor([[0.64, 0.04]]) / 0.68)


def test_soft_labels_and_feedback_check_their_settings():
    with pytest.raises(UserError, match="sharpen must be > 0"):
        SoftLabels("kl", "probabilities", 0.0, "power", None)
    with pytest.raises(UserError, match="compares logits"):
        SoftLabels("mse", "probabilities", None, "power", None)
    labels = SoftLabels("kl", "probabilities", None, "power", None)
    with pytest.raises(UserError, match="feedback is none"):
        Feedback("none", labels, SimpleNamespace(check=lambda prototypes: None), None, False)
    assert not Feedback("aggregate", labels, None, None, False).needs_last_uploads


def test_pretraining_costs_the_labelled_public_samples_once():
    class Public:
        nbytes = 70

        def __len__(self):
            return 10

    server = SimpleNamespace(public=Public(), num_classes=300)
    assert Initialization(2, False).setup_bytes(server) == {"public": 70 + 2 * 10}
    assert Initialization(0, True).setup_bytes(server) == {}
    with pytest.raises(UserError, match="pretrain"):
        Initialization(-1, False)


class Proxy:
    """One row per proxy sample, and its labels."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)


class Server:
    """Predicts with linear models, without a federation."""

    num_classes = 2

    def __init__(self):
        self.proxy = Proxy(torch.eye(2), None)
        self.validation = Proxy(torch.eye(2), torch.tensor([0, 1]))
        self.student = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.student.weight)
        self.runtime = self

    @contextmanager
    def borrow(self, group, tensors=None):
        module = nn.Linear(2, 2, bias=False)
        if tensors is not None:
            module.load_state_dict(dict(tensors))
        yield module

    def predict(self, module, samples):
        return module(samples.inputs).detach()


def weights(matrix, samples=1):
    return Parameters({"weight": torch.tensor(matrix)}, samples)


def test_mean_and_ensemble_average_weights_and_probabilities():
    server = Server()
    both = MeanAndEnsemble(ParameterMean(server.student.state_dict()), server, temperature=2.0)
    assert both.result() is None
    both.add(weights([[2.0, 0.0], [0.0, 2.0]], samples=3), 0)
    both.add(weights([[0.0, 0.0], [0.0, 0.0]], samples=1), 1)
    mean, probabilities = both.result()
    torch.testing.assert_close(mean["weight"], torch.tensor([[1.5, 0.0], [0.0, 1.5]]))
    p = float(torch.softmax(torch.tensor([1.0, 0.0]), 0)[0])  # the first client's, at temperature 2
    torch.testing.assert_close(probabilities[0], torch.tensor([(p + 0.5 + 0.5) / 3, (1 - p + 0.5 + 0.5) / 3]))
    with pytest.raises(RejectedMessageError):
        both.add(weights([[float("inf"), 0.0], [0.0, 0.0]]), 2)
    assert both.models == 2


def test_group_ensembles_drop_clients_at_chance():
    server = Server()
    like = server.student.state_dict()
    ensemble = GroupEnsemble(server, lambda client: "small", lambda group: like, True, False, None)
    ensemble.add(weights([[1.0, 0.0], [0.0, 1.0]]), 0)
    ensemble.add(weights([[0.0, 1.0], [1.0, 0.0]]), 1)  # wrong on every validation sample
    averages, logits, teachers = ensemble.result()
    assert teachers == 1 and torch.equal(logits, torch.eye(2))
    torch.testing.assert_close(averages["small"]["weight"], torch.full((2, 2), 0.5))


def test_group_ensembles_keep_dropped_clients_where_no_other_is_left():
    server = Server()
    like = server.student.state_dict()
    ensemble = GroupEnsemble(server, lambda client: "small", lambda group: like, True, False, None)
    ensemble.add(weights([[0.0, 1.0], [1.0, 0.0]]), 0)
    _, logits, averaged = ensemble.result()
    assert averaged == 1 and torch.equal(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
