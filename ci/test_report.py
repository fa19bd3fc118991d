#!/usr/bin/python3
"""Tests of ci/report on what kvqbench measured just now: tables, figures, schema 2.0, and the page in a browser.
KVQ_BENCH_EXE: the kvqbench whose results are read (default build/release/kvqbench)."""

import json
import os
import re
import shutil
import subprocess
import unittest

import browser
import claims
import drawing
import exports
import figures
import latex
import page
import reading
import tables
from results import Cell, File, Results
from testing import BASELINES, ENVIRONMENT, KVQBENCH, STUDY, Once, OnPage, read, report, rows_of, violations, write_model


class Measured(Once):
    """What kvqbench measured just now, its version-2 files, and the reports of both: once for all classes."""

    SPECS = ["none", "int8-hqq", "int4-hqq", "int2-hqq", "int2-hqq-kivi"]

    @classmethod
    def setUpClass(cls):
        if not hasattr(Measured, "results"):
            super(Measured, Measured).setUpClass()
            unittest.addModuleCleanup(shutil.rmtree, Measured.folder)

    @classmethod
    def tearDownClass(cls):
        pass

    @classmethod
    def make(cls):
        cls.parameters = write_model(os.path.join(cls.folder, "tiny"))
        with open(os.path.join(cls.folder, "text.txt"), "w", encoding="utf-8") as file:
            file.write("The capital of France is Paris. " * 800)
        os.makedirs(os.path.join(cls.folder, "run"))
        cls.json = os.path.join(cls.folder, "run", "benchmarks.json")
        subprocess.run([KVQBENCH, "--models=" + os.path.join(cls.folder, "tiny"), "--corpus-file=" +
                        os.path.join(cls.folder, "text.txt"), "--schemes=" + ",".join(cls.SPECS), "--contexts=256,512",
                        "--batch=1,2", "--windows=3", "--runs=3", "--max-runs=3", "--decode-tokens=4", "--dtype=float32",
                        "--benchmark_filter=.*|sensitivity", "--benchmark_out=" + cls.json],
                       check=True, capture_output=True, env=ENVIRONMENT)
        done = subprocess.run([KVQBENCH, "--to-v2=" + os.path.join(cls.folder, "v2"), cls.json], check=True,
                              capture_output=True, text=True)
        cls.v2 = done.stdout.split()
        cls.data = json.loads(read(cls.json))
        cls.done = report(os.path.join(cls.folder, "run"), "--out", os.path.join(cls.folder, "out"))
        cls.release = cls.data["context"]["kvqbench_build"] == "Release"  # others refuse to time
        cls.results = reading.load([os.path.join(cls.folder, "run")])


class Ours(Measured, unittest.TestCase):
    def cell(self, results, spec, context, batch=1):
        return next(c for c in results.cells if (c.spec, c.context, c.batch) == (spec, context, batch))

    def test_every_counter_is_read(self):
        self.assertEqual(self.done.returncode, 0, self.done.stderr)
        self.assertEqual(len(self.results.cells), 5 * 2 * 2)
        for run in self.data["benchmarks"]:
            name = reading.NAME.match(run["name"])
            cell = self.cell(self.results, name["spec"], int(name["context"]), int(name["batch"]))
            if run.get("error_occurred"):
                self.assertEqual(cell.skipped[name["measurement"]], run["error_message"])
                continue
            for key, value in run.items():
                if key not in reading.NO_COUNTERS:
                    self.assertEqual(cell[f"{name['measurement']}.{key}"], value)

    def test_tables(self):
        text = read(self.folder, "out", "table.md")
        self.assertIn("tiny, sdpa, context 512, batch 2; Float on", text)
        cell = self.cell(self.results, "int4-hqq", 512)
        rows = text.split("context 512, batch 1")[1].splitlines()
        row = next(line for line in rows if line.startswith("| int4-hqq "))
        low, high = cell["perplexity.kld_nats_lo"], cell["perplexity.kld_nats_hi"]
        self.assertIn(f"{cell['perplexity.kld_nats']:.5f} [{low:.5f}, {high:.5f}]", row)
        self.assertIn(f"{cell['kv_size.bits_per_element']:.3f}", row)
        latex = read(self.folder, "out", "tables", "results_table.tex")
        self.assertEqual(latex.count(r"\begin{tabular}"), 2 * 4)
        self.assertEqual(latex.count("{"), latex.count("}"))
        self.assertNotRegex(latex.replace("{!}{%", ""), r"(?<!\\)[%_#]")
        flat = rows_of(read(self.folder, "out", "tables", "results.csv"))
        self.assertEqual(len(flat), 20)
        one = next(row for row in flat if (row["spec"], row["context"], row["batch"]) == ("int4-hqq", "512", "1"))
        self.assertEqual(float(one["perplexity.kld_nats"]), cell["perplexity.kld_nats"])

    def test_tables_of_batches_alone(self):
        data = dict(self.data, benchmarks=[run for run in self.data["benchmarks"] if run["name"].endswith("batch:2")])
        folder = os.path.join(self.folder, "batches")
        os.makedirs(folder)
        with open(os.path.join(folder, "benchmarks.json"), "w", encoding="utf-8") as file:
            json.dump(data, file)
        written = exports.write_all(reading.load([folder]), os.path.join(folder, "tables"))
        self.assertIn("results.csv", written)
        self.assertFalse([name for name in written if name.startswith("summary_")])

    def test_tables_of_the_study_have_no_rows_of_what_it_has_no_columns_for(self):
        written = exports.write_all(reading.load([os.path.join(BASELINES, "smollm2-135m-lm-eval")]), os.path.join(self.folder, "lm-eval"))
        self.assertEqual(sorted(written), ["items.csv", "results.csv", "results_table.tex", "results_table_de.tex"])

    def test_every_figure_has_its_numbers(self):
        made = os.listdir(os.path.join(self.folder, "out", "figures"))
        for name, _, _, _ in figures.FIGURES:
            if name in ("kurtosis_vs_ppl_delta", "kernels"):
                continue  # of several models, and of a GPU
            if name in ("roofline", "pareto_decode", "latency_vs_context", "decode_speed") and not self.release:
                continue
            for ending in ("pdf", "svg", "png", "csv"):
                self.assertIn(f"{name}.{ending}", made)
        rows = rows_of(read(self.folder, "out", "figures", "layer_sensitivity.csv"))
        cell = self.cell(self.results, "int4-hqq", 512)
        found = [float(row["value"]) for row in rows
                 if (row["spec"], row["context"], row["part"]) == ("int4-hqq", "512", "keys")]
        self.assertEqual(found, cell.layers("sensitivity.kld_nats_k"))
        self.assertNotIn("Warning", self.done.stderr)

    def test_version_2_files_read_back_as_what_they_came_from(self):
        self.assertEqual(len(self.v2), 5)
        back = reading.load([os.path.join(self.folder, "v2")])  # checks them against the schema
        self.assertEqual(back.refused, [])
        self.assertEqual(len(back.cells), 5 * 2)
        for cell in back.cells:
            ours = self.cell(self.results, cell.spec, cell.context)
            same = ["kv_size.kv_bytes", "kv_size.bits_per_element", "needle.needle_rate", "needle.needle_rate_lo",
                    "needle.needle/depth:50"]
            same += ["prefill.prefill_ms", "prefill.tokens_per_s", "decode.tokens_per_s"] if self.release else []
            for key in same:
                self.assertIsNotNone(ours[key] if key != "kv_size.bits_per_element" else cell[key])
                if key != "kv_size.bits_per_element":  # there of elements in float32, here of 16 bits
                    self.assertAlmostEqual(cell[key], ours[key], delta=1e-12 * abs(ours[key]), msg=key)
            self.assertIsNone(cell["memory.vram_peak_bytes"])  # not measured: never 0
            self.assertIsNone(cell["power.watts"])
        for spec in self.SPECS:
            cell, ours = self.cell(back, spec, 512), self.cell(self.results, spec, 512)
            self.assertEqual(cell["perplexity.ppl_reference"], ours["perplexity.ppl_reference"])
            if spec != "none":
                self.assertEqual(cell["perplexity.ppl"], ours["perplexity.ppl"])

    def test_version_2_fields(self):
        by_spec = {}
        for path in self.v2:
            data = json.loads(read(path))
            by_spec[data["kv_quant"]["spec"]] = data
            self.assertEqual(os.path.basename(path), data["experiment_id"] + ".json")
            self.assertRegex(data["experiment_id"], r"^tiny_sdpa_[a-z0-9_]+_\d{8}_\d{6}$")
        published = ["schema_version", "experiment_id", "timestamp", "model", "model_config", "attn_backend", "kv_quant",
                     "environment", "hardware", "config", "measurements", "benchmarks", "combo_elapsed_s"]
        kivi = by_spec["int2-hqq-kivi"]
        self.assertEqual(sorted(kivi), sorted(published))
        self.assertEqual(kivi["kv_quant"], {"enabled": True, "nbits": 2, "backend": "hqq", "axis_key": 0, "axis_value": 1,
                                            "asymmetric": True, "residual_length": 128, "spec": "int2-hqq-kivi"})
        self.assertEqual(by_spec["int4-hqq"]["kv_quant"]["axis_key"], 1)
        self.assertEqual(by_spec["none"]["kv_quant"], {"enabled": False, "nbits": None, "backend": None, "axis_key": None,
                                                       "axis_value": None, "asymmetric": False, "spec": "none"})
        self.assertEqual(kivi["model_config"], {
            "num_params_b": self.parameters / 1e9, "num_layers": 2, "num_q_heads": 2, "num_kv_heads": 1, "gqa_ratio": "2:1",
            "head_dim": 64, "max_position_embeddings": 1024})
        for row in kivi["measurements"]:
            self.assertEqual(row["decode_tokens"], 4)
            self.assertIsNone(row["vram_peak_mb"])
            if self.release:
                self.assertAlmostEqual(row["decode_ms"] * row["decode_tokens_per_sec"], 4000, places=6)
                whole = row["prefill_ms"] + row["decode_ms"]
                spent = row["quant_overhead_ms"] + row["dequant_overhead_ms"]
                self.assertAlmostEqual(row["overhead_pct"], 100 * spent / whole, places=9)

    def test_conversion_refuses_what_is_no_result(self):
        for name, text in (("cut.json", read(self.json)[:2000]), ("other.json", '{"context": {}, "benchmarks": [{"name": "BM_x"}]}'),
                           ("list.json", "[]")):
            path = os.path.join(self.folder, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            done = subprocess.run([KVQBENCH, "--to-v2=" + os.path.join(self.folder, "none"), path], capture_output=True,
                                  text=True)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1), done.stderr)
            self.assertIn(name, done.stderr)
        self.assertFalse(os.path.exists(os.path.join(self.folder, "none")))

    def test_mixed_with_the_study(self):
        if not os.path.isdir(STUDY):
            self.skipTest(f"{STUDY} is not there")
        mixed = reading.load([os.path.join(self.folder, "run"), os.path.join(STUDY, "raw", "long_context")])
        self.assertEqual(mixed.runs(), ["long_context", "run"])
        self.assertEqual({len(mixed.of("run")), len(mixed.of("long_context"))}, {20, 100})


class Parts(unittest.TestCase):
    """Of tables and page, by results that were made up."""

    def test_columns(self):
        column = tables.Column("x", "x", "x", "{:+.3f}", interval=True)
        cell = Cell("r", "d", "m", "b", "s", 1, 1, {"x": -0.0001, "x_lo": -0.5, "x_hi": 1e-5})
        self.assertEqual(column.text(cell), "+0.000 [-0.500, +0.000]")  # no minus before a zero
        self.assertEqual(latex.column_text(column, cell), r"\shortstack[r]{$+$0.000 \\ {\tiny [$-$0.500, $+$0.000]}}")

    def test_further_tasks_have_columns_of_their_own(self):
        cell = Cell("r", "d", "m", "b", "s", 1, 1, {"lm_eval_cloze.score": 40.0, "lm_eval_cloze.score_lo": 26.3, "lm_eval_cloze.score_hi": 55.4})
        self.assertTrue(tables.has_numbers(cell))
        self.assertEqual([(column.heading, column.text(cell)) for column in tables.columns_of([cell])],
                         [("cloze % [95 %]", "40.0 [26.3, 55.4]")])

    def test_no_line_ends_where_it_reads_badly(self):
        self.assertEqual(page.prose("top-1 98.0 % [97.5, 98.5] at 9.44 bits: `-ctk q8_0`"),
                         "top\u20111 98.0\u00a0% [97.5,\u00a098.5] at 9.44\u00a0bits: <code><span>-ctk</span> <span>q8_0</span></code>")

    def test_warnings(self):
        results = Results()
        file = File("f", "r", "benchmarks", "2026-01-01T00:00:00", {"load_avg": [5.0], "num_cpus": 2})
        results.files.append(file)
        cell = results.cell(file, "d", "m", "b", "int8-hqq", 1024)
        cell.values.update({
            "decode.tokens_per_s": 10.0, "decode.tokens_per_s_min": 9.0, "decode.tokens_per_s_max": 11.0,
            "prefill.tokens_per_s": 10.0, "prefill.tokens_per_s_min": 9.9, "prefill.tokens_per_s_max": 10.1,
            "perplexity.kld_nats": 0.002, "perplexity.kld_nats_lo": 0.0009, "perplexity.kld_floor_nats": 0.001,
            "perplexity.delta_ppl": 0.01, "perplexity.delta_ppl_lo": -0.01, "perplexity.delta_ppl_hi": 0.03,
            "decode.throttled": 1, "prefill.throttled": 0, "prefill.foreign_processes": 2,
            "quantize.disturbed": 1, "prefill.disturbed": 0, "needle.encoded_share": 0.24, "kv_size.encoded_share": 0.25})
        cell.texts["decode.label"] = "cuda Half, sdpa; throttled: power cap; energy by NVML's counter"
        cell.skipped = {"needle": "failed: no", "memory": "skipped: CUDA", "error": "skipped: nothing is encoded"}
        found = {kind: cases for kind, _, cases in page.warnings(results)}
        self.assertEqual({kind: len(cases) for kind, cases in found.items()}, {
            "Failed": 1, "Throttled": 1, "Disturbed": 1, "Shared GPU": 1, "Busy machine": 1, "Spread": 1, "Within the noise": 1,
            "Below its own confidence": 1, "Skipped": 1, "Hardly encoded": 1})
        self.assertEqual(found["Hardly encoded"], ["m, b, int8-hqq, 1k, batch 1: needle: hardly encoded, 24 % of what was read"])
        self.assertEqual(found["Throttled"], ["m, b, int8-hqq, 1k, batch 1: decode.throttled (throttled: power cap)"])
        cell.values.update({"perplexity.kld_nats_lo": 0.0015, "perplexity.delta_ppl_lo": 0.001,
                            "decode.tokens_per_s_min": 9.8, "decode.tokens_per_s_max": 10.2})
        for key in ("decode.throttled", "needle.encoded_share", "prefill.foreign_processes", "quantize.disturbed"):
            del cell.values[key]
        cell.skipped, file.facts["load_avg"] = {}, [0.5]
        self.assertEqual(page.warnings(results), [])


# ---- the page, in a browser

class Page(Measured, OnPage, unittest.TestCase):
    """The page of kvqbench's results and, where it is there, the study's."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.index = os.path.join(cls.folder, "out", "index.html")
        cls.browser = browser.Browser()

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()

    def setUp(self):
        self.browser.errors.clear()
        self.browser.requests.clear()
        self.browser.look()
        self.browser.open(self.index)

    def tearDown(self):
        self.assertEqual(self.browser.errors, [])
        for url in self.browser.requests:  # nothing from a network
            self.assertTrue(url.startswith(("file://" + os.path.realpath(self.index), "data:")), url[:100])

    def click(self, name):
        self.browser.run("[...document.querySelectorAll('#results thead button')]"
                         f".find(b => b.textContent === {name!r}).click()")

    def test_it_has_everything(self):
        text = self.browser.run("document.body.innerText")
        for words in ("What was measured on what", "Warnings", "Results", "Figures", "Raw data of every cell",
                      "How to make it again", "20 of 20 rows", "git checkout", "ci/study --out", "--windows=3", "--needles=both", "--decode-tokens="):
            self.assertIn(words, text)
        self.assertEqual(len(self.column("scheme")), 20)
        heads = self.browser.run("[...document.querySelectorAll('#results th')].map(h => h.textContent)")
        self.assertEqual(heads[:4], ["scheme", "context", "batch", "KV MiB"])  # one model needs no column
        self.assertGreaterEqual(self.browser.run(
            "document.querySelectorAll('figure svg[role=img][aria-label]').length"), 7)
        self.assertEqual(self.browser.run("document.querySelectorAll('.cells details').length"), 20)
        ids = self.browser.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
        self.assertEqual(len(ids), len(set(ids)), "figures share an id")
        # Every reference of a figure leads somewhere: else glyphs and clips are lost.
        self.assertEqual(self.browser.run(
            "[...document.querySelectorAll('svg use')].filter(u => !document.querySelector(CSS.escape ? "
            "'#' + CSS.escape(u.getAttribute('xlink:href').slice(1)) : '')).length"), 0)
        links = self.browser.run(
            "[...document.querySelectorAll('a[href^=figures],a[href^=tables]')].map(a => a.getAttribute('href'))")
        self.assertGreater(len(links), 30)
        for link in links:
            self.assertTrue(os.path.exists(os.path.join(self.folder, "out", link)), link)

    def test_the_first_screen_answers(self):
        # Sentences stand first and the picture beside them; on a phone the sentences.
        for look in ({"width": 1280, "height": 800}, {"width": 390, "height": 844}, {"width": 1280, "height": 800, "dark": True}):
            with self.subTest(**look):
                self.browser.look(**look)
                self.browser.open(self.index)
                places = self.browser.run("['.says li', '.answer figure', '#results', '#warnings'].map("
                                          "s => document.querySelector(s).getBoundingClientRect().top)")
                self.assertLess(places[0], 400)
                self.assertEqual(places[:1] + places[2:], sorted(places[:1] + places[2:]))
                if look["width"] > 1000:
                    self.assertLess(places[1], 300)
        self.assertEqual(self.browser.run("document.querySelectorAll('.answer figure').length"), 1)
        # A name in a sentence opens its cell.
        self.browser.run("document.querySelector('.says a').click()")
        self.assertTrue(self.browser.run(
            "new Promise(r => setTimeout(() => r(document.querySelector(location.hash).open), 200))"))

    def test_sorting(self):
        for heading in ["bits/el.", "ppl"] + ["decode tok/s"] * self.release:
            self.click(heading)
            up = [float(text) for text in self.column(heading)]
            self.assertEqual(up, sorted(up))
            self.click(heading)
            down = [float(text) for text in self.column(heading)]
            self.assertEqual(down, sorted(up, reverse=True))
        self.assertEqual(self.browser.run("document.querySelectorAll('#results th[aria-sort=descending]').length"), 1)
        self.click("nmse K")  # `none` has none: last, whichever way
        for _ in range(2):
            self.assertEqual(self.column("nmse K")[-4:], ["-"] * 4)
            self.assertNotIn("-", self.column("nmse K")[:-4])
            self.click("nmse K")

    def test_filters(self):
        self.choose("spec", "int4-hqq")
        self.assertEqual(set(self.column("scheme")), {"int4-hqq"})
        self.assertEqual(len(self.column("scheme")), 4)
        self.choose("context", "256")
        self.choose("batch", "2")
        self.assertEqual((self.column("scheme"), self.column("context")), (["int4-hqq"], ["256"]))
        self.assertEqual(self.browser.run("document.getElementById('count').textContent"), "1 of 20 rows")
        self.browser.run("document.getElementById('reset').click()")
        self.assertEqual(len(self.column("scheme")), 20)
        self.browser.run("(() => { const s = document.getElementById('search'); s.value = 'KIVI 512';"
                         "s.dispatchEvent(new Event('input')); })()")
        self.assertEqual(self.column("scheme"), ["int2-hqq-kivi"] * 2)

    def test_raw_data_opens_from_the_table(self):
        self.browser.run("document.querySelector('#results tbody a').click()")
        self.assertTrue(self.browser.run(
            "new Promise(r => setTimeout(() => r(document.querySelector(location.hash).open), 200))"))
        text = self.browser.run("document.querySelector(location.hash).innerText")
        self.assertIn("kv_size.kv_bytes = ", text)

    def test_by_keyboard(self):
        # The first stop skips to the results; headings are buttons that Enter presses.
        self.browser.key("Tab", 9)
        self.assertEqual(self.browser.run("document.activeElement.className"), "skip")
        for _ in range(60):
            self.browser.key("Tab", 9)
            if self.browser.run("document.activeElement.closest('#results th') !== null"):
                break
        self.assertEqual(self.browser.run("document.activeElement.tagName"), "BUTTON")
        self.browser.key("Enter", 13, "\r")
        self.assertEqual(self.browser.run(
            "document.activeElement.closest('th').getAttribute('aria-sort')"), "ascending")
        outline = self.browser.run("getComputedStyle(document.activeElement).outlineStyle")
        self.assertEqual(outline, "solid")  # one sees where one is

    def accessible(self, path, **look):
        self.browser.look(**look)
        self.browser.open(path)
        self.assertEqual(violations(self.browser), [])

    def test_accessible(self):
        for look in ({}, {"dark": True}, {"width": 390, "height": 800}):
            with self.subTest(**look):
                self.accessible(self.index, **look)

    def test_on_a_phone_nothing_is_wider_than_the_screen(self):
        self.browser.look(width=360, height=740)
        self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), 360)

    def test_dark(self):
        paper = "getComputedStyle(document.body).backgroundColor"
        light = self.browser.run(paper)
        self.browser.look(dark=True)
        self.assertNotEqual(self.browser.run(paper), light)
        self.assertNotIn(drawing.INK, self.browser.run("document.querySelector('.figures').innerHTML"))

    def test_printed(self):
        self.browser.look(media="print")
        self.assertEqual(self.browser.run("getComputedStyle(document.querySelector('.filters')).display"), "none")
        path = os.path.join(self.folder, "page.pdf")
        self.browser.pdf(path)
        with open(path, "rb") as file:
            self.assertEqual(file.read(5), b"%PDF-")

    def test_it_works_without_scripts(self):
        html = re.sub(r"<script>.*?</script>", "", read(self.index), flags=re.S)
        for path in re.findall(r'(?:src|href)="([^"]*)"', html):
            self.assertNotRegex(path, r"^(https?:)?//")
        self.assertEqual(html.count("<tr data-"), 20)

    @unittest.skipUnless(os.path.isdir(STUDY), f"{STUDY} is not there")
    def test_the_page_of_the_study(self):
        out = os.path.join(self.folder, "study")
        # The figures are drawn once more in class Study; here the page counts.
        results = reading.load([STUDY])
        os.makedirs(out)
        page.write(results, [], [], claims.check(results, [STUDY]), [], [STUDY], out)
        self.index = os.path.join(out, "index.html")
        self.browser.open(self.index)
        self.assertEqual(len(self.column("scheme")), 155)
        text = self.browser.run("document.body.innerText")
        for words in ("NVIDIA GeForce RTX 5090", "contradicted", "Spearman 0.74, n = 10", "profile_qwen2_7b"):
            self.assertIn(words, self.browser.run("document.body.textContent") if words.startswith("profile") else text)
        self.choose("model", "Qwen/Qwen2-7B")
        self.choose("spec", "int4-hqq")
        self.choose("context", "32768")
        self.assertEqual(self.column("KV MiB"), ["504.00"])
        self.browser.requests.clear()
        self.accessible(self.index, dark=True)


if __name__ == "__main__":
    unittest.main()
