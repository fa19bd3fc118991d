"""What the generators of accuracy/golden/schemes/*.json share: the inputs, and the file (accuracy/contract.h reads it)."""

import json
import os
import sys

import numpy as np

import golden_files

VECTORS = 4  # tokens of most cases


def hexadecimal(x, dtype=np.float32):
    """The bytes of little-endian numbers."""
    return np.ascontiguousarray(x, dtype=np.dtype(dtype).newbyteorder("<")).tobytes().hex()


def inputs(head_dim, group, ties, largest=3e4, seed=11):
    """(what, x [tokens, head_dim]) that a scheme is tried on.

    `ties`: [n, group] numbers of which many lie in the middle between two codes, of its own formula.
    `largest`: magnitude up to which everything has to stay finite.
    """
    rng = np.random.default_rng(seed)

    def normal(scale=1.0, shift=0.0, tokens=VECTORS):
        return (rng.standard_normal((tokens, head_dim)) * scale + shift).astype(np.float32)

    yield "normal", normal(tokens=8)
    yield "small", normal(0.02)
    yield "large", normal(40)
    outliers = normal()
    outliers[:, ::16] = outliers[:, ::16] * 8 + 4
    yield "outliers", outliers
    yield "float16", normal().astype(np.float16).astype(np.float32)
    yield "all positive", np.abs(normal(1, 0.5)) + np.float32(0.1)
    yield "all negative", -np.abs(normal(1, 0.5)) - np.float32(0.1)
    yield "one scale a group", (normal() * np.exp2(rng.integers(-8, 8, (VECTORS, head_dim // group))).repeat(group, 1)).astype(np.float32)
    extremes = np.clip(normal(largest / 3), -largest, largest).astype(np.float32)
    extremes[0, 0], extremes[1, group - 1] = largest, -largest
    yield "extremes", extremes
    yield "tiny", normal(1e-5)
    unusual = normal(tokens=8)
    unusual[0] = 0
    unusual[1, :group] = 0
    unusual[2, -group:] = -0.0
    unusual[3], unusual[4] = 0.75, -3
    unusual[5] = np.where(np.arange(head_dim) % group == 5, np.float32(-2), np.float32(0))
    unusual[6] = np.where(np.arange(head_dim) % 2, np.float32(1.5), np.float32(-1.5))  # magnitudes tie
    unusual[7, 1::2] = 0
    yield "zero, constant and nearly so", unusual
    ties = np.asarray(ties, dtype=np.float32).reshape(-1, group)
    repeats = -(-head_dim // group * VECTORS // len(ties))
    ties = np.concatenate([ties * np.float32(2.0**i) for i in range(-repeats, 0)])  # by powers of two: they stay ties
    yield "ties", ties[:len(ties) * group // head_dim * head_dim // group].reshape(-1, head_dim)


def case(what, x, group, decoded, codes=None, numbers=None, heads=1, token_bytes=None):
    """x and decoded [tokens, head_dim]; codes likewise; numbers: an array for each plane of metadata."""
    made = {"what": what, "shape": [1, heads, len(x) // heads, x.shape[1]], "group": group,
            "x": hexadecimal(x), "decoded": hexadecimal(decoded)}
    if token_bytes is not None:
        made["bytes"] = token_bytes
    if codes is not None:
        made["codes"] = hexadecimal(codes, np.uint8)
    if numbers is not None:
        made["numbers"] = [np.ascontiguousarray(n).tobytes().hex() for n in numbers]
    return made


def main(files, arguments, usage):
    """files: {scheme: {"source": ..., "differing": 0, "tolerance": 0, "cases": [...]}}."""
    if arguments not in ([], ["--check"]):
        print(usage.strip())
        return 2
    os.makedirs(os.path.join(golden_files.GOLDEN, "schemes"), exist_ok=True)
    return golden_files.write_or_check({f"schemes/{name}.json": value for name, value in files.items()},
                                       check=arguments == ["--check"])
