#!/usr/bin/env python3
"""Makes the golden files of what serving engines store, from their kernels' sources operation by operation in NumPy.

usage: make_golden_engines.py [--check | --nmse]

Without an option writes accuracy/golden/schemes/*.json of the schemes below; with --check, makes them anew and compares
(golden_files.py); with --nmse, prints each one's error on 4 million normal numbers, head_dim 128, which its row states.
Casts to 8-bit floats are torch's. The sources, whose device code cannot run on a CPU:

  vLLM 0.33.0       quant_utils.cuh (fp8), triton_reshape_and_cache_flash.py, int4_per_token_head.py,
                    nvfp4_kv_cache_kernels.cu
  FlashInfer 0.7.2  page.cuh, nvfp4_append_quantize_block
  LMDeploy 1263d5cd fill_kv_cache.py, _quant_int8 and _quant_int4 (Triton's types: triton/language/semantic.py 3.6.0)
  SGLang 0dae407b   kvfp4_tensor.py, FP4MXBlock16KVQuantizeUtil, in torch on float32

Packages: accuracy/requirements.txt.
"""

import sys

import numpy as np
import torch

import golden_schemes

F = np.float32
FP8 = {"e4m3": (torch.float8_e4m3fn, 448), "e5m2": (torch.float8_e5m2, 57344)}


def cast_fp8(y, name):
    """A saturating cast: torch's own does not saturate."""
    dtype, largest = FP8[name]
    cast = torch.from_numpy(np.clip(y, F(-largest), F(largest))).to(dtype)
    return cast.view(torch.uint8).numpy(), cast.float().numpy()


def fp8(name):
    def encode(x):
        codes, decoded = cast_fp8(x, name)
        return codes, [], decoded
    return encode


def scale_of(x, largest):
    return np.maximum(np.abs(x).max(1, keepdims=True) / F(largest), F(1e-6))


def int8_token(rounds):
    def encode(x):
        s = scale_of(x, 127)
        y = x * (F(1) / s)
        if rounds:
            y = np.where(y >= 0, y + F(0.5), y - F(0.5))
        q = np.clip(y, F(-128), F(127)).astype(np.int8)  # truncates
        return (q.astype(np.int32) + 128).astype(np.uint8), [s], q.astype(F) * s
    return encode


def fp8_token(x):
    s = scale_of(x, 448)
    codes, numbers = cast_fp8(x * (F(1) / s), "e4m3")
    return codes, [s], numbers * s


def int4_token(x):
    def rounded(v):
        return np.clip(np.where(v >= 0, v + F(0.5), v - F(0.5)).astype(np.int64).astype(F), F(0), F(15))

    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    s = np.maximum((high - low) / F(15), F(1e-6))
    zero = rounded(-low / s)
    q = rounded(x * (F(1) / s) + zero)
    bits = s.view(np.int32) & np.int32(-16)
    return q.astype(np.uint8), [bits | zero.astype(np.int32)], (q - zero) * bits.view(F)


def lmdeploy(bits):
    def encode(x):
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        difference = high - low
        if bits == 8:
            difference = difference.astype(np.float16).astype(F)  # of fp16 states
        s = difference / F(2**bits - 1)
        z = (F(0) - low) / s  # as Triton negates
        with np.errstate(invalid="ignore"):
            v = x / s + z + F(0.5)
            # The scheme's own: in LMDeploy such a token's numbers are not finite.
            constant = ~(np.abs(z.astype(np.float16)) <= 65504)
            assert (constant | ((v >= 0) & (v < 2**bits))).all()
            q = np.where(constant, 0, v).astype(np.uint8)
        s, z = np.where(constant, F(1), s), np.where(constant, F(0) - low, z)
        s, z = s.astype(np.float16), z.astype(np.float16)
        return q, [s, z], (q.astype(F) - z.astype(F)) * s.astype(F)
    return encode


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F)


def cast_e2m1(y):
    v = np.abs(y)
    code = np.select([~(v > F(0.25)), v < F(0.75), v <= F(1.25), v < F(1.75), v <= F(2.5), v < F(3.5), v <= F(5)],
                     range(7), 7).astype(np.uint8)
    return np.where(np.signbit(y), np.uint8(8), np.uint8(0)) | code


def nvfp4_candidate(x, most):
    code, s = cast_fp8(np.abs(x).max(1, keepdims=True) / F(most), "e4m3")
    return code, s, np.where(s > 0, F(1) / s, F(0))


def nvfp4(x):
    code, s, inverse = nvfp4_candidate(x, 6)
    codes = cast_e2m1(x * inverse)
    return codes, [code], E2M1[codes] * s


def nvfp4_4over6(x):
    def error(inverse):
        s = np.where(inverse != 0, F(1) / inverse, F(0))
        difference = E2M1[cast_e2m1(x * inverse)] * s - x
        total = np.zeros((len(x), 1), F)
        for i in range(0, x.shape[1], 2):
            a, b = difference[:, i:i + 1], difference[:, i + 1:i + 2]
            total = total + (a * a + b * b)
        return total

    code6, s6, inverse6 = nvfp4_candidate(x, 6)
    code4, s4, inverse4 = nvfp4_candidate(x, 4)
    four = error(inverse4) < error(inverse6)
    codes = cast_e2m1(x * np.where(four, inverse4, inverse6))
    return codes, [np.where(four, code4, code6)], E2M1[codes] * np.where(four, s4, s6)


def sglang_fp4(x):
    x = torch.from_numpy(x)
    largest = x.abs().max(dim=-1, keepdim=True).values
    exponent = torch.ceil(torch.log2(torch.clamp(largest / 6.0, min=1e-10)))
    scaled = x / torch.exp2(exponent)
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    numbers = torch.sum(scaled.abs().unsqueeze(-1) >= bounds, dim=-1)
    codes = ((scaled < 0).to(torch.uint8) << 3) + numbers.to(torch.uint8)
    decoded = torch.from_numpy(E2M1)[codes.long()] * torch.exp2(exponent)
    return codes.numpy(), [(exponent + 127).to(torch.uint8).numpy()], decoded.numpy()


def middles(numbers):
    numbers = np.asarray(numbers, F)
    return (numbers[1:] + numbers[:-1]) / 2


def with_ends(ends, ties, group):
    """Groups that begin with `ends` and have all ties."""
    room = group - len(ends)
    ties = np.concatenate([ties, np.full(-len(ties) % room, ties[0], F)])
    return np.concatenate([np.tile(np.asarray(ends, F), (len(ties) // room, 1)), ties.reshape(-1, room)], axis=1)


def fp8_ties(name, largest):
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8[name][0]).float().numpy()
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = middles(numbers[np.abs(numbers) <= largest])
    return ties[np.abs(ties) < 3e4]


E2M1_TIES = middles(np.unique(E2M1))

# Of each scheme: the group (0: the whole token), its bits, the encoder, and groups of ties.
SCHEMES = {
    "fp8-e4m3": (0, fp8("e4m3"), lambda n: with_ends([448, 463.9, 464, 470, 500], fp8_ties("e4m3", 448), n)),
    "fp8-e5m2": (0, fp8("e5m2"), lambda n: with_ends([0], fp8_ties("e5m2", 57344), n)),
    "fp8-e4m3-token": (0, fp8_token, lambda n: with_ends([448], fp8_ties("e4m3", 448), n)),
    "int8-token": (0, int8_token(rounds=True), lambda n: with_ends([127], np.arange(-126.5, 127), n)),
    "int8-token-truncated": (0, int8_token(rounds=False), lambda n: with_ends([127], np.arange(-126, 127), n)),
    "int4-token": (0, int4_token, lambda n: np.concatenate([
        with_ends([-7, 8], np.arange(-6.5, 8), n), with_ends([-7.5, 7.5], np.arange(-7, 8), n),
        with_ends([3, 18], np.arange(3.5, 18), n), with_ends([-18, -3], np.arange(-17.5, -3), n)])),
    "lmdeploy-8": (0, lmdeploy(8), lambda n: with_ends([-127, 128], np.arange(-126.5, 128), n)),
    "lmdeploy-4": (0, lmdeploy(4), lambda n: with_ends([-7, 8], np.arange(-6.5, 8), n)),
    "nvfp4": (16, nvfp4, lambda n: np.concatenate([with_ends([6], E2M1_TIES, n),
                                                   with_ends([0], 6 * fp8_ties("e4m3", 448)[127:], n)])),
    "nvfp4-4over6": (16, nvfp4_4over6, lambda n: np.concatenate([with_ends([6], E2M1_TIES, n),
                                                                 with_ends([4], E2M1_TIES, n)])),
    "sglang-fp4": (16, sglang_fp4, lambda n: with_ends([6], E2M1_TIES, n)),
}
SOURCES = {"fp8": "vLLM 0.33.0, quant_utils.cuh", "int": "vLLM 0.33.0, per_token_head",
           "lmd": "LMDeploy 1263d5cd, fill_kv_cache.py", "sgl": "SGLang 0dae407b, kvfp4_tensor.py",
           "nvf": "FlashInfer 0.7.2.post1, page.cuh; vLLM 0.33.0, nvfp4_kv_cache_kernels.cu"}


def cases(name):
    group, encode, ties = SCHEMES[name]
    for head_dim in (64, 128):
        n = group or head_dim
        for what, x in golden_schemes.inputs(head_dim, n, ties(n), seed=head_dim):
            if head_dim == 128 and what not in ("outliers", "zero, constant and nearly so"):
                continue
            codes, numbers, decoded = encode(np.ascontiguousarray(x.reshape(-1, n)))
            assert np.isfinite(decoded).all(), (name, what)
            yield golden_schemes.case(what, x, group, decoded, codes, numbers, heads=2 if len(x) % 2 == 0 else 1)


def nmse(name):
    x = np.random.default_rng(1).standard_normal((2**22 // 128, 128)).astype(F)
    x = x.reshape(-1, SCHEMES[name][0] or 128)
    decoded = SCHEMES[name][1](x)[2].astype(np.float64)
    return np.square(decoded - x).sum() / np.square(x.astype(np.float64)).sum()


def main(arguments):
    np.seterr(divide="ignore", over="ignore", invalid="ignore")
    if arguments == ["--nmse"]:
        for name in SCHEMES:
            print(f"{name} {nmse(name):.4g}")
        return 0
    files = {name: {"source": SOURCES[name[:3]] + ", in NumPy; casts to float8: torch 2.11.0", "differing": 0,
                    "tolerance": 0, "cases": list(cases(name))} for name in SCHEMES}
    return golden_schemes.main(files, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
