"""What the generators of golden files share: seeded inputs, short numbers, writing or comparing."""

import contextlib
import json
import os
import tempfile

import numpy as np

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def numbers(count, seed, kind):
    """The inputs, from integer arithmetic alone, so that C++ makes the same (golden_inputs in the tests).

    A 64-bit linear congruential generator; the sum of four uniform 16-bit numbers is close to normal.
    """
    state = (seed * 0x9E3779B97F4A7C15 + 1) % 2**64
    out = np.empty(count, dtype=np.float32)
    for i in range(count):
        total = 0
        for _ in range(4):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            total += state >> 48
        out[i] = np.float32((total - 131070) / np.float32(37837.0))
    if kind == "outliers":  # one channel in 16 is 8 times larger, and shifted
        out[::16] = out[::16] * np.float32(8) + np.float32(4)
    elif kind == "constant":
        out[: count // 2] = np.float32(0.75)
    elif kind == "tiny":
        out = out * np.float32(1e-5)
    elif kind == "offset":
        out = out + np.float32(20)
    elif kind == "ties":  # from 0 to 105 by halves of 7: a group's 4-bit and 2-bit steps are 7 and 35
        out = np.float32(3.5) * (np.arange(count) * 6 % 31).astype(np.float32)
    elif kind == "bfloat16":
        bits = out.view(np.uint32)  # rounded to the nearest, ties to even
        out = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return out


def short(x):
    """A float32 as the shortest decimal number that reads back as it."""
    return float(np.format_float_positional(np.float32(x), unique=True, trim="0"))


def close(a, b, path=""):
    """First difference of two golden values, or None."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((d for k in a if (d := close(a[k], b[k], f"{path}/{k}"))), None)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        if a and all(isinstance(x, float) for x in a + b):
            bound = 1e-5 * max(map(abs, a))
            return next((f"{path}/{i}: {x} and {y}" for i, (x, y) in enumerate(zip(a, b))
                         if abs(x - y) > bound), None)
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := close(x, y, f"{path}/{i}"))), None)
    return None if a == b else f"{path}: {str(a)[:80]} and {str(b)[:80]}"


@contextlib.contextmanager
def folder(check):
    """Where to write: accuracy/golden, or with `check` a folder that is thrown away."""
    if not check:
        yield GOLDEN
    else:
        with tempfile.TemporaryDirectory() as thrown_away:
            yield thrown_away


def write_or_check(made, check):
    """Writes {file name: value} to accuracy/golden, or compares with what is there; the exit code.

    Whole numbers and texts must be equal, other numbers within 1e-5 of the largest in their list (another
    machine's sums).
    """
    failed = 0
    for name, value in made.items():
        path = os.path.join(GOLDEN, name)
        if not check:
            with open(path, "w", encoding="utf-8") as out:
                json.dump(value, out, ensure_ascii=True, separators=(",", ":"))
                out.write("\n")
            continue
        with open(path, encoding="utf-8") as file:
            difference = close(json.load(file), json.loads(json.dumps(value)))
        print(f"{name}: {'equal' if difference is None else 'differs at ' + difference}")
        failed += difference is not None
    return 1 if failed else 0
