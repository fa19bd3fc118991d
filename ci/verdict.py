"""What numbers let one say of a scheme: what it does to the answers, how fast it is, what fits. All rules stand here; what
they find, sentences.py puts into words.

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
import re
from dataclasses import dataclass, field, replace

from results import HEADROOM, kv_dtype

# ---- thresholds; LEAST_SHARE and HEADROOM, which items share, stand in results.py

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
LEAST_RUNS = 3
# kvqbench measures until a median is known to 1 %.
SPEED_MARGIN = 0.01

FREE, NEARLY, SMALL, COSTS, BREAKS = range(5)


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
    return replace(worst, why=why, task=shown.task, task_is_text=shown.task_is_text,
                   tasks=[task for judged in every for task in judged.tasks])


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
    file = cell.files[-1]
    wrong = ("throttled" if cell[measurement + ".throttled"] and not (capped(cell) and capped(plain)) else
             "disturbed" if cell[measurement + ".disturbed"] else
             "shared GPU" if cell[measurement + ".foreign_processes"] else
             "more memory than the device has" if cell["memory.vram_overflow"] else
             "busy machine" if cell[measurement + ".disturbed"] is None and file.busy and
             not (file.facts.get("gpu") or file.facts.get("gpu_name")) else "")
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

    @property
    def number(self):
        """What a sentence about it rests on."""
        return self.cell.spec, "gain of speed", self.gain.value, self.gain.low, self.gain.high


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


def compare_all(cells, plain, key):
    """Of those that were timed, the smallest batch last, and of that the longest context; `plain`: (context, batch) -> cell,
    `key`: of a cell."""
    return [row for cell in sorted(cells, key=lambda cell: (-cell.batch, cell.context))
            if (row := compare(cell, plain.get((cell.context, cell.batch)), key(cell)))]


def decode_key(cell):
    """kvqbench's time of a step; what other programs say has no spread."""
    return "decode.ms_per_token" if cell["decode.ms_per_token"] is not None else "decode.decode_ms"


# ---- what fits

def room(cell):
    """(tokens of one sequence, what they rest on) or (None, why not)."""
    if cell["capacity.longest_context"] is not None:
        if 0 in (cell["capacity.fits_at_limit"], cell["capacity.batch_fits_at_limit"]):
            return None, "a run at the limit that was predicted did not fit"
        return cell["capacity.longest_context"], "measured"
    total, reserved = cell["memory.vram_total_bytes"], cell["memory.vram_reserved_bytes"]
    if total is None or reserved is None:
        return None, ("the device's memory is not in the results" if cell["memory.rss_peak_bytes"] else "memory was not measured")
    if cell["memory.beyond_weights_bytes"] is None:
        return None, "peaks of this protocol hold several caches"
    each, held = bytes_per_token(cell), cell["memory.kv_bytes_allocated"]
    if not each or held is None:
        return None, "bytes of the cache were not measured"
    return (total - (reserved - held)) / each, "by bytes alone"
