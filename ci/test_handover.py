#!/usr/bin/python3
"""Tests of ci/handover and ci/engines: what is written for each engine, read back by the parser of its format, says what
the projection says, and whatever it says otherwise than was asked has its sentence. The nearest setting is held against all
settings of a small model. Transformers, MlxLm: where the environments of ci/live-parity are at hand, the packages
themselves load and run what was written, beside kvqserve."""

import bisect
import contextlib
import dataclasses
import glob
import itertools
import json
import os
import random
import re
import shlex
import struct
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import yaml

import handover
from engine import OWN_GROUP, SCALES_GIVEN, SCALES_OF_ONE, Score, neutral, turned
from handover import ENGINES
from specs import NONE, SIDES, Frame, Table, encodes, write_spec
import testing
from testing import CACHE, ROOT

PYTHON, MLX_PYTHON = (os.path.join(CACHE, venv, "bin", "python") for venv in ("parity-venv", "mlx-venv"))
MODEL = os.path.join(CACHE, "models", "smollm2-135m")
# mlx's wheel multiplies dense matrices by the reference's BLAS, whose sgemm_ takes fifty times as long as libtorch's, the build's own.
TORCH = sorted(glob.glob(os.path.join(CACHE, "libtorch-*", "lib", "libtorch_cpu.so")))[-1:]
SERVER = os.environ.get("KVQ_SERVE_EXE", os.path.join(ROOT, "build", "release", "kvqserve"))
command = testing.load("handover")

SPECS = ("none", "llamacpp-q4_0", "llamacpp-q8_0-q4_0-unrotated", "vllm-fp8", "vllm-turboquant-4bit-nc", "trtllm-nvfp4",
         "sglang-fp4-e2m1", "lmdeploy-int8", "mlx-lm-4", "hf-hqq-2", "kivi-2", "exl3-6+exl3-3@residual=0",
         "q8_0@residual=0@rotate=hadamard@layers=0-2:none@layers=28-29:q6_0+q5_1",
         "fp8-e4m3@residual=0@layers=3-3:none@layers=11-12:none", "int8-hqq+int4-hqq@residual=64@layers=0-1:none",
         "int4-hqq@policy=hf@group=32@layers=3-5:int8-hqq@layers=9:int2-hqq-kivi@layers=20-20:none",
         "int8-hqq+int2-hqq@policy=hf@layers=4-9:int4-hqq+int8-hqq", "mlx-8@residual=0@layers=5-20:mlx-4",
         "int4-hqq@sinks=4@residual=64+32@rotate=signs+hadamard:32@prefill=raw", "none+q8_0@residual=0", "nvfp4@dense=1+2",
         "q4_0@residual=0@window-cache=window@layers=0-2:none")
LOADED = []


def table():
    """Of SmolLM2, from kvqbench; read once."""
    if not LOADED:
        LOADED.append(handover.load("smollm2-135m", SPECS))
    return LOADED[0]


def project(engine, spec, **how):
    assignment, frame = handover.parse_spec(spec, table().layers, table().presets)
    return ENGINES[engine].project(assignment, frame, table(), **how)


def named(lost):
    """(layer, side): (planned, stored) of the sentences on layers."""
    found = {}
    for sentence in lost:
        said = re.match(r"layers? ([\d, -]+): planned (\S+) (keys|values), the engine stores (\S+) (keys|values)$", sentence)
        for part in said[1].split(", ") if said else ():
            first, _, last = part.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                found[layer, SIDES.index(said[3])] = said[2], said[4]
    return found


# A sentence of each thing that two frames differ in.
OF_FRAME = {"policy": r"that is policy \w+, not ", "sinks": "no sinks", "prefill": "^a prompt's own attention reads (the originals|what is stored), not ",
            "group": "groups of .* were planned", "window_cache": "keeps is not handed over"}


class Specs(unittest.TestCase):
    def test_what_is_written_is_read_back(self):
        for spec in SPECS:
            assignment, frame = handover.parse_spec(spec, 30, table().presets)
            again, of_it = handover.parse_spec(write_spec(assignment, frame), 30)
            self.assertEqual(again, assignment, spec)
            self.assertEqual(neutral(of_it, encodes(assignment)),
                             neutral(frame, encodes(assignment)), spec)

    def test_kvqbench_counts_the_bits_of_what_is_written(self):
        chance, written = random.Random(1), {}
        schemes = [[scheme for at, scheme in sorted(table().bits) if at == side and not re.search("hqq|quanto|kivi", scheme)] for side in (0, 1)]
        for _ in range(12):
            few = [tuple(map(chance.choice, schemes)) for _ in range(3)]
            assignment = [chance.choice(few) for _ in range(table().layers)]
            spec = write_spec(assignment, Frame(residual=(0, 0)))
            written[spec] = sum(map(table().size, assignment)) / 2 / table().layers
        cells = json.loads(handover.kvqbench("--benchmark_filter=^kv_size/", "--benchmark_format=json", "--contexts=256",
                                             "--schemes=" + ",".join(written)))["benchmarks"]
        self.assertEqual(len(cells), len(written))
        for cell in cells:
            spec = cell["name"].split("/ctx:")[0].rsplit("/", 1)[1]
            self.assertAlmostEqual(cell["bits_per_element"], written[spec], 6, spec)

    def test_what_kvqbench_would_refuse_is_refused(self):
        for spec, line in (("q4_0@layers=28-30:none", "layers 28-30, but the cache has layers 0-29"), ("q4_0@layers=3", "FIRST-LAST"),
                           ("q4_0@colour=red", "no key 'colour'"), ("q4_0@residual=many", "a whole number"), ("q4_0@sinks", "@key=value")):
            with self.assertRaisesRegex(handover.Refused, line):
                handover.parse_spec(spec, 30)


class HandOver(unittest.TestCase):
    def test_every_engine_takes_every_spec(self):
        for engine, spec in itertools.product(ENGINES, SPECS):
            with self.subTest(engine=engine, spec=spec):
                asked, frame = handover.parse_spec(spec, 30, table().presets)
                made = project(engine, spec)
                self.agrees(ENGINES[engine], asked, frame, made)

    def agrees(self, engine, asked, frame, made):
        """Nothing lost silently."""
        frame = dataclasses.replace(frame, group=0) if frame.group == OWN_GROUP else frame
        self.assertEqual(engine.read(made.flags, made.files, table(), made.environment), (made.assignment, made.frame))
        again, of_it = handover.parse_spec(made.spec, len(asked))
        self.assertEqual(again, made.assignment)
        self.assertEqual(neutral(of_it, encodes(again)), made.frame)
        different = {(layer, side): (asked[layer][side], made.assignment[layer][side]) for layer in range(len(asked)) for side in (0, 1)
                     if asked[layer][side] != made.assignment[layer][side]}
        self.assertEqual(named(made.lost), different)
        both = [a and b for a, b in zip(encodes(asked), encodes(made.assignment), strict=True)]
        same = not different
        for key, pattern in OF_FRAME.items():
            differs = any(both) and getattr(frame, key) != getattr(made.frame, key)
            same = same and not differs
            self.assertEqual(any(re.search(pattern, sentence) for sentence in made.lost), differs, (key, made.lost))
        for side, name in enumerate(SIDES):
            turns = [turned(of.rotate[side], 64) for of in (frame, made.frame)]
            for differs, pattern in ((frame.residual[side] != made.frame.residual[side], f"the newest {name}: residual"),
                                     (turns[0] != turns[1], f"{name}: rotation")):
                differs = differs and both[side]
                same = same and not differs
                self.assertEqual(any(sentence.startswith(pattern) for sentence in made.lost), differs, (pattern, made.lost))
        self.assertEqual(made.exact, same)

    def test_random_plans(self):
        chance, tries = random.Random(2), 40
        sides = [[scheme for at, scheme in sorted(table().bits) if at == side] for side in (0, 1)]
        for attempt in range(tries):
            pairs = [tuple(map(chance.choice, sides)) for _ in range(chance.randint(1, 6))]
            if attempt % 3 == 0:
                engine = chance.choice(list(ENGINES.values()))  # its own pairs, which it can often express
                pairs = [chance.choice(engine.pairs(table())) for _ in pairs]
            asked = [chance.choice(pairs) for _ in range(30)]
            if attempt % 2:
                asked.sort()
            rotate = ("none", "hadamard", "hadamard:64", "signs", "hadamard:32")
            frame = Frame(residual=tuple(chance.choice((0, 32, 128)) for _ in "kv"), sinks=chance.choice((0, 0, 4)),
                          policy=chance.choice(("append", "append", "hf", "kivi")), rotate=(chance.choice(rotate), chance.choice(rotate)),
                          group=chance.choice((0, 0, 32, 64, 128)), prefill="stored")
            if frame.policy != "append" or chance.random() < .3:
                frame = dataclasses.replace(frame, prefill="raw")
            cost = None
            if chance.random() < .5:
                cost = [[{scheme: chance.random() for scheme in sides[side]} for side in (0, 1)] for _ in range(30)]
            for name, engine in ENGINES.items():
                with self.subTest(engine=name, attempt=attempt):
                    self.agrees(engine, asked, frame, engine.project(asked, frame, table(), cost=cost))

    def test_own_formats_are_exact(self):
        for engine, spec, words in (
                ("llama.cpp", "llamacpp-q8_0-q4_0", "-ctk q8_0 -ctv q4_0 -fa on"),
                ("llama.cpp", "none+q8_0@residual=0@rotate=hadamard+hadamard:64", "-ctk f16 -ctv q8_0 -fa on"),
                ("ik_llama.cpp", "q8_0@residual=0@rotate=hadamard@layers=0-2:none@layers=28-29:q6_0+q5_1",
                 "-ctk q8_0 -ctk-first f16,3 -ctk-last q6_0,2 -ctv q8_0 -ctv-first f16,3 -ctv-last q5_1,2 -khad -vhad -fa on"),
                ("ik_llama.cpp", "q8_kv+iq4_nl@residual=0", "-ctk q8_KV -ctv iq4_nl -fa on"),
                ("vllm", "vllm-int4-per-token-head", "--kv-cache-dtype int4_per_token_head"),
                ("vllm", "fp8-e4m3@residual=0@layers=3-3:none@layers=11-12:none",
                 "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 3 11 12"),
                ("vllm", "vllm-turboquant-3bit-nc", "--kv-cache-dtype turboquant_3bit_nc"),
                ("vllm", "turboquant-k4+turboquant-v4@residual=0@prefill=raw@dense=2@layers=9-9:none",
                 "--kv-cache-dtype turboquant_4bit_nc --kv-cache-dtype-skip-layers 9"),
                ("sglang", "sglang-fp4-e2m1", "--kv-cache-dtype fp4_e2m1"),
                ("sglang", "fp8-e5m2@residual=0", "--kv-cache-dtype fp8_e5m2"),
                ("tensorrt-llm", "trtllm-nvfp4", "--extra_llm_api_options trtllm.yaml"),
                ("lmdeploy", "lmdeploy-int4", "--backend pytorch --quant-policy 4"),
                ("mlx", "mlx-4@residual=0@group=32", "--kv-bits 4 --kv-group-size 32 --quantized-kv-start 0"),
                ("mlx", "mlx-4@residual=0@group=64", "--kv-bits 4 --kv-group-size 64 --quantized-kv-start 0"),
                ("transformers", "int4-hqq@policy=hf@group=64", ""),
                ("exllamav3", "exl3-6+exl3-3@residual=0", "-cq 6,3"), ("exllamav3", "none", ""),
                ("transformers", "hf-hqq-4", ""), ("kvtuner", "int8-hqq+int2-hqq@policy=hf@layers=4-9:int4-hqq+int8-hqq", "")):
            with self.subTest(engine=engine, spec=spec):
                made = project(engine, spec)
                self.assertEqual((shlex.join(made.flags), made.exact, made.environment), (words, True, {}))
        made = project("llama.cpp", "llamacpp-q4_0-unrotated")
        self.assertEqual((shlex.join(made.flags), made.environment), ("-ctk q4_0 -ctv q4_0 -fa on", {"LLAMA_ATTN_ROT_DISABLE": "1"}))

    def test_groups_are_of_64_where_a_spec_says_nothing(self):
        asked = [line.split() for line in handover.kvqbench("--help").splitlines() if "@group:" in line and "consecutive" in line]
        self.assertEqual({words[words.index("consecutive") - 1] for words in asked}, {str(OWN_GROUP)})
        self.assertGreaterEqual(len(asked), 8)

    def test_presets_hand_over_to_their_own_engine(self):
        own = {"llamacpp-": "llama.cpp", "vllm-": "vllm", "trtllm-": "tensorrt-llm", "sglang-": "sglang", "lmdeploy-": "lmdeploy",
               "mlx-lm-": "mlx", "hf-": "transformers"}
        seen = set()
        for preset in table().presets:
            engine = next((engine for start, engine in own.items() if preset.name.startswith(start)), None)
            if engine:
                seen.add(engine)
                made = project(engine, preset.name)
                self.assertTrue(made.exact, preset)
                flags = re.sub(r"; now .*| \(.*", "", preset.flags)  # what it says beside
                if flags.startswith("cache_config="):
                    said = json.loads(made.files["cache_config.json"])["cache_config"]
                    self.assertEqual(said, said | json.loads(flags.removeprefix("cache_config=")))
                    self.assertIn("axis_key" if said["axis_key"] else "quanto", flags)  # whose default, 0, is not HQQ's here
                elif flags.startswith("kv_cache_config: "):
                    self.assertEqual(yaml.safe_load(made.files["trtllm.yaml"]), yaml.safe_load(flags))
                else:
                    self.assertIn(flags, shlex.join(made.flags))
        self.assertEqual(seen, set(own.values()))

    def test_files(self):
        self.assertEqual(yaml.safe_load(project("tensorrt-llm", "trtllm-fp8").files["trtllm.yaml"]), {"kv_cache_config": {"dtype": "fp8"}})
        config = json.loads(project("transformers", "int2-hqq-kivi@policy=hf@residual=64@group=32").files["cache_config.json"])
        self.assertEqual(config, {"cache_implementation": "quantized", "cache_config": {
            "backend": "hqq", "nbits": 2, "axis_key": 0, "axis_value": 1, "q_group_size": 32, "residual_length": 64}})
        plan = yaml.safe_load(project("kvtuner", "int8-hqq+int2-hqq@policy=hf@layers=4-9:int4-hqq+int8-hqq").files["kvtuner.yaml"])
        self.assertEqual(plan, {layer: {"nbits_key": 4 if 4 <= layer < 10 else 8, "nbits_value": 8 if 4 <= layer < 10 else 2}
                                for layer in range(30)})
        said = {}
        text = project("mlx", "mlx-8@residual=0@layers=5-20:mlx-4@layers=29-29:none").files["mlx_cache.py"]
        exec(re.search(r"KV_BITS = .*", text)[0], said)  # pylint: disable=exec-used
        self.assertEqual(said["KV_BITS"], [8] * 5 + [4] * 16 + [8] * 8 + [None])

    def test_what_was_asked_is_checked(self):
        with self.assertRaisesRegex(handover.Refused, "29 layers were given, the model has 30"):
            ENGINES["vllm"].project([NONE] * 29, Frame(), table())
        with self.assertRaisesRegex(handover.Refused, "no scheme 'q3_k' is known for keys"):
            ENGINES["vllm"].project([("q3_k", "none")] * 30, Frame(), table())
        with self.assertRaisesRegex(handover.Refused, "the costs have none for q8_0 keys of layer 0"):
            ENGINES["llama.cpp"].project([("kivi-2", "kivi-2")] * 30, Frame(), table(), cost=[[{}, {}]] * 30)

    def test_what_cannot_be_said_is_refused_when_read(self):
        for engine, flags in (("vllm", ["--kv-cache-dtype", "int3"]), ("llama.cpp", ["-ctk", "q6_0"]), ("mlx", ["--kv-bits", "4"]),
                              ("lmdeploy", ["--quant-policy", "4"]), ("exllamav3", ["-cq", "4", "-cca", "0.1"])):
            with self.assertRaises(handover.Refused, msg=engine):
                ENGINES[engine].read(flags, {}, table())


class Families(unittest.TestCase):
    """Models whose caches are not keys and values of all layers."""

    def project(self, table, spec, **how):
        """{engine: Projection} of those that know such a model's cache, each read back, and why the others do not."""
        asked, frame = handover.parse_spec(spec, table.layers, table.presets, table.latent)
        self.assertEqual(handover.parse_spec(write_spec(asked, frame, table.latent), table.layers, (), table.latent), (asked, frame))
        made, unknown = {}, {}
        for name, engine in ENGINES.items():
            if engine.unknown(table):
                unknown[name] = engine.unknown(table)
                with self.assertRaisesRegex(handover.Refused, name):
                    engine.project(asked, frame, table)
                continue
            made[name] = engine.project(asked, frame, table, **how)
            read = engine.read(made[name].flags, made[name].files, table, made[name].environment)
            self.assertEqual(read, (made[name].assignment, made[name].frame), name)
            again = handover.parse_spec(made[name].spec, table.layers, (), table.latent)
            self.assertEqual((again[0], neutral(again[1], encodes(again[0]))), read, name)
        return made, unknown

    def test_latents(self):
        amax, of = [(4.0 * layer, 896.0) for layer in range(27)], handover.load("deepseek-v2-lite", ["q4_0+q8_0@residual=0", "int4-hqq"])
        made, unknown = self.project(of, "vllm-fp8-mla", amax=amax)
        self.assertEqual((of.layers, of.widths, of.sides, of.kv_layers), (27, (512, 64), ("latents", "rotary keys"), ()))
        self.assertAlmostEqual(of.size(("q4_0", "none")) / 2, (512 * 4.5 + 64 * 16) / 576, 12)
        self.assertEqual(handover.described(of), "27 layers, a latent of 512 and a rotary key of 64 channels")
        self.assertEqual({*made}, {"llama.cpp", "vllm"})
        self.assertIn("what it stores of latents", unknown["sglang"])
        self.assertEqual((shlex.join(made["vllm"].flags), made["vllm"].exact), ("--kv-cache-dtype fp8", True))
        scales = parse_safetensors(made["vllm"].files["kv_scales.safetensors"])
        self.assertEqual({scale[2] for scale in scales.values()}, {2.0})  # both of a layer have the rotary key's
        # A row of one type: what is asked of the latent counts eight times what is asked of the rotary key.
        for spec, words, lost in (("llamacpp-q8_0-mla", "-ctk q8_0 -ctv q8_0 -fa on", set()),
                                  ("q4_0+q8_0@residual=0", "-ctk q4_0 -ctv q4_0 -fa on", {(1, "q8_0", "q4_0")}),
                                  ("int4-hqq", "-ctk q4_0 -ctv q4_0 -fa on", {(0, "int4-hqq", "q4_0"), (1, "none", "q4_0")})):
            said = self.project(of, spec)[0]["llama.cpp"]
            self.assertEqual(shlex.join(said.flags), words)
            self.assertEqual({sentence for sentence in said.lost if sentence.startswith("layers")},
                             {f"layers 0-26: planned {want} {of.sides[side]}, the engine stores {has} {of.sides[side]}" for side, want, has in lost})

    def test_some_layers_keep_nothing(self):
        of = handover.load("qwen3-next-80b-a3b")
        made, unknown = self.project(of, "fp8-e4m3@residual=0@layers=2-2:none")
        self.assertEqual((of.layers, of.model_layers, of.kv_layers), (12, 48, tuple(range(3, 48, 4))))
        # The cache's layer 2 is the model's 11, and so engines count.
        self.assertEqual((shlex.join(made["vllm"].flags), made["vllm"].exact), ("--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 11", True))
        layers = {str(layer) for layer in of.kv_layers}
        self.assertEqual({name.split(".")[2] for name in parse_safetensors(made["vllm"].files["kv_scales.safetensors"])}, layers)
        self.assertEqual({*json.loads(made["sglang"].files["kv_scales.json"])["kv_cache"]["scaling_factor"]["0"]}, layers)
        self.assertEqual({*unknown}, {"ik_llama.cpp", "kvtuner", "mlx", "transformers"})
        self.assertIn("36 of the model's 48 layers keep no keys and values", unknown["mlx"])


def parse_safetensors(data):
    """As the format is described: its length, a header in JSON, the numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8:8 + length]), data[8 + length:]
    ends = sorted(entry["data_offsets"][1] for entry in header.values())
    assert ends[-1] == len(rest) and (8 + length) % 8 == 0, ends[-1]
    return {name: (entry["dtype"], entry["shape"], *struct.unpack("<f", rest[slice(*entry["data_offsets"])])) for name, entry in header.items()}


class Scales(unittest.TestCase):
    amax = [(layer + 1.0, 448.0 * (layer + 1)) for layer in range(30)]

    def test_vllm(self):
        made = project("vllm", "vllm-fp8", amax=self.amax)
        scales = parse_safetensors(made.files["kv_scales.safetensors"])
        self.assertEqual(len(scales), 60)
        for layer in range(30):
            dtype, shape, keys = scales[f"model.layers.{layer}.self_attn.k_scale"]
            self.assertEqual((dtype, shape, keys), ("F32", [1], struct.unpack("<f", struct.pack("<f", (layer + 1) / 448))[0]))
            self.assertEqual(scales[f"model.layers.{layer}.self_attn.v_scale"][2], layer + 1)
        scheme = json.loads(made.files["config.json"])["quantization_config"]["kv_cache_scheme"]
        self.assertEqual(scheme, {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True})
        self.assertIn(SCALES_GIVEN, made.lost)

    def test_without_largest_values_they_are_one_and_that_is_said(self):
        made = project("vllm", "vllm-fp8")
        self.assertEqual({of[2] for of in parse_safetensors(made.files["kv_scales.safetensors"]).values()}, {1.0})
        self.assertIn(SCALES_OF_ONE, made.lost)

    def test_of_a_model_in_a_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (("config.json", {"model_type": "llama", "hidden_size": 576}),
                               ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "a.safetensors"}})):
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    json.dump(text, file)
            of_folder = dataclasses.replace(table(), directory=folder, model_type="llama")
            assignment, frame = handover.parse_spec("vllm-fp8", 30, table().presets)
            made = ENGINES["vllm"].project(assignment, frame, of_folder, amax=self.amax)
            config, index = (json.loads(made.files[name]) for name in ("config.json", "model.safetensors.index.json"))
            self.assertEqual((config["hidden_size"], config["quantization_config"]["quant_method"]), (576, "compressed-tensors"))
            self.assertEqual((len(index["weight_map"]), index["weight_map"]["model.layers.29.self_attn.v_scale"]), (61, "kv_scales.safetensors"))
            made = ENGINES["sglang"].project(assignment, frame, of_folder, amax=self.amax)
            said = json.loads(made.files["kv_scales.json"])
            # What SGLang's QuantParamSchema wants: the model's type, this dtype, a rank for each GPU, every layer.
            self.assertEqual((said["model_type"], said["kv_cache"]["dtype"], list(said["kv_cache"]["scaling_factor"])), ("llama", "float8_e4m3fn", ["0"]))
            self.assertEqual(said["kv_cache"]["scaling_factor"]["0"], {str(layer): layer + 1.0 for layer in range(30)})
            self.assertEqual(made.flags, ["--kv-cache-dtype", "fp8_e4m3", "--quantization-param-path", "kv_scales.json"])

    def test_largest_values_of_a_distribution(self):
        values = {f"distribution.{end}_{side}/layer:{layer}": number for layer in (0, 1) for side, numbers in
                  (("k", (-7, 5)), ("v", (-1, 3))) for end, number in zip(("min", "max"), numbers, strict=True)}
        self.assertEqual(handover.amax_of(values), [(7, 3), (7, 3)])
        self.assertEqual(handover.amax_of({}), [])


class Nearest(unittest.TestCase):
    """With costs, against every setting that an engine of four layers could be given."""
    layers = 4

    def small(self):
        return Table(self.layers, 64, 3, table().presets, table().schemes, table().bits)

    def every(self, engine, small):
        options = [option for option in engine.options(small) if small.fits(option.pair)]
        if engine.kind in ("uniform", "uniform_pair"):
            return {(option.pair,) * self.layers for option in options}
        if engine.kind == "skip":
            found = set()
            for option in options:
                for skipped in itertools.product((False, True), repeat=self.layers):
                    forced = engine.forced(option, self.layers)
                    found.add(tuple(NONE if skip or layer in forced else option.pair for layer, skip in enumerate(skipped)))
            return found
        if engine.kind == "ends":
            types = list(engine.types(small))
            sides = {tuple(tail if layer >= self.layers - last else head if layer < first else base for layer in range(self.layers))
                     for base, head, tail in itertools.product(types, repeat=3) for first in range(self.layers) for last in range(self.layers - first)}
            return [tuple(zip(keys, values)) for keys in sides for values in sides] if len(sides) < 400 else sides
        return set(itertools.product([option.pair for option in options], repeat=self.layers))

    def test_against_all_settings(self):
        chance, small = random.Random(3), self.small()
        schemes = [[scheme for at, scheme in sorted(small.bits) if at == side] for side in (0, 1)]
        for name, engine in ENGINES.items():
            every = self.every(engine, small)
            for _ in range(6):
                asked = [tuple(map(chance.choice, schemes)) for _ in range(self.layers)]
                cost = [[{scheme: chance.random() * 2.0 ** -small.bits[side, scheme] for scheme in schemes[side]} for side in (0, 1)]
                        for _ in range(self.layers)]
                score = Score(asked, small, cost)
                made = engine.project(asked, Frame(), small, cost=cost)
                if engine.kind == "ends":
                    best = self.best_of_ends(every, small, score)
                else:
                    best = min(score.rank(stored) for stored in every)
                found = score.rank(made.assignment)
                self.assertAlmostEqual(found[0], best[0], 6, name)
                self.assertAlmostEqual(found[1], best[1], 5, name)

    def best_of_ends(self, sides, small, score):
        """Of keys' settings and values' settings, which share the budget."""
        of = [sorted((sum(small.bits[side, scheme] for scheme in said), sum(score(layer, side, scheme) for layer, scheme in enumerate(said)))
                     for said in sides) for side in (0, 1)]
        least = [list(itertools.accumulate((cost for _, cost in entries), min)) for entries in of]
        best, bits = (float("inf"), float("inf")), [entry[0] for entry in of[1]]
        for at, (size, _) in enumerate(of[0]):
            room = bisect.bisect_right(bits, score.budget - size) - 1
            best = min(best, (0.0, least[0][at] + least[1][room]) if room >= 0 else (size + bits[0] - score.budget, of[0][0][1] + of[1][0][1]))
        return best

    def test_what_can_be_said_is_not_made_cheaper(self):
        small = self.small()
        asked = [("q4_0", "q4_0")] * self.layers
        cost = [[{scheme: 1.0 if scheme == "q4_0" else 0.0 for _, scheme in small.bits} for _ in "kv"] for _ in range(self.layers)]
        self.assertEqual(ENGINES["llama.cpp"].project(asked, Frame(residual=(0, 0)), small, cost=cost).assignment, asked)

    def test_constraints(self):
        for name, engine in ENGINES.items():
            said = engine.constraint(30, table())
            self.assertEqual((said["kind"], said["layers"]), (engine.kind, 30), name)
            self.assertEqual(json.loads(json.dumps(said["equal"])), said["equal"], name)  # plain data
            self.assertEqual([pair[:2] for pair in engine.menu(table())], said["pairs"], name)
            for keys, values, frame in engine.menu(table()):
                self.assertIn((0, keys), table().bits, name)
                self.assertIn((1, values), table().bits, name)
                handover.parse_spec("none" + (f"@{frame}" if frame else ""), 30)
        self.assertEqual(ENGINES["llama.cpp"].constraint(30, table())["equal"], {"keys": [list(range(30))], "values": [list(range(30))]})
        self.assertEqual(ENGINES["vllm"].constraint(30, table())["forced"]["turboquant-k4", "turboquant-v4"], [0, 1, 28, 29])


@contextlib.contextmanager
def serving(spec):
    """kvqserve of SmolLM2 with a spec: ask(path, body)."""
    with subprocess.Popen([SERVER, "--model=smollm2-135m", f"--spec={spec}", "--port=0", "--dtype=float32"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            port = int(process.stdout.readline().rsplit(":", 1)[1])

            def ask(path, body):
                request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
                for _ in range(6000):
                    try:
                        with urllib.request.urlopen(request, timeout=600) as answer:
                            return json.load(answer)
                    except urllib.error.HTTPError as error:
                        if error.code != 503:  # while it loads
                            raise
                        time.sleep(.05)
                raise TimeoutError
            yield ask
        finally:
            process.terminate()


def write(files, folder):
    os.mkdir(folder)
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(content)


def skip_without(test, python, size):
    if not os.path.exists(python):
        test.skipTest(f"{python} is not there: ci/live-parity makes it ({size})")
    if not os.path.exists(MODEL):
        test.skipTest(f"{MODEL} is not there: ci/setup brings it")


# Run by an environment that has transformers: each job's prompt continued greedily, through the files that were written.
RUNNER = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.path.insert(0, sys.argv[1])
import make_golden_quanto  # lets quanto unpack without a compiler
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(sys.argv[2])
for folder, ids, tokens in json.loads(sys.argv[3]):
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), "max_new_tokens": tokens,
              "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    if os.path.exists(os.path.join(folder, "cache_config.json")):
        with open(os.path.join(folder, "cache_config.json"), encoding="utf-8") as file:
            out = model.generate(**inputs, **json.load(file))
    else:
        written = {}
        with open(os.path.join(folder, "transformers_cache.py"), encoding="utf-8") as file:
            exec(file.read(), written)
        out = model.generate(**inputs, past_key_values=written["kv_cache"]())
    layers = [(type(layer).__name__, getattr(layer, "nbits", 16)) for layer in out.past_key_values.layers]
    print(json.dumps({"text": tokenizer.decode(out.sequences[0, len(ids):]), "layers": layers,
                      "logprobs": [torch.log_softmax(logits[0].double(), -1).max().item() for logits in out.logits]}))
"""


class Transformers(unittest.TestCase):
    """What was written, loaded and run by transformers 5.5.4 on SmolLM2, against kvqserve with the projection's spec."""
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."
    specs = ("none", "int4-hqq@policy=hf@residual=16", "int4-hqq-kivi@policy=hf@residual=16@group=32",
             "int4-hqq@policy=hf@residual=16@layers=0-9:int8-hqq@layers=20-20:none@layers=25-29:int4-quanto",
             "int8-hqq@policy=hf@residual=16@layers=4-5:int2-hqq", "int8-hqq@policy=hf@residual=16@layers=24-25:int2-hqq")
    # kvqbench keeps HQQ's scales and zeros in fp16, the package in float32: logarithms of probabilities differed by up to
    # 0.005 before the residual is first flushed, by ten times that and more behind it, where what was decoded is encoded again.
    tolerance = 0.01

    def setUp(self):
        skip_without(self, PYTHON, "5 GB")

    def served(self, spec, ids, tokens):
        """kvqserve's greedy text after the ids, its logarithms of probabilities, and the ids of self.text."""
        with serving(spec) as ask:
            ids = ids or ask("/tokenize", {"prompt": self.text})["tokens"][:16]
            choice = ask("/v1/completions", {"prompt": ids, "max_tokens": tokens, "temperature": 0, "logprobs": 1})["choices"][0]
            return choice["text"], choice["logprobs"]["token_logprobs"], ids

    def test_runs_what_was_written(self):
        tokens, ours, jobs, ids, expected = 17, [], [], None, []  # the prompt fills a call; its residual is full 16 tokens later
        with tempfile.TemporaryDirectory() as folder:
            for spec in self.specs:
                made = project("transformers", spec)
                self.assertTrue(made.exact, made.lost)
                text, logprobs, ids = self.served(made.spec, ids, tokens)
                ours.append((text, logprobs))
                jobs.append((os.path.join(folder, str(len(jobs))), ids, 3 * tokens))
                write(made.files, jobs[-1][0])
                expected.append([["DynamicLayer", 16] if keys == "none" else
                                 [("HQQ" if "hqq" in keys else "Quanto") + "QuantizedLayer", int(keys[3])] for keys, _ in made.assignment])
            done = subprocess.run([PYTHON, "-c", RUNNER, os.path.join(ROOT, "accuracy"), MODEL, json.dumps(jobs)],
                                  capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        theirs = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len(theirs), len(self.specs))
        for of, layers in zip(theirs, expected, strict=True):
            self.assertEqual(of["layers"], layers)
            self.assertEqual(len(of["logprobs"]), 3 * tokens)  # three flushes went well
        for i, j in itertools.product(range(len(self.specs)), repeat=2):  # each is like its own spec, and like no other
            text, logprobs = ours[j]
            apart = max(abs(a - b) for a, b in zip(logprobs, theirs[i]["logprobs"][:tokens], strict=True))
            with self.subTest(written=self.specs[i], served=self.specs[j], apart=apart):
                if i == j:
                    self.assertLess(apart, self.tolerance)
                    self.assertTrue(theirs[i]["text"].startswith(text), (text, theirs[i]["text"]))
                else:
                    self.assertGreater(apart, self.tolerance)

    def test_the_package_reads_the_scales(self):
        made = project("vllm", "vllm-fp8", amax=Scales.amax)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kv_scales.safetensors")
            with open(path, "wb") as file:
                file.write(made.files["kv_scales.safetensors"])
            program = "import json, sys; from safetensors.torch import load_file; " \
                "print(json.dumps({name: [str(x.dtype), list(x.shape), x.item()] for name, x in load_file(sys.argv[1]).items()}))"
            read = json.loads(subprocess.run([PYTHON, "-c", program, path], capture_output=True, text=True, check=True).stdout)
        self.assertEqual(read, {name: ["torch.float32", shape, number] for name, (_, shape, number) in
                                parse_safetensors(made.files["kv_scales.safetensors"]).items()})


# Run by an environment that has mlx-lm: what each job's cache gives the tokens of a text, all in one call, or its flags, as
# mlx-lm reads them, a few tokens behind the text.
MLX_RUNNER = """
import json, os, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step, setup_arg_parser
from mlx_lm.models.cache import make_prompt_cache
model, _ = load(sys.argv[1])
model.set_dtype(mx.float32)
for folder, flags, ids in json.loads(sys.argv[2]):
    logprobs, path = [], os.path.join(folder, "mlx_cache.py")
    if os.path.exists(path):
        written = {}
        with open(path, encoding="utf-8") as file:
            exec(file.read(), written)
        cache = written["kv_cache"]()
        logits = model(mx.array(ids)[None], cache=cache)[0]
        all = logits - mx.logsumexp(logits, -1, keepdims=True)
        logprobs = [all[i, token].item() for i, token in enumerate(ids[1:])]
    else:
        said, cache = setup_arg_parser().parse_args(flags), make_prompt_cache(model)
        how = {key: getattr(said, key) for key in ("kv_bits", "kv_group_size", "quantized_kv_start")}
        logprobs = [of[token].item() for token, of in generate_step(mx.array(ids), model, max_tokens=4, prompt_cache=cache, **how)]
    layers = [[getattr(of, "bits", 16), getattr(of, "group_size", 0)] for of in cache]
    print(json.dumps({"logprobs": logprobs, "layers": layers}))
"""


class MlxLm(unittest.TestCase):
    """What was written, loaded and run by mlx-lm 0.32.2 on SmolLM2, on a CPU, against kvqserve with the projection's spec.

    Of specs that encode one layer: mlx keeps scales in the type of its input, here float32, kvqbench in fp16, and where many are
    encoded a code that rounds the other way in one layer moves those of the next."""
    groups = ((4, 64, 0), (8, 64, 0), (4, 32, 0), (4, 64, 15), (4, 32, 15), (4, 64, 29))  # bits, group, layer
    # Of a token, on the average, in nats: between the largest of their own specs and the least of others, which the test prints.
    tolerance = 0.001

    def setUp(self):
        skip_without(self, MLX_PYTHON, "400 MB")

    def test_runs_what_was_written(self):
        with open(os.path.join(ROOT, "accuracy", "README.md"), encoding="utf-8") as file:
            text = file.read()[:1200]
        specs, ours, jobs, expected, ids = ["none"], [], [], [], None
        for bits, group, layer in self.groups:
            others = [f"@layers={first}-{last}:none" for first, last in ((0, layer - 1), (layer + 1, 29)) if first <= last]
            specs.append(f"mlx-{bits}@residual=0{'' if group == 64 else f'@group={group}'}{''.join(others)}")
            expected.append([[bits, group] if i == layer else [16, 0] for i in range(30)])
        with tempfile.TemporaryDirectory() as folder:
            for spec in specs:
                made = project("mlx", spec)
                self.assertTrue(made.exact, made.lost)
                with serving(made.spec) as ask:
                    ids = ids or ask("/tokenize", {"prompt": text})["tokens"][:160]
                    answer = ask("/v1/completions", {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True})
                ours.append(answer["choices"][0]["logprobs"]["token_logprobs"][1:len(ids)])
                if spec == "none":
                    continue
                self.assertEqual(([*made.files], made.flags), (["mlx_cache.py"], []))
                jobs.append((os.path.join(folder, str(len(jobs))), [], ids))
                write(made.files, jobs[-1][0])
            for spec, bits, group in (("mlx-4@residual=0", 4, 64), ("mlx-8@residual=0@group=32", 8, 32)):
                jobs.append((folder, project("mlx", spec).flags, ids[:20]))
                expected.append([[bits, group]] * 30)
            done = subprocess.run([MLX_PYTHON, "-c", MLX_RUNNER, MODEL, json.dumps(jobs)], capture_output=True, text=True, check=False,
                                  env={**os.environ, **{"LD_PRELOAD": path for path in TORCH}})
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        theirs = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual([of["layers"] for of in theirs], expected)
        own, other = [], []
        for i, of in enumerate(theirs[:len(self.groups)]):  # each is like its own spec, and like no other
            for spec, logprobs in zip(specs, ours, strict=True):
                apart = sum(abs(a - b) for a, b in zip(logprobs, of["logprobs"], strict=True)) / len(logprobs)
                (own if spec == specs[i + 1] else other).append(apart)
                with self.subTest(written=specs[i + 1], served=spec, apart=apart):
                    (self.assertLess if spec == specs[i + 1] else self.assertGreater)(apart, self.tolerance)
        print(f"nats a token from kvqserve: own spec at most {max(own):.4f}, another at least {min(other):.4f}")


def run(*arguments):
    return testing.run(command, *arguments)


class Command(unittest.TestCase):
    def test_bad_input_is_one_line(self):
        for arguments, line in ((["q4_0", "--engine=ollama"], "--engine: no engine 'ollama'; there are exllamav3, "),
                                (["q3_k"], "no scheme 'q3_k'; there are "), ([], ""), (["q4_0", "q8_0"], "wants one spec"),
                                (["q4_0", "--colour"], "unknown flag '--colour'"), (["q4_0", "--model=nowhere"], "nowhere"),
                                (["q4_0@layers=0-99:none"], "layers 0-99, but the cache has layers 0-29"),
                                (["q4_0", "--", "--device=cuda"], "which only --measure runs"),
                                (["q4_0", "--amax=/nowhere/results.json"], "/nowhere/results.json")):
            with self.subTest(arguments=arguments):
                code, out, err = run(*arguments)
                self.assertEqual(code, 2)
                if arguments:
                    self.assertEqual((out, len(err.splitlines())), ("", 1), err)
                    self.assertTrue(err.startswith("handover: ") and line in err, err)

    def test_writes_and_measures(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "distribution.json")
            handover.kvqbench("--benchmark_filter=^distribution/", "--schemes=none", "--contexts=128", f"--benchmark_out={path}")
            code, out, err = run("fp8-e4m3@residual=0@layers=0-1:q8_0", "--engine=vllm,sglang,transformers", f"--out={folder}", f"--amax={path}",
                                 "--measure", "--", "--contexts=128", "--windows=2", "--benchmark_filter=^(kv_size|perplexity)/.*residual=0")
            self.assertEqual(code, 2)  # the filter is ours
            code, out, err = run("fp8-e4m3@residual=0@layers=0-1:q8_0", "--engine=vllm,tensorrt-llm", f"--out={folder}", f"--amax={path}",
                                 "--measure", "--", "--contexts=128", "--windows=2")
            self.assertEqual(code, 0, err)
            self.assertIn("layers 0-1: planned q8_0 keys, the engine stores fp8-e4m3 keys", out)
            with open(os.path.join(folder, "vllm", "kv_scales.safetensors"), "rb") as file:
                scales = parse_safetensors(file.read())
            with open(path, encoding="utf-8") as file:
                cell = json.load(file)["benchmarks"][0]
            for layer in range(30):  # the largest channel's largest, which distribution counts by itself
                for side in "kv":
                    self.assertAlmostEqual(scales[f"model.layers.{layer}.self_attn.{side}_scale"][2] * 448,
                                           max(abs(cell[f"{end}_{side}/layer:{layer}"]) for end in ("min", "max")), 4)
            with open(os.path.join(folder, "tensorrt-llm", "trtllm.yaml"), encoding="utf-8") as file:
                self.assertEqual(yaml.safe_load(file), {"kv_cache_config": {"dtype": "fp8"}})
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
            self.assertEqual([row[0] for row in rows[2:]], ["asked", "vllm", "tensorrt-llm"])
            self.assertEqual([row[1] for row in rows[2:]], ["8.033", "8.000", "8.000"])
            for row in rows[2:]:
                self.assertRegex(row[3], r"^0\.\d{5} \[0\.\d{5}, 0\.\d{5}\]$")


if __name__ == "__main__":
    unittest.main()
