"""Paired statistics of two specs on the same items: what a cache changed, item by item, and how sure that is.

An item is a line of FILE.json.samples.jsonl (accuracy/samples.h). Two cells are compared on `right` (0, 1 or a share),
`nll`, `margin` and other numbers of their items; the same items, with the same prompts, must be in both.

Items that share a cluster are not independent: wherever a cluster has several, everything below is over clusters.

- Flips, of items that are right or wrong: right to wrong and wrong to right apart, and wrong answers that became other
  wrong ones. p is the exact McNemar test's (a two-sided binomial test of the flips), the interval Tango's score interval
  (1998, Stat. Med. 17:891), which means something without a flip, too.
- Shares and other numbers: the differences' t interval and the percentile bootstrap (10,000 resamples, seed kept); where
  they disagree, the wider end of both counts. p is the paired t test's.
- Clusters: t over clusters, the difference a ratio of sums (Miller 2024, arXiv:2411.00640: cluster-robust), and whole
  clusters are resampled; p is that t test's, for flips as well.
- Holm (1979) over all rows of a report.
- Detectable: the difference found with 80 % power at 5 %, 2.80 standard errors; of flips 2.80 sqrt(d / n), d their rate
  (of none: of 3 / n, which the rule of three says d is below).

The verdict is one of five, the first that holds:
  hardly encoded       less than LEAST_SHARE of what attention reads is encoded: the items say nothing of the scheme
  worse                the difference is to the worse, and Holm's p below 5 %
  no headroom          right or wrong, and the reference is right in fewer than 30 % or more than 95 % of the items
  equivalent within m  the 90 % interval lies within a margin that was declared before
  undecided            what is left; the 95 % interval says up to what it could be
"""

import json
import math
from dataclasses import dataclass, field

import numpy
from scipy import optimize, stats

from results import HEADROOM, LEAST_SHARE

RESAMPLES, SEED, LEVEL = 10000, 42, 0.05
POWER = 2.80  # of standard errors: 1.96 + 0.84
# What is compared: which way is better. The first three wherever items have them; of `drift` the others too.
BETTER = {"right": 1, "nll": -1, "margin": 1, "own_nll": -1, "repetition": -1}
# Declared before anything is looked at; nobody's numbers, so others can be said.
MARGINS = {"right": 0.01, "nll": 0.01, "margin": 0.05, "own_nll": 0.05, "repetition": 0.02}


class Refused(Exception):
    """Items that cannot be compared, and why."""


# ---- single numbers

def mcnemar(lost, won):
    """Exact two-sided p of so many flips either way."""
    return stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0


def tango(lost, won, n, level=0.95):
    """Score interval of the difference (won - lost) / n of paired rates."""
    z = stats.norm.ppf((1 + level) / 2)

    def score(delta):
        # The probability of a loss that is likeliest under this difference.
        a, b = 2 * n, -won - lost + (2 * n - won + lost) * delta
        p_lost = (math.sqrt(max(b * b + 4 * a * lost * delta * (1 - delta), 0.0)) - b) / (2 * a)
        variance = n * (2 * p_lost + delta * (1 - delta))
        distance = won - lost - n * delta
        return math.copysign(math.inf, distance) if variance <= 0 < abs(distance) else \
            0.0 if distance == 0 else distance / math.sqrt(variance)
    estimate, ends = (won - lost) / n, []
    for sign in (1, -1):
        edge = -sign * 1.0
        if estimate == edge:
            ends.append(edge)
        else:
            ends.append(optimize.brentq(lambda delta: score(delta) - sign * z, *sorted((edge + sign * 1e-12, estimate))))
    return tuple(ends)


def holm(ps):
    """Adjusted p values, in the order given."""
    adjusted, most = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = most
    return adjusted


def detectable(flip_rate, n):
    return POWER * math.sqrt(flip_rate / n)


def clustered(differences, clusters):
    """(sums of the differences, numbers of items) of every cluster."""
    order = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums, counts = numpy.zeros(len(order)), numpy.zeros(len(order))
    for value, name in zip(differences, clusters):
        sums[order[name]] += value
        counts[order[name]] += 1
    return sums, counts


def standard_error(sums, counts):
    """Of the mean over all items, sum(sums) / sum(counts): of a ratio, over clusters. With clusters of one item the
    sample's standard deviation over sqrt(n)."""
    k, n = len(sums), counts.sum()
    if k < 2:
        return math.nan
    rest = sums - counts * (sums.sum() / n)
    return math.sqrt((rest ** 2).sum() * k / (k - 1)) / n


def bootstrap(sums, counts, level=0.95, seed=SEED, resamples=RESAMPLES):
    """Percentile interval of the mean over all items, whole clusters resampled."""
    chance, means = numpy.random.default_rng(seed), numpy.empty(resamples)
    step = max(1, 4_000_000 // len(sums))
    for begin in range(0, resamples, step):
        drawn = chance.integers(0, len(sums), (min(step, resamples - begin), len(sums)))
        means[begin:begin + step] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return tuple(float(end) for end in numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


# ---- rows

@dataclass
class Pair:
    """One number of the items of two cells."""
    cell: str
    reference: str
    metric: str
    n: int
    clusters: int
    encoded_share: float | None
    score: float
    score_interval: tuple | None  # Wilson's, of rights and wrongs
    reference_score: float
    difference: float
    interval: tuple     # 95 %
    narrow: tuple       # 90 %
    t_interval: tuple
    bootstrap: tuple
    p: float
    detectable: float
    margin: float | None
    better: int
    lost: int | None = None   # right to wrong
    won: int | None = None
    other_wrong: int | None = None
    p_holm: float = 1.0
    seed: int = SEED
    resamples: int = RESAMPLES
    run: str = ""  # that the cell is of, where a report has several
    verdict: str = field(default="", init=False)

    def judge(self, least_share=LEAST_SHARE):
        harm = -self.better * self.difference
        if self.encoded_share is not None and self.encoded_share < least_share:
            self.verdict = "hardly encoded"
        elif harm > 0 and self.p_holm < LEVEL:
            self.verdict = "worse"
        elif self.lost is not None and not HEADROOM[0] <= self.reference_score <= HEADROOM[1]:
            self.verdict = "no headroom"
        elif self.margin is not None and -self.margin < self.narrow[0] and self.narrow[1] < self.margin:
            self.verdict = f"equivalent within {self.margin:g}"
        else:
            self.verdict = "undecided"

    HEADS = ["items of", "number", "n", "encoded %", "reference", "here", "difference [95 %]", "lost/won", "p", "p (Holm)",
             "detectable", "verdict"]

    def texts(self):
        """One row of the table."""
        percent = self.metric == "right"
        number = lambda value: "-" if not math.isfinite(value) else f"{100 * value:.1f} %" if percent else f"{value:.4f}"  # noqa: E731
        signed = lambda value: "-" if not math.isfinite(value) else f"{100 * value:+.1f}" if percent else f"{value:+.4f}"  # noqa: E731
        n = str(self.n) if self.clusters == self.n else f"{self.n} in {self.clusters}"
        return [self.cell, self.metric, n, "-" if self.encoded_share is None else f"{100 * self.encoded_share:.0f}",
                number(self.reference_score), number(self.score),
                f"{signed(self.difference)} [{signed(self.interval[0])}, {signed(self.interval[1])}]",
                "-" if self.lost is None else f"{self.lost}/{self.won}", f"{self.p:.2g}", f"{self.p_holm:.2g}",
                number(self.detectable), self.verdict]

    def as_json(self):
        def plain(value):
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value
        return {name: plain(value) for name, value in vars(self).items()}


def wider(*intervals):
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def pair(cell, reference, items, others, metric, margin=None, seed=SEED, resamples=RESAMPLES):
    """The Pair of a cell's items and those of its reference, both {sample: line}, or None where the metric is not
    there. Refused where they are not the same items."""
    if items.keys() != others.keys():
        missing = sorted(items.keys() ^ others.keys())
        raise Refused(f"{cell} and {reference} do not have the same items; only one has '{missing[0]}' "
                      f"({len(missing)} such)")
    for name, line in items.items():
        for same in ("prompt_sha256", "cluster"):
            if line.get(same) != others[name].get(same):
                raise Refused(f"{cell} and {reference}: item '{name}' has another {same} in each; they are not the same")
    names = [name for name in items if metric in items[name] and metric in others[name]]
    if not names:
        return None
    if len(names) != len(items):
        raise Refused(f"{cell}: {len(items) - len(names)} of {len(items)} items have no {metric}")
    new = numpy.array([items[name][metric] for name in names], float)
    old = numpy.array([others[name][metric] for name in names], float)
    n, better = len(names), BETTER.get(metric, 1)
    sums, counts = clustered(new - old, [items[name].get("cluster", name) for name in names])
    difference, error = float((new - old).mean()), standard_error(sums, counts)

    def by_t(level):
        if not error > 0:  # one cluster, or all differences the same
            return (difference, difference) if error == 0 else (-math.inf, math.inf)
        half = stats.t.ppf((1 + level) / 2, len(sums) - 1) * error
        return difference - half, difference + half

    p = 1.0
    if error > 0:
        p = float(2 * stats.t.sf(abs(difference) / error, len(sums) - 1))
    elif error == 0 and difference != 0:
        p = 0.0
    drawn = {level: bootstrap(sums, counts, level, seed, resamples) for level in (0.95, 0.90)}
    intervals = {level: wider(by_t(level), drawn[level]) for level in drawn}
    least_detectable = POWER * error if error >= 0 else math.inf
    shares = [line["encoded_share"] for line in items.values() if "encoded_share" in line]
    flips, score_interval = {}, None
    if metric == "right" and numpy.isin(new, (0, 1)).all() and numpy.isin(old, (0, 1)).all():
        lost, won = int((new < old).sum()), int((new > old).sum())
        flips = {"lost": lost, "won": won}
        if all("answer" in lines[name] for lines in (items, others) for name in names):
            flips["other_wrong"] = sum(items[name]["right"] == 0 == others[name]["right"]
                                       and items[name]["answer"] != others[name]["answer"] for name in names)
        if len(sums) == n:
            p = mcnemar(lost, won)
            intervals = {level: tango(lost, won, n, level) for level in intervals}
            least_detectable = detectable((lost + won or 3) / n, n)
            found = stats.binomtest(int(new.sum()), n).proportion_ci(method="wilson")
            score_interval = (found.low, found.high)
    return Pair(cell, reference, metric, n, len(sums), float(numpy.mean(shares)) if shares else None, float(new.mean()),
                score_interval, float(old.mean()), difference, intervals[0.95], intervals[0.90], by_t(0.95), drawn[0.95],
                p, least_detectable, margin, better, seed=seed, resamples=resamples, **flips)


def judge(pairs, least_share=LEAST_SHARE):
    """Holm over all of them, and their verdicts."""
    for row, adjusted in zip(pairs, holm([row.p for row in pairs])):
        row.p_holm = adjusted
        row.judge(least_share)
    return pairs


# ---- files

def path_of(path):
    """The items beside a results file, or the file of items itself."""
    return path if path.endswith(".jsonl") else path + ".samples.jsonl"


def read(path):
    """{benchmark: {sample: line}}"""
    found = {}
    try:
        with open(path_of(path), encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    benchmark, sample = line["benchmark"], line["sample"]
                    numbers = [value for name, value in line.items() if name in BETTER or name == "encoded_share"]
                    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
                        raise ValueError
                except (ValueError, TypeError, KeyError):
                    raise Refused(f"{path_of(path)}: line {number} is no item of kvqbench") from None
                if found.setdefault(benchmark, {}).setdefault(sample, line) is not line:
                    raise Refused(f"{path_of(path)}: line {number}: {benchmark} has '{sample}' twice")
    except OSError as error:
        raise Refused(f"{path_of(path)}: {error.strerror}; measurements with items write it beside --benchmark_out") from None
    except UnicodeDecodeError:
        raise Refused(f"{path_of(path)}: not UTF-8") from None
    return found


def parts(benchmark):
    """A cell's name in six."""
    names = benchmark.split("/")
    if len(names) != 6:
        raise Refused(f"'{benchmark}' is no benchmark of kvqbench")
    return names


def against_spec(cells, reference="none", margins=MARGINS, **how):
    """Every cell against the one of the spec `reference` that is otherwise the same."""
    pairs = []
    for cell, items in cells.items():
        names = parts(cell)
        if names[3] == reference:
            continue
        other = "/".join(names[:3] + [reference] + names[4:])
        if other not in cells:
            continue
        found = [pair(cell, other, items, cells[other], metric, margins.get(metric), **how) for metric in BETTER]
        pairs += [row for row in found if row]
    return pairs


def against_run(new, old, margins=MARGINS, **how):
    """Every cell against the one of the same name in another run."""
    return [row for cell in new if cell in old for metric in BETTER
            if (row := pair(cell, cell, new[cell], old[cell], metric, margins.get(metric), **how))]
