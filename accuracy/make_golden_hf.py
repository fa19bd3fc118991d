#!/usr/bin/env python3
"""Makes the golden files of hqq's and quanto's schemes with NumPy, from the formulas of the packages that transformers calls.

usage: make_golden_hf.py [--check | --package]

Without a flag writes accuracy/golden/schemes/{int8,int4,int2}-hqq.json, {int4,int2}-hqq-kivi.json, {int4,int2}-quanto.json;
--check makes them anew and compares (golden_files.py). --package compares the codes that these formulas give with those
that the packages themselves gave (golden/hqq.json, golden/quanto.json). hqq 0.2.8's Quantizer.quantize, whose solver is
optimize_weights_proximal_legacy, is computed in float64, so that the order of sums does not count; quanto 0.2.7's
MaxOptimizer in float32. Packages: accuracy/requirements.txt.
"""

import json
import os
import sys

import numpy as np

import golden_files
import golden_schemes

F = np.float32


def hqq(x, bits, group, across):
    """Of x [heads, tokens, head_dim], encoded together: codes, decoded numbers. A group is `group` neighbours, or a column of
    all of x as `group` rows."""
    m, groups = 2**bits - 1, x.astype(np.float64).reshape((group, -1) if across else (-1, group))
    if across:
        groups = groups.T
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    s = np.where(high - low <= 1e-4, 1, np.minimum(m / np.where(high > low, high - low, 1), 2e4))
    z = -low * s
    best = 1e4
    for _ in range(20):
        q = np.clip(np.rint(groups * s + z), 0, m)
        difference = groups - (q - z) / s
        size = np.abs(difference)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(difference) * np.maximum(size - size**-0.3 / 10, 0)
        z = (q - (groups - shrunk) * s).mean(1, keepdims=True)
        if not size.mean() < best:
            break
        best = size.mean()
    q = np.clip(np.rint(groups * s + z), 0, m)
    decoded = (q.astype(F) - z.astype(np.float16).astype(F)) * (1 / s).astype(np.float16).astype(F)
    return [(a.T if across else a).reshape(x.shape) for a in (q.astype(np.uint8), decoded)]


def quanto(x, bits, group):
    """Codes, decoded numbers, fp16 scales and shifts, which the package keeps in the type of x."""
    m, groups = F(2**bits - 1), x.reshape(-1, group)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale, shift = (high - low) / m, -low + F(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        q = np.clip(np.nan_to_num(np.rint((groups + shift) / scale)), 0, m)  # 0 / 0 gives code 0
    scale, shift = scale.astype(np.float16), shift.astype(np.float16)
    return q.astype(np.uint8).reshape(x.shape), (scale.astype(F) * q - shift.astype(F)).reshape(x.shape), scale, shift


def cases_of_hqq(bits, across):
    steps = (np.arange(64) * 7 % 2**bits).astype(F)
    ties = [steps, -steps, steps + F(0.5) * (np.arange(64) % 5 == 2)]
    for head_dim in (64, 128):
        for what, x in golden_schemes.inputs(head_dim, 64, ties, seed=head_dim):
            if head_dim == 128 and what not in ("normal", "outliers"):
                continue
            if bits == 8 and what == "ties":  # they are as near as float32's rounding of z: both codes are right
                continue
            heads = 2 if len(x) % 2 == 0 else 1
            codes, decoded = hqq(x.reshape(heads, -1, head_dim), bits, 64, across)
            yield golden_schemes.case(what, x, 64, decoded, codes, heads=heads,
                                      token_bytes=head_dim * bits // 8 + head_dim // 64 * 4)


def cases_of_quanto(bits):
    middles = np.arange(2**bits - 1) + 0.5
    ties = [np.resize(np.concatenate([[0, 2**bits - 1], middles]), 64)]
    for head_dim in (64, 128):
        for what, x in golden_schemes.inputs(head_dim, 64, ties, seed=head_dim):
            if head_dim == 128 and what not in ("normal", "outliers"):
                continue
            codes, decoded, scale, shift = quanto(x, bits, 64)
            yield golden_schemes.case(what, x, 64, decoded, codes, [scale, shift], heads=2 if len(x) % 2 == 0 else 1,
                                      token_bytes=head_dim * bits // 8 + head_dim // 64 * 4)


def against_the_packages():
    for name in ("hqq", "quanto"):
        with open(os.path.join(golden_files.GOLDEN, name + ".json"), encoding="utf-8") as file:
            cases = [case for case in json.load(file) if case.get("dtype", "float32") == "float32"]
        total = differing = 0
        for case in cases:
            shape = case["heads"], case["tokens"], case["head_dim"]
            x = golden_files.numbers(int(np.prod(shape)), case["seed"], case["kind"]).reshape(shape)
            codes, *_ = (hqq(x, case["bits"], 64, case["axis"] == 0) if name == "hqq" else
                         quanto(x, case["bits"], case["group"]))
            width = 2 if case["bits"] == 8 else 1
            theirs = [int(case["codes"][i:i + width], 16) for i in range(0, len(case["codes"]), width)]
            total += len(theirs)
            differing += int((codes.reshape(-1)[::case.get("step", 1)] != theirs).sum())
        print(f"{name}: {differing} of {total} codes of {len(cases)} cases differ")
    return 0


def main(arguments):
    if arguments == ["--package"]:
        return against_the_packages()
    files = {}
    for bits, across in ((8, False), (4, False), (2, False), (4, True), (2, True)):
        files[f"int{bits}-hqq" + "-kivi" * across] = {"source": "hqq 0.2.8's solver in NumPy, float64", "differing": 0,
                                                      "tolerance": 0, "cases": list(cases_of_hqq(bits, across))}
    for bits in (4, 2):
        files[f"int{bits}-quanto"] = {"source": "optimum-quanto 0.2.7's MaxOptimizer in NumPy", "differing": 0, "tolerance": 0,
                                      "cases": list(cases_of_quanto(bits))}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
