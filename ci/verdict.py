"""What results say, in sentences: what to set, what costs nothing, what costs how much, what breaks the model, from
which context on it is faster, how much more fits the device, and what cannot be said and why. All rules stand here.

A sentence is claimed on the ends of intervals, never on a number alone. Of each model on a device every scheme gets the
first of these that holds; of several contexts and measurements the worst counts:

  breaks           perplexity is up by more than BROKEN_PPL, or top-1 agreement is below BROKEN_TOP1 of what rounding
                   alone leaves, or BROKEN_TASK of what `none` gets right in a task is lost: each by the kind end of its
                   interval
  free             the KLD's upper end is at most FLOOR_FACTOR times the noise floor, and nothing else shows harm
  next to nothing  the KLD's upper end is less than NEXT_TO_NOTHING above the floor (a KLD has its floor in it)
  little           the same with LITTLE
  costs            harm is shown: the KLD's lower end above FLOOR_FACTOR floors, the change of perplexity above 0, top-1
                   below its floor, or items answered worse (ci/items.py: Holm's p; of scores without items: intervals
                   apart)
  cannot be said   what is left, with its reason

A time is certain if it was taken LEAST_RUNS times or more; its interval is the median's (ci95_fraction) or from the
fastest to the slowest: of three against three that do not overlap by chance once in twenty. Of a disturbed, throttled or
shared time only its upper end is known, so what is faster in spite of it counts. A GPU held at its own power limit is how
a loaded card runs: such times count among themselves. Within SPEED_MARGIN two speeds are level.
"""

import math
import os
import re
import textwrap
from dataclasses import dataclass, field

import tables
from results import HERE, kv_dtype
from tables import context_label, model_name

# ---- thresholds

# What rounding does is itself known to some percent, and calls of another length round otherwise.
FLOOR_FACTOR = 2.0
# Nats a token. Computing SmolLM2 in bfloat16 rather than float32 does 0.001 (ci/baselines/smollm2-135m-cpu).
NEXT_TO_NOTHING = 0.001
# One percent of perplexity, were all of it loss; 8-bit floats with scales of 1 do as much to SmolLM2
# (ci/baselines/smollm2-135m-referee).
LITTLE = 0.01
# Of perplexity: twice what parts Llama 2's 7B from its 13B (5.47 and 4.88 on WikiText-2).
BROKEN_PPL = 0.25
# Every fourth token is another.
BROKEN_TOP1 = 0.75
# Of the right answers that `none` gives.
BROKEN_TASK = 0.5
# Of right answers, as ci/items.py has it.
HEADROOM = (0.30, 0.95)
LEAST_RUNS = 3
# kvqbench measures until a median is known to 1 %.
SPEED_MARGIN = 0.01
# So many schemes are named in a sentence.
NAMED = 5
# What a name stands for is said up to so many characters: a plan's is a spec for each layer.
LONGEST_MEANING = 80

FREE, NEARLY, SMALL, COSTS, BREAKS = range(5)
GRADES = ["costs nothing that can be measured",
          f"costs next to nothing, less than {NEXT_TO_NOTHING:g} nats above rounding",
          f"costs little, less than {LITTLE:g} nats above rounding", "costs measurably", "breaks it"]
KINDS = ["set", "free", "next to nothing", "little", "costs", "breaks", "faster", "slower", "level", "prefill", "fits",
         "cannot"]


@dataclass
class Sentence:
    kind: str      # of KINDS
    parts: list    # texts, and (text, cell) that lead to a cell
    numbers: list = field(default_factory=list)  # what it rests on: (spec, what, value, low, high)
    rest: list = field(default_factory=list)     # (text, cell) of those it counts and does not name

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


# ---- numbers with intervals

@dataclass
class Number:
    value: float
    low: float | None
    high: float | None

    @property
    def known(self):
        return self.low is not None and self.high is not None

    def scaled(self, factor):
        return Number(self.value * factor, *(None if end is None else end * factor for end in (self.low, self.high)))


def number(cell, key):
    """A counter and its interval, or None."""
    return None if cell[key] is None else Number(cell[key], cell[key + "_lo"], cell[key + "_hi"])


def nats(found):
    digits = 5 if found.value <= 0 else min(5, max(2, 2 - math.floor(math.log10(found.value))))
    return spelled(found, lambda value: f"{value:.{digits}f}")


def percent(found, digits=1, sign="+"):
    digits = 0 if abs(found.value) >= 1 and sign else digits
    return spelled(found.scaled(100), lambda value: f"{value:{sign},.{digits}f}", " %")


def spelled(found, text, unit=""):
    def plain(value):  # no minus before a zero
        shown = text(value)
        return shown.replace("-", "+", 1) if shown.startswith("-") and float(shown) == 0 else shown
    return plain(found.value) + unit + (f" [{plain(found.low)}, {plain(found.high)}]" if found.known else "")


def bits_of(cell):
    return cell["kv_size.bits_per_element"]


def bits_text(cell):
    return "" if bits_of(cell) is None else f"{bits_of(cell):.3g} bits"


def aside(*texts, between=", "):
    found = between.join(filter(None, texts))
    return f" ({found})" if found else ""


def bytes_per_token(cell):
    """Of one sequence."""
    return None if cell["kv_size.kv_bytes"] is None else cell["kv_size.kv_bytes"] / (cell.context * cell.batch)


# ---- what it does to the answers

@dataclass
class Judged:
    """A scheme in one cell, or in all its cells."""
    cell: object
    grade: int | None = None
    why: str = ""           # there is no grade
    kld: Number | None = None
    floor: float | None = None
    ppl: Number | None = None   # share of the reference's
    top1: Number | None = None
    task: str = ""          # the worst that was shown
    task_is_text: bool = False  # nll, margin: no right and wrong
    tasks: list = field(default_factory=list)  # (task, verdict)


def of_text(cell, measurement):
    """By text that is scored: of `perplexity`, or of what the unquantized model wrote (`drift`)."""
    kld, top1 = (number(cell, f"{measurement}.{name}") for name in ("kld_nats", "top1_agreement"))
    ppl = number(cell, measurement + ".delta_ppl")
    reference = cell[measurement + ".ppl_reference"]
    ppl = ppl.scaled(1 / reference) if ppl and reference else None
    found = Judged(cell, None, "", kld, cell[measurement + ".kld_floor_nats"], ppl, top1)
    if kld is None and ppl is None:
        return None
    if hardly := cell.hardly_encoded(measurement):
        found.why = hardly
    elif cell[measurement + ".windows"] == 1:
        found.why = "one window, which has no interval"
    elif not any(value and value.known for value in (kld, ppl)):
        found.why = "no interval"
    if found.why:
        return found
    kld = kld if kld and kld.known else None
    ppl = ppl if ppl and ppl.known else None
    top1 = top1 if top1 and top1.known and cell[measurement + ".top1_floor"] is not None else None
    top1_floor, floor = cell[measurement + ".top1_floor"], found.floor
    lost = bool(ppl and ppl.low > 0 or top1 and top1.high < top1_floor)
    if ppl and ppl.low > BROKEN_PPL or top1 and top1.high < BROKEN_TOP1 * top1_floor:
        found.grade = BREAKS
    elif kld and floor is not None and kld.high <= FLOOR_FACTOR * floor and not lost:
        found.grade = FREE
    elif kld and kld.high - (floor or 0) < NEXT_TO_NOTHING:
        found.grade = NEARLY
    elif kld and kld.high - (floor or 0) < LITTLE:
        found.grade = SMALL
    elif lost or kld and floor is not None and kld.low > FLOOR_FACTOR * floor:
        found.grade = COSTS
    else:
        found.why = ("KLD was not measured" if kld is None else "no noise floor" if floor is None else
                     f"the KLD's interval reaches from rounding to more than {LITTLE:g} nats")
    return found


SCORES = re.compile(r"^(needle\.needle(_random)?_rate|reuse\.(kv|vt)_(own|gold)|[^./]+\.score)$")


def of_tasks(cell, plain, pairs):
    """By what is answered: items where there are some, else scores whose intervals lie apart."""
    found = Judged(cell)
    for row in pairs:
        task = row.cell.split("/")[0] + ("" if row.metric == "right" else f" ({row.metric})")
        if row.metric == "right":
            found.tasks.append((task, row.verdict))
        if row.verdict == "worse":
            half = row.metric == "right" and row.interval[1] <= -BROKEN_TASK * row.reference_score
            shown = f"{row.difference:+.3g} [{row.interval[0]:+.3g}, {row.interval[1]:+.3g}]"
            if row.metric == "right":
                shown = f"{100 * row.score:.0f} % right, unquantized {100 * row.reference_score:.0f} %"
            worsen(found, BREAKS if half else COSTS, f"{task}: {shown}", row.metric != "right")
    with_items = {row.cell.split("/")[0] for row in pairs}
    for key in sorted(cell.values):
        measurement = key.split(".")[0]
        if not SCORES.match(key) or measurement in with_items:
            continue
        scale = 0.01 if key.endswith(".score") else 1
        score, theirs = number(cell, key), number(plain, key) if plain else None
        task = ("random needle" if key == "needle.needle_random_rate" else
                measurement if key.endswith((".score", "needle_rate")) else key.replace(".", " "))
        if theirs is None:
            verdict = "reference missing"
        elif not score.known or not theirs.known:
            verdict = "no interval"
        elif cell.hardly_encoded(measurement):
            verdict = "hardly encoded"
        elif score.high < theirs.low:
            verdict = "worse"
            worsen(found, BREAKS if score.high < BROKEN_TASK * theirs.value else COSTS,
                   f"{task} {percent(score.scaled(scale), 0, '')}, unquantized {percent(theirs.scaled(scale), 0, '')}")
        elif not HEADROOM[0] <= theirs.value * scale <= HEADROOM[1]:
            verdict = "no headroom"
        else:
            verdict = "undecided"
        found.tasks.append((task, verdict))
    return found if found.tasks or found.grade is not None else None


def worsen(found, grade, task, is_text=False):
    if found.grade is None or grade > found.grade or grade == found.grade and found.task_is_text and not is_text:
        found.grade, found.task, found.task_is_text = grade, task, is_text


def random_weights(cell):
    return any("random weights" in str(file.facts.get("model " + cell.model, "")) for file in cell.files)


def judge(cells, plain, pairs):
    """A scheme's Judged over its cells; `plain` has the cells of `none` by (context, batch), `pairs` items' by cell."""
    every = []
    for cell in cells:
        of_cell = [of_text(cell, measurement) for measurement in ("perplexity", "drift")]
        of_cell.append(of_tasks(cell, plain.get((cell.context, cell.batch)), pairs.get(id(cell), [])))
        every += [judged for judged in of_cell if judged]
    if random_weights(cells[0]):
        return Judged(every[-1].cell if every else cells[-1], None, "random weights")
    if not every:
        skipped = [reason for cell in cells for name, reason in cell.skipped.items() if name in ("perplexity", "drift")]
        return Judged(cells[-1], None, skipped[0] if skipped else "not measured")
    graded = [judged for judged in every if judged.grade is not None]
    # Of equal grades the one with text, then the largest KLD.
    worst = max(graded or every, key=lambda judged: (judged.grade or 0, judged.kld is not None or judged.ppl is not None,
                                                     judged.kld.high or 0 if judged.kld else 0))
    with_text = [judged for judged in every if judged.kld or judged.ppl]
    if worst.kld is None and worst.ppl is None and with_text:  # a task decided; what the text says stands beside it
        text = max(with_text, key=lambda judged: judged.kld.value if judged.kld else 0)
        worst.kld, worst.floor, worst.ppl, worst.top1 = text.kld, text.floor, text.ppl, text.top1
    shown = max((judged for judged in every if judged.task), default=worst,
                key=lambda judged: (judged.grade, not judged.task_is_text))
    why = "" if worst.grade is not None else worst.why or "no harm is shown, and no equality"
    return Judged(worst.cell, worst.grade, why, worst.kld, worst.floor, worst.ppl, worst.top1, shown.task,
                  shown.task_is_text, [task for judged in every for task in judged.tasks])


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


# ---- times

def time_of(cell, key, plain):
    """(Number, what is wrong with it) of milliseconds. Of a time that others may have lengthened the lower end is 0; there
    is no interval where there is no spread."""
    measurement = key.split(".")[0]
    value, low, high = cell[key], cell[key + "_min"], cell[key + "_max"]
    fraction, runs = cell[measurement + ".ci95_fraction"], cell[measurement + ".samples"]
    if fraction is not None:
        low, high = value * (1 - fraction), value * (1 + fraction)
    elif low is None or high is None or runs is not None and runs < LEAST_RUNS:
        return Number(value, None, None), f"fewer than {LEAST_RUNS} repetitions"
    capped = lambda c: power_capped(c, measurement)  # noqa: E731
    facts = cell.files[-1].facts if cell.files else {}
    load, cores = facts.get("load_avg"), facts.get("num_cpus")
    wrong = ("throttled" if cell[measurement + ".throttled"] and not (capped(cell) and capped(plain)) else
             "disturbed" if cell[measurement + ".disturbed"] else
             "shared GPU" if cell[measurement + ".foreign_processes"] else
             "more memory than the device has" if cell["memory.vram_overflow"] else
             "busy machine" if cell[measurement + ".disturbed"] is None and load and cores and load[0] > cores + 0.5 and
             not (facts.get("gpu") or facts.get("gpu_name")) else "")
    return Number(value, 0.0 if wrong else low, high), wrong


def power_capped(cell, measurement):
    """Throttled by the card's own power limit and nothing else."""
    reasons = [part[len("throttled: "):] for part in cell.texts.get(measurement + ".label", "").split("; ")
               if part.startswith("throttled: ")]
    return bool(cell[measurement + ".throttled"]) and reasons == ["sw_power_cap"]


def computed_in(cell):
    """What two times must have in common."""
    return {(facts.get("dtype"), kv_dtype(facts, cell.model), facts.get("protocol"),
             None if facts.get("gpu") else facts.get("threads")) for facts in (file.facts for file in cell.files)}


FASTER, LEVEL, SLOWER = "faster", "level", "slower"


@dataclass
class Compared:
    cell: object
    word: str          # FASTER, LEVEL, SLOWER, or "" with a reason
    why: str = ""
    gain: Number | None = None  # of the speed, as a share


def compare(cell, plain, key):
    """How fast a cell is against `none` in its place; None where nobody measured."""
    if cell[key] is None:
        return None
    if plain is None or plain[key] is None:
        return Compared(cell, "", "no unquantized time beside it")
    if hardly := cell.hardly_encoded("kv_size"):
        return Compared(cell, "", hardly)
    if computed_in(cell) != computed_in(plain):
        return Compared(cell, "", "computed otherwise than the unquantized")
    (ours, wrong), (theirs, theirs_wrong) = time_of(cell, key, plain), time_of(plain, key, cell)
    gain = Number(theirs.value / ours.value - 1, None, None)
    if not ours.known or not theirs.known:
        return Compared(cell, "", wrong or theirs_wrong, gain)
    gain.low, gain.high = theirs.low / ours.high - 1, (theirs.high / ours.low if ours.low else math.inf) - 1
    if gain.low > SPEED_MARGIN:
        return Compared(cell, FASTER, "", gain)
    if gain.high < -SPEED_MARGIN:
        return Compared(cell, SLOWER, "", gain)
    if wrong or theirs_wrong:
        return Compared(cell, "", wrong or theirs_wrong, gain)
    if -2 * SPEED_MARGIN < gain.low and gain.high < 2 * SPEED_MARGIN:
        return Compared(cell, LEVEL, "", gain)
    return Compared(cell, "", "times overlap with the unquantized", gain)


# ---- what fits

def room(cell):
    """(tokens of one sequence, what they rest on) or (None, why not)."""
    if cell["capacity.longest_context"] is not None:
        if 0 in (cell["capacity.fits_at_limit"], cell["capacity.batch_fits_at_limit"]):
            return None, "a run at the limit that was predicted did not fit"
        return cell["capacity.longest_context"], "measured"
    total, reserved = cell["memory.vram_total_bytes"], cell["memory.vram_reserved_bytes"]
    if total is None or reserved is None:
        return None, ("the device's memory is not in the results" if cell["memory.rss_peak_bytes"] else
                      "memory was not measured")
    if cell["memory.beyond_weights_bytes"] is None:
        return None, "peaks of this protocol hold several caches"
    each, held = bytes_per_token(cell), cell["memory.kv_bytes_allocated"]
    if not each or held is None:
        return None, "bytes of the cache were not measured"
    return (total - (reserved - held)) / each, "by bytes alone"


# ---- what engines call it

_PRESETS = {}


def presets():
    """name -> (engine, spec, the engine's flags), of fixtures/cache/presets.cc."""
    if not _PRESETS:
        try:
            with open(os.path.join(HERE, "..", "fixtures", "cache", "presets.cc"), encoding="utf-8") as file:
                text = file.read()
        except OSError:
            return {}
        engines = dict(re.findall(r'constexpr char (k\w+)\[\] = "([^"]*)";', text))
        row = r'\{"([^"]+)",\s*(k\w+),\s*"([^"]+)",\s*"((?:[^"\\]|\\.)*)"(?:,\s*/\*latents=\*/true)?\}'
        for name, engine, spec, flags in re.findall(row, text):
            _PRESETS[name] = (re.sub(r"( [0-9a-f]{7,}| before .*| [\d.]+)?(,.*)?$", "", engines[engine]), spec,
                              flags.replace('\\"', '"'))
    return _PRESETS


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


# ---- sentences

def names(cells, text=lambda cell: "", limit=NAMED):
    """(parts, rest): names that lead to their cells, each with a text."""
    parts, rest = [], []
    for i, cell in enumerate(cells):
        if i < limit:
            parts += [", " if i else "", (cell.spec, cell), text(cell)]
        else:
            rest.append((cell.spec, cell))
    return [part for part in parts if part] + ([f" and {len(rest)} more"] if rest else []), rest


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
        head = one_of + words if one_of else words[0].upper() + words[1:]
        about = {id(one.cell): one for one in of}
        if len(of) <= 3:
            parts = [head + ": "]
            for i, one in enumerate(of):
                parts += ["; " if i else "", (one.cell.spec, one.cell),
                          "" if one.cell.spec in proven else f"{aside(bits_text(one.cell))}: {proof(one)}"]
            rest = []
        elif grade < COSTS:
            named, rest = names([one.cell for one in of], lambda cell: aside(
                bits_text(cell), nats(about[id(cell)].kld)))  # noqa: B023
            parts = [head + ": "] + named
        else:
            parts = [head]
            for word, one in ((", from ", of[0]), (" to ", of[-1])):
                parts += [word, (one.cell.spec, one.cell), aside(bits_text(one.cell), proof(one), between=": ")]
            rest = [(one.cell.spec, one.cell) for one in of[1:-1]]
        said.append(Sentence(KINDS[1 + grade], [part for part in parts if part] + ["."],
                             [row for one in of for row in rests_on(one)], rest))
    return said


def gain_text(compared, where=""):
    gain = compared.gain
    if not gain:
        return ""
    digits = 0 if abs(gain.value) >= 0.095 else 1
    if gain.low == -1 or gain.high == math.inf:  # one of both times is only known not to be longer
        end, word = (gain.low, "more") if gain.high == math.inf else (gain.high, "less")
        return f" ({percent(Number(gain.value, None, None), digits)} [{100 * end:+.{digits}f} or {word}]{where})"
    return f" ({percent(gain, digits)}{where})"


def listed(texts):
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def speed_sentences(specs, plain, batches):
    """One a word: schemes that are faster at every context, from one on, and never; and {(reason, batch): cells} of the
    others."""
    clauses, reasons = {FASTER: [], LEVEL: [], SLOWER: []}, {}
    for batch in batches:
        found = {}
        for spec, cells in specs.items():
            rows = [row for cell in sorted(cells, key=lambda cell: cell.context) if cell.batch == batch
                    if (row := compare(cell, plain.get((cell.context, batch)), decode_key(cell)))]
            if rows:
                found[spec] = rows
            for cell in cells:
                if not rows and cell.batch == batch and "decode" in cell.skipped:
                    reasons.setdefault((cell.skipped["decode"], batch), []).append(cell)
        contexts = sorted({row.cell.context for rows in found.values() for row in rows})
        groups = {}  # (word, from which context on) -> rows of the longest context
        for rows in found.values():
            last = rows[-1]
            if not last.word:
                reasons.setdefault((last.why, batch), []).append(last.cell)
                continue
            since = last.cell.context
            for row in reversed(rows):
                if row.word != last.word:
                    break
                since = row.cell.context
            groups.setdefault((last.word, since), []).append(last)
        for word, of_word in clauses.items():
            of = sorted((since, rows) for (other, since), rows in groups.items() if other == word)
            if of:
                of_word.append((batch, contexts, [since_when(rows, since, contexts, found) for since, rows in of],
                                [row for _, rows in of for row in rows]))
    said = []
    for word, verb in ((FASTER, "faster than"), (LEVEL, "as fast as"), (SLOWER, "slower than")):
        if clauses[word]:
            parts, rest = [f"Decodes {verb} unquantized" + (": " if len(batches) > 1 else "")], []
            for i, (batch, contexts, of, _) in enumerate(clauses[word]):
                longest = context_label(contexts[-1])
                gains = f" (gains at {longest}): " if len(contexts) > 1 else f" at {longest}: "
                parts.append(("; " if i else "") + (f"at batch {batch}" if len(batches) > 1 else "") + gains)
                for j, (named, others) in enumerate(of):
                    parts += (["; "] if j else []) + named
                    rest += others
            said.append(Sentence(word, parts + ["."], [
                (row.cell.spec, "gain of speed", row.gain.value, row.gain.low, row.gain.high)
                for _, _, _, rows in clauses[word] for row in rows], rest))
    return said, reasons


def since_when(rows, since, contexts, found):
    """(parts, rest) of schemes of one word that is true from a context on; `found`: spec -> Compared of all contexts."""
    rows.sort(key=lambda row: (row.gain.value * (-1 if row.word == FASTER else 1), row.cell.spec))
    when = f"from {context_label(since)} on " if len(contexts) > 1 else ""
    unfused = [row.cell.spec for row in rows if row.cell.backend == "fused" and
               (tables.kernel_that_ran(row.cell, "decode") or "").startswith("sdpa")]
    tail = [f" (unfused here: {listed(unfused)})"] if unfused else []
    if len(rows) <= NAMED:
        about = {id(row.cell): row for row in rows}
        named, rest = names([row.cell for row in rows], lambda cell: gain_text(about[id(cell)]) + (
            f" at {context_label(cell.context)}" if cell.context != contexts[-1] else ""))
        return [when, *named, *tail] if when else [*named, *tail], rest
    parts = [f"{when}{len(rows)} of {len(found)}, "]
    for row in rows[:3]:
        parts += [(row.cell.spec, row.cell), gain_text(row) + ", "]
    parts += ["to ", (rows[-1].cell.spec, rows[-1].cell), gain_text(rows[-1]), *tail]
    shorter = [context for context in contexts if context < since]
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
    return parts, [(row.cell.spec, row.cell) for row in rows[3:-1]]


def decode_key(cell):
    """kvqbench's time of a step; what other programs say has no spread."""
    return "decode.ms_per_token" if cell["decode.ms_per_token"] is not None else "decode.decode_ms"


def prefill_sentence(specs, plain):
    """Schemes with which a prompt is certainly read more slowly, at their longest context."""
    rows = []
    for cells in specs.values():
        timed = [row for cell in sorted(cells, key=lambda cell: (-cell.batch, cell.context))
                 if (row := compare(cell, plain.get((cell.context, cell.batch)), "prefill.prefill_ms"))]
        if timed and timed[-1].word == SLOWER:
            rows.append(timed[-1])
    if not rows:
        return []
    rows.sort(key=lambda row: (row.gain.value, row.cell.spec))
    about = {id(row.cell): row for row in rows}
    parts, rest = names([row.cell for row in rows], lambda cell: gain_text(about[id(cell)]), 3)
    return [Sentence("prefill", ["A prompt is read more slowly with "] + parts + ["."],
                     [(row.cell.spec, "gain of speed", row.gain.value, row.gain.low, row.gain.high) for row in rows], rest)]


def fits_sentences(specs, plain, limit):
    """How much more fits, of the scheme with the fewest bytes and up to two others; or why it cannot be said."""
    plains = [cell for cell in plain.values() if bytes_per_token(cell)]
    measured = [cell for cell in plain.values() if cell["capacity.longest_context"] is not None]
    if not plains and not measured:
        return [], "bytes of the unquantized cache were not measured"
    dense = max(measured or plains, key=lambda cell: (room(cell)[0] is not None, cell.batch == 1, cell.context))
    tokens, why = room(dense)
    rows = []
    for cells in specs.values():
        same = [cell for cell in cells if (cell.context, cell.batch) == (dense.context, dense.batch)]
        if same and (bytes_per_token(same[0]) or same[0]["capacity.longest_context"] is not None):
            rows.append(same[0])
    if not rows:
        return [], "bytes were not measured"
    rows.sort(key=lambda cell: (bytes_per_token(cell) or math.inf, cell.spec))
    if tokens is None:
        each = [bytes_per_token(dense) / bytes_per_token(cell) for cell in rows] if bytes_per_token(dense) else []
        return [], why + (f" (a token takes {min(each):.1f} to {max(each):.1f} times fewer bytes)" if len(each) > 1 else
                          f" (a token takes {each[0]:.1f} times fewer bytes)" if each else "")
    fitting = [(cell, *room(cell)) for cell in rows]
    fitting = [row for row in fitting if row[1] is not None and row[2] == why and
               row[0]["capacity.memory_bytes"] == dense["capacity.memory_bytes"]]
    if not fitting:
        return [], "memory was measured of the unquantized cache alone, or otherwise"
    chosen = fitting if len(fitting) <= 3 else [fitting[0], fitting[len(fitting) // 2], fitting[-1]]
    context, by_bytes = dense.context, why != "measured"
    total = dense["memory.vram_total_bytes" if by_bytes else "capacity.memory_bytes"]
    limit = limit or dense["capacity.longest_context_of_model"]
    lengths = [found for _, found, _ in chosen] + [tokens]
    batches = [math.floor(found / context) for found in lengths] if by_bytes else [
        cell["capacity.largest_batch"] for cell in [*(cell for cell, _, _ in chosen), dense]]
    tried = all(cell["capacity.fits_at_limit"] for cell in [dense, *(cell for cell, _, _ in chosen)])
    parts = [f"{total / 2**30:.3g} GiB hold, " if total else "The device holds, ",
             "by bytes alone beside weights and scratch, " if by_bytes else
             "as runs at the limit showed, " if tried else "with the workspace that was measured, "]

    def row(values, text):
        for i, ((cell, _, _), value) in enumerate(zip(chosen, values)):
            parts.extend([", " if i else "", text(value, i) + " with ", (cell.spec, cell)] +
                         ([f" ({value / values[-1]:.1f} times)"] if values[-1] else []))
        parts.extend([", ", text(values[-1], len(chosen)) + " ", ("unquantized", dense)])
    if None not in batches:
        row(batches, lambda value, i: f"{value:,.0f}" + (f" sequences of {context_label(context)}" if i == 0 else ""))
    if limit and tokens > limit:
        parts.append(f"; one of all {limit:,.0f} tokens that the model takes fits unquantized, too")
    else:
        parts.append("; a single one may have " if None not in batches else "a single sequence of ")
        row(lengths, lambda value, i: f"{value:,.0f}" + (" tokens" if i == 0 else ""))
    return [Sentence("fits", [part for part in parts if part] + ["."],
                     [(cell.spec, "tokens that fit", found, None, None) for cell, found, _ in chosen],
                     [(cell.spec, cell) for cell, _, _ in fitting if cell not in [row[0] for row in chosen]])], ""


def fewer_bytes(cell, plain):
    dense = plain.get((cell.context, cell.batch))
    if not dense or not bytes_per_token(dense) or not bytes_per_token(cell):
        return ""
    return f"{bytes_per_token(dense) / bytes_per_token(cell):.1f} times fewer bytes"


def set_sentences(judged, plain, speeds):
    """What to set: the fewest bits that are free or next to that, the fewest within LITTLE, the fastest of both, and the
    best of each engine. `speeds`: spec -> Compared at the longest context of the smallest batch."""
    ranked = sorted((one for one in judged if one.grade is not None and bits_of(one.cell) is not None), key=by_bits)
    fine = [one for one in ranked if one.grade <= SMALL]
    said = []

    def say(parts, numbers):
        said.append(Sentence("set", [part for part in [*parts, "."] if part], numbers))

    def add(one, head, tail):
        facts = [f"proof: {proof(one)}", fewer_bytes(one.cell, plain)]
        row = speeds.get(one.cell.spec)
        if row and row.word:
            verb = {FASTER: "decodes faster", LEVEL: "decodes as fast", SLOWER: "decodes slower"}[row.word]
            facts.append(verb + gain_text(row, f" at {context_label(row.cell.context)}"))
        say([head, (one.cell.spec, one.cell), aside(bits_text(one.cell), meaning(one.cell), between="; "),
             tail + "; " + "; ".join(filter(None, facts))], rests_on(one))

    best = next((one for grade in (FREE, NEARLY) for one in ranked if one.grade == grade), None)
    if best:
        cost = "nothing that can be measured" if best.grade == FREE else "next to nothing"
        add(best, "Set ", f": the fewest bits that cost {cost}")
    small = next((one for one in ranked if one.grade <= SMALL), None)
    if small and (best is None or by_bits(small)[0] < by_bits(best)[0]):
        add(small, "For fewer bits set " if best else "Set ", f": the fewest within {LITTLE:g} nats")
    if not fine and any(one.kld and one.kld.known for one in ranked):
        least = min(ranked, key=by_damage)
        say([f"Nothing here is certain to cost less than {LITTLE:g} nats; the least is ", (least.cell.spec, least.cell),
             aside(bits_text(least.cell)), f": {proof(least)}"], rests_on(least))
    timed = sorted((row for one in fine if (row := speeds.get(one.cell.spec)) and row.word),
                   key=lambda row: -row.gain.value)
    timed = [row for row in timed if (row.cell.context, row.cell.batch) == (timed[0].cell.context, timed[0].cell.batch)]
    if len(timed) > 1 and timed[0].gain.low > timed[1].gain.high:
        cell, gain = timed[0].cell, timed[0].gain
        say(["The fastest of these is ", (cell.spec, cell), gain_text(timed[0])],
            [(cell.spec, "gain of speed", gain.value, gain.low, gain.high)])
    engines = {}
    for one in ranked:
        row = preset_of(one.cell)
        if row:
            engines.setdefault(row[0], []).append(one)
    good = {engine: one for engine, of in engines.items() if (one := next((one for one in of if one in fine), None))}
    if len(engines) > 1 and good:
        parts = []
        for engine, one in sorted(good.items(), key=lambda item: by_bits(item[1])):
            given = "" if one in (best, small) else re.sub(r"` .*", "`", flags(preset_of(one.cell)))
            parts += ["; " if parts else "", engine + " ", (one.cell.spec, one.cell),
                      aside(bits_text(one.cell), given, between=": ")]
        without = [engine for engine in engines if engine not in good]
        say([f"By engine, the fewest bits within {LITTLE:g} nats: ", *parts,
             f"; nothing of {listed(without)}" if without else ""], [rests_on(one)[0] for one in good.values()])
    return said


def cannot(topic, rows, reason, total, points=""):
    """rows: cells."""
    if len(rows) == total and total > 1:
        parts, rest = [f"{topic}: "], [(cell.spec, cell) for cell in rows]
    else:
        listed_, rest = names(rows)
        parts = [f"{topic} of "] + listed_ + [": "]
    return Sentence("cannot", parts + [reason + points], [], rest)


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
        named, rest = names(list(of.values()))
        said.append(Sentence("cannot", ["whether answers change with ", *named, ": " + "; ".join(
            f"{word} in {listed(list(tasks)[:NAMED])}" for word, tasks in silent.items())], [], rest))
    if any(one.grade is not None for one in judged) and all(bits_of(one.cell) is None for one in judged):
        said.append(cannot("what to set", [one.cell for one in judged], "bits were not measured (kv_size)", len(judged)))
    return said


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
    speeds = {}
    spoken, reasons = speed_sentences(specs, plain, batches)
    for spec, of in specs.items():
        rows = [row for cell in sorted(of, key=lambda cell: (-cell.batch, cell.context))
                if (row := compare(cell, plain.get((cell.context, cell.batch)), decode_key(cell)))]
        if rows:
            speeds[spec] = rows[-1]
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
    types = {(facts.get("dtype"), kv_dtype(facts, first.model)): None for facts in (
        file.facts for cell in cells for file in cell.files)}
    types = [" with KV in ".join(dict.fromkeys(filter(None, both))) for both in types]
    contexts = [context_label(context) for context in sorted({cell.context for cell in cells})]
    return Verdict(model_name(first.model), [
        first.backend, f"on {first.device}" if first.device != "?" else "", listed(types or [""]),
        f"context {contexts[0]}" if len(contexts) == 1 else f"contexts {contexts[0]} to {contexts[-1]}", first.run],
        sentences)


def speaks(cell):
    """Whether it has something to judge: single kernels and distributions have not."""
    return any(not name.startswith(("kernel_", "distribution", "sensitivity")) for name in
               [*cell.values, *(name for name, reason in cell.skipped.items() if "nothing is encoded" not in reason)])


def verdicts(results, cells=None):
    """Every Verdict, the largest run's first; what several cannot say alike is said once, by a last one."""
    cells = results.current() if cells is None else cells
    groups = {}
    for cell in cells:
        if speaks(cell):
            groups.setdefault((cell.run, cell.device, cell.model, cell.backend), []).append(cell)
    of_items = {}
    for row in tables.item_pairs(results):
        measurement, model, backend, spec, context, batch = row.cell.split("/")
        of_items.setdefault((row.run, model, backend, spec, int(context[4:]), int(batch[6:])), []).append(row)
    pairs = {id(cell): of_items.get((cell.run, cell.model, cell.backend, cell.spec, cell.context, cell.batch), [])
             for cell in cells}
    runs = results.runs()
    order = sorted(groups, key=lambda key: (runs.index(key[0]) if key[0] in runs else 0, model_name(key[2]), key[3]))
    found = [verdict_of(results, groups[key], pairs) for key in order]
    found = hoisted([verdict for verdict in found if verdict and verdict.sentences])
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
                common[sentence.text].rest += [(cell.spec, cell) for cell in sentence.cells]
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


def markdown(results, cells=None, width=100):
    """The sentences as lists; nothing where nothing is quantized."""
    lines = []
    for verdict in verdicts(results, cells):
        rows = as_items(verdict)
        if rows:
            lines += ["", verdict.title + ":", ""]
            for text, _ in rows:
                lines += textwrap.wrap(text, width, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                                       break_on_hyphens=False)
    return "\n".join(lines) + "\n" if lines else ""
