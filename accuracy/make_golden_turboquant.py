#!/usr/bin/env python3
"""Makes the golden files of turboquant-* with NumPy, from vLLM 0.33.0's formulas, centroids included.

usage: make_golden_turboquant.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/turboquant-{k4,k3,k4-raw,k3-raw,v4,v3}.json; --check makes them anew and
compares (golden_files.py); --nmse prints the error on normal numbers. Keys are turned as vLLM does it, by a product with
the matrix, but in float64: decoded numbers agree with float32 butterflies as far as sums of up to 512 float32 numbers do (a
share of 4e-6 seen), and codes do, as no number of the files is that near to a middle between two centroids, but those that
are exactly there. Packages: accuracy/requirements.txt.
"""

import functools
import math
import sys

import numpy as np

import golden_schemes

F = np.float32
HEAD_DIMS = (64, 128, 256, 512)
# Positive halves of what vLLM's solver gave, as they were written down from it.
FROZEN = {
    (128, 4): [.0113515087, .034306858, .0580605306, .083301443, .111038531, .143001895, .182826623, .241381702],
    (128, 3): [.0216536951, .0667902575, .118721462, .190065843],
    (64, 4): [.0160534576, .0485172239, .0821099898, .11780603, .157032196, .20223522, .25855589, .341365277],
    (64, 3): [.0306229492, .0944556879, .167897501, .268793693],
}


@functools.cache
def centroids(head_dim, bits):
    """centroids.py: Lloyd and Max's iteration for N(0, 1 / head_dim), in double."""
    sigma, count = 1 / math.sqrt(head_dim), 1 << bits

    def density(x):
        return math.exp(-x * x / (2 * sigma * sigma)) / (sigma * math.sqrt(2 * math.pi))

    def trapezoids(f, a, b, intervals=200):
        h = (b - a) / intervals
        return (0.5 * (f(a) + f(b)) + sum(f(a + i * h) for i in range(1, intervals))) * h

    low, high = -3.5 * sigma, 3.5 * sigma
    found = [low + (high - low) * (i + 0.5) / count for i in range(count)]
    for _ in range(200):
        edges = [3 * low, *((a + b) / 2 for a, b in zip(found, found[1:])), 3 * high]
        moved = [trapezoids(lambda x: x * density(x), a, b) / trapezoids(density, a, b) for a, b in zip(edges, edges[1:])]
        largest = max(abs(a - b) for a, b in zip(moved, found))
        found = moved
        if largest < 1e-10:
            break
    table = np.array(found, F)
    if (head_dim, bits) in FROZEN:
        assert (table[count // 2:] == np.array(FROZEN[head_dim, bits], F)).all()
    return table


def signs(n):
    """Sylvester-Hadamard of ones."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def encode_keys(x, bits):
    """Codes and stored norms; None where float32 sums in another order might give others."""
    n = x.shape[1]
    norm = np.sqrt((x.astype(np.float64) ** 2).sum(1))
    u = x / (norm.astype(F) + F(1e-8))[:, None]
    y = u.astype(np.float64) @ signs(n) / math.sqrt(n)
    table = centroids(n, bits)
    middles = ((table[1:] + table[:-1]) * F(0.5)).astype(np.float64)
    away = np.abs(y[..., None] - middles)
    codes = (y[..., None] >= middles).sum(-1).astype(np.uint8)
    halves = np.minimum(norm, 65504).astype(np.float16)
    nearby = [np.minimum(norm * (1 + e), 65504).astype(np.float16) for e in (-2e-6, 2e-6)]
    if any((other != halves).any() for other in nearby) or away[away > 0].min() < 5e-7:
        return None
    return codes, halves


def decode_keys(codes, halves, bits, corrected):
    n = codes.shape[1]
    r = centroids(n, bits).astype(np.float64)[codes]
    if corrected:
        r = r / np.sqrt((r * r).sum(1, keepdims=True) + 1e-16)
    return (r @ signs(n) / math.sqrt(n) * halves.astype(np.float64)[:, None]).astype(F)


def encode_values(x, bits):
    last = F((1 << bits) - 1)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = np.maximum((high - low) / last, F(1e-8))
    codes = np.clip(np.trunc((x - low) / scale + F(0.5)), 0, last).astype(np.uint8)
    return codes, scale.astype(np.float16), low.astype(np.float16) + np.float16(0)  # a zero's sign says nothing


def decode_values(codes, scale, low):
    return codes.astype(F) * scale.astype(F) + low.astype(F)


def key_ties(n):
    """Tokens of which most turned numbers are exactly 0, where two codes meet."""
    h = signs(n)
    return [h[1], h[3] + h[n // 2], h[5] - h[6], -h[n - 1] - h[2]]


def value_ties(n, bits):
    last = (1 << bits) - 1
    middles = np.arange(last) + 0.5
    one = np.resize(np.concatenate([[0, last], middles]), n)
    return [one, one - 3, one * 4 + 8, -one]


def sure_keys(bits, head_dim, what):
    """Numbers, and their codes and norms, with the first seed with which these are sure."""
    for seed in range(100):
        x = dict(golden_schemes.inputs(head_dim, head_dim, key_ties(head_dim), seed=seed))["tiny" if what == "short" else what]
        x = x * F(2e-3) if what == "short" else x  # vectors of a length near 1e-8
        if encode_keys(x, bits) is not None:
            return x, *encode_keys(x, bits)
    raise ValueError(what)


def cases(bits, side, corrected=True):
    names = [what for what, _ in golden_schemes.inputs(64, 64, key_ties(64))]
    wanted = {64: names, 128: ["outliers", "zero, constant and nearly so", "ties"]}
    if side == "keys":
        wanted |= {64: [*names, "short"], 256: ["outliers"], 512: ["outliers"]}
    if not corrected:
        wanted = {64: ["normal", "outliers"], 128: ["outliers"]}
    for head_dim, what in ((d, what) for d, all_of_them in wanted.items() for what in all_of_them):
        if side == "keys":
            x, codes, halves = sure_keys(bits, head_dim, what)
            decoded, numbers = decode_keys(codes, halves, bits, corrected), [halves]
        else:
            x = dict(golden_schemes.inputs(head_dim, head_dim, value_ties(head_dim, bits), seed=head_dim))[what]
            codes, *numbers = encode_values(x, bits)
            decoded = decode_values(codes, *numbers)
        yield golden_schemes.case(what, x, 0, decoded, codes, numbers, heads=2 if len(x) % 2 == 0 else 1)


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        for head_dim in (64, 128):
            x = np.random.default_rng(1).standard_normal((1 << 13, head_dim)).astype(F)
            squares = (x.astype(np.float64) ** 2).sum()
            for bits in (4, 3):
                y = x.astype(np.float64) @ signs(head_dim) / math.sqrt(head_dim) / np.sqrt((x.astype(np.float64) ** 2).sum(1))[:, None]
                codes = np.searchsorted((centroids(head_dim, bits)[1:] + centroids(head_dim, bits)[:-1]) / 2, y, side="right")
                halves = np.sqrt((x.astype(np.float64) ** 2).sum(1)).astype(np.float16)
                made = [decode_keys(codes, halves, bits, c) for c in (True, False)] + [decode_values(*encode_values(x, bits))]
                print(head_dim, bits, [((m.astype(np.float64) - x) ** 2).sum() / squares for m in made])
        return 0
    files = {}
    for bits in (4, 3):
        for corrected in (True, False):
            made = list(cases(bits, "keys", corrected))
            numbers = sum(math.prod(c["shape"]) for c in made)
            files[f"turboquant-k{bits}{'' if corrected else '-raw'}"] = {
                "source": "vLLM 0.33.0's turboquant in NumPy, turned in float64", "differing": numbers, "tolerance": 5e-6,
                "cases": made}
        files[f"turboquant-v{bits}"] = {"source": "vLLM 0.33.0's turboquant in NumPy, in float32", "differing": 0, "tolerance": 0,
                                        "cases": list(cases(bits, "values"))}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
