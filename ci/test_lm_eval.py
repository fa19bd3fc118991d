#!/usr/bin/python3
"""Tests of ci/lm-eval: items made of what lm-eval 0.4.13 really wrote of kvqserve with int4-hqq (accuracy/golden/lm_eval:
DIR/cells of ci/lm-eval, of results.jsonl what names no path), resume and refusals without it; and where its virtual
environment and kvqserve are at hand, lm-eval itself on a served model."""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import types
import unittest
import unittest.mock

import items
import lm_eval_items
import reading
import testing
from testing import CACHE, HERE, ROOT

GOLDEN = os.path.join(ROOT, "accuracy", "golden", "lm_eval")
SERVER = os.environ.get("KVQ_SERVE_EXE", os.path.join(ROOT, "build", "release", "kvqserve"))
command = testing.load("lm-eval")


def raw(task):
    """lm-eval's own numbers of a recorded task, and its samples."""
    with open(os.path.join(GOLDEN, task, "results.jsonl"), encoding="utf-8") as file:
        numbers = json.load(file)["results"][task]
    with open(os.path.join(GOLDEN, task, "samples.jsonl"), encoding="utf-8") as file:
        return numbers, [json.loads(line) for line in file]


class Items(unittest.TestCase):
    """What is recorded has lm-eval's own averages beside it, which ours must equal."""

    def test_cloze(self):
        found, facts = lm_eval_items.convert(os.path.join(GOLDEN, "austen_cloze"))
        numbers, samples = raw("austen_cloze")
        self.assertEqual(len(found), len(samples))
        self.assertEqual(sum(item["right"] for item in found) / len(found), numbers["acc,none"])
        # LAMBADA's perplexity is of whole answers; nll is of their tokens.
        with open(os.path.join(GOLDEN, "austen_cloze", "requests.jsonl"), encoding="utf-8") as file:
            scored = {line["prompt_sha256"]: line["scored"] for line in map(json.loads, file)}
        whole = [item["nll"] * scored[item["prompt_sha256"]] for item in found]
        self.assertAlmostEqual(math.exp(sum(whole) / len(whole)), numbers["perplexity,none"], 6)
        for item in found:
            self.assertTrue(.5 < item["encoded_share"] < 1, item)
            self.assertTrue(0 < item["tokens"] and item["lost_tokens"] == 0, item)
        self.assertEqual(facts["cache"]["spec"], "int4-hqq")
        # 30 layers of 3 heads of 64, keys and values: 4.5 bits where encoded, 16 where not.
        self.assertTrue(30 * 2 * 3 * 64 * 4.5 / 8 < facts["kv_bytes_per_token"] < 30 * 2 * 3 * 64 * 2, facts)

    def test_choice(self):
        found, _ = lm_eval_items.convert(os.path.join(GOLDEN, "capitals"))
        numbers, samples = raw("capitals")
        self.assertEqual(sum(item["right"] for item in found) / len(found), numbers["acc,none"])
        for item, sample in zip(found, samples, strict=True):
            self.assertEqual(item["margin"] > 0, item["right"] == 1)
            self.assertEqual(item["answer"] == sample["target"], item["right"] == 1)
            self.assertGreater(item["nll"], 0)

    def test_generation_with_two_filters_is_one_cell(self):
        found, facts = lm_eval_items.convert(os.path.join(GOLDEN, "gsm_symbolic"))
        numbers, samples = raw("gsm_symbolic")
        self.assertEqual((facts["filter"], 2 * len(found)), ("flexible-extract", len(samples)))
        self.assertEqual(sum(item["right"] for item in found) / len(found), numbers["exact_match,flexible-extract"])
        self.assertNotIn("nll", found[0])
        self.assertTrue(all(isinstance(item["answer"], str) for item in found))

    def test_ruler_counts_the_length_that_was_asked(self):
        found, _ = lm_eval_items.convert(os.path.join(GOLDEN, "niah_single_1"))
        numbers, samples = raw("niah_single_1")
        self.assertEqual({sample["4096"] for sample in samples}, {-1.0})
        self.assertEqual(sum(item["right"] for item in found) / len(found), numbers["1024,none"])

    def test_rolling(self):
        found, _ = lm_eval_items.convert(os.path.join(GOLDEN, "text_rolling"))
        numbers, samples = raw("text_rolling")
        words = len(samples[0]["doc"]["page"].split())
        self.assertAlmostEqual(math.exp(found[0]["nll"] * (found[0]["tokens"] - 1) / words), numbers["word_perplexity,none"], 6)
        self.assertNotIn("right", found[0])

    def test_counters(self):
        found = [{"right": value, "nll": 2 - value, "tokens": 100 + value, "lost_tokens": 1 - value, "encoded_share": .5}
                 for value in (1, 0, 1, 1)]
        counted = lm_eval_items.counters(found, {})
        self.assertEqual([counted[name] for name in ("score", "samples", "encoded_share", "shortened_share")], [75, 4, .5, .25])
        self.assertAlmostEqual(counted["score_lo"], 30.06, 1)  # Wilson, 3 of 4
        self.assertAlmostEqual(counted["gold_nll"], 1.25)
        self.assertTrue(counted["gold_nll_lo"] < 1.25 < counted["gold_nll_hi"])

    def test_what_is_not_whole_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(os.path.join(GOLDEN, "capitals"), folder, dirs_exist_ok=True)
            path = os.path.join(folder, "requests.jsonl")
            with open(path, encoding="utf-8") as file:
                kept = file.readlines()[1:]
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(kept)
            with self.assertRaisesRegex(lm_eval_items.Refused, "a request that the client did not send"):
                lm_eval_items.convert(folder)
            os.remove(path)
            with self.assertRaisesRegex(lm_eval_items.Refused, "remove .* to run it again"):
                lm_eval_items.convert(folder)


class Tasks(unittest.TestCase):
    """Of the tasks' own Python, with lists in place of data sets."""

    def load(self, name):
        stand_in = types.ModuleType("datasets")
        stand_in.Dataset = types.SimpleNamespace(from_list=list)
        spec = importlib.util.spec_from_file_location(name, os.path.join(command.TASKS, name + ".py"))
        module = importlib.util.module_from_spec(spec)
        with unittest.mock.patch.dict(sys.modules, datasets=stand_in):
            spec.loader.exec_module(module)
        return module

    def test_what_the_cloze_asks_for_was_said_before(self):
        austen = self.load("austen")
        chance = random.Random(1)
        names = ("Elinor", "Marianne", "Edward", "Fanny")
        # Sentences of ten words that end with a name, each name in a stretch of its own and in the next.
        text = "CHAPTER I\n\n" + "\n\n".join(" ".join(f"It was then {chance.random()} that Mr. Knightley\nsaw his dear _{names[i // 30 % 4]}_."
                                                     for _ in range(5)) for i in range(400))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "novel")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            docs = austen.cloze(context=512, seed=3, texts={"novel": path})["test"]
            self.assertEqual(docs, austen.cloze(context=512, seed=3, texts={"novel": path})["test"])
            self.assertNotEqual(docs, austen.cloze(context=512, seed=4, texts={"novel": path})["test"])
        self.assertGreater(len(docs), 20)
        for doc in docs:
            words = doc["passage"].split(" ")
            self.assertEqual(len(words), 384)
            self.assertIn(doc["word"], names)
            self.assertGreaterEqual(sum(word == doc["word"] + "." for word in words[:-austen.NEWEST]), 2)
            self.assertEqual(words[-1], "dear")
            self.assertNotIn("_", doc["passage"])
        ends = sorted(doc["at"] for doc in docs)
        self.assertTrue(all(second - first >= 384 for first, second in zip(ends, ends[1:])))  # no passage overlaps another

    def test_problems_of_a_file(self):
        gsm = self.load("gsm")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "file")
            for lines, words in ((8, ""), (5, "5 problems; 5 are the examples"), (-1, "line 1 has no question and answer in JSON")):
                with open(path, "w", encoding="utf-8") as file:
                    file.write("x\n" if lines < 0 else "".join(json.dumps({"question": f"q{i}", "answer": "#### 1"}) + "\n" for i in range(lines)))
                if not words:
                    found = gsm.from_file(path)
                    self.assertEqual([problem["question"] for problem in found["test"]], ["q0", "q1", "q2"])
                    self.assertEqual(len(found["examples"]), 5)
                else:
                    with self.assertRaisesRegex(ValueError, words):
                        gsm.from_file(path)


class Command(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory(prefix="kvq_lm_eval_")
        self.addCleanup(self.dir.cleanup)
        self.out = os.path.join(self.dir.name, "out")
        self.server = os.path.join(self.dir.name, "kvqserve")  # must not be started
        with open(self.server, "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\necho 'kvqserve: --spec: no such scheme' >&2\nexit 2\n")
        os.chmod(self.server, 0o755)

    def fill(self, *arguments):
        """Puts what is recorded where the command would have put it."""
        flags, out = command.parse([*arguments, "--server=" + self.server, "--out=" + self.out])
        cells = command.cells_of(flags, out, self.server)
        for cell in cells:
            shutil.copytree(os.path.join(GOLDEN, cell["key"]["task"]), cell["folder"])
            path = os.path.join(cell["folder"], "requests.jsonl")
            with open(path, encoding="utf-8") as file:
                text = file.read().replace('"spec": "int4-hqq"', f'"spec": "{cell["key"]["spec"]}"')
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            with open(os.path.join(cell["folder"], "cell.txt"), "w", encoding="utf-8") as file:
                json.dump({"key": cell["key"], "name": "smollm2-135m", "max_length": 8192, "meta": {"backend": "sdpa"},
                           "begun": "2026-11-28T00:00:00+00:00"}, file)
        return cells

    def test_what_is_there_is_not_asked_again(self):
        asked = ["--schemes=none,int4-hqq", "--tasks=austen_cloze,niah_single_1", "--contexts=1024", "--limit=3", "--seed=7"]
        self.assertEqual(len(self.fill(*asked)), 4)
        done = subprocess.run([os.path.join(HERE, "lm-eval"), *asked, "--server=" + self.server, "--out=" + self.out],
                              capture_output=True, text=True, check=False)
        # The same items: nothing is worse.
        self.assertEqual((done.returncode, done.stderr), (0, "lm-eval: 4 of 4 cells are there\n"))
        for words in ("lm_eval_austen_cloze/smollm2-135m/sdpa/int4-hqq/ctx:1024/batch:1", "undecided", "detectable"):
            self.assertIn(words, done.stdout)
        path = os.path.join(self.out, "lm_eval.json")
        self.assertEqual(len(items.read(path)), 4)
        self.assertEqual(reading.json_files(self.out, ()), [path])  # nothing else in the folder is taken for results
        table = subprocess.run([os.path.join(HERE, "table"), path], capture_output=True, text=True, check=False)
        self.assertEqual((table.returncode, table.stderr), (0, ""))
        self.assertIn("item by item", table.stdout)

    def test_another_cache_than_asked_for_is_refused(self):
        asked = ["--schemes=none,int4-hqq", "--tasks=capitals", "--include-path=" + os.path.join(GOLDEN, "tasks")]
        path = os.path.join(self.fill(*asked)[0]["folder"], "requests.jsonl")
        with open(path, encoding="utf-8") as file:
            text = file.read().replace('"spec": "none"', '"spec": "int8-hqq"')
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        code, out, err = testing.run(command, *asked, "--server=" + self.server, "--out=" + self.out)
        self.assertEqual((code, out), (2, ""))
        self.assertIn("the server answered with int8-hqq, not none", err)

    def test_everything_that_matters_is_in_the_key(self):
        def folder(*more):
            flags, out = command.parse(["--out=" + self.out, "--server=" + self.server, "--tasks=gsm8k_file",
                                        "--file=" + self.server, *more])
            return [cell["folder"] for cell in command.cells_of(flags, out, self.server)][-1]
        plain, seen = folder(), set()
        for more in ((), ("--limit=3",), ("--seed=1",), ("--schemes=int8-hqq",), ("--models=x",), ("--fewshot=0",),
                     ("--batch=4",), ("--concurrent=4",), ("--max-length=99",), ("--tasks=text_rolling",),
                     ("--file=" + __file__,), ("--", "--dtype=float32"), ("--include-path=" + os.path.join(GOLDEN, "tasks"),)):
            seen.add(folder(*more))
        self.assertEqual(len(seen), 13)
        self.assertEqual(plain, folder())
        with open(self.server, "a", encoding="utf-8") as file:
            file.write("# another build\n")
        self.assertNotEqual(plain, folder())

    def test_bad_input_is_one_line_and_2(self):
        missing = os.path.join(self.dir.name, "none")
        for arguments, words in (
                (["--task=x"], "unknown argument '--task=x'; see ci/lm-eval --help"),
                (["--limit=0"], "--limit: a whole number from 1, not '0'"),
                (["--limit"], "--limit wants a value"),
                (["--schemes=,"], "--schemes wants a list"),
                (["--contexts=512,x"], "--contexts: a whole number from 1, not 'x'"),
                (["--tasks=gsm8k_file"], "gsm8k_file wants --file=FILE"),
                (["--tasks=gsm8k_file", "--file=" + missing], "no such file"),
                (["--include-path=" + missing], "no such folder"),
                (["--server=" + missing], "no such file"),
                (["--tasks=ruler", "--contexts=512"], "--contexts: RULER's prompts want 1024 tokens at least, not 512"),
                (["--contexts=64"], "austen_cloze wants 256 tokens at least, not 64"),
                (["--", "--spec=none"], "'--spec=none' is what ci/lm-eval itself hands to kvqserve")):
            code, out, err = testing.run(command, *arguments)
            self.assertEqual((code, out, err.count("\n")), (2, "", 1), (arguments, err))
            self.assertIn(words, err)
            self.assertTrue(err.startswith("lm-eval: "), err)
        self.assertFalse(os.path.exists(self.out))

    def test_a_server_that_refuses_is_heard(self):
        flags, _ = command.parse(["--server=" + self.server])
        err = io.StringIO()
        with self.assertRaises(SystemExit) as end, contextlib.redirect_stderr(err):
            with command.serving(self.server, "m", "nope", flags, os.path.join(self.dir.name, "log")):
                self.fail("it did not start")
        self.assertEqual((end.exception.code, err.getvalue()), (2, "lm-eval: kvqserve: --spec: no such scheme\n"))

    @staticmethod
    def runs(pid):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                return file.read().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    def test_a_server_ends_with_us(self):
        with open(self.server, "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\necho $$ >" + self.out + ".pid\nsleep 60\n")
        flags, _ = command.parse(["--server=" + self.server])
        program = (f"import sys; sys.argv = ['x']; sys.path.insert(0, {HERE!r}); import testing, signal; c = testing.load('lm-eval')\n"
                   "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
                   f"with c.serving({self.server!r}, 'm', 'none', {{'served': []}}, {self.out!r} + '.log'): pass\n")
        for number in (15, 2, 9):
            with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
                while not os.path.exists(self.out + ".pid") or os.stat(self.out + ".pid").st_size == 0:
                    self.assertIsNone(process.poll())
                process.send_signal(number)
                process.wait(30)
            with open(self.out + ".pid", encoding="utf-8") as file:
                pid = int(file.read())
            os.remove(self.out + ".pid")
            for _ in range(100):
                if not self.runs(pid):
                    break
                time.sleep(0.1)
            self.assertFalse(self.runs(pid))


def missing():
    if not os.access(SERVER, os.X_OK):
        return f"{SERVER} is not there"
    if not os.path.isdir(os.path.join(CACHE, "models", "smollm2-135m")):
        return "smollm2-135m is not there"
    with open(command.REQUIREMENTS, encoding="utf-8") as file:
        wanted = file.read()
    with contextlib.suppress(OSError), open(os.path.join(CACHE, "lm-eval-venv", ".installed"), encoding="utf-8") as file:
        if file.read() == wanted:
            return ""
    return "ci/lm-eval has not made its virtual environment yet"


def refused(test, arguments, words):
    with tempfile.TemporaryDirectory(prefix="kvq_lm_eval_") as out:
        done = subprocess.run([os.path.join(HERE, "lm-eval"), "--server=" + SERVER, "--out=" + out, *arguments],
                              capture_output=True, text=True, check=False)
        test.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
        test.assertIn(words, done.stderr)


@unittest.skipIf(missing(), missing())
class Served(unittest.TestCase):
    """lm-eval asks kvqserve; its sum of log-probabilities is kvqbench's perplexity of the same tokens."""

    def test_lm_eval_sums_what_kvqbench_scores(self):
        with tempfile.TemporaryDirectory(prefix="kvq_lm_eval_") as folder:
            page = ("It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
                    "of a wife. However little known the feelings or views of such a man may be on his first entering a ") * 6
            text, corpus, out = (os.path.join(folder, name) for name in ("text", "corpus", "out"))
            with open(text, "w", encoding="utf-8") as file:
                file.write(page)
            with open(corpus, "w", encoding="utf-8") as file:
                file.write("<|im_start|>" + page)  # the BOS that lm-eval puts in front
            done = subprocess.run([os.path.join(HERE, "lm-eval"), "--server=" + SERVER, "--schemes=int4-hqq",
                                   "--tasks=text_rolling,capitals", "--file=" + text, "--out=" + out,
                                   "--include-path=" + os.path.join(GOLDEN, "tasks"), "--", "--dtype=float32"],
                                  capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
            cells = items.read(os.path.join(out, "lm_eval.json"))
            found = {items.parts(cell)[3]: lines["0"] for cell, lines in cells.items()
                     if cell.startswith("lm_eval_text_rolling/")}
            tokens = found["int4-hqq"]["tokens"]
            bench = os.path.join(folder, "bench.json")
            subprocess.run([os.path.join(os.path.dirname(SERVER), "kvqbench"), "--corpus-file=" + corpus, f"--contexts={tokens}",
                            "--windows=1", "--schemes=int4-hqq", "--dtype=float32", "--benchmark_filter=^perplexity/",
                            "--benchmark_out=" + bench], capture_output=True, check=True)
            with open(bench, encoding="utf-8") as file:
                rows = {row["name"].split("/")[3]: row for row in json.load(file)["benchmarks"]}
            for spec, row in rows.items():
                self.assertEqual(row["scored_tokens"], tokens - 1)
                self.assertLess(abs(found[spec]["nll"] / math.log(row["ppl"]) - 1), 1e-6, spec)
                self.assertGreater(abs(row["ppl"] / row["ppl_reference"] - 1), 1e-4)  # the cache shows in it
                self.assertGreater(found[spec]["encoded_share"], .25)
            self.assertIn("lm_eval_capitals/smollm2-135m/sdpa/int4-hqq", done.stdout)
            self.assertIn("hardly encoded", done.stdout)  # of a dozen tokens

    def test_an_unknown_spec(self):
        refused(self, ["--schemes=nope"], "nope")


@unittest.skipIf(missing(), missing())
class Unknown(unittest.TestCase):
    """lm-eval reads all of its tasks, some seconds, before it knows that it has none of that name."""

    def test_an_unknown_task(self):
        refused(self, ["--tasks=nope"], "--tasks: 'nope' is none of lm-eval's")


if __name__ == "__main__":
    unittest.main()
