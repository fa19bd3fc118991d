#!/usr/bin/python3
"""Proves what ci/compare promises, with real processes of kvqbench on this machine, in half an hour.

usage: ci/prove_gate.py [--pool=FILE] [--rounds=N] [--draws=N] [--separate=N]

Three executables are linked into a temporary folder, equal to build/release/kvqbench but for the object of
kernels/schemes/hqq.cc: as it is; with a tenth of the encoding done twice; and with one code of one token changed, which one the
environment says. None of it stays.

codes     20 comparisons, each with another code changed, by separate processes: how many ci/compare fails.
times     Separate A/A comparisons would take hours. So one pool is recorded: rounds of six processes, two as they are
          and two slower interleaved (ABBA or BAAB by a coin) and two more as they are, and a comparison is drawn from
          consecutive rounds, the first batch from a place that moves along the pool, the second from where the first
          ended (around the end). A/A: the four equal processes of a round are called OLD and NEW by a fresh coin, as
          ci/compare's coin does. So comparisons overlap in what they were drawn from, but the noise is what was there,
          in its order; everything from the processes' times to the verdict is ci/compare's own code.
--pool    where the recorded times are kept (or taken from, if the file is there)
--rounds  how many rounds to record (100)
--draws   how many comparisons to draw of each kind (200)
--separate  beside that, so many times ci/compare --ab itself with the slower build, and as often with equal ones, by
          separate processes, a minute or two each (0)

Seen on 25 November 2026 on two virtual cores, load 0.6 to 2: codes 20 of 20; planted +8.9 and +10.3 % by medians, +9.4
and +9.7 % by least times; A/A 0 alarms of 200 both ways; caught 200 of 200 both ways. Decoding, 3 us a run, was left as
it is: never called SLOWER in these 800 comparisons, and mostly SAME.

Exit code: 0 all promises kept, 1 one is not, 2 it could not be tried.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

import comparison
import interleave
import reading
import timing
from commands import Command
from testing import HERE, ROOT, write_model

fail = Command("prove_gate").fail
# Where other work shares the cores, a run of the cell must be shorter than what the scheduler gives a process at a time.
FLAGS = ["--schemes=int2-hqq@residual=16,int4-hqq@residual=16", "--contexts=32", "--dtype=float32", "--runs=601"]
TIMED = "^(quantize/.*|dequantize/.*int4-.*)"  # encoding is slowed, decoding is not
# Text of kernels/schemes/hqq.cc, and what stands there instead. SHARE: of the solver's iterations done twice, so that encoding
# takes 10 % longer; it does more than these.
STEP = "    const float error =\n        static_cast<float>(ErrorSum(errors) / static_cast<double>(groups * n));\n"
SHARE = 0.11
SLOWER = """    static thread_local double owed = 0;
    if ((owed += SHARE) >= 1) {
      owed -= 1;
      ForEach(parallel, groups, [&](int64_t g) {
        float zero = zeros[g];
        [[maybe_unused]] volatile float sink =
            StepGroup<n>(&values[g * n], m, scales[g], first_zeros[g], means[g], &zero);
      });
    }
""".replace("SHARE", str(SHARE)) + STEP
PACK = "  ForEach(parallel, rows, [&](int64_t row) {\n    uint8_t* packed = CodeRow<kBits>(out"
ONE_CODE = """  static int blocks = 0;
  if (blocks++ == std::atoi(std::getenv("KVQ_PLANT_BLOCK"))) codes[std::atoi(std::getenv("KVQ_PLANT_CODE"))] ^= 1;
""" + PACK
PLANTS = {"as_is": [], "slower": [(STEP, SLOWER)],
          "one_code": [(PACK, ONE_CODE), ("#include <cmath>\n", "#include <cmath>\n#include <cstdlib>\n")]}


def commands_of(build):
    """How a .cc file of kernels/ is compiled and kvqbench linked, as the build says."""
    listed = subprocess.run(["ninja", "-C", build, "-t", "commands", "kvqbench"], capture_output=True, text=True)
    commands = [line for line in listed.stdout.splitlines() if not line.startswith("ninja:")]
    compiling = next((line for line in commands if line.endswith("kernels/scheme.cc")), "")
    if listed.returncode or not compiling or "kernels/schemes/hqq.cc.o" not in commands[-1]:
        fail(f"{build}: does not say how kvqbench is built; run ci/build first")
    return compiling, commands[-1]


def planted(changes):
    """kernels/schemes/hqq.cc, changed."""
    with open(os.path.join(ROOT, "kernels", "schemes", "hqq.cc"), encoding="utf-8") as file:
        source = file.read()
    for text, instead in changes:
        if source.count(text) != 1:
            fail(f"kernels/schemes/hqq.cc: what is to be changed is there {source.count(text)} times, not once: {text.strip()}")
        source = source.replace(text, instead)
    return source


def link(folder, name, changes):
    """kvqbench with a changed kernels/schemes/hqq.cc; the other objects are those of build/release."""
    build = os.path.join(ROOT, "build", "release")
    compiling, linking = commands_of(build)
    path, made = os.path.join(folder, name + ".cc"), os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(planted(changes))
    compiling = re.sub(r" -M[TF] \S+", "", compiling.replace(" -MD", ""))  # no dependencies into the build
    compiling = re.sub(r" -o \S+ -c \S+$", f" -o {path}.o -c {path}", compiling)
    linking = re.sub(r"\S*kernels/schemes/hqq\.cc\.o", path + ".o", linking).replace(" -o kvqbench ", f" -o {made} ")
    for command in (compiling, linking):
        done = subprocess.run(command, shell=True, cwd=build, capture_output=True, text=True)
        if done.returncode:
            fail(f"{name}: {' '.join(done.stderr.split())[:400]}")
    return made


def show(text):
    print(text, flush=True)


# ---- one code

def prove_codes(builds, flags, folder):
    """Of 20 comparisons, each with one code of one token changed by one, how many ci/compare fails."""
    chance, caught = random.Random(20), 0
    def measured(build, name, environment):
        out = os.path.join(folder, name + ".json")
        if os.path.exists(out):  # or it would be resumed
            os.remove(out)
        subprocess.run([build, *flags, "--contexts=512", "--schemes=int4-hqq", "--benchmark_filter=^(error|kv_size)/",
                        "--benchmark_out=" + out], env={**os.environ, **environment}, check=True, capture_output=True)
        return out
    def compared(other):
        return subprocess.run([os.path.join(HERE, "compare"), old, other], capture_output=True, text=True)
    old = measured(builds["as_is"], "codes_old", {})
    # With no block of that number, the changed executable changes nothing.
    same = compared(measured(builds["one_code"], "codes_same", {"KVQ_PLANT_BLOCK": "-1", "KVQ_PLANT_CODE": "0"}))
    if same.returncode != 0:
        fail(f"the executable without a changed code differs: {same.stdout}")
    for _ in range(20):
        # 2 layers of keys and values, 3 blocks of 128 tokens each, of 64 codes a token
        where = {"KVQ_PLANT_BLOCK": str(chance.randrange(12)), "KVQ_PLANT_CODE": str(chance.randrange(128 * 64))}
        done = compared(measured(builds["one_code"], "codes_new", where))
        changed = re.findall(r"CHANGED\s+error/\S+ (\S+)", done.stdout)
        caught += done.returncode == 1 and any(name.startswith("nmse") for name in changed)
        show(f"  block {where['KVQ_PLANT_BLOCK']}, code {where['KVQ_PLANT_CODE']}: exit code {done.returncode}, "
             f"changed {', '.join(changed)}")
    return caught


# ---- times

def record(builds, flags, folder, rounds):
    """[{"order": "ABBAAA", "seconds": [...], "runs": [{cell: {median, min}}]}], A as it is, B slower."""
    chance, pool, start = random.Random(10), [], time.time()
    paths = {"A": builds["as_is"], "B": builds["slower"]}
    out = os.path.join(folder, "round.json")
    for i in range(rounds):
        order = ("ABBA" if chance.random() < 0.5 else "BAAB") + "AA"
        seconds, runs = [], []
        for which in order:
            seconds.append(round(time.time() - start, 1))
            if os.path.exists(out):  # or it would be resumed
                os.remove(out)
            subprocess.run([paths[which], *flags, *FLAGS, "--benchmark_filter=" + TIMED, "--benchmark_out=" + out],
                           check=True, capture_output=True)
            data = reading.read_json(out)
            runs.append({run["name"]: {kind: interleave.time_of(run, kind) for kind in ("median", "min")}
                         for run in data["benchmarks"]})
        pool.append({"order": order, "seconds": seconds, "load": os.getloadavg()[0], "runs": runs})
        if i % 10 == 9:
            show(f"  {i + 1} of {rounds} rounds, {time.time() - start:.0f} s, load {os.getloadavg()[0]:.1f}")
    return pool


def blocks_of(pool, cell, statistic, chance=None):
    """Log-ratios of the rounds: of B against A as they were run, or of A against A by a coin."""
    found = []
    for entry in pool:
        times = [(which, run[cell][statistic]) for which, run in zip(entry["order"], entry["runs"])]
        if chance is None:
            old, new = ([ms for which, ms in times[:4] if which == side] for side in "AB")
        else:
            equal = [ms for which, ms in times if which == "A"]
            old, new = [equal[0], equal[3]], [equal[1], equal[2]]
            if chance.random() < 0.5:
                old, new = new, old
        found.append(timing.log_ratio(old, new))
    return found


def draw(pool, cells, statistic, draws, same):
    """The verdicts of so many comparisons, {cell: verdict} each."""
    found = []
    for i in range(draws):
        chance = random.Random(i) if same else None
        ratios = {cell: blocks_of(pool, cell, statistic, chance) for cell in cells}
        place = {"next": i * len(pool) // draws}
        def measure(wanted, blocks):
            at = [(place["next"] + k) % len(pool) for k in range(blocks)]
            place["next"] += blocks
            return {cell: [ratios[cell][k] for k in at] for cell in wanted}
        found.append({cell: timing.final_verdict(*pair)
                      for cell, pair in timing.gate(cells, measure, seed=i).items()})
    return found


def prove_separately(builds, flags, count):
    """Runs ci/compare --ab so often on the slower build, and on equal ones; whether it kept its promises."""
    found = {"as_is": [], "slower": []}
    for _ in range(count):
        for new, codes in found.items():
            done = subprocess.run([os.path.join(HERE, "compare"), "--ab", builds["as_is"], builds[new], "--seed",
                                   str(len(codes)), "--", *flags, *FLAGS, "--benchmark_filter=^quantize/.*int4-"],
                                  capture_output=True, text=True)
            row = next((line for line in done.stdout.splitlines() if "quantize/" in line), done.stderr[-200:])
            show(f"  {new}, {done.stdout.splitlines()[-2] if done.returncode < 2 else 'failed'}, load "
                 f"{os.getloadavg()[0]:.1f}: exit code {done.returncode}: {' '.join(row.split())}")
            codes.append(done.returncode)
    show(f"  separate runs: A/A {found['as_is'].count(1)} alarms in {count}, 10 % planted caught "
         f"{found['slower'].count(1)} of {count}")
    return found["as_is"].count(0) == count and found["slower"].count(1) >= 0.95 * count


def tally(found, cells):
    return "; ".join(f"{cell.split('/')[0]} {cell.split('/')[3]}: " + ", ".join(
        f"{sum(verdict[cell] == name for verdict in found)} {name}" for name in ("SLOWER", "FASTER", "SAME", "UNSURE"))
        for cell in cells)


def prove_times(pool, draws):
    """Whether the promises hold, for the median of a process, and for its least time."""
    cells, kept = sorted(pool[0]["runs"][0]), True
    slowed = [cell for cell in cells if cell.startswith("quantize/")]
    show(f"  {sum(len(entry['order']) for entry in pool)} processes in {pool[-1]['seconds'][-1] / 60:.0f} minutes, load "
         f"{min(entry['load'] for entry in pool):.1f} to {max(entry['load'] for entry in pool):.1f}")
    for statistic in ("median", "min"):
        show(f"times, {statistic} of the runs of a process:")
        for cell in cells:
            ratios = blocks_of(pool, cell, statistic)
            low, high = timing.bootstrap(ratios)
            spread = timing.median(abs(value - timing.median(ratios)) for value in ratios)
            estimate, low, high = (comparison.percent(math.exp(x)) for x in (timing.hodges_lehmann(ratios), low, high))
            show(f"  {cell}: planted {estimate} [{low}, {high}] over all rounds; a round is off by "
                 f"{100 * spread:.1f} % (median)")
        equal = draw(pool, cells, statistic, draws, same=True)
        alarms = sum("SLOWER" in verdict.values() for verdict in equal)
        show(f"  A/A: {alarms} alarms in {draws} ({tally(equal, cells)})")
        planted = draw(pool, cells, statistic, draws, same=False)
        caught = sum(any(verdict[cell] == "SLOWER" for cell in slowed) for verdict in planted)
        show(f"  10 % planted: caught {caught} of {draws} ({tally(planted, cells)})")
        kept = kept and alarms <= draws / 100 and caught >= draws * 19 / 20
    return kept


def main(arguments):
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__.strip())
        return 0
    given = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = set(given) - {"--pool", "--rounds", "--draws", "--separate"}
    if unknown:
        fail(f"unknown argument '{unknown.pop()}'; see ci/prove_gate.py --help")
    kept_pool = given.get("--pool")
    rounds, draws, separate = given.get("--rounds", "100"), given.get("--draws", "200"), given.get("--separate", "0")
    # Both batches of a comparison of three cells, looked at three times, must fit without using a round twice.
    least = 2 * 2 ** (timing.LOOKS - 1) * timing.blocks_wanted(3)
    if not rounds.isdigit() or int(rounds) < least or not draws.isdigit() or int(draws) < 1:
        fail(f"--rounds: a whole number from {least}; --draws: one from 1")
    if not separate.isdigit():
        fail(f"--separate: a whole number, not '{separate}'")
    rounds, draws, separate = int(rounds), int(draws), int(separate)
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    folder = tempfile.mkdtemp(prefix="kvq_prove_gate_")
    try:
        pool, caught, kept = None, 20, True
        if kept_pool and os.path.exists(kept_pool):
            pool = reading.read_json(kept_pool)
            show("codes: not tried, the pool is from before")
        if separate or not pool:
            write_model(os.path.join(folder, "tiny"))
            with open(os.path.join(folder, "text.txt"), "w", encoding="utf-8") as file:
                file.write("The capital of France is Paris. " * 800)
            flags = ["--models=" + os.path.join(folder, "tiny"), "--corpus-file=" + os.path.join(folder, "text.txt")]
            show("links three executables")
            builds = {name: link(folder, name, changes) for name, changes in PLANTS.items()}
        if not pool:
            show("codes:")
            caught = prove_codes(builds, flags, folder)
            show(f"  one code planted: caught {caught} of 20")
            show("records the pool:")
            pool = record(builds, flags, folder, rounds)
            if kept_pool:
                with open(kept_pool, "w", encoding="utf-8") as file:
                    json.dump(pool, file)
        if separate:
            show("times, separate runs of ci/compare --ab:")
            kept = prove_separately(builds, flags, separate)
        kept = prove_times(pool, draws) and caught >= 19 and kept
        show("all promises kept" if kept else "A PROMISE IS NOT KEPT")
        return 0 if kept else 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
