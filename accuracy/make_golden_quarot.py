#!/usr/bin/env python3
"""Makes the golden files of quarot-4 and quarot-4-cuda with torch's float16 and float32, as QuaRot's own code has them.

usage: make_golden_quarot.py [--check | --nmse]

Without a flag writes accuracy/golden/schemes/quarot-4-{keys,values,cuda}.json; --check makes them anew and compares
(golden_files.py); --nmse prints the error on normal numbers. Inputs are float16's. A group of values without a range, which is
NaN in QuaRot, is taken with zero in it. Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np
import torch

import golden_schemes

MAXQ = torch.tensor(15)


def fake(x, per_group):
    """ActQuantizer of quant_utils.py, clip ratio 1, on x [tokens, channels] of float16: codes, scale, zero, decoded numbers.

    `per_group`: find_params_per_token_groupwise, in which all stays float16; else find_params, whose torch.zeros is float32.
    """
    def parameters(low, high):
        none = (low == 0) & (high == 0)
        low, high = low.clone(), high.clone()
        low[none], high[none] = -1, 1
        scale = (high - low) / MAXQ
        return scale, torch.round((0 - low) / scale)  # of a zero the sign says nothing

    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    zeros = torch.zeros(low.shape)
    if per_group:
        scale, zero = parameters(low, high)
        for wider in ((torch.minimum(low, zeros.half()), torch.maximum(high, zeros.half())), (zeros.half(), zeros.half())):
            lost = scale == 0
            scale, zero = (torch.where(lost, b, a) for a, b in zip((scale, zero), parameters(*wider)))
    else:
        scale, zero = parameters(torch.minimum(low, zeros), torch.maximum(high, zeros))
    q = torch.clamp(torch.round(x / scale) + zero, 0, MAXQ)
    kept = scale.half().to(scale.dtype)
    return q, scale.half(), zero.half(), kept * (q - zero)


def cuda(x):
    """asym_quantize_and_pack_i4 of kv_cache.py; decoded in float32."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / MAXQ
    zero = 0 - low  # of a zero the sign says nothing
    q = torch.clamp(torch.round((x + zero) / scale), 0, MAXQ)
    assert scale.dtype == zero.dtype == torch.float16
    return q, scale, zero, q.float() * scale.float() - zero.float()


KINDS = {"quarot-4-keys": lambda x: fake(x, per_group=False), "quarot-4-values": lambda x: fake(x, per_group=True),
         "quarot-4-cuda": cuda}


def made_by(kind, x):
    """x as float32 that float16 holds."""
    q, scale, zero, decoded = KINDS[kind](torch.from_numpy(x).half())
    return decoded.float().numpy(), q.to(torch.uint8).numpy(), [scale.numpy(), zero.numpy()]


def cases(kind):
    for head_dim in (64, 128):
        middles = np.resize(np.concatenate([[0, 15], np.arange(15) + 0.5]), head_dim)
        ties = [middles, middles - 3, middles * 4 + 8, -middles]
        for what, x in golden_schemes.inputs(head_dim, head_dim, ties, seed=head_dim):
            if head_dim == 64 or what in ("outliers", "zero, constant and nearly so"):
                x = x.astype(np.float16).astype(np.float32)
                decoded, codes, numbers = made_by(kind, x)
                yield golden_schemes.case(what, x, 0, decoded, codes, numbers, heads=2 if len(x) % 2 == 0 else 1)


def main(arguments):
    if arguments == ["--nmse"]:  # for the rows
        x = np.random.default_rng(1).standard_normal((1 << 15, 128)).astype(np.float32)
        for kind in KINDS:
            print(kind, ((made_by(kind, x)[0].astype(np.float64) - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
        return 0
    files = {kind: {"source": "QuaRot @5008669, its quantizers in torch 2.11.0 on a CPU", "differing": 0, "tolerance": 0,
                    "cases": list(cases(kind))} for kind in KINDS}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
