"""What a stage's signature says, so that sites of other settings do not misread each other."""

import copy
import pickle

import numpy as np
import pytest

from fdl.comm.codec import Codec
from fdl.comm.stages.base import ArraySpec, ArrayStage, EncodedArray, EntropyStage
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import Deflate, Zstd
from fdl.comm.stages.sparsify import RandomK, TopK
from fdl.errors import RejectedMessageError


class Scaled(ArrayStage):
    """Values in 8 bits, on a scale that both sites know from their recipe."""

    name = "scaled"
    encoder_only = ("quick",)

    def __init__(self, top: float = 1.0, coders: tuple[EntropyStage, ...] = (), quick: bool = True):
        self.step = top / 127

    def encode(self, array, turn):
        return EncodedArray(1, np.round(array / self.step).astype(np.int8))

    def layout(self, spec, variant, extents=()):
        return (ArraySpec(np.dtype(np.int8), spec.shape),)

    def decode(self, spec, coded, turn):
        return (coded.main * self.step).astype(spec.dtype)


def test_two_settings_of_one_stage_reject_each_others_messages():
    fields = {"x": np.linspace(-1, 1, 50, dtype=np.float32)}
    blob = Codec([Scaled(1.0)]).encode(fields)
    back = Codec([Scaled(top=1)]).decode(blob, 1000)  # the same setting, written in another way
    assert np.abs(back["x"] - fields["x"]).max() < 0.01
    Codec([Scaled(1.0, quick=False)]).decode(blob, 1000)
    with pytest.raises(RejectedMessageError, match=r"another codec chain than scaled\(top=4,coders=\[\]\)"):
        Codec([Scaled(4.0)]).decode(blob, 1000)


def test_a_signature_names_what_a_decoder_must_know():
    assert Scaled().signature == "scaled(top=1,coders=[])"
    assert Scaled(2, (Deflate(), Zstd(9))).signature == "scaled(top=2,coders=[deflate,zstd])"
    for same in (copy.copy, copy.deepcopy, lambda stage: pickle.loads(pickle.dumps(stage))):
        assert same(Scaled(3.0)).signature == Scaled(3.0).signature
    for stage, name in ((Delta(0.1), "delta"), (Zstd(9), "zstd"), (TopK(0.3, True), "top_k"), (RandomK(), "random_k")):
        assert stage.signature == name  # settings of the sender alone
    with pytest.raises(TypeError, match="unexpected keyword argument 'bottom'"):
        Scaled(bottom=1)
