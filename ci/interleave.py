"""Runs two kvqbench executables in turn, and reads their times. What is made of them: ci/timing.py."""

import json
import math
import os
import random
import re
import subprocess

import reading
import timing

TIME = re.compile(r"(^|_)(ms|us|ns)(_|$)")
UNIT_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
REGEX_SIGNS = re.compile(r"([\\^$.|?*+()\[\]{}])")
OWN_FLAGS = ("--benchmark_filter", "--benchmark_out", "--benchmark_out_format", "--benchmark_format",
             "--benchmark_list_tests", "--to-v2")


class BadRun(Exception):
    """A process that gave no results, and why."""


def time_counter(run):
    """The counter that is this benchmark's time: the first one in ms, us or ns with a spread, or None."""
    return next((name for name in run if TIME.search(name) and name + "_min" in run and name + "_max" in run), None)


def time_of(run, statistic="median"):
    """The one time in ms that a process has for a benchmark, or None where it is not about time.

    median, min: over kvqbench's --runs. A benchmark without a spread has the mean of its iterations; one that ran once
    only (perplexity, ...) measures something else.
    """
    if run.get("error_occurred") or run.get("skipped"):
        return None
    name = time_counter(run)
    if name:
        value = run[name + "_min"] if statistic == "min" else run[name]
        value *= UNIT_MS[TIME.search(name)[2]]
    elif run.get("iterations", 1) > 1 and "real_time" in run:
        value = run["real_time"] * UNIT_MS.get(run.get("time_unit", "ns"), math.nan)
    else:
        return None
    return value if math.isfinite(value) and value > 0 else None


def times_of(data, statistic="median"):
    """{name: [ms, ...]} of a benchmarks.json: one each, or those of all repetitions."""
    times = {}
    for run in data["benchmarks"]:
        value = None if run.get("aggregate_name") else time_of(run, statistic)
        if value is not None:
            times.setdefault(run["name"], []).append(value)
    return times


def ranges_of(data):
    """{name: (least, most) in ms} of the repetitions of a benchmarks.json's times; nothing of those measured once."""
    ranges = {}
    for run in data["benchmarks"]:
        median = None if run.get("aggregate_name") else time_of(run)
        name = time_counter(run) if median else None
        if name and run[name + "_min"] < run[name + "_max"]:
            unit = UNIT_MS[TIME.search(name)[2]]
            low, high = ranges.get(run["name"], (math.inf, 0))
            ranges[run["name"]] = min(low, unit * run[name + "_min"]), max(high, unit * run[name + "_max"])
    return ranges


def split_flags(flags):
    """kvqbench's flags without the filter, and the filter; those that this file sets itself are refused."""
    kept, chosen = [], ".*"
    for flag in flags:
        name, _, value = flag.partition("=")
        if name == "--benchmark_filter":
            chosen = value
        elif name in OWN_FLAGS or name == "--benchmark_repetitions":
            raise BadRun(f"{name}: ci/compare sets it itself; leave it out")
        else:
            kept.append(flag)
    return kept, chosen


def filter_of(names):
    """The --benchmark_filter that matches exactly these."""
    return "^(" + "|".join(REGEX_SIGNS.sub(r"\\\1", name) for name in sorted(names)) + ")$"


class Builds:
    """OLD and NEW, run with the same flags and environment. `log`: where what each process said goes."""

    def __init__(self, old, new, flags, folder, statistic="median", seed=42, progress=None):
        for path in (old, new):
            if not os.path.isfile(path) or not os.access(path, os.X_OK):
                raise BadRun(f"{path}: no executable; wants the path of a kvqbench")
        self.paths, self.folder, self.statistic = (old, new), folder, statistic
        self.flags, self.filter = split_flags(flags)
        self.coin, self.processes, self.progress = random.Random(seed), 0, progress

    def run(self, which, chosen):
        """The results of one process of OLD (0) or NEW (1)."""
        path, out = self.paths[which], os.path.join(self.folder, f"{('old', 'new')[which]}.json")
        if os.path.exists(out):
            os.remove(out)
        done = subprocess.run([path, *self.flags, "--benchmark_filter=" + chosen, "--benchmark_out=" + out],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              text=True, errors="replace")
        self.processes += 1
        if not os.path.exists(out):
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise BadRun(f"{path}: exit code {done.returncode}, no results: {said[-1]}")
        try:
            data = reading.read_json(out)
            if reading.kind_of(data) != "benchmarks":
                raise reading.Refused("not what kvqbench writes")
            reading.validate("benchmarks", data)
        except reading.Refused as reason:
            raise BadRun(f"{path}: its results: {reason}") from None
        return data

    def first(self):
        """One process each of everything the flags ask for; for the facts, and as a warm-up: its times do not count.
        Returns the paths of both files."""
        kept = []
        for which, name in enumerate(("old", "new")):
            data = self.run(which, self.filter)
            kept.append(os.path.join(self.folder, "first", name, "benchmarks.json"))
            os.makedirs(os.path.dirname(kept[-1]), exist_ok=True)
            with open(kept[-1], "w", encoding="utf-8") as file:
                json.dump(data, file)
        return kept

    def measure(self, names, blocks):
        """{name: log-ratios} of so many new blocks; for timing.settle."""
        chosen, ratios = filter_of(names), {name: [] for name in names}
        for done in range(blocks):
            if self.progress:
                self.progress(f"{len(names)} cells, block {done + 1} of {blocks}")
            order = (0, 1, 1, 0) if self.coin.random() < 0.5 else (1, 0, 0, 1)
            times = {name: ([], []) for name in names}
            for which in order:
                found = times_of(self.run(which, chosen), self.statistic)
                for name in names:
                    if name not in found:
                        raise BadRun(f"{self.paths[which]}: {name} had a time in its first process, and has none now")
                    times[name][which].append(found[name][0])
            for name in names:
                ratios[name].append(timing.log_ratio(*times[name]))
        return ratios


