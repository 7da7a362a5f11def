"""Features, prototypes, upload status and bundles: on the wire and back, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.errors import RejectedMessageError
from fdl.messages import Bundle, Features, Prototypes, QuantizedLogWeights, Responses, Scores, UploadStatus, parts_of

SURE = QuantizedLogWeights.quantize(torch.tensor([0.0, -1.0, 2.0]))
ROWS = torch.tensor([0, 2, 300])
FEATURES = Features({"trunk.0": torch.randn(3, 4), "embedding": torch.randn(3, 2)}, ROWS, SURE)
PROTOTYPES = Prototypes(torch.randn(3, 5), torch.tensor([0, 0, 9]), torch.tensor([1, 70000, 3]), SURE)


def channel():
    return Channel(Codec(), Codec(), Ledger(), 0)


def test_features_cross_the_wire():
    got = channel().upload(FEATURES, 1, 1)
    assert list(got.layers) == ["trunk.0", "embedding"]
    assert all(torch.equal(got.layers[name], values) for name, values in FEATURES.layers.items())
    assert torch.equal(got.rows, ROWS) and torch.equal(got.confidence.values(), SURE.values())
    assert FEATURES.fields()["rows"].dtype == np.uint16
    plain = channel().upload(Features({"a": torch.randn(3, 1)}), 1, 1)
    assert plain.rows is None and plain.confidence is None


def test_prototypes_cross_the_wire():
    got = channel().upload(PROTOTYPES, 1, 1)
    for name in ("values", "labels", "counts"):
        assert torch.equal(getattr(got, name), getattr(PROTOTYPES, name))
    concepts = dataclasses.replace(PROTOTYPES, labels=torch.tensor([-1, -1, -1]), confidence=None)
    assert channel().upload(concepts, 1, 1).labels.tolist() == [-1, -1, -1]
    none = torch.zeros(0, dtype=torch.int64)
    assert len(channel().upload(Prototypes(torch.zeros(0, 5), none, none), 1, 1).values) == 0


def test_scores_cross_the_wire_in_a_byte_a_row():
    link = channel()
    got = link.upload(Scores(QuantizedLogWeights.quantize(torch.arange(200.0))), 1, 1)
    torch.testing.assert_close(got.confidence.values(), torch.arange(200.0), atol=199 / 255 / 2 + 1e-3, rtol=0)
    assert link.ledger.totals()["upload_bytes"] < 200 + 64


@pytest.mark.parametrize("requests_upload", [True, False])
def test_upload_status_take_a_few_bytes(requests_upload):
    link = channel()
    got = link.upload(UploadStatus(7, requests_upload), 1, 1)
    assert (got.round, got.requests_upload) == (7, requests_upload)
    assert link.ledger.totals()["upload_bytes"] < 64


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Features({}), "without a layer"),
        (Features({"a": torch.randn(3)}), "matrix"),
        (Features({"a": torch.zeros(3, 0)}), "matrix"),
        (Features({"a": torch.ones(3, 2, dtype=torch.int64)}), "matrix"),
        (Features({"a": torch.ones(3, 2), "b": torch.ones(4, 2)}), "4 rows, another has 3"),
        (Features({"a": torch.tensor([[1.0], [float("nan")]])}), "not finite"),
        (Features({"a": torch.ones(3, 2)}, torch.tensor([0, 1])), "as many int64 rows"),
        (Features({"a": torch.ones(1, 2)}, torch.tensor([-1])), "negative"),
        (Features({"a": torch.ones(2, 2)}, None, SURE), "3 confidences"),
        (dataclasses.replace(PROTOTYPES, values=torch.randn(3)), "matrix"),
        (dataclasses.replace(PROTOTYPES, values=torch.full((3, 5), torch.inf)), "not finite"),
        (dataclasses.replace(PROTOTYPES, labels=torch.tensor([0, 1])), "labels"),
        (dataclasses.replace(PROTOTYPES, labels=torch.tensor([0, 1, -2])), "at least -1"),
        (dataclasses.replace(PROTOTYPES, counts=torch.tensor([0, 1, 2])), "at least 1"),
        (dataclasses.replace(PROTOTYPES, confidence=QuantizedLogWeights.quantize(torch.zeros(2))), "2 confidences"),
        (UploadStatus(-1), "negative"),
    ],
)
def test_what_makes_no_sense_is_refused(message, reason):
    with pytest.raises(RejectedMessageError, match=reason):
        channel().upload(message, 1, 1)


@pytest.mark.parametrize(
    ("kind", "fields", "meta"),
    [
        (Features, {"values": np.zeros((2, 2), np.float32)}, {}),
        (Features, {"layer/a": np.zeros((2, 2), np.float32), "rows": np.zeros(9, np.uint8)}, {}),
        (Features, {"layer/a": np.zeros((2, 2), np.float32), "codes": np.zeros(2, np.uint8)}, {}),
        (Prototypes, {"labels": np.zeros(1, np.int64), "counts": np.ones(1, np.int64)}, {}),
        (Prototypes, {"values": np.zeros((1, 2), np.float32), "labels": np.zeros(1, np.int64)}, {}),
        (Prototypes, {"values": np.zeros((1, 2), np.float32), "labels": np.zeros(1), "counts": np.ones(1)}, {}),
        (Scores, {}, {}),
        (Scores, {"codes": np.zeros(2, np.uint8)}, {"lo": 0.0}),
        (Scores, {"codes": np.zeros(2, np.uint8), "a": np.zeros(1)}, {"lo": 0.0, "step": 1.0}),
        (UploadStatus, {}, {"round": 1}),
        (UploadStatus, {}, {"round": 1, "wanted": 2}),
        (UploadStatus, {"a": np.zeros(1)}, {"round": 1, "wanted": 1}),
    ],
)
def test_what_cannot_be_built_is_refused(kind, fields, meta):
    with pytest.raises(RejectedMessageError):
        kind.build(fields, meta)


def test_a_bundle_is_counted_by_the_kinds_of_its_parts():
    responses = Responses(torch.full((3, 2), 0.5), "probabilities", ROWS)
    together, apart = channel(), channel()
    got = together.upload(Bundle((responses, FEATURES, PROTOTYPES)), 1, 1)
    assert parts_of(got).keys() == {Responses, Features, Prototypes}
    for part in (responses, FEATURES, PROTOTYPES):
        apart.upload(part, 1, 1)
    assert together.ledger.by_kind() == apart.ledger.by_kind()
    assert set(together.ledger.by_kind()) == {"up/responses", "up/features", "up/prototypes"}
    down = together.download(Bundle((responses, UploadStatus(1))), 0, 1)
    assert parts_of(down)[UploadStatus].round == 1
    # one message object for several clients is encoded once, also as a part
    again = together.download(Bundle((responses, UploadStatus(1))), 1, 1)
    assert parts_of(again)[Responses] is parts_of(down)[Responses]


def test_a_bundle_is_refused_whole():
    link = channel()
    with pytest.raises(RejectedMessageError, match="without a layer"):
        link.upload(Bundle((PROTOTYPES, Features({}))), 1, 1)
    assert set(link.ledger.by_kind()) == {"up/features", "up/prototypes"}


def test_a_bundle_has_one_part_of_a_type():
    with pytest.raises(ValueError, match="several"):
        Bundle((UploadStatus(1), UploadStatus(2)))
    assert parts_of(None) == {} and parts_of(PROTOTYPES) == {Prototypes: PROTOTYPES}
