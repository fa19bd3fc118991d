#!/usr/bin/python3
"""Tests of ci/report on what ci/gpu-study leaves: every product of ci/baselines/h200, and of a small folder of made-up
results of the same kind, by the same command. KVQ_BENCH_EXE: whose --to-v2 is used (default build/release/kvqbench)."""

import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest

import numpy as np

import browser
import drawing
import page
import reading
import tables
from results import MIB, decode_ms_per_token
from testing import BASELINES, HERE, KVQBENCH, ROOT, Once, OnPage, read, report, rows_of, violations

H200 = os.path.join(BASELINES, "h200")


class Products(OnPage):
    """One report of `source`, a folder of ci/gpu-study's files; what is expected is read from their JSON here."""

    @classmethod
    def make(cls):
        cls.out = os.path.join(cls.folder, "out")
        cls.done = report(cls.source, "--out", cls.out)
        cls.files = sorted(glob.glob(os.path.join(cls.source, "*.json")))
        cls.runs = {run["name"]: run for path in cls.files for run in json.loads(read(path))["benchmarks"]
                    if not run.get("error_occurred")}
        cls.results = reading.load([cls.source])
        cls.browser = browser.Browser()

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()
        super().tearDownClass()

    def of(self, measurement):
        """{(model, spec, context, batch): benchmark}"""
        found = {}
        for name, run in self.runs.items():
            part = reading.NAME.match(name)
            if part["measurement"] == measurement:
                found[part["model"], part["spec"], int(part["context"]), int(part["batch"])] = run
        return found

    def test_nothing_is_left_out_and_nobody_warns(self):
        self.assertEqual((self.done.returncode, self.done.stderr), (0, f"report: {self.out}\n"))
        self.assertEqual((self.results.refused, len(self.results.files)), ([], len(self.files)))

    def test_every_counter_is_read(self):
        cells = {(c.model, c.backend, c.spec, c.context, c.batch): c for c in self.results.current()}
        for name, run in self.runs.items():
            part = reading.NAME.match(name)
            cell = cells[part["model"], part["backend"], part["spec"], int(part["context"]), int(part["batch"])]
            for key, value in run.items():
                if key not in reading.NO_COUNTERS:
                    self.assertEqual(cell[f"{part['measurement']}.{key}"], value, (name, key))

    def test_tables_of_models(self):
        text = read(self.out, "table.md")
        headings = re.findall(r"^(\S+), \S+, context (\d+), batch (\d+); ", text, re.M)
        whole = {key for measurement in ("prefill", "decode", "memory", "kv_size", "power") for key in self.of(measurement)}
        # In the order of batch sizes and contexts, and none for contexts that only single kernels have.
        self.assertEqual(set(headings), {(model, str(context), str(batch)) for model, _, context, batch in whole})
        self.assertEqual(len(headings), len(set(headings)))
        for model in {heading[0] for heading in headings}:
            order = [(int(batch), int(context)) for name, context, batch in headings if name == model]
            self.assertEqual(order, sorted(order))
        flat = {(row["model"], row["spec"], int(row["context"]), int(row["batch"])): row
                for row in rows_of(read(self.out, "tables", "results.csv"))}
        expected = [("prefill", "prefill_ms", 0, 1), ("decode", "tokens_per_s", 1, 1), ("decode", "peak_fraction", 1, 100),
                    ("kv_size", "kv_bytes", 2, 1 / MIB), ("memory", "vram_peak_bytes", 0, 1 / MIB), ("power", "watts", 0, 1),
                    ("power", "mj_per_token", 0, 1)]
        blocks = {}
        for part in re.split(r"\n(?=\S+, \S+, context )", text):
            heading = re.match(r"\n?(\S+), \S+, context (\d+), batch (\d+); ", part)
            for line in part.splitlines() if heading else []:
                cells = [field.strip() for field in line.split("|")[1:-1]]
                if cells:
                    blocks.setdefault((heading[1], cells[0], int(heading[2]), int(heading[3])), cells)
        for measurement, counter, digits, scale in expected:
            for key, run in self.of(measurement).items():
                self.assertEqual(float(flat[key][f"{measurement}.{counter}"]), run[counter], key)
                self.assertIn(f"{run[counter] * scale:.{digits}f}", blocks[key], (key, counter))
        for key, run in self.of("decode").items():  # the kernel that ran
            self.assertIn(blocks[key][-1], run["label"])
            self.assertGreater(len(blocks[key][-1]), 4)
        phase = rows_of(read(self.out, "tables", glob.glob(os.path.join(self.out, "tables", "phase_*.csv"))[0]))
        self.assertEqual(len({(r["model"], r["batch"], r["kv_quant"], r["context_len"]) for r in phase}), len(phase))

    def test_summaries(self):
        for path in glob.glob(os.path.join(self.out, "tables", "summary_*.json")):
            made = json.loads(read(path))
            reading.validate("summary", made)
            for row in made["combinations"]:
                run = self.of("memory")[made["model"], row["kv_quant"].replace("(kivi)", "-kivi").replace("fp16", "none"),
                                        row["ctx"], 1]
                self.assertEqual((row["vram_peak_mb"], row["vram_overflow"]), (run["vram_peak_bytes"] / MIB, False))

    def test_table_of_kernels(self):
        rows = rows_of(read(self.out, "tables", "kernels.csv"))
        expected = {(kernel, *key): run for kernel in tables.KERNELS for key, run in self.of("kernel_" + kernel).items()}
        self.assertEqual(len(rows), len(expected))
        self.assertGreater(len(rows), 3)
        for row in rows:
            run = expected[row["kernel"], row["model"], row["spec"], int(row["context"]), int(row["batch"])]
            for name in tables.KERNEL_COLUMNS:
                self.assertEqual(row[name], str(run[name]) if name in run else "", name)
            self.assertIn(row["ran"], run["label"])
            self.assertRegex(row["shape"], r"^\d+/\d+ x \d+$")
        self.assertEqual(len(re.findall(r"^\| (?:attention|encode|flush|decode) ", read(self.out, "table.md"), re.M)), len(rows))

    def test_latency_model(self):
        rows = rows_of(read(self.out, "tables", "latency_model.csv"))
        decode = self.of("decode")
        self.assertEqual({(r["model"], r["spec"], int(r["batch"])) for r in rows}, {(m, s, b) for m, s, _, b in decode})
        for row in rows:
            def times(spec):
                return {c: 1e3 * b / run["tokens_per_s"] for (m, s, c, b), run in decode.items()
                        if (m, s, b) == (row["model"], spec, int(row["batch"]))}
            ours, plain = times(row["spec"]), times("none")
            if len(ours) > 2:
                slope, base = np.polyfit(list(ours), list(ours.values()), 1)
                self.assertAlmostEqual(float(row["base_ms"]), base, 9)
                self.assertAlmostEqual(float(row["us_per_1k_tokens"]), 1e6 * slope, 6)
                worst = max(abs(base + slope * c - ms) / ms for c, ms in ours.items())
                self.assertAlmostEqual(float(row["fit_error"]), worst, 9)
            else:
                self.assertEqual(row["base_ms"], "")
            if row["spec"] == "none" or len(set(ours) & set(plain)) < 2:
                self.assertEqual(row["break_even"], "")
                continue
            limit = int(row["break_even"].split()[-1])
            slower = [c for c in sorted(set(ours) & set(plain)) if ours[c] > plain[c]]
            if row["break_even"].startswith(">"):
                self.assertIn(limit, slower)
            else:
                self.assertTrue(all(c <= limit for c in slower), row)
            self.assertIn(f" {row['break_even']} ", read(self.out, "table.md"))

    def test_latex(self):
        for name, rows in (("kernels", rows_of(read(self.out, "tables", "kernels.csv"))),
                           ("latency_model", [row for row in rows_of(read(self.out, "tables", "latency_model.csv"))
                                              if row["base_ms"] or row["break_even"]])):
            for ending in ("", "_de"):
                text = read(self.out, "tables", name + ending + ".tex")
                lines = [line for line in text.splitlines() if " & " in line and "shortstack" not in line]
                self.assertEqual(len(lines), len(rows))
                columns = re.search(r"\\begin\{longtable\}\{([lr]+)\}", text)[1]
                self.assertEqual({line.count(" & ") + 1 for line in lines}, {len(columns)})
                self.assertEqual(text.count("{"), text.count("}"))
                self.assertNotRegex(re.sub(r"\\label{\S+}", "", text), r"(?<!\\)[%_#<]")

    def test_figures(self):
        for name in ("decode_speed", "latency_vs_context", "vram_vs_context", "memory_loglog", "roofline", "kernels",
                     "pareto_decode"):
            path = os.path.join(self.out, "figures", name)
            image = drawing.plt.imread(path + ".png")[..., :3]
            self.assertGreater(np.mean(np.ptp(image.reshape(-1, 3), axis=0)), 0.5, name)  # from paper to ink
            self.assertLess(image.shape[0], 1.5 * image.shape[1], f"{name}: higher than a page")
            self.assertTrue(read(path + ".svg").rstrip().endswith("</svg>"))
            with open(path + ".pdf", "rb") as file:
                self.assertEqual(file.read(5), b"%PDF-")
            self.assertGreater(len(rows_of(read(path + ".csv"))), 3)
        for row in rows_of(read(self.out, "figures", "decode_speed.csv")):
            model, batch = re.match(r"(\S+?)(?:, batch (\d+))?$", row["panel"]).groups()
            run = self.of("decode")[model, row["spec"], int(row["context"]), int(batch or 1)]
            self.assertAlmostEqual(float(row["value"]), run["tokens_per_s"], 6)
            self.assertAlmostEqual(float(row["floor"]), run["tokens_per_s"] / run["peak_fraction"], 6)
        for row in rows_of(read(self.out, "figures", "roofline.csv")):
            self.assertLess(float(row["share"]), 1.1)  # no more than the limit, but for how well that is known
        self.assertFalse(os.path.exists(os.path.join(self.out, "figures", "pareto_kld.svg")))
        self.assertIn("no KL divergence beside the bits per element", read(self.out, "index.html"))

    def test_page(self):
        self.browser.look()
        self.browser.open(os.path.join(self.out, "index.html"))
        whole = {key for measurement in ("prefill", "decode", "memory", "kv_size", "power") for key in self.of(measurement)}
        self.assertEqual(len(self.column("scheme")), len(whole))
        self.browser.run("[...document.querySelectorAll('#results thead button')]"
                         ".find(b => b.textContent === 'decode tok/s').click()")
        rates = [float(text) for text in self.column("decode tok/s")]
        self.assertEqual(rates, sorted(rates))
        self.choose("batch", "8")
        self.choose("spec", "int4-hqq")
        eight = {context: run for (_, spec, context, batch), run in self.of("decode").items()
                 if (spec, batch) == ("int4-hqq", 8)}
        self.assertEqual(sorted(self.column("context")), sorted(map(tables.context_label, eight)))
        for context, rate, ran in zip(*map(self.column, ("context", "decode tok/s", "what decoded"))):
            run = next(run for c, run in eight.items() if tables.context_label(c) == context)
            self.assertEqual(rate, f"{run['tokens_per_s']:.1f}")
            self.assertIn("fused_decode_int4", ran)
        kernels = sum(name.startswith("kernel_") for name in self.runs)
        self.assertEqual(self.browser.run("document.querySelectorAll('[aria-labelledby=kernel-table] tbody tr').length"), kernels)
        self.assertEqual(self.browser.run("document.querySelectorAll('.cells details').length"),
                         len({reading.NAME.match(name).groups()[1:] for name in self.runs}))
        ids = self.browser.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
        self.assertEqual(len(ids), len(set(ids)))
        # Figures are looked at in test_report.py; here they would take minutes.
        self.assertEqual(violations(self.browser, "{exclude: [['svg']]}"), [])
        self.browser.look(width=360, height=740)
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 360)
        self.assertEqual(self.browser.errors, [])
        self.assertEqual([url for url in self.browser.requests if not url.startswith(("file:", "data:"))], [])

    def test_version_2_and_back(self):
        folder = os.path.join(self.folder, "v2")
        done = subprocess.run([KVQBENCH, "--to-v2=" + folder, *self.files], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        back = reading.load([folder])  # checks them against the schema
        self.assertEqual(back.refused, [])
        cells = {(c.model, c.spec, c.context): c for c in back.cells}
        fields = [("prefill", "prefill_ms"), ("prefill", "tokens_per_s"), ("decode", "tokens_per_s"), ("kv_size", "kv_bytes"),
                  ("memory", "vram_peak_bytes"), ("memory", "vram_reserved_bytes"), ("power", "watts"),
                  ("power", "mj_per_token")]
        compared = 0
        for measurement, counter in fields:
            for (model, spec, context, batch), run in self.of(measurement).items():
                if batch == 1:  # the schema knows no other
                    value = cells[model, spec, context][f"{measurement}.{counter}"]
                    self.assertIsNotNone(value, (measurement, counter, model, spec, context))
                    self.assertAlmostEqual(value, run[counter], delta=1e-12 * run[counter])
                    compared += 1
        self.assertGreater(compared, 20)
        for (model, spec, context, batch), run in self.of("decode").items():
            if batch == 1:
                self.assertAlmostEqual(decode_ms_per_token(cells[model, spec, context]), 1e3 / run["tokens_per_s"], 9)

    def test_compared_with_itself(self):
        done = subprocess.run([os.path.join(HERE, "compare"), self.source, self.source, "--complete"], capture_output=True,
                              text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"OK: \d+ same\n$")
        total = re.search(r"^  all +(\d+) +(\d+) +0 +(\d+) +0.00 % +0.00 %", done.stdout, re.M)
        self.assertEqual(int(total[1]), int(total[2]) + int(total[3]))

    def test_how_to_make_it_again(self):
        self.assertRegex(read(self.out, "index.html"), r"git checkout [0-9a-f]+\nci/gpu-study --out results/\S+ --only kernels,")


class Baseline(Products, Once, unittest.TestCase):
    source = H200

    def test_what_its_readme_says_was_measured(self):
        all_models = {"mistral-7b", "qwen3-8b", "qwen2-7b", "yi-1.5-9b", "llama-3.1-8b"}
        for measurement in ("prefill", "decode", "memory", "kv_size", "power"):
            found = self.of(measurement)
            missing = {(model, spec, context) for model in all_models for spec in ("none", "int8-hqq", "int4-hqq", "int2-hqq")
                       for context in (4096, 8192, 16384, 32768)} - {key[:3] for key in found}
            if measurement == "power":
                missing -= {key for key in missing if key[0] == "yi-1.5-9b"} | {("qwen2-7b", "int2-hqq", 32768)}
            self.assertEqual(missing, set(), measurement)

    def test_the_readme_says_what_was_measured(self):
        rows = re.findall(r"^\| (\d+)k \| (\S+) \| (.+) \|$", read(ROOT, "README.md"), re.M)
        self.assertEqual(len(rows), 8)
        for context, spec, numbers in rows:
            def value(measurement, counter):
                return self.of(measurement)["mistral-7b", spec, 1024 * int(context), 1][counter]
            self.assertEqual(numbers.split(" | "), [
                f"{value('kv_size', 'kv_bytes') / MIB:.0f}", f"{value('prefill', 'prefill_ms'):.0f}",
                f"{value('decode', 'tokens_per_s'):.0f}", f"{100 * value('decode', 'peak_fraction'):.0f} %",
                f"{value('memory', 'beyond_weights_bytes') / MIB:.0f}", f"{value('power', 'watts'):.0f}",
                f"{value('power', 'mj_per_token'):.0f}"])


class GpuStudy(unittest.TestCase):
    """Which GPU ci/gpu-study gives what, told by a program that writes down how it was called."""

    def run_study(self, *arguments):
        return subprocess.run([os.path.join(HERE, "gpu-study"), *arguments], capture_output=True, text=True)

    def test_each_model_is_on_one_gpu(self):
        with tempfile.TemporaryDirectory() as folder:
            program, out = os.path.join(folder, "kvqbench"), os.path.join(folder, "out")
            with open(program, "w", encoding="utf-8") as file:
                file.write('#!/bin/sh\nfor flag; do case $flag in --benchmark_out=*) echo "$@" >"${flag#*=}" ;; esac; done\n')
            os.chmod(program, 0o755)
            done = self.run_study("--out", out, "--kvqbench", program, "--gpus", "2,5", "--models", "a,b,c")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            gpus = {os.path.basename(path)[:-5]: re.search(r"--device=cuda:(\d)", read(path))[1]
                    for path in glob.glob(os.path.join(out, "*.json"))}
        self.assertEqual(gpus, {**{f"{part}_{model}": gpu for part in ("models", "power", "kivi")
                                   for model, gpu in (("a", "2"), ("b", "5"), ("c", "2"))},
                                **dict.fromkeys(("kernels", "kernels_ratios", "kernels_batch", "batch8", "batch32"), "5")})

    def test_bad_flags(self):
        for arguments, word in ((("--gpus", "one"), "--gpus"), (("--only", "speed"), "--only"), (("--kvqbench", "/no"), "/no"),
                                (("--what",), "--what")):
            with tempfile.TemporaryDirectory() as folder:
                done = self.run_study("--out", folder, *arguments)
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1), done.stderr)
            self.assertIn(word, done.stderr)


class MadeUp(Products, Once, unittest.TestCase):
    """Numbers that nobody measured: lines a + b context, and round ones."""

    MS = {"none": (4.0, 40e-6), "int4-hqq": (4.2, 10e-6), "int2-hqq": (4.3, 6e-6), "int4-hqq-kivi": (20.0, 90e-6)}
    RAN = {"none": "fused_decode_16bit", "int4-hqq": "fused_decode_int4", "int2-hqq": "fused_decode_int2"}
    BITS = {"none": 16, "int4-hqq": 4.5, "int2-hqq": 2.5, "int4-hqq-kivi": 4.5}

    @classmethod
    def make(cls):
        cls.source = os.path.join(cls.folder, "made-up")
        os.makedirs(cls.source)
        cells = [(model, spec, context) for model in ("made-a", "made-b") for spec in cls.MS for context in (2048, 8192, 32768)]
        cls.write("models", 1, [run for cell in cells for run in cls.model_runs(*cell)])
        cls.write("batch8", 2, [cls.decode("made-a", spec, context, 8) for spec in ("none", "int4-hqq")
                                for context in (2048, 8192)])
        cls.write("power", 3, [cls.row("power", *cell, 1, "energy by NVML's counter", watts=500.0, mj_per_token=2000.0)
                               for cell in cells])
        cls.write("kernels", 4, [
            cls.row(kernel, "made-a", spec, context, 1, cls.RAN[spec], us=10.0, us_min=9.0, us_max=11.0, gb_per_s=2500.0,
                    peak_fraction=0.5, **({"flash_us": 30.0, "cudnn_us": 20.0, "speedup": 2.0, "speedup_per_byte_ratio": 0.5}
                                          if kernel == "kernel_attention" else {}))
            for kernel in ("kernel_attention", "kernel_encode") for spec in cls.RAN for context in (2048, 131072)])
        super().make()

    @classmethod
    def write(cls, name, minute, runs):
        shape = {"num_params_b": None, "num_layers": 2, "num_q_heads": 8, "num_kv_heads": 2, "gqa_ratio": "4:1", "head_dim": 64,
                 "max_position_embeddings": 32768}
        context = {"date": f"2026-01-01T00:0{minute}:00+00:00", "gpu": "made-up GPU", "gpu_memory_bytes": str(140 * 2**30),
                   "kvqbench_commit": "0123456789ab", "decode_tokens": "64", "runs": "3", "seed": "42", "dtype": "Half",
                   "protocol": "decode", **{f"model_config {model}": json.dumps(shape) for model in ("made-a", "made-b")}}
        with open(os.path.join(cls.source, name + ".json"), "w", encoding="utf-8") as file:
            json.dump({"context": context, "benchmarks": runs}, file)

    @staticmethod
    def row(measurement, model, spec, context, batch, ran, **counters):
        return {"name": f"{measurement}/{model}/fused/{spec}/ctx:{context}/batch:{batch}", "iterations": 1, "real_time": 1.0,
                "time_unit": "ms", "label": "cuda Half, " + ran, **counters}

    @staticmethod
    def spread(name, value):
        return {name: value, name + "_min": 0.99 * value, name + "_max": 1.02 * value}

    @classmethod
    def decode(cls, model, spec, context, batch):
        a, b = cls.MS[spec]
        ms = a + b * context * batch
        return cls.row("decode", model, spec, context, batch, cls.RAN.get(spec, "sdpa on decoded tokens (made up)"),
                       **cls.spread("ms_per_token", ms), **cls.spread("tokens_per_s", 1e3 * batch / ms), samples=3,
                       bytes_per_token=1e10, peak_fraction=1e10 / 4.5e12 / ms * 1e3)

    @classmethod
    def model_runs(cls, model, spec, context):
        size = cls.BITS[spec] * context * 1024
        return [cls.row("prefill", model, spec, context, 1, "flash", **cls.spread("prefill_ms", context / 32),
                        **cls.spread("tokens_per_s", 32e3), gflop=context * 16.0, peak_fraction=0.7, samples=3),
                cls.decode(model, spec, context, 1),
                cls.row("memory", model, spec, context, 1, "sdpa", kv_bytes_allocated=size, vram_peak_bytes=14 * 2**30 + size,
                        vram_reserved_bytes=15 * 2**30 + size, vram_total_bytes=140 * 2**30, vram_overflow=0,
                        beyond_weights_bytes=2**30 + size),
                cls.row("kv_size", model, spec, context, 1, "sdpa", kv_bytes=size, bits_per_element=cls.BITS[spec])]

    def test_what_was_made_up(self):
        rows = {(r["model"], r["spec"], r["batch"]): r for r in rows_of(read(self.out, "tables", "latency_model.csv"))}
        row = rows["made-a", "int4-hqq", "1"]
        self.assertAlmostEqual(float(row["base_ms"]), 4.2)
        self.assertAlmostEqual(float(row["us_per_1k_tokens"]), 10)
        self.assertAlmostEqual(float(row["fit_error"]), 0)
        self.assertEqual((row["break_even"], row["break_even_of_lines"]), ("6667", "6667"))  # 0.2 / 30e-6
        self.assertEqual(rows["made-a", "int4-hqq-kivi", "1"]["break_even"], "> 32768")
        self.assertEqual(rows["made-a", "int4-hqq-kivi", "1"]["break_even_of_lines"], "")
        self.assertEqual(rows["made-a", "int4-hqq", "8"]["break_even"], "<= 2048")
        found = {kind: cases for kind, _, cases in page.warnings(self.results)}
        self.assertEqual(len(found["Not fused"]), 6)
        self.assertIn("sdpa on decoded tokens (made up)", found["Not fused"][0])

    def test_lines_far_off_do_not_flatten_the_others(self):
        import costs
        def points(*values):
            return [(i, value, None) for i, value in enumerate(values)]
        near = {"none": points(4, 5), "int8-hqq": points(4, 4.5), "int4-hqq": points(4, 4.2)}
        self.assertEqual(costs.far_off({**near, "slow": points(12, 17)}), {"slow": (12, 17)})
        self.assertEqual(costs.far_off({**near, "slow": points(7, 17)}), {})
        self.assertEqual(costs.far_off({"none": near["none"], "slow": points(12, 17)}), {})  # they are what there is to see
        self.assertEqual(costs.far_off({"slow": points(12, 17), "fast": points(1, 2)}), {})

    def test_summaries_of_a_report_are_not_read_as_results(self):
        copy = os.path.join(self.folder, "copy")
        shutil.copytree(self.source, copy)
        self.assertEqual(report(copy, "--out", copy).returncode, 0)
        self.assertTrue(os.path.exists(os.path.join(copy, "tables", "summary_made-a.json")))
        again = reading.load([copy])
        self.assertEqual(len(again.cells), len(self.results.cells))


if __name__ == "__main__":
    unittest.main()
