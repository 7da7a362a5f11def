"""Messages that ranks hand to each other: every kind, to the bit, also what a server would refuse."""

import numpy as np
import pytest
import torch

from fdl.federation.message_transport import from_tensors, to_tensors
from fdl.messages import (
    Bundle,
    Features,
    Message,
    Parameters,
    Prototypes,
    QuantizedLogWeights,
    Responses,
    Scores,
    UploadStatus,
)
from fdl.state import checkpoint

RANDOM = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
NAN = torch.tensor([float("nan"), -0.0, float("inf")])
RESPONSES = Responses(
    RANDOM.bfloat16(), "logits", torch.tensor([9, 0, 300, 2]), QuantizedLogWeights.quantize(RANDOM[:, 0]), 7
)
MESSAGES = [
    Parameters({"w": RANDOM.t(), "count": torch.tensor(1 << 40), "half": RANDOM.half(), "double": RANDOM.double()}, 5),
    Parameters({"w": NAN}, 0),
    RESPONSES,
    Features({"a": RANDOM, "b": RANDOM.half()}, torch.arange(4), None),
    Prototypes(RANDOM, torch.arange(4), torch.ones(4, dtype=torch.int64), None),
    UploadStatus(3, True),
    Scores(QuantizedLogWeights.quantize(RANDOM[:, 0])),
    Bundle((RESPONSES, Prototypes(RANDOM, torch.arange(4), torch.ones(4, dtype=torch.int64), None))),
]


def said(message: Message | Bundle) -> list:
    """All that a message says, bit for bit."""
    parts = message.parts if isinstance(message, Bundle) else (message,)
    arrays = [{k: (v.dtype, v.shape, np.ascontiguousarray(v).tobytes()) for k, v in p.fields().items()} for p in parts]
    return [type(message), *zip(map(type, parts), (part.meta() for part in parts), arrays)]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_out_as_they_went_in(message):
    data = checkpoint.to_bytes({"one": to_tensors(message)})
    assert said(from_tensors(checkpoint.from_bytes(data)["one"])) == said(message)
