"""Results as one flat list of cells, whatever file they came from (reading.py reads them).

A cell is one model, backend, spec, context and batch size on one device in one run; a run is what one folder
holds. Its values are named as kvqbench names them, `<measurement>.<counter>`, in the same units, whatever the file
was: `decode.tokens_per_s`, `kv_size.kv_bytes`, `perplexity.kld_nats_lo`, `error.nmse_k/layer:3`. What was not
measured is not there.
"""

import functools
import math
import os
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
MIB = 2**20
# Of what attention read, or of a cache: where less is encoded numbers say nothing of the scheme; nor does a task of which the
# unquantized cache gets fewer or more answers right.
LEAST_SHARE, HEADROOM = 0.25, (0.30, 0.95)


@dataclass
class File:
    path: str          # relative to the folder that was given
    run: str
    kind: str          # benchmarks, v2, summary, distribution
    timestamp: str     # ISO, without a zone
    facts: dict        # what the run says of itself
    keys: set = field(default_factory=set)  # what it measured; see Results.mark_superseded
    superseded_by: str = ""
    items: dict = field(default_factory=dict)  # single items, of cells that have some: see items.read

    @property
    def busy(self):
        """What others did to the processors when the run began, in words; empty where that was little."""
        load, cores = self.facts.get("load_avg"), self.facts.get("num_cpus")
        return f"load {load[0]:.1f} on {cores} cores" if load and cores and load[0] > cores + 0.5 else ""


@dataclass
class Cell:
    run: str
    device: str
    model: str
    backend: str
    spec: str
    context: int
    batch: int
    values: dict = field(default_factory=dict)
    nulls: set = field(default_factory=set)      # names of what was measured and gave no number
    texts: dict = field(default_factory=dict)    # `<measurement>.<name>`: labels, answers
    skipped: dict = field(default_factory=dict)  # measurement: reason
    files: list = field(default_factory=list)    # of class File, oldest first

    def __getitem__(self, name):
        """The value, or None."""
        return self.values.get(name)

    @property
    def superseded(self):
        return all(file.superseded_by for file in self.files)

    @property
    def place(self):
        """As kvqbench names it, behind the measurement."""
        return f"{self.model}/{self.backend}/{self.spec}/ctx:{self.context}/batch:{self.batch}"

    @property
    def not_measured(self):
        """{measurement: reason}, but for those of what is encoded where nothing is to be."""
        return {measurement: reason for measurement, reason in self.skipped.items() if "nothing is encoded" not in reason}

    def hardly_encoded(self, measurement):
        """Why a measurement's numbers say nothing of the scheme: too little was encoded of what was read, or for kv_size of
        the cache; empty where they may, and of `none`, which is to encode nothing."""
        share, of = self[measurement + ".encoded_share"], "the cache" if measurement == "kv_size" else "what was read"
        hardly = share is not None and share < LEAST_SHARE and self.spec.split("@")[0] != "none"
        return f"hardly encoded, {100 * share:.0f} % of {of}" if hardly else ""

    def layers(self, name):
        """Values of `name/layer:0`, `name/layer:1`, ..., None where there is none."""
        found = {}
        for key, value in self.values.items():
            if key.startswith(name + "/layer:"):
                found[int(key.rsplit(":", 1)[1])] = value
        return [found.get(i) for i in range(max(found) + 1)] if found else []


class Results:
    def __init__(self):
        self.cells, self.files, self.shapes = [], [], {}  # shapes: model -> its config's facts
        self.refused = []  # (path, reason)
        self._index = {}

    def cell(self, file, device, model, backend, spec, context, batch=1):
        key = (file.run, device, model, backend, spec, int(context), int(batch))
        if key not in self._index:
            self._index[key] = Cell(*key)
            self.cells.append(self._index[key])
        cell = self._index[key]
        if file not in cell.files:
            cell.files.append(file)
        return cell

    def current(self):
        """The cells that no newer file measured again."""
        return [cell for cell in self.cells if not cell.superseded]

    def runs(self):
        """Names of the runs, the one with most current cells first."""
        count = {}
        for cell in self.current():
            count[cell.run] = count.get(cell.run, 0) + 1
        return sorted(count, key=lambda run: (-count[run], run))

    def of(self, run):
        return [cell for cell in self.current() if cell.run == run]

    def distribution(self, model):
        """The newest cell that has the distribution of the model's keys and values, those with histograms first."""
        found = [cell for cell in self.current() if cell.model == model and cell.layers("distribution.kurtosis_k")]
        return max(found, default=None, key=lambda cell: (bool(cell.layers("distribution.density_k")), cell.files[-1].timestamp))

    @functools.cached_property
    def pairs(self):
        """What items say of specs against `none`: an items.Pair a number and cell of all files that are not superseded, judged as
        one report."""
        runs, pairs = {}, []
        for file in self.files:  # oldest first
            if file.items and not file.superseded_by:
                runs.setdefault(file.run, {}).update(file.items)
        if not runs:
            return pairs
        import items  # wants scipy, which only those need who have items
        for run, cells in runs.items():
            try:
                found = items.against_spec(cells)
            except items.Refused as reason:
                self.refused.append((run, str(reason)))
                continue
            for row in found:
                row.run = run
            pairs += found
        return items.judge(pairs)

    def mark_superseded(self):
        """A file is superseded if a newer one has measured all that it has, on the same device."""
        for old in self.files:
            for new in self.files:
                if new.timestamp > old.timestamp and old.keys and old.keys <= new.keys:
                    old.superseded_by = new.path


def finite(value):
    """None for what is no number: JSON knows no NaN, and 0 would be a lie."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def put(cell, name, value):
    if isinstance(value, list):
        cell.values[name] = [finite(item) for item in value]
    elif finite(value) is not None:
        cell.values[name] = value
    else:
        cell.nulls.add(name)


def kv_dtype(facts, model):
    """What a model's dense tokens were stored in: what was computed in, before that could be another type."""
    return facts.get(f"kv_dtype {model}", facts.get("dtype"))


def types_of(facts, model):
    """What was computed in and what dense tokens were stored in, in words."""
    return " with KV in ".join(dict.fromkeys(filter(None, (facts.get("dtype"), kv_dtype(facts, model)))))


# ---- what follows from several cells

def decode_ms_per_token(cell):
    """Milliseconds of one decoding step, the study's without the prefill in its timer."""
    rate = cell["decode.tokens_per_s_net"] or cell["decode.tokens_per_s"]
    return 1e3 * cell.batch / rate if rate else None


def derive(results):
    """Bits per element where only bytes are known, and the context from which a spec decodes faster than `none`."""
    groups = {}
    for cell in results.cells:
        groups.setdefault((cell.run, cell.device, cell.model, cell.backend, cell.batch), {}).setdefault(
            cell.spec, {})[cell.context] = cell
    for specs in groups.values():
        plain = specs.get("none", {})
        for spec, cells in specs.items():
            for context, cell in cells.items():
                dense = plain.get(context)
                if cell["kv_size.bits_per_element"] is None and dense and dense["kv_size.kv_bytes"] \
                        and cell["kv_size.kv_bytes"]:  # the unquantized cache has 16 bits an element
                    put(cell, "kv_size.bits_per_element", 16 * cell["kv_size.kv_bytes"] / dense["kv_size.kv_bytes"])
            timed = {context: cell for context, cell in cells.items() if decode_ms_per_token(cell)}
            fit_latency(timed)
            if spec != "none":
                break_even(plain, timed)


def fit_latency(cells):
    """Sets decode.fit_base_ms and decode.fit_us_per_1k_tokens on cells of a spec, all of which decode: a and b of ms a
    token = a + b context, by least squares over three contexts or more; decode.fit_error is the share by which the line
    misses the worst of them."""
    points = [(context, decode_ms_per_token(cell)) for context, cell in cells.items()]
    if len(points) < 3:
        return
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    for cell in cells.values():
        put(cell, "decode.fit_base_ms", mean_y - slope * mean_x)
        put(cell, "decode.fit_us_per_1k_tokens", slope * 1e6)
        put(cell, "decode.fit_error", max(abs(mean_y + slope * (x - mean_x) - y) / y for x, y in points))


def break_even(plain, cells):
    """Sets decode.break_even_context on cells of a spec: the least context from which on it decodes at least as fast
    as the unquantized cache does, linear between measured contexts; nothing is said beyond them."""
    points = []
    for context in sorted(set(plain) & set(cells)):
        ours, theirs = decode_ms_per_token(cells[context]), decode_ms_per_token(plain[context])
        if ours and theirs:
            points.append((context, ours - theirs))
    if len(points) < 2:
        return
    if points[-1][1] > 0:
        text, value = f"> {points[-1][0]}", None
    else:
        at = len(points) - 1
        while at > 0 and points[at - 1][1] <= 0:
            at -= 1
        if at == 0:
            text, value = f"<= {points[0][0]}", points[0][0]
        else:
            (x0, y0), (x1, y1) = points[at - 1], points[at]
            value = round(x0 + (x1 - x0) * y0 / (y0 - y1))
            text = str(value)
    for cell in cells.values():
        cell.texts["decode.break_even"] = text
        if value is not None:
            put(cell, "decode.break_even_context", value)
