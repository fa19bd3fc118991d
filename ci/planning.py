"""Which scheme each layer's keys and values should have: the arithmetic of ci/plan, without its measuring.

A *site* is the keys or the values of one layer: site 2 l is layer l's keys, 2 l + 1 its values. What encoding a site costs
is the KL divergence of the model's logits when it alone is encoded, s (measurement `sensitivity`, parts k and v).

What all sites cost together is not simply the sum. To second order the divergence is a quadratic form of the errors that
reach the logits, whose amplitudes are sqrt(s); with one correlation r for all pairs

    KLD = sum_i s_i + sum_{i != j} r sqrt(s_i s_j) = (1 - r) sum_i s_i + r (sum_i sqrt(s_i))^2.

r comes from what uniform schemes cost as a whole, then from the plan itself. One choice a site under a budget of bytes is an
integer program, whose square is convex in one linear form: it is solved exactly, by tangents to the square, with HiGHS
(scipy.optimize.milp).

Correlations of single sites, fitted to what a plan costs without each of them (parts without-k and without-v), were tried
(ci/plan of 8c64f7f): on SmolLM2 the plan they led to was predicted 15 % too cheap, where one correlation is 4 % off, and cost
0.0265 nats where the plan before them costs 0.0256.
"""

import math
import re
from dataclasses import dataclass

import numpy
from scipy import optimize, sparse

from specs import pair_text

NEAR = 1e-9  # relative: solutions this close are the same


class Refused(Exception):
    """What cannot be planned, and why."""


@dataclass
class Costs:
    """What every candidate costs at every site, [sites, candidates]."""
    candidates: list            # names of schemes, as `exl3-4`
    kld: numpy.ndarray          # nats a token, alone
    bytes: numpy.ndarray        # whole numbers: of the site's tokens at the context that is planned for
    correlation: float = 0.0    # of errors of two sites
    scale: float = 1.0          # of the prediction, where no correlation from 0 to 1 explains what was found

    def __post_init__(self):
        self.kld = numpy.maximum(numpy.asarray(self.kld, float), 0)
        self.bytes = numpy.rint(self.bytes).astype(numpy.int64)

    @property
    def sites(self):
        return len(self.kld)

    def of(self, table, choice):
        return table[numpy.arange(self.sites), choice]

    def alone(self, choice):
        """The sum of what the sites cost alone."""
        return float(self.of(self.kld, choice).sum())

    def predict(self, choice):
        together = float(numpy.sqrt(self.of(self.kld, choice)).sum()**2)
        return self.scale * ((1 - self.correlation) * self.alone(choice) + self.correlation * together)

    def size(self, choice):
        return int(self.of(self.bytes, choice).sum())

    # ---- how errors add up

    def correlation_of(self, choice, kld):
        """The correlation under which a choice costs what was found, or None where its errors cannot have one."""
        alone, together = self.alone(choice), float(numpy.sqrt(self.of(self.kld, choice)).sum()**2)
        return (kld - alone) / (together - alone) if together > alone * (1 + NEAR) else None

    def fit_uniform(self, measured):
        """From [(choice, its divergence)]: the median of what each says. Those beyond half a nat are left out, where
        nothing is of second order, unless there are no others."""
        found = [self.correlation_of(*pair) for pair in [pair for pair in measured if pair[1] < 0.5] or measured]
        found = [value for value in found if value is not None]
        self.correlation, self.scale = (float(numpy.clip(numpy.median(found), 0, 1)) if found else 0.0), 1.0

    def fit_at(self, choice, kld):
        """So that a choice costs what was found."""
        found = self.correlation_of(choice, kld)
        self.correlation, self.scale = 0.0 if found is None else float(numpy.clip(found, 0, 1)), 1.0
        self.scale = kld / self.predict(choice) if self.predict(choice) > 0 else 1.0

    # ---- the best choice

    def solve(self, limit=None, kld=None):
        """The choice of least predicted divergence within `limit` bytes; or, given `kld`, that of fewest bytes which is
        predicted to cost no more than so many nats. Throws Refused where there is none."""
        sites, count = self.kld.shape
        unit = max(1, int(numpy.gcd.reduce(self.bytes.ravel())))
        size = (self.bytes // unit).astype(float).ravel()
        scale = max(float(numpy.median(self.kld, axis=1).sum()), 1e-30)  # the solver's tolerances are absolute
        linear = ((1 - self.correlation) * self.kld / scale).ravel()
        root = numpy.sqrt(self.correlation * self.kld / scale).ravel()
        # A variable a site and candidate, and the square of the second sum.
        constraints = [optimize.LinearConstraint(sparse.hstack(
            [sparse.kron(sparse.eye(sites), numpy.ones((1, count))), sparse.csr_matrix((sites, 1))]), 1, 1)]
        if limit is not None:  # between whole numbers, so that no tolerance lets one more in
            constraints.append(optimize.LinearConstraint(numpy.append(size, 0)[None], -numpy.inf,
                                                         math.floor(limit / unit) + 0.5))
        if kld is not None:
            constraints.append(optimize.LinearConstraint(numpy.append(linear, 1)[None], -numpy.inf, kld / scale / self.scale))
        upper = numpy.append(numpy.ones(sites * count), numpy.inf)
        for _ in range(200):
            solved = optimize.milp(numpy.append(size, 0) if kld is not None else numpy.append(linear, 1),
                                   constraints=constraints, integrality=numpy.append(numpy.ones(sites * count), 0),
                                   bounds=optimize.Bounds(0, upper), options={"mip_rel_gap": 0})
            if solved.x is None:
                raise Refused("no choice of these candidates fits")
            choice = solved.x[:-1].reshape(sites, count).argmax(1)
            at = float(root.reshape(sites, count)[numpy.arange(sites), choice].sum())
            if at * at <= solved.x[-1] + 1e-6 * max(1.0, at * at):
                break
            # The square lies above its tangent here: z >= at^2 + 2 at (B - at).
            constraints.append(optimize.LinearConstraint(numpy.append(-2 * at * root, 1)[None], -at * at, numpy.inf))
        else:
            raise Refused("the solver did not settle")
        # Of those with so few bytes, the one that costs least.
        return choice if kld is None else self.solve(limit=self.size(choice))


# ---- plans as specs

def spec_of(pairs, frame, latent=False):
    """The spec that gives layer l the schemes pairs[l] (keys, values), in a frame of other keys as `@residual=0`: the pair
    of most layers first, the others as @layers."""
    common = max(dict.fromkeys(pairs), key=pairs.count)
    text, first = pair_text(common, latent) + frame, 0
    for last in range(len(pairs)):
        if last + 1 == len(pairs) or pairs[last + 1] != pairs[first]:
            if pairs[first] != common:
                text += f"@layers={first}-{last}:{pair_text(pairs[first], latent)}"
            first = last + 1
    return text


def pairs_of(names):
    """Sites' schemes as pairs of keys and values, a layer each."""
    return list(zip(names[::2], names[1::2]))


# ---- what else people do with as many bytes: baselines, each a choice or None where nothing of the kind fits

def keys_first(costs, limit):
    """One candidate for all keys and one for all values, never fewer bytes for keys than for values (KV-AdaQuant,
    arXiv:2502.15075): that which is predicted to cost least."""
    found = []
    for k in range(len(costs.candidates)):
        for v in range(len(costs.candidates)):
            choice = numpy.array([k, v] * (costs.sites // 2))
            if costs.bytes[0, k] >= costs.bytes[1, v] and costs.size(choice) <= limit:
                found.append(choice)
    return min(found, key=costs.predict, default=None)


def ends_first(costs, limit, ends=2):
    """The first and last two layers by the candidate that costs least, the others uniform by one that still fits (vLLM's
    and the forks' boundary protection)."""
    best = int(costs.kld.sum(axis=0).argmin())
    edge = numpy.zeros(costs.sites, bool)
    edge[:2 * ends] = edge[-2 * ends:] = True
    found = [numpy.where(edge, best, c) for c in range(len(costs.candidates))]
    return min((choice for choice in found if costs.size(choice) <= limit), key=costs.predict, default=None)


def kvtuner(costs, bits, attention, limit):
    """KVTuner's rule (arXiv:2502.04420): a pair of 8, 4 or 2 bits for each layer, none of more bits for values than 8 for
    keys' 4, by what it does to the layer's own attention, and not to the model; scales are not counted, so the cap on bits
    is the largest whose real bytes fit. `bits`: of each candidate's codes; `attention`: [sites, candidates], nmse of
    attention's output. Its search (NSGA-II) is replaced by the exact one. None where the candidates lack 8, 4 or 2 bits."""
    named = {b: [c for c in range(len(bits)) if bits[c] == b] for b in (8, 4, 2)}
    if not all(named.values()):
        return None
    of = {b: min(found, key=lambda c: costs.kld[:, c].sum()) for b, found in named.items()}
    pairs = [(8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (2, 4), (2, 2)]
    layers = costs.sites // 2
    error = numpy.array([[attention[2 * layer, of[k]] + attention[2 * layer + 1, of[v]] for k, v in pairs]
                         for layer in range(layers)])
    best = None
    for cap in sorted({(k + v) * n for k, v in pairs for n in range(1, layers + 1)}):  # bits of all layers, half of them
        one = sparse.kron(sparse.eye(layers), numpy.ones((1, len(pairs))))
        weight = numpy.tile([k + v for k, v in pairs], layers)[None]
        solved = optimize.milp(error.ravel() / max(error.max(), 1e-30), constraints=[
            optimize.LinearConstraint(one, 1, 1), optimize.LinearConstraint(weight, -numpy.inf, cap + 0.5)],
            integrality=numpy.ones(error.size), bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 0})
        if solved.x is None:
            continue
        picked = [pairs[i] for i in solved.x.reshape(layers, -1).argmax(1)]
        choice = numpy.array([of[b] for pair in picked for b in pair])
        if costs.size(choice) > limit:
            break
        best = choice
    return best


# ---- words

def budget(text):
    """What --budget says: ('bits', 4.5), or ('bytes', 8 GiB, context). Throws Refused."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)bits", text)
    if found and 0 < float(found[1]) <= 32:
        return "bits", float(found[1]), None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]i?B)@(\d+)", text)
    if found and float(found[1]) > 0 and int(found[3]) > 1:
        unit = {"K": 1, "M": 2, "G": 3}[found[2][0]]
        return "bytes", int(float(found[1]) * (1024 if "i" in found[2] else 1000)**unit), int(found[3])
    raise Refused(f"--budget: BITSbits or SIZE@CONTEXT, as 4.5bits or 8GiB@32768, not '{text}'")
