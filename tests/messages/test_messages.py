"""Messages: what they give to the wire, build from it, and refuse."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fdl.errors import RejectedMessageError, UserError
from fdl.messages import Message, Parameters, QuantizedLogWeights, Responses, message_type
from fdl.state.float_formats import BFLOAT16

LOG_WEIGHTS = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def rebuilt(message):
    got = type(message).build(message.fields(), message.meta())
    got.validate()
    return got


def test_parameters_keep_every_dtype_and_bit():
    tensors = {
        "float32": torch.randn(3, 4),
        "float64": torch.randn(3, dtype=torch.float64),
        "float16": torch.randn(3).half(),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(2.5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor(3),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint16": torch.tensor([65535], dtype=torch.uint16),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 4).T,
        "a parameter": nn.Parameter(torch.randn(2)),
    }
    message = Parameters(tensors, samples=17)
    assert message.fields()["bfloat16"].dtype == BFLOAT16
    got = rebuilt(message)
    assert got.samples == 17
    assert list(got.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor.detach())
        assert not got.tensors[name].requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_refuse_what_is_not_finite(dtype, value):
    tensor = torch.ones(3, 3, dtype=dtype)
    Parameters({"w": tensor}).validate()
    tensor[1, 2] = value
    with pytest.raises(RejectedMessageError, match="tensor 'w' is not finite"):
        Parameters({"n": torch.tensor(1), "w": tensor}).validate()


def test_large_finite_values_are_fine():
    Parameters({"w": torch.full((100,), 3e38), "h": torch.full((100,), 6e4).half()}).validate()


def test_infinities_that_cancel_are_refused():
    with pytest.raises(RejectedMessageError):
        Parameters({"w": torch.tensor([math.inf, -math.inf])}).validate()


def test_parameters_refuse_bad_numbers_and_user_mistakes():
    for meta in ({}, {"samples": 1.5}, {"samples": "3"}, {"samples": 3, "more": 1}):
        with pytest.raises(RejectedMessageError):
            Parameters.build({}, meta)
    with pytest.raises(RejectedMessageError, match="negative"):
        Parameters({}, samples=-1).validate()
    with pytest.raises(UserError, match="'spectrum' of dtype complex64"):
        from fdl.comm.codec import Codec

        Codec().encode(Parameters({"spectrum": torch.zeros(2, dtype=torch.complex64)}).fields())
    with pytest.raises(UserError, match=r"'s' of torch.float32 and layout torch.sparse_coo cannot be sent"):
        Parameters({"s": torch.eye(2).to_sparse()}).fields()


def test_messages_are_frozen_and_known_by_code():
    assert message_type(1) is Parameters
    assert message_type(2) is Responses
    with pytest.raises(RejectedMessageError, match="unknown message type 77"):
        message_type(77)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Parameters({}).samples = 3
    with pytest.raises(TypeError, match="same wire code 1"):
        type("Other", (Message,), {"kind": "other", "code": 1})


@pytest.mark.parametrize("form", ["logits", "probabilities", "embeddings"])
@pytest.mark.parametrize("rows", [None, [5, 0, 255], [70_000, 3, 9], [2**33, 1, 2]])
@pytest.mark.parametrize("confidence", [None, [-3.0, 0.5, 0.0]])
def test_responses_round_trip(form, rows, confidence):
    message = Responses(
        torch.rand(3, 4),
        form,
        rows=None if rows is None else torch.tensor(rows),
        confidence=None if confidence is None else QuantizedLogWeights.quantize(torch.tensor(confidence)),
        samples=5,
    )
    got = rebuilt(message)
    assert torch.equal(got.values, message.values)
    assert (got.form, got.samples) == (form, 5)
    assert (got.rows is None) == (rows is None)
    if rows is not None:
        assert got.rows.dtype == torch.int64
        assert got.rows.tolist() == rows
        assert message.fields()["rows"].itemsize == (1 if max(rows) < 256 else 4 if max(rows) < 2**32 else 8)
    assert (got.confidence is None) == (confidence is None)
    if confidence is not None:
        assert torch.equal(got.confidence.values(), message.confidence.values())


def good(**changes):
    parts = {
        "values": torch.rand(3, 4),
        "form": "logits",
        "rows": torch.tensor([0, 1, 2]),
        "confidence": QuantizedLogWeights(torch.zeros(3, dtype=torch.uint8), 0.0, 1.0),
    }
    return Responses(**(parts | changes))


def codes(n):
    return torch.zeros(n, dtype=torch.uint8)


@pytest.mark.parametrize(
    "message, reason",
    [
        (good(values=torch.rand(3)), "must be a matrix"),
        (good(values=torch.ones(3, 4, dtype=torch.int64)), "must be a matrix of real numbers"),
        (good(values=torch.rand(3, 0)), "no columns"),
        (good(values=torch.full((3, 4), math.nan)), "responses is not finite"),
        (good(values=torch.tensor([[0.5], [-0.1], [0.6]]), form="probabilities"), "negative"),
        (good(form="answers"), "unknown form 'answers'"),
        (good(rows=torch.tensor([0, 1])), "3 responses need as many int64 rows"),
        (good(rows=torch.tensor([[0, 1, 2]])), "int64 rows"),
        (good(rows=torch.tensor([0.0, 1.0, 2.0])), "int64 rows"),
        (good(rows=torch.tensor([0, 1, -2])), "a proxy row is negative"),
        (good(samples=-4), "sample count"),
        (good(confidence=QuantizedLogWeights(codes(2), 0.0, 1.0)), "3 responses with 2 confidences"),
        (good(confidence=QuantizedLogWeights(codes(3).float(), 0.0, 1.0)), "8-bit"),
        (good(confidence=QuantizedLogWeights(codes(3)[None], 0.0, 1.0)), "vector"),
        (good(confidence=QuantizedLogWeights(codes(3), math.nan, 1.0)), "scale"),
        (good(confidence=QuantizedLogWeights(codes(3), 0.0, math.inf)), "scale"),
        (good(confidence=QuantizedLogWeights(codes(3), 0.0, -1.0)), "scale"),
    ],
)
def test_responses_refuse_what_makes_no_sense(message, reason):
    good().validate()
    with pytest.raises(RejectedMessageError, match=reason):
        message.validate()


VALUES = np.ones((3, 2), np.float32)
META = {"form": 0, "samples": 0}
SCALED = META | {"lo": 0.0, "step": 1.0}


@pytest.mark.parametrize(
    "fields, meta",
    [
        ({}, META),
        ({"values": VALUES}, {"samples": 0}),
        ({"values": VALUES}, {"form": 3, "samples": 0}),
        ({"values": VALUES}, {"form": -1, "samples": 0}),
        ({"values": VALUES}, {"form": "logits", "samples": 0}),
        ({"values": VALUES}, SCALED),
        ({"values": VALUES, "codes": np.zeros(3, np.uint8)}, META),
        ({"values": VALUES, "codes": np.zeros(3, np.uint8)}, SCALED | {"step": 1}),
        ({"values": VALUES, "rows": np.zeros(3)}, META),
        ({"values": VALUES, "rows": np.zeros(7, np.uint8)}, META),
        ({"values": VALUES, "surprise": VALUES}, META),
    ],
)
def test_responses_are_not_built_from_other_content(fields, meta):
    Responses.build({"values": VALUES, "codes": np.zeros(3, np.uint8)}, SCALED).validate()
    with pytest.raises(RejectedMessageError):
        Responses.build(fields, meta)


def test_confidence_by_hand():
    got = QuantizedLogWeights.quantize(torch.tensor([0.0, 255.0, 1.4, 1.6, 100.0]))
    assert (got.lo, got.step) == (0.0, 1.0)
    assert got.codes.tolist() == [0, 255, 1, 2, 100]
    assert got.values().tolist() == [0, 255, 1, 2, 100]


@settings(max_examples=300, deadline=None)
@given(LOG_WEIGHTS)
def test_confidence_error_is_half_a_step(values):
    got = QuantizedLogWeights.quantize(torch.from_numpy(values))
    got.validate()
    assert (got.lo, got.step) == (float(np.float32(got.lo)), float(np.float32(got.step)))
    x = values.astype(np.float64)
    back = got.lo + got.step * got.codes.numpy().astype(np.float64)
    assert (np.abs(back - x) <= got.step / 2 * (1 + 1e-9)).all()
    if x.size:
        assert 255 * got.step <= (x.max() - x.min()) * (1 + 1e-6) + 2e-7 * np.abs(x).max() + 1e-42
        assert np.allclose(got.values(), back, rtol=1e-5, atol=1e-5 * np.abs(x).max())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_confidence_that_is_not_finite_is_refused_by_the_receiver(value):
    confidence = QuantizedLogWeights.quantize(torch.tensor([0.0, value, 1.0], dtype=torch.float64))
    with pytest.raises(RejectedMessageError, match="confidence scale is not usable"):
        good(confidence=confidence).validate()


def test_constant_and_empty_confidences():
    assert QuantizedLogWeights.quantize(torch.full((4,), -1.5)).values().tolist() == [-1.5] * 4
    empty = QuantizedLogWeights.quantize(torch.zeros(0))
    empty.validate()
    assert empty.values().shape == (0,)
