"""Messages between clients and server: frozen, typed, and self-validating.

A message gives the wire named arrays (`fields`) and a few numbers (`meta`), and is built from them on the other side.
The receiver trusts neither: `build` refuses what is missing or of a wrong type, `validate` what makes no sense.
"""

from fdl.messages.base import EXTENSION_CODES, Message, Meta, message_type
from fdl.messages.bundle import Bundle, parts_of, require_message
from fdl.messages.confidences import QuantizedLogWeights
from fdl.messages.features import Features
from fdl.messages.parameters import Parameters
from fdl.messages.prototypes import Prototypes
from fdl.messages.responses import Form, Responses
from fdl.messages.scores import Scores
from fdl.messages.serialization import (
    check_finite,
    check_sample_count,
    pop_meta,
    reject_leftovers,
    samples_told,
    smallest_int_dtype,
    take_integers,
    take_samples,
    to_torch,
)
from fdl.messages.tensors import TensorMessage
from fdl.messages.upload_status import UploadStatus

__all__ = [
    "EXTENSION_CODES",
    "Bundle",
    "Features",
    "Form",
    "Message",
    "Meta",
    "Parameters",
    "Prototypes",
    "QuantizedLogWeights",
    "Responses",
    "Scores",
    "TensorMessage",
    "UploadStatus",
    "check_finite",
    "check_sample_count",
    "message_type",
    "parts_of",
    "pop_meta",
    "reject_leftovers",
    "require_message",
    "samples_told",
    "smallest_int_dtype",
    "take_integers",
    "take_samples",
    "to_torch",
]
