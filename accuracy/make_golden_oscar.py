#!/usr/bin/env python3
"""Makes the golden files of int2-hadamard with NumPy, from OSCAR's torch oracle: rows turned, clipped at a sorted magnitude.

usage: make_golden_oscar.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/int2-hadamard-{keys,values}.json; --check makes them anew and compares
(golden_files.py); --nmse prints the error on normal numbers. Rows are turned by float32 butterflies, whose order the scheme
names; the product with the matrix in float64 is asserted to agree. Packages: accuracy/requirements.txt.
"""

import math
import sys

import numpy as np

import golden_schemes

F = np.float32
RATIOS = {"keys": 0.96, "values": 0.92}


def signs(n):
    """Sylvester's matrix."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def turn(x):
    n = x.shape[1]
    y = x * (F(1) / np.sqrt(F(n)))
    for bit in range(int(math.log2(n))):
        pairs = y.reshape(len(y), -1, 2, 1 << bit)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(len(y), n)
    exact = x.astype(np.float64) @ signs(n) / math.sqrt(n)
    assert y.dtype == F and np.abs(y - exact).max() <= 1e-6 * np.abs(exact).max()
    return y


def encode(x, ratio):
    y = turn(x)
    threshold = np.sort(np.abs(y), axis=1)[:, int(ratio * x.shape[1])][:, None]
    y = np.maximum(np.minimum(y, threshold), -threshold)
    low, high = y.min(1, keepdims=True), y.max(1, keepdims=True)
    scale = np.maximum(high - low, F(1e-8)) / F(3)
    zero = (F(0) - low) / scale  # of a zero the sign says nothing
    codes = np.clip(np.trunc(y / scale + zero + F(0.5)), 0, 3).astype(np.uint8)
    return codes, scale, zero


def decode(codes, scale, zero):
    return turn((codes.astype(F) - zero) * scale)


def cases(side):
    for head_dim in (64, 128, 256):
        h = signs(head_dim)
        ties = [h[1] + h[7], h[3] + h[head_dim // 2], h[5] - 2 * h[6], h[head_dim - 1] - h[2] + 3 * h[9]]
        for what, x in golden_schemes.inputs(head_dim, head_dim, ties, seed=head_dim):
            if {64: True, 128: what in ("outliers", "zero, constant and nearly so"), 256: what == "outliers"}[head_dim]:
                codes, scale, zero = encode(x, RATIOS[side])
                yield golden_schemes.case(what, x, 0, decode(codes, scale, zero), codes, [scale, zero],
                                          heads=2 if len(x) % 2 == 0 else 1)


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        for head_dim in (64, 128):
            x = np.random.default_rng(1).standard_normal((1 << 15, head_dim)).astype(F)
            for side, ratio in RATIOS.items():
                decoded = decode(*encode(x, ratio)).astype(np.float64)
                print(head_dim, side, ((decoded - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {f"int2-hadamard-{side}": {"source": "OSCAR's torch oracle @473ff3f in NumPy, in float32", "differing": 0, "tolerance": 0,
                                       "cases": list(cases(side))} for side in RATIOS}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
