"""Is NEW slower than OLD? Statistics of times on machines that drift, and that others use too.

The unit is a block of four processes, OLD NEW NEW OLD or NEW OLD OLD NEW, which of the two a seeded coin decides. A
process has one time a cell (kvqbench's median over --runs, or its least), a block one number: the mean of the log times
of NEW less that of OLD. A drift that is linear over a block cancels in it; a burst of other work spoils one block.

estimate   the Hodges-Lehmann estimator of the blocks' log-ratios, the median of the means of all pairs: up to 29 % of
           the blocks may be anything (Hodges & Lehmann 1963, Ann. Math. Stat. 34:598).
p          the signed-rank test (Wilcoxon 1945, Biometrics Bulletin 1:80), two-sided, by its exact distribution with
           ties as they are. For equal builds a block's number may as well have the other sign, because the coin said
           which process is whose: so p holds whatever the noise is, drift, bursts, few blocks (randomization test:
           Fisher 1935, The Design of Experiments; Edgington & Onghena 2007, Randomization Tests).
interval   95 %, bootstrap of the estimate over blocks, seeded, percentiles widened for few blocks as in Hesterberg
           2015, Am. Stat. 69:371 ("expanded percentile"). It decides when times are the same, and is shown.
cells      Benjamini & Hochberg 1995, J. R. Stat. Soc. B 57:289: of the cells called FASTER or SLOWER at most RATE are
           expected to be wrong, in their direction, too (Benjamini & Yekutieli 2005, J. Am. Stat. Assoc. 100:71).
looks      a batch is looked at LOOKS times at most, with twice the blocks each time; each look has RATE / LOOKS
           (Bonferroni), so that looking again costs nothing of the promise.

SLOWER, FASTER   p after correction is at most RATE / LOOKS, and the estimate is beyond the floor
SAME             the interval lies within the floor, both ways
UNSURE           anything else: more blocks are measured
A first batch that says SLOWER is repeated with a second, independent one for these cells; only what is SLOWER in both
fails. For one build compared with itself each batch says so with probability RATE / 2 at most, both with (RATE / 2)^2.
"""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist, median

RATE = 0.05     # false discovery rate
LOOKS = 3
FLOOR = 0.03    # effects up to this share are nobody's concern; of two builds, code placement alone makes 1 to 2 %
RESAMPLES = 1000
LEAST_BLOCKS = 5  # ten processes each


@dataclass
class Estimate:
    verdict: str      # SAME, FASTER, SLOWER, UNSURE
    ratio: float      # NEW over OLD
    low: float
    high: float
    p: float          # two-sided, of this cell alone
    p_adjusted: float
    blocks: int


def log_ratio(old, new):
    """The number of a block: its times of OLD and of NEW, two each."""
    return sum(map(math.log, new)) / len(new) - sum(map(math.log, old)) / len(old)


def hodges_lehmann(values):
    return median((values[i] + values[j]) / 2 for i in range(len(values)) for j in range(i + 1))


def midranks(values):
    """Twice the ranks, so that those of ties are whole, too."""
    order = sorted(values)
    first, last = {}, {}
    for i, value in enumerate(order, 1):
        first.setdefault(value, i)
        last[value] = i
    return [first[value] + last[value] for value in values]


def two_sided(counts, observed):
    """Two-sided p of an outcome, from how many of the equally likely cases have which outcome."""
    total = sum(counts.values())
    at_most = sum(count for value, count in counts.items() if value <= observed)
    at_least = sum(count for value, count in counts.items() if value >= observed)
    return min(1.0, 2 * min(at_most, at_least) / total)


def signed_rank(values):
    """Two-sided p of the signed-rank test, exact; zeros say nothing and are left out, as Wilcoxon did."""
    values = [value for value in values if value != 0]
    ranks = midranks([abs(value) for value in values])
    counts = {0: 1}
    for rank in ranks:
        grown = dict(counts)
        for value, count in counts.items():
            grown[value + rank] = grown.get(value + rank, 0) + count
        counts = grown
    return two_sided(counts, sum(rank for rank, value in zip(ranks, values) if value > 0))


def rank_sum(old, new):
    """Two-sided p of the rank-sum test (Mann & Whitney 1947, Ann. Math. Stat. 18:50), exact, ties as they are."""
    ranks = midranks(old + new)
    counts = {(0, 0): 1}  # (how many taken, their sum)
    for rank in ranks:
        for (taken, total), count in list(counts.items()):
            if taken < len(new):
                key = (taken + 1, total + rank)
                counts[key] = counts.get(key, 0) + count
    return two_sided({total: count for (taken, total), count in counts.items() if taken == len(new)},
                     sum(ranks[len(old):]))


def student_t_cdf(t, degrees):
    """Of Student's t with whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine2, term, total = math.cos(theta) ** 2, 1.0, 0.0
    for k in range(degrees % 2, degrees - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine2
    if degrees % 2:
        inside = 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    else:
        inside = math.sin(theta) * total
    return (1 + inside) / 2


def student_t_quantile(p, degrees):
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def expanded_level(n, level=0.95):
    """The share of bootstrap estimates below the lower end, widened for n values."""
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_t_quantile((1 + level) / 2, n - 1))


def percentiles(estimates, share):
    """The ends that `share` of the estimates lie beyond, on each side."""
    ordered = sorted(estimates)
    place = max(0, math.floor(share * (len(ordered) + 1)) - 1)
    return ordered[place], ordered[-1 - place]


def bootstrap(values, estimator=hodges_lehmann, seed=42, resamples=RESAMPLES):
    """The interval of an estimate over values, resampled with replacement."""
    chance = random.Random(seed)
    return percentiles([estimator(chance.choices(values, k=len(values))) for _ in range(resamples)],
                       expanded_level(len(values)))


def benjamini_hochberg(ps):
    """Adjusted p values, in the order given."""
    adjusted, least = [0.0] * len(ps), 1.0
    for rank, i in sorted(enumerate(sorted(range(len(ps)), key=ps.__getitem__), 1), reverse=True):
        least = min(least, ps[i] * len(ps) / rank)
        adjusted[i] = least
    return adjusted


def blocks_wanted(cells, looks=LOOKS, rate=RATE):
    """The fewest blocks with which one cell of so many can be found to differ: p is 2^(1 - blocks) at best."""
    return max(LEAST_BLOCKS, 1 + math.ceil(math.log2(cells * looks / rate)))


def verdict_of(estimate, interval, p_adjusted, floor, level):
    limit = math.log1p(floor)
    if p_adjusted <= level and abs(estimate) > limit:
        return "SLOWER" if estimate > 0 else "FASTER"
    return "SAME" if -limit < interval[0] and interval[1] < limit else "UNSURE"


def judge(ratios, floor=FLOOR, seed=42, level=RATE / LOOKS):
    """{cell: Estimate} of {cell: log-ratios of its blocks}."""
    adjusted = dict(zip(ratios, benjamini_hochberg([signed_rank(values) for values in ratios.values()])))
    found = {}
    for cell, values in ratios.items():
        estimate, (low, high) = hodges_lehmann(values), bootstrap(values, seed=seed)
        found[cell] = Estimate(verdict_of(estimate, (low, high), adjusted[cell], floor, level), math.exp(estimate),
                               math.exp(low), math.exp(high), signed_rank(values), adjusted[cell], len(values))
    return found


def judge_repetitions(times, floor=FLOOR, seed=42):
    """{cell: Estimate} of {cell: (times of OLD, times of NEW)} that were not interleaved: rank-sum test and bootstrap of
    the log-ratio of medians. What changed on the machine between the two is in it, too."""
    adjusted = dict(zip(times, benjamini_hochberg([rank_sum(old, new) for old, new in times.values()])))
    found = {}
    for cell, (old, new) in times.items():
        chance = random.Random(seed)
        draws = [math.log(median(chance.choices(new, k=len(new))) / median(chance.choices(old, k=len(old))))
                 for _ in range(RESAMPLES)]
        estimate = math.log(median(new) / median(old))
        low, high = percentiles(draws, expanded_level(min(len(old), len(new))))
        found[cell] = Estimate(verdict_of(estimate, (low, high), adjusted[cell], floor, RATE), math.exp(estimate),
                               math.exp(low), math.exp(high), rank_sum(old, new), adjusted[cell], len(new))
    return found


def settle(cells, measure, floor=FLOOR, seed=42, blocks=None, looks=LOOKS):
    """One batch: measures blocks until each cell has a verdict or has been looked at `looks` times.

    measure(cells, blocks) returns {cell: log-ratios} of so many new blocks. Every look judges all cells, those that have
    their verdict with what they had: the correction is for all of them. A verdict stands once given.
    """
    ratios, found = {cell: [] for cell in cells}, {}
    wanted = blocks or blocks_wanted(len(cells), looks)
    open_cells = list(cells)
    for _ in range(looks):
        for cell, values in measure(open_cells, wanted).items():
            ratios[cell] += values
        for cell, estimate in judge(ratios, floor, seed, RATE / looks).items():
            if cell in open_cells:
                found[cell] = estimate
        open_cells = [cell for cell in open_cells if found[cell].verdict == "UNSURE"]
        if not open_cells:
            break
        wanted = len(ratios[open_cells[0]])
    return found


def gate(cells, measure, floor=FLOOR, seed=42, blocks=None, looks=LOOKS):
    """{cell: (first, second or None)}: Estimates of the first batch, and of the second where the first says SLOWER."""
    first = settle(cells, measure, floor, seed, blocks, looks)
    slower = [cell for cell in cells if first[cell].verdict == "SLOWER"]
    second = settle(slower, measure, floor, seed + 1, blocks, looks) if slower else {}
    return {cell: (first[cell], second.get(cell)) for cell in cells}


def final_verdict(first, second):
    """What both batches say: SLOWER only if both do."""
    return "UNSURE" if second and second.verdict != "SLOWER" else first.verdict
