"""Codistillation of bigram models: expected tables come from the gradients written out in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from fdl.errors import UserError
from fdl.knowledge.aggregation.server_optimizers import SGD
from fdl.knowledge.distillation.token_pools import mixture_objective, require_equal_tokens
from fdl.methods.codistillation import Codistillation
from tests.toy_language import DOWN, SHORT, UP, VOCAB, Bigram, Letters, federation, table

PLAIN = {"optimizer": SGD(lr=1.0, momentum=0.0)}


class Wide(Bigram):
    """A bigram model with more ids than there are tokens, whose first table says something."""

    def __init__(self):
        super().__init__(vocab_size=VOCAB + 2)
        self.table.data[:VOCAB, :VOCAB] = table(1)
        self.table.data[:, VOCAB:] = 9.0  # ids of no token; they must not count


class Third(Bigram):
    def __init__(self):
        super().__init__(table(2))


def run(method, folder, **settings):
    loop = federation(method, folder, **settings)
    loop.runtime.factories |= {"wide": Wide, "third": Third}
    loop.clients[1].architecture = "wide"
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    return loop, {name: module.table.detach().clone() for name, module in loop.method.server_models(loop.server)}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def step(own, teacher, temperature):
    """One step with learning rate 1 on all real tokens of the proxy set: T (q_T - p_T) for each, over their number."""
    tokens = np.concatenate([UP, DOWN, SHORT])
    share = np.bincount(tokens, minlength=VOCAB)[:, None] / len(tokens)
    p = softmax(np.log(teacher) / temperature)
    return own - share * temperature * (softmax(own / temperature) - p)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_pool_learns_from_the_mean_of_the_others_as_they_were(tmp_path, temperature):
    method = Codistillation(alpha=1.0, sharing="disjoint", temperature=temperature, **PLAIN)
    loop, found = run(method, tmp_path)
    first, wide, third = np.zeros((VOCAB, VOCAB)), *(table(i).double().numpy() for i in (1, 2))
    expected = step(first, (softmax(wide) + softmax(third)) / 2, temperature)
    torch.testing.assert_close(found["bigram"], torch.tensor(expected).float())
    expected = step(wide, (softmax(first) + softmax(third)) / 2, temperature)
    torch.testing.assert_close(found["wide"][:VOCAB, :VOCAB], torch.tensor(expected).float())
    assert (found["wide"][:, VOCAB:] == 9).all()  # nobody says anything of ids that are no tokens
    # nobody was heard of the third pool
    torch.testing.assert_close(found["third"], table(2))
    assert torch.equal(loop.server.student.table, found["bigram"])
    assert "distil/wide/loss" in loop.history[0]["metrics"]


def test_periodic_distils_what_the_round_left(tmp_path):
    _, apart = run(Codistillation("periodic", "disjoint", period=2, **PLAIN), tmp_path / "a")
    _, found = run(Codistillation("periodic", "disjoint", period=1, **PLAIN), tmp_path / "b")
    tables = [apart[pool][:VOCAB, :VOCAB].double().numpy() for pool in ("bigram", "wide", "third")]
    expected = step(tables[0], (softmax(tables[1]) + softmax(tables[2])) / 2, 1.0)
    torch.testing.assert_close(found["bigram"], torch.tensor(expected).float())


def test_a_teacher_is_asked_without_gradient_and_as_it_is_evaluated():
    class Moody(Bigram):
        def hidden(self, tokens):
            assert not self.training and not torch.is_grad_enabled()
            return super().hidden(tokens)

    learner, teacher = Bigram(), Moody().eval()
    loss = mixture_objective([teacher], VOCAB)(learner, (torch.tensor([UP]), None))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6) and teacher.table.grad is None


def test_what_is_no_language_model_of_these_tokens_is_refused(tmp_path):
    server = federation(Codistillation(), tmp_path).server
    with pytest.raises(UserError, match="some is no language model of the data's tokens"):
        require_equal_tokens(server, nn.Linear(2, 2), "some")
    small = Bigram(vocab_size=VOCAB - 1)
    with pytest.raises(UserError, match="some has a vocabulary of 4 tokens, the data one of 5"):
        require_equal_tokens(server, small, "some")
    other = Bigram()
    other.tokenizer = Letters()
    with pytest.raises(UserError, match="some is no language model of the data's tokens"):
        require_equal_tokens(server, other, "some")
