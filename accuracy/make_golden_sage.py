#!/usr/bin/env python3
"""Makes the golden file of the backend sage with NumPy, from the SageAttention paper (arXiv:2410.02367).

usage: make_golden_sage.py [--check]

Without --check writes accuracy/golden/sage.json; with it, makes it anew and compares (golden_files.py). Smoothing
subtracts from K its mean over the tokens; Q / sqrt(d) (times log2 e, for exponentials base 2) and K become int8 in
blocks of 128 and 64 tokens with scale max |x| / 127. Attention over the codes is then plain, in
float64, without tiles. Inputs are multiples of 1/32, so that sums and means do not depend on the order.
Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np
import torch

import golden_files
from golden_files import numbers, short

BLOCK_Q, BLOCK_K = 128, 64
# heads, kv_heads, queries, tokens, head_dim, dtype
CASES = ((2, 1, 40, 70, 64, "float16"), (1, 1, 130, 130, 64, "bfloat16"), (1, 1, 5, 129, 128, "float32"))


def coarse(shape, seed, kind, dtype):
    x = np.round(numbers(int(np.prod(shape)), seed, kind) * np.float32(32)) / np.float32(32)
    return torch.from_numpy(x.reshape(shape)).to(getattr(torch, dtype)).float().numpy()


def quantize(x, block):
    """Codes of x [tokens, head_dim], and the scale of every block."""
    codes, scales = [], []
    for first in range(0, len(x), block):
        part = x[first : first + block]
        scale = np.abs(part).max() / np.float32(127)
        codes.append(np.rint(part / scale).astype(np.int8))
        scales.append(scale)
    return np.concatenate(codes), scales


def each_token(scales, block, count):
    return np.repeat(np.array(scales, dtype=np.float64), block)[:count, None]


def hexadecimal(codes):
    return codes.astype(np.int8).tobytes().hex()


def attention(seed, heads, kv_heads, n, length, head_dim, dtype):
    q = coarse((heads, n, head_dim), seed, "normal", dtype)
    k = coarse((kv_heads, length, head_dim), seed + 1, "outliers", dtype)
    v = coarse((kv_heads, length, head_dim), seed + 2, "normal", dtype)
    hidden = np.arange(length)[None, :] > np.arange(length - n, length)[:, None]
    of_queries, of_keys, outputs = [], [], []
    for head in range(kv_heads):
        mean = k[head].astype(np.float64).mean(axis=0).astype(np.float32)
        of_keys.append(quantize(k[head] - mean, BLOCK_K))
    for head in range(heads):
        factor = np.float32(head_dim**-0.5 * np.log2(np.e))
        of_queries.append(quantize(q[head] * factor, BLOCK_Q))
        kv_head = head // (heads // kv_heads)
        (q_codes, q_scales), (k_codes, k_scales) = of_queries[-1], of_keys[kv_head]
        logits = q_codes.astype(np.float64) @ k_codes.astype(np.float64).T
        logits *= each_token(q_scales, BLOCK_Q, n) * each_token(k_scales, BLOCK_K, length).T
        logits[hidden] = -np.inf
        weights = np.exp2(logits - logits.max(axis=1, keepdims=True))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ v[kv_head].astype(np.float64))
    return {"heads": heads, "kv_heads": kv_heads, "queries": n, "tokens": length, "head_dim": head_dim, "dtype": dtype,
            "seed": seed,
            "query_codes": [hexadecimal(codes) for codes, _ in of_queries],
            "key_codes": [hexadecimal(codes) for codes, _ in of_keys],
            "query_scales": [[short(s) for s in scales] for _, scales in of_queries],
            "key_scales": [[short(s) for s in scales] for _, scales in of_keys],
            "out": [short(x) for x in np.stack(outputs).reshape(-1)[::13]]}


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    made = [attention(70 + 3 * i, *case) for i, case in enumerate(CASES)]
    return golden_files.write_or_check({"sage.json": made}, arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
