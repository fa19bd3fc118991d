#!/usr/bin/python3
"""Tests of ci/verdict.py and ci/sentences.py: planted results, each of which fails where its rule is taken out of the source;
sentences that the kept runs must carry; terminal, table.md and page begin with them. KVQ_BENCH_EXE: whose --list-presets is
compared (default build/release/kvqbench)."""

import os
import re
import subprocess
import sys
import tempfile
import types
import unittest
import unittest.mock

import items
import page
import reading
import sentences
import tables
import verdict
from results import File, Results
from testing import BASELINES, HERE, KVQBENCH, ROOT, read

FACTS = {"dtype": "Half", "gpu": "G", "protocol": "decode", "load_avg": [0.1], "num_cpus": 8}


# ---- planting

class Planted:
    """Results of one model on one card; `none` has 16 bits and takes 10 ms [9.9, 10.1] a token."""

    def __init__(self, **facts):
        self.results = Results()
        self.results.shapes["m"] = {"max_position_embeddings": 8192}
        self.file = self.new_file("a.json", **facts)

    def new_file(self, path, timestamp="2026-01-01T00:00:00", **facts):
        file = File(path, "r", "benchmarks", timestamp, {**FACTS, **facts})
        self.results.files.append(file)
        return file

    def cell(self, spec, context=1024, batch=1, file=None, bits=None, **values):
        cell = self.results.cell(file or self.file, "card", "m", "fused", spec, context, batch)
        if bits:
            values.update({"kv_size.bits_per_element": bits, "kv_size.kv_bytes": bits * 1000.0 * context * batch})
        cell.values.update({key.replace("__", "."): value for key, value in values.items()})
        return cell

    def text(self, spec, kld, floor=0.001, ppl=(0.0, -0.01, 0.01), top1=(0.98, 0.97, 0.99), bits=None, context=1024, file=None,
             windows=6, **values):
        """A cell of `perplexity`: value, low, high; ppl as a share of the reference, which is 10."""
        found = {"perplexity.windows": windows, "perplexity.ppl_reference": 10.0, "perplexity.encoded_share": 0.9,
                 "perplexity.kld_floor_nats": floor, "perplexity.top1_floor": 0.98, **values}
        for name, number, scale in (("kld_nats", kld, 1), ("delta_ppl", ppl, 10), ("top1_agreement", top1, 1)):
            for end, value in zip(("", "_lo", "_hi"), number or ()):
                found[f"perplexity.{name}{end}"] = value * scale
        return self.cell(spec, context, 1, file, bits, **{key: value for key, value in found.items() if value is not None})

    def time(self, spec, ms, context=1024, batch=1, bits=None, runs=3, label="", **values):
        """A cell of `decode`: value, fastest, slowest."""
        cell = self.cell(spec, context, batch, bits=bits, **{
            "decode.ms_per_token": ms[0], "decode.ms_per_token_min": ms[1], "decode.ms_per_token_max": ms[2], "decode.samples": runs,
            "decode.tokens_per_s": 1e3 * batch / ms[0], **values})
        cell.texts["decode.label"] = label
        return cell

    def none(self, ms=(10.0, 9.9, 10.1), **how):
        return self.time("none", ms, bits=16, **how)

    def item_row(self, spec, verdict_word, reference=0.6, score=0.6, interval=(-0.1, 0.1), metric="right"):
        row = items.Pair(f"ruler_x/m/fused/{spec}/ctx:1024/batch:1", "", metric, 100, 100, 0.9, score, None, reference,
                         score - reference, interval, interval, interval, interval, 0.001, 0.1, 0.01, 1)
        row.run, row.verdict = "r", verdict_word
        self.results.pairs.append(row)

    def of(self, rules, kind):
        """Texts of one kind."""
        return " ".join(sentence.text for said in rules.verdicts(self.results) for sentence in said.of(kind))


def expect(condition, what=""):
    if not condition:
        raise AssertionError(what)


def says(planted, rules, kind, *words):
    text = planted.of(rules, kind)
    for word in words:
        expect(word in text, f"{kind}: '{word}' is not in '{text}'")


def silent(planted, rules, *kinds):
    for kind in kinds:
        expect(not planted.of(rules, kind), f"{kind}: {planted.of(rules, kind)}")


def planted(*mutants):
    """A planted case: a function of the rules that raises AssertionError where they are wrong. Each mutant, (text of
    ci/verdict.py or ci/sentences.py, what to put in its place), takes a rule away."""
    def register(case):
        CASES[case.__name__] = (case, mutants)
        return case
    return register


CASES = {}


# ---- what it does to the answers

@planted(("FLOOR_FACTOR = 2.0", "FLOOR_FACTOR = 0.0"))
def at_the_floor_it_is_free(rules):
    results = Planted()
    results.text("int8", (0.0012, 0.0011, 0.0013), bits=8.5)
    says(results, rules, "free", "int8")
    says(results, rules, "set", "Set int8 (8.5 bits)", "0.00120 [0.00110, 0.00130]", "rounding alone does 0.00100")


@planted(("kld.high <= FLOOR_FACTOR * floor and not lost", "kld.value <= FLOOR_FACTOR * floor and not lost"))
def an_interval_that_leaves_the_floor_is_not_free(rules):
    results = Planted()
    results.text("int8", (0.0012, -0.0004, 0.0028), bits=8.5)
    silent(results, rules, "free", "next to nothing")
    says(results, rules, "little", "int8")


@planted(("kld.high <= FLOOR_FACTOR * floor and not lost", "kld.high <= FLOOR_FACTOR * floor"))
def a_loss_of_perplexity_that_is_certain_is_not_free(rules):
    results = Planted()
    results.text("int8", (0.0012, 0.0011, 0.0013), ppl=(0.02, 0.01, 0.03), bits=8.5)
    silent(results, rules, "free")


@planted((" or top1 and top1.high < top1_floor)", ")"))
def a_loss_of_top1_that_is_certain_is_not_free(rules):
    results = Planted()
    results.text("int8", (0.0012, 0.0011, 0.0013), top1=(0.95, 0.94, 0.96), bits=8.5)
    silent(results, rules, "free")


@planted(("NEXT_TO_NOTHING = 0.001", "NEXT_TO_NOTHING = 0.0"))
def less_than_a_thousandth_of_a_nat_is_next_to_nothing(rules):
    results = Planted(dtype="Float")
    results.text("int8", (0.0005, 0.0004, 0.0006), floor=0.00001, bits=8.5)
    says(results, rules, "next to nothing", "less than 0.001 nats", "int8")
    silent(results, rules, "free", "little")


@planted(("kld.high - (floor or 0) < LITTLE", "kld.value - (floor or 0) < LITTLE"))
def from_the_floor_to_too_much_cannot_be_said(rules):
    results = Planted()
    results.text("int4", (0.008, 0.0015, 0.0145), bits=4.5)
    silent(results, rules, "free", "little", "costs")
    says(results, rules, "cannot", "int4", "reaches from rounding to more than 0.01 nats")


@planted(('''    elif cell[measurement + ".windows"] == 1:
        found.why = "one window, which has no interval"
''', ""))
def one_window_has_no_interval(rules):
    results = Planted()
    results.text("int2", (0.5,), ppl=(9.0,), top1=(0.5,), windows=1, bits=2.5)
    silent(results, rules, "breaks", "costs", "set")
    says(results, rules, "cannot", "one window", "+900 %")


@planted(('''    elif not any(value and value.known for value in (kld, ppl)):
        found.why = "no interval"
''', ""))
def without_an_interval_it_cannot_be_said(rules):
    results = Planted()
    results.text("int2", None, ppl=(9.0,), top1=None, windows=None, bits=2.5)
    says(results, rules, "cannot", "no interval", "+900 %")


@planted(('if hardly := cell.hardly_encoded(measurement):', "if hardly := '':"))
def text_that_reads_hardly_anything_encoded_says_nothing(rules):
    results = Planted()
    results.text("int2", (0.0010, 0.0009, 0.0011), bits=12.0, **{"perplexity.encoded_share": 0.12})
    silent(results, rules, "free", "set")
    says(results, rules, "cannot", "hardly encoded, 12 %")


@planted(("kld and floor is not None and kld.high <= FLOOR_FACTOR * floor and not lost", "kld and kld.high <= 0.002 and not lost"),
         ("lost or kld and floor is not None and kld.low > FLOOR_FACTOR * floor", "lost or kld and kld.low > 0.002"))
def without_a_floor_it_may_be_rounding(rules):
    results = Planted()
    results.text("int8", (0.0015, 0.0014, 0.0016), floor=None, bits=8.5)
    results.text("int4", (0.015, 0.014, 0.016), floor=None, bits=4.5)
    silent(results, rules, "free", "costs")
    says(results, rules, "little", "int8")
    says(results, rules, "cannot", "int4", "no noise floor")


@planted(("ppl.low > BROKEN_PPL", "ppl.value > BROKEN_PPL"), ("ppl.low > BROKEN_PPL or", ""))
def it_breaks_where_the_kind_end_is_beyond_a_quarter(rules):
    results = Planted()
    results.text("int3", (0.2, 0.15, 0.25), ppl=(0.30, 0.20, 0.40), top1=(0.80, 0.79, 0.81), bits=3.5)
    results.text("int2", (0.3, 0.25, 0.35), ppl=(0.35, 0.28, 0.42), top1=(0.80, 0.79, 0.81), bits=2.5)
    says(results, rules, "costs", "int3", "+30.0 % [+20.0, +40.0]")
    says(results, rules, "breaks", "int2", "+35.0 % [+28.0, +42.0]")


@planted((" or top1 and top1.high < BROKEN_TOP1 * top1_floor", ""))
def it_breaks_where_every_fourth_token_is_another(rules):
    results = Planted()
    results.text("int2", (0.2, 0.15, 0.25), ppl=(0.10, 0.08, 0.12), top1=(0.70, 0.68, 0.72), bits=2.5)
    says(results, rules, "breaks", "int2", "top-1 70.0 % [68.0, 72.0]")


@planted(('return any("random weights" in', 'return any("no such" in'))
def random_weights_have_no_answers(rules):
    results = Planted(**{"model m": "sha256:0, random weights"})
    results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5)
    silent(results, rules, "free", "set")
    says(results, rules, "cannot", "random weights")


@planted(("worst = max(graded or every", "worst = min(graded or every"))
def of_several_contexts_the_worst_counts(rules):
    results = Planted()
    results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5)
    results.text("int8", (0.05, 0.04, 0.06), ppl=(0.05, 0.03, 0.07), bits=8.5, context=4096)
    silent(results, rules, "free")
    says(results, rules, "costs", "0.0500 [0.0400, 0.0600]")


@planted(("    cells = results.current()", "    cells = results.cells"))
def superseded_results_are_not_judged(rules):
    results = Planted()
    results.file.keys = {"old"}
    results.text("int2", (0.5, 0.4, 0.6), ppl=(9.0, 8.0, 10.0), bits=2.5)
    newer = results.new_file("b.json", "2026-02-01T00:00:00")
    newer.keys = {"old", "new"}
    results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5, file=newer)
    results.results.mark_superseded()
    silent(results, rules, "breaks")
    says(results, rules, "free", "int8")


# ---- tasks

@planted(('            verdict = "worse"\n', '            verdict = "undecided"; continue\n'),
         ("score.high < theirs.low", "score.value < theirs.value"))
def a_score_is_worse_where_intervals_lie_apart(rules):
    results = Planted()
    results.cell("none", bits=16, needle__needle_rate=0.8, needle__needle_rate_lo=0.7, needle__needle_rate_hi=0.9)
    results.text("int4", (0.001, 0.0009, 0.0011), bits=4.5, **{
        "needle.needle_rate": 0.6, "needle.needle_rate_lo": 0.5, "needle.needle_rate_hi": 0.65})
    results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5, **{
        "needle.needle_rate": 0.7, "needle.needle_rate_lo": 0.6, "needle.needle_rate_hi": 0.75})
    says(results, rules, "costs", "int4", "needle 60 % [50, 65], unquantized 80 % [70, 90]")
    says(results, rules, "free", "int8")
    says(results, rules, "cannot", "whether answers change with int8: undecided in needle")


@planted(("BROKEN_TASK = 0.5", "BROKEN_TASK = 0.0"))
def half_of_a_task_lost_breaks_it(rules):
    results = Planted()
    results.cell("none", bits=16, **{"ruler_x.score": 100.0, "ruler_x.score_lo": 93.0, "ruler_x.score_hi": 100.0})
    results.text("kivi-2", (0.05, 0.04, 0.06), ppl=(0.05, 0.03, 0.07), bits=3.0, **{
        "ruler_x.score": 19.0, "ruler_x.score_lo": 10.0, "ruler_x.score_hi": 32.0})
    says(results, rules, "breaks", "kivi-2", "ruler_x 19 % [10, 32], unquantized 100 % [93, 100]")


@planted(("        elif not HEADROOM[0] <= theirs.value * scale <= HEADROOM[1]:\n            verdict = \"no headroom\"\n", ""))
def a_task_that_none_always_solves_has_no_headroom(rules):
    results = Planted()
    for spec in ("none", "int8"):
        results.cell(spec, bits=8, needle__needle_rate=1.0, needle__needle_rate_lo=0.57, needle__needle_rate_hi=1.0)
    results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5)
    says(results, rules, "cannot", "no headroom in needle")


@planted(('        elif cell.hardly_encoded(measurement):\n            verdict = "hardly encoded"\n', ""))
def a_task_that_reads_hardly_anything_encoded_says_nothing(rules):
    results = Planted()
    results.cell("none", bits=16, needle__needle_rate=0.8, needle__needle_rate_lo=0.7, needle__needle_rate_hi=0.9)
    results.text("int4", (0.001, 0.0009, 0.0011), bits=12.0, **{
        "needle.needle_rate": 0.6, "needle.needle_rate_lo": 0.5, "needle.needle_rate_hi": 0.65, "needle.encoded_share": 0.2})
    says(results, rules, "free", "int4")
    says(results, rules, "cannot", "hardly encoded in needle")


@planted(('        if row.verdict == "worse":', '        if row.verdict == "no such":'))
def items_answered_worse_are_a_cost(rules):
    results = Planted()
    results.cell("none", bits=16)
    results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5)
    results.text("int4", (0.001, 0.0009, 0.0011), bits=4.5)
    results.item_row("int8", "undecided")
    results.item_row("int4", "worse", score=0.45, interval=(-0.2, -0.1))
    says(results, rules, "free", "int8")
    says(results, rules, "costs", "int4", "45 % right, unquantized 60 %")
    says(results, rules, "set", "Set int8")


# ---- times

@planted(("gain.low > SPEED_MARGIN", "gain.value > SPEED_MARGIN"), ("SPEED_MARGIN = 0.01", "SPEED_MARGIN = 1.0"))
def overlapping_times_say_nothing(rules):
    results = Planted()
    results.none()
    results.time("int8", (9.5, 9.2, 9.9), bits=8.5)
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5)
    says(results, rules, "faster", "int4 (+11 % [+9, +13])")
    says(results, rules, "cannot", "speed of int8: times overlap")


@planted(("gain.high < -SPEED_MARGIN", "gain.high < -9"))
def slower_is_said(rules):
    results = Planted()
    results.none()
    results.time("int8", (12.0, 11.9, 12.1), bits=8.5)
    says(results, rules, "slower", "int8 (-17 % [-18, -15])")


@planted(("-2 * SPEED_MARGIN < gain.low", "-0 * SPEED_MARGIN < gain.low"))
def times_within_a_percent_are_level(rules):
    results = Planted()
    results.none(ms=(10.0, 9.97, 10.03))
    results.time("int8", (10.0, 9.97, 10.03), bits=8.5)
    says(results, rules, "level", "int8")


@planted(("LEAST_RUNS = 3", "LEAST_RUNS = 0"))
def one_repetition_is_no_interval(rules):
    results = Planted()
    results.none()
    results.time("int4", (5.0, 5.0, 5.0), bits=4.5, runs=1)
    silent(results, rules, "faster")
    says(results, rules, "cannot", "fewer than 3 repetitions")


@planted(('"throttled" if cell[measurement + ".throttled"] and not (capped(cell) and capped(plain)) else', '"" if False else'))
def a_throttled_reference_cannot_be_outrun(rules):
    results = Planted()
    results.none(label="cuda; throttled: hw_thermal_slowdown", **{"decode.throttled": 1.0})
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5)
    silent(results, rules, "faster")
    says(results, rules, "cannot", "throttled")


@planted(("not (capped(cell) and capped(plain))", "True"), ('reasons == ["sw_power_cap"]', "True"))
def at_the_cards_power_limit_both_are_as_they_are(rules):
    results = Planted()
    results.none(label="cuda; throttled: sw_power_cap", **{"decode.throttled": 1.0})
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5, label="cuda; throttled: sw_power_cap", **{"decode.throttled": 1.0})
    results.time("int2", (12.0, 11.9, 12.1), bits=2.5, label="cuda; throttled: hw_slowdown", **{"decode.throttled": 1.0})
    says(results, rules, "faster", "int4")
    silent(results, rules, "slower")


@planted(("not (capped(cell) and capped(plain))", "not capped(cell)"))
def a_power_limit_that_only_one_meets_is_a_throttle(rules):
    results = Planted()
    results.none(label="cuda; throttled: sw_power_cap", **{"decode.throttled": 1.0})
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5)
    silent(results, rules, "faster")


@planted(('             "disturbed" if cell[measurement + ".disturbed"] else\n', ""),
         ("Number(value, 0.0 if wrong else low, high), wrong", "Number(value, None, None) if wrong else Number(value, low, high), wrong"))
def a_disturbed_time_is_only_known_not_to_be_longer(rules):
    results = Planted()
    results.none()
    results.time("int8", (12.0, 11.9, 12.1), bits=8.5, **{"decode.disturbed": 1.0})  # may be none's or less
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5, **{"decode.disturbed": 1.0})     # faster in spite of it
    silent(results, rules, "slower")
    says(results, rules, "cannot", "speed of int8: disturbed")
    says(results, rules, "faster", "int4 (+11 % [+9 or more])")


@planted(('             "shared GPU" if cell[measurement + ".foreign_processes"] else\n', ""))
def a_shared_gpu_is_not_certain(rules):
    results = Planted()
    results.none(**{"decode.foreign_processes": 2.0})
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5)
    says(results, rules, "cannot", "speed of int4: shared GPU")


@planted(("is None and file.busy", "is None and False"))
def a_busy_machine_that_did_not_watch_is_not_certain(rules):
    results = Planted(load_avg=[9.0], num_cpus=2, gpu=None)
    results.none()
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5)
    results.none(context=2048, **{"decode.disturbed": 0.0})  # watched, and nobody came
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5, context=2048, **{"decode.disturbed": 0.0})
    says(results, rules, "faster", "from 2k on int4")


@planted(('        return Compared(cell, "", hardly)', "        pass"))
def the_time_of_a_cache_that_is_hardly_encoded_says_nothing(rules):
    results = Planted()
    results.none()
    results.time("int4", (9.0, 8.9, 9.1), bits=14.0, **{"kv_size.encoded_share": 0.1})
    silent(results, rules, "faster")
    says(results, rules, "cannot", "hardly encoded, 10 % of the cache")


@planted(("if computed_in(cell) != computed_in(plain):", "if False:"))
def times_in_another_type_are_not_compared(rules):
    results = Planted()
    results.none()
    other = results.new_file("b.json", dtype="Float")
    results.cell("int4", file=other, bits=4.5, decode__ms_per_token=5.0, decode__ms_per_token_min=5.0, decode__ms_per_token_max=5.0,
                 decode__samples=3)
    silent(results, rules, "faster")
    says(results, rules, "cannot", "computed otherwise")


@planted(('return Compared(cell, "", "no unquantized time beside it")', "return None"))
def without_a_reference_no_speed_is_said(rules):
    results = Planted()
    results.time("int4", (9.0, 8.9, 9.1), bits=4.5)
    says(results, rules, "cannot", "no unquantized time beside it", "bytes of the unquantized cache were not measured")


@planted(('                if not rows and cell.batch == batch and "decode" in cell.skipped:', "                if False:"))
def a_time_that_could_not_be_taken_has_its_reason(rules):
    results = Planted()
    results.none()
    results.cell("int4", bits=4.5).skipped["decode"] = "failed: out of memory"
    results.time("int8", (9.0, 8.9, 9.1), bits=8.5)
    says(results, rules, "cannot", "speed of int4: failed: out of memory")


@planted(("row.word == rows[-1].word", "True"), ("return min(row.cell.context for row in", "return max(row.cell.context for row in"))
def it_is_faster_from_the_context_where_that_stays_true(rules):
    results = Planted()
    for context, int4, int8 in ((1024, 12.0, 9.0), (2048, 9.0, 9.0), (4096, 8.0, 9.0)):
        results.none(context=context)
        results.time("int4", (int4, int4 - 0.05, int4 + 0.05), bits=4.5, context=context)
        results.time("int8", (int8, int8 - 0.05, int8 + 0.05), bits=8.5, context=context)
    says(results, rules, "faster", "gains at 4k", "from 1k on int8", "from 2k on int4 (+25 %")


# ---- memory

MEMORY = {"memory.vram_total_bytes": 10e9, "memory.vram_reserved_bytes": 2e9, "memory.beyond_weights_bytes": 1e8,
          "memory.kv_bytes_allocated": 0.0}


@planted(('    return (total - (reserved - held)) / each, "by bytes alone"', '    return total / each, "by bytes alone"'),
         ("    if limit and lengths[-1] > limit:", "    if False:"))
def what_fits_by_bytes_alone(rules):
    results = Planted()
    results.cell("none", bits=16, **MEMORY)   # 16,000 bytes a token: 8e9 of them hold 500,000
    results.cell("int4", bits=4, **MEMORY)
    says(results, rules, "fits", "by bytes alone", "1,953 sequences of 1k with int4 (4.0 times)", "488 unquantized",
         "one of all 8,192 tokens that the model takes fits unquantized")


@planted(('        return cell["capacity.longest_context"], "measured"', "        pass"),
         ('all(cell["capacity.fits_at_limit"] for', 'all(cell["no such"] for'))
def what_was_measured_goes_before_what_bytes_say(rules):
    results = Planted()
    for spec, bits, longest, largest in (("none", 16, 3000.0, 2.0), ("int4", 4, 9000.0, 7.0)):
        results.cell(spec, bits=bits, **MEMORY, **{"capacity.longest_context": longest, "capacity.largest_batch": largest,
                                                   "capacity.memory_bytes": 24 * 2.0**30, "capacity.fits_at_limit": 1.0})
    says(results, rules, "fits", "24 GiB hold, as runs at the limit showed, 7 sequences of 1k with int4 (3.5 times), 2 unquantized",
         "9,000 tokens with int4 (3.0 times), 3,000 unquantized")


@planted(('        if 0 in (cell["capacity.fits_at_limit"], cell["capacity.batch_fits_at_limit"]):', "        if False:"))
def a_prediction_that_failed_says_nothing(rules):
    results = Planted()
    for spec, bits in (("none", 16), ("int4", 4)):
        results.cell(spec, bits=bits, **{"capacity.longest_context": 3000.0, "capacity.largest_batch": 2.0, "capacity.fits_at_limit": 0.0})
    silent(results, rules, "fits")
    says(results, rules, "cannot", "a run at the limit that was predicted did not fit")


@planted(('        return None, "peaks of this protocol hold several caches"', "        pass"))
def peaks_of_several_caches_say_nothing(rules):
    results = Planted()
    for spec, bits in (("none", 16), ("int4", 4)):
        results.cell(spec, bits=bits, **{key: value for key, value in MEMORY.items() if "beyond" not in key})
    silent(results, rules, "fits")
    says(results, rules, "cannot", "peaks of this protocol hold several caches", "4.0 times fewer bytes")


# ---- what to set

@planted(("ranked if one.grade <= SMALL), None)", "ranked if one.grade <= FREE), None)"),
         ("round(bits_of(judged.cell), 2),\n            judged.kld.high", "-round(bits_of(judged.cell), 2),\n            judged.kld.high"),
         ("if one.grade == grade), None)", "if one.grade is not None), None)"))
def the_fewest_bits_that_are_free_and_the_fewest_within_a_hundredth(rules):
    results = Planted()
    for spec, kld, bits in (("int8", 0.0010, 8.5), ("int6", 0.0015, 6.5), ("int5", 0.005, 5.5), ("int4", 0.05, 4.5)):
        results.text(spec, (kld, 0.9 * kld, 1.1 * kld), bits=bits, ppl=(0.0, -0.01, 0.01) if kld < 0.01 else (0.1, 0.05, 0.15))
    text = results.of(rules, "set")
    expect(text.startswith("Set int6 (6.5 bits): the fewest bits that cost nothing that can be measured; proof: KLD 0.00150"), text)
    expect("For fewer bits set int5 (5.5 bits): the fewest within 0.01 nats" in text, text)
    expect("int4" not in text, text)


@planted(("timed[0].gain.low > timed[1].gain.high", "timed[0].gain.low > timed[1].gain.low"))
def the_fastest_is_named_where_it_is_certain(rules):
    for second, certain in (((9.5, 9.4, 9.6), True), ((8.1, 7.9, 8.3), False)):
        results = Planted()
        results.none()
        for spec, bits, ms in (("int8", 8.5, second), ("int6", 6.5, (8.0, 7.9, 8.1))):
            results.text(spec, (0.001, 0.0009, 0.0011), bits=bits)
            results.time(spec, ms)
        expect(("The fastest of these is int6" in results.of(rules, "set")) == certain, results.of(rules, "set"))


@planted(("return row if row and row[1] in labels else None", "return row"))
def an_engines_flags_are_said_where_the_name_meant_the_same(rules):
    for means, flags in (("q8_0@residual=0@rotate=hadamard+hadamard:64", True), ("q8_0@residual=0", False)):
        results = Planted()
        cell = results.text("llamacpp-q8_0", (0.001, 0.0009, 0.0011), bits=8.5)
        cell.texts["perplexity.label"] = "cuda Half, sdpa on decoded tokens; " + means
        says(results, rules, "set", "llama.cpp: `-ctk q8_0 -ctv q8_0`" if flags else f"`{means}`")
        expect(("-ctk" in results.of(rules, "set")) == flags)


class Rules(unittest.TestCase):
    def test_planted_cases(self):
        self.assertGreaterEqual(len(CASES), 12)
        for name, (case, _) in CASES.items():
            with self.subTest(name):
                case(sentences)

    def test_each_case_fails_without_its_rule(self):
        sources = {name: read(HERE, name + ".py") for name in ("verdict", "sentences")}  # who imports whom
        for name, (case, mutants) in CASES.items():
            self.assertTrue(mutants, name)
            for old, new in mutants:
                with self.subTest(f"{name}: {old[:60]}"), unittest.mock.patch.dict(sys.modules):
                    self.assertEqual(sum(source.count(old) for source in sources.values()), 1)
                    for part, source in sources.items():
                        rules = sys.modules[part] = types.ModuleType(part)
                        exec(compile(source.replace(old, new), part + ".py", "exec"), rules.__dict__)  # noqa: S102
                    with self.assertRaises(AssertionError):
                        case(rules)

    def test_numbers(self):
        number = verdict.Number
        self.assertEqual(verdict.nats(number(0.00025, 0.00023, 0.00026)), "0.00025 [0.00023, 0.00026]")
        self.assertEqual(verdict.nats(number(0.01535, 0.00986, 0.02084)), "0.0154 [0.0099, 0.0208]")
        self.assertEqual(verdict.nats(number(1.27191, 1.14621, 1.39762)), "1.27 [1.15, 1.40]")
        self.assertEqual(verdict.nats(number(0.0, None, None)), "0.00000")
        self.assertEqual(verdict.percent(number(-0.0001, -0.02, 0.02)), "+0.0 % [-2.0, +2.0]")  # no minus before a zero
        self.assertEqual(verdict.percent(number(12.345, None, None)), "+1,234 %")

    def test_what_all_cannot_say_is_said_once(self):
        results = Planted()
        for model in ("m", "n", "o"):
            for spec in ("none", "int4"):
                cell = results.results.cell(results.file, "card", model, "fused", spec, 1024)
                cell.values.update({"kv_size.kv_bytes": 16.0 if spec == "none" else 4.0, "perplexity.delta_ppl": 1.0, "perplexity.ppl_reference": 9.0})
        text = sentences.markdown(results.results)
        self.assertEqual(text.count("no interval"), 1)
        self.assertTrue(text.startswith("\nm, n and o, fused, on card, Half, context 1k:"), text)

    def test_what_to_set_comes_first(self):
        results = Planted()
        results.cell("none", bits=16)
        results.text("int8", (0.001, 0.0009, 0.0011), bits=8.5)
        for spec in ("none", "int8"):  # of a model before it
            results.results.cell(results.file, "card", "a", "fused", spec, 1024).values["perplexity.delta_ppl"] = 1.0
        self.assertEqual([said.title.split(",")[0] for said in sentences.verdicts(results.results)][:2], ["m", "a"])

    def test_nothing_but_the_unquantized_says_nothing(self):
        results = Planted()
        results.none()
        self.assertEqual(sentences.markdown(results.results), "")

    @unittest.skipUnless(os.path.exists(KVQBENCH), f"{KVQBENCH} is not there")
    def test_presets_are_those_of_kvqbench(self):
        lines = subprocess.run([KVQBENCH, "--list-presets"], capture_output=True, text=True, check=True).stdout.splitlines()
        listed = {line.split()[0]: line for line in lines[2:]}
        self.assertEqual(set(listed), set(sentences.presets()))
        for name, (engine, spec, flags) in sentences.presets().items():
            self.assertIn(f"  {engine}", listed[name])
            self.assertRegex(listed[name], "  " + re.escape(spec) + " +" + re.escape(flags) + "$")


# ---- the kept runs

def kept(name):
    results = reading.load([os.path.join(BASELINES, name)])
    return {kind: " ".join(sentence.text for said in sentences.verdicts(results) for sentence in said.of(kind)) for kind in sentences.KINDS}


class Kept(unittest.TestCase):
    def test_smollm2_on_a_cpu(self):
        said = kept("smollm2-135m-cpu")
        self.assertTrue(said["set"].startswith("Set int8-hqq (9.44 bits): the fewest bits that cost nothing that can be measured"))
        self.assertIn("int8-hqq", said["free"])
        for spec in ("int4-hqq (", "int4-hqq-kivi ("):
            self.assertIn(spec, said["costs"])
        for spec in ("int2-hqq (", "int2-hqq-kivi ("):
            self.assertIn(spec, said["breaks"])
        self.assertIn("random needle 0 % [0, 43], unquantized 100 % [57, 100]", said["breaks"])
        self.assertRegex(said["faster"], r"at 1k: int8-hqq \(\+17 % \[\+13, \+25\]\), int4-hqq")
        self.assertIn("speed of int4-hqq-kivi, int2-hqq-kivi: times overlap", said["cannot"])

    def test_what_engines_store(self):
        said = kept("smollm2-135m-referee")
        self.assertEqual(said["free"], "")  # float32's noise floor is below all of them
        for spec in ("llamacpp-q8_0 (", "hf-hqq-8 (", "exllamav3-8 ("):
            self.assertIn(spec, said["next to nothing"])
        self.assertIn("kivi-4 (5.69 bits, 0.00291 [0.00275, 0.00307])", said["little"])
        self.assertIn("to hf-quanto-2 (2.5 bits", said["breaks"])
        self.assertIn("llama.cpp llamacpp-q8_0-q4_0 (6.5 bits: `-ctk q8_0 -ctv q4_0`)", said["set"])
        self.assertIn("For fewer bits set kivi-4", said["set"])
        self.assertIn("nothing of TensorRT-LLM and SGLang", said["set"])

    def test_presets_on_a_gpu(self):
        said = kept("h200-presets")
        self.assertEqual(said["set"] + said["free"] + said["breaks"], "")  # random weights
        self.assertIn("random weights", said["cannot"])
        self.assertIn("23 of 27, q4_0 (+11 %", said["faster"])
        self.assertIn("llamacpp-iq4_nl (-4.3 % [-4.4, -3.6])", said["slower"])

    def test_shapes_on_a_gpu(self):
        said = kept("h200")
        self.assertIn("at batch 8 (gains at 32k): from 4k on int4-hqq (+79 % [+78, +81])", said["faster"])
        self.assertIn("196 sequences of 32k with int2-hqq (6.3 times), 110 with int4-hqq (3.5 times)", said["fits"])

    def test_questions(self):
        said = kept("smollm2-135m-questions-h200")
        self.assertRegex(said["free"], "int8-hqq: KLD 0.00063")
        self.assertRegex(said["breaks"], r"kivi-2: .*unquantized")
        self.assertIn("undecided in ruler_niah_keys_2", said["cannot"])
        said = kept("smollm2-135m-lm-eval")
        self.assertIn("int2-hqq: lm_eval_austen_cloze: 5 % right, unquantized 40 %", said["breaks"])
        self.assertIn("kivi-2", said["costs"])

    def test_it_is_read_in_a_minute(self):
        for name, schemes in (("smollm2-135m-referee", 52), ("h200-presets", 28), ("smollm2-135m-cpu", 6)):
            results = reading.load([os.path.join(BASELINES, name)])
            self.assertEqual(len({cell.spec for cell in results.cells}), schemes)
            text = sentences.markdown(results)
            self.assertLess(len(text.split()), 340, name)
            self.assertLessEqual(max(map(len, text.splitlines())), 100)

    def test_every_number_of_a_claim_has_its_interval_and_every_claim_its_cells(self):
        for name in ("smollm2-135m-cpu", "smollm2-135m-referee", "h200-presets", "h200", "smollm2-135m-questions-h200"):
            for said in sentences.verdicts(reading.load([os.path.join(BASELINES, name)])):
                for sentence in said.sentences:
                    self.assertTrue(sentence.cells, sentence.text)
                    for spec, what, value, low, high in sentence.numbers:
                        if what != "tokens that fit":
                            self.assertTrue(low <= value <= high, (sentence.text, spec, what))


# ---- where they stand

class Shown(unittest.TestCase):
    RUN = os.path.join(BASELINES, "smollm2-135m-cpu")

    def test_terminal_begins_with_them(self):
        done = subprocess.run([os.path.join(HERE, "table"), self.RUN], capture_output=True, text=True, check=True)
        results = reading.load([self.RUN])
        self.assertEqual(done.stdout, sentences.markdown(results) + tables.markdown(results))
        self.assertTrue(done.stdout.startswith("\nsmollm2-135m, fused, on AMD EPYC, BFloat16, context 1k:\n\n- Set int8-hqq"))

    def test_the_readme_says_what_the_kept_run_says(self):
        shown = re.search(r"<!-- sentences: ci/study -->\n(.*?)<!-- end of sentences -->", read(ROOT, "README.md"), re.S)[1]
        rows = [text for said in sentences.verdicts(reading.load([self.RUN])) for text, _ in sentences.as_items(said)]
        self.assertEqual(shown.strip().splitlines(), ["- " + text for text in rows])

    def test_the_page_begins_with_them_and_leads_to_their_cells(self):
        for name in ("smollm2-135m-cpu", "smollm2-135m-questions-h200", "smollm2-135m-lm-eval"):
            results = reading.load([os.path.join(BASELINES, name)])
            with tempfile.TemporaryDirectory() as out:
                page.write(results, [], [], [], [], [name], out)
                html = read(out, "index.html")
            titles = re.findall(r'<section aria-labelledby="([\w-]+)"', html)
            self.assertEqual(titles[:3], ["verdict", "results-heading", "warnings"])
            first = html.split('<section aria-labelledby="results-heading"')[0]
            links = set(re.findall(r'href="#(cell-\d+)"', first))
            self.assertTrue(links)
            self.assertLessEqual(links, set(re.findall(r'<details id="(cell-\d+)"', html)))
            for said in sentences.verdicts(results):
                for sentence in said.sentences:
                    for cell in sentence.cells:
                        self.assertRegex(first, rf'<a href="#cell-\d+">{re.escape(page.e(cell.spec))}</a>|>unquantized</a>')


if __name__ == "__main__":
    unittest.main()
