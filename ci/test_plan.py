#!/usr/bin/python3
"""Tests of ci/plan: its arithmetic against brute force and hand-made cases, and the command on a tiny model.
KVQ_BENCH_EXE: the kvqbench that measures (default build/release/kvqbench)."""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import unittest

import numpy as np

import planning
import reading
import tiny_models
from testing import ENVIRONMENT, HERE, KVQBENCH, read, write_model


def costs(sites=6, seed=1, correlation=0.0, bits=(8.5, 5.5, 4.5, 2.5)):
    """Random ones: sites differ a thousandfold, a bit is worth a factor of four."""
    random = np.random.default_rng(seed)
    kld = 10**random.uniform(-4, -1, (sites, 1)) * 4.0**(2.5 - np.array(bits)) * 10**random.uniform(-0.2, 0.2, (sites, len(bits)))
    return planning.Costs(list("abcdefgh")[:len(bits)], kld, np.tile(np.array(bits) * 64, (sites, 1)), correlation)


def every(of):
    return (np.array(choice) for choice in itertools.product(range(len(of.candidates)), repeat=of.sites))


class Arithmetic(unittest.TestCase):
    def test_the_sum_over_pairs(self):
        of = costs(sites=3, correlation=0.25)
        choice = np.array([1, 3, 0])
        s = [of.kld[i, c] for i, c in enumerate(choice)]
        by_hand = sum(s) + 0.25 * 2 * sum((s[i] * s[j])**0.5 for i in range(3) for j in range(i))
        self.assertAlmostEqual(of.predict(choice), by_hand, 12)
        self.assertAlmostEqual(of.alone(choice), sum(s), 12)

    def test_solutions_are_the_best_of_all(self):
        for seed in range(12):
            of = costs(seed=seed, correlation=(0, 0.01, 0.2, 1)[seed % 4])
            limit = of.bytes[0].mean() * of.sites * (0.6 + 0.05 * seed)
            best = min(of.predict(choice) for choice in every(of) if of.size(choice) <= limit)
            found = of.solve(limit=limit)
            self.assertLessEqual(of.size(found), limit)
            self.assertAlmostEqual(of.predict(found) / best, 1, 4)
            fewest = min(of.size(choice) for choice in every(of) if of.predict(choice) <= 1.001 * best)
            found = of.solve(kld=1.001 * best)
            self.assertEqual(of.size(found), fewest)
            self.assertLessEqual(of.predict(found), 1.001 * best * (1 + 1e-6))

    def test_a_byte_too_much_is_too_much(self):
        of = costs(sites=4)
        whole = of.size(np.full(4, 2))
        self.assertEqual(of.size(of.solve(limit=of.size(np.full(4, 3)))), of.size(np.full(4, 3)))
        with self.assertRaises(planning.Refused):
            of.solve(limit=of.size(np.full(4, 3)) - 1)
        self.assertLessEqual(of.size(of.solve(limit=whole - 1)), whole - 1)

    def test_correlation_of_what_was_found(self):
        of = costs()
        truth = costs(correlation=0.03)
        measured = [(np.full(of.sites, c), truth.predict(np.full(of.sites, c))) for c in range(4)]
        of.fit_uniform(measured)
        self.assertAlmostEqual(of.correlation, 0.03, 9)
        choice = np.array([0, 1, 2, 3, 2, 1])
        for found in (0.9 * of.alone(choice), 1.2 * of.alone(choice), 1e3 * of.alone(choice)):
            of.fit_at(choice, found)  # less than the sum, more, and more than any correlation gives
            self.assertAlmostEqual(of.predict(choice) / found, 1, 9)
            self.assertTrue(0 <= of.correlation <= 1)
        of.fit_uniform([(np.full(of.sites, 3), 9.0)])  # nothing of second order, but all there is
        self.assertEqual(of.correlation, 1)

    def test_specs_of_plans(self):
        a, b = ("q8_0", "q4_0"), ("q4_0", "q4_0")
        self.assertEqual(planning.spec_of([b, b, b], "@residual=0"), "q4_0@residual=0")
        self.assertEqual(planning.spec_of([a, a, b, b, b, a], ""), "q8_0+q4_0@layers=2-4:q4_0")
        self.assertEqual(planning.spec_of([a, b, b, a, b], "@residual=0"), "q4_0@residual=0@layers=0-0:q8_0+q4_0@layers=3-3:q8_0+q4_0")
        # Of latents a scheme alone leaves the rotary key as it is.
        c = ("q4_0", "none")
        self.assertEqual(planning.spec_of([b, b, c], "@residual=0", latent=True), "q4_0+q4_0@residual=0@layers=2-2:q4_0")
        self.assertEqual(planning.spec_of([c, ("none", "q4_0"), ("none", "none")], "", latent=True), "q4_0@layers=1-1:none+q4_0@layers=2-2:none")

    def test_budgets(self):
        self.assertEqual(planning.budget("4.5bits"), ("bits", 4.5, None))
        self.assertEqual(planning.budget("8GiB@32768"), ("bytes", 8 * 2**30, 32768))
        self.assertEqual(planning.budget("1.5MB@64"), ("bytes", 1500000, 64))
        for wrong in ("4.5", "0bits", "33bits", "8GiB", "8GiB@1", "8G@100", "-1bits", "0KiB@100"):
            with self.assertRaises(planning.Refused, msg=wrong):
                planning.budget(wrong)

    def test_baselines(self):
        of = costs(sites=12)
        limit = 12 * 4.5 * 64
        self.assertIsNone(planning.keys_first(of, 12 * 2 * 64))
        keys = planning.keys_first(of, limit)
        self.assertLessEqual(of.size(keys), limit)
        self.assertEqual((len(set(keys[::2])), len(set(keys[1::2]))), (1, 1))
        self.assertGreaterEqual(of.bytes[0, keys[0]], of.bytes[1, keys[1]])
        ends = planning.ends_first(costs(sites=40), 40 * 4.5 * 64)
        self.assertEqual(set(ends[:4]) | set(ends[-4:]), {0})
        self.assertEqual(len(set(ends[4:-4])), 1)
        of = costs(sites=12, bits=(8.5, 4.5, 2.5))
        # Layer 0's keys alone matter to its attention: 8 bits there are worth 2 elsewhere.
        attention = np.full((12, 3), [1e-9, 1e-6, 1e-5])
        attention[0] = [0.001, 0.1, 1]
        found = planning.kvtuner(of, [8, 4, 2], attention, limit)
        self.assertEqual(found[0], 0)
        self.assertLessEqual(of.size(found), limit)
        self.assertIsNone(planning.kvtuner(of, [8, 4, 3], attention, limit))


class Command(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(prefix="kvq_plan_")
        cls.folder = cls.temporary.name
        cls.model = os.path.join(cls.folder, "tiny")
        write_model(cls.model)
        with open(os.path.join(cls.folder, "text.txt"), "w", encoding="utf-8") as file:
            file.write("The capital of France is Paris. The river that runs through it is the Seine. " * 300)
        cls.out = os.path.join(cls.folder, "out")
        cls.done = cls.plan("--budget=5bits", "--out=" + cls.out, "--engine=llama.cpp,vllm")

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def plan(cls, *flags, bare=False):
        common = [] if bare else [f"--models={cls.model}", "--corpus-file=" + os.path.join(cls.folder, "text.txt"), "--contexts=64",
                                  "--windows=2", "--batch=2", "--check-windows=3", "--front=4", "--candidates=q8_0,q4_0,exl3-2",
                                  "--decode-tokens=4", "--runs=1", "--max-runs=1", "--kvqbench=" + KVQBENCH, "--beside=llamacpp-q4_0,kivi-2", "--engine=no"]
        return subprocess.run([os.path.join(HERE, "plan"), *common, *flags], capture_output=True, text=True, env=ENVIRONMENT)

    def test_the_plan_is_the_best_of_all_and_is_measured(self):
        self.assertEqual(self.done.returncode, 0, self.done.stderr)
        self.assertIn("about", self.done.stderr)  # how long it takes is said beforehand
        plan = json.loads(read(self.out, "plan.json"))
        cells = {cell.spec: cell for cell in reading.load([os.path.join(self.out, "sensitivity.json")]).cells}
        kld = np.zeros((4, 3))
        for c, name in enumerate(plan["candidates"]):
            for side, part in enumerate("kv"):
                kld[side::2, c] = cells[name + "@residual=0"].layers("sensitivity.kld_nats_" + part)
        bits = np.array([8.5, 4.5, 2.5])
        first = plan["rounds"][0]
        r = first["correlation"]
        def cost(choice):
            s = kld[np.arange(4), choice]
            return (1 - r) * s.sum() + r * np.sqrt(s).sum()**2
        best = min((np.array(c) for c in itertools.product(range(3), repeat=4) if bits[list(c)].mean() <= 5), key=cost)
        self.assertAlmostEqual(first["predicted"] / cost(best), 1, 9)
        row = next(row for row in plan["rows"] if row["name"] == plan["name"])
        self.assertLessEqual(row["bits_per_element"], 5)
        other = {cell.spec: cell for cell in reading.load([os.path.join(self.out, "other-windows.json")]).cells}
        self.assertEqual(row["kld"], other[plan["name"]]["perplexity.kld_nats"])
        self.assertEqual(row["kv_bytes"] * 2, other[plan["name"]]["kv_size.kv_bytes"])  # of two sequences
        self.assertEqual(other[plan["name"]]["perplexity.windows"], 3)
        # Not the windows that it was made from.
        self.assertEqual(json.loads(read(self.out, "other-windows.json"))["context"]["skip_windows"], "2")
        self.assertIn(f"set: {plan['spec']}", self.done.stdout)
        self.assertIn("Preset llamacpp-q4_0 (4.500 bits, 10 % fewer bytes)", self.done.stdout)
        self.assertIn("kivi-2", self.done.stdout)
        for name in ("llamacpp-of-plan-5", "vllm-of-plan-5"):
            self.assertIsNotNone(next(row for row in plan["rows"] if row["name"] == name)["kld"])
        self.assertIn("-ctk ", self.done.stdout)
        # kivi-2 keeps more tokens in 16 bits than there are: it costs nothing, and nobody is beaten by it.
        kivi = next(row for row in plan["rows"] if row["name"] == "kivi-2")
        self.assertEqual((kivi["hardly_encoded"], kivi["front"]), ("hardly encoded, 0 % of what was read", False))
        self.assertIn("kivi-2: hardly encoded, 0 % of what was read at 64 tokens, so nothing can be said of what it costs.", self.done.stdout)
        self.assertRegex(self.done.stdout, r"\| kivi-2 +\|[^|]*\| -[^|]*\| -[^|]*\| hardly encoded, 0 % of what was read +\| - ")
        self.assertEqual({row["name"] for row in plan["rows"] if row["hardly_encoded"]}, {"kivi-2"})
        self.assertGreater(sum(row["kind"] == "plan" for row in plan["rows"]), 1)
        front = [row for row in plan["rows"] if row["front"]]
        for a, b in zip(front, front[1:]):
            self.assertLess(a["kv_bytes"], b["kv_bytes"])
            self.assertGreater(a["kld"], b["kld"])
        self.assertTrue(os.path.exists(os.path.join(self.out, "index.html")))

    def test_again_nothing_is_measured_and_the_plan_is_the_same(self):
        before = {name: read(self.out, name) for name in os.listdir(self.out) if name.endswith(".json")}
        again = self.plan("--budget=5bits", "--out=" + self.out, "--engine=llama.cpp,vllm")
        self.assertEqual((again.returncode, again.stdout), (0, self.done.stdout))
        def measured(text):  # what depends on neither the date nor the load
            return json.loads(text).get("benchmarks")
        for name, text in before.items():
            self.assertEqual(measured(read(self.out, name)), measured(text), name)
        other = self.plan("--budget=5bits", "--out=" + os.path.join(self.folder, "other"), "--front=0")
        self.assertEqual(other.returncode, 0, other.stderr)
        self.assertEqual(json.loads(read(self.folder, "other", "plan.json"))["spec"], json.loads(before["plan.json"])["spec"])

    def test_bytes_at_a_context_and_a_wanted_divergence(self):
        out = os.path.join(self.folder, "bytes")
        done = self.plan("--budget=40KiB@256", "--out=" + out, "--front=0")
        self.assertEqual(done.returncode, 0, done.stderr)
        plan = json.loads(read(out, "plan.json"))
        row = next(row for row in plan["rows"] if row["name"] == plan["name"])
        self.assertLessEqual(row["kv_bytes"], 40 * 1024)
        self.assertGreater(row["kv_bytes"], 30 * 1024)  # of 32 to 136 KiB
        out = os.path.join(self.folder, "kld")
        shutil.copytree(self.out, out)
        wanted = json.loads(read(self.out, "plan.json"))["rounds"][0]["found"] * 1.5
        done = self.plan(f"--kld={wanted:.6f}", "--out=" + out, "--front=0")
        self.assertEqual(done.returncode, 0, done.stderr)
        plan = json.loads(read(out, "plan.json"))
        self.assertLessEqual(plan["rounds"][0]["predicted"], wanted)
        self.assertLess(next(row for row in plan["rows"] if row["name"] == plan["name"])["bits_per_element"], 8.5)

    def test_where_hardly_anything_is_encoded_no_plan_is_made(self):
        out = os.path.join(self.folder, "dense")
        for flags, line in ((["--budget=5bits"], "q8_0@residual=64: hardly encoded, 0 % of the cache at 64 tokens"),
                            # Bytes of 256 tokens can be planned, what schemes cost cannot be seen on 64.
                            (["--budget=60KiB@256"], "q8_0@residual=64: hardly encoded, 0 % of what was read at 64 tokens")):
            done = self.plan(*flags, "--frame=@residual=64", "--out=" + out)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(line, done.stderr.splitlines()[-1])
            self.assertIn("a longer context (--contexts", done.stderr.splitlines()[-1])
            self.assertFalse(os.path.exists(os.path.join(out, "sensitivity.json")))

    def test_of_latents(self):
        model, out = os.path.join(self.folder, "latents"), os.path.join(self.folder, "out-latents")
        tiny_models.write(model, "deepseekv2-lite")
        flags = ["--budget=6bits", f"--models={model}", f"--out={out}", "--contexts=32", "--candidates=q8_0,q4_0", "--front=0",
                 "--rounds=0", "--windows=1", "--batch=1", "--check-windows=1"]
        done = self.plan(*flags)  # beside presets of keys and values, which is said before costs are measured
        self.assertEqual(done.returncode, 2)
        self.assertIn("'llamacpp-q4_0': the preset is what llama.cpp", done.stderr)
        self.assertFalse(os.path.exists(os.path.join(out, "sensitivity.json")))
        done = self.plan(*flags, "--beside=no", "--engine=llama.cpp,mlx")
        self.assertEqual(done.returncode, 0, done.stderr)
        plan = json.loads(read(out, "plan.json"))
        uniform = {row["name"]: row["bits_per_element"] for row in plan["rows"] if row["kind"] == "uniform"}
        self.assertEqual(uniform, {"q8_0+q8_0@residual=0": 8.5, "q4_0+q4_0@residual=0": 4.5})
        row = next(row for row in plan["rows"] if row["name"] == plan["name"])
        self.assertTrue(4.5 < row["bits_per_element"] <= 6)
        # Of three layers a latent of 128 channels and a rotary key of 64.
        self.assertAlmostEqual(row["kv_bytes"] * 8 / (32 * 3 * (128 + 64)), row["bits_per_element"], 9)
        sizes = {cell.spec: cell.layers("kv_size.kv_bytes") for cell in reading.load([os.path.join(out, "sizes.json")]).cells}
        self.assertEqual(sizes["q4_0+none@residual=0"], [32 * (128 * 4.5 + 64 * 16) / 8] * 3)
        self.assertEqual(sizes["none+q8_0@residual=0"], [32 * (128 * 16 + 64 * 8.5) / 8] * 3)
        for line in (f"set: {plan['spec']}", "llama.cpp: q4_0+q4_0@residual=0", "mlx: what it stores of latents"):
            self.assertIn(line, done.stdout)

    def test_bad_input_is_one_line(self):
        for flags, line in (
                (["--budget=4.5"], "--budget: BITSbits or SIZE@CONTEXT"), (["--budget=1bits"], "no plan of these candidates fits 1bits"),
                ([], "wants --budget or --kld"), (["--budget=4bits", "--kld=1"], "wants --budget or --kld"),
                (["--budget=4bits", "--candidates=q9_9"], "q9_9"),
                (["--budget=4bits", "--candidates=none"], "--candidates: wants a scheme"), (["--budget=4bits", "--schemes=none"], "--schemes is ci/plan's own"),
                (["--budget=4bits", "--models=a,b"], "wants one model"), (["--kld=x"], "--kld: nats a token"),
                (["--budget=4bits", "--rounds=9"], "--rounds: a whole number from 0 to 4"),
                (["--budget=4bits", "--max-minutes=0.0001"], "--max-minutes"), (["--budget=4bits", "--max-minutes=x"], "--max-minutes: minutes"),
                (["--budget=4bits", "--batch=x"], "--batch: a whole number"), (["stray"], "'stray' is no flag")):
            done = self.plan(*flags, "--out=" + os.path.join(self.folder, "bad"))
            self.assertEqual(done.returncode, 2, (flags, done.stderr))
            last = done.stderr.strip().splitlines()[-1]
            self.assertIn(line, last)
            self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
    unittest.main()
