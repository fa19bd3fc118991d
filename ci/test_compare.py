#!/usr/bin/python3
"""Tests of ci/compare: its statistics against published and independently computed values, the rules of facts on
results of kvqbench, changed in one place each, and whole runs of two builds that are scripts with known times.
KVQ_BENCH_EXE: the kvqbench whose filter and results are used (default build/release/kvqbench)."""

import copy
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import unittest
import xml.etree.ElementTree

import yaml

import interleave
import prove_gate
import testing
import timing
from testing import BASELINES, HERE, KVQBENCH, ROOT

BASELINE = os.path.join(BASELINES, "smollm2-135m-cpu-sdpa", "benchmarks.json")
compare = testing.load("compare")


def run(*arguments):
    return testing.run(compare, *arguments)


class Statistics(unittest.TestCase):
    def test_signed_rank(self):
        # scipy 1.15.3: wilcoxon(x, method="exact").pvalue
        self.assertEqual(timing.signed_rank([0.11, -0.02, 0.07, 0.31, 0.05, 0.09, -0.01, 0.13]), 0.0390625)
        self.assertEqual(timing.signed_rank([0.1] * 7), 2 / 2**7)
        self.assertEqual(timing.signed_rank([-0.1, -0.2, -0.3, -0.4, -0.5]), 2 / 2**5)
        self.assertEqual(timing.signed_rank([0, 0, 0]), 1)

    def test_signed_rank_with_ties_is_the_count_over_all_signs(self):
        chance = random.Random(1)
        for _ in range(10):
            values = [chance.choice([-3, -2, -1, 1, 2, 3, 4]) for _ in range(8)]
            size = [abs(value) for value in values]
            rank = [sum(other < mine for other in size) + (1 + sum(other == mine for other in size)) / 2
                    for mine in size]
            sums = [sum(itertools.compress(rank, signs)) for signs in itertools.product([0, 1], repeat=8)]
            observed = sum(r for r, value in zip(rank, values) if value > 0)
            tail = min(sum(s <= observed for s in sums), sum(s >= observed for s in sums))
            self.assertEqual(timing.signed_rank(values), min(1, 2 * tail / len(sums)))

    def test_rank_sum(self):
        old, new = [1.2, 0.8, 1.1, 0.9, 1.05, 1.0, 0.95], [1.3, 1.25, 1.15, 0.97, 1.4, 1.22, 1.33]
        # scipy 1.15.3: mannwhitneyu(new, old, method="exact").pvalue
        self.assertAlmostEqual(timing.rank_sum(old, new), 0.011072261072261072, 15)
        self.assertEqual(timing.rank_sum([1, 1, 1], [1, 1, 1]), 1)

    def test_benjamini_hochberg(self):
        # The example of their paper, section 3.2: 15 p values, of which the procedure rejects four at 0.05.
        ps = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
              0.7590, 1.0]
        self.assertEqual([p <= 0.05 for p in timing.benjamini_hochberg(ps)], [True] * 4 + [False] * 11)
        # scipy 1.15.3: false_discovery_control
        expected = [0.008, 0.032, 0.0672, 0.0672, 0.0672, 0.08, 0.08457142857142856, 0.205]
        ps = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205]
        for order in (list(range(8)), [3, 0, 7, 1, 5, 2, 6, 4]):
            for place, p in zip(order, timing.benjamini_hochberg([ps[i] for i in order])):
                self.assertAlmostEqual(p, expected[place], 14)

    def test_student_t(self):
        for degrees, quantile in ((1, 12.706204736432095), (2, 4.302652729696142), (6, 2.4469118511449692),
                                  (27, 2.0518305164802833)):  # scipy 1.15.3: t.ppf(0.975, degrees)
            self.assertAlmostEqual(timing.student_t_quantile(0.975, degrees), quantile, 9)

    def test_estimate_and_interval(self):
        values = [0.11, -0.02, 0.07, 0.31, 0.05, 0.09, -0.01, 0.13]
        self.assertAlmostEqual(timing.hodges_lehmann(values), 0.08, 15)
        # norm.cdf(-sqrt(8 / 7) * t.ppf(0.975, 7)), and scipy's bootstrap of that level, 9999 resamples
        self.assertAlmostEqual(timing.expanded_level(8), 0.0057375205170298715, 12)
        low, high = timing.bootstrap(values, resamples=9999)
        self.assertAlmostEqual(low, 0.015, 2)
        self.assertAlmostEqual(high, 0.195, 2)
        self.assertEqual(timing.bootstrap(values, seed=5), timing.bootstrap(values, seed=5))
        self.assertNotEqual(timing.bootstrap(values[:7], seed=5), timing.bootstrap(values, seed=6))

    def test_against_scipy(self):
        try:
            from scipy import stats
        except ImportError:
            self.skipTest("scipy is not installed; its values stand in the other tests")
        chance = random.Random(3)
        for n in range(5, 16):
            x, y = ([chance.gauss(mean, 1) for _ in range(n)] for mean in (0.3, 0))
            self.assertAlmostEqual(timing.signed_rank(x), stats.wilcoxon(x, method="exact").pvalue, 12)
            self.assertAlmostEqual(timing.rank_sum(y, x), stats.mannwhitneyu(x, y, method="exact").pvalue, 12)
            self.assertAlmostEqual(timing.student_t_quantile(0.975, n), stats.t.ppf(0.975, n), 8)

    def test_drift_cancels(self):
        for speed in (-0.2, 0.3):  # exp: linear in the logarithm
            times = [math.exp(speed * i) for i in range(4)]
            self.assertAlmostEqual(timing.log_ratio([times[0], times[3]], [times[1], times[2]]), 0, 14)
        self.assertAlmostEqual(timing.log_ratio([2, 2], [2.2, 2.2]), math.log(1.1), 14)

    def test_p_holds_under_noise_of_every_kind(self):
        # Equal builds: drift, bursts that last several processes, heavy tails. Of 2000 p, 5 % may be 0.05 or less;
        # four standard deviations more would be 6.9 %.
        chance = random.Random(4)
        burst, level, ps = 0, 0.0, []
        for _ in range(2000):
            ratios = []
            for _ in range(8):
                times = []
                for _ in range(4):
                    burst = chance.randrange(1, 9) if burst == 0 and chance.random() < 0.1 else max(0, burst - 1)
                    level += 0.01
                    tail = 0.02 * chance.gauss(0, 1) / max(0.05, chance.random())
                    times.append(math.exp(level + 0.5 * bool(burst) + tail))
                inner = chance.random() < 0.5
                old, new = ([times[0], times[3]], [times[1], times[2]])[::1 if inner else -1]
                ratios.append(timing.log_ratio(old, new))
            ps.append(timing.signed_rank(ratios))
        self.assertLess(sum(p <= 0.05 for p in ps), 0.069 * 2000)

    def test_verdicts(self):
        def verdict(values, floor=0.03):
            return timing.judge({"cell": values}, floor)["cell"].verdict
        noise = [0.001, -0.002, 0.0005, 0.0015, -0.001, 0.002, -0.0005, 0.0007]
        self.assertEqual(verdict([0.1 + x for x in noise]), "SLOWER")
        self.assertEqual(verdict([-0.1 + x for x in noise]), "FASTER")
        self.assertEqual(verdict(noise), "SAME")
        self.assertEqual(verdict([0.0] * 8), "SAME")
        self.assertEqual(verdict([0.01 + x for x in noise]), "SAME")  # real, and nobody's concern
        self.assertEqual(verdict([0.01 + x for x in noise], floor=0.005), "SLOWER")
        self.assertEqual(verdict([40 * x for x in noise]), "UNSURE")
        self.assertEqual(verdict([0.1, 0.1, 0.1, 0.1]), "UNSURE")  # too few: p is 1/8 at best
        self.assertEqual(verdict([0.1 + x for x in noise[:7]] + [-3]), "UNSURE")  # one of eight the other way, and far
        found = timing.judge({"cell": [0.1 + x for x in noise]})["cell"]
        self.assertAlmostEqual(found.ratio, math.exp(0.1), 2)
        self.assertTrue(found.low < found.ratio < found.high)

    def test_many_cells_are_corrected_for(self):
        noise = random.Random(6)
        many = {f"cell {i}": [noise.gauss(0, 0.05) for _ in range(8)] for i in range(19)}
        slow = {"slow": [0.2 + noise.gauss(0, 0.01) for _ in range(8)]}
        self.assertEqual(timing.judge(slow)["slow"].verdict, "SLOWER")
        self.assertEqual(timing.judge({**many, **slow})["slow"].verdict, "UNSURE")  # 2^-7 * 20 is too much
        self.assertEqual(timing.blocks_wanted(1), 7)
        wanted = timing.blocks_wanted(20)
        self.assertLessEqual(20 * 2.0 ** (1 - wanted), timing.RATE / timing.LOOKS)
        self.assertGreater(20 * 2.0 ** (2 - wanted), timing.RATE / timing.LOOKS)

    def test_unsure_cells_are_measured_again_and_slower_ones_confirmed(self):
        asked, noise = [], random.Random(7)
        def measure(cells, blocks):
            asked.append((sorted(cells), blocks))
            means = {"same": 0, "noisy": 0, "slow": 0.1, "once": 0.1 if len(asked) == 1 else 0}
            return {cell: [means[cell] + noise.gauss(0, 0.3 if cell == "noisy" else 0.002) for _ in range(blocks)]
                    for cell in cells}
        found = timing.gate(["same", "noisy", "slow", "once"], measure)
        self.assertEqual(asked[:3], [(["noisy", "once", "same", "slow"], 9), (["noisy"], 9), (["noisy"], 18)])
        self.assertEqual(asked[3][0], ["once", "slow"])
        self.assertEqual({cell: timing.final_verdict(*pair) for cell, pair in found.items()},
                         {"same": "SAME", "noisy": "UNSURE", "slow": "SLOWER", "once": "UNSURE"})
        self.assertEqual(found["once"][0].verdict, "SLOWER")


class Folder(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="kvq_test_compare_")
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def write(self, name, data):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(data if isinstance(data, str) else json.dumps(data))
        return self.path(name)


class Facts(Folder):
    """The kept results of SmolLM2 against themselves, changed in one place."""

    @classmethod
    def setUpClass(cls):
        with open(BASELINE, encoding="utf-8") as file:
            cls.data = json.load(file)
        cls.data["benchmarks"] = [run for run in cls.data["benchmarks"]
                                  if re.search("/(none|int[48]-hqq)/", run["name"])]
        cls.old = tempfile.mkdtemp(prefix="kvq_test_compare_")
        cls.addClassCleanup(shutil.rmtree, cls.old)
        cls.old = os.path.join(cls.old, "benchmarks.json")
        with open(cls.old, "w", encoding="utf-8") as file:
            json.dump(cls.data, file)

    def changed(self, edit, *arguments, context=None):
        """ci/compare's exit code and stdout after edit(benchmark) of the int4-hqq cells by measurement."""
        data = copy.deepcopy(self.data)
        data["context"].update(context or {})
        edit({run["name"].split("/")[0]: run for run in data["benchmarks"] if "/int4-hqq/" in run["name"]})
        return run(self.old, self.write("new/benchmarks.json", data), *arguments)[:2]

    def test_equal(self):
        code, out, err = run(BASELINE, os.path.dirname(BASELINE), "--complete")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"OK: \d{4} same\n$")
        self.assertIn("times, as information", out)

    def test_one_unit_in_the_last_place_of_one_layer(self):
        def edit(runs):
            runs["error"]["nmse_v/layer:7"] = math.nextafter(runs["error"]["nmse_v/layer:7"], 1)
        code, out = self.changed(edit)
        self.assertEqual(code, 1)
        self.assertRegex(out, r"CHANGED +error/smollm2-135m/sdpa/int4-hqq/ctx:1024/batch:1 nmse_v/layer:7 ")
        self.assertIn("REGRESSION: 1 changed", out)
        # Where the same arithmetic is not promised, two digits.
        code, out = self.changed(edit, context={"threads": "1"})
        self.assertEqual(code, 0)
        self.assertIn("threads 2 -> 1", out)
        def far(runs):
            runs["error"]["nmse_k"] *= 1.2
        code, out = self.changed(far, context={"libtorch": "2.12.0"})
        self.assertEqual(code, 1)
        self.assertIn("beyond two digits", out)

    def test_bytes_and_what_ran(self):
        for measurement, name, value in (("kv_size", "kv_bytes", 8755201.0), ("kv_size", "bits_per_element", 5.9),
                                         ("decode", "bytes_per_token", 1.0), ("error", "encoded_tokens", 895.0),
                                         ("perplexity", "label", "cpu BFloat16, eager on decoded tokens")):
            code, out = self.changed(lambda runs: runs[measurement].update({name: value}),
                                     context={"cpu_capability": "AVX2"})
            self.assertEqual(code, 1, name)
            self.assertRegex(out, rf"CHANGED +{measurement}/\S+int4-hqq/\S+ {'kernel' if name == 'label' else name} ")

    def test_intervals(self):
        names = ("ppl", "delta_ppl", "kld_nats", "top1_agreement")
        for end, step in (("_lo", -1), ("_hi", 1)):
            def moved(by):
                def edit(runs):
                    runs["perplexity"].update({name: runs["perplexity"][name + end] + by * step for name in names})
                return self.changed(edit)
            code, out = moved(0)
            self.assertEqual(code, 0)
            self.assertEqual(re.findall(r"MOVED +perplexity/\S+ (\w+) .*within", out), sorted(names))
            code, out = moved(1e-9)
            self.assertEqual(code, 1)
            self.assertEqual(re.findall(r"CHANGED +perplexity/\S+ (\w+) .*beyond", out), sorted(names))
        code, out = self.changed(lambda runs: runs["needle"].update(needle_rate=0.4))
        self.assertEqual(code, 1)
        self.assertEqual(self.changed(lambda runs: runs["needle"].update(needle_rate=0.6))[0], 0)

    def test_not_a_number(self):
        def edit(runs):
            runs["perplexity"]["kld_nats"] = math.nan  # written as NaN, as Google Benchmark does
        code, out = self.changed(edit)
        self.assertEqual(code, 1)
        self.assertRegex(out, r"LOST +perplexity/\S+int4-hqq/\S+ kld_nats ")

    def test_null_agrees_with_nothing(self):
        def edit(runs):
            runs["perplexity"].update(ppl=None, ppl_lo=None, ppl_hi=None)
            runs["error"]["nmse_k"] = None
        code, out = self.changed(edit)
        self.assertEqual(code, 1)
        self.assertEqual(len(re.findall(r"LOST +\S+ (?:ppl|nmse_k) ", out)), 2)
        new = self.path("new/benchmarks.json")
        code, out, _ = run(new, new)
        self.assertEqual(code, 0)
        self.assertEqual(re.findall(r"NOT COMPARABLE +\w+/\S+int4-hqq/\S+ (\w+) .*null in both", out), ["nmse_k", "ppl"])
        self.assertRegex(out, r"OK: 2 not comparable, \d+ same")
        self.assertEqual(run(new, new, "--complete")[0], 1)
        code, out, _ = run(new, self.old)
        self.assertEqual(code, 0)
        self.assertEqual(len(re.findall(r"NEW +\S+ (?:ppl|nmse_k) .*null in OLD", out)), 2)

    def test_another_tokenizer_is_another_input(self):
        old, new = (self.write(f"{name}/benchmarks.json", {**self.data, "context": {
            **self.data["context"], "model_tokenizer smollm2-135m": f"sha256:{name}"}}) for name in "12")
        code, out, _ = run(old, new)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"NOT COMPARED +perplexity/\S+ .*tokenizer sha256:1 -> sha256:2")
        # Results from before they said so are compared as ever.
        self.assertNotIn("NOT COMPARED", run(self.old, new)[1])

    def test_only_regular_files_are_replaced_or_read(self):
        pipe, link, there = self.path("pipe"), self.path("link"), self.write("there", "")
        os.mkfifo(pipe)
        os.symlink(there, link)
        code, _, err = run(pipe, self.old)
        self.assertEqual((code, err.count("\n")), (2, 1))
        self.assertIn("no regular file", err)
        self.assertEqual(run(self.old, self.old, f"--json={link}")[0], 0)
        self.assertTrue(os.path.islink(link))
        with open(there, encoding="utf-8") as file:
            self.assertFalse(json.load(file)["regression"])
        done = subprocess.run([os.path.join(HERE, "compare"), self.old, self.old, "--json=/dev/stdout"],
                              stdout=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout.index("{"), 0)
        if os.getuid() == 0:  # a device as /dev/null is, under a name of its own
            null = self.path("null")
            try:
                os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError:
                return
            self.assertEqual(run(self.old, self.old, f"--json={null}")[0], 0)
            self.assertTrue(stat.S_ISCHR(os.stat(null).st_mode))

    def test_failed_cells(self):
        def fails(runs):
            name = runs["error"]["name"]
            runs["error"].clear()
            runs["error"].update(name=name, error_occurred=True, error_message="failed: codes differ")
        code, out = self.changed(fails)
        self.assertEqual(code, 1)
        self.assertRegex(out, r"FAILED +error/\S+ .*failed: codes differ")
        code, out, _ = run(self.path("new/benchmarks.json"), self.old)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"NEW +error/\S+int4-hqq")
        # Skipped in both, for whatever reason, is no news.
        self.assertEqual(run(self.path("new"), self.path("new"))[0], 0)

    def test_missing_and_new_cells_are_listed(self):
        data = copy.deepcopy(self.data)
        data["benchmarks"] = [run for run in data["benchmarks"] if not run["name"].startswith("needle/")]
        path = self.write("new/benchmarks.json", data)
        code, out, _ = run(self.old, path)
        self.assertEqual(code, 0)
        self.assertEqual(len(re.findall(r"^  MISSING +needle/", out, re.M)), 3)
        self.assertEqual(run(self.old, path, "--complete")[0], 1)
        code, out, _ = run(path, self.old, "--complete")
        self.assertEqual(code, 0)
        self.assertEqual(len(re.findall(r"^  NEW +needle/", out, re.M)), 3)

    def test_other_inputs_are_not_compared(self):
        def edit(runs):
            runs["error"]["nmse_k"] *= 2
        code, out = self.changed(edit, context={"corpus_sha256": "0" * 64})
        self.assertEqual(code, 0)
        self.assertRegex(out, r"NOT COMPARED +error/\S+ .*corpus_sha256")
        self.assertEqual(self.changed(edit, "--complete", context={"corpus_sha256": "0" * 64})[0], 1)
        code, out = self.changed(lambda runs: runs["kv_size"].update(kv_bytes=1.0), context={"seed": "1"})
        self.assertEqual(code, 1)  # bytes follow from no input

    def test_another_type_to_compute_in(self):
        def edit(runs):
            runs["error"]["nmse_k"] *= 2
            runs["decode"]["bytes_per_token"] *= 2
        def changed(stored, edit=edit):
            def with_label(runs):
                edit(runs)
                runs["kv_size"]["label"] = runs["kv_size"]["label"].replace("BFloat16", "Float")
            context = {"dtype": "Float", "cpu_capability": "AVX2", **({"kv_dtype smollm2-135m": stored} if stored else {})}
            return self.changed(with_label, context=context)
        for stored in ("BFloat16", "Half"):  # as many bits
            code, out = changed(stored)
            self.assertEqual(code, 0, out)
            self.assertNotRegex(out, r"NOT COMPARED +kv_size/")
            self.assertRegex(out, r"NOT COMPARED +error/\S+int4-hqq/.*dtype BFloat16 -> Float")
            self.assertRegex(out, r"NOT COMPARED +decode/\S+int4-hqq/.*bits 16 -> 32")
            code, out = changed(stored, lambda runs: runs["kv_size"].update(kv_bytes=1.0))
            self.assertEqual(code, 1)
            self.assertRegex(out, r"CHANGED +kv_size/\S+int4-hqq/\S+ kv_bytes ")
        for stored in ("Float", None):  # None: results of a time when that was what is computed in
            code, out = changed(stored, lambda runs: runs["kv_size"].update(kv_bytes=1.0))
            self.assertEqual(code, 0, out)
            self.assertRegex(out, r"NOT COMPARED +kv_size/\S+int4-hqq/.*kv_bits 16 -> 32")
            self.assertRegex(out, "kv_dtype BFloat16 -> Float")

    def test_announced_changes(self):
        edit = lambda runs: runs["kv_size"].update(kv_bytes=1.0)  # noqa: E731
        code, out = self.changed(edit, "--accept=^kv_size/.*/int4-hqq/.* kv_bytes$")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"ACCEPTED +kv_size/")
        self.assertEqual(self.changed(edit, "--accept=int8")[0], 1)

    def test_times_are_information(self):
        def edit(runs):
            runs["prefill"].update(prefill_ms=9000.0, prefill_ms_min=9000.0, prefill_ms_max=9000.0)
        code, out = self.changed(edit)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"prefill/\S+int4-hqq/\S+ +median +1404 +\S+ to \S+ +9000 +- +\+541 % +once")

    def test_repetitions_have_a_verdict_that_cannot_fail(self):
        def repeated(times):
            name = "prefill/m/sdpa/none/ctx:8/batch:1"
            runs = [{"name": name, "run_type": "iteration", "repetitions": len(times), "repetition_index": i,
                     "real_time": ms, "time_unit": "ms", "iterations": 3, "label": "cpu"} for i, ms in enumerate(times)]
            runs.append({"name": name + "_median", "run_type": "aggregate", "aggregate_name": "median", "real_time": 1})
            return {"context": {"date": "2026-11-24T00:00:00"}, "benchmarks": runs}
        old = self.write("old.json", repeated([10 + 0.01 * i for i in range(9)]))
        new = self.write("new.json", repeated([11 + 0.01 * i for i in range(9)]))
        code, out, _ = run(old, new)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"SLOWER +prefill/\S+ +\+10.0 % .*use --ab")
        self.assertRegex(run(old, old)[1], r"SAME +prefill/")

    def gpu(self, name, edit=None):
        """Made-up results of a GPU, in two files."""
        def row(cell, label, **counters):
            return {"name": cell + "/ctx:8/batch:1", "iterations": 1, "real_time": 1.0, "time_unit": "ms",
                    "label": "cuda Half, " + label, **counters}
        graph = "own products, 163 kernels in one graph; throttled: power cap"
        runs = {"none": row("decode/m/fused/none", "fused_decode_16bit, " + graph, bytes_per_token=100.0, ms_per_token=4.0,
                            ms_per_token_min=3.9, ms_per_token_max=4.1),
                "int4": row("decode/m/fused/int4-hqq", "fused_decode_int4, " + graph, bytes_per_token=50.0, ms_per_token=3.0,
                            ms_per_token_min=3.0, ms_per_token_max=3.0),
                "kernel": row("kernel_attention/m/fused/int4-hqq", "fused_decode_int4", bytes=50.0, us=20.0, us_min=19.5,
                              us_max=20.5, flash_us=48.0)}
        if edit:
            edit(runs)
        context = {"date": "2026-01-01T00:00:00+00:00", "gpu": "made-up GPU"}
        for file, names in (("models", ("none", "int4")), ("kernels", ("kernel",))):
            self.write(f"{name}/{file}.json", {"context": context, "benchmarks": [runs[name] for name in names]})
        return self.path(name)

    def test_times_of_a_second_run(self):
        def slower(runs):
            runs["none"].update(ms_per_token=4.15, ms_per_token_min=4.05, ms_per_token_max=4.2)
            runs["kernel"].update(us=20.9, us_min=20.705, us_max=21.0)
        files = self.path("x.json")
        code, out, _ = run(self.gpu("old"), self.gpu("new", slower), f"--json={files}")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"decode/m/fused/none\S+ +median +4 +3.9 to 4.1 +4.15 +4.05 to 4.2 +\+3.75 % +agree")
        self.assertRegex(out, r"decode/m/fused/int4\S+ +median +3 +- +3 +- +\+0 % +once")
        self.assertRegex(out, r"kernel_attention\S+ +median +0.02 +0.0195 to 0.0205 +0.0209 +0.0207 to 0.021 +\+4.5 % +apart")
        self.assertRegex(out, r"  decode +2 +1 +0 +1 +1.88 % +3.75 % +0.00 %\n")
        self.assertRegex(out, r"  all +3 +1 +1 +1 +3.75 % +4.50 % +1.00 %\n")
        with open(files, encoding="utf-8") as file:
            found = json.load(file)
        self.assertEqual([row["agree"] for row in found["agreement"]], [1, 0, 1])
        self.assertEqual([time["ranges"] for time in found["information"]], ["once", "agree", "apart"])

    def test_facts_of_a_gpu(self):
        old = self.gpu("old")
        code, out, _ = run(old, self.gpu("new", lambda runs: runs["int4"].update(
            label="cuda Half, fused_decode_int4, own products, 163 kernels in one graph")))
        self.assertEqual((code, out.splitlines()[-1]), (0, "OK: 6 same"))  # a note is no kernel
        for name, edit in (("kernel", {"label": "cuda Half, sdpa on decoded tokens (scheme int4-hqq)"}),
                           ("bytes_per_token", {"bytes_per_token": 51.0})):
            code, out, _ = run(old, self.gpu("new", lambda runs: runs["int4"].update(edit)))
            self.assertEqual(code, 1)
            self.assertRegex(out, rf"CHANGED +decode/m/fused/int4-hqq/ctx:8/batch:1 {name} ")
        code, out, _ = run(old, self.gpu("new", lambda runs: runs["kernel"].update(bytes=51.0, label="cuda Half, other")))
        self.assertEqual((code, out.count("CHANGED")), (1, 2))

    def test_the_reference_study(self):
        shared = os.environ.get("KVQ_SHARED") or os.path.join(ROOT, "..", "shared")
        study = os.path.join(shared, "reference-study", "data", "raw", "long_context")
        if not os.path.isdir(study):
            self.skipTest(f"{study} is not there")
        code, out, err = run(study, study)
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"OK: \d+ same")

    def test_bad_input(self):
        whole = json.dumps(self.data)
        for bad, said in ((self.write("cut.json", whole[:5000]), "not JSON, or cut off"),
                          (self.write("old.json", {"schema_version": "1.0"}), "schema_version '1.0'"),
                          (self.write("list.json", []), "no object"), (self.path("none.json"), "no such file")):
            for pair in ((self.old, bad), (bad, self.old)):
                code, out, err = run(*pair)
                self.assertEqual((code, out), (2, ""))
                self.assertIn(said, err)
                self.assertIn(os.path.basename(bad), err)
                self.assertEqual(err.count("\n"), 1)
        other = copy.deepcopy(self.data)
        for entry in other["benchmarks"]:
            entry["name"] = entry["name"].replace("smollm2-135m", "other")
        for arguments, said in (([self.old], "OLD and NEW"), ([self.old, self.old, "--fast"], "--fast"),
                                ([self.old, self.old, "--accept=("], "regular expression"),
                                ([self.old, self.old, "--floor=x"], "--floor"),
                                ([self.old, self.old, "--time=mean"], "--time"),
                                ([self.old, self.old, "--json=/no/such/x"], "/no/such"),
                                ([self.old, self.old, "--blocks=4"], "--blocks"),
                                ([self.old, self.old, "--", "-x"], "--ab"),
                                ([self.old, self.old, "--seed"], "wants a value"),
                                ([self.old, self.write("other.json", other)], "in common"),
                                (["--ab", self.old, self.old], "no executable")):
            code, out, err = run(*arguments)
            self.assertEqual((code, out, err.count("\n")), (2, "", 1), arguments)
            self.assertIn(said, err)

    def test_files_for_ci(self):
        def edit(runs):
            runs["error"]["nmse_k"] *= 2
            runs["perplexity"]["label"] = "cpu <BFloat16> & \"more\" | eager"
        files = {name: self.path(f"out.{name}") for name in ("json", "junit", "markdown")}
        code, _ = self.changed(edit, *(f"--{name}={path}" for name, path in files.items()))
        self.assertEqual(code, 1)
        with open(files["json"], encoding="utf-8") as file:
            found = json.load(file)
        self.assertTrue(found["regression"])
        self.assertEqual(found["count"]["CHANGED"], 2)
        self.assertEqual({f["fact"] for f in found["facts"] if f["verdict"] == "CHANGED"}, {"nmse_k", "kernel"})
        suite = xml.etree.ElementTree.parse(files["junit"]).getroot()
        self.assertEqual((suite.get("failures"), len(suite.findall("testcase"))), ("2", int(suite.get("tests"))))
        self.assertIn('<BFloat16> & "more" | eager', suite.find("testcase/failure[@message]").get("message") +
                      suite.findall("testcase/failure")[1].get("message"))
        with open(files["markdown"], encoding="utf-8") as file:
            text = file.read()
        self.assertTrue(text.startswith("### kvqbench: REGRESSION: 2 changed"))
        self.assertIn("\\|", text)
        self.assertEqual({line.replace("\\|", "").count("|") for line in text.splitlines() if "CHANGED" in line}, {7})


# A kvqbench of two times, one of which is SLOW ms, and one size. It knows the filter, and notes its calls.
BUILD = """#!/bin/sh
for flag in "$@"; do case $flag in
  --benchmark_out=*) out=${flag#*=} ;;
  --benchmark_filter=*) filter=${flag#*=} ;;
  --fail) echo "kvqbench: it fails" >&2; exit 2 ;;
esac; done
echo "$0 $filter" >> DIR/calls
cell() {
  echo "$1" | grep -Eq "$filter" || return
  printf '%s{"name": "%s", "label": "cpu", "iterations": 3, %s}' "$comma" "$1" "$2"
  comma=,
}
{ printf '{"context": {"date": "2026-11-24T00:00:00"}, "benchmarks": ['
  cell quantize/m/sdpa/k+v@residual=16/ctx:8/batch:1 '"ms": SLOW, "ms_min": SLOW, "ms_max": SLOW'
  cell prefill/m/sdpa/none/ctx:8/batch:1 '"prefill_ms": 7, "prefill_ms_min": 7, "prefill_ms_max": 7'
  cell kv_size/m/sdpa/none/ctx:8/batch:1 '"kv_bytes": BYTES'
  printf ']}'; } > "$out"
"""


class Builds(Folder):
    def build(self, name, slow=5.0, size=64, text=BUILD):
        path = self.write(name, text.replace("DIR", self.folder).replace("SLOW", str(slow)).replace("BYTES", str(size)))
        os.chmod(path, 0o755)
        return path

    def calls(self):
        with open(self.path("calls"), encoding="utf-8") as file:
            return [line.split(" ", 1) for line in file.read().splitlines()]

    def test_same(self):
        code, out, _ = run("--ab", self.build("old"), self.build("new"))
        self.assertEqual(code, 0)
        self.assertIn("OK: 7 same", out)  # two times, three kernels' names, bytes, and bits that follow from them
        blocks = timing.blocks_wanted(2)
        self.assertIn(f"{2 + 4 * blocks} processes", out)
        calls = self.calls()
        self.assertEqual([line[1] for line in calls[:2]], [".*", ".*"])
        orders = {"".join("AB"[path.endswith("new")] for path, _ in calls[i:i + 4]) for i in range(2, len(calls), 4)}
        self.assertEqual(orders, {"ABBA", "BAAB"})
        self.assertGreaterEqual(sum(path.endswith("new") for path, _ in calls), 9)

    def test_slower_is_confirmed(self):
        files = [self.path("x.json"), self.path("x.xml")]
        code, out, _ = run("--ab", self.build("old"), self.build("new", slow=5.5), f"--json={files[0]}",
                           f"--junit={files[1]}")
        self.assertEqual(code, 1)
        self.assertRegex(out, r"SLOWER +quantize/m/sdpa/k\+v@residual=16/ctx:8/batch:1 +\+10.0 % .*confirmed")
        self.assertRegex(out, r"SAME +prefill/")
        # The second batch has the slower cell alone, as the filter says.
        self.assertEqual(self.calls()[-1][1], r"^(quantize/m/sdpa/k\+v@residual=16/ctx:8/batch:1)$")
        with open(files[0], encoding="utf-8") as file:
            times = {entry["cell"].split("/")[0]: entry for entry in json.load(file)["times"]}
        self.assertEqual((times["quantize"]["second"]["verdict"], times["prefill"]["second"]), ("SLOWER", None))
        self.assertAlmostEqual(times["quantize"]["second"]["ratio"], 1.1)
        failed = xml.etree.ElementTree.parse(files[1]).getroot().findall("testcase[failure]")
        self.assertEqual([case.get("classname") for case in failed], ["kvqbench.times"])

    def test_faster_and_below_the_floor(self):
        code, out, _ = run("--ab", self.build("old"), self.build("new", slow=4.5), "--time=min")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"FASTER +quantize/\S+ +-10.0 %")
        code, out, _ = run("--ab", self.build("old"), self.build("new", slow=5.1))
        self.assertEqual(code, 0)
        self.assertRegex(out, r"7 same")
        self.assertEqual(run("--ab", "--floor=1", self.build("old"), self.build("new", slow=5.1))[0], 1)

    def test_facts_of_builds(self):
        code, out, _ = run("--ab", self.build("old"), self.build("new", size=65), "--blocks=5")
        self.assertEqual(code, 1)
        self.assertRegex(out, r"CHANGED +kv_size/m/sdpa/none/ctx:8/batch:1 kv_bytes")

    def test_bad_runs(self):
        old = self.build("old")
        code, out, err = run("--ab", old, self.build("new"), "--", "--fail")
        self.assertEqual((code, out), (2, ""))
        self.assertIn("exit code 2, no results: kvqbench: it fails", err)
        wrong = self.build("wrong", text='#!/bin/sh\n'
                           'for f in "$@"; do case $f in --benchmark_out=*) echo "{" >${f#*=};; esac; done')
        code, _, err = run("--ab", old, wrong)
        self.assertEqual(code, 2)
        self.assertIn("not JSON", err.splitlines()[-1])
        code, _, err = run("--ab", old, old, "--", "--benchmark_out=x")
        self.assertEqual(code, 2)
        self.assertIn("--benchmark_out", err)

    def test_times_of_a_benchmark(self):
        spread = {"all_layers_us": 5.0, "all_layers_us_min": 4.0, "all_layers_us_max": 9.0, "iterations": 3, "real_time": 1}
        self.assertEqual((interleave.time_of(spread), interleave.time_of(spread, "min")), (0.005, 0.004))
        self.assertEqual(interleave.time_of({"real_time": 2.0, "time_unit": "us", "iterations": 8}), 0.002)
        self.assertIsNone(interleave.time_of({"real_time": 2.0, "iterations": 1}))
        self.assertIsNone(interleave.time_of({**spread, "error_occurred": True}))
        self.assertIsNone(interleave.time_of({**spread, "all_layers_us": math.nan}))
        self.assertIsNone(interleave.time_of({"tokens_per_s": 1.0, "tokens_per_s_min": 1.0, "tokens_per_s_max": 1.0}))


class Kvqbench(unittest.TestCase):
    """What only the real one knows."""

    def listed(self, *flags):
        return subprocess.run([KVQBENCH, *flags, "--benchmark_list_tests"], check=True, capture_output=True,
                              text=True).stdout.split()

    def test_the_filter_matches_exactly_the_cells(self):
        flags = ["--models=mistral-7b", "--contexts=64,640",
                 "--schemes=none,int4-hqq,int4-hqq+int2-hqq,int4-hqq@residual=64"]
        cells = self.listed(*flags, "--benchmark_filter=^(prefill|decode|quantize)/")
        for chosen in (cells, cells[1:2], [cell for cell in cells if "+" in cell], cells[::3]):
            matched = self.listed(*flags, "--benchmark_filter=" + interleave.filter_of(chosen))
            self.assertEqual(sorted(matched), sorted(chosen))

    def test_the_workflow_runs_what_exists(self):
        with open(os.path.join(ROOT, ".github", "workflows", "kvqbench.yml"), encoding="utf-8") as file:
            jobs = yaml.safe_load(file)["jobs"]
        lines = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
        for script in re.findall(r"(?<![\w/])ci/\w+", lines):
            self.assertTrue(os.access(os.path.join(ROOT, script), os.X_OK), script)
        gate = next(line for line in lines.replace("\\\n", " ").splitlines() if "ci/compare" in line)
        words = shlex.split(gate.split("||")[0])
        flags, builds, theirs = compare.parse([word for word in words[words.index("ci/compare") + 1:]
                                               if not re.match("--(json|junit|markdown)=", word)])
        self.assertTrue(flags["--ab"])
        self.assertEqual([build.split("/")[-3:] for build in builds], [["build", "release", "kvqbench"]] * 2)
        cells = self.listed(*theirs)
        for measurement in ("kv_size", "error", "perplexity", "quantize", "prefill"):
            self.assertTrue(any(cell.startswith(measurement + "/") for cell in cells), measurement)

    def test_what_the_proof_plants_finds_its_place(self):
        for name, changes in prove_gate.PLANTS.items():
            self.assertEqual(len(prove_gate.planted(changes).splitlines()) > len(prove_gate.planted([]).splitlines()),
                             bool(changes), name)
        build = os.path.dirname(KVQBENCH)
        if os.path.exists(os.path.join(build, "build.ninja")):
            self.assertIn("hqq.cc.o", prove_gate.commands_of(build)[1])


if __name__ == "__main__":
    unittest.main()
