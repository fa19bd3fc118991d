"""Reads results of every kind into one list of cells (results.py): kvqbench's benchmarks.json, and the reference study's
results (schema version 2.0), summaries, and distributions of keys and values."""

import json
import math
import os
import re

import fastjsonschema
import jsonschema

from results import HERE, MIB, File, Results, derive, kv_dtype, put

NAME = re.compile(r"^(?P<measurement>[^/]+)/(?P<model>[^/]+)/(?P<backend>[^/]+)/(?P<spec>[^/]+)"
                  r"/ctx:(?P<context>\d+)/batch:(?P<batch>\d+)")
# What Google Benchmark says of a run beside its counters.
NO_COUNTERS = {"name", "family_index", "per_family_instance_index", "run_name", "run_type", "repetitions",
               "repetition_index", "threads", "iterations", "real_time", "cpu_time", "time_unit", "aggregate_name",
               "aggregate_unit", "label", "error_occurred", "error_message", "skipped", "skip_message", "elapsed_s"}
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


def wilson(successes, trials):
    """95 % interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z, p = 1.959964, successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)


# ---- kvqbench


def add_benchmarks(results, file, data):
    context = data["context"]
    device = context.get("gpu") or context.get("cpu") or context.get("device") or "?"
    file.facts = {key: value for key, value in context.items() if key not in ("caches", "host_name", "library_build_type")}
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
            put(cell, "decode.tokens_per_s_net", 1e3 * row.get("decode_tokens", 0) / (row["decode_ms"] - row["prefill_ms"]))
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
    measured = ["times"] + [f"{name} {tests[name]['tokens']}" for name in ("perplexity", "perplexity_quantized") if name in tests]
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


_validators = {}  # two of each kind: code that says yes in no time, and a walk that names what is wrong


def validate(kind, data):
    if kind not in _validators:
        with open(os.path.join(HERE, "schema", kind + ".json"), encoding="utf-8") as file:
            schema = json.load(file)
        _validators[kind] = fastjsonschema.compile(schema), jsonschema.Draft202012Validator(schema)
    holds, walk = _validators[kind]
    try:
        holds(data)
        return
    except fastjsonschema.JsonSchemaException:
        error = jsonschema.exceptions.best_match(walk.iter_errors(data))
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
