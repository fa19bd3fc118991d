#!/usr/bin/env python3
"""Makes the golden files of kivi-4 and kivi-2 with NumPy's float16, operation by operation as KIVI's new_pack.py.

usage: make_golden_kivi.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/kivi-{4,2}-{keys,values}.json; --check makes them anew and compares
(golden_files.py); --nmse prints the error on normal numbers. A group without a range has codes of 0, as on KIVI's GPU (on a CPU
0 / 0 becomes whatever the conversion makes of it). Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np

import golden_schemes

GROUP = 32
H = np.float16


def encode(x, bits):
    """x [..., GROUP] as float16: codes, scales, minima."""
    last = H((1 << bits) - 1)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = (high - low) / last
    steps = (x - low) / np.where(scale == 0, H(1), scale)
    assert steps.dtype == scale.dtype == np.float16
    codes = np.where(scale == 0, 0, np.rint(np.clip(steps, H(0), last))).astype(np.uint8)
    return codes, scale[..., 0], low[..., 0] + H(0)  # of a minimum that is zero the sign says nothing


def decode(codes, scale, low):
    return codes.astype(np.float32) * scale[..., None].astype(np.float32) + low[..., None].astype(np.float32)


def along(x, bits, keys):
    """Of x [tokens, channels]: codes and decoded numbers like x; scales and minima, a row for each token or 32 of them."""
    halves = x.astype(H)
    if keys:
        groups = halves.reshape(-1, GROUP, x.shape[1]).swapaxes(1, 2)  # [groups of tokens, channels, GROUP]
        codes, scale, low = encode(groups, bits)
        back = [a.swapaxes(1, 2).reshape(x.shape) for a in (codes, decode(codes, scale, low))]
    else:
        codes, scale, low = encode(halves.reshape(len(x), -1, GROUP), bits)
        back = [a.reshape(x.shape) for a in (codes, decode(codes, scale, low))]
    return *back, scale, low


def ties(bits):
    last = (1 << bits) - 1
    one = np.resize(np.concatenate([[0, last], np.arange(last) + 0.5]), GROUP)
    return [one, one - 3, one * 4 + 8, -one]


def inputs(head_dim, bits):
    for what, x in golden_schemes.inputs(head_dim, GROUP, ties(bits), seed=head_dim):
        if what == "tiny":
            yield "of fp16's subnormals", x * np.float32(0.05)
            yield "one step of fp16", np.where(x > 0, np.float32(2.0**-24), np.float32(0))
        yield what, x


def value_cases(bits):
    for head_dim in (64, 128):
        for what, x in inputs(head_dim, bits):
            if head_dim == 64 or what in ("outliers", "zero, constant and nearly so"):
                codes, decoded, scale, low = along(x, bits, keys=False)
                yield golden_schemes.case(what, x, GROUP, decoded, codes, [scale, low], heads=2 if len(x) % 2 == 0 else 1)


def key_cases(bits):
    groups = np.concatenate([x.reshape(-1, GROUP) for _, x in inputs(64, bits)])  # as the values' are, a channel each
    groups = groups[:len(groups) // 64 * 64]
    x = groups.reshape(-1, 64, GROUP).swapaxes(1, 2).reshape(-1, 64)
    codes, decoded, scale, low = along(x, bits, keys=True)
    yield golden_schemes.case("the values' groups", x, GROUP, decoded, codes, [scale, low], heads=len(x) // GROUP)
    x = np.random.default_rng(5).standard_normal((2 * GROUP, 64)).astype(np.float32)
    codes, decoded, scale, low = along(x, bits, keys=True)
    yield golden_schemes.case("a block of two groups", x, GROUP, decoded, codes, [scale, low])
    yield golden_schemes.case("two blocks", x, GROUP, decoded, codes, [scale, low]) | {"block": GROUP}


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        x = np.random.default_rng(1).standard_normal((1 << 15, 128)).astype(np.float32)
        for bits in (4, 2):
            for keys in (True, False):
                decoded = along(x, bits, keys)[1].astype(np.float64)
                print(bits, keys, ((decoded - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {f"kivi-{bits}-{side}": {"source": "KIVI's new_pack.py at 876b4d2 in NumPy, in float16", "differing": 0, "tolerance": 0,
                                     "cases": list(key_cases(bits) if side == "keys" else value_cases(bits))}
             for bits in (4, 2) for side in ("keys", "values")}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
