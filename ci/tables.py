"""Tables of results for page and terminal, each number with its interval; names and orders that all of a report share."""

import csv
import math
import re
from dataclasses import dataclass

from results import MIB, decode_ms_per_token, types_of

# ---- names

# As the study prints them.
MODEL_NAMES = {"mistralai/Mistral-7B-v0.1": "Mistral-7B", "01-ai/Yi-1.5-9B": "Yi-1.5-9B", "Qwen/Qwen2-7B": "Qwen2-7B",
               "Qwen/Qwen3-8B": "Qwen3-8B", "google/gemma-4-E4B": "Gemma-4-E4B"}
STUDY_SPEC = re.compile(r"^int(\d)-(hqq|quanto)(-kivi)?$")


def model_name(model):
    return MODEL_NAMES.get(model, model.rstrip("/").rsplit("/", 1)[-1])


def spec_order(spec):
    """`none` first, then the study's from most bits to least, then the others by name."""
    found = STUDY_SPEC.match(spec)
    return (spec != "none", not found, -int(found[1]) if found else 0, found[3] is not None if found else False, spec)


def models_by_kurtosis(results, models):
    def kurtosis(model):
        cell = results.distribution(model)
        return math.inf if cell is None else cell["distribution.kurtosis_k_mean"]
    return sorted(models, key=lambda model: (kurtosis(model), model))


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

    def texts(self, cell):
        """The number and its interval, as far as they are there."""
        value, low, high = (cell[self.key + end] for end in ("", "_lo", "_hi"))
        interval = self.interval and low is not None and high is not None
        return ([] if value is None else [self.number(value)]) + ([f"[{self.number(low)}, {self.number(high)}]"] if interval else [])

    def text(self, cell):
        words = self.words(cell)
        return words if words is not None else " ".join(self.texts(cell)) or "-"

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


def unfused(cell):
    """What decoded in place of fused kernels, or nothing."""
    ran = kernel_that_ran(cell, "decode") or ""
    return ran if cell.backend == "fused" and ran.startswith("sdpa") else ""


def score_column(task, name, what):
    return Column(f"{task}.score", f"{name} % [95 %]", f"{name} % [95 %]", "{:.1f}", interval=True, what=what)


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
           what="share of depths at which the reference study's one number is found"),
    Column("needle.needle_random_rate", "random needle [95 %]", "Zufalls-Needle [95 %]", "{:.2f}", interval=True,
           what="share of depths at which a random number is found"),
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
    *(score_column("ruler_" + task, task, f"RULER's score of {task}") for task in RULER),
    Column(KERNEL_COLUMN, "what decoded", "Decodiert durch", "{}",
           what="the kernels that ran, where they are not those of the backend's name"),
]


def columns_of(cells):
    """Those columns for which any of the cells has something, and of each further task its score."""
    tasks = sorted({key.removesuffix(".score") for cell in cells for key in cell.values if is_score(key)} - {"ruler_" + task for task in RULER})
    scores = [score_column(task, task.removeprefix("lm_eval_"), f"score of {task}") for task in tasks]
    return [column for column in [*COLUMNS[:-1], *scores, COLUMNS[-1]] if any(column.has(cell) for cell in cells)]


def is_score(key):
    """Of a task, in percent."""
    return key.endswith(".score")


def has_numbers(cell):
    return any(cell[column.key] is not None for column in COLUMNS) or any(map(is_score, cell.values))


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
    """(heads, rows of texts) of fields (head, key, pattern, scale), the last two at will, that any row has; the run, where there
    are several."""
    if len({row["run"] for row in rows}) > 1:
        fields = [("run", "run")] + fields
    fields = [(*field, *("{}", 1)[len(field) - 2:]) for field in fields if any(row[field[1]] is not None for row in rows)]
    return ([head for head, *_ in fields],
            [["-" if row[key] is None else pattern.format(row[key] * scale) for _, key, pattern, scale in fields] for row in rows])


def kernel_table(results, cells):
    """For page and terminal."""
    return as_texts(kernel_rows(results, cells), [
        ("kernel", "kernel"), ("shape of", "model"), ("heads / KV heads x dim", "shape"), ("context", "context"), ("batch", "batch"),
        ("scheme", "spec"), ("us", "us", "{:.2f}"), ("least", "us_min", "{:.2f}"), ("most", "us_max", "{:.2f}"),
        ("GB/s", "gb_per_s", "{:.0f}"), ("% peak", "peak_fraction", "{:.1f}", 100), ("flash us", "flash_us", "{:.2f}"),
        ("cuDNN us", "cudnn_us", "{:.2f}"), ("speed-up", "speedup", "{:.2f}"),
        ("speed-up / bytes ratio", "speedup_per_byte_ratio", "{:.2f}"), ("what ran", "ran")])


def latency_table(results, cells):
    """For page and terminal; nothing where no spec has a line or a break-even."""
    rows = [row for row in latency_rows(results, cells) if row["base_ms"] is not None or row["break_even"]]
    return as_texts(rows, [
        ("model", "model"), ("attention", "backend"), ("batch", "batch"), ("scheme", "spec"), ("ms at 0", "base_ms", "{:.3f}"),
        ("us per 1k tokens", "us_per_1k_tokens", "{:.2f}"), ("off by at most %", "fit_error", "{:.2f}", 100),
        ("break-even ctx", "break_even"), ("where the lines meet", "break_even_of_lines"), ("contexts", "contexts")])


def item_table(results):
    """For page and terminal."""
    return (results.pairs[0].HEADS, [row.texts() for row in results.pairs]) if results.pairs else ([], [])


# ---- Markdown, for the terminal

def aligned(heads, rows):
    """Lines of a table."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
            for row in [heads, ["-" * width for width in widths], *rows]]


def markdown(results):
    """One table for each model, backend, context and batch size; one row a spec. What was not measured is `-`."""
    lines, cells = [], results.current()
    for (_, device, model, backend, context, batch), group in groups_of(cells).items():
        facts = group[0].files[-1].facts
        where = f"{model}, {backend}, context {context}, batch {batch}; " + " on ".join(filter(None, [types_of(facts, model), device])) + (
            f", text: {facts['corpus']}" if "corpus" in facts else "")
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
    return [(f"{measurement}/{cell.place}", reason) for cell in cells for measurement, reason in cell.not_measured.items()]


# ---- CSV

def write_csv(path, columns, rows, line_end="\n"):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)
