#!/usr/bin/env python3
"""Makes the golden files of exl3-* with NumPy, operation by operation as exllamav3's quant_block_x4 and dequant_block_x4.

usage: make_golden_exllamav3.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/exl3-{2,3,4,5,6,7,8}.json; --check makes them anew and compares (golden_files.py);
--nmse prints the error on normal numbers. Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np

import golden_schemes

GROUP = 32
F = np.float32
R32 = F(0.17677669529663688110)


def hadamard(v):
    """had_4_inreg and had_8_subgroup on [groups, 32]: a lane of 8 has four numbers, and trades with lanes 1, 2 and 4 away."""
    v0, v1, v2, v3 = np.moveaxis(v.reshape(-1, 8, 4), 2, 0)
    s0, d0, s1, d1 = v0 + v1, v0 - v1, v2 + v3, v2 - v3
    four = [s0 + s1, d0 + d1, s0 - s1, d0 - d1]
    lanes = np.arange(8)
    for i in (1, 2, 4):
        sign = np.where(lanes & i, F(-1), F(1))
        four = [a * sign + a[:, lanes ^ i] for a in four]
    return np.stack(four, 2).reshape(v.shape)


def encode(x, bits):
    m = F(1 << (bits - 1))
    v = hadamard(x.astype(np.float16).astype(F).reshape(-1, GROUP)) * R32
    s = np.abs(v).max(1, keepdims=True) + F(1e-10)
    inverse = F(1) / s
    codes = np.clip(np.floor(v * inverse * m + m), 0, 2 * m - 1).astype(np.uint8)  # times m is exact: fmaf rounds once, too
    return codes, np.minimum(s, F(65504)).astype(np.float16)


def decode(codes, s, bits):
    m = F(1 << (bits - 1))
    return hadamard((codes.astype(F) - (m - F(0.5))) * (s.astype(F) * R32 * (F(1) / m)))


def ties(bits):
    """Groups that turn into a full scale and borders between cells: x = y H / sqrt(32), times sqrt(32)."""
    borders = np.resize(np.arange(-(1 << bits) + 2, (1 << bits), 2), GROUP - 1).astype(F)
    return [hadamard(np.concatenate([[end], borders]).astype(F)[None])[0] for end in (1 << bits, -(1 << bits))]


def cases(bits):
    for head_dim in (64, 128):
        for what, x in golden_schemes.inputs(head_dim, GROUP, ties(bits), seed=head_dim):
            if what == "tiny":
                what, x = "of fp16's subnormals", x * F(0.01)
            if head_dim == 64 or what in ("outliers", "zero, constant and nearly so"):
                codes, s = encode(x, bits)
                decoded = decode(codes, s, bits).reshape(x.shape)
                yield golden_schemes.case(what, x, GROUP, decoded, codes, [s], heads=2 if len(x) % 2 == 0 else 1)


def main(arguments):
    every = (2, 3, 4, 5, 6, 7, 8)
    if arguments == ["--nmse"]:  # for the rows
        x = np.random.default_rng(1).standard_normal((1 << 15, 128)).astype(F)
        for bits in every:
            decoded = decode(*encode(x, bits), bits).reshape(x.shape).astype(np.float64)
            print(bits, ((decoded - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {f"exl3-{bits}": {"source": "exllamav3's q_cache_kernels.cuh @80fd9eec in NumPy", "differing": 0, "tolerance": 0,
                              "cases": list(cases(bits))} for bits in every}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
