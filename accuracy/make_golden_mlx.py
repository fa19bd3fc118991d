#!/usr/bin/env python3
"""Makes the golden files of mlx-4 and mlx-8 with MLX on a CPU.

usage: make_golden_mlx.py [--check]

Without --check writes accuracy/golden/schemes/{mlx-4,mlx-8}.json; with it, makes them anew and compares (golden_files.py).
MLX encodes float32 numbers; scales and biases are rounded to float16 before it decodes them, as it would have kept them for
numbers of that type (asserted for inputs that float16 holds). Packages: accuracy/requirements.txt.
"""

import sys

import mlx.core as mx
import numpy as np

import golden_schemes

mx.set_default_device(mx.cpu)


def quantize(x, group, bits):
    """Codes [tokens, channels]; scales, biases [tokens, groups] of x's type; MLX's arrays of codes."""
    words, scales, biases = mx.quantize(mx.array(x), group_size=group, bits=bits)
    fields = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (np.array(words)[..., None] >> fields) & np.uint32((1 << bits) - 1)
    return codes.reshape(x.shape).astype(np.uint8), np.array(scales), np.array(biases), words


def ties(group, bits):
    """Groups with a step of 1 or -1 and all middles between two codes."""
    last, groups = (1 << bits) - 1, []
    middles = np.arange(last) + 0.5
    for first in range(0, last, group - 2):
        part = middles[first:first + group - 2]
        one = np.concatenate([[0, last], part, np.full(group - 2 - len(part), part[0])])
        groups += [one, 3 - one] if bits == 8 else [one, -one, one - 3, 3 - one]
    return groups


def cases(bits):
    for group, head_dim in ((64, 64), (32, 64), (128, 128), (64, 128)):
        for what, x in golden_schemes.inputs(head_dim, group, ties(group, bits), seed=head_dim + group):
            if (group, head_dim) != (64, 64) and what not in ("outliers", "all negative", "zero, constant and nearly so", "ties"):
                continue
            codes, scales, biases, words = quantize(x, group, bits)
            scales, biases = scales.astype(np.float16), biases.astype(np.float16)
            if (x.astype(np.float16) == x).all():
                halves = quantize(x.astype(np.float16), group, bits)
                assert all((a == b).all() for a, b in zip((codes, scales, biases), halves))
            decoded = mx.dequantize(words, *(mx.array(a.astype(np.float32)) for a in (scales, biases)), group_size=group, bits=bits)
            yield golden_schemes.case(what, x, group, np.array(decoded), codes, [scales, biases], heads=2 if len(x) % 2 == 0 else 1)


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        x = np.random.default_rng(1).standard_normal((1 << 15, 128)).astype(np.float32)
        for bits in (4, 8):
            _, scales, biases, words = quantize(x, 64, bits)
            scales, biases = (mx.array(a.astype(np.float16).astype(np.float32)) for a in (scales, biases))
            decoded = np.array(mx.dequantize(words, scales, biases, group_size=64, bits=bits), np.float64)
            print(bits, ((decoded - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {f"mlx-{bits}": {"source": "mlx 0.32.4, mx.quantize and mx.dequantize on a CPU", "differing": 0, "tolerance": 0,
                             "cases": list(cases(bits))} for bits in (4, 8)}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
