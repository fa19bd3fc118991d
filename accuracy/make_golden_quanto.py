#!/usr/bin/env python3
"""Makes the golden files of the quanto schemes with optimum-quanto, as transformers calls it.

usage: make_golden_quanto.py [--check]

Without --check writes accuracy/golden/quanto*.json; with it, makes them anew and compares (golden_files.py).
quanto computes in the type of its input, so every case is made in three types, and numbers are kept bit for bit.
Packages: accuracy/requirements.txt.
"""

import sys
import types

import torch
from optimum.quanto.library.extensions.extension import get_extension
from transformers import LlamaConfig
from transformers.cache_utils import QuantizedCache, QuantoQuantizedLayer

import golden_files
from golden_files import numbers
from make_golden import cache_calls

# quanto compiles its unpack.cpp when it is first called; these are its lines, which need no compiler.
get_extension("quanto_cpp")._lib = types.SimpleNamespace(
    unpack=lambda packed, bits: torch.cat([packed >> i & (2**bits - 1) for i in range(0, 8, bits)]))

TYPES = ("float32", "float16", "bfloat16")


def raw(x):
    """The numbers of a tensor in its type, bit for bit, as one hexadecimal text."""
    digits = 2 * x.element_size()
    whole = x.reshape(-1).view({2: torch.int16, 4: torch.int32}[x.element_size()])
    return "".join(f"{i % 16**digits:0{digits}x}" for i in whole.tolist())


def stored_cases():
    """What QuantoQuantizedLayer stores: all codes, scales and shifts, and every 29th decoded number."""
    cases = []
    for case, (heads, tokens, head_dim, group) in enumerate(
            ((2, 3, 64, 64), (1, 7, 128, 64), (3, 1, 256, 64), (2, 5, 64, 32), (3, 2, 128, 128), (3, 17, 64, 64))):
        for kind in ("normal", "outliers", "constant", "tiny", "offset"):
            count, seed = heads * tokens * head_dim, 50 + case
            if count > 2048 and kind != "outliers":
                continue
            x = torch.from_numpy(numbers(count, seed, kind)).reshape(1, heads, tokens, head_dim)
            for bits in (4, 2):
                layer = QuantoQuantizedLayer(nbits=bits, q_group_size=group)
                for dtype in TYPES:
                    stored = layer._quantize(x.to(getattr(torch, dtype)), axis=0)
                    cases.append({"heads": heads, "tokens": tokens, "head_dim": head_dim, "group": group,
                                  "seed": seed, "kind": kind, "bits": bits, "dtype": dtype,
                                  "codes": "".join(f"{c:x}" for c in stored._data.unpack().reshape(-1).tolist()),
                                  "scale": raw(stored._scale), "shift": raw(stored._shift),
                                  "decoded": raw(layer._dequantize(stored).reshape(-1)[::29])})
    return cases


def cache_cases():
    heads, head_dim, residual = 2, 128, 4
    cases = []
    for bits in (4, 2):
        for dtype in TYPES:
            cache = QuantizedCache("quanto", LlamaConfig(num_hidden_layers=1), nbits=bits, axis_key=0, axis_value=0,
                                   q_group_size=64, residual_length=residual)
            cases.append({"bits": bits, "dtype": dtype, "heads": heads, "head_dim": head_dim, "residual": residual,
                          "calls": cache_calls(cache, heads, head_dim, getattr(torch, dtype), raw)})
    return cases


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    torch.set_num_threads(1)
    return golden_files.write_or_check({"quanto.json": stored_cases(), "quanto_cache.json": cache_cases()},
                                       check=arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
