"""Tables and summaries as the reference study wrote them (github.com/crack666/kv-cache-quantization, 69dcdb6): its columns, its
names, its rounding."""

import math
import os
import re

from latex import line, tex
from results import MIB
from tables import STUDY_SPEC, context_label, model_name, models_by_kurtosis, spec_order

# Its names of its phases, by the folder that holds the results.
PHASES = {"long_context": "phase_b_long_context"}
PHASE_COLUMNS = ["model", "kv_quant", "context_len", "prefill_ms", "prefill_tok_s", "decode_tok_s", "kv_cache_mb",
                 "vram_peak_mb", "vram_reserved_mb", "vram_overflow", "ppl_ref", "ppl_quant", "delta_ppl",
                 "needle_score"]
TEXT = {
    "delta": {"en": r"Perplexity degradation ($\Delta$-PPL) by KV-cache quantization level{windows}.",
              "de": r"Verschlechterung der Perplexität ($\Delta$-PPL) je Quantisierungsstufe des KV-Caches{windows}."},
    "windows": {"en": "; windows of {} tokens", "de": "; Fenster von {} Token"},
    "model": {"en": "Model", "de": "Modell"},
    "all": {"en": "Complete KV-cache profiling results (all context lengths)",
            "de": "Vollständige KV-Cache Profiling-Ergebnisse (alle Kontextlängen)"},
    "next": {"en": "continued on next page", "de": "Fortsetzung nächste Seite"},
    "metrics": {"en": "Model architecture and kurtosis", "de": "Modellarchitektur und Kurtosis-Kennzahlen"},
}


def known(cell):
    """Whether it has something for which the study has a column."""
    return any(key.startswith(("prefill.", "decode.", "kv_size.", "memory.", "perplexity.", "needle.")) for key in cell.values)


# ---- its names of schemes

def csv_label(spec):
    """FP16, INT4, INT2-KIVI, as in phase_b_long_context.csv; quanto is named; others by their spec."""
    found = STUDY_SPEC.match(spec)
    if spec == "none":
        return "FP16"
    return f"INT{found[1]}" + ("-QUANTO" if found[2] == "quanto" else "") + ("-KIVI" if found[3] else "") if found else spec


def long_label(spec):
    """FP16, INT4 (HQQ), INT2 (KIVI), as in profiling_table_all.tex."""
    found = STUDY_SPEC.match(spec)
    if spec == "none":
        return "FP16"
    return f"INT{found[1]} ({'KIVI' if found[3] else 'HQQ' if found[2] == 'hqq' else 'Quanto'})" if found else spec


def short_label(spec):
    """INT8, INT4, INT2, KIVI, as in delta_ppl_cross_model.tex, whose one KIVI is of 2 bits."""
    return "KIVI" if spec == "int2-hqq-kivi" else csv_label(spec)


# ---- CSV

def overflow(cell):
    """Whether more GPU memory was wanted than there is, or None; a counter of kvqbench is a number."""
    return None if cell["memory.vram_overflow"] is None else bool(cell["memory.vram_overflow"])


def phase_rows(cells):
    """Rounded as it rounds. Missing is empty."""
    rows = []
    for cell in cells:
        if not known(cell):
            continue
        def rounded(key, digits, scale=1.0):
            return None if cell[key] is None else round(cell[key] * scale, digits)
        quantized = cell.spec != "none"
        needle = cell["needle.needle_rate_overall"]
        rows.append({
            "model": model_name(cell.model), "attn_backend": cell.backend, "batch": cell.batch,
            "kv_quant": csv_label(cell.spec), "context_len": cell.context, "prefill_ms": rounded("prefill.prefill_ms", 1),
            "prefill_tok_s": rounded("prefill.tokens_per_s", 0), "decode_tok_s": rounded("decode.tokens_per_s", 1),
            "kv_cache_mb": rounded("kv_size.kv_bytes", 1, 1 / MIB),
            "vram_peak_mb": rounded("memory.vram_peak_bytes", 0, 1 / MIB),
            "vram_reserved_mb": rounded("memory.vram_reserved_bytes", 0, 1 / MIB),
            "vram_overflow": overflow(cell), "ppl_ref": rounded("perplexity.ppl_reference", 4),
            "ppl_quant": rounded("perplexity.ppl", 4) if quantized else None,
            "delta_ppl": rounded("perplexity.delta_ppl", 4) if quantized else None,
            "needle_score": cell["needle.needle_rate"] if needle is None else needle})
    return sorted(rows, key=lambda row: (row["model"], row["attn_backend"], row["batch"], row["kv_quant"], row["context_len"]))


def phase_csv(cells):
    """(columns, rows); backend and batch size are columns only where there are several."""
    rows = phase_rows(cells)
    columns = list(PHASE_COLUMNS)
    for name in ("batch", "attn_backend"):
        if len({row[name] for row in rows}) > 1:
            columns.insert(1, name)
    return columns, rows


# ---- LaTeX

def tabular(caption, label, columns, head, rows):
    return "\n".join([r"\begin{table}[htbp]", r"\centering", rf"\caption{{{caption}}}", rf"\label{{{label}}}",
                      rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(head), r"\midrule", *map(line, rows),
                      r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def power_of_ten(value, signed):
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{value / 10**exponent:{'+' if signed else ''}.1f}"
    if mantissa.lstrip("+-") == "10.0":
        exponent, mantissa = exponent + 1, mantissa.replace("10.0", "1.0")
    return rf"${mantissa} \times 10^{{{exponent}}}$"


def delta_text(value):
    """As it is printed across models: large ones whole, small ones with four decimals."""
    if value is None:
        return "--"
    return f"{value:+,.0f}" if abs(value) > 100 else f"{value:+.2f}" if abs(value) > 1 else f"{value:+.4f}"


def largest_context(cells):
    """(model, backend, spec) -> the cell of the longest context that has a perplexity."""
    found = {}
    for cell in cells:
        if cell["perplexity.ppl"] is not None:
            key = (cell.model, cell.backend, cell.spec)
            if key not in found or found[key].context < cell.context:
                found[key] = cell
    return found


def delta_ppl_table(cells, language):
    """tab:delta_ppl_cross_model; models by what int4 costs them. Empty where nothing was quantized."""
    largest = largest_context(cells)
    specs = sorted({key[2] for key in largest if key[2] != "none"}, key=spec_order)
    rows = {}
    for (model, backend, spec), cell in largest.items():
        if spec != "none":
            rows.setdefault((model, backend), {})[spec] = cell
    if not rows:
        return ""
    backends = len({backend for _, backend in rows}) > 1
    by = "int4-hqq" if "int4-hqq" in specs else specs[-1]
    windows = {cell["perplexity.window_tokens"] or cell.context for row in rows.values() for cell in row.values()}
    caption = TEXT["delta"][language].format(windows=TEXT["windows"][language].format(windows.pop()) if len(windows) == 1 else "")
    head, lines = [TEXT["model"][language], r"PPL\textsubscript{ref}", *(tex(short_label(s)) for s in specs)], []
    def cost(item):
        cell = item[1].get(by)
        return math.inf if cell is None or cell["perplexity.delta_ppl"] is None else cell["perplexity.delta_ppl"]
    for (model, backend), row in sorted(rows.items(), key=lambda item: (cost(item), item[0])):
        reference = next((cell["perplexity.ppl_reference"] for cell in row.values()
                          if cell["perplexity.ppl_reference"] is not None), None)
        lines.append([tex(model_name(model) + (f" ({backend})" if backends else "")), "--" if reference is None else f"{reference:.4f}",
                      *(delta_text(row[spec]["perplexity.delta_ppl"] if spec in row else None) for spec in specs)])
    return tabular(caption, "tab:delta_ppl_cross_model", "l r" + " r" * len(specs), head, lines)


def profiling_table(results, cells, language):
    """tab:profiling_all: every cell, models by the kurtosis of their keys. Empty without cells."""
    cells = [cell for cell in cells if known(cell)]
    if not cells:
        return ""
    backends, batches = len({cell.backend for cell in cells}) > 1, len({cell.batch for cell in cells}) > 1
    heads = [rf"\textbf{{{TEXT['model'][language]}}}", r"\textbf{Config}", r"\textbf{Ctx}", r"\textbf{Prefill (ms)}",
             r"\textbf{Decode (tok/s)}", r"\textbf{KV-Cache (MB)}", r"\textbf{PPL}", r"\textbf{$\Delta$PPL}"]
    head = line(heads)
    lines = [r"\begin{longtable}{|p{2.0cm}|p{2.0cm}|r|r|r|r|r|>{\raggedleft\arraybackslash}p{1.3cm}|}",
             rf"\caption{{{TEXT['all'][language]}}}", r"\label{tab:profiling_all} \\", r"\toprule", head,
             r"\endfirsthead", r"\toprule", head, r"\endhead", r"\midrule",
             rf"\multicolumn{{8}}{{r}}{{\textit{{{TEXT['next'][language]}}}}} \\", r"\endfoot", r"\bottomrule",
             r"\endlastfoot"]
    for i, model in enumerate(models_by_kurtosis(results, {cell.model for cell in cells})):
        if i:
            lines.append(r"\midrule")
        for cell in sorted((c for c in cells if c.model == model),
                           key=lambda c: (c.backend, c.batch, c.context, spec_order(c.spec))):
            def number(key, pattern, scale=1.0):
                return "--" if cell[key] is None else pattern.format(cell[key] * scale)
            ppl, delta = cell["perplexity.ppl"], cell["perplexity.delta_ppl"]
            ppl_text = "--" if ppl is None else power_of_ten(ppl, False) if ppl >= 1e4 else f"{ppl:.2f}"
            if ppl is not None and (cell.spec == "none" or delta is not None and abs(delta) < 0.005):
                delta_shown = "0.0"
            elif delta is None:
                delta_shown = "--"
            else:
                delta_shown = power_of_ten(delta, True) if abs(delta) >= 1e3 else f"{delta:+.2f}"
            config = long_label(cell.spec) + (f" {cell.backend}" if backends else "") + (f" batch {cell.batch}" if batches else "")
            lines.append(line([
                tex(model_name(model)), tex(config), context_label(cell.context), number("prefill.prefill_ms", "{:.0f}"),
                number("decode.tokens_per_s", "{:.1f}"), number("kv_size.kv_bytes", "{:.1f}", 1 / MIB), ppl_text, delta_shown]))
    return "\n".join(lines + [r"\end{longtable}"])


def model_metrics(results):
    """Rows of tab:model_metrics: models of which both the architecture and the distribution are known."""
    rows = []
    for model in models_by_kurtosis(results, results.shapes):
        cell, shape = results.distribution(model), results.shapes[model]
        if cell is None:
            continue
        rows.append({"model": model_name(model), "params_b": shape.get("num_params_b"),
                     "layers": shape.get("num_layers"), "kv_heads": shape.get("num_kv_heads"),
                     "gqa": shape.get("gqa_ratio"), "head_dim": shape.get("head_dim"),
                     **{f"kurtosis_{name}": cell[f"distribution.kurtosis_{name}"]
                        for name in ("k_mean", "k_max", "v_mean")}})
    return rows


def model_metrics_table(results, language):
    head = [TEXT["model"][language], "Param. (B)", "Layers", "KV-Heads", "GQA", "$d_h$", r"$\bar{\kappa}_K$", r"$\kappa_{K,\max}$",
            r"$\bar{\kappa}_V$"]
    rows = [["--" if value is None else f"{value:.2f}" if isinstance(value, float) else tex(str(value)) for value in row.values()]
            for row in model_metrics(results)]
    return tabular(TEXT["metrics"][language], "tab:model_metrics", "|p{2.2cm}|r|r|r|r|r|r|r|r|", [rf"\textbf{{{text}}}" for text in head],
                   rows) if rows else ""


# ---- summaries

def summary(cells, model):
    """The longest context of every backend and spec, with where it came from (merged_from)."""
    combinations, files = [], {}
    longest = {}
    for cell in cells:
        if cell.model == model and cell.batch == 1 and known(cell):
            key = (cell.backend, cell.spec)
            if key not in longest or longest[key].context < cell.context:
                longest[key] = cell
    for (backend, spec), cell in sorted(longest.items(), key=lambda item: (item[0][0], item[1].files[-1].path)):
        file = cell.files[-1]
        files[file.path] = file
        quant = file.facts.get("kv_quant") or {}
        mib = lambda key: None if cell[key] is None else cell[key] / MIB  # noqa: E731
        combinations.append({
            "backend": backend, "kv_quant": "fp16" if spec == "none" else re.sub(r"-kivi$", "(kivi)", spec),
            "axis_key": quant.get("axis_key"), "axis_value": quant.get("axis_value"),
            "asymmetric": bool(quant.get("asymmetric", spec.endswith("-kivi"))), "ctx": cell.context,
            "prefill_ms": cell["prefill.prefill_ms"], "decode_tok_s": cell["decode.tokens_per_s"],
            "kv_mb": mib("kv_size.kv_bytes"), "vram_peak_mb": mib("memory.vram_peak_bytes"),
            "vram_reserved_mb": mib("memory.vram_reserved_bytes"), "vram_overflow": overflow(cell),
            "ppl": cell["perplexity.ppl_reference"], "ppl_quant": cell["perplexity.ppl"] if spec != "none" else None,
            "ppl_delta": cell["perplexity.delta_ppl"] if spec != "none" else None,
            "combo_elapsed_s": file.facts.get("combo_elapsed_s"), "json_file": os.path.basename(file.path)})
    elapsed = [file.facts["combo_elapsed_s"] for file in files.values() if file.facts.get("combo_elapsed_s")]
    return {"model": model, "timestamp": max(file.timestamp for file in files.values()),
            "total_runtime_s": round(sum(elapsed), 1) if elapsed else 0.0,
            "merged_from": sorted(map(os.path.basename, files)), "combinations": combinations}
