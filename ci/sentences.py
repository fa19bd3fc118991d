"""What results say, in sentences: what to set, what costs nothing, what costs how much, what breaks the model, from which
context on it is faster, how much more fits the device, and what cannot be said and why. The rules stand in verdict.py."""

import functools
import itertools
import math
import os
import re
import textwrap
from dataclasses import dataclass, field

import tables
from results import HERE, types_of
from tables import context_label, model_name
from verdict import (BREAKS, COSTS, FASTER, FREE, LEVEL, LITTLE, NEARLY, NEXT_TO_NOTHING, SLOWER, SMALL, Number, bytes_per_token,
                     compare_all, decode_key, judge, nats, percent, room)

NAMED = 5  # schemes in a sentence
# What a name stands for is said up to so many characters: a plan's is a spec for each layer.
LONGEST_MEANING = 80
GRADES = ["costs nothing that can be measured",
          f"costs next to nothing, less than {NEXT_TO_NOTHING:g} nats above rounding",
          f"costs little, less than {LITTLE:g} nats above rounding", "costs measurably", "breaks it"]
KINDS = ["set", "free", "next to nothing", "little", "costs", "breaks", "faster", "slower", "level", "prefill", "fits", "cannot"]


@dataclass
class Sentence:
    kind: str      # of KINDS
    parts: list    # texts, and (text, cell) that lead to a cell
    numbers: list = field(default_factory=list)  # what it rests on: (spec, what, value, low, high)
    rest: list = field(default_factory=list)     # (text, cell) of those it counts and does not name

    def __post_init__(self):
        self.parts = [part for part in self.parts if part]

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part[0] for part in self.parts)

    @property
    def cells(self):
        return [part[1] for part in [*self.parts, *self.rest] if not isinstance(part, str)]


@dataclass
class Verdict:
    """Of one model by one kind of attention on one device in one run."""
    title: str
    where: list      # the rest of the title: who attends, on what, in which type, contexts, run
    sentences: list

    def of(self, kind):
        return [sentence for sentence in self.sentences if sentence.kind == kind]


# ---- parts of sentences

def bits_of(cell):
    return cell["kv_size.bits_per_element"]


def bits_text(cell):
    return "" if bits_of(cell) is None else f"{bits_of(cell):.3g} bits"


def aside(*texts, between=", "):
    found = between.join(filter(None, texts))
    return f" ({found})" if found else ""


def listed(texts):
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def links(cells):
    return [(cell.spec, cell) for cell in cells]


def named(texts, limit=NAMED):
    """(parts, rest) of [(cell, text)]: names that lead to their cells, each with its text behind."""
    parts = [part for i, (cell, text) in enumerate(texts[:limit]) for part in (", " * (i > 0), (cell.spec, cell), text)]
    rest = links(cell for cell, _ in texts[limit:])
    return parts + [f" and {len(rest)} more"] * bool(rest), rest


def gain_text(compared, where=""):
    gain = compared.gain
    if not gain:
        return ""
    digits = 0 if abs(gain.value) >= 0.095 else 1
    if gain.low == -1 or gain.high == math.inf:  # one of both times is only known not to be longer
        end, word = (gain.low, "more") if gain.high == math.inf else (gain.high, "less")
        return f" ({percent(Number(gain.value, None, None), digits)} [{100 * end:+.{digits}f} or {word}]{where})"
    return f" ({percent(gain, digits)}{where})"


def fewer_bytes(cell, plain):
    dense = plain.get((cell.context, cell.batch))
    if not dense or not bytes_per_token(dense) or not bytes_per_token(cell):
        return ""
    return f"{bytes_per_token(dense) / bytes_per_token(cell):.1f} times fewer bytes"


def proof(judged):
    """The numbers that its grade rests on, and beside them what else is known."""
    texts = []
    if judged.kld and (judged.grade != BREAKS or not judged.ppl):
        floor = "" if judged.floor is None else f" where rounding alone does {nats(Number(judged.floor, None, None))}"
        texts.append(f"KLD {nats(judged.kld)} nats" + (floor if judged.grade == FREE else ""))
    if judged.ppl:
        texts.append(f"perplexity {percent(judged.ppl)}")
    if judged.top1 and (judged.grade in (FREE, BREAKS) or not judged.ppl):
        texts.append(f"top-1 {percent(judged.top1, 1, '')}")
    if judged.task and not (texts and judged.task_is_text):
        texts.append(judged.task)
    return ", ".join(texts)


def rests_on(judged):
    return [(judged.cell.spec, what, value.value, value.low, value.high) for what, value in (
        ("KLD, nats", judged.kld), ("change of perplexity", judged.ppl), ("top-1", judged.top1)) if value]


# ---- what engines call it

@functools.cache
def presets():
    """name -> (engine, spec, the engine's flags), of fixtures/cache/presets.cc."""
    try:
        with open(os.path.join(HERE, "..", "fixtures", "cache", "presets.cc"), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return {}
    engines = {key: re.sub(r"( [0-9a-f]{7,}| before .*| [\d.]+)?(,.*)?$", "", engine)
               for key, engine in re.findall(r'constexpr char (k\w+)\[\] = "([^"]*)";', text)}
    row = r'\{"([^"]+)",\s*(k\w+),\s*"([^"]+)",\s*"((?:[^"\\]|\\.)*)"(?:,\s*/\*latents=\*/true)?\}'
    return {name: (engines[engine], spec, flags.replace('\\"', '"')) for name, engine, spec, flags in re.findall(row, text)}


def preset_of(cell):
    """Its row where the results say that the name meant the same, or None."""
    row = presets().get(cell.spec)
    labels = {part for text in cell.texts.values() for part in text.split("; ")}
    return row if row and row[1] in labels else None


def flags(row):
    """As code, without the remark behind them."""
    return re.sub(r"^(.*?)( \(.*\)|; .*)?$", r"`\1`\2", row[2])


def meaning(cell):
    """What a preset's name stands for, as the results say it, or nothing."""
    row = preset_of(cell)
    if row:
        return f"{row[0]}: {flags(row)}"
    found = [part for key, text in sorted(cell.texts.items()) if key.endswith(".label")
             for part in text.split("; ")[1:] if "@" in part]
    return f"`{found[0]}`" if found and len(found[0]) <= LONGEST_MEANING else ""


# ---- what it does to the answers, and what to set

def by_bits(judged):
    return (math.inf if bits_of(judged.cell) is None else round(bits_of(judged.cell), 2),
            judged.kld.high if judged.kld and judged.kld.known else math.inf, judged.cell.spec)


def by_damage(judged):
    return (judged.kld.value if judged.kld else math.inf, judged.ppl.value if judged.ppl else math.inf, judged.cell.spec)


def grade_sentences(judged, proven=()):
    """One a grade; the proof of specs in `proven` has been given."""
    said = []
    for grade in range(5):
        of = sorted((one for one in judged if one.grade == grade), key=by_bits if grade < COSTS else by_damage)
        if not of:
            continue
        words = GRADES[grade] if len(of) == 1 else GRADES[grade].replace("costs", "cost").replace("breaks", "break")
        one_of = f"{len(of)} of {len(judged)} " if len(judged) > 2 else ""
        parts, rest = [one_of + words if one_of else words[0].upper() + words[1:]], []
        if len(of) <= 3:
            for i, one in enumerate(of):
                parts += ["; " if i else ": ", (one.cell.spec, one.cell),
                          "" if one.cell.spec in proven else f"{aside(bits_text(one.cell))}: {proof(one)}"]
        elif grade < COSTS:
            names, rest = named([(one.cell, aside(bits_text(one.cell), nats(one.kld))) for one in of])
            parts += [": ", *names]
        else:
            for word, one in ((", from ", of[0]), (" to ", of[-1])):
                parts += [word, (one.cell.spec, one.cell), aside(bits_text(one.cell), proof(one), between=": ")]
            rest = links(one.cell for one in of[1:-1])
        said.append(Sentence(KINDS[1 + grade], [*parts, "."], [row for one in of for row in rests_on(one)], rest))
    return said


def set_sentences(judged, plain, speeds):
    """What to set: the fewest bits that are free or next to that, the fewest within LITTLE, the fastest of both, and the
    best of each engine. `speeds`: spec -> Compared at the longest context of the smallest batch."""
    ranked = sorted((one for one in judged if one.grade is not None and bits_of(one.cell) is not None), key=by_bits)
    fine = [one for one in ranked if one.grade <= SMALL]
    said = []

    def add(one, head, tail):
        facts = [f"proof: {proof(one)}", fewer_bytes(one.cell, plain)]
        row = speeds.get(one.cell.spec)
        if row and row.word:
            verb = {FASTER: "decodes faster", LEVEL: "decodes as fast", SLOWER: "decodes slower"}[row.word]
            facts.append(verb + gain_text(row, f" at {context_label(row.cell.context)}"))
        said.append(Sentence("set", [head, (one.cell.spec, one.cell), aside(bits_text(one.cell), meaning(one.cell), between="; "),
                                     tail + "; " + "; ".join(filter(None, facts)), "."], rests_on(one)))

    best = next((one for grade in (FREE, NEARLY) for one in ranked if one.grade == grade), None)
    if best:
        cost = "nothing that can be measured" if best.grade == FREE else "next to nothing"
        add(best, "Set ", f": the fewest bits that cost {cost}")
    small = next((one for one in ranked if one.grade <= SMALL), None)
    if small and (best is None or by_bits(small)[0] < by_bits(best)[0]):
        add(small, "For fewer bits set " if best else "Set ", f": the fewest within {LITTLE:g} nats")
    if not fine and any(one.kld and one.kld.known for one in ranked):
        least = min(ranked, key=by_damage)
        said.append(Sentence("set", [f"Nothing here is certain to cost less than {LITTLE:g} nats; the least is ",
                                     (least.cell.spec, least.cell), aside(bits_text(least.cell)), f": {proof(least)}."], rests_on(least)))
    timed = sorted((row for one in fine if (row := speeds.get(one.cell.spec)) and row.word), key=lambda row: -row.gain.value)
    timed = [row for row in timed if (row.cell.context, row.cell.batch) == (timed[0].cell.context, timed[0].cell.batch)]
    if len(timed) > 1 and timed[0].gain.low > timed[1].gain.high:
        fastest = timed[0]
        said.append(Sentence("set", ["The fastest of these is ", (fastest.cell.spec, fastest.cell), gain_text(fastest), "."],
                             [fastest.number]))
    return said + engine_sentence(ranked, fine, (best, small))


def engine_sentence(ranked, fine, said):
    """The best of each engine, where there are several; the flags of those in `said` have been given."""
    engines = {}
    for one in ranked:
        row = preset_of(one.cell)
        if row:
            engines.setdefault(row[0], []).append(one)
    good = {engine: one for engine, of in engines.items() if (one := next((one for one in of if one in fine), None))}
    if len(engines) < 2 or not good:
        return []
    parts = []
    for engine, one in sorted(good.items(), key=lambda item: by_bits(item[1])):
        given = "" if one in said else re.sub(r"` .*", "`", flags(preset_of(one.cell)))
        parts += ["; " if parts else "", engine + " ", (one.cell.spec, one.cell), aside(bits_text(one.cell), given, between=": ")]
    without = [engine for engine in engines if engine not in good]
    return [Sentence("set", [f"By engine, the fewest bits within {LITTLE:g} nats: ", *parts,
                             f"; nothing of {listed(without)}" if without else "", "."], [rests_on(one)[0] for one in good.values()])]


# ---- how fast it is

def speed_sentences(specs, plain, batches):
    """One a word: schemes that are faster at every context, from one on, and never; and {(reason, batch): cells} of the
    others."""
    clauses, reasons = {FASTER: [], LEVEL: [], SLOWER: []}, {}
    for batch in batches:
        found = {}
        for spec, cells in specs.items():
            rows = compare_all([cell for cell in cells if cell.batch == batch], plain, decode_key)
            if rows:
                found[spec] = rows
            for cell in cells:
                if not rows and cell.batch == batch and "decode" in cell.skipped:
                    reasons.setdefault((cell.skipped["decode"], batch), []).append(cell)
        contexts = sorted({row.cell.context for rows in found.values() for row in rows})
        groups = {}  # (word, from which context on) -> rows of the longest context
        for *_, last in found.values():
            if last.word:
                groups.setdefault((last.word, since(found[last.cell.spec])), []).append(last)
            else:
                reasons.setdefault((last.why, batch), []).append(last.cell)
        for word, of_word in clauses.items():
            of = sorted((first, rows) for (other, first), rows in groups.items() if other == word)
            if of:
                of_word.append((batch, contexts, [since_when(rows, first, contexts, found) for first, rows in of],
                                [row.number for _, rows in of for row in rows]))
    said = []
    for word, verb in ((FASTER, "faster than"), (LEVEL, "as fast as"), (SLOWER, "slower than")):
        if clauses[word]:
            parts, rest = [f"Decodes {verb} unquantized" + (": " if len(batches) > 1 else "")], []
            for i, (batch, contexts, of, _) in enumerate(clauses[word]):
                longest = context_label(contexts[-1])
                gains = f" (gains at {longest}): " if len(contexts) > 1 else f" at {longest}: "
                parts.append(("; " if i else "") + (f"at batch {batch}" if len(batches) > 1 else "") + gains)
                for j, (names, others) in enumerate(of):
                    parts += (["; "] if j else []) + names
                    rest += others
            said.append(Sentence(word, [*parts, "."], [number for *_, numbers in clauses[word] for number in numbers], rest))
    return said, reasons


def since(rows):
    """The context from which on the word of the longest is true."""
    return min(row.cell.context for row in itertools.takewhile(lambda row: row.word == rows[-1].word, reversed(rows)))


def since_when(rows, first, contexts, found):
    """(parts, rest) of schemes of one word that is true from a context on; `found`: spec -> Compared of all contexts."""
    rows.sort(key=lambda row: (row.gain.value * (-1 if row.word == FASTER else 1), row.cell.spec))
    when = f"from {context_label(first)} on " if len(contexts) > 1 else ""
    unfused = [row.cell.spec for row in rows if tables.unfused(row.cell)]
    tail = [f" (unfused here: {listed(unfused)})"] if unfused else []
    if len(rows) <= NAMED:
        names, rest = named([(row.cell, gain_text(row) + (
            f" at {context_label(row.cell.context)}" if row.cell.context != contexts[-1] else "")) for row in rows])
        return [when, *names, *tail], rest
    parts = [f"{when}{len(rows)} of {len(found)}, "]
    for row in rows[:3]:
        parts += [(row.cell.spec, row.cell), gain_text(row) + ", "]
    parts += ["to ", (rows[-1].cell.spec, rows[-1].cell), gain_text(rows[-1]), *tail]
    shorter = [context for context in contexts if context < first]
    if shorter:
        before = [next((row.word for row in found[row.cell.spec] if row.cell.context == shorter[-1]), "") for row in rows]
        counts = [f"{before.count(word)} {text}" for word, text in (
            (FASTER, "are faster"), (LEVEL, "are level"), ("", "cannot be told"), (SLOWER, "are slower"))
            if before.count(word)]
        crossings = sorted(row.cell["decode.break_even_context"] for row, word in zip(rows, before)
                           if word == SLOWER and row.word == FASTER and row.cell["decode.break_even_context"])
        parts.append(f"; of these at {context_label(shorter[-1])} {listed(counts)}")
        if crossings:
            between = f"{crossings[0] / 1024:.0f}k to {crossings[-1] / 1024:.0f}k"
            parts.append(f", which by a line between catch up at {between}")
    return parts, links(row.cell for row in rows[3:-1])


def prefill_sentence(specs, plain):
    """Schemes with which a prompt is certainly read more slowly, at their longest context."""
    timed = [compare_all(cells, plain, lambda cell: "prefill.prefill_ms") for cells in specs.values()]
    rows = sorted((rows[-1] for rows in timed if rows and rows[-1].word == SLOWER), key=lambda row: (row.gain.value, row.cell.spec))
    names, rest = named([(row.cell, gain_text(row)) for row in rows], 3)
    return [Sentence("prefill", ["A prompt is read more slowly with ", *names, "."], [row.number for row in rows], rest)] if rows else []


# ---- what fits

def fits_sentences(specs, plain, limit):
    """How much more fits; or why it cannot be said."""
    plains = [cell for cell in plain.values() if bytes_per_token(cell)]
    measured = [cell for cell in plain.values() if cell["capacity.longest_context"] is not None]
    if not plains and not measured:
        return [], "bytes of the unquantized cache were not measured"
    dense = max(measured or plains, key=lambda cell: (room(cell)[0] is not None, cell.batch == 1, cell.context))
    tokens, why = room(dense)
    rows = [cell for cells in specs.values() for cell in cells if (cell.context, cell.batch) == (dense.context, dense.batch) and
            (bytes_per_token(cell) or cell["capacity.longest_context"] is not None)]
    if not rows:
        return [], "bytes were not measured"
    rows.sort(key=lambda cell: (bytes_per_token(cell) or math.inf, cell.spec))
    if tokens is None:
        each = [bytes_per_token(dense) / bytes_per_token(cell) for cell in rows] if bytes_per_token(dense) else []
        return [], why + (f" (a token takes {min(each):.1f} to {max(each):.1f} times fewer bytes)" if len(each) > 1 else
                          f" (a token takes {each[0]:.1f} times fewer bytes)" if each else "")
    fitting = [cell for cell in rows if room(cell)[0] is not None and room(cell)[1] == why and
               cell["capacity.memory_bytes"] == dense["capacity.memory_bytes"]]
    if not fitting:
        return [], "memory was measured of the unquantized cache alone, or otherwise"
    return [fits_sentence(fitting, dense, why != "measured", limit or dense["capacity.longest_context_of_model"])], ""


def fits_sentence(fitting, dense, by_bytes, limit):
    """Of the scheme with the fewest bytes and up to two others."""
    chosen = fitting if len(fitting) <= 3 else [fitting[0], fitting[len(fitting) // 2], fitting[-1]]
    every, context = [*chosen, dense], dense.context
    total = dense["memory.vram_total_bytes" if by_bytes else "capacity.memory_bytes"]
    lengths = [room(cell)[0] for cell in every]
    batches = [math.floor(tokens / context) if by_bytes else cell["capacity.largest_batch"] for cell, tokens in zip(every, lengths)]
    tried = all(cell["capacity.fits_at_limit"] for cell in every)
    parts = [f"{total / 2**30:.3g} GiB hold, " if total else "The device holds, ",
             "by bytes alone beside weights and scratch, " if by_bytes else
             "as runs at the limit showed, " if tried else "with the workspace that was measured, "]

    def row(values, unit):
        for i, (cell, value) in enumerate(zip(chosen, values)):
            parts.extend([", " * (i > 0) + f"{value:,.0f}" + unit * (i == 0) + " with ", (cell.spec, cell),
                          f" ({value / values[-1]:.1f} times)" if values[-1] else ""])
        parts.extend([f", {values[-1]:,.0f} ", ("unquantized", dense)])
    if None not in batches:
        row(batches, f" sequences of {context_label(context)}")
    if limit and lengths[-1] > limit:
        parts.append(f"; one of all {limit:,.0f} tokens that the model takes fits unquantized, too")
    else:
        parts.append("; a single one may have " if None not in batches else "a single sequence of ")
        row(lengths, " tokens")
    return Sentence("fits", [*parts, "."], [(cell.spec, "tokens that fit", tokens, None, None) for cell, tokens in zip(chosen, lengths)],
                    links(cell for cell in fitting if cell not in chosen))


# ---- what cannot be said

def cannot(topic, rows, reason, total, points=""):
    """rows: cells."""
    if len(rows) == total and total > 1:
        return Sentence("cannot", [f"{topic}: ", reason + points], [], links(rows))
    names, rest = named([(cell, "") for cell in rows])
    return Sentence("cannot", [f"{topic} of ", *names, ": ", reason + points], [], rest)


def unsaid_quality(judged):
    reasons = {}
    for one in judged:
        if one.grade is None:
            reasons.setdefault(one.why, []).append(one)
    said = []
    for reason, of in reasons.items():
        points = [f"{one.cell.spec} {percent(one.ppl)}" for one in of if one.ppl and not one.ppl.known]
        shown = f" (perplexity without one: {', '.join(points)})" if 0 < len(points) <= NAMED else ""
        said.append(cannot("what it does to the answers", [one.cell for one in of], reason, len(judged), shown))
    # Tasks that say nothing of schemes which text says are fine.
    silent, of = {}, {}
    for one in judged:
        if one.grade is not None and one.grade <= SMALL:
            for task, word in one.tasks:
                if word in ("undecided", "no headroom", "hardly encoded", "reference missing", "no interval"):
                    silent.setdefault(word, {})[task] = None
                    of[id(one.cell)] = one.cell
    if silent:
        names, rest = named([(cell, "") for cell in of.values()])
        said.append(Sentence("cannot", ["whether answers change with ", *names, ": " + "; ".join(
            f"{word} in {listed(list(tasks)[:NAMED])}" for word, tasks in silent.items())], [], rest))
    if any(one.grade is not None for one in judged) and all(bits_of(one.cell) is None for one in judged):
        said.append(cannot("what to set", [one.cell for one in judged], "bits were not measured (kv_size)", len(judged)))
    return said


# ---- everything

def verdict_of(results, cells, pairs):
    """One Verdict of cells that have run, device, model and backend in common, or None where nothing is quantized."""
    plain = {(cell.context, cell.batch): cell for cell in cells if cell.spec == "none"}
    specs = {}
    for cell in sorted(cells, key=lambda cell: tables.spec_order(cell.spec)):
        if cell.spec != "none":
            specs.setdefault(cell.spec, []).append(cell)
    if not specs:
        return None
    judged = [judge(of, plain, pairs) for of in specs.values()]
    batches = sorted({cell.batch for cell in cells if cell[decode_key(cell)] is not None or "decode" in cell.skipped})
    speeds = {spec: rows[-1] for spec, of in specs.items() if (rows := compare_all(of, plain, decode_key))}
    spoken, reasons = speed_sentences(specs, plain, batches)
    spoken += prefill_sentence(specs, plain)
    limit = results.shapes.get(cells[0].model, {}).get("max_position_embeddings")
    fits, why_not = fits_sentences(specs, plain, limit)
    unsaid = unsaid_quality(judged)
    if not batches:
        unsaid.append(cannot("speed", [of[-1] for of in specs.values()], "not measured", len(specs)))
    for (reason, batch), of in reasons.items():
        unsaid.append(cannot("speed" + (f" at batch {batch}" if len(batches) > 1 else ""),
                             list({cell.spec: cell for cell in of}.values()), reason, len(specs)))
    if why_not:
        unsaid.append(cannot("what fits", [of[-1] for of in specs.values()], why_not, len(specs)))
    to_set = set_sentences(judged, plain, speeds)
    proven = {row[0] for sentence in to_set if "proof" in sentence.text for row in sentence.numbers}
    sentences = to_set + grade_sentences(judged, proven) + spoken + fits + unsaid
    first = cells[0]
    types = list(dict.fromkeys(types_of(file.facts, first.model) for cell in cells for file in cell.files))
    contexts = [context_label(context) for context in sorted({cell.context for cell in cells})]
    return Verdict(model_name(first.model), [
        first.backend, f"on {first.device}" if first.device != "?" else "", listed(types or [""]),
        f"context {contexts[0]}" if len(contexts) == 1 else f"contexts {contexts[0]} to {contexts[-1]}", first.run],
        sentences)


def speaks(cell):
    """Whether it has something to judge: single kernels and distributions have not."""
    return any(not name.startswith(("kernel_", "distribution", "sensitivity")) for name in [*cell.values, *cell.not_measured])


def verdicts(results):
    """Every Verdict, the largest run's first, and of that those that say what to set; what several cannot say alike is said once,
    by a last one."""
    cells = results.current()
    groups = {}
    for cell in cells:
        if speaks(cell):
            groups.setdefault((cell.run, cell.device, cell.model, cell.backend), []).append(cell)
    of_items = {}
    for row in results.pairs:
        of_items.setdefault((row.run, row.cell.split("/", 1)[1]), []).append(row)
    pairs = {id(cell): of_items.get((cell.run, cell.place), []) for cell in cells}
    runs = results.runs()
    order = sorted(groups, key=lambda key: (model_name(key[2]), key[3]))
    found = [verdict for key in order if (verdict := verdict_of(results, groups[key], pairs)) and verdict.sentences]
    found = hoisted(sorted(found, key=lambda verdict: (runs.index(verdict.where[-1]), not verdict.of("set"))))
    several_runs, before = len({verdict.where[-1] for verdict in found if verdict.where}) > 1, []
    for verdict in found:  # a title says what differs from the one before
        where = verdict.where if several_runs else verdict.where[:-1]
        shown = [text for i, text in enumerate(where) if text and (not before or text != before[i])]
        before = where or before
        verdict.title = ", ".join([verdict.title] + shown)
    return found


def hoisted(found):
    """What three or more, or both of two, cannot say for the same reason, said once."""
    count = {}
    for verdict in found:
        for text in {sentence.text for sentence in verdict.of("cannot")}:
            count[text] = count.get(text, 0) + 1
    often = {text for text, n in count.items() if n > 1 and (n >= 3 or n == len(found))}
    common = {}
    for verdict in found:
        for sentence in verdict.of("cannot"):
            if sentence.text in often:
                if sentence.text not in common:
                    part = "" if count[sentence.text] == len(found) else f"in {count[sentence.text]} of {len(found)}, "
                    common[sentence.text] = Sentence("cannot", ([part] if part else []) + sentence.parts, [], [])
                common[sentence.text].rest += links(sentence.cells)
        verdict.sentences = [s for s in verdict.sentences if s.kind != "cannot" or s.text not in often]
    kept = [verdict for verdict in found if verdict.sentences]
    title = "All of these" if len(kept) == len(found) else listed(list(dict.fromkeys(verdict.title for verdict in found)))
    return kept + ([Verdict(title, [] if kept else found[0].where, list(common.values()))] if common else [])


# ---- for the terminal

def as_items(verdict):
    """(text, sentences) of the lines of a list: what cannot be said is one of them."""
    rows = [(sentence.text, [sentence]) for sentence in verdict.sentences if sentence.kind != "cannot"]
    rest = verdict.of("cannot")
    return rows + ([("Cannot be said: " + "; ".join(sentence.text for sentence in rest) + ".", rest)] if rest else [])


def markdown(results, width=100):
    """The sentences as lists; nothing where nothing is quantized."""
    lines = []
    for verdict in verdicts(results):
        rows = as_items(verdict)
        if rows:
            lines += ["", verdict.title + ":", ""]
            for text, _ in rows:
                lines += textwrap.wrap(text, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                                       break_on_hyphens=False)
    return "\n".join(lines) + "\n" if lines else ""
