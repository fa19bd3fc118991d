"""What ci/compare found, for people (text, Markdown) and for machines (JSON, JUnit)."""

import json
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

import facts
import timing
import writing

ORDER = ["FAILED", "CHANGED", "LOST", "SLOWER", "UNSURE", "NOT COMPARED", "NOT COMPARABLE", "MISSING", "ACCEPTED", "MOVED", "FASTER", "NEW",
         "SAME"]


class Timed:
    """The verdict on one cell's time: of interleaved builds, or of repetitions in the files, which cannot fail."""

    def __init__(self, cell, first, second, binding):
        self.cell, self.first, self.second, self.binding = cell, first, second, binding
        self.verdict = timing.final_verdict(first, second)
        if first.verdict == "SLOWER" and self.verdict == "UNSURE":
            self.why = "slower in the first batch, not in the second"
        elif binding:
            self.why = "confirmed by a second batch" if self.verdict == "SLOWER" else ""
        else:
            self.why = "repetitions in the files, not interleaved: no verdict that counts; use --ab"

    @property
    def shown(self):
        """The estimate to look at: the second batch was not chosen for being slow."""
        return self.second or self.first

    @property
    def bad(self):
        return self.binding and self.verdict == "SLOWER"


@dataclass
class Single:
    """A time that both have once: of kvqbench's repetitions in one process, whose ranges say how sure it is."""
    cell: str
    counter: str      # median or min
    old_ms: float
    new_ms: float
    old_range: tuple  # least and most, or None where it was measured once
    new_range: tuple

    @property
    def gap(self):
        """By what share of the lower one the ranges are apart: 0 where they overlap, None where one is not known."""
        if not self.old_range or not self.new_range:
            return None
        lower, upper = sorted((self.old_range, self.new_range))
        return max(0.0, upper[0] / lower[1] - 1)

    @property
    def verdict(self):
        return "once" if self.gap is None else "apart" if self.gap else "agree"


class Outcome:
    def __init__(self, old, new, findings, timed, information, conditions, complete, notes=(), pairs=()):
        self.old, self.new, self.findings, self.timed = old, new, findings, timed
        self.pairs = list(pairs)  # of class items.Pair: what items say of NEW against OLD, as information
        self.information = information  # of class Single: times that nobody repeated
        self.conditions, self.notes = conditions, list(notes)
        self.bad_verdicts = facts.BAD + (facts.INCOMPLETE if complete else ())

    @property
    def regressions(self):
        return [f for f in self.findings if f.verdict in self.bad_verdicts] + [t for t in self.timed if t.bad]

    def count(self):
        """{verdict: how many}, facts and times together, worst first."""
        verdicts = [item.verdict for item in [*self.findings, *self.timed]]
        return {verdict: verdicts.count(verdict) for verdict in ORDER if verdict in verdicts}

    def headline(self):
        found = ", ".join(f"{count} {verdict.lower()}" for verdict, count in self.count().items())
        return f"{'REGRESSION' if self.regressions else 'OK'}: {found or 'nothing to compare'}"


def number(value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{len(value)} numbers"
    return f"{value:.17g}" if isinstance(value, float) else str(value)


def change(old, new):
    if not isinstance(old, (int, float)) or not isinstance(new, (int, float)) or not old:
        return ""
    return f"{100 * (new / old - 1):+.3g} %"


def percent(ratio):
    return f"{100 * (ratio - 1):+.1f} %"


def fact_rows(outcome):
    """Everything that is not the same, worst first; what is the same is only counted."""
    shown = [f for f in outcome.findings if f.verdict != "SAME"]
    return [(f.verdict, f"{f.cell} {f.fact}".strip(), number(f.old), number(f.new), change(f.old, f.new), f.why)
            for f in sorted(shown, key=lambda f: ORDER.index(f.verdict))]


def time_rows(outcome):
    return [(t.verdict, t.cell, percent(t.shown.ratio), f"[{percent(t.shown.low)}, {percent(t.shown.high)}]",
             f"{t.shown.p_adjusted:.2g}", str(t.first.blocks + (t.second.blocks if t.second else 0)), t.why)
            for t in sorted(outcome.timed, key=lambda t: ORDER.index(t.verdict))]


def information_rows(outcome):
    def ends(pair):
        return f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "-"
    return [(s.cell, s.counter, f"{s.old_ms:.4g}", ends(s.old_range), f"{s.new_ms:.4g}", ends(s.new_range),
             change(s.old_ms, s.new_ms), s.verdict) for s in outcome.information]


def agreement(outcome):
    """How many single times agree, by measurement and of all: dicts."""
    found = {}
    for single in outcome.information:
        found.setdefault(single.cell.split("/")[0], []).append(single)
    if len(found) > 1:
        found["all"] = outcome.information
    rows = []
    for name, of in found.items():
        verdicts = [s.verdict for s in of]
        differences = [abs(s.new_ms / s.old_ms - 1) for s in of]
        rows.append({"measurement": name, "cells": len(of), **{v: verdicts.count(v) for v in ("agree", "apart", "once")},
                     "median_difference": timing.median(differences), "largest_difference": max(differences),
                     "largest_gap": max((s.gap for s in of if s.gap is not None), default=None)})
    return rows


def agreement_rows(outcome):
    return [(row["measurement"], str(row["cells"]), str(row["agree"]), str(row["apart"]), str(row["once"]),
             *("-" if row[name] is None else f"{100 * row[name]:.2f} %"
               for name in ("median_difference", "largest_difference", "largest_gap"))) for row in agreement(outcome)]


def item_rows(outcome):
    return [tuple(row.texts()) for row in outcome.pairs]


TABLES = [("facts", fact_rows, ("verdict", "what", "old", "new", "change", "rule")),
          ("times", time_rows, ("verdict", "cell", "time of NEW", "95 % interval", "p", "blocks", "remark")),
          ("times, as information", information_rows, ("cell", "counter", "old ms", "old range", "new ms", "new range",
                                                       "change", "ranges")),
          ("do times agree (their ranges overlap)", agreement_rows, (
              "measurement", "cells", "agree", "apart", "once", "median difference", "largest", "largest gap")),
          ("items, NEW against OLD on the same prompts, as information", item_rows, (
              "items of", "number", "n", "encoded %", "OLD", "NEW", "difference [95 %]", "lost/won", "p", "p (Holm)", "detectable",
              "verdict"))]


def text(outcome):
    lines = [f"OLD {outcome.old}", f"NEW {outcome.new}"] + [f"differs: {line}" for line in outcome.conditions]
    for title, rows_of, heads in TABLES:
        rows = [heads, *rows_of(outcome)]
        if len(rows) == 1:
            continue
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        lines += ["", title + ":"] + ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                                      for row in rows]
    return "\n".join(lines + [""] + outcome.notes + [outcome.headline()]) + "\n"


def markdown(outcome):
    lines = [f"### kvqbench: {outcome.headline()}", "", f"OLD `{outcome.old}`, NEW `{outcome.new}`"]
    lines += [""] * bool(outcome.conditions) + [f"- differs: {line}" for line in outcome.conditions]
    for title, rows_of, heads in TABLES:
        rows = rows_of(outcome)
        if rows:
            lines += ["", f"<details{' open' * (rows_of != information_rows)}><summary>{title}</summary>", "",
                      "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            lines += ["", "</details>"]
    return "\n".join(lines + [""] * bool(outcome.notes) + outcome.notes) + "\n"


def as_json(outcome):
    return {
        "headline": outcome.headline(), "regression": bool(outcome.regressions), "old": outcome.old, "new": outcome.new,
        "count": outcome.count(), "conditions": outcome.conditions, "notes": outcome.notes,
        "facts": [vars(f) for f in outcome.findings],
        "times": [{"cell": t.cell, "verdict": t.verdict, "binding": t.binding, "why": t.why, "first": vars(t.first),
                   "second": vars(t.second) if t.second else None} for t in outcome.timed],
        "information": [vars(s) | {"ranges": s.verdict} for s in outcome.information],
        "agreement": agreement(outcome), "items": [row.as_json() for row in outcome.pairs]}


def junit(outcome):
    """A test case a cell and kind of verdict, in the schema that CI servers read (JUnit's Ant task)."""
    cases = {}
    for f in outcome.findings:
        cases.setdefault(("facts", f.cell), []).append(
            (f.verdict, f.verdict in outcome.bad_verdicts,
             f"{f.fact}: {f.verdict.lower()}: {number(f.old)} -> {number(f.new)} {f.why}".strip()))
    for t in outcome.timed:
        cases.setdefault(("times", t.cell), []).append(
            (t.verdict, t.bad, f"{t.verdict.lower()}: {percent(t.shown.ratio)} [{percent(t.shown.low)}, "
                               f"{percent(t.shown.high)}] {t.why}".strip()))
    body, failures, skipped = [], 0, 0
    for (kind, cell), entries in cases.items():
        body.append(f'  <testcase classname="kvqbench.{kind}" name={quoteattr(cell)}>')
        bad = [said for _, is_bad, said in entries if is_bad]
        if bad:
            failures += 1
            body.append(f"    <failure message={quoteattr(bad[0])}>{escape(chr(10).join(bad))}</failure>")
        elif all(verdict in ("MISSING", "NOT COMPARED", "NOT COMPARABLE", "UNSURE") for verdict, _, _ in entries):
            skipped += 1
            body.append(f"    <skipped message={quoteattr(entries[0][2])}/>")
        body.append("  </testcase>")
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>',
                      f'<testsuite name="ci/compare" tests="{len(cases)}" failures="{failures}" errors="0" '
                      f'skipped="{skipped}">', *body, "</testsuite>"]) + "\n"


def write_json(path, outcome):
    writing.write(path, json.dumps(as_json(outcome), indent=1, allow_nan=False) + "\n")
