"""What codec chains cost and save: throughput, and size against the empirical entropy.

    python benchmarks/codecs.py [--repeats 15] [--rows 5000] [--classes 100] [--quick] [--output FILE.md]

The job: one response matrix of softmaxed logits, float32, on one thread. Sizes are whole messages. The entropy bound is
what the codes of a chain need at least when each byte is coded by its frequency in its stream (order 0); a coder that
searches for repeats may go below it. "Coder alone" is the entropy stage on the chain's codes, without what makes them.
Times are processor time, the best of the repeats. Chains that remember send a second round, in which a tenth of the
rows is new.

Exits with 1 when a bar is missed: an entropy stage within 1 % of the entropy, and a chain of 8 bits and an entropy
coder at most 1.3 × the time of the coder alone, there and back.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fdl.comm.codec import Codec
from fdl.comm.link_state import LinkState
from fdl.comm.stages.base import EntropyStage
from fdl.comm.stages.cast import BFloat16, Float16
from fdl.comm.stages.delta import Delta
from fdl.comm.stages.entropy import BestOf, Deflate, Zstd
from fdl.comm.stages.labels import ArgmaxCodec, Simplex
from fdl.comm.stages.quantize import Quantize
from fdl.comm.stages.range_coder import AnsCoder
from fdl.comm.stages.row_cache import Cache
from fdl.comm.stages.sparsify import RandomK, TopK

ENTROPY_BAR, CHAIN_BAR = 1.01, 1.30
LIMIT = 1 << 30

CHAINS = [
    [],
    [Float16()],
    [BFloat16()],
    *([stage] for stage in (Deflate(), AnsCoder(), Zstd())),
    *([Quantize(8, rounding), coder] for rounding in ("nearest", "stochastic") for coder in (Deflate(), AnsCoder())),
    [Quantize(8), Zstd()],
    [Quantize(8), BestOf([Deflate(), AnsCoder()])],
    *([Quantize(bits), AnsCoder()] for bits in (4, 2, 1)),
    [Simplex(2), AnsCoder()],
    [ArgmaxCodec(), AnsCoder()],
    [ArgmaxCodec(), Delta(), AnsCoder()],
    [Delta(), Quantize(8), AnsCoder()],
    [Delta(0.002), Quantize(8), AnsCoder()],
    [Cache(0.01), Quantize(8), AnsCoder()],
    [Delta(), TopK(0.1), Quantize(8), Deflate()],
    [RandomK(0.1), Quantize(8), Deflate()],
]
BARRED = [[Quantize(8, rounding), coder] for rounding in ("nearest", "stochastic") for coder in (Deflate(), AnsCoder())]


class Recorder(EntropyStage):
    """Passes bytes on, and keeps what it was given."""

    name = "recorder"

    def __init__(self) -> None:
        self.streams: list[bytes] = []

    def compress(self, data: bytes | memoryview) -> bytes:
        """Keep the bytes."""
        self.streams.append(bytes(data))
        return bytes(data)

    def expand(self, data: memoryview, size: int) -> bytes:
        """Return what was given."""
        return bytes(data)


def matrices(rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of two rounds."""
    rng = np.random.default_rng(0)

    def answers(count: int) -> np.ndarray:
        logits = rng.normal(0, 2, (count, classes)).astype(np.float32)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    first = answers(rows)
    second = first.copy()
    second[rng.choice(rows, rows // 10, replace=False)] = answers(rows // 10)
    return first, second


def best(jobs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Processor seconds of the fastest run of each job; the jobs take turns, so a busy machine slows all alike."""
    seconds = [[] for _ in jobs]
    for _ in range(repeats):
        for job, taken in zip(jobs, seconds):
            start = time.process_time()
            job()
            taken.append(time.process_time() - start)
    return list(map(min, seconds))


def entropy(data: bytes) -> float:
    """Bytes that the data need when each byte is coded by its frequency."""
    symbols = np.frombuffer(data, np.uint8)
    p = np.bincount(symbols) / symbols.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum() * symbols.size / 8)


def prepared(stages: list, rounds: tuple[np.ndarray, np.ndarray]) -> tuple[Callable[[], bytes], Callable, np.ndarray]:
    """What encodes the round to be timed, what decodes it, and its array."""
    codec, memory = Codec(stages), LinkState()
    array = rounds[1] if codec.remembers else rounds[0]
    if codec.remembers:
        codec.decode(codec.encode({"values": rounds[0]}, noise(), 1, memory), LIMIT, 1, memory)
        memory.commit()

    def encode() -> bytes:
        memory.begin()
        return codec.encode({"values": array}, noise(), 2, memory)

    def decode(data: bytes) -> np.ndarray:
        return codec.decode(data, LIMIT, 2, memory)["values"]

    return encode, decode, array


def noise() -> np.random.Generator:
    return np.random.default_rng(0)


def codes(stages: list, rounds: tuple[np.ndarray, np.ndarray]) -> list[bytes]:
    """The streams that a chain's entropy stage gets."""
    recorder = Recorder()
    array_stages = [stage for stage in stages if not isinstance(stage, EntropyStage)]
    prepared([*array_stages, recorder], rounds)[0]()
    encode, _, _ = prepared([*array_stages, recorder], rounds)
    recorder.streams.clear()
    encode()
    return recorder.streams


def row(stages: list, rounds: tuple[np.ndarray, np.ndarray], repeats: int) -> str:
    """One chain's row of the table."""
    encode, decode, array = prepared(stages, rounds)
    data = encode()
    assert decode(data).shape == array.shape
    bound = sum(map(entropy, codes(stages, rounds)))
    there, back = best([encode, lambda: decode(data)], repeats)
    megabytes = array.nbytes / 1e6
    return (
        f"| {label(stages)} | {len(data):,} | {array.nbytes / len(data):.1f} | {bound:,.0f} | {len(data) / bound:.3f} "
        f"| {megabytes / there:,.0f} | {megabytes / back:,.0f} |"
    )


def label(stages: list) -> str:
    """A chain's name in a table."""
    noisy = any(isinstance(stage, Quantize) and stage.draws() for stage in stages)
    return str(Codec(stages)).replace("|", "+") + (", stochastic" if noisy else "")


def entropy_ratio(stage: EntropyStage, data: bytes) -> float:
    """Size over the entropy bound."""
    return len(stage.compress(data)) / entropy(data)


def chain_ratio(stages: list, rounds: tuple[np.ndarray, np.ndarray], repeats: int) -> float:
    """Time of a chain over that of its entropy coder alone on the same streams, there and back."""
    encode, decode, _ = prepared(stages, rounds)
    coder, data, streams = stages[-1], encode(), codes(stages, rounds)
    coded = [(coder.compress(stream), len(stream)) for stream in streams]
    chain_there, chain_back, coder_there, coder_back = best(
        [
            encode,
            lambda: decode(data),
            lambda: [coder.compress(stream) for stream in streams],
            lambda: [coder.expand(memoryview(c), size) for c, size in coded],
        ],
        4 * repeats,
    )
    return (chain_there + chain_back) / (coder_there + coder_back)


def main() -> int:
    """Measure, print the tables, and tell whether the bars were met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="two repeats, and no bars")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else arguments.repeats
    rounds = matrices(arguments.rows, arguments.classes)
    lines = [
        f"Response matrix {arguments.rows:,} × {arguments.classes}, float32, {rounds[0].nbytes:,} bytes; one thread, "
        f"Python {platform.python_version()}, numpy {np.__version__}, best of {repeats}.",
        "",
        "| chain | bytes | × smaller | entropy of its codes | × entropy | MB/s in | MB/s out |",
        "|---|---|---|---|---|---|---|",
        *(row(stages, rounds, repeats) for stages in CHAINS),
        "",
    ]
    streams = codes([Quantize(8)], rounds)
    picked = BestOf([Deflate(), AnsCoder()])
    measured = [
        (f"{label([coder])}: size of 8-bit codes / entropy", entropy_ratio(coder, streams[0]), bar)
        for coder, bar in ((Deflate(), None), (AnsCoder(), ENTROPY_BAR), (picked, ENTROPY_BAR))
    ]
    measured += [
        (f"{label(stages)}: time / coder alone", chain_ratio(stages, rounds, repeats), CHAIN_BAR) for stages in BARRED
    ]
    lines += ["| bar | measured | at most | met |", "|---|---|---|---|"]
    for name, value, bar in measured:
        met = "" if bar is None else "yes" if value <= bar else "no"
        lines.append(f"| {name} | {value:.3f} | {bar or ''} | {met} |")
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return int(not arguments.quick and any(bar is not None and value > bar for _, value, bar in measured))


if __name__ == "__main__":
    sys.exit(main())
