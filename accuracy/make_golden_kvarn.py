#!/usr/bin/env python3
"""Makes the golden files of kvarn-4 and kvarn-2 with torch, after the reference of KVarN's own test of its kernels.

usage: make_golden_kvarn.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/kvarn-{4,2}-{keys,values}.json; --check makes them anew and compares
(golden_files.py); --nmse prints the error on normal numbers. Logarithms, exponentials and sums are torch's, in float64, so that
float32 in any order comes near; a tile is taken whose codes and float16 numbers are none of those that the last bits of float32
decide. Packages: accuracy/requirements.txt.
"""

import math
import sys

import numpy as np
import torch

import golden_schemes

TILE = 128


def signs(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return torch.from_numpy(h)


def balance(tile):
    """Column and row scales of a tile: 16 rounds of Sinkhorn's iteration on logarithms, the best of all; and which it was."""
    log_column, log_row = torch.zeros(1, tile.shape[1], dtype=tile.dtype), torch.zeros(tile.shape[0], 1, dtype=tile.dtype)

    def now():
        return tile / log_column.exp() / log_row.exp()

    def imbalance(b):
        columns, rows = b.std(dim=0), b.std(dim=1)
        return columns.max() / columns.min().clamp_min(1e-8) + rows.max() / rows.min().clamp_min(1e-8)

    best, scales, which = imbalance(now()), (log_column.exp(), log_row.exp()), 0
    for i in range(1, 17):
        log_column = (log_column + now().std(dim=0, keepdim=True).clamp(1e-3, 1e3).log()).clamp(-0.3, 10.0)
        log_row = (log_row + now().std(dim=1, keepdim=True).clamp(1e-3, 1e3).log()).clamp(-0.3, 10.0)
        found = imbalance(now())
        if found <= best:
            best, scales, which = found, (log_column.exp(), log_row.exp()), i
    return *scales, which


def halves(v):
    """As float16, and whether that is sure."""
    v = v.numpy()
    kept = v.astype(np.float16)
    return kept, all((kept == (v * (1 + e)).astype(np.float16)).all() for e in (-2e-6, 2e-6))


def encode(x, bits, keys):
    """x [128, channels]: codes like x, three arrays of float16, decoded numbers, the best round,
    and whether codes and arrays are sure."""
    h = signs(x.shape[1]) / math.sqrt(x.shape[1])
    turned = torch.from_numpy(x).double() @ h
    tile = turned.T if keys else turned
    column, row, which = balance(tile)
    balanced = tile / column / row
    low, high = balanced.amin(dim=1, keepdim=True), balanced.amax(dim=1, keepdim=True)
    step = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-10)
    steps = (balanced - low) / step
    q = steps.round().clamp(0, (1 << bits) - 1)
    sure = bool(((steps - steps.floor() - 0.5).abs() > 1e-5).all())
    numbers = []
    for v in ((row * step).flatten(), (row * low).flatten(), column.flatten()):
        kept, is_sure = halves(v)
        numbers.append(kept)
        sure &= is_sure
    scale, minimum, columns = (torch.from_numpy(n).double() for n in numbers)
    decoded = (q * scale[:, None] + minimum[:, None]) * columns[None, :]
    back = (decoded.T if keys else decoded) @ h
    codes = (q.T if keys else q).to(torch.uint8).numpy()
    return codes, numbers, back.float().numpy(), which, sure


def numbers_of(seed, head_dim):
    """Channels and tokens of many scales, some far away."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((TILE, head_dim)) * np.exp2(rng.uniform(-3, 3, (TILE, 1))) * np.exp2(rng.uniform(-2, 2, head_dim))
    x[:, ::16] += 4
    return x.astype(np.float32)


def cases(bits, keys):
    for seed in range(2000):
        # Scales are limited: of small keys and of large values the last round is the best, else mostly an earlier one.
        x = numbers_of(seed, 64) * np.float32(1 if bits == 2 else 0.3 if keys else 3)
        codes, numbers, decoded, which, sure = encode(x, bits, keys)
        if sure and (which == 16) == (bits == 4):
            yield golden_schemes.case("scales of many sizes", x, 0, decoded, codes, numbers)
            return
    raise ValueError("no seed gives sure codes")


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        x = np.random.default_rng(1).standard_normal((64, TILE, 128)).astype(np.float32)
        for bits in (4, 2):
            for keys in (True, False):
                error = sum(((encode(tile, bits, keys)[2].astype(np.float64) - tile) ** 2).sum() for tile in x)
                print(bits, keys, error / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {f"kvarn-{bits}-{side}": {"source": "KVarN's reference (huawei-csl/KVarN f9806bd) in torch 2.11.0, in float64",
                                      "differing": TILE * 64, "tolerance": 5e-6, "cases": list(cases(bits, side == "keys"))}
             for bits in (4, 2) for side in ("keys", "values")}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
