#!/usr/bin/env python3
"""Makes the golden files of the OCP MX schemes with torchao's to_mx.

usage: make_golden_mx.py [--check | --nmse]

Without an option writes accuracy/golden/schemes/{mxfp4,mxfp4-rceil,mxfp4-even,mxfp8,mxfp8-rceil}.json; with --check,
makes them anew and compares (golden_files.py); with --nmse, prints each one's error on 4 million normal numbers, which
its row states. gguf's MXFP4 has to give mxfp4's numbers wherever there is no tie. Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

import golden_schemes

GROUP = 32
E2M1, E4M3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
SCHEMES = {"mxfp4": (E2M1, ScaleCalculationMode.FLOOR), "mxfp4-rceil": (E2M1, ScaleCalculationMode.RCEIL),
           "mxfp4-even": (E2M1, ScaleCalculationMode.EVEN),
           "mxfp8": (E4M3, ScaleCalculationMode.FLOOR), "mxfp8-rceil": (E4M3, ScaleCalculationMode.RCEIL)}


def encode(name, x):
    element, mode = SCHEMES[name]
    scale, data = to_mx(torch.from_numpy(x), element, GROUP, mode)
    decoded = to_dtype(data, scale, element, GROUP, torch.float32).numpy()
    codes = unpack_uint4(data) if element == E2M1 else data.view(torch.uint8)
    return codes.numpy(), [scale.view(torch.uint8).numpy()], decoded


def check_against_gguf(x, decoded):
    kind = GGMLQuantizationType.MXFP4
    theirs = dequantize(quantize(x, kind), kind)
    tied = np.abs(np.abs(theirs - x) - np.abs(decoded - x)) < 1e-30  # both are as near
    assert ((theirs == decoded) | tied).all()
    assert (theirs == decoded).mean() > 0.5


def ties(name):
    """Groups whose scale is 1 by OCP's rule, with all middles between two numbers."""
    if SCHEMES[name][0] == E2M1:
        numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    else:
        numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float().numpy()
    middles = (numbers[1:] + numbers[:-1]) / 2
    middles = np.concatenate([middles, -middles])
    middles = np.concatenate([middles, np.full(-len(middles) % (GROUP - 1), middles[0], np.float32)])
    middles = middles.reshape(-1, GROUP - 1)
    return np.concatenate([np.full((len(middles), 1), numbers[-1]), middles], axis=1)


def cases(name):
    for head_dim in (64, 128):
        for what, x in golden_schemes.inputs(head_dim, GROUP, ties(name), seed=head_dim):
            if head_dim == 128 and what not in ("outliers", "zero, constant and nearly so"):
                continue
            x = np.ascontiguousarray(x)
            codes, numbers, decoded = encode(name, x)
            if name == "mxfp4":
                check_against_gguf(x, decoded)
            yield golden_schemes.case(what, x, GROUP, decoded, codes, numbers, heads=2 if len(x) % 2 == 0 else 1)


def nmse(name):
    x = np.random.default_rng(1).standard_normal((2**22 // 128, 128)).astype(np.float32)
    decoded = encode(name, x)[2].astype(np.float64)
    return np.square(decoded - x).sum() / np.square(x.astype(np.float64)).sum()


def main(arguments):
    if arguments == ["--nmse"]:
        for name in SCHEMES:
            print(f"{name} {nmse(name):.4g}")
        return 0
    files = {name: {"source": f"torchao 0.18.0, to_mx {SCHEMES[name][1].name}", "differing": 0, "tolerance": 0,
                    "cases": list(cases(name))} for name in SCHEMES}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
