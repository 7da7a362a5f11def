"""Links with little bandwidth: what they mean, what the channel chooses for them, and how long transfers take."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fdl.comm.bandwidth import Bandwidth, Link
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.fallback import CodecFallbacks
from fdl.comm.ledger import CodecChoice, Ledger
from fdl.comm.stages.cast import Float16
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import Deflate, Zstd
from fdl.comm.stages.labels import ArgmaxCodec, Simplex
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.sparsify import RandomK, TopK
from fdl.errors import RecipeError, RejectedMessageError, UserError
from fdl.messages import Bundle, Features, Parameters, QuantizedLogWeights, Responses
from fdl.recipe import from_mapping
from fdl.state import checkpoint


def responses(n=400, classes=10, seed=0, **kwargs):
    values = torch.softmax(3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)), dim=1)
    return Responses(values, "probabilities", **kwargs)


def channel(upload=(), download=(), bandwidth="unlimited", clients=None):
    return Channel(Codec(upload), Codec(download), Ledger(), seed=5, bandwidth=Bandwidth(bandwidth, clients))


def sent(link):
    return [row.bytes for row in link.ledger.rows()]


@pytest.mark.parametrize(
    "value, up, down",
    [
        ("unlimited", Link(), Link()),
        ("moderate", Link(9_937_500, 10e6, 0.05), Link(9_937_500, 10e6, 0.05)),
        ("severe", Link(118_400, 128e3, 0.6), Link(118_400, 128e3, 0.6)),
        ({"bytes_per_round": 1000}, Link(1000), Link(1000)),
        ({"bits_per_second": 8000, "latency": 1}, Link(math.inf, 8000, 1), Link(math.inf, 8000, 1)),
        ({"bits_per_second": 8000, "seconds_per_round": 3, "latency": 1}, Link(2000, 8000, 1), Link(2000, 8000, 1)),
        ({"upload": "severe"}, Link(118_400, 128e3, 0.6), Link()),
        ({"upload": {"bytes_per_round": 5}, "download": "unlimited"}, Link(5), Link()),
    ],
)
def test_links(value, up, down):
    bandwidth = Bandwidth("unlimited", {3: value})
    assert (bandwidth.link(3, "up"), bandwidth.link(3, "down"), bandwidth.link(3, "setup")) == (up, down, down)
    assert bandwidth.link(2, "up") == Link()
    assert Bandwidth(value).link(9, "up") == up
    assert bandwidth.limited("up") == (up.bytes_per_round < math.inf)


@pytest.mark.parametrize(
    "channel, problem",
    [
        ({"bandwidth": "sever"}, "channel.bandwidth: expected unlimited, moderate, severe, or figures"),
        ({"bandwidth": {"bytes": 5}}, "channel.bandwidth: expected unlimited"),
        ({"bandwidth": {"bytes_per_round": 0}}, "channel.bandwidth.bytes_per_round: expected a number > 0, got 0"),
        (
            {"bandwidth": {"bits_per_second": True}},
            "channel.bandwidth.bits_per_second: expected a number > 0, got True",
        ),
        ({"bandwidth": {"upload": {"latency": -1}}}, "channel.bandwidth.upload.latency: expected a number ≥ 0, got -1"),
        ({"bandwidth": {"seconds_per_round": 5}}, "channel.bandwidth.bits_per_second: missing"),
        (
            {"bandwidth": {"bits_per_second": 8, "seconds_per_round": 1, "latency": 2}},
            "channel.bandwidth.seconds_per_round: 1 s leave no time to send a byte",
        ),
        ({"clients": {"two": "severe"}}, "channel.clients.two: expected the id of a client"),
        ({"clients": {1: "slow"}}, "channel.clients.1: expected unlimited"),
        ({"clients": {7: "severe"}}, "channel.clients.7: there is no such client: the ids are 0 … 4"),
        ({"clients": ["severe"]}, "channel.clients: expected a mapping"),
    ],
)
def test_recipes_are_checked(channel, problem):
    tree = {"method": "fedavg", "data": "digits", "student": "mlp", "channel": channel}
    with pytest.raises(RecipeError) as caught:
        from_mapping(tree)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]


def test_recipes_give_links_by_name_figure_and_client():
    tree = {"method": "fedavg", "data": "digits", "student": "mlp"}
    recipe = from_mapping(tree)
    assert not Bandwidth(recipe.channel.bandwidth, recipe.channel.clients).limited("up")
    tree["channel"] = {"bandwidth": {"upload": "moderate"}, "clients": {3: "severe"}}
    recipe = from_mapping(tree, ["channel.clients.2.bytes_per_round=500"])
    bandwidth = Bandwidth(recipe.channel.bandwidth, recipe.channel.clients)
    assert bandwidth.link(0, "up").bits_per_second == 10e6
    assert bandwidth.link(0, "down") == Link()
    assert bandwidth.link(3, "down").bits_per_second == 128e3
    assert bandwidth.link(2, "up") == Link(500)


@pytest.mark.parametrize(
    "stages, rungs",
    [
        ([], ["deflate", "float16 → deflate", *(f"quantize/{b}/row → deflate" for b in (8, 4, 2, 1))]),
        ([Quantize(4), Zstd()], ["quantize/2/row → zstd", "quantize/1/row → zstd"]),
        ([Quantize(2, schedule=[(5, 4)]), Zstd()], ["quantize/2/row → zstd", "quantize/1/row → zstd"]),
        ([Float16(), Deflate()], [f"quantize/{b}/row → deflate" for b in (8, 4, 2, 1)]),
        ([Simplex(8), Delta(), Deflate()], [f"{s} → delta → deflate" for s in ("simplex/4", "simplex/2", "one_hot")]),
        ([ArgmaxCodec(), Zstd()], []),
        (
            [TopK(0.1), Quantize(2), Zstd()],
            [f"top_k/{share} → quantize/1/row → zstd" for share in (0.1, 0.025, 0.00625)],
        ),
        (
            [Delta(), Quantize(2, "stochastic"), Deflate()],
            ["delta → quantize/1/row → deflate"]
            + [f"delta → top_k/{share} → quantize/1/row → deflate" for share in (0.1, 0.01)],
        ),
    ],
)
def test_rungs(stages, rungs):
    ladder = CodecFallbacks(Codec(stages))
    assert list(map(repr, ladder.rungs)) == [repr(Codec(stages)), *rungs]
    x = np.random.default_rng(0).dirichlet(np.ones(20), 50).astype(np.float32)
    for rung in ladder.rungs:  # whatever was chosen, the receiver can tell
        data = rung.encode({"x": x}, np.random.default_rng(0))
        assert np.array_equal(ladder.decode(data, 1 << 20)["x"], rung.decode(data, 1 << 20)["x"])
    with pytest.raises(RejectedMessageError, match="another codec chain"):
        ladder.decode(b"\1\2\3", 1 << 20)
    assert [s.fraction for s in CodecFallbacks(Codec([RandomK(0.4)])).rungs[-1].stages if s.name == "random_k"] == [
        0.025
    ]


@pytest.mark.parametrize("budget", [17_000, 9_000, 5_000, 2_000, 700, 150])
def test_the_channel_fits_the_budget_and_notes_its_choice(budget):
    link, message = channel(bandwidth={"bytes_per_round": budget}), responses()
    got = link.upload(message, 3, 1)
    [size] = sent(link)
    assert size <= budget
    if budget == 17_000:
        assert torch.equal(got.values, message.values)
        assert link.ledger.notes == []
        return
    [note] = link.ledger.notes
    assert note[:3] == (1, 3, "up")
    rows = slice(None) if got.rows is None else got.rows
    assert note.share == 1 if got.rows is None else 0 < note.share < 1
    # a rung is only left when it does not fit, and rows are only dropped when no rung does
    rungs = [repr(rung) for rung in CodecFallbacks(Codec()).rungs]
    chosen = rungs.index(note.coding)
    dearer = channel(upload=CodecFallbacks(Codec()).rungs[chosen - 1].stages)
    dearer.upload(message, 3, 1)
    assert sent(dearer)[0] > budget
    assert got.rows is None or chosen == len(rungs) - 1
    assert got.rows is None or size >= 0.6 * budget
    assert (got.values - message.values[rows]).abs().max() < (0.01 if "float16" in note.coding else 1)


def test_without_a_budget_nothing_is_chosen():
    free, slow = channel([Quantize(8)]), channel([Quantize(8)], bandwidth={"bits_per_second": 100})
    assert torch.equal(free.upload(responses(), 0, 1).values, slow.upload(responses(), 0, 1).values)
    assert sent(free) == sent(slow)
    assert slow.ledger.notes == []


def test_the_surest_rows_are_kept():
    message = responses(100, 10)
    for given in (message, Responses((message.values + 1e-9).log(), "logits")):
        kept = given.truncated(0.3)
        best = message.values.amax(dim=1)
        assert len(kept.rows) == 30
        assert best[kept.rows].min() >= best.sort(descending=True).values[29]
        assert torch.equal(kept.rows, kept.rows.sort().values)
        assert torch.equal(kept.values, given.values[kept.rows])
    weights = torch.linspace(0, -5, 100)
    rows = torch.arange(100) * 3
    told = responses(100, 10, rows=rows, confidence=QuantizedLogWeights.quantize(weights), samples=7).truncated(0.25)
    assert torch.equal(told.rows, rows[:25])
    assert torch.allclose(told.confidence.values(), weights[:25], atol=0.02)
    assert told.samples == 7
    assert Responses(torch.randn(100, 4), "embeddings").truncated(0.1).rows.tolist() == list(range(0, 100, 10))
    assert message.truncated(0.001) is None
    assert Parameters({"w": torch.ones(5)}).truncated(0.5) is None
    told.validate()


def test_features_stay_with_their_answers():
    features = Features({"a": torch.randn(400, 30)})
    message = Bundle((responses(), features, Parameters({"w": torch.ones(3)}, 2)))
    link = channel(bandwidth={"bytes_per_round": 900})
    got = link.upload(message, 0, 1)
    answers, kept, rest = got.parts
    assert 0 < len(answers.rows) < 400
    assert torch.equal(answers.rows, kept.rows)
    assert torch.equal(rest.tensors["w"], torch.ones(3))
    assert sum(sent(link)) <= 900
    assert len(sent(link)) == 3
    assert Bundle((features,)).truncated(0.5) is None


def test_what_does_not_fit_is_refused_by_name_and_not_sent():
    link = channel(bandwidth={"bytes_per_round": 60}, clients={1: "unlimited"})
    with pytest.raises(
        RejectedMessageError, match=r"too large for the link: responses take \d+ bytes at least \(quantize/1/row"
    ):
        link.upload(responses(), 0, 1)
    with pytest.raises(RejectedMessageError, match=r"parameters take .* 60 of 60 bytes are left in this round"):
        link.upload(Parameters({"w": torch.randn(100, 100)}), 0, 1)
    assert sent(link) == []
    assert link.upload(responses(), 1, 1) is not None
    assert link.ledger.notes == []


def test_a_budget_is_for_all_messages_of_a_round_and_direction():
    link = channel([Quantize(8)], bandwidth={"bytes_per_round": 7000})
    for round in (1, 2):
        first, second = link.upload(responses(), 0, round), link.upload(responses(seed=1), 0, round)
        link.download(responses(), 0, round)
        assert first.rows is None
        assert second is not None
        up = [row.bytes for row in link.ledger.rows() if row.round == round and row.direction == "up"]
        assert sum(up) <= 7000
    assert {note.round for note in link.ledger.notes if note.direction == "up"} == {1, 2}
    assert {note.direction for note in link.ledger.notes} == {"up", "down"}


def test_downloads_are_encoded_once_for_each_coding():
    link = channel(clients={1: {"bytes_per_round": 3000}, 2: {"bytes_per_round": 3000}})
    message = responses()
    got = [link.download(message, client, 1) for client in (0, 1, 2, 3)]
    assert got[0] is got[3]
    assert got[1] is got[2]
    assert got[0] is not got[1]
    assert torch.equal(got[0].values, message.values)
    assert [note.client for note in link.ledger.notes] == [1, 2]


@pytest.mark.parametrize(
    "upload",
    [[Delta(), Quantize(8), Deflate()], [TopK(0.5, error_feedback=True)], [Simplex(8), Delta()]],
    ids=lambda stages: repr(Codec(stages)),
)
def test_choices_and_memory_go_together_and_survive_a_restart(upload):
    budget = {"bytes_per_round": 1500}
    straight, resumed = channel(upload, bandwidth=budget), channel(upload, bandwidth=budget)
    for round in range(1, 7):
        message = responses(seed=round // 3)
        if upload[0].name == "top_k":  # sums may be negative
            message = replace(message, form="logits")
        a, b = straight.upload(message, 2, round), resumed.upload(message, 2, round)
        assert torch.equal(a.values, b.values)
        state = checkpoint.from_bytes(
            checkpoint.to_bytes({"c": resumed.state_dict(), "l": resumed.ledger.state_dict()})
        )
        resumed = channel(upload, bandwidth=budget)
        resumed.load_state_dict(state["c"])
        resumed.ledger.load_state_dict(state["l"])
        assert resumed.ledger.notes == straight.ledger.notes
    assert sent(straight) == sent(resumed)
    assert all(size <= 1500 for size in sent(straight))
    assert straight.ledger.notes


def test_transfer_takes_latency_and_bytes_over_rate_of_the_slowest_client():
    link = channel(bandwidth={"bits_per_second": 8000, "latency": 0.5}, clients={1: {"bits_per_second": 800}})
    link.setup_cost("proxy", 2000, 0)
    for client in (0, 1, 2):
        link.download(responses(20), client, 1)
    link.upload(responses(20), 0, 1)
    link.upload(responses(20), 1, 2)
    by = {(row.round, row.client, row.direction): row.bytes for row in link.ledger.rows()}
    assert link.ledger.transfer_seconds(0) == 0.5 + 2000 * 8 / 8000
    slowest = by[1, 1, "down"] * 8 / 800
    assert slowest > 1 + (by[1, 0, "down"] + by[1, 0, "up"]) * 8 / 8000
    assert link.ledger.transfer_seconds(1) == pytest.approx(slowest)
    assert link.ledger.transfer_seconds(2) == pytest.approx(by[2, 1, "up"] * 8 / 800)
    assert link.ledger.transfer_seconds(3) == 0
    again = channel(bandwidth={"bits_per_second": 8000, "latency": 0.5}, clients={1: {"bits_per_second": 800}})
    again.ledger.load_state_dict(link.ledger.state_dict())
    assert again.ledger.transfer_seconds(1) == link.ledger.transfer_seconds(1)
    assert Ledger().transfer_seconds(1) == channel().ledger.transfer_seconds(1) == 0


def test_notes_survive_a_checkpoint():
    ledger, copy = Ledger(), Ledger()
    ledger.note(3, 1, "up", "quantize/4/row", 0.5)
    copy.load_state_dict(checkpoint.from_bytes(checkpoint.to_bytes(ledger.state_dict())))
    assert copy.notes == [CodecChoice(3, 1, "up", "quantize/4/row", 0.5)]


def test_bad_links_in_code():
    with pytest.raises(UserError, match="bandwidth: expected unlimited, moderate, severe"):
        Bandwidth(None)
