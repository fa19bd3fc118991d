#!/usr/bin/python3
"""Tests of ci/reading.py and ci/results.py: which files are refused and why, and what is computed from what was read."""

import json
import os
import shutil
import tempfile
import unittest

import reading
from results import Cell, break_even, fit_latency
from testing import read, report


class Schemas(unittest.TestCase):
    def test_have_only_what_both_validators_know_alike(self):
        """fastjsonschema reads them as draft 7, and what it does not know holds for it."""
        known = {"$schema", "$comment", "title", "description", "type", "required", "properties", "additionalProperties", "patternProperties",
                 "items", "minItems", "minLength", "enum", "const", "pattern", "minimum", "maximum", "exclusiveMinimum"}
        def walk(schema):
            if not isinstance(schema, dict):
                return
            self.assertLessEqual(set(schema), known)
            for word in ("items", "additionalProperties"):
                walk(schema.get(word))
            for word in ("properties", "patternProperties"):
                for part in schema.get(word, {}).values():
                    walk(part)
        names = os.listdir(os.path.join(reading.HERE, "schema"))
        self.assertGreater(len(names), 3)
        for name in names:
            walk(json.loads(read(reading.HERE, "schema", name)))


class Refusals(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="kvq_refusals_")
        self.addCleanup(shutil.rmtree, self.folder)

    def put(self, name, data):
        with open(os.path.join(self.folder, name), "w", encoding="utf-8") as file:
            file.write(data if isinstance(data, str) else json.dumps(data))

    def good(self, **changes):
        row = {"context_len": 4096, "prefill_ms": 1000.0, "prefill_tokens_per_sec": 4096.0, "decode_ms": 5000.0,
               "decode_tokens": 128, "decode_tokens_per_sec": 25.6, "kv_cache_mb": 144.0, **changes.pop("row", {})}
        return {"schema_version": "2.0", "experiment_id": "x", "timestamp": "2026-05-03T15:59:30", "model": "a/b",
                "model_config": {"num_layers": 2, "num_q_heads": 4, "num_kv_heads": 2, "gqa_ratio": "2:1", "head_dim": 64},
                "attn_backend": "sdpa", "kv_quant": {"enabled": False, "nbits": None, "backend": None},
                "environment": {"gpu_name": "G"}, "config": {"decode_tokens": 128, "ppl_dataset": "w", "ppl_tokens": 4096},
                "measurements": [row], "benchmarks": {}, **changes}

    def test_bad_files_are_named_and_the_rest_goes_on(self):
        self.put("good.json", self.good())
        self.put("cut.json", json.dumps(self.good())[:200])
        self.put("old.json", self.good(schema_version="1.0"))
        self.put("lacks.json", {key: value for key, value in self.good().items() if key != "model"})
        self.put("seconds.json", self.good(row={"prefill_ms": 1.0}))
        self.put("negative.json", self.good(row={"kv_cache_mb": -1}))
        self.put("text.json", self.good(row={"decode_ms": "fast"}))
        self.put("foreign.json", {"context": {"date": "2026-01-01T00:00:00"}, "benchmarks": [{"name": "BM_Sort/8"}]})
        self.put("list.json", [1, 2])
        self.put("deep.json", "[" * 100000)
        self.put("empty.json", "")
        with open(os.path.join(self.folder, "binary.json"), "wb") as file:
            file.write(b"\xff\xfe\x00")
        results = reading.load([self.folder])
        self.assertEqual([file.path for file in results.files], ["good.json"])
        self.assertEqual(len(results.cells), 1)
        reasons = {os.path.basename(path): reason for path, reason in results.refused}
        for name, word in {"cut": "cut off", "old": "schema_version '1.0'", "lacks": "'model'", "seconds": "units",
                           "negative": "kv_cache_mb", "text": "decode_ms", "foreign": "name", "list": "list",
                           "deep": "deep", "empty": "cut off", "binary": "UTF-8"}.items():
            self.assertIn(word, reasons[name + ".json"])
            self.assertNotIn("\n", reasons[name + ".json"])
        done = report(self.folder, "--out", os.path.join(self.folder, "out"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr.count("left out"), 11)
        # A second report of the same folder does not read the first one's summaries.
        self.assertEqual(report(self.folder, "--out", os.path.join(self.folder, "out")).stderr, done.stderr)
        self.assertIn("cut.json", read(self.folder, "out", "index.html"))

    def test_bad_arguments(self):
        self.put("cut.json", "{")
        for arguments, word in (([self.folder], "--out"), (["--out", "x"], "folders"), ([self.folder, "--out"], "--out"),
                                ([self.folder, "--outs=x"], "--outs"), (["/no/such", "--out", "x"], "/no/such"),
                                ([self.folder, "--out", os.path.join(self.folder, "out")], "no results")):
            done = report(*arguments)
            self.assertEqual(done.returncode, 2, arguments)
            self.assertIn(word, done.stderr.splitlines()[-1])
        self.assertFalse(os.path.exists(os.path.join(self.folder, "out")))


class Derived(unittest.TestCase):
    def test_wilson(self):
        # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, and 0 of 20.
        for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
            found = reading.wilson(successes, trials)
            self.assertAlmostEqual(found[0], low, places=4)
            self.assertAlmostEqual(found[1], high, places=4)

    def cells(self, rates):
        return {context: Cell("r", "d", "m", "b", "s", context, 1, {"decode.tokens_per_s": 1e3 / ms})
                for context, ms in rates.items()}

    def test_break_even(self):
        plain = self.cells({1024: 10, 2048: 12, 4096: 20})
        def text(rates):
            cells = self.cells(rates)
            break_even(plain, cells)
            cell = next(iter(cells.values()))
            return cell.texts.get("decode.break_even"), cell["decode.break_even_context"]
        self.assertEqual(text({1024: 12, 2048: 14, 4096: 18}), ("3072", 3072))  # +2 at 2048, -2 at 4096
        self.assertEqual(text({1024: 12, 2048: 14, 4096: 21}), ("> 4096", None))
        self.assertEqual(text({1024: 9, 2048: 11, 4096: 18}), ("<= 1024", 1024))
        self.assertEqual(text({1024: 9, 2048: 14, 4096: 18}), ("3072", 3072))  # only what stays below counts
        self.assertEqual(text({1024: 9}), (None, None))

    def test_latency_fit(self):
        cells = self.cells({0: 4.0, 1000: 4.1, 2000: 4.2, 4000: 4.4})
        fit_latency(cells)
        for cell in cells.values():
            self.assertAlmostEqual(cell["decode.fit_base_ms"], 4.0)
            self.assertAlmostEqual(cell["decode.fit_us_per_1k_tokens"], 100)
        two = self.cells({0: 4.0, 1000: 4.1})
        fit_latency(two)
        self.assertIsNone(two[0]["decode.fit_base_ms"])  # two points always lie on a line



if __name__ == "__main__":
    unittest.main()
