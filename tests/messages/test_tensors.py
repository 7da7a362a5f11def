"""The message for tensors of any algorithm, and how other packages' message types become known."""

import numpy as np
import pytest
import torch

from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import Deflate
from fdl.comm.wire import pack, unpack
from fdl.errors import RejectedMessageError, UserError
from fdl.federation.message_transport import from_tensors, to_tensors
from fdl.messages import EXTENSION_CODES, Message, Parameters, TensorMessage, message_type, require_message
from fdl.messages.base import _TYPES


def message(scale=1.0, **more):
    groups = {
        "weights": {"layer/0.weight": scale * torch.randn(20, 30), "steps": torch.tensor(3)},
        "control": {"layer/0.weight": torch.randn(20, 30).bfloat16()},
        "unused": {},
    }
    return TensorMessage(groups, **{"samples": 7, "kind": "scaffold", "metadata": {"lr": 0.1, "of": ["a", 1]}} | more)


def same(a, b):
    assert (a.kind, a.samples, dict(a.metadata)) == (b.kind, b.samples, dict(b.metadata))
    assert {group: list(tensors) for group, tensors in a.groups.items()} == {
        group: list(tensors) for group, tensors in b.groups.items()
    }
    for group, tensors in a.groups.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == b.groups[group][name].dtype
            assert torch.equal(tensor, b.groups[group][name])
    return True


def test_it_crosses_the_wire_and_the_ranks_to_the_bit():
    sent = message()
    assert same(sent, unpack(pack(sent, Codec(), client=3, round=2), Codec(), limit=1 << 20, client=3, round=2))
    assert same(sent, from_tensors(to_tensors(sent)))
    for small in (TensorMessage({}), TensorMessage({"g": {"x": torch.ones(2)}})):
        assert same(small, from_tensors(to_tensors(small)))


def test_it_is_counted_under_its_kind_and_delta_coded_per_kind():
    ledger, chain = Ledger(), Codec([Delta(), Deflate()])
    channel = Channel(chain, Codec(), ledger, seed=0)
    steady, other = message(), message(kind="other")
    sizes = []
    for round in (1, 2):
        got = channel.upload(steady, 0, round)
        channel.upload(other, 0, round)
        for group in ("weights", "control"):
            want = steady.groups[group]["layer/0.weight"].float()
            assert (got.groups[group]["layer/0.weight"].float() - want).abs().max() < 1e-6
        assert got.groups["weights"]["steps"] == 3
        sizes.append({row.kind: row.bytes for row in ledger.of_round(round)})
    assert set(sizes[0]) == {"scaffold", "other"}
    assert sizes[1]["scaffold"] < sizes[0]["scaffold"]  # nothing has changed since
    assert {key.split("/", 2)[2] for key in channel.state_dict()} == {"scaffold", "other"}


@pytest.mark.parametrize(
    ("fault", "made"),
    [
        ("lower-case letters", lambda: message(kind="Scaffold 1")),
        ("is that of Parameters", lambda: message(kind="parameters")),
        ("cannot name a group", lambda: TensorMessage({"a/b": {}})),
        ("cannot name a group", lambda: TensorMessage({"": {"x": torch.ones(1)}})),
        ("257 groups", lambda: TensorMessage({str(i): {} for i in range(257)})),
        ("not JSON compliant", lambda: message(metadata={"x": float("nan")})),
        ("not JSON serializable", lambda: message(metadata={"x": torch.ones(1)})),
        ("at most 4096", lambda: message(metadata={"x": "y" * 5000})),
        ("holds a float 'x', not a tensor", lambda: TensorMessage({"g": {"x": 1.0}})),
    ],
)
def test_what_cannot_be_sent_is_an_error_of_the_senders(fault, made):
    with pytest.raises(UserError, match=fault):
        pack(made(), Codec(), client=0, round=1)


@pytest.mark.parametrize(
    ("reason", "fields", "meta"),
    [
        ("'kind' must be sent as str", {}, {}),
        ("belongs to no group", {"x": np.ones(2)}, {"kind": "k"}),
        ("cannot name a group", {"/x": np.ones(2)}, {"kind": "k"}),
        ("not finite", {"g/x": np.array([np.nan])}, {"kind": "k"}),
        ("negative", {}, {"kind": "k", "samples": -1}),
        ("is that of Responses", {}, {"kind": "responses"}),
        ("lower-case letters", {}, {"kind": "k" * 33}),
        ("not valid JSON", {}, {"kind": "k", "metadata": "[" * 4000}),
        ("not valid JSON", {}, {"kind": "k", "metadata": '{"x": NaN}'}),
        ("not a JSON object", {}, {"kind": "k", "metadata": "[]"}),
        ("at most 4096", {}, {"kind": "k", "metadata": '"' + "x" * 5000 + '"'}),
        ("said to be empty", {"g/x": np.ones(2)}, {"kind": "k", "empty": "g"}),
        ("cannot name a group|257 groups", {}, {"kind": "k", "empty": "/".join(map(str, range(999)))}),
        ("unexpected content 'more'", {}, {"kind": "k", "more": 1}),
    ],
)
def test_what_cannot_come_from_a_sender_is_rejected(reason, fields, meta):
    with pytest.raises(RejectedMessageError, match=reason):
        TensorMessage.build(fields, meta).validate()


def test_types_of_other_packages_have_codes_of_their_own():
    def define(name="Foreign", **attributes):
        return type(name, (Message,), {"__module__": "hospital.messages", **attributes})

    try:
        first = define(kind="foreign", code=EXTENSION_CODES[0])
        assert message_type(EXTENSION_CODES[0]) is first
        again = define(kind="foreign", code=EXTENSION_CODES[1])  # a notebook's cell, edited and run again
        assert message_type(EXTENSION_CODES[1]) is again
        with pytest.raises(RejectedMessageError, match="unknown"):
            message_type(EXTENSION_CODES[0])
        with pytest.raises(
            TypeError, match=r"Second and hospital.messages.Foreign have the same wire code 129; 128 is free"
        ):
            define("Second", kind="second", code=EXTENSION_CODES[1])
        with pytest.raises(TypeError, match="have the same kind 'foreign'"):
            define("Second", kind="foreign", code=EXTENSION_CODES[5])
        with pytest.raises(
            TypeError, match=r"has wire code 77; codes 128 to 255 are for packages other than fdl, 128 is free"
        ):
            define("Second", kind="second", code=77)
        with pytest.raises(TypeError, match="needs a literal `kind`"):
            define("Second", code=200)
    finally:
        for code in EXTENSION_CODES:
            _TYPES.pop(code, None)


def test_what_is_no_message_is_named_with_its_type():
    for fine in (None, Parameters({}), TensorMessage({})):
        require_message(fine, "method M: local_update of client 3")
    with pytest.raises(UserError, match="method M: local_update of client 3 returned a dict, which is not a Message"):
        require_message({}, "method M: local_update of client 3")
