"""Reads results of every kind into one flat list of cells: kvqbench's benchmarks.json, and the reference study's
results (schema version 2.0), summaries, and distributions of keys and values.

A cell is one model, backend, spec, context and batch size on one device in one run; a run is what one folder
holds. Its values are named as kvqbench names them, `<measurement>.<counter>`, in the same units, whatever the file
was: `decode.tokens_per_s`, `kv_size.kv_bytes`, `perplexity.kld_nats_lo`, `error.nmse_k/layer:3`. What was not
measured is not there.
"""

import json
import math
import os
import re
from dataclasses import dataclass, field

import jsonschema

HERE = os.path.dirname(os.path.abspath(__file__))
NAME = re.compile(r"^(?P<measurement>[^/]+)/(?P<model>[^/]+)/(?P<backend>[^/]+)/(?P<spec>[^/]+)"
                  r"/ctx:(?P<context>\d+)/batch:(?P<batch>\d+)")
# What Google Benchmark says of a run beside its counters.
NO_COUNTERS = {"name", "family_index", "per_family_instance_index", "run_name", "run_type", "repetitions",
               "repetition_index", "threads", "iterations", "real_time", "cpu_time", "time_unit", "aggregate_name",
               "aggregate_unit", "label", "error_occurred", "error_message", "skipped", "skip_message", "elapsed_s"}
MIB = 2**20
# Less of what attention read, or of a cache, encoded: its numbers say nothing of the scheme.
LEAST_SHARE = 0.25
# The study's measurements[]: its name, ours, our unit over its unit. Factors are powers of two, so exact.
V2_VALUES = [
    ("prefill_ms", "prefill.prefill_ms", 1), ("prefill_tokens_per_sec", "prefill.tokens_per_s", 1),
    ("decode_ms", "decode.decode_ms", 1), ("decode_tokens", "decode.decode_tokens", 1),
    ("decode_tokens_per_sec", "decode.tokens_per_s", 1), ("vram_peak_mb", "memory.vram_peak_bytes", MIB),
    ("vram_reserved_mb", "memory.vram_reserved_bytes", MIB), ("kv_cache_mb", "kv_size.kv_bytes", MIB),
    ("quant_overhead_ms", "overhead.encode_ms", 1), ("dequant_overhead_ms", "overhead.decode_ms", 1),
    ("overhead_pct", "overhead.overhead_pct", 1), ("avg_power_watts", "power.watts", 1),
    ("energy_mj_per_token", "power.mj_per_token", 1), ("ctx_elapsed_s", "elapsed_s", 1),
    ("vram_overflow", "memory.vram_overflow", 1)]
SUMMARY_VALUES = [
    ("prefill_ms", "prefill.prefill_ms", 1), ("decode_tok_s", "decode.tokens_per_s", 1),
    ("kv_mb", "kv_size.kv_bytes", MIB), ("vram_peak_mb", "memory.vram_peak_bytes", MIB),
    ("vram_reserved_mb", "memory.vram_reserved_bytes", MIB), ("vram_overflow", "memory.vram_overflow", 1),
    ("ppl", "perplexity.ppl_reference", 1)]
DISTRIBUTION_VALUES = [
    ("mean", "mean"), ("std", "std"), ("min", "min"), ("max", "max"), ("kurtosis", "kurtosis"),
    ("outlier_ratio_3sigma", "beyond_3sigma"), ("outlier_ratio_6sigma", "beyond_6sigma"),
    ("dynamic_range", "max_over_mean"), ("per_channel_var", "per_channel_var"),
    ("per_token_var", "per_token_var"), ("variance_ratio", "var_ratio")]


class Refused(Exception):
    """A file that cannot be read as results, and why."""


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
        self.pairs = None  # of items: tables.item_pairs
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
        return max(found, default=None, key=lambda cell: (bool(cell.layers("distribution.density_k")),
                                                          cell.files[-1].timestamp))

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


def wilson(successes, trials):
    """95 % interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z, p = 1.959964, successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)


# ---- kvqbench

def kv_dtype(facts, model):
    """What a model's dense tokens were stored in: what was computed in, before that could be another type."""
    return facts.get(f"kv_dtype {model}", facts.get("dtype"))


def add_benchmarks(results, file, data):
    context = data["context"]
    device = context.get("gpu") or context.get("cpu") or context.get("device") or "?"
    file.facts = {key: value for key, value in context.items()
                  if key not in ("caches", "host_name", "library_build_type")}
    for key, value in context.items():
        if key.startswith("model_config "):
            try:
                results.shapes.setdefault(key[len("model_config "):], json.loads(value))
            except ValueError:
                raise Refused(f"context: '{key}' is not JSON") from None
    if not data["benchmarks"]:
        raise Refused("no benchmark in it")
    for run in data["benchmarks"]:
        # With repetitions, the median stands for them.
        if run.get("aggregate_name", "median") != "median":
            continue
        name = NAME.match(run["name"])
        measurement = name["measurement"]
        cell = results.cell(file, device, *(name[part] for part in ("model", "backend", "spec", "context", "batch")))
        file.keys.add((name[0], device, context.get("protocol"), context.get("dtype"), kv_dtype(context, name["model"])))
        if run.get("error_occurred") or run.get("skipped"):
            cell.skipped[measurement] = run.get("error_message") or run.get("skip_message") or "no reason given"
            continue
        if run.get("label"):
            cell.texts[measurement + ".label"] = run["label"]
        for key, value in run.items():
            if key not in NO_COUNTERS and isinstance(value, (int, float, list, type(None))):
                put(cell, f"{measurement}.{key}", value)


# ---- the reference study

def v2_spec(quant):
    if quant.get("spec"):  # schemes that the study's grammar has no words for
        return quant["spec"]
    if not quant["enabled"]:
        return "none"
    return f"int{quant['nbits']}-{quant['backend']}" + ("-kivi" if quant.get("asymmetric") else "")


def check_units(row):
    """Rates and times must say the same: a time in seconds would pass for one in milliseconds."""
    for tokens, ms, rate in ((row["context_len"], "prefill_ms", "prefill_tokens_per_sec"),
                             (row.get("decode_tokens"), "decode_ms", "decode_tokens_per_sec")):
        if tokens and row.get(ms) and row.get(rate) is not None:
            expected = 1e3 * tokens / row[ms]
            # Rates have two decimals, and the median of an even number of times is not that of their rates: on a
            # busy machine they are a few times apart. Another unit would be off by 60 or more.
            if not expected / 10 - 0.01 <= row[rate] <= 10 * expected + 0.01:
                raise Refused(f"context {row['context_len']}: {rate} is {row[rate]:g}, but {tokens} tokens in "
                              f"{ms} {row[ms]:g} are {expected:.4g} a second; are the units right?")


def add_v2(results, file, data):
    model, spec, backend = data["model"], v2_spec(data["kv_quant"]), data["attn_backend"]
    device = data["environment"].get("gpu_name") or data.get("hardware", {}).get("gpu_name") or "CPU"
    shape = data["model_config"]
    results.shapes.setdefault(model, {key: value for key, value in shape.items() if value is not None})
    file.facts = {**data["environment"], **data.get("hardware", {}), **data["config"],
                  "kv_quant": data["kv_quant"], "combo_elapsed_s": data.get("combo_elapsed_s"),
                  "experiment_id": data["experiment_id"]}
    tests = data["benchmarks"]
    needle = tests.get("needle_in_haystack", {}).get("per_context", {})
    contexts = [row["context_len"] for row in data["measurements"]]
    for row in data["measurements"]:
        check_units(row)
        cell = results.cell(file, device, model, backend, spec, row["context_len"])
        for name, ours, factor in V2_VALUES:
            value = row.get(name)
            # The study wrote 0 where it did not measure power.
            if value is not None and not (value == 0 and ours in ("power.watts", "power.mj_per_token")):
                put(cell, ours, value if isinstance(value, bool) else value * factor)
        for runs, ours in (("prefill_ms_runs", "prefill.prefill_ms"), ("decode_ms_runs", "decode.decode_ms")):
            if row.get(runs):
                put(cell, ours + "_min", min(row[runs]))
                put(cell, ours + "_max", max(row[runs]))
        if row.get("kv_cache_type"):
            cell.texts["kv_size.cache_type"] = row["kv_cache_type"]
        # The study's decode time has a whole prefill in it (study.md, section 5); that of kvqbench's files has not.
        if "spec" not in data["kv_quant"] and row.get("decode_ms") and row.get("prefill_ms") \
                and row["decode_ms"] > row["prefill_ms"]:
            put(cell, "decode.tokens_per_s_net",
                1e3 * row.get("decode_tokens", 0) / (row["decode_ms"] - row["prefill_ms"]))
        put(cell, "memory.vram_total_bytes", (data.get("hardware", {}).get("vram_total_mb") or math.nan) * MIB)
        for name, of in (("ppl_reference", "perplexity"), ("ppl", "perplexity_quantized")):
            if of in tests:
                put(cell, "perplexity." + name, tests[of]["value"])
                put(cell, "perplexity.window_tokens", tests[of]["tokens"])
        if spec == "none":
            put(cell, "perplexity.ppl", cell["perplexity.ppl_reference"])
        elif cell["perplexity.ppl"] is not None and cell["perplexity.ppl_reference"] is not None:
            # Both have four decimals.
            put(cell, "perplexity.delta_ppl", round(cell["perplexity.ppl"] - cell["perplexity.ppl_reference"], 4))
    for context, found in needle.items():
        cell = results.cell(file, device, model, backend, spec, context)
        low, high = wilson(found["successes"], found["trials"])
        for name, value in (("needle_rate", found["success_rate"]), ("needle_rate_lo", low), ("needle_rate_hi", high),
                            ("needle_trials", found["trials"])):
            put(cell, "needle." + name, value)
    for context in {*contexts, *map(int, needle)} if needle else ():
        put(results.cell(file, device, model, backend, spec, context), "needle.needle_rate_overall",
            tests["needle_in_haystack"]["success_rate"])
    for trial in tests.get("needle_in_haystack_trials", []):
        cell = results.cell(file, device, model, backend, spec, trial["context_length"])
        suffix = f"/depth:{int(100 * trial['depth_percent'] + 0.5)}"
        put(cell, "needle.needle" + suffix, int(trial["success"]))
        put(cell, "needle.prompt_tokens" + suffix, trial.get("input_tokens"))
        cell.texts["needle.answer" + suffix] = trial.get("generated_text") or ""
    # The study's windows are of one length, whatever the context: it is part of what was measured.
    measured = ["times"] + [f"{name} {tests[name]['tokens']}" for name in ("perplexity", "perplexity_quantized")
                            if name in tests]
    for context in contexts:
        file.keys |= {(f"{what}/{model}/{backend}/{spec}/ctx:{context}", device) for what in measured}
    file.keys |= {(f"needle/{model}/{backend}/{spec}/ctx:{context}", device) for context in needle}


def add_summary(results, file, data):
    """Only what no file of results has: a summary repeats the last context of each."""
    known = {os.path.basename(other.path) for other in results.files if other.kind in ("v2", "benchmarks")}
    file.facts = {"merged_from": data.get("merged_from", [])}
    for row in data["combinations"]:
        if row["json_file"] in known:
            continue
        spec = row["kv_quant"].replace("(kivi)", "-kivi").replace("fp16", "none")
        cell = results.cell(file, "?", data["model"], row["backend"], spec, row["ctx"])
        for name, ours, factor in SUMMARY_VALUES:
            if row.get(name) is not None:
                put(cell, ours, row[name] if isinstance(row[name], bool) else row[name] * factor)
        put(cell, "perplexity.ppl", row.get("ppl_quant") if spec != "none" else row.get("ppl"))
        put(cell, "perplexity.delta_ppl", row.get("ppl_delta"))
        file.keys.add((f"summary/{data['model']}/{row['backend']}/{spec}/ctx:{row['ctx']}", "?"))


def add_distribution(results, file, data):
    file.facts = dict(data["config"])
    tokens = data["config"]["max_tokens"]
    cell = results.cell(file, "?", data["model"], "sdpa", "none", tokens)
    file.keys.add((f"distribution/{data['model']}/ctx:{tokens}", "?"))
    if "histogram" in data["layers"][0]["key"]:
        file.keys.add((f"histogram/{data['model']}/ctx:{tokens}", "?"))
    for layer in data["layers"]:
        for side, name in (("key", "k"), ("value", "v")):
            suffix = f"_{name}/layer:{layer['layer']}"
            for theirs, ours in DISTRIBUTION_VALUES:
                put(cell, f"distribution.{ours}{suffix}", layer[side].get(theirs))
            if "histogram" in layer[side]:
                put(cell, f"distribution.density{suffix}", layer[side]["histogram"]["density"])
    for side, name in (("key", "k"), ("value", "v")):
        kurtosis = [layer[side]["kurtosis"] for layer in data["layers"]]
        put(cell, f"distribution.kurtosis_{name}_mean", sum(kurtosis) / len(kurtosis))
        put(cell, f"distribution.kurtosis_{name}_max", max(kurtosis))


# ---- files

READERS = {"benchmarks": add_benchmarks, "v2": add_v2, "summary": add_summary, "distribution": add_distribution}


def kind_of(data):
    if not isinstance(data, dict):
        raise Refused(f"a JSON {type(data).__name__}, no object")
    if "schema_version" in data:
        if data["schema_version"] != "2.0":
            raise Refused(f"schema_version {data['schema_version']!r}; this reads '2.0'")
        return "v2"
    for kind, members in (("benchmarks", ("context", "benchmarks")), ("summary", ("combinations",)),
                          ("distribution", ("layers", "summary"))):
        if all(member in data for member in members):
            return kind
    raise Refused("no kind of results known here (benchmarks.json, schema version 2.0, summary, distribution)")


_validators = {}


def validate(kind, data):
    if kind not in _validators:
        with open(os.path.join(HERE, "schema", kind + ".json"), encoding="utf-8") as file:
            _validators[kind] = jsonschema.Draft202012Validator(json.load(file))
    error = jsonschema.exceptions.best_match(_validators[kind].iter_errors(data))
    if error:
        message = error.message if len(error.message) < 160 else error.message[:157] + "..."
        raise Refused(f"{error.json_path.lstrip('$.') or 'the file'}: {message}".replace("\n", " "))


def read_json(path):
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise Refused("no regular file")
    if re.search("[\udc80-\udcff]", path):  # what Python makes of other bytes
        raise Refused("its name is not UTF-8")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise Refused(error.strerror) from None
    except UnicodeDecodeError:
        raise Refused("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise Refused(f"not JSON, or cut off: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise Refused("not results: nested too deep") from None


def read_items(file, name):
    """The items beside a results file. If they are refused, so is the file's part in paired tables."""
    if os.path.exists(name + ".samples.jsonl"):
        import items  # wants scipy, which only those need who have items
        try:
            file.items = items.read(name)
        except items.Refused as reason:
            raise Refused(str(reason)) from None


def json_files(path, leave_out):
    if not os.path.isdir(path):
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and os.path.realpath(os.path.join(folder, name)) not in leave_out)
        found += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".json")]
    return found


def load(paths, leave_out=()):
    """Results of files and folders, each folder searched to its depth, save those of `leave_out` (real paths).

    What cannot be read is in `refused`, and the rest goes on.
    """
    results, read, seen = Results(), [], set()
    for path in paths:
        base = path if os.path.isdir(path) else os.path.dirname(path) or "."
        label = os.path.basename(os.path.realpath(base))
        for name in json_files(path, leave_out):
            if os.path.realpath(name) in seen:
                continue
            seen.add(os.path.realpath(name))
            shown = os.path.relpath(name, base)
            folder = os.path.dirname(shown)
            run = folder if folder and len(paths) == 1 else os.path.join(label, folder).rstrip("/")
            try:
                data = read_json(name)
                kind = kind_of(data)
                validate(kind, data)
                timestamp = data["context"]["date"] if kind == "benchmarks" else data["timestamp"]
                file = File(os.path.join(label, shown) if len(paths) > 1 else shown, run, kind, timestamp[:19], {})
                read.append((file, data))
                if kind == "benchmarks":
                    read_items(file, name)
            except Refused as reason:
                results.refused.append((name, str(reason)))
    # Oldest first, so that a cell measured twice in one run has its newest values; summaries know by then
    # which results are there.
    for file, data in sorted(read, key=lambda item: (item[0].kind == "summary", item[0].timestamp)):
        part = Results()
        part.files, part.shapes = results.files, {}
        try:
            READERS[file.kind](part, file, data)  # into nothing, so that a refused file leaves no traces
            READERS[file.kind](results, file, data)
            results.files.append(file)
        except Refused as reason:
            results.refused.append((file.path, str(reason)))
    results.mark_superseded()
    derive(results)
    return results


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
