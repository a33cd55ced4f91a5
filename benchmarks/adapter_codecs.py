"""ComPEFT files of a bfloat16 adapter on one thread, in bytes of the dense adapter a second.

    python -m benchmarks.adapter_codecs [--elements 32] [--density 0.05] [--repeats 5]

Encoding takes in everything: deviation and threshold over all tensors, the choice of what is kept, the Rice code,
checksums. The coder by itself goes from a ternary vector to its bytes and back; a plain Python Golomb coder does the
same on a slice. Both are also held against copying the dense adapter in memory, the most that any decoder could reach.
All runs on one thread, and the rows' seconds are those of the processor, so that what else the machine does counts
little; what the clock on the wall says is among the details, with the machine's load.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.results_file import Row, write
from training.compression import compress, container, decompress, rice, sparse_layouts
from training.compression.codec import PIECE

TENSORS = 64
SLICE = 200_000  # elements for the plain coder


@dataclass(frozen=True)
class Speed:
    """MB of dense bfloat16 a second: of the processor's time, and by the clock on the wall."""

    processor: float
    wall: float


def speed(work: Callable[[], object], megabytes: float, repeats: int) -> Speed:
    """Of the median times over the repeats, after one that does not count."""
    work()
    processor, wall = [], []
    for _ in range(repeats):
        began = time.process_time(), time.perf_counter()
        work()
        processor.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return Speed(megabytes / statistics.median(processor), megabytes / statistics.median(wall))


def plain_encode(ternary: list[int], b: int) -> bytes:
    """Golomb code of gaps with a sign behind each, symbol by symbol."""
    bits: list[int] = []
    gap = 0
    for value in ternary:
        if not value:
            gap += 1
            continue
        bits += [1] * (gap >> b)
        bits.append(0)
        bits += [gap >> place & 1 for place in range(b)]
        bits.append(value < 0)
        gap = 0
    bits += [0] * (-len(bits) % 8)
    return bytes(sum(bits[at + place] << place for place in range(8)) for at in range(0, len(bits), 8))


def plain_decode(data: bytes, length: int, count: int, b: int) -> list[int]:
    """Inverse of `plain_encode`."""
    bits = (byte >> place & 1 for byte in data for place in range(8))
    ternary = [0] * length
    at = -1
    for _ in range(count):
        gap = 0
        while next(bits):
            gap += 1 << b
        for place in range(b):
            gap += next(bits) << place
        at += gap + 1
        ternary[at] = -1 if next(bits) else 1
    return ternary


def coded(ternary: NDArray[np.int8]) -> tuple[bytes, list[list[int]]]:
    """Bytes of a ternary vector, by the codec's own coder."""
    parts = (ternary[begin : begin + PIECE] for begin in range(0, len(ternary), PIECE))
    return sparse_layouts.golomb((part != 0, part < 0) for part in parts)


def decoded(data: bytes, counts: list[list[int]], length: int) -> NDArray[np.int8]:
    """Inverse of `coded`."""
    ternary = np.zeros(length, np.int8)
    packed = container.Packed("t", torch.int8, (length,), data, None)
    for places, negative in sparse_layouts.from_golomb(packed, counts):
        ternary[places] = 1 - 2 * negative.view(np.int8)
    return ternary


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=32, help="millions")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    each = options.elements * 10**6 // TENSORS
    tensors = {
        f"layers.{n}.lora_A.weight": (torch.randn(each, generator=generator) * 0.02).bfloat16() for n in range(TENSORS)
    }
    line, elements = f"compeft:density={options.density},alpha=1", each * TENSORS
    megabytes = 2 * elements / 1e6

    data = compress(tensors, line)
    dense = torch.cat(list(tensors.values()))
    ternary = torch.cat(list(decompress(data).values())).sign().to(torch.int8).numpy()
    content, counts = coded(ternary)
    assert np.array_equal(decoded(content, counts, elements), ternary)
    part = ternary[:SLICE].tolist()
    count, b = sum(map(abs, part)), rice.parameter(options.density)
    plain = plain_encode(part, b)
    assert plain_decode(plain, SLICE, count, b) == part

    work: dict[str, tuple[Callable[[], object], float]] = {
        "encode": (lambda: compress(tensors, line), megabytes),
        "decode": (lambda: decompress(data), megabytes),
        "copy": (lambda: dense.clone(), megabytes),
        "coder writes": (lambda: coded(ternary), megabytes),
        "coder reads": (lambda: decoded(content, counts, elements), megabytes),
        "plain coder writes": (lambda: plain_encode(part, b), 2e-6 * SLICE),
        "plain coder reads": (lambda: plain_decode(plain, SLICE, count, b), 2e-6 * SLICE),
    }
    speeds = {name: speed(each_work, size, options.repeats) for name, (each_work, size) in work.items()}
    encode, decode, copy, coder_encode, coder_decode, plain_encoding, plain_decoding = (
        found.processor for found in speeds.values()
    )

    stored = sum(len(packed.content) for packed in container.read(data).tensors)
    formula = rice.expected_bits(options.density, elements) / 8
    what = f"a bfloat16 adapter of {options.elements} M numbers"
    coder = "a ternary vector's Rice code"
    write(
        "adapter_codecs",
        [
            Row(f"{what} becomes a ComPEFT file", encode, 200, "what we ask for", "MB/s", 1),
            Row(f"{what} comes back from a ComPEFT file", decode, 400, "what we ask for", "MB/s", 1),
            Row(f"{what} comes back from a ComPEFT file", decode, copy, "copying it in memory", "MB/s", 0.1),
            Row(f"{coder} is written", coder_encode, plain_encoding, "plain Python Golomb coder", "MB/s", 50),
            Row(f"{coder} is read", coder_decode, plain_decoding, "plain Python Golomb coder", "MB/s", 50),
            Row(f"{coder} is written", coder_encode, copy, "copying the dense adapter", "MB/s", 0.1),
            Row(f"{coder} is read", coder_decode, copy, "copying the dense adapter", "MB/s", 0.1),
            Row("bytes of a ComPEFT file's streams", stored, formula, "the Golomb formula", "bytes", 1.03, "lower"),
            Row("a ComPEFT file is smaller", megabytes * 1e6 / len(data), 40, "what we ask for", "times", 1),
        ],
        details={
            "elements": elements,
            "density": options.density,
            "file": len(data),
            "streams": stored,
            "load": os.getloadavg()[0],
            "speeds": {name: asdict(found) for name, found in speeds.items()},
        },
    )


if __name__ == "__main__":
    main()
