#!/usr/bin/python3
"""Gives datasets/gguf_to_hf.py broken GGUF files.

usage: fuzz_gguf.py [--inputs N] [--seed S] [FILE...]     (default: 1000 inputs, seed 1)

Small sound files (accuracy/test_datasets.py writes them), with bytes, numbers, counts, offsets and types changed at random
places, cut off, shifted, of another byte order, or with metadata of another kind. Whatever the bytes are, the converter
makes a whole directory, or says in one line what is wrong, ends with exit code 2 and leaves nothing: a traceback, 10 s
for one file, or 200 MB for one is a finding, which stays in build/fuzz/gguf-*. Exit code 1 then. FILEs are tried as
they are, in place of changed ones. All in one process.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unittest.mock

import test_datasets
from test_datasets import gguf, gguf_to_hf, np, with_value, without, write_gguf

FOUND = os.path.join(os.path.dirname(test_datasets.HERE), "build", "fuzz")
SECONDS, GROWTH, LIMIT = 10, 200 << 20, 3 << 30  # of one input; of the process's memory; of its addresses
NUMBERS = [0, 1, 2, 3, 7, 8, 9, 12, 31, 32, 127, 128, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
VALUES = [None, True, 0, 1, 2, 3, 40000, -1, 0.0, -1.5, float("nan"), float("inf"), 1e-30, 1e11, "", "llama", "gpt2", "yarn",
          "\0", "\u2581", [1], [1, 2, 3], [-1, -1], [0.5], ["a"], ["a", "a"], ["a b", "b"], [True, False]]


class Hang(BaseException):
    """That nobody catches as a broken file."""


def hang(*_):
    raise Hang(f"{SECONDS} s")


def sentencepiece(architecture):
    def change(writer):
        for key in ("model", "pre", "tokens", "token_type", "merges"):
            writer.kv_data[0].pop("tokenizer.ggml." + key)
        count = test_datasets.VOCAB
        writer.add_tokenizer_model("llama")
        writer.add_token_list((["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"] + [f"<0x{i:02X}>" for i in range(count)])[:count])
        writer.add_token_types(([2, 3, 3, 1, 1, 1] + [6] * count)[:count])
        writer.add_token_scores([-float(i) for i in range(count)])
        if architecture == "gemma3":
            writer.add_sliding_window(8)
            for name in ("attn_q_norm", "attn_k_norm"):
                writer.add_tensor(f"blk.0.{name}.weight", np.ones(test_datasets.HIDDEN // test_datasets.HEADS, np.float32))
            for name in ("post_attention_norm", "post_ffw_norm"):
                writer.add_tensor(f"blk.0.{name}.weight", np.ones(test_datasets.HIDDEN, np.float32))
    return change


def llama3(writer):
    pairs = test_datasets.HIDDEN // test_datasets.HEADS // 2
    share = np.clip((1024 / (2 * np.pi * 10000 ** (np.arange(pairs) / pairs)) - 1) / 3, 0, 1)
    writer.add_tensor("rope_freqs.weight", (1 / ((1 - share) / 8 + share)).astype(np.float32))


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def both(one, other):
    return lambda writer: (one(writer), other(writer))


KINDS = [  # of sound files
    {}, {"kind": gguf.GGMLQuantizationType.Q4_0}, {"kind": gguf.GGMLQuantizationType.BF16, "tied": False},
    {"change": yarn}, {"change": llama3}, {"change": sentencepiece("llama")},
    {"architecture": "gemma3", "change": sentencepiece("gemma3")}, {"endianess": gguf.GGUFEndian.BIG},
]


def make(path, **options):
    write_gguf(path, **options)
    with open(path, "rb") as file:
        return file.read()


class Seed:
    """A sound file, and where its numbers are."""

    def __init__(self, path, options):
        self.options = options
        self.data = make(path, **options)
        reader = gguf.GGUFReader(path)
        self.keys = [key for key in reader.fields if not key.startswith("GGUF.")]
        self.header = reader.data_offset
        self.places = [8, 16]
        for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
            at = field.offset
            for part in field.parts:
                self.places.append(at)
                at += part.nbytes


def changed_metadata(seed, path, rng):
    """Sound as a file, but what it says."""
    key = rng.choice(seed.keys)
    value = rng.choice(VALUES)
    change = without(key) if value is None else with_value(
        key, value, rng.choice([None, None, None, *gguf.GGUFValueType]) if isinstance(value, (int, float)) else None)
    try:
        return make(path, **{**seed.options, "change": both(seed.options.get("change", lambda _: None), change)})
    except (struct.error, ValueError, TypeError, KeyError, IndexError, OverflowError):
        return seed.data  # the writer does not take that number as that type


def mutated(seed, path, rng):
    data = bytearray(changed_metadata(seed, path, rng) if rng.random() < 0.2 else seed.data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        end = min(len(data), seed.header if rng.random() < 0.9 else len(data))
        if end < 24:
            break
        kind = rng.randrange(8)
        at = rng.randrange(end)
        if kind == 0:  # bytes
            for _ in range(rng.choice([1, 1, 2, 8])):
                data[rng.randrange(end)] = rng.randrange(256)
        elif kind == 1:  # bits
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:  # a number where there is one
            at = rng.choice(seed.places)
            number = rng.choice(NUMBERS) if rng.random() < 0.8 else len(data) + rng.randrange(-64, 65)
            width = rng.choice([4, 8])
            data[at:at + width] = (number % (1 << 8 * width)).to_bytes(width, rng.choice(["little", "little", "big"]))
        elif kind == 3:  # a type, or a small count
            at = rng.choice(seed.places)
            data[at:at + 4] = rng.randrange(40).to_bytes(4, "little")
        elif kind == 4:  # cut off
            del data[rng.randrange(len(data)):]
        elif kind == 5:  # bytes too many, or too few
            if rng.random() < 0.5:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 8, 32]))
            else:
                del data[at:at + rng.choice([1, 4, 8, 32])]
        elif kind == 6:  # one part twice
            other, length = rng.randrange(end), rng.randrange(1, 64)
            data[at:at + length] = data[other:other + length]
        else:  # the other byte order
            at = rng.choice(seed.places)
            data[at:at + 4] = data[at:at + 4][::-1]
    return bytes(data)


def check(folder, path):
    """Converts the file; what is wrong with the outcome, or None, and the exit code."""
    out, errors = os.path.join(folder, "out"), io.StringIO()
    with unittest.mock.patch.object(sys, "argv", ["gguf_to_hf.py", path, out]), contextlib.redirect_stderr(errors):
        code = gguf_to_hf.main()
    said, there = errors.getvalue(), sorted(os.listdir(folder))
    if code == 0:
        files = sorted(os.listdir(out))
        with open(os.path.join(out, "model.safetensors"), "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if os.path.getsize(os.path.join(out, "model.safetensors")) != 8 + size + end:
            return "model.safetensors is not as long as its header says", code
        shutil.rmtree(out)
        if said or there != ["m.gguf", "out"] or len(files) != 4 or files[:2] != ["config.json", "model.safetensors"]:
            return f"exit code 0, stderr {said!r}, left {there}, of them {files}", code
    elif code != 2 or said.count("\n") != 1 or not said.startswith(f"gguf_to_hf.py: {path}: ") or there != ["m.gguf"]:
        return f"exit code {code}, stderr {said!r}, left {there}", code
    elif "MemoryError" in said or "memory does not hold" in said:
        return f"memory for a file of {os.path.getsize(path)} bytes: {said}", code
    return None, code


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    signal.signal(signal.SIGALRM, hang)
    rng = random.Random(arguments.seed)
    folder = tempfile.mkdtemp()
    path, scratch = os.path.join(folder, "in", "m.gguf"), os.path.join(folder, "seed.gguf")
    os.makedirs(os.path.dirname(path))
    codes, findings, begin, slowest = {}, 0, time.monotonic(), 0.0
    with unittest.mock.patch.multiple(test_datasets, HIDDEN=32, FF=32, VOCAB=14):
        seeds = [Seed(scratch, options) for options in KINDS]
        inputs = arguments.files or range(len(seeds) + arguments.inputs)
        for number in inputs:
            if arguments.files:
                with open(number, "rb") as file:
                    data = file.read()
            else:  # the sound ones first
                data = seeds[number].data if number < len(seeds) else mutated(rng.choice(seeds), scratch, rng)
            with open(path, "wb") as file:
                file.write(data)
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                wrong, code = check(os.path.dirname(path), path)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (Exception, Hang):
                signal.setitimer(signal.ITIMER_REAL, 0)
                wrong, code = traceback.format_exc(), None
            slowest = max(slowest, time.monotonic() - start)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
            if grown > GROWTH and not wrong:
                wrong = f"{grown >> 20} MiB for a file of {len(data)} bytes"
            if not arguments.files and number < len(seeds) and code != (2 if number == len(seeds) - 1 else 0):
                wrong = wrong or f"a sound file, but exit code {code}"
            codes[code] = codes.get(code, 0) + 1
            if wrong:
                findings += 1
                os.makedirs(FOUND, exist_ok=True)
                kept = number if arguments.files else os.path.join(FOUND, f"gguf-{arguments.seed}-{number}")
                with open(kept, "wb") as file:
                    file.write(data)
                print(f"{kept}: {wrong}", file=sys.stderr)
                for left in os.listdir(os.path.dirname(path)):
                    if left != "m.gguf":
                        shutil.rmtree(os.path.join(os.path.dirname(path), left))
                if findings == 20:
                    break
    shutil.rmtree(folder)
    seconds = time.monotonic() - begin
    print(f"{sum(codes.values())} files in {seconds:.0f} s ({sum(codes.values()) / seconds:.0f} a second, {slowest:.2f} s the "
          f"slowest): {codes.get(0, 0)} converted, {codes.get(2, 0)} refused, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
