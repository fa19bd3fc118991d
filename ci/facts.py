"""Facts of two sets of results that must not differ: what a cell takes, how wrong it is, which kernel ran.

Each fact has one of three rules, by its name (RULES):
exact       bytes, bits per element, numbers of tokens, digests, the kernel's name: equal, on every machine; bytes of the
            cache where its dense tokens have as many bits (STORED), of all that is read where the weights have, too (READ).
arithmetic  errors and moments of keys and values (nmse, ...), computed from what the model and the codec gave: equal to
            the last bit (results have 17 digits) where the same arithmetic is promised, that is where device, CPU or
            GPU, instruction set, threads, libtorch and CUDA are those of OLD. So one code that differs by one is
            seen: it changes the float64 sum of squared errors of its layer. Elsewhere nmse is held to one unit of its
            second digit, as tables print it (1 to 10 %), because the model's own keys and values differ in their last
            bits there: AVX2 instead of AVX-512 moves SmolLM2's, over all layers, by 0.08 % at most. Single extremes
            and moments near zero are held to nothing there.
interval    what has `_lo` and `_hi`, ppl, KLD, top-1, needle: NEW within OLD's interval, whatever the machine. Where
            the same arithmetic is promised and the number differs, but stays inside, it is listed as MOVED.
Everything else (times, rates, memory of a process) is no fact. Both ways count: a number that became better without
being expected to is a defect, or wants a new baseline. Keys, values and answers follow from model, text, seed, type and
protocol (SAME_INPUT): where these differ, only exact facts are compared, and the rest is listed as not compared. What
a rule depends on stands beside it; `dtype` is what the model computes in, kv_dtype what its dense tokens are stored in.
A fact that is null in both is no agreement: it is listed as not comparable.
"""

import math
import re
from dataclasses import dataclass

from results import kv_dtype

SAME_INPUT = ("model", "tokenizer", "corpus_sha256", "protocol", "seed", "dtype", "kv_dtype")
STORED = ("kv_bits",)  # of a dense element
READ = ("bits", "kv_bits")
RULES = [  # the first that fits
    (r"[._](crc32|digest|encoded_tokens)(_|$)", "exact", ()),
    (r"^kv_size\.|[._]kv_bytes(_|$)", "exact", STORED), (r"[._]bytes_per_token(_|$)", "exact", READ),
    (r"^kernel[^.]*\.(bytes|flops|gflop)$", "exact", READ), (r"\.(windows|scored_tokens|needle_trials|ruler_samples|gflop)$", "exact", ()),
    (r"^ruler_.*\.prompt_tokens", "exact", SAME_INPUT),
    (r"^(error|distribution|sensitivity)\.|[._](nmse|max_error)(_|$)", "arithmetic", SAME_INPUT)]
SAME_ARITHMETIC = ("device", "cpu", "gpu", "cpu_capability", "threads", "libtorch", "cuda_driver", "cuda_runtime")
BAD = ("CHANGED", "LOST", "FAILED")  # these end in exit code 1
NOT_COMPARED = ("NOT COMPARED", "NOT COMPARABLE")
INCOMPLETE = ("MISSING", *NOT_COMPARED)


@dataclass
class Finding:
    verdict: str   # SAME, MOVED, CHANGED, LOST, FAILED, ACCEPTED, MISSING, NEW, NOT COMPARED, NOT COMPARABLE
    cell: str      # <measurement>/<model>/<backend>/<spec>/ctx:N/batch:B
    fact: str      # the counter; empty: all of the cell
    old: object = None
    new: object = None
    why: str = ""


@dataclass
class Side:
    """What one cell says of one measurement."""
    values: dict
    label: str
    skipped: str
    conditions: dict


def sides(results):
    """{(run, device, cell's name): Side}. The run and the device are left out where there is one only."""
    current = results.current()
    one_run = len({cell.run for cell in current}) == 1
    one_device = len({cell.device for cell in current}) == 1
    found = {}
    for cell in current:
        measurements = {name.split(".", 1)[0] for name in [*cell.values, *cell.nulls, *cell.texts, *cell.skipped]}
        facts = cell.files[-1].facts
        conditions = {name: facts.get(name) for name in SAME_INPUT + SAME_ARITHMETIC}
        conditions["kv_dtype"] = kv_dtype(facts, cell.model)
        conditions["bits"], conditions["kv_bits"] = (
            32 if conditions[name] == "Float" else 16 for name in ("dtype", "kv_dtype"))
        conditions["model"] = next((value for name, value in facts.items()  # by its name, or by its folder
                                    if re.fullmatch(f"model (.*/)?{re.escape(cell.model)}/?", name)), None)
        conditions["tokenizer"] = facts.get(f"model_tokenizer {cell.model}")
        known = dict.fromkeys(cell.nulls) | cell.values
        for measurement in sorted(measurements):
            name = f"{measurement}/{cell.place}"
            values = {key: value for key, value in known.items() if key.startswith(measurement + ".")}
            # What ran, without the notes and the type, which is a condition of its own.
            label = re.sub("^(cpu|cuda) (Float|Half|BFloat16),", r"\1,",
                           cell.texts.get(measurement + ".label", "").split("; ")[0])
            found["" if one_run else cell.run, "" if one_device else cell.device, name] = Side(
                values, label, cell.skipped.get(measurement, ""), conditions)
    return found


def rule_of(name, values):
    """(the rule, what must be the same); no rule where it is no fact."""
    plain = name.split("/", 1)[0]
    for pattern, rule, same in RULES:
        if re.search(pattern, plain):
            return rule, same
    return ("interval" if plain == name and name + "_lo" in values and name + "_hi" in values else None), SAME_INPUT


def two_digits(old, new):
    """Whether two numbers differ by at most one unit of the second digit of the first."""
    if old == 0 or new == 0:
        return old == new
    return abs(new - old) <= 10.0 ** (math.floor(math.log10(abs(old))) - 1)


def differing(old, new, names):
    # Files from before tokenizers had a digest say nothing of theirs.
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)
            and not (name == "tokenizer" and None in (old.get(name), new.get(name)))]


def is_null(value):
    return value is None or isinstance(value, list) and None in value


def compare_fact(cell, name, old, new, same_arithmetic):
    """The Finding of one fact that both have, or None where it is no fact."""
    rule, before, after = rule_of(name, old.values)[0], old.values[name], new.values.get(name)
    fact = name.split(".", 1)[1]
    if rule is None:
        return None
    if is_null(before):
        if is_null(after):
            return Finding("NOT COMPARABLE", cell, fact, why="null in both")
        return Finding("NEW", cell, fact, None, after, "null in OLD")
    if before == after:
        return Finding("SAME", cell, fact, before, after)
    if rule == "exact":
        return Finding("CHANGED", cell, fact, before, after, "exact")
    if rule == "interval":
        low, high = old.values[name + "_lo"], old.values[name + "_hi"]
        if None in (low, high):
            return Finding("NOT COMPARABLE", cell, fact, before, after, "its interval is null in OLD")
        interval = f"[{low:.6g}, {high:.6g}]"
        if not low <= after <= high:
            return Finding("CHANGED", cell, fact, before, after, "beyond " + interval)
        return Finding("MOVED" if same_arithmetic else "SAME", cell, fact, before, after, "within " + interval)
    if same_arithmetic:
        return Finding("CHANGED", cell, fact, before, after, "exact: same machine, same libraries")
    if "nmse" not in fact:
        return None
    if two_digits(before, after):
        return Finding("SAME", cell, fact, before, after, "to two digits")
    return Finding("CHANGED", cell, fact, before, after, "beyond two digits")


def compare_cell(cell, old, new):
    if old.skipped or new.skipped:
        if not old.skipped:
            return [Finding("FAILED", cell, "", "measured", new.skipped, "OLD has numbers")]
        if not new.skipped:
            return [Finding("NEW", cell, "", old.skipped, "measured")]
        return [Finding("SAME", cell, "", old.skipped, new.skipped, "measured in neither")]
    findings, left_out = [], {}
    same_arithmetic = not differing(old.conditions, new.conditions, SAME_ARITHMETIC)
    if old.label != new.label:
        findings.append(Finding("CHANGED", cell, "kernel", old.label, new.label, "the kernel that ran"))
    elif old.label:
        findings.append(Finding("SAME", cell, "kernel", old.label, new.label))
    for name in old.values:
        rule, same = rule_of(name, old.values)
        if rule is None:
            continue
        if why := differing(old.conditions, new.conditions, same):
            left_out.update(dict.fromkeys(why))
        elif is_null(new.values.get(name)) and not is_null(old.values[name]):
            findings.append(Finding("LOST", cell, name.split(".", 1)[1], old.values[name], None,
                                    "not a number any more, or not measured"))
        else:
            findings.append(compare_fact(cell, name, old, new, same_arithmetic))
    findings = [finding for finding in findings if finding]
    if left_out:
        findings.append(Finding("NOT COMPARED", cell, "", why="; ".join(left_out)))
    return findings


def compare(old_results, new_results):
    """Findings, cell by cell."""
    old, new, findings = sides(old_results), sides(new_results), []
    for key in sorted(old.keys() | new.keys()):
        cell = " ".join(part for part in key if part)
        if key not in new:
            findings.append(Finding("MISSING", cell, "", why="only OLD has it"))
        elif key not in old:
            findings.append(Finding("NEW", cell, "", why="only NEW has it"))
        else:
            findings += compare_cell(cell, old[key], new[key])
    return findings


def accept(findings, pattern):
    """Turns what is bad, and was announced, into ACCEPTED. The pattern is searched for in "CELL FACT"."""
    for finding in findings:
        if finding.verdict in BAD and re.search(pattern, f"{finding.cell} {finding.fact}".strip()):
            finding.verdict = "ACCEPTED"
