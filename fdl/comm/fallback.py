"""Cheaper and cheaper codings of the same message, for a link that has too few bytes for the one in the recipe."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fdl.comm.codec import Codec
from fdl.comm.link_state import LinkState
from fdl.comm.stages.base import EntropyStage, Stage
from fdl.comm.stages.cast import Float16
from fdl.comm.stages.entropy import Deflate
from fdl.comm.stages.labels import ArgmaxCodec, Label, Simplex
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.sparsify import RandomK, Sparsify, TopK
from fdl.errors import UserError

_NARROW = Quantize.phase


class CodecFallbacks:
    """A chain and its cheaper relatives, and a decoder that tells from a message which of them it was coded with.

    Both ends derive the same ladder from the recipe's chain. Its rungs, from dear to cheap: the chain itself; numbers
    in float16, then in 8, 4, 2 and 1 bits; of probabilities that the chain sends as labels, fewer units, at last the
    class alone; then, where what is left out is made good later (after `delta`) or the chain leaves values out anyway,
    fewer values. Every rung but the first ends in an entropy coder.

    Args:
        codec: the recipe's chain.

    Attributes:
        rungs: the chains, the recipe's first.
    """

    def __init__(self, codec: Codec):
        self.rungs = [codec]
        for stages in _cheaper(codec.stages):
            self.rungs.append(Codec(stages))
        self._by_signature: dict[bytes, Codec] = {}
        for rung in self.rungs:
            other = self._by_signature.setdefault(rung.signature, rung)
            if [s.signature for s in other.stages] != [s.signature for s in rung.stages]:
                raise UserError(f"the chains {other} and {rung} have one checksum: change an argument of a stage")

    def decode(
        self, blob: bytes | memoryview, limit: int, round: int = 0, memory: LinkState | None = None
    ) -> Mapping[str, np.ndarray]:
        """Decode with the chain that the message was encoded with; arguments and errors as in `Codec.decode`."""
        codec = self._by_signature.get(bytes(blob[:2]), self.rungs[0])
        return codec.decode(blob, limit, round, memory)


def _cheaper(stages: tuple[Stage, ...]) -> list[list[Stage]]:
    """Return the chains of the further rungs."""
    by_phase = {stage.phase: stage for stage in stages}
    by_phase.setdefault(EntropyStage.phase, Deflate())
    chains: list[Mapping[int, Stage]] = [by_phase] if len(by_phase) > len(stages) else []
    label = by_phase.get(Label.phase)
    if label is not None:
        options = [Simplex(bits) for bits in (4, 2, 1) if isinstance(label, Simplex) and bits < label.bits]
        options = [o for o in options if o.bits > 1] + ([ArgmaxCodec()] if isinstance(label, Simplex) else [])
        chains += [by_phase | {Label.phase: option} for option in options]
    else:
        chains += [by_phase | {_NARROW: option} for option in _narrower(by_phase.get(_NARROW))]
        cheapest = chains[-1] if chains else by_phase
        chains += [cheapest | {Sparsify.phase: option} for option in _sparser(by_phase)]
    return [[chain[phase] for phase in sorted(chain)] for chain in chains]


def _narrower(stage: Stage | None) -> list[Stage]:
    if isinstance(stage, Quantize):
        most = max([stage.bits, *(bits for _, bits in stage.schedule)])
        return [Quantize(bits, stage.rounding, stage.granularity) for bits in (8, 4, 2, 1) if bits < most]
    return ([Float16()] if stage is None else []) + [Quantize(bits) for bits in (8, 4, 2, 1)]


def _sparser(by_phase: Mapping[int, Stage]) -> list[Stage]:
    stage = by_phase.get(Sparsify.phase)
    if isinstance(stage, TopK):
        return [TopK(stage.fraction / part, stage.error_feedback) for part in (4, 16)]
    if isinstance(stage, RandomK):
        return [RandomK(stage.fraction / part, stage.error_feedback, stage.unbiased) for part in (4, 16)]
    return [TopK(share) for share in (0.1, 0.01)] if any(s.name == "delta" for s in by_phase.values()) else []
