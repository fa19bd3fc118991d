"""Tables of results: what the reference study printed, with its columns and its rounding, and our own, each number
with its interval. `write_all` makes every one of them."""

import csv
import json
import math
import os
import re
from dataclasses import dataclass

from results import MIB, decode_ms_per_token, kv_dtype

# ---- names

# As the study prints them.
MODEL_NAMES = {"mistralai/Mistral-7B-v0.1": "Mistral-7B", "01-ai/Yi-1.5-9B": "Yi-1.5-9B", "Qwen/Qwen2-7B": "Qwen2-7B",
               "Qwen/Qwen3-8B": "Qwen3-8B", "google/gemma-4-E4B": "Gemma-4-E4B"}
STUDY_SPEC = re.compile(r"^int(\d)-(hqq|quanto)(-kivi)?$")


def model_name(model):
    return MODEL_NAMES.get(model, model.rstrip("/").rsplit("/", 1)[-1])


def csv_label(spec):
    """FP16, INT4, INT2-KIVI, as in the study's phase_b_long_context.csv; quanto is named; others by their spec."""
    found = STUDY_SPEC.match(spec)
    if spec == "none":
        return "FP16"
    return f"INT{found[1]}" + ("-QUANTO" if found[2] == "quanto" else "") + ("-KIVI" if found[3] else "") \
        if found else spec


def long_label(spec):
    """FP16, INT4 (HQQ), INT2 (KIVI), as in its profiling_table_all.tex."""
    found = STUDY_SPEC.match(spec)
    if spec == "none":
        return "FP16"
    return f"INT{found[1]} ({'KIVI' if found[3] else 'HQQ' if found[2] == 'hqq' else 'Quanto'})" if found else spec


def short_label(spec):
    """INT8, INT4, INT2, KIVI, as in its delta_ppl_cross_model.tex, whose one KIVI is of 2 bits."""
    return "KIVI" if spec == "int2-hqq-kivi" else csv_label(spec)


def spec_order(spec):
    """`none` first, then the study's from most bits to least, then the others by name."""
    found = STUDY_SPEC.match(spec)
    return (spec != "none", not found, -int(found[1]) if found else 0, found[3] is not None if found else False, spec)


def context_label(context):
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def file_name(run):
    """The run as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", run.rstrip("/").rsplit("/", 1)[-1]) or "run"


def run_suffixes(results):
    """run -> what stands behind the name of its files: nothing for the largest run, its own name for the others."""
    runs, suffixes = results.runs(), {}
    for i, run in enumerate(runs):
        name = file_name(run)
        same = [other for other in runs if file_name(other) == name]
        suffixes[run] = "" if i == 0 else "-" + (name if len(same) == 1 else re.sub(r"[^A-Za-z0-9._-]+", "_", run))
    return suffixes


# ---- the columns of the table of results: Markdown, LaTeX and page show the same

@dataclass
class Column:
    key: str            # of Cell.values
    heading: str
    german: str
    pattern: str
    scale: float = 1.0
    interval: bool = False  # key_lo and key_hi beside it
    what: str = ""      # the page's explanation

    def words(self, cell):
        """What stands there in words, or None."""
        if self.key == "decode.break_even_context":
            return cell.texts.get("decode.break_even")
        return kernel_that_ran(cell, "decode") if self.key == KERNEL_COLUMN else None

    def has(self, cell):
        return cell[self.key] is not None or self.words(cell) is not None

    def text(self, cell, tex=False):
        value, words = cell[self.key], self.words(cell)
        if words is not None:
            return "$" + words.replace("<=", r"\le") + "$" if tex else words
        if value is None:
            return "--" if tex else "-"
        texts = [self.number(value)]
        low, high = cell[self.key + "_lo"], cell[self.key + "_hi"]
        if self.interval and low is not None and high is not None:
            texts.append(f"[{self.number(low)}, {self.number(high)}]")
        if not tex:
            return " ".join(texts)
        for i, text in enumerate(texts):
            text = re.sub(r"([+-]?[\d.]+)e([+-])0*(\d+)", r"$\1 \\times 10^{\2\3}$", text)
            texts[i] = re.sub(r"(?<![\d.{$])([+-])(?=\d)", r"$\1$", text)
        # The interval stands below its number.
        return texts[0] if len(texts) == 1 else rf"\shortstack[r]{{{texts[0]} \\ {{\tiny {texts[1]}}}}}"

    def number(self, value):
        text = self.pattern.format(value * self.scale)
        try:
            zero = float(text.replace(",", "")) == 0
        except ValueError:
            zero = False
        return self.pattern.format(0.0) if zero else text  # no minus before a zero


def kernel_that_ran(cell, measurement):
    """What the label says ran, where that is more than the backend's name, or None."""
    ran = re.sub(r"^\w+ \w+, ", "", cell.texts.get(measurement + ".label", "").split("; ")[0])
    return None if ran in ("", cell.backend, cell.backend + " on decoded tokens") else ran


RULER = [*(f"niah_single_{i}" for i in (1, 2, 3)), *(f"niah_multikey_{i}" for i in (1, 2, 3)), "niah_multivalue", "niah_multiquery",
         "vt", "cwe", "fwe", "qa_1", "qa_2", *(f"niah_keys_{k}" for k in (2, 4, 8)), *(f"vt_hops_{h}" for h in (1, 2, 3))]
KERNEL_COLUMN = "decode.label"  # words, for which LaTeX has no room
COLUMNS = [
    Column("kv_size.kv_bytes", "KV MiB", "KV MiB", "{:.2f}", 1 / MIB, what="KV cache with all its metadata"),
    Column("kv_size.bits_per_element", "bits/el.", "Bit/El.", "{:.3f}", what="bits per element of the KV cache"),
    Column("prefill.prefill_ms", "prefill ms", "Prefill ms", "{:.0f}", what="time until the prompt's next token"),
    Column("prefill.tokens_per_s", "prefill tok/s", "Prefill Tok/s", "{:.0f}", what="prompt tokens a second"),
    Column("prefill.peak_fraction", "prefill % peak", "Prefill % max.", "{:.1f}", 100,
           what="share of the machine's rate of operations, measured in the same run"),
    Column("decode.tokens_per_s", "decode tok/s", "Decode Tok/s", "{:.1f}", what="new tokens a second"),
    Column("decode.tokens_per_s_net", "net decode tok/s", "Decode netto", "{:.1f}",
           what="the same without the prefill that the study's timer has in it"),
    Column("decode.peak_fraction", "decode % peak", "Decode % max.", "{:.1f}", 100,
           what="share of the machine's bandwidth, measured in the same run"),
    Column("decode.break_even_context", "break-even ctx", "Gewinn ab Ctx", "{:.0f}",
           what="context from which on decoding is at least as fast as with the unquantized cache"),
    Column("memory.vram_peak_bytes", "peak VRAM MiB", "VRAM max. MiB", "{:.0f}", 1 / MIB, what="peak GPU memory"),
    Column("memory.rss_peak_bytes", "peak MiB", "RSS max. MiB", "{:.0f}", 1 / MIB, what="peak resident memory"),
    Column("capacity.longest_context", "longest ctx", "Längster Ctx", "{:.0f}", what="tokens of a prompt that the memory has room for"),
    Column("capacity.largest_batch", "largest batch", "Größter Batch", "{:.0f}", what="sequences of this context that it has room for"),
    Column("power.watts", "W", "W", "{:.0f}", what="mean power while decoding"),
    Column("power.mj_per_token", "mJ/token", "mJ/Token", "{:.0f}", what="energy of a new token"),
    Column("error.nmse_k", "nmse K", "NMSE K", "{:.2g}", what="squared error of keys over their squares"),
    Column("error.nmse_v", "nmse V", "NMSE V", "{:.2g}", what="squared error of values over their squares"),
    Column("perplexity.ppl", "ppl", "PPL", "{:.3f}", what="perplexity"),
    Column("perplexity.delta_ppl", "delta ppl [95 %]", "ΔPPL [95 %]", "{:+.3f}", interval=True,
           what="change of perplexity"),
    Column("perplexity.kld_nats", "KLD, nats [95 %]", "KLD, nat [95 %]", "{:.5f}", interval=True,
           what="KL divergence from the unquantized model, a token"),
    Column("perplexity.top1_agreement", "top-1 % [95 %]", "Top-1 % [95 %]", "{:.2f}", 100, interval=True,
           what="tokens whose likeliest successor is the unquantized model's"),
    Column("needle.needle_rate", "needle [95 %]", "Needle [95 %]", "{:.2f}", interval=True,
           what="share of depths at which the number is found"),
    Column("needle.needle_random_rate", "random needle [95 %]", "Zufalls-Needle [95 %]", "{:.2f}", interval=True,
           what="the same with random numbers"),
    Column("drift.kld_nats", "drift KLD, nats [95 %]", "Drift-KLD, nat [95 %]", "{:.5f}", interval=True,
           what="KL divergence along what the unquantized model writes, a token"),
    Column("drift.kld_slope_nats_per_1k", "drift slope [95 %]", "Drift-Steigung [95 %]", "{:+.4f}", interval=True,
           what="growth of that divergence over 1000 tokens"),
    Column("drift.divergence_median", "parts after", "trennt sich nach", "{:.0f}",
           what="tokens of free greedy decoding that are the unquantized model's, median"),
    Column("drift.delta_own_nll", "delta own nll [95 %]", "Δ eigene NLL [95 %]", "{:+.4f}", interval=True,
           what="nll of what it writes under the unquantized model, less that of what the unquantized model writes"),
    Column("reuse.kv_own", "reuse kv [95 %]", "Reuse kv [95 %]", "{:.2f}", interval=True,
           what="right answers about a JSON object over a kept cache, own answers in the history"),
    Column("reuse.vt_own", "reuse vt [95 %]", "Reuse vt [95 %]", "{:.2f}", interval=True,
           what="variables found over a kept cache, own answers in the history"),
    *(Column(f"ruler_{task}.score", f"{task} % [95 %]", f"{task} % [95 %]", "{:.1f}", interval=True, what=f"RULER's score of {task}")
      for task in RULER),
    Column(KERNEL_COLUMN, "what decoded", "Decodiert durch", "{}",
           what="the kernels that ran, where they are not those of the backend's name"),
]


def columns_of(cells):
    """Those columns for which any of the cells has something."""
    return [column for column in COLUMNS if any(column.has(cell) for cell in cells)]


def has_numbers(cell):
    return any(cell[column.key] is not None for column in COLUMNS)


def groups_of(cells):
    """Cells that stand in one table, (run, device, model, backend, context, batch): in the order of their specs."""
    groups, first = {}, {}
    for i, cell in enumerate(cells):
        if has_numbers(cell):
            key = (cell.run, cell.device, cell.model, cell.backend, cell.context, cell.batch)
            groups.setdefault(key, []).append(cell)
            first.setdefault(key[:4], i)
    return {key: sorted(groups[key], key=lambda cell: spec_order(cell.spec))
            for key in sorted(groups, key=lambda key: (first[key[:4]], key[5], key[4]))}


# ---- single kernels, and the model of decode's latency

KERNELS = ["attention", "encode", "flush", "decode"]
KERNEL_COLUMNS = ["us", "us_min", "us_max", "gb_per_s", "peak_fraction", "flash_us", "cudnn_us", "speedup",
                  "speedup_per_byte_ratio"]


def kernels_of(cell):
    return [kernel for kernel in KERNELS if cell[f"kernel_{kernel}.us"] is not None]


def kernel_rows(results, cells):
    """One a kernel and cell of measurements kernel_...; `shape` is that of one layer's heads."""
    rows = []
    for cell in cells:
        shape = results.shapes.get(cell.model, {})
        heads = f"{shape['num_q_heads']}/{shape['num_kv_heads']} x {shape['head_dim']}" if shape else None
        for kernel in kernels_of(cell):
            rows.append({"run": cell.run, "device": cell.device, "kernel": kernel, "model": cell.model, "shape": heads,
                         "context": cell.context, "batch": cell.batch, "spec": cell.spec,
                         **{name: cell[f"kernel_{kernel}.{name}"] for name in KERNEL_COLUMNS},
                         "ran": kernel_that_ran(cell, "kernel_" + kernel)})
    return sorted(rows, key=lambda row: (KERNELS.index(row["kernel"]), row["model"], row["batch"], row["context"],
                                         spec_order(row["spec"])))


def latency_rows(results, cells):
    """One a model, backend, batch size and spec that has decoded: the line of fit_latency, and from which context on the
    spec is as fast as `none`: as measured, and where the two lines meet."""
    lines = {}
    for cell in sorted((c for c in cells if decode_ms_per_token(c)), key=lambda c: c.context):
        lines.setdefault((cell.run, cell.device, model_name(cell.model), cell.backend, cell.batch, cell.spec), []).append(cell)
    rows = []
    for key, of in sorted(lines.items(), key=lambda item: (*item[0][:5], spec_order(item[0][5]))):
        a, b = of[0]["decode.fit_base_ms"], of[0]["decode.fit_us_per_1k_tokens"]
        plain = lines.get((*key[:5], "none"), of)[0]
        meet = None
        if a is not None and plain["decode.fit_base_ms"] is not None and b < plain["decode.fit_us_per_1k_tokens"]:
            meet = 1e6 * (a - plain["decode.fit_base_ms"]) / (plain["decode.fit_us_per_1k_tokens"] - b)
        rows.append({**dict(zip(("run", "device", "model", "backend", "batch", "spec"), key)),
                     "contexts": " ".join(str(cell.context) for cell in of), "base_ms": a, "us_per_1k_tokens": b,
                     "fit_error": of[0]["decode.fit_error"], "break_even": of[0].texts.get("decode.break_even"),
                     "break_even_of_lines": None if meet is None else max(0, round(meet))})
    return rows if any(row["base_ms"] is not None or row["break_even"] for row in rows) else []


def as_texts(rows, fields):
    """(heads, rows of texts) of fields (head, key, pattern, scale) that any row has; the run, where there are several."""
    if len({row["run"] for row in rows}) > 1:
        fields = [("run", "run", "", 1)] + fields
    fields = [field for field in fields if any(row[field[1]] is not None for row in rows)]
    def text(value, pattern, scale):
        return "-" if value is None else pattern.format(value * scale) if pattern else str(value)
    return ([head for head, *_ in fields],
            [[text(row[key], pattern, scale) for _, key, pattern, scale in fields] for row in rows])


def kernel_table(results, cells):
    """For page and terminal."""
    rows = kernel_rows(results, cells)
    fields = [("kernel", "kernel", "", 1), ("shape of", "model", "", 1), ("heads / KV heads x dim", "shape", "", 1),
              ("context", "context", "", 1), ("batch", "batch", "", 1), ("scheme", "spec", "", 1), ("us", "us", "{:.2f}", 1),
              ("least", "us_min", "{:.2f}", 1), ("most", "us_max", "{:.2f}", 1), ("GB/s", "gb_per_s", "{:.0f}", 1),
              ("% peak", "peak_fraction", "{:.1f}", 100), ("flash us", "flash_us", "{:.2f}", 1),
              ("cuDNN us", "cudnn_us", "{:.2f}", 1), ("speed-up", "speedup", "{:.2f}", 1),
              ("speed-up / bytes ratio", "speedup_per_byte_ratio", "{:.2f}", 1), ("what ran", "ran", "", 1)]
    return as_texts(rows, fields)


def latency_table(results, cells):
    """For page and terminal; nothing where no spec has a line or a break-even."""
    rows = [row for row in latency_rows(results, cells) if row["base_ms"] is not None or row["break_even"]]
    fields = [("model", "model", "", 1), ("attention", "backend", "", 1), ("batch", "batch", "", 1), ("scheme", "spec", "", 1),
              ("ms at 0", "base_ms", "{:.3f}", 1), ("us per 1k tokens", "us_per_1k_tokens", "{:.2f}", 1),
              ("off by at most %", "fit_error", "{:.2f}", 100), ("break-even ctx", "break_even", "", 1),
              ("where the lines meet", "break_even_of_lines", "", 1), ("contexts", "contexts", "", 1)]
    return as_texts(rows, fields)


# ---- items

def item_pairs(results):
    """What items say of specs against `none`, one Pair a number and cell of all files that are not superseded, judged
    as one report. Drawn once."""
    if results.pairs is None:
        results.pairs = judged_pairs(results)
    return results.pairs


def judged_pairs(results):
    runs = {}
    for file in results.files:  # oldest first
        if file.items and not file.superseded_by:
            runs.setdefault(file.run, {}).update(file.items)
    if not runs:
        return []
    import items  # wants scipy
    pairs = []
    for run, cells in runs.items():
        try:
            found = items.against_spec(cells)
            for row in found:
                row.run = run
            pairs += found
        except items.Refused as reason:
            results.refused.append((run, str(reason)))
    return items.judge(pairs)


def item_table(results):
    """For page and terminal."""
    pairs = item_pairs(results)
    if not pairs:
        return [], []
    import items
    return items.HEADS, [items.texts(row) for row in pairs]


# ---- Markdown, for the terminal

def aligned(heads, rows):
    """Lines of a table."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
            for row in [heads, ["-" * width for width in widths], *rows]]


def markdown(results, cells=None):
    """One table for each model, backend, context and batch size; one row a spec. What was not measured is `-`."""
    lines = []
    cells = results.current() if cells is None else cells
    for (_, device, model, backend, context, batch), group in groups_of(cells).items():
        facts = group[0].files[-1].facts
        stored = kv_dtype(facts, model)
        types = " with KV in ".join(dict.fromkeys(filter(None, (facts.get("dtype"), stored))))
        where = ", ".join(filter(None, [
            f"{model}, {backend}, context {context}, batch {batch}; {types + ' on ' if types else ''}"
            f"{device}", f"text: {facts['corpus']}" if "corpus" in facts else ""]))
        columns = columns_of(group)
        lines += ["", where, ""] + aligned(["spec"] + [column.heading for column in columns], [
            [cell.spec] + [column.text(cell) for column in columns] for cell in group])
        floors = {(cell["perplexity.kld_floor_nats"], cell["perplexity.top1_floor"]) for cell in group
                  if cell["perplexity.kld_floor_nats"] is not None}
        lines += [f"\nnoise floor (the unquantized model in the same calls): KLD {kld:.5f} nats, top-1 {100 * top1:.2f} %"
                  for kld, top1 in sorted(floors)]
    for title, (heads, rows) in (("time of a decoding step: a line through all contexts", latency_table(results, cells)),
                                 ("single kernels", kernel_table(results, cells)),
                                 ("item by item, against none on the same prompts (ci/items.py)", item_table(results))):
        lines += ["", title, ""] + aligned(heads, rows) if rows else []
    for name, reason in skipped(cells):
        lines += ["", f"{name}: {reason}"]
    return "\n".join(lines) + "\n"


def skipped(cells):
    """Names and reasons of what was not measured, but for specs that encode nothing."""
    return [(f"{measurement}/{cell.model}/{cell.backend}/{cell.spec}/ctx:{cell.context}/batch:{cell.batch}", reason)
            for cell in cells for measurement, reason in cell.skipped.items() if "nothing is encoded" not in reason]


# ---- the study's CSV

PHASE_COLUMNS = ["model", "kv_quant", "context_len", "prefill_ms", "prefill_tok_s", "decode_tok_s", "kv_cache_mb",
                 "vram_peak_mb", "vram_reserved_mb", "vram_overflow", "ppl_ref", "ppl_quant", "delta_ppl",
                 "needle_score"]


def overflow(cell):
    """Whether more GPU memory was wanted than there is, or None; a counter of kvqbench is a number."""
    return None if cell["memory.vram_overflow"] is None else bool(cell["memory.vram_overflow"])


def phase_rows(cells):
    """The study's columns, rounded as it rounds. Missing is empty."""
    rows = []
    for cell in cells:
        if not has_numbers(cell):
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
    return sorted(rows, key=lambda row: (row["model"], row["attn_backend"], row["batch"], row["kv_quant"],
                                         row["context_len"]))


def phase_csv(cells):
    """(columns, rows); backend and batch size are columns only where there are several."""
    rows = phase_rows(cells)
    columns = list(PHASE_COLUMNS)
    for name in ("batch", "attn_backend"):
        if len({row[name] for row in rows}) > 1:
            columns.insert(1, name)
    return columns, rows


# ---- the study's LaTeX

TEXT = {
    "delta": {"en": r"Perplexity degradation ($\Delta$-PPL) by KV-cache quantization level{windows}.",
              "de": r"Verschlechterung der Perplexität ($\Delta$-PPL) je Quantisierungsstufe des KV-Caches{windows}."},
    "windows": {"en": "; windows of {} tokens", "de": "; Fenster von {} Token"},
    "model": {"en": "Model", "de": "Modell"},
    "all": {"en": "Complete KV-cache profiling results (all context lengths)",
            "de": "Vollständige KV-Cache Profiling-Ergebnisse (alle Kontextlängen)"},
    "next": {"en": "continued on next page", "de": "Fortsetzung nächste Seite"},
    "metrics": {"en": "Model architecture and kurtosis", "de": "Modellarchitektur und Kurtosis-Kennzahlen"},
    "cost": {"en": "What the KV cache costs under each scheme{where}.",
             "de": "Was der KV-Cache je Verfahren kostet{where}."},
    "quality": {"en": "What each scheme of the KV cache does to the answers{where}. Intervals: 95\\,\\%.",
                "de": "Was jedes Verfahren des KV-Caches mit den Antworten macht{where}. Intervalle: 95\\,\\%."},
    "where": {"en": ": {model}, {backend}, context {context}, batch {batch}; {device}",
              "de": ": {model}, {backend}, Kontext {context}, Batch {batch}; {device}"},
    "scheme": {"en": "Scheme", "de": "Verfahren"},
    "latency_model": {"en": r"Milliseconds of a decoding step as a line $a + b\,\cdot$ context, and the break-even with "
                            r"\texttt{none}.",
                      "de": r"Millisekunden eines Dekodierschritts als Gerade $a + b\,\cdot$ Kontext, und ab wann er "
                            r"\texttt{none} einholt."},
    "kernels": {"en": "Single kernels of one layer, beside the read bandwidth of the same run.",
                "de": "Einzelne Kernel einer Schicht, gemessen an der Lesebandbreite desselben Laufs."},
}


def tex(text):
    for plain, escaped in (("\\", r"\textbackslash "), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#"),
                           ("Δ", r"$\Delta$")):
        text = text.replace(plain, escaped)
    return text


def power_of_ten(value, signed):
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{value / 10**exponent:{'+' if signed else ''}.1f}"
    if mantissa.lstrip("+-") == "10.0":
        exponent, mantissa = exponent + 1, mantissa.replace("10.0", "1.0")
    return rf"${mantissa} \times 10^{{{exponent}}}$"


def delta_text(value):
    """As the study prints it across models: large ones whole, small ones with four decimals."""
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
    caption = TEXT["delta"][language].format(
        windows=TEXT["windows"][language].format(windows.pop()) if len(windows) == 1 else "")
    lines = [r"\begin{table}[htbp]", r"\centering", rf"\caption{{{caption}}}", r"\label{tab:delta_ppl_cross_model}",
             rf"\begin{{tabular}}{{l r{' r' * len(specs)}}}", r"\toprule",
             " & ".join([TEXT["model"][language], r"PPL\textsubscript{ref}"] + [tex(short_label(s)) for s in specs])
             + r" \\", r"\midrule"]
    def cost(item):
        cell = item[1].get(by)
        return math.inf if cell is None or cell["perplexity.delta_ppl"] is None else cell["perplexity.delta_ppl"]
    for (model, backend), row in sorted(rows.items(), key=lambda item: (cost(item), item[0])):
        reference = next((cell["perplexity.ppl_reference"] for cell in row.values()
                          if cell["perplexity.ppl_reference"] is not None), None)
        lines.append(" & ".join(
            [tex(model_name(model) + (f" ({backend})" if backends else "")),
             "--" if reference is None else f"{reference:.4f}"] +
            [delta_text(row[spec]["perplexity.delta_ppl"] if spec in row else None) for spec in specs]) + r" \\")
    return "\n".join(lines + [r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def models_by_kurtosis(results, models):
    def kurtosis(model):
        cell = results.distribution(model)
        return math.inf if cell is None else cell["distribution.kurtosis_k_mean"]
    return sorted(models, key=lambda model: (kurtosis(model), model))


def profiling_table(results, cells, language):
    """tab:profiling_all: every cell, models by the kurtosis of their keys. Empty without cells."""
    cells = [cell for cell in cells if has_numbers(cell)]
    if not cells:
        return ""
    backends, batches = len({cell.backend for cell in cells}) > 1, len({cell.batch for cell in cells}) > 1
    heads = [rf"\textbf{{{TEXT['model'][language]}}}", r"\textbf{Config}", r"\textbf{Ctx}", r"\textbf{Prefill (ms)}",
             r"\textbf{Decode (tok/s)}", r"\textbf{KV-Cache (MB)}", r"\textbf{PPL}", r"\textbf{$\Delta$PPL}"]
    head = " & ".join(heads) + r" \\"
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
            config = long_label(cell.spec) + (f" {cell.backend}" if backends else "") + \
                (f" batch {cell.batch}" if batches else "")
            lines.append(" & ".join([
                tex(model_name(model)), tex(config), context_label(cell.context),
                number("prefill.prefill_ms", "{:.0f}"),
                number("decode.tokens_per_s", "{:.1f}"), number("kv_size.kv_bytes", "{:.1f}", 1 / MIB), ppl_text,
                delta_shown]) + r" \\")
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
    rows = model_metrics(results)
    if not rows:
        return ""
    lines = [r"\begin{table}[htbp]", r"\centering", rf"\caption{{{TEXT['metrics'][language]}}}",
             r"\label{tab:model_metrics}", r"\begin{tabular}{|p{2.2cm}|r|r|r|r|r|r|r|r|}", r"\toprule",
             " & ".join([rf"\textbf{{{TEXT['model'][language]}}}", r"\textbf{Param. (B)}", r"\textbf{Layers}",
                         r"\textbf{KV-Heads}", r"\textbf{GQA}", r"\textbf{$d_h$}", r"\textbf{$\bar{\kappa}_K$}",
                         r"\textbf{$\kappa_{K,\max}$}", r"\textbf{$\bar{\kappa}_V$}"]) + r" \\", r"\midrule"]
    for row in rows:
        lines.append(" & ".join("--" if value is None else f"{value:.2f}" if isinstance(value, float) else tex(str(value))
                                for value in row.values()) + r" \\")
    return "\n".join(lines + [r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def results_table(cells, language):
    """Our tables, two for each model, backend, context and batch size: what it costs, and what it does to the answers,
    with the intervals."""
    parts = []
    quality = ("error.", "perplexity.", "needle.", "drift.", "reuse.", "ruler_")
    for (_, device, model, backend, context, batch), group in groups_of(cells).items():
        where = TEXT["where"][language].format(model=tex(model_name(model)), backend=tex(backend), context=context,
                                               batch=batch, device=tex(device))
        for is_quality in (False, True):
            columns = [column for column in columns_of(group) if column.key.startswith(quality) == is_quality and
                       column.key != KERNEL_COLUMN]
            if not columns:
                continue
            caption = TEXT["quality" if is_quality else "cost"][language].format(where=where)
            heads = [tex((column.heading if language == "en" else column.german).replace(" [95 %]", ""))
                     for column in columns]
            lines = [r"\begin{table}[htbp]", r"\centering", r"\footnotesize", rf"\caption{{{caption}}}",
                     r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{' r' * len(columns)}}}", r"\toprule",
                     " & ".join([TEXT["scheme"][language]] + heads) + r" \\", r"\midrule"]
            lines += [" & ".join([rf"\texttt{{{tex(cell.spec)}}}"] +
                                 [column.text(cell, tex=True) for column in columns]) + r" \\" for cell in group]
            parts.append("\n".join(lines + [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]))
    return "\n\n".join(parts)


GERMAN = {"kernel": "Kernel", "shape of": "Form von", "heads / KV heads x dim": "Köpfe / KV-Köpfe x dim", "context": "Kontext",
          "batch": "Batch", "scheme": "Verfahren", "% peak": "% max.",
          "speed-up": "Gewinn", "speed-up / bytes ratio": "Gewinn / Byte-Verhältnis", "model": "Modell",
          "attention": "Attention", "ms at 0": "ms bei 0", "us per 1k tokens": "us je 1k Token",
          "off by at most %": "höchstens daneben um %", "break-even ctx": "Gewinn ab Ctx",
          "where the lines meet": "Schnittpunkt"}


NOT_IN_LATEX = {"contexts", "least", "most", "what ran"}  # a page is too narrow for


def plain_longtable(heads_and_rows, name, language):
    """Texts as a longtable, its caption by name. Empty without rows."""
    heads, rows = heads_and_rows
    if not rows:
        return ""
    kept = [i for i, head in enumerate(heads) if head not in NOT_IN_LATEX]
    heads, rows = [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]
    def stacked(text):  # a word a line
        return r"\shortstack[r]{" + tex(text).replace(" ", r" \\ ") + "}"
    head = " & ".join(stacked(head if language == "en" else GERMAN.get(head, head)) for head in heads) + r" \\"
    columns = "".join("r" if re.match(r"^(<=? |>=? )?[\d.-]+$", row) else "l" for row in rows[0])
    lines = [r"\begingroup\scriptsize\setlength{\tabcolsep}{2.5pt}", rf"\begin{{longtable}}{{{columns}}}",
             rf"\caption{{{TEXT[name][language]}}} \label{{tab:{name}}} \\", r"\toprule", head, r"\midrule", r"\endfirsthead",
             r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot"]
    lines += [" & ".join(tex(text).replace("<=", r"$\le$").replace("> ", "$>$ ") for text in row) + r" \\" for row in rows]
    return "\n".join(lines + [r"\end{longtable}", r"\endgroup"])


# ---- the study's summaries

def summary(cells, model):
    """The study's summary: the longest context of every backend and spec, with where it came from (merged_from)."""
    combinations, files = [], {}
    longest = {}
    for cell in cells:
        if cell.model == model and cell.batch == 1 and has_numbers(cell):
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


# ---- everything

def write_csv(path, columns, rows, line_end="\n"):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)


def flat_rows(results):
    """Every cell with all its single numbers, under their full names."""
    names = sorted({key for cell in results.cells for key, value in cell.values.items()
                    if "/" not in key and not isinstance(value, list)})
    columns = ["run", "device", "model", "backend", "spec", "context", "batch", "superseded"] + names
    rows = [{"run": cell.run, "device": cell.device, "model": cell.model, "backend": cell.backend, "spec": cell.spec,
             "context": cell.context, "batch": cell.batch, "superseded": cell.superseded,
             **{name: cell.values[name] for name in names if name in cell.values}} for cell in results.cells]
    return columns, rows


# The study's names of its phases, by the folder that holds the results.
PHASES = {"long_context": "phase_b_long_context"}


def write_all(results, out):
    """Writes every table under `out`; returns the names of the files."""
    os.makedirs(out, exist_ok=True)
    written = []

    def write_text(name, text):
        if text:
            with open(os.path.join(out, name), "w", encoding="utf-8") as file:
                file.write(text + "\n")
            written.append(name)

    write_csv(os.path.join(out, "results.csv"), *flat_rows(results))
    written.append("results.csv")
    heads, of_items = item_table(results)
    for name, rows in (("kernels.csv", kernel_rows(results, results.current())),
                       ("latency_model.csv", latency_rows(results, results.current())),
                       ("items.csv", [dict(zip(heads, row)) for row in of_items])):
        if rows:
            write_csv(os.path.join(out, name), list(rows[0]), rows)
            written.append(name)
    suffixes = run_suffixes(results)
    for run, suffix in suffixes.items():
        cells = [cell for cell in results.of(run) if has_numbers(cell)]
        if not cells:
            continue
        name = file_name(run)
        phase = PHASES.get(name, "phase_" + name) + ".csv"
        write_csv(os.path.join(out, phase), *phase_csv(cells), line_end="\r\n")  # as the study's
        written.append(phase)
        for own, other, base, table in (
                ("en", "de", "delta_ppl_cross_model", lambda language: delta_ppl_table(cells, language)),
                ("de", "en", "profiling_table_all", lambda language: profiling_table(results, cells, language)),
                ("en", "de", "results_table", lambda language: results_table(cells, language)),
                ("en", "de", "latency_model", lambda language: plain_longtable(
                    latency_table(results, cells), "latency_model", language)),
                ("en", "de", "kernels", lambda language: plain_longtable(
                    kernel_table(results, results.of(run)), "kernels", language))):
            write_text(f"{base}{suffix}.tex", table(own))  # in the language of the study's own
            write_text(f"{base}{suffix}_{other}.tex", table(other))
        for model in sorted({cell.model for cell in cells if cell.batch == 1}):  # the study's own, which knew no other
            write_text(f"summary_{file_name(model)}{suffix}.json",
                       json.dumps(summary(cells, model), indent=2, ensure_ascii=False))
    write_text("model_metrics_table.tex", model_metrics_table(results, "de"))
    write_text("model_metrics_table_en.tex", model_metrics_table(results, "en"))
    return written
