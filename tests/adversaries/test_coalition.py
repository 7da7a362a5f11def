"""Adversaries in a run: who, from when, and that nobody else is touched."""

import pytest
import torch

from fdl.adversaries.answers import FixedClass, LeastLikely, RandomClass
from fdl.adversaries.base import AttackContext
from fdl.adversaries.coalition import Adversaries, AdversaryGroup, assign_adversaries, form_group
from fdl.adversaries.data import LabelFlip
from fdl.adversaries.free_riders import FreeRider, Sybil
from fdl.adversaries.parameters import ALittleIsEnough, GaussianNoise, SignFlip
from fdl.errors import UserError
from fdl.methods.fedavg import FedAvg
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.methods.fedproto import FedProto
from fdl.methods.single_site import SingleSite
from fdl.recipe.config import AdversaryConfig
from tests.adversaries.contexts import Player, answers, flat, weights
from tests.test_loop import Crash, outcome
from tests.toy import federation, weight


def attackers(loop, adversary, clients=(1,), start=1):
    players = [loop.clients[id] for id in clients]
    loop.adversaries = Adversaries([form_group(adversary, start, players, loop.method)])
    return loop


@pytest.mark.parametrize("method", [FedAvg, FederatedDistillation])
def test_before_they_start_adversaries_change_nothing(tmp_path, method):
    settings = {"rounds": 3, "local_training": 2}
    honest = federation(method(), tmp_path / "honest", **settings)
    honest.run()
    for i, adversary in enumerate((LabelFlip(), SignFlip(), ALittleIsEnough())):
        loop = attackers(federation(method(), tmp_path / f"late-{i}", **settings), adversary, start=4)
        loop.run()
        assert outcome(loop) == outcome(honest)
        early = attackers(federation(method(), tmp_path / f"early-{i}", **settings), adversary, start=3)
        early.run()
        if not isinstance(adversary, ALittleIsEnough):  # of one honest client it repeats what that says
            assert early.history[-1] != honest.history[-1]
        assert [r["metrics"] for r in early.history[:2]] == [r["metrics"] for r in honest.history[:2]]


def test_the_fall_of_a_federated_average_is_that_of_the_formula(tmp_path):
    honest = federation(FedAvg(), tmp_path / "honest")
    honest.run()
    # from zero, one step: client 0 ([.5, 0], [-.5, 0]), client 1 ([0, -.5], [0, .5]) with three samples of four
    loop = attackers(federation(FedAvg(), tmp_path / "flipped"), SignFlip())
    loop.run()
    torch.testing.assert_close(weight(honest.server.student), torch.tensor([[0.125, -0.375], [-0.125, 0.375]]))
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[0.125, 0.375], [-0.125, -0.375]]))


def test_a_free_rider_pulls_towards_what_was(tmp_path):
    loop = attackers(federation(FedAvg(), tmp_path), FreeRider())
    loop.run()
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[0.125, 0.0], [-0.125, 0.0]]))


def test_flipped_labels_are_learnt_as_such(tmp_path):
    loop = attackers(federation(FedAvg(), tmp_path), LabelFlip())
    loop.run()  # client 1 says that its (0, 1) are of class 0
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[0.125, 0.375], [-0.125, -0.375]]))
    assert loop.clients[1].train.labels.tolist() == [0, 0, 0] and loop.clients[0].train.labels.tolist() == [0]


CASES = [
    (FedAvg, LabelFlip()),
    (FedAvg, GaussianNoise(0.3)),
    (FedAvg, FreeRider(0.1)),
    (FedAvg, Sybil(SignFlip())),
    (FederatedDistillation, RandomClass()),
    (FederatedDistillation, FreeRider(0.5)),
    (FederatedDistillation, LeastLikely()),
    (FederatedDistillation, Sybil(LabelFlip())),
]


@pytest.mark.parametrize(("method", "adversary"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_a_resumed_run_equals_the_straight_one(tmp_path, method, adversary):
    settings = {"rounds": 3, "local_training": 2}
    straight = attackers(federation(method(), tmp_path / "straight", **settings), adversary, start=2)
    straight.run()
    crashed = attackers(federation(method(), tmp_path / "x", callbacks=[Crash(3)], **settings), adversary, start=2)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = attackers(federation(method(), tmp_path / "x", **settings), adversary, start=2)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)
    honest = federation(method(), tmp_path / "honest", **settings)
    honest.run()
    assert outcome(honest) != outcome(straight)


def test_what_is_seen_of_a_round():
    seen: dict[int, AttackContext] = {}

    class Spy(LeastLikely):
        def attack(self, context):
            seen[context.client.id] = context
            return context.own

    players = {i: Player(i) for i in range(5)}
    uploads = {i: answers([[0.1 * i, 1 - 0.1 * i]]) for i in range(5)}
    both = Adversaries(
        [
            AdversaryGroup(Spy(), {i: players[i] for i in (3, 4)}),
            AdversaryGroup(FixedClass(), {0: players[0]}),
            AdversaryGroup(FixedClass(), {1: players[1]}, start=9),
        ]
    )
    turns = [(players[i], uploads[i] if i % 2 else None) for i in (4, 0, 2, 1, 3)]
    pairs = [(client, uploads[client.id]) for client, _ in both.record_downloads(1, turns)]
    sent = list(both.corrupt_uploads(1, pairs))
    assert [client.id for client, _ in sent] == [4, 0, 2, 1, 3]
    assert [m.values.tolist() for m in seen[3].honest] == [uploads[i].values.tolist() for i in (1, 2)]
    assert (seen[3].num_uploads, seen[3].num_attackers, list(seen[3].allies)) == (5, 3, [3, 4])
    assert seen[3].download is uploads[3] and seen[4].download is None
    assert sent[1][1].values.tolist() == [[1.0, 0.0]]
    # as on two ranks: each holds some of the clients, and gets all uploads
    rest = {client.id: upload for client, upload in pairs[2:]}
    part = list(both.corrupt_uploads(1, pairs[:2], lambda own: {**own, **rest}))
    assert [m.values.tolist() for _, m in part] == [m.values.tolist() for _, m in sent[:2]]
    assert len(seen[4].honest) == 2 and both.needs_all_uploads(1) and not Adversaries().needs_all_uploads(1)


def test_who_sees_nobody_does_not_hold_the_round():
    players = [Player(i) for i in range(3)]
    asked = []

    def turns():
        for player in players:
            asked.append(player.id)
            yield player, weights(1.0, 2.0, 3.0)

    adversaries = Adversaries([AdversaryGroup(SignFlip(), {1: players[1]})])
    stream = adversaries.corrupt_uploads(1, turns())
    next(stream)
    assert asked == [0]
    assert flat(next(stream)[1]) == [-1.0, -2.0, -3.0]
    held = Adversaries([AdversaryGroup(Sybil(), {1: players[1]})]).corrupt_uploads(1, turns())
    next(held)
    assert asked == [0, 1, 0, 1, 2]


def test_sybils_on_two_ranks_send_the_same():
    players = {i: Player(i) for i in range(3)}
    uploads = {i: weights(*(1.0 * i + j for j in range(3))) for i in range(3)}
    adversaries = Adversaries([AdversaryGroup(Sybil(GaussianNoise()), {i: players[i] for i in (0, 2)})])
    whole = [flat(m) for _, m in adversaries.corrupt_uploads(1, [(players[i], uploads[i]) for i in range(3)])]
    apart = [
        flat(m)
        for i in range(3)
        for _, m in adversaries.corrupt_uploads(1, [(players[i], uploads[i])], lambda _: uploads)
    ]
    assert whole == apart and whole[0] == whole[2] != whole[1]


def test_larger_shares_have_the_clients_of_smaller_ones():
    entries = ([AdversaryConfig("least_likely", fraction=share)] for share in (0.2, 0.4))
    few, some = (set(assign_adversaries(entry, 20, seed=3)[0]) for entry in entries)
    assert few < some and (len(few), len(some)) == (4, 8)
    assert assign_adversaries([AdversaryConfig("least_likely", fraction=0.2)], 20, 4)[0] != sorted(few)
    named, drawn, more = assign_adversaries(
        [
            AdversaryConfig("least_likely", clients=[7, 2]),
            AdversaryConfig("class_confusion", fraction=0.5),
            AdversaryConfig("worst_replay", fraction=0.3),
        ],
        10,
        seed=0,
    )
    assert named == [2, 7] and (len(drawn), len(more)) == (5, 3)
    assert sorted(named + drawn + more) == list(range(10))


def test_what_cannot_work_is_refused_before_the_run(tmp_path):
    client = Player()
    with pytest.raises(UserError, match="least_likely attacks responses, and clients of method fedavg send parameters"):
        form_group(LeastLikely(), 1, [client], FedAvg())
    with pytest.raises(UserError, match=r"sign_flip attacks parameters and responses, and .* fedproto send prototypes"):
        form_group(SignFlip(), 1, [client], FedProto())
    form_group(LabelFlip(), 1, [client], FedProto())
    with pytest.raises(UserError, match="single_site send nothing"):
        form_group(LabelFlip(), 1, [client], SingleSite())
    with pytest.raises(UserError, match="label_flip is for classification data; these are for language"):
        form_group(LabelFlip(), 1, [Player(task="language")], FedAvg())


def test_an_upload_that_cannot_be_attacked_is_the_users_mistake(tmp_path):
    loop = federation(FedAvg(), tmp_path)
    loop.adversaries = Adversaries([AdversaryGroup(RandomClass(), {1: loop.clients[1]})])
    with pytest.raises(UserError, match="client 1 in round 1: random_class attacks responses"):
        loop.run()


def test_a_run_without_adversaries_is_as_before(tmp_path):
    loop, plain = (federation(FederatedDistillation(), tmp_path / name, rounds=2) for name in "ab")

    class Passing:
        def needs_all_uploads(self, round):
            return False

        def record_downloads(self, round, turns):
            return turns

        def corrupt_uploads(self, round, pairs, *_):
            return pairs

    plain.adversaries = Passing()
    loop.run()
    plain.run()
    assert outcome(loop) == outcome(plain)
