#!/usr/bin/env python3
"""Makes the golden files of ggml's schemes with gguf's quantizers, whose bytes are those of ggml-quants.c.

usage: make_golden_ggml.py [--check]

Without --check writes accuracy/golden/schemes/{q8_0,q4_0,q4_1,q5_0,q5_1,iq4_nl}.json; with it, makes them anew and compares
(golden_files.py). gguf does not encode iq4_nl: that is written here from quantize_row_iq4_nl_ref of ggml-quants.c
(llama.cpp 0c1e57098), operation by operation in float32; gguf decodes it. Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import IQ4_NL, dequantize, quantize

import golden_schemes

GROUP = 32
F = np.float32


def best_index(values, x):
    """best_index_int8 of ggml-quants.c."""
    if x <= values[0]:
        return 0
    if x >= values[-1]:
        return len(values) - 1
    low, high = 0, len(values) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if x < values[middle]:
            high = middle
        else:
            low = middle
    return high - 1 if F(x - values[high - 1]) < F(values[high] - x) else high


def encode_iq4_nl(x):
    """Blocks of 18 bytes; a block that is nearly zero has codes of 8, as CUDA writes them (the CPU's are left over)."""
    values = [F(v) for v in IQ4_NL.kvalues]
    blocks = []
    for block in x.reshape(-1, GROUP):
        largest, with_sign = F(0), F(0)
        for v in block:
            if abs(v) > largest:
                largest, with_sign = abs(v), v
        codes, d = np.full(GROUP, 8, np.uint8), F(0)
        if largest >= F(1e-15):
            inverse = F(1) / (with_sign / values[0])
            with_x, with_itself = F(0), F(0)
            for j, v in enumerate(block):
                codes[j] = best_index(values, F(inverse * v))
                q, weight = values[codes[j]], F(v * v)
                with_x = F(with_x + F(F(weight * q) * v))
                with_itself = F(with_itself + F(F(weight * q) * q))
            d = F(with_x / with_itself)
        blocks.append(np.concatenate([np.array([d], np.float16).view(np.uint8), codes[:16] | codes[16:] << 4]))
    return np.array(blocks, np.uint8)


# Of each type: bytes of metadata before the codes (fp16 numbers), bytes of fifth bits.
TYPES = {"q8_0": (1, 0), "q4_0": (1, 0), "q4_1": (2, 0), "q5_0": (1, 4), "q5_1": (2, 4), "iq4_nl": (1, 0)}


def take_apart(name, blocks):
    """The codes of ggml's blocks, unsigned and in the channels' order, and their fp16 numbers."""
    count, fifths = TYPES[name]
    halves = blocks[:, :2 * count].copy().view(np.float16)
    rest = blocks[:, 2 * count:]
    if name == "q8_0":
        return rest ^ np.uint8(0x80), [halves[:, 0]]  # q + 128
    nibbles = rest[:, fifths:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if fifths:
        bits = np.unpackbits(rest[:, :4], axis=1, bitorder="little")
        codes |= bits << 4
    return codes, [halves[:, i] for i in range(count)]


def ties(name):
    """Groups whose scale is a power of two, with all middles between two codes."""
    steps, low = {"q8_0": (254, -127), "q4_0": (15, -8), "q4_1": (15, 0), "q5_0": (31, -16), "q5_1": (31, 0),
                  "iq4_nl": (0, 0)}[name]
    if name == "iq4_nl":
        values = np.array(IQ4_NL.kvalues, np.float32)
        middles = (values[1:] + values[:-1]) / 2
        return [np.concatenate([[-127], middles, [113], values[1:]]), np.concatenate([[127], -middles, [-113], -values[1:]])]
    middles = np.arange(low, low + steps) + 0.5
    groups = []
    for first in range(0, len(middles), GROUP - 2):
        part = middles[first:first + GROUP - 2]
        group = np.concatenate([[low, low + steps], part, np.full(GROUP - 2 - len(part), part[0])])
        groups.append(group if name.endswith("_1") or name == "q8_0" else group[[0, *range(2, GROUP), 1]])
        if name in ("q8_0", "q4_0", "q5_0"):
            groups.append(-groups[-1])
    return groups


def cases(name):
    for head_dim in (64, 128):
        for what, x in golden_schemes.inputs(head_dim, GROUP, ties(name), seed=head_dim):
            if head_dim == 128 and what not in ("outliers", "zero, constant and nearly so"):
                continue
            kind = GGMLQuantizationType[name.upper()]
            size = 2 * TYPES[name][0] + TYPES[name][1] + (32 if name == "q8_0" else 16)
            # Without negative zeros: of a group of them C's largest number stays +0 where NumPy's argmax is the first one, and
            # of zeros of both signs which is the smallest depends on the order: the scheme stores +0.
            blocks = encode_iq4_nl(x) if name == "iq4_nl" else quantize(x if name == "q8_0" else x + F(0), kind).reshape(-1, size)
            decoded = dequantize(blocks.reshape(len(x), -1), kind)
            codes, numbers = take_apart(name, blocks)
            yield golden_schemes.case(what, x, GROUP, decoded, codes, numbers, heads=2 if len(x) % 2 == 0 else 1,
                                      token_bytes=blocks.nbytes // len(x))


def main(arguments):
    np.seterr(over="ignore")
    files = {name: {"source": "gguf 0.19.0, gguf.quants" if name != "iq4_nl" else
                    "quantize_row_iq4_nl_ref of llama.cpp 0c1e57098 in NumPy; decoded by gguf 0.19.0",
                    "differing": 0, "tolerance": 0, "cases": list(cases(name))} for name in TYPES}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
