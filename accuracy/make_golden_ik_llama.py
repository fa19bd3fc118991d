#!/usr/bin/env python3
"""Makes the golden files of q6_0 and q8_kv with NumPy, operation by operation as ik_llama.cpp's C (8337e4cd).

usage: make_golden_ik_llama.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/{q6_0,q8_kv}.json; --check makes them anew and compares (golden_files.py);
--nmse prints the error on normal numbers. Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np

import golden_schemes

F = np.float32


def encode_q6_0(x):
    """quantize_row_q6_0_ref on [groups, 32]: the bytes of its blocks, d, qh[8], qs[16]."""
    first = np.abs(x).argmax(1)[:, None]
    largest = np.where(np.abs(x).max(1, keepdims=True) > 0, np.take_along_axis(x, first, 1), F(0))
    d = largest / F(-32)
    inverse = np.divide(F(1), d, out=np.zeros_like(d), where=d != 0)
    y = x * inverse
    codes = np.minimum(63, (y + F(32.5)).astype(np.int8)).astype(np.uint8)
    weight, q = y * y, codes.astype(F) - F(32)
    with_x = with_itself = np.zeros(len(x), F)
    for j in range(16):
        k = j + 16
        with_x = with_x + (weight[:, j] * x[:, j] * q[:, j] + weight[:, k] * x[:, k] * q[:, k])
        with_itself = with_itself + (weight[:, j] * q[:, j] * q[:, j] + weight[:, k] * q[:, k] * q[:, k])
    better = np.divide(with_x, with_itself, out=np.zeros_like(with_x), where=with_itself > 0)
    d = np.where(with_itself > 0, better, d[:, 0])
    high = (codes[:, :16] >> 4) | (codes[:, 16:] >> 4) << 2
    return np.concatenate([d.astype(np.float16)[:, None].view(np.uint8), high[:, :8] | high[:, 8:] << 4,
                           (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4], axis=1)


def decode_q6_0(blocks):
    """dequantize_row_q6_0: (numbers, codes, d)."""
    d, high, low = blocks[:, :2].copy().view(np.float16), blocks[:, 2:10], blocks[:, 10:]
    high = np.concatenate([high & 15, high >> 4], axis=1)  # of pair j
    codes = np.concatenate([(low & 15) | (high << 4 & 0x30), (low >> 4) | (high << 2 & 0x30)], axis=1)
    return (codes.astype(np.int32) - 32).astype(F) * d.astype(F), codes, d


def encode_q8_kv(x):
    """iqk_quantize_row_q8_KV, its last branch: the bytes of its rows, d, the sum, int8."""
    d = np.abs(x).max(1, keepdims=True) / F(127)
    inverse = np.divide(F(1), d, out=np.zeros_like(d), where=d != 0)
    q = np.rint(inverse * x).astype(np.int8)
    sums = q.sum(1, keepdims=True, dtype=np.int32)
    return np.concatenate([d.view(np.uint8), sums.view(np.uint8), q.view(np.uint8)], axis=1)


def decode_q8_kv(rows):
    """dequantize_row_q8_KV: (numbers, codes + 128, d, sums)."""
    d, sums, q = rows[:, :4].copy().view(F), rows[:, 4:8].copy().view(np.int32), rows[:, 8:].view(np.int8)
    return d * q.astype(F), (q.astype(np.int16) + 128).astype(np.uint8), d, sums


def ties(name):
    """Groups whose scale is a power of two, with middles between two codes."""
    if name == "q6_0":
        middles = np.arange(-32, 31) + 0.5
        return [sign * np.concatenate([[-32], middles[part:part + 31]]) for part in (0, 32) for sign in (1, -1)]
    middles = np.arange(-127, 127) + 0.5
    return [np.concatenate([[127], middles[part:part + 63]]) for part in range(0, 189, 63)]


def cases(name):
    for head_dim in (64, 128):
        group = 32 if name == "q6_0" else head_dim
        middles = np.array(ties(name)) if name == "q6_0" else np.resize(np.array(ties(name)), (3, head_dim))
        for what, x in golden_schemes.inputs(head_dim, group, middles, seed=head_dim):
            if head_dim == 128 and what not in ("outliers", "zero, constant and nearly so"):
                continue
            x = x + F(0)  # which of two zeros is the largest depends on how one looks for it
            stored = encode_q6_0(x.reshape(-1, 32)) if name == "q6_0" else encode_q8_kv(x)
            decoded, codes, *numbers = decode_q6_0(stored) if name == "q6_0" else decode_q8_kv(stored)
            yield golden_schemes.case(what, x, 32 if name == "q6_0" else 0, decoded, codes, numbers,
                                      heads=2 if len(x) % 2 == 0 else 1, token_bytes=stored.nbytes // len(x))


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        x = np.random.default_rng(1).standard_normal((1 << 15, 128)).astype(F)
        for name, decoded in (("q6_0", decode_q6_0(encode_q6_0(x.reshape(-1, 32)))[0]),
                              ("q8_kv", decode_q8_kv(encode_q8_kv(x))[0])):
            error = decoded.reshape(x.shape).astype(np.float64) - x
            print(name, (error**2).sum() / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {name: {"source": "ik_llama.cpp 8337e4cd in NumPy", "differing": 0, "tolerance": 0,
                    "cases": list(cases(name))}
             for name in ("q6_0", "q8_kv")}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
