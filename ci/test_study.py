#!/usr/bin/python3
"""Tests of ci/report on the reference study's own data: its tables come out as published, and what it published is set
against them."""

import glob
import json
import math
import os
import unittest

import claims
import reading
import study_tables
from tables import file_name
from testing import STUDY, Once, read, report, rows_of


@unittest.skipUnless(os.path.isdir(STUDY), f"{STUDY} is not there")
class Study(Once, unittest.TestCase):
    @classmethod
    def make(cls):
        cls.done = report(STUDY, "--out", cls.folder)
        cls.results = reading.load([STUDY])

    def published(self, name):
        return read(STUDY, "tables", name)

    def made(self, name):
        return read(self.folder, "tables", name)

    def test_phase_b_equals_the_published_rows_cell_by_cell(self):
        name = "phase_b_long_context.csv"
        published, made = rows_of(self.published(name)), rows_of(self.made(name))
        self.assertEqual((len(published), len(made)), (80, 100))
        by = {(row["model"], row["kv_quant"], row["context_len"]): row for row in made}
        self.assertEqual(len(by), 100)
        for row in published:
            self.assertEqual(by[row["model"], row["kv_quant"], row["context_len"]], row)
        # Byte for byte but for the model that the published table lacks.
        lines = [line for line in self.made(name).splitlines(True) if not line.startswith("Gemma")]
        self.assertEqual("".join(lines), self.published(name))

    def test_latex_tables_equal_the_published_ones(self):
        for name in ("profiling_table_all.tex", "model_metrics_table.tex"):
            self.assertEqual(self.made(name).rstrip("\n"), self.published(name), name)
        rows = lambda text: [line for line in text.splitlines() if line.endswith(r"\\")]  # noqa: E731
        made = rows(self.made("delta_ppl_cross_model.tex"))
        self.assertEqual([line for line in made if "Gemma" not in line],
                         rows(self.published("delta_ppl_cross_model.tex")))
        self.assertEqual(len(made), 6)
        self.assertIn(r"\textbf{Model} & \textbf{Config}", self.made("profiling_table_all_en.tex"))
        self.assertIn("Modell & PPL", self.made("delta_ppl_cross_model_de.tex"))

    def test_summaries_equal_the_published_ones(self):
        for path in glob.glob(os.path.join(STUDY, "raw", "long_context", "*_summary.json")):
            published = json.loads(read(path))
            made = json.loads(self.made(f"summary_{file_name(published['model'])}.json"))
            by_file = {row["json_file"]: row for row in made["combinations"]}
            self.assertEqual(sorted(by_file), sorted(row["json_file"] for row in published["combinations"]))
            for row in published["combinations"]:  # only merged ones have vram_reserved_mb
                self.assertEqual({key: by_file[row["json_file"]][key] for key in row}, row)
            self.assertEqual(made["merged_from"], sorted(by_file))

    def test_spearman_of_kurtosis(self):
        rows = rows_of(read(self.folder, "figures", "kurtosis_vs_ppl_delta.csv"))
        self.assertEqual(len(rows), 10)
        self.assertEqual(f"{float(rows[0]['spearman']):.2f}", "0.74")

    def test_published_statements_that_the_data_contradict(self):
        rows = rows_of(self.made("published_statements.csv"))
        found = {row["statement"]: row for row in rows}
        self.assertEqual([row["statement"] for row in rows if row["holds"] == "True"],
                         ["Kurtosis of keys goes with the change of perplexity: Spearman 0.74, n = 10."])
        self.assertGreaterEqual(len(found), 20)
        # The figures of the study's behavioural analysis, which come out of the data here.
        everything = " ".join(row["finding"] for row in rows)
        for figure in ("3.00 (Yi-1.5-9B)", "51.5 tokens/s, not 16.3", "2 warm-ups and 1 run", "100 of 100 cells: not sampled",
                       "5 cells reserve more", "0.03 tokens/s", "32727 of 32607 MiB", "80 of 80 caches", "4 to 32 channels",
                       "-0.0048 (INT8)", "-0.1908 (INT2)", "+0.8136, not +43.70", "+2,273, not +35,926", "+523.5 %", "+4.3 %",
                       "57.826 (sage)", "80 rows, the raw files have 100", "33793 MiB", "7.5 % in all 72"):
            self.assertIn(figure, everything)

    def test_statements_are_computed_and_not_typed_in(self):
        folder = os.path.join(self.folder, "changed", "raw", "long_context")
        os.makedirs(folder)
        for path in glob.glob(os.path.join(STUDY, "raw", "long_context", "*.json")):
            data = json.loads(read(path))
            for row in data.get("measurements", []):
                row["avg_power_watts"], row["overhead_pct"] = 300.0, 5.0
            with open(os.path.join(folder, os.path.basename(path)), "w", encoding="utf-8") as file:
                json.dump(data, file)
        changed = os.path.join(self.folder, "changed")
        verdicts = {claim.where: claim for claim in claims.check(reading.load([changed]), [changed])}
        self.assertTrue(verdicts["raw JSON files, measurements[].overhead_pct"].holds)
        self.assertTrue(verdicts["raw JSON files"].holds)

    def test_files_of_other_versions_are_named_and_the_rest_goes_on(self):
        self.assertEqual(self.done.returncode, 0)
        self.assertEqual(self.done.stderr.count("left out"), 6)
        for name in ("profile_qwen2_7b_20260126_035838.json", "mistralai_Mistral-7B-v0.1_fp16_20251129_143443.json"):
            self.assertIn(name, self.done.stderr)
        self.assertEqual(len(self.results.files), 91)

    def test_earlier_runs_of_the_same_are_superseded(self):
        old = [file for file in self.results.files if "archive_pre_fix" in file.path and file.kind == "v2"]
        self.assertEqual(len(old), 15)
        for file in old:
            self.assertIn("raw/long_context/", file.superseded_by)
        self.assertFalse(any(file.superseded_by for file in self.results.files
                             if file.path.startswith(("raw/long_context", "history/raw/phase_a_v3"))))
        self.assertEqual(self.results.runs()[0], "raw/long_context")

    def test_figures(self):
        made = set(os.listdir(os.path.join(self.folder, "figures")))
        for name in ("kurtosis_vs_ppl_delta", "vram_vs_context", "delta_ppl_heatmap", "needle_heatmap",
                     "layer_kurtosis_profile", "kurtosis_violin", "kv_key_distributions", "pareto_kld", "pareto_decode",
                     "stability_heatmap", "memory_loglog", "latency_vs_context"):
            for ending in ("pdf", "svg", "png", "csv"):
                self.assertIn(f"{name}.{ending}", made)
            self.assertTrue(read(self.folder, "figures", name + ".svg").rstrip().endswith("</svg>"))
            with open(os.path.join(self.folder, "figures", name + ".png"), "rb") as file:
                self.assertEqual(file.read(8), b"\x89PNG\r\n\x1a\n")
            self.assertGreater(len(rows_of(read(self.folder, "figures", name + ".csv"))), 3)
        found = rows_of(read(self.folder, "figures", "needle_heatmap.csv"))
        self.assertEqual(len(found), 5 * 5 * 4 * 5)  # models, schemes, contexts, depths
        mistral = [row for row in found if row["panel"] == "Mistral-7B" and row["spec"] == "none"]
        self.assertEqual(sum(float(row["found"]) for row in mistral), 10)  # of 20: success_rate 0.5
        kv = rows_of(read(self.folder, "figures", "memory_loglog.csv"))
        self.assertIn({"panel": "Qwen2-7B", "spec": "int4-hqq", "context": "32768", "value": "504.0"}, kv)


class Numbers(unittest.TestCase):
    def test_spearman(self):
        self.assertAlmostEqual(claims.spearman([1, 2, 3, 4], [10, 20, 30, 40])[0], 1)
        # 1 - 6 (1 + 1 + 1 + 1) / (5 * 24), Spearman 1904
        self.assertAlmostEqual(claims.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])[0], 0.8)
        # Ties at their mean rank: (1.5, 1.5, 3) against (1, 2, 3) is sqrt(3)/2.
        self.assertAlmostEqual(claims.spearman([7, 7, 9], [1, 2, 3])[0], math.sqrt(3) / 2)
        self.assertGreater(claims.spearman(range(8), [3, 1, 4, 1, 5, 9, 2, 6])[1], 0.05)

    def test_formats_of_the_study(self):
        self.assertEqual([study_tables.delta_text(v) for v in (-0.0006, 0.2248, 43.7049, 35926.2553, -100.4, None)],
                         ["-0.0006", "+0.2248", "+43.70", "+35,926", "-100", "--"])
        self.assertEqual(study_tables.power_of_ten(35932.5, False), r"$3.6 \times 10^{4}$")
        self.assertEqual(study_tables.power_of_ten(99999.0, True), r"$+1.0 \times 10^{5}$")
        labels = {"none": ("FP16", "FP16", "FP16"), "int4-hqq": ("INT4", "INT4 (HQQ)", "INT4"),
                  "int2-hqq-kivi": ("INT2-KIVI", "INT2 (KIVI)", "KIVI"), "q8_0": ("q8_0", "q8_0", "q8_0"),
                  "int4-quanto": ("INT4-QUANTO", "INT4 (Quanto)", "INT4-QUANTO"),
                  "int4-hqq@residual=64": ("int4-hqq@residual=64",) * 3}
        for spec, expected in labels.items():
            self.assertEqual((study_tables.csv_label(spec), study_tables.long_label(spec), study_tables.short_label(spec)), expected)


if __name__ == "__main__":
    unittest.main()
