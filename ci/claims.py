"""What the reference study published, set against its own raw data: each finding is computed, none is typed in.

The statements are quoted by where they stand in the study's repository (github.com/crack666/kv-cache-quantization,
69dcdb6). Statements about code alone (what raises, what is never called) cannot be checked here.
"""

import csv
import math
import os
from dataclasses import dataclass
from statistics import median

import numpy as np

from results import MIB
from study_tables import PHASES, csv_label, delta_text, largest_context, phase_rows
from tables import STUDY_SPEC, context_label, file_name, has_numbers, model_name, spec_order, write_csv


@dataclass
class Claim:
    statement: str
    where: str
    finding: str
    holds: bool


def spearman(x, y):
    """Rank correlation, ties at their mean rank; and the two-sided p of 20,000 seeded permutations."""
    def ranks(values):
        values = np.asarray(values, float)
        return np.array([((values < v).sum() + (values <= v).sum() + 1) / 2 for v in values])
    a, b = ranks(x) - (len(x) + 1) / 2, ranks(y) - (len(y) + 1) / 2
    norm = math.sqrt((a * a).sum() * (b * b).sum())
    if norm == 0:
        return math.nan, math.nan
    rho = float((a * b).sum() / norm)
    generator = np.random.default_rng(42)
    permuted = np.array([(a * generator.permutation(b)).sum() for _ in range(20000)]) / norm
    return rho, float((1 + (np.abs(permuted) >= abs(rho) - 1e-12).sum()) / (1 + len(permuted)))


def kurtosis_points(results, cells):
    """One point a model and spec of 2 or 4 bits: (model, spec, mean kurtosis of keys, |delta ppl|), at the longest
    context; the study's figure."""
    points = []
    for (model, backend, spec), cell in sorted(largest_context(cells).items()):
        of = results.distribution(model)
        if of is not None and spec in ("int4-hqq", "int2-hqq") and cell["perplexity.delta_ppl"] is not None:
            points.append((model, spec, of["distribution.kurtosis_k_mean"], abs(cell["perplexity.delta_ppl"])))
    return points


def name(cell):
    return f"{model_name(cell.model)} {csv_label(cell.spec)} {context_label(cell.context)}"


def names(cells, most=6):
    cells = list(cells)
    return ", ".join(map(name, cells[:most])) + (f" and {len(cells) - most} more" if len(cells) > most else "")


# ---- the statements, each a function of the cells of the run that has the study's phase B

def memory_slopes(cells):
    """model -> how many bytes the peak grows by for each byte that the KV cache grows by, least squares over all specs
    and neighbouring contexts, beside a part that depends on the model alone."""
    slopes = {}
    for model in sorted({cell.model for cell in cells}):
        rows, peaks = [], []
        for spec in {cell.spec for cell in cells if cell.model == model}:
            of = sorted((c for c in cells if c.model == model and c.spec == spec and c["kv_size.kv_bytes"]
                         and c["memory.vram_peak_bytes"]), key=lambda c: c.context)
            for a, b in zip(of, of[1:]):
                tokens = b.context - a.context
                rows.append([(b["kv_size.kv_bytes"] - a["kv_size.kv_bytes"]) / tokens, 1.0])
                peaks.append((b["memory.vram_peak_bytes"] - a["memory.vram_peak_bytes"]) / tokens)
        if len(rows) > 2:
            slopes[model] = float(np.linalg.lstsq(np.array(rows), np.array(peaks), rcond=None)[0][0])
    return slopes


def decode_is_decode(results, cells):
    timed = [c for c in cells if c["decode.tokens_per_s_net"] and c["decode.tokens_per_s"]]
    slopes = memory_slopes(cells)
    if not timed or not slopes:
        return
    worst = max((c for c in timed if c["decode.tokens_per_s"] > 1), default=timed[0],
                key=lambda c: c["decode.tokens_per_s_net"] / c["decode.tokens_per_s"])
    yield Claim(
        "decode_tok_s is the speed of decoding.", "phase_b_long_context.csv, profiling_table_all.tex",
        "Peak memory grows by " + ", ".join(f"{slope:.2f} ({model_name(model)})"
                                            for model, slope in slopes.items()) +
        " bytes for every byte that the KV cache grows by: the cache is there three times, once because the timed loop "
        f"prefills the prompt again. Without that prefill {name(worst)} decodes "
        f"{worst['decode.tokens_per_s_net']:.1f} tokens/s, not {worst['decode.tokens_per_s']:.1f}.",
        all(abs(slope - 1) < 0.5 for slope in slopes.values()))


def several_runs(results, cells):
    files = {id(file): file for cell in cells for file in cell.files}.values()
    stated = {file.facts.get("measure_runs") for file in files} - {None}
    ratios = [1e3 * c["elapsed_s"] / (c["prefill.prefill_ms"] + c["decode.decode_ms"]) for c in cells
              if c["elapsed_s"] and c["prefill.prefill_ms"] and c["decode.decode_ms"]]
    if not stated or not ratios:
        return
    warmup = max(file.facts.get("warmup_runs") or 0 for file in files)
    with_runs = sum(c["prefill.prefill_ms_min"] is not None for c in cells)
    done = median(ratios) - warmup
    yield Claim(
        f"Times are medians of measure_runs = {max(stated)} runs.", "config of the raw JSON files",
        f"A cell takes {median(ratios):.2f} times its prefill and decode (median of {len(ratios)}): {warmup} warm-ups "
        f"and {done:.0f} run; {with_runs} of {len(cells)} cells have the times of single runs.",
        done > max(stated) - 1)


def overhead_share(results, cells):
    over = [c for c in cells if (c["overhead.overhead_pct"] or 0) > 100]
    if any(c["overhead.overhead_pct"] for c in cells):
        most = max(cells, key=lambda c: c["overhead.overhead_pct"] or 0)
        yield Claim(
            "overhead_pct is the share of a run that quantizing takes.", "raw JSON files, measurements[].overhead_pct",
            f"{len(over)} cells are over 100 %, the most {most['overhead.overhead_pct']:.0f} % ({name(most)}): a sum "
            "over warm-ups and run is divided by one run.", not over)


def power_measured(results, cells):
    timed = [c for c in cells if c["decode.tokens_per_s"] is not None]
    without = [c for c in timed if c["power.watts"] is None]
    if timed:
        yield Claim("Power and energy were measured: avg_power_watts, energy_mj_per_token.", "raw JSON files",
                    f"Power is 0.0 in {len(without)} of {len(timed)} cells: not sampled.", not without)


def overflow_flag(results, cells):
    known = [c for c in cells if c["memory.vram_reserved_bytes"] and c["memory.vram_total_bytes"]]
    missed = [c for c in known if c["memory.vram_reserved_bytes"] > c["memory.vram_total_bytes"] and not c["memory.vram_overflow"]]
    if known:
        slowest = min(missed, key=lambda c: c["decode.tokens_per_s"], default=None)
        yield Claim(
            "vram_overflow says which cells did not fit.", "phase_b_long_context.csv",
            f"{len(missed)} cells reserve more than the device has and are flagged False: {names(missed)}" +
            (f"; {name(slowest)} decodes {slowest['decode.tokens_per_s']:.2f} tokens/s." if slowest else "."),
            not missed)
    eight = [c for c in known if c.spec == "int8-hqq"]
    if eight:
        over = [c for c in eight if c["memory.vram_overflow"]]
        yield Claim(
            "INT8 fits into the device's memory.", "captions.md:68",
            f"{len(over)} of {len(eight)} INT8 cells are flagged as overflow" + "".join(
                f"; {name(c)} peaks at {c['memory.vram_peak_bytes'] / MIB:.0f} of "
                f"{c['memory.vram_total_bytes'] / MIB:.0f} MiB" for c in over) + ".", not over)


def storage(results, cells):
    """Bytes of groups of 64 codes with two 16-bit numbers, no residual: elements * (bits/8 + 4/64)."""
    dense = {(c.model, c.backend, c.context): c["kv_size.kv_bytes"] for c in cells if c.spec == "none"}
    exact, quantized = [], []
    for c in cells:
        found = STUDY_SPEC.match(c.spec)
        plain = dense.get((c.model, c.backend, c.context))
        if found and plain and c["kv_size.kv_bytes"]:
            quantized.append(c)
            expected = plain / 2 * (int(found[1]) / 8 + 4 / 64)
            if abs(c["kv_size.kv_bytes"] - expected) <= 0.05 * MIB:  # kept to one decimal of a MiB
                exact.append(c)
    axes = {c.files[-1].facts["kv_quant"].get("axis_key") for c in quantized if not c.spec.endswith("-kivi")}
    if quantized:
        yield Claim(
            "HQQ quantizes along axis 0, in groups of 64 (INT2: 16); the newest 128 tokens stay in FP16.", "README:136-141",
            f"axis_key is {' and '.join(map(str, sorted(axes, key=str)))} in all files of plain HQQ; {len(exact)} of "
            f"{len(quantized)} caches have exactly the bytes of groups of 64 with a 16-bit scale and zero and no FP16 "
            "residual.", len(exact) == 0)


def kivi_channels(results, cells):
    """Channels that one group of 64 holds, axis 0: a column of [64, N/64], N = heads * tokens * head_dim."""
    mixed, trials = [], 0
    for c in cells:
        shape = results.shapes.get(c.model, {})
        if not c.spec.endswith("-kivi") or not shape.get("head_dim"):
            continue
        for key, tokens in c.values.items():
            if key.startswith("needle.prompt_tokens/"):
                stride = shape["num_kv_heads"] * int(tokens) * shape["head_dim"] // 64
                channels = min(64, shape["head_dim"] // math.gcd(stride, shape["head_dim"]))
                trials += 1
                mixed += [channels] if channels > 1 else []
    if trials:
        yield Claim(
            "KIVI quantizes keys per channel.", "core/model_loader.py:67-68",
            f"In {len(mixed)} of {trials} needle trials a group mixes "
            f"{f'{min(mixed)} to {max(mixed)}' if mixed else '1'} channels: tokens times heads is no multiple of 64.",
            not mixed)


def gemma_unchanged(results, cells):
    gemma = [c for c in largest_context(cells).values() if "gemma" in c.model.lower() and c["perplexity.delta_ppl"] is not None]
    if gemma:
        yield Claim(
            "Gemma's change of perplexity is below 0.001.", "captions.md:213",
            "It is " + ", ".join(f"{c['perplexity.delta_ppl']:+.4f} ({csv_label(c.spec)})" for c in sorted(
                gemma, key=lambda c: spec_order(c.spec))) + ".",
            all(abs(c["perplexity.delta_ppl"]) < 0.001 for c in gemma))


def window_length(results, cells):
    longest = max((c.context for c in cells if c["perplexity.delta_ppl"] is not None), default=0)
    windows = {int(c["perplexity.window_tokens"]) for c in cells if c["perplexity.window_tokens"]}
    if longest and windows:
        yield Claim(
            f"The change of perplexity at {context_label(longest)} context.", "delta_ppl_cross_model.tex, caption",
            f"All perplexities are of windows of {' and '.join(map(str, sorted(windows)))} tokens, the same number at "
            "every context.", windows == {longest})


def kivi_worse(results, cells):
    largest = largest_context(cells)
    pairs = [(c, largest.get((c.model, c.backend, "int2-hqq"))) for c in largest.values() if c.spec == "int2-hqq-kivi"]
    pairs = [(k, h) for k, h in pairs if h and None not in (k["perplexity.delta_ppl"], h["perplexity.delta_ppl"])]
    better = [(k, h) for k, h in pairs if k["perplexity.delta_ppl"] < h["perplexity.delta_ppl"] and h["perplexity.delta_ppl"] > 0]
    if pairs:
        yield Claim(
            "KIVI is always worse than plain INT2.", "captions.md:91",
            f"It is better in {len(better)} of {len(pairs)} models" + "".join(
                f"; {model_name(k.model)}: {delta_text(k['perplexity.delta_ppl'])}, not "
                f"{delta_text(h['perplexity.delta_ppl'])}" for k, h in better) + ".", not better)


def readme_models(results, cells):
    largest = largest_context(cells)
    for model, stated in (("Qwen/Qwen3-8B", 96), ("01-ai/Yi-1.5-9B", 15)):
        cell = largest.get((model, "sdpa", "int2-hqq"))
        if cell and cell["perplexity.delta_ppl"] is not None and cell["perplexity.ppl_reference"]:
            percent = 100 * cell["perplexity.delta_ppl"] / cell["perplexity.ppl_reference"]
            yield Claim(f"INT2 costs {model_name(model)} +{stated} % of perplexity.", "README, table of models",
                        f"{percent:+.1f} %.", abs(percent - stated) < 0.5)


def kurtosis_predicts(results, cells):
    points = kurtosis_points(results, cells)
    if len(points) > 3:
        rho, p = spearman([point[2] for point in points], [point[3] for point in points])
        yield Claim("Kurtosis of keys goes with the change of perplexity: Spearman 0.74, n = 10.",
                    "kurtosis_vs_ppl_delta", f"Spearman {rho:.2f}, n = {len(points)}, p = {p:.3f} (permutations).",
                    round(rho, 2) == 0.74 and len(points) == 10)


def backends_agree(results, cells):
    plain = {}
    for c in results.current():
        if c.spec == "none" and c["perplexity.ppl_reference"] and c["perplexity.window_tokens"]:
            plain.setdefault((c.model, c["perplexity.window_tokens"]), {})[c.backend] = c["perplexity.ppl_reference"]
    off = [(model, of) for (model, _), of in plain.items() if "sdpa" in of
           and any(abs(value / of["sdpa"] - 1) > 0.01 for value in of.values())]
    if any(len(of) > 1 for of in plain.values()):
        yield Claim(
            "Attention backends are exchangeable: they are compared by speed.", "backend comparison, implied",
            "Perplexity differs by more than 1 %: " + "; ".join(
                f"{model_name(model)} " + ", ".join(f"{value:.3f} ({backend})" for backend, value in of.items())
                for model, of in off) + "." if off else "Perplexities agree within 1 %.", not off)


# ---- statements of the tables that the study ships beside its raw data

def read_table(paths, file):
    for path in paths:
        for folder, _, found in os.walk(path):
            if file in found and os.path.basename(folder) == "tables":
                with open(os.path.join(folder, file), encoding="utf-8", newline="") as opened:
                    return list(csv.DictReader(opened))
    return []


def shipped_tables(results, cells, paths):
    phase_b = read_table(paths, "phase_b_long_context.csv")
    if phase_b and {"model", "kv_quant", "context_len"} <= set(phase_b[0]):
        rows = phase_rows(cells)
        lacking = {row["model"] for row in rows} - {row["model"] for row in phase_b}
        yield Claim("The table has all of phase B.", "phase_b_long_context.csv",
                    f"It has {len(phase_b)} rows, the raw files have {len(rows)}" +
                    (f"; {', '.join(sorted(lacking))} is missing." if lacking else "."), len(phase_b) == len(rows))
    phase_a = read_table(paths, "phase_a_v3_aggregated.csv")
    total = max((c["memory.vram_total_bytes"] or 0 for c in cells), default=0) / MIB
    if phase_a and total and {"vram_peak_mb", "vram_overflow"} <= set(phase_a[0]):
        over = [row for row in phase_a if float(row["vram_peak_mb"]) > total and row["vram_overflow"] == "False"]
        yield Claim("vram_overflow says which cells of phase A did not fit.", "phase_a_v3_aggregated.csv",
                    f"{len(over)} rows peak above the device's {total:.0f} MiB and say False: " + ", ".join(
                        f"{row['backend']} {row['kv_quant']} {row['ctx']} ({float(row['vram_peak_mb']):.0f} MiB)"
                        for row in over) + "; the older raw files have no such flag.", not over)
    legacy = read_table(paths, "profiling_results_all.csv")
    if legacy and {"Overhead (%)", "Quant (ms)", "Dequant (ms)", "Power (W)"} <= set(legacy[0]):
        quantized = [row for row in legacy if row["Config"] != "FP16"]
        overhead = {float(row["Overhead (%)"]) for row in quantized}
        spent = max(float(row["Quant (ms)"]) + float(row["Dequant (ms)"]) for row in quantized)
        yield Claim("The overhead of quantizing was measured.", "profiling_results_all.csv",
                    f"It is {', '.join(f'{value:g}' for value in sorted(overhead))} % in all {len(quantized)} quantized "
                    f"rows, whose times of quantizing and dequantizing add up to {spent:g} ms at most.",
                    len(overhead) > 1 and spent > 0)
        power = max(float(row["Power (W)"]) for row in legacy)
        yield Claim("Power was measured.", "profiling_results_all.csv",
                    f"The largest value of {len(legacy)} rows is {power:g} W.", power > 0)
        rates = [float(row["Throughput (tok/s)"]) * float(row["Time (ms)"]) / 1e3 / float(row["Context"]) for row in legacy]
        yield Claim("Throughput is of generated tokens.", "profiling_results_all.csv",
                    f"Throughput times time is {median(rates):.3f} times the context in the median row: tokens of the "
                    "prompt.", abs(median(rates) - 1) > 0.01)
        sizes = []
        for row in legacy:
            shape = next((of for model, of in results.shapes.items() if model.endswith(row["Model"])), {})
            if row["Config"] == "FP16" and shape.get("num_layers"):
                size = 4 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"] * int(row["Context"])
                sizes.append(float(row["KV Cache (MB)"]) / (size / MIB))
        if sizes:
            yield Claim("KV Cache (MB) is in the unit of the other tables.", "profiling_results_all.csv",
                        f"FP16 caches are {median(sizes):.3f} times their MiB (bytes/1e9*1024 is "
                        f"{MIB * 1024 / 1e9:.3f} times).", abs(median(sizes) - 1) < 0.005)


STATEMENTS = [decode_is_decode, several_runs, overhead_share, power_measured, overflow_flag, storage, kivi_channels,
              gemma_unchanged, window_length, kivi_worse, readme_models, kurtosis_predicts, backends_agree]


def check(results, paths):
    """Every statement that the data at hand allow to check; nothing unless the study's own phase B is among them."""
    run = next((run for run in results.runs() if file_name(run) in PHASES), None)
    if run is None:
        return []
    cells = [cell for cell in results.of(run) if has_numbers(cell)]
    found = [claim for statement in STATEMENTS for claim in statement(results, cells)]
    return found + list(shipped_tables(results, cells, paths))


def write(claims, folder):
    if claims:
        write_csv(os.path.join(folder, "published_statements.csv"), ["holds", "statement", "where", "finding"],
                         [vars(claim) for claim in claims])
