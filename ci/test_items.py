#!/usr/bin/python3
"""Tests of ci/items.py and ci/paired: their statistics against published values and other implementations, planted cases
that each verdict must find, and the command on files."""

import json
import math
import os
import random
import subprocess
import tempfile
import unittest

import numpy
from scipy import stats

import items
import testing
from testing import HERE

paired = testing.load("paired")

CELL = "ruler/tiny/sdpa/{}/ctx:1024/batch:1"


def lines(values, metric="right", clusters=None, share=0.9, **more):
    return {str(i): {"sample": str(i), "cluster": clusters[i] if clusters else str(i), "prompt_sha256": str(i), metric: value,
                     "encoded_share": share, **{name: of[i] for name, of in more.items()}} for i, value in enumerate(values)}


def judged(new, old, metric="right", margin=None, clusters=None, share=0.9, **how):
    row = items.pair(CELL.format("int4"), CELL.format("none"), lines(new, metric, clusters, share),
                     lines(old, metric, clusters, 0), metric, margin, resamples=2000, **how)
    return items.judge([row])[0]


def rights(n, both, lost, won):
    """(here, reference): right in both, lost, won; the rest wrong in both."""
    old = [1] * (both + lost) + [0] * (n - both - lost)
    new = [1] * both + [0] * lost + [1] * won + [0] * (n - both - lost - won)
    return new, old


class Statistics(unittest.TestCase):
    def test_mcnemar(self):
        # Any table of the binomial distribution: 2 * sum C(n, k) / 2^n.
        for lost, won, p in ((5, 0, .0625), (6, 0, .03125), (10, 2, 158 / 4096), (20, 8, .0357), (0, 0, 1), (3, 3, 1)):
            self.assertAlmostEqual(items.mcnemar(lost, won), p, 4)
            self.assertEqual(items.mcnemar(lost, won), items.mcnemar(won, lost))

    def test_tango(self):
        # Fagerland, Lydersen and Laake 2014 (Stat. Med. 33:2850), airway hyper-responsiveness, 1 and 7 of 21:
        # -0.517 to -0.026.
        low, high = items.tango(7, 1, 21)
        self.assertEqual((round(low, 3), round(high, 3)), (-0.517, -0.026))
        self.assertEqual([round(-end, 6) for end in items.tango(1, 7, 21)], [round(high, 6), round(low, 6)])
        # Without a flip Tango's equation has a closed form: z^2 / (n + z^2).
        z2 = stats.norm.ppf(.975) ** 2
        self.assertAlmostEqual(items.tango(0, 0, 100)[1], z2 / (100 + z2), 9)
        low, high = items.tango(3, 0, 3)
        self.assertEqual(low, -1)
        self.assertTrue(-1 < high < 1)

    def test_tangos_interval_covers(self):
        chance, covered, n, runs = random.Random(1), 0, 60, 2000
        for _ in range(runs):
            drawn = chance.choices((-1, 1, 0), (.12, .04, .84), k=n)
            low, high = items.tango(drawn.count(-1), drawn.count(1), n)
            covered += low <= -.08 <= high
        self.assertTrue(.935 < covered / runs < .975, covered / runs)

    def test_holm(self):
        # R: p.adjust(c(.01, .04, .03, .005), "holm")
        self.assertEqual(items.holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
        self.assertEqual(items.holm([.6, .7]), [1.0, 1.0])
        self.assertEqual(items.holm([]), [])

    def test_detectable_difference(self):
        # The table of 2605.28873, in points.
        for n, row in ((100, (4.0, 6.3, 8.9, 12.5)), (500, (1.8, 2.8, 4.0, 5.6)), (1319, (1.1, 1.7, 2.4, 3.4)),
                       (10042, (.4, .6, .9, 1.2))):
            self.assertEqual([round(100 * items.detectable(d, n), 1) for d in (.02, .05, .1, .2)], list(row))

    def test_of_single_items_it_is_the_t_test(self):
        chance = numpy.random.default_rng(3)
        old = chance.normal(2, 1, 40)
        new = old + chance.normal(.2, .5, 40)
        row = judged(new, old, "nll")
        theirs = stats.ttest_rel(new, old)
        self.assertAlmostEqual(row.p, theirs.pvalue, 12)
        for ours, interval in zip(row.t_interval, stats.t.interval(.95, 39, (new - old).mean(), stats.sem(new - old))):
            self.assertAlmostEqual(ours, interval, 12)
        self.assertAlmostEqual(row.detectable, 2.8 * stats.sem(new - old), 12)
        # scipy's own bootstrap, drawn otherwise: some percent of the width.
        low, high = stats.bootstrap((new - old,), numpy.mean, n_resamples=9999, method="percentile").confidence_interval
        for ours, end in zip(items.bootstrap(new - old, numpy.ones(40)), (low, high)):
            self.assertLess(abs(ours - end), .05 * (high - low))

    def test_seed_is_kept(self):
        sums, counts = numpy.random.default_rng(2).normal(size=9), numpy.ones(9)
        self.assertEqual(items.bootstrap(sums, counts), items.bootstrap(sums, counts))
        self.assertNotEqual(items.bootstrap(sums, counts), items.bootstrap(sums, counts, seed=1))

    def test_standard_error_is_of_clusters(self):
        # By hand: sums 3 and 0 of 2 items each, mean 0.75; rest 1.5 and -1.5: sqrt(4.5 * 2) / 4.
        self.assertEqual(items.standard_error(numpy.array([3.0, 0]), numpy.array([2.0, 2])), .75)
        # Twice the same items are no more than once.
        values = numpy.random.default_rng(5).normal(size=30)
        once = items.standard_error(values, numpy.ones(30))
        sums, counts = items.clustered(list(values) * 2, [str(i) for i in range(30)] * 2)
        self.assertAlmostEqual(items.standard_error(sums, counts), once, 12)
        self.assertAlmostEqual(once, stats.sem(values), 12)
        self.assertEqual(items.bootstrap(sums, counts), items.bootstrap(values, numpy.ones(30)))

    def test_clustered_interval_covers_and_the_plain_one_does_not(self):
        chance, covered, plain = numpy.random.default_rng(7), 0, 0
        for _ in range(400):
            values = numpy.repeat(chance.normal(0, 1, 20), 5) + chance.normal(0, .3, 100)
            for clusters, is_plain in (([str(i // 5) for i in range(100)], False), ([str(i) for i in range(100)], True)):
                sums, counts = items.clustered(values, clusters)
                half = stats.t.ppf(.975, len(sums) - 1) * items.standard_error(sums, counts)
                hit = abs(values.mean()) <= half
                covered, plain = covered + (hit and not is_plain), plain + (hit and is_plain)
        self.assertTrue(.92 < covered / 400 < .98, covered)
        self.assertLess(plain / 400, .75)


class Verdicts(unittest.TestCase):
    def test_flips_are_counted_both_ways(self):
        row = judged(*rights(100, 50, 20, 8))
        self.assertEqual((row.lost, row.won, row.verdict), (20, 8, "worse"))
        self.assertAlmostEqual(row.difference, -.12)
        self.assertAlmostEqual(row.p, .0357, 4)
        self.assertAlmostEqual(row.detectable, 2.8 * math.sqrt(.28 / 100))
        row = judged(*rights(100, 90, 0, 0))  # Wilson of .9, n 100: [.83, .94]
        self.assertEqual([round(end, 2) for end in row.score_interval], [.83, .94])
        new, old = rights(100, 50, 8, 20)
        self.assertEqual(judged(new, old).verdict, "undecided")  # better is no harm, and no equivalence

    def test_as_many_lost_as_won_is_a_score_that_hides_them(self):
        row = judged(*rights(100, 40, 20, 20), margin=.05)
        self.assertEqual((row.difference, row.lost, row.won, row.verdict), (0, 20, 20, "undecided"))

    def test_equivalent_only_within_a_declared_margin(self):
        new, old = rights(2000, 1200, 3, 3)
        self.assertEqual(judged(new, old, margin=.01).verdict, "equivalent within 0.01")
        self.assertEqual(judged(new, old).verdict, "undecided")
        # Not one flip of 50: it could still be 5 % (rule of three: 6 %).
        row = judged(*rights(50, 30, 0, 0), margin=.01)
        self.assertEqual(row.verdict, "undecided")
        self.assertTrue(.04 < row.interval[1] < .08, row.interval)
        self.assertEqual(judged(*rights(50, 30, 0, 0), margin=.06).verdict, "equivalent within 0.06")

    def test_no_headroom(self):
        self.assertEqual(judged(*rights(100, 98, 1, 0), margin=.5).verdict, "no headroom")
        self.assertEqual(judged(*rights(100, 5, 5, 5), margin=.5).verdict, "no headroom")
        self.assertEqual(judged(*rights(100, 40, 60, 0)).verdict, "worse")  # from 100 % down is seen

    def test_hardly_encoded_has_no_other_verdict(self):
        new, old = rights(100, 40, 30, 0)
        self.assertEqual(judged(new, old, share=.2).verdict, "hardly encoded")
        self.assertEqual(judged(new, old, share=.3).verdict, "worse")

    def test_which_way_is_worse(self):
        old = list(numpy.random.default_rng(1).normal(1, .2, 30))
        up = [value + .1 + .01 * (i % 3) for i, value in enumerate(old)]
        self.assertEqual(judged(up, old, "nll").verdict, "worse")
        self.assertEqual(judged(up, old, "margin").verdict, "undecided")
        self.assertEqual(judged(old, up, "margin").verdict, "worse")
        self.assertEqual(judged(old, old, "nll", margin=.01).verdict, "equivalent within 0.01")

    def test_clusters_decide_what_items_alone_would_not(self):
        # Two contexts of 20 questions; all that is lost is in one.
        new, old = [0] * 12 + [1] * 28, [1] * 40
        clusters = [str(i // 20) for i in range(40)]
        self.assertEqual(judged(new, old).verdict, "worse")
        row = judged(new, old, clusters=clusters)
        self.assertEqual((row.clusters, row.verdict, row.score_interval), (2, "no headroom", None))
        self.assertGreater(row.p, .05)

    def test_holm_is_over_the_report(self):
        new, old = rights(100, 50, 20, 8)  # p .036
        rows = [items.pair("a", "b", lines(new), lines(old), "right", resamples=1000) for _ in range(2)]
        self.assertEqual({row.verdict for row in items.judge(rows)}, {"undecided"})
        self.assertAlmostEqual(rows[0].p_holm, 2 * rows[0].p)

    def test_shares_are_no_rights_and_wrongs(self):
        old = [.5, 1, .75, 1] * 10
        row = judged([value - .25 for value in old], old)
        self.assertEqual((row.lost, row.score_interval, row.p), (None, None, 0))

    def test_wrong_answers_that_become_others(self):
        new = lines([0, 0, 1, 0], answer=["a", "b", "c", "d"])
        old = lines([0, 0, 1, 1], answer=["a", "x", "c", "d"])
        row = items.pair("a", "b", new, old, "right", resamples=1000)
        self.assertEqual((row.lost, row.won, row.other_wrong), (1, 0, 1))

    def test_other_items_are_refused(self):
        one, two = lines([1, 0]), lines([1, 0, 1])
        with self.assertRaisesRegex(items.Refused, "same items.*'2'"):
            items.pair("a", "b", one, two, "right")
        for name in ("prompt_sha256", "cluster"):
            two = lines([1, 0])
            two["1"][name] = "other"
            with self.assertRaisesRegex(items.Refused, f"'1' has another {name}"):
                items.pair("a", "b", one, two, "right")


class Command(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory(prefix="kvq_items_")
        self.addCleanup(self.dir.cleanup)

    def file(self, name, cells):
        path = os.path.join(self.dir.name, name)
        with open(path + ".samples.jsonl", "w", encoding="utf-8") as file:
            for cell, found in cells.items():
                file.writelines(json.dumps({"benchmark": CELL.format(cell), **line}) + "\n" for line in found.values())
        return path

    def test_table_json_and_exit_code(self):
        new, old = rights(200, 100, 40, 4)
        path = self.file("r.json", {"none": lines(old, share=0), "int2": lines(new), "int8": lines(old)})
        report = os.path.join(self.dir.name, "out.json")
        code, out, err = testing.run(paired, path, "--json", report, "--markdown=" + os.path.join(self.dir.name, "out.md"))
        self.assertEqual((code, err), (1, ""))
        with open(report, encoding="utf-8") as file:
            rows = {row["cell"].split("/")[3]: row for row in json.load(file)}
        self.assertEqual({spec: row["verdict"] for spec, row in rows.items()}, {"int2": "worse", "int8": "undecided"})
        self.assertEqual((rows["int2"]["lost"], rows["int2"]["won"], rows["int2"]["seed"]), (40, 4, 42))
        self.assertIn("40/4", out)
        with open(os.path.join(self.dir.name, "out.md"), encoding="utf-8") as file:
            self.assertEqual(file.read(), out)
        self.assertEqual(testing.run(paired, path, "--filter=int8", "--margin=right=.1")[0], 0)

    def test_cells_of_several_files(self):
        new, old = rights(200, 100, 40, 4)
        a, b = self.file("a.json", {"none": lines(old)}), self.file("b.json", {"int4": lines(new)})
        code, out, _ = testing.run(paired, a, b)
        self.assertEqual(code, 1)
        self.assertIn("40/4", out)
        self.assertIn("another of the files", testing.run(paired, a, b, a)[2])

    def test_two_runs(self):
        new, old = rights(200, 100, 40, 4)
        a, b = self.file("a.json", {"int4": lines(old)}), self.file("b.json", {"int4": lines(new)})
        self.assertEqual(testing.run(paired, b, "--against", a)[0], 1)
        self.assertEqual(testing.run(paired, a, "--against=" + a)[0], 0)

    def results(self, name, cells):
        """A results file with items beside it."""
        path = self.file(name, cells)
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"context": {"date": "2026-11-28T00:00:00", "kvqbench_build": "Release", "dtype": "Float"}, "benchmarks": [
                {"name": CELL.format(spec).replace("ruler", measurement), "run_name": "x", "kld_nats": .25, "kv_own": .5,
                 "kv_own_lo": .25, "kv_own_hi": .75} for spec in cells for measurement in ("ruler", "drift", "reuse")]}, file)
        return path

    def test_tables_page_and_gate_show_them(self):
        new, old = rights(200, 100, 40, 4)
        path = self.results("r.json", {"none": lines(old, share=0), "int2": lines(new)})
        def command(*arguments):
            return subprocess.run([os.path.join(HERE, arguments[0]), *arguments[1:]], capture_output=True, text=True, check=False)
        table = command("table", path)
        self.assertEqual((table.returncode, table.stderr), (0, ""))
        for words in ("item by item", "40/4", "worse", "drift KLD", "reuse kv"):
            self.assertIn(words, table.stdout)
        out = os.path.join(self.dir.name, "out")
        report = command("report", path, "--out", out)
        self.assertEqual(report.returncode, 0, report.stderr)
        for name, words in (("index.html", "40/4"), ("tables/items.csv", "40/4"), ("tables/results_table.tex", "0.25000")):
            with open(os.path.join(out, name), encoding="utf-8") as file:
                self.assertIn(words, file.read())
        other = self.results("new.json", {"none": lines(new, share=0), "int2": lines(new)})
        gate = command("compare", path, other)
        self.assertEqual(gate.returncode, 0, gate.stdout)  # facts decide
        self.assertIn("items, NEW against OLD", gate.stdout)
        self.assertIn("40/4", gate.stdout)
        changed = {"none": lines(old, share=0)}
        changed["none"]["3"]["prompt_sha256"] = "other"
        self.assertIn("items not compared", command("compare", path, self.results("o.json", changed)).stdout)
        with open(path + ".samples.jsonl", "a", encoding="utf-8") as file:
            file.write("{\n")
        table = command("table", path)
        self.assertEqual(table.returncode, 2)
        self.assertIn("line 401", table.stderr)

    def test_bad_input(self):
        path = self.file("r.json", {"none": lines([1, 0])})
        broken = self.file("b.json", {"none": lines([1, 0])})
        with open(broken + ".samples.jsonl", "a", encoding="utf-8") as file:
            file.write("{\n")
        bad = os.path.join(self.dir.name, "n.jsonl")
        with open(bad, "w", encoding="utf-8") as file:
            file.write('{"benchmark": "a/b/c/d/e/f", "sample": "0", "right": NaN}\n')
        for arguments, words in (((path,), "no two cells"), ((broken,), "line 3"), ((bad,), "line 1"), (("none.json",), "No such file"),
                                 ((path, "--seed=x"), "--seed"), ((path, "--margin=ppl=1"), "--margin: NUMBER=M"),
                                 ((path, "--margin=right=x"), "--margin: a number"), ((path, "--filter=("), "--filter"),
                                 ((path, "--what"), "--what"), ((path, "--seed"), "wants a value"), (("--seed=1",), "wants results")):
            code, out, err = testing.run(paired, *arguments)
            self.assertEqual((code, out, err.count("\n")), (2, "", 1), err)
            self.assertIn(words, err)


if __name__ == "__main__":
    unittest.main()
