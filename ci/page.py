"""The page of results: one HTML file that needs no network. page.html has its frame, its style and its script."""

import html
import os
import re

import sentences
import tables
import writing
from results import HERE
from tables import columns_of, context_label, has_numbers, model_name, spec_order


def e(text):
    return html.escape(str(text), quote=True)


def table(head, rows, classes=()):
    """A plain table; `rows` of HTML. `classes` of the columns: text or free."""
    cls = lambda i: f' class="{classes[i]}"' if i < len(classes) and classes[i] else ""  # noqa: E731
    return ("<table><thead><tr>" + "".join(f'<th scope="col"{cls(i)}>{e(text)}</th>' for i, text in enumerate(head)) +
            "</tr></thead><tbody>" + "".join("<tr>" + "".join(f"<td{cls(i)}>{cell}</td>" for i, cell in enumerate(row)) +
                                             "</tr>" for row in rows) + "</tbody></table>")


def wide(content, label, tall=""):
    """What may be larger than the screen, to be scrolled by keyboard too."""
    return f'<div class="wide{tall}" role="region" aria-label="{e(label)}" tabindex="0">{content}</div>'


def several(cells, attribute):
    return len({getattr(cell, attribute) for cell in cells}) > 1


def commas(values, word=""):
    """The values, behind the word that counts them."""
    values = [str(value) for value in values]
    return (f"{word}{'s' * (len(values) > 1)} " if word else "") + ", ".join(values)


# ---- what the numbers say

TAGS = {"set": "", "faster": "speed", "slower": "speed", "level": "speed", "prefill": "speed", "cannot": "cannot be said"}


def sentence_html(sentence, numbers):
    """Its cells are links; beside it those that it counts and does not name. `numbers`: id of a cell -> its anchor's."""
    named = {id(part[1]) for part in sentence.parts if not isinstance(part, str)}
    rest = {id(cell): (name, cell) for name, cell in sentence.rest if id(cell) not in named}.values()

    def link(name, cell):
        return f'<a href="#cell-{numbers[id(cell)]}">{e(name)}</a>' if id(cell) in numbers else e(name)
    return "".join(prose(part) if isinstance(part, str) else link(*part) for part in sentence.parts), [link(*row) for row in rest]


def firm(text):
    """No line ends within an interval or before a unit."""
    return re.sub(r"(?<=\d) (?=bits|nats|times|GiB)| (?=%|[^\[\]]*\])", "\u00a0", text).replace("top-1", "top\u20111")


def prose(text):
    """A sentence's text: what is between backticks is code, and no line ends within one of its flags."""
    whole = lambda words: " ".join(f"<span>{e(word)}</span>" for word in words.split(" "))  # noqa: E731
    return "".join(f"<code>{whole(part)}</code>" if i % 2 else e(firm(part)) for i, part in enumerate(text.split("`")))


def verdict_list(of, numbers):
    rows = []
    for _, found in sentences.as_items(of):
        texts = [sentence_html(sentence, numbers) for sentence in found]
        kind, shown = found[0].kind, "; ".join(text for text, _ in texts) + "." * (found[0].kind == "cannot")
        rest = [link for link in dict.fromkeys(link for _, links in texts for link in links) if link not in shown]
        tag = TAGS.get(kind, kind)
        rows.append(f'<li class="{kind.replace(" ", "-")}">' + (f'<span class="tag">{e(tag)}</span> ' if tag else "") + shown + (
            f"<details><summary>{len(rest)} more cell{'s' * (len(rest) > 1)}</summary>{', '.join(rest)}</details>" if rest else "")
            + "</li>")
    return f'<ul class="says">{"".join(rows)}</ul>'


# The one picture beside the sentences: of quality if there is some, else of speed.
FIRST_PICTURE = ["pareto_kld", "pareto_decode", "decode_speed"]


def first_picture(drawn):
    return next((item for name in FIRST_PICTURE for item in drawn if item.name.startswith(name)), None)


def verdict_section(said, numbers, picture):
    lists = "".join(f'<h3 class="of">{e(of.title)}</h3>' + verdict_list(of, numbers) for of in said)
    if not lists:
        lists = "<p>Nothing: no scheme was measured beside an unquantized cache.</p>"
    return (f'<div class="answer"><div>{lists}</div>{figure_html(picture, "") if picture else ""}</div>'
            '<p class="soft rules">Brackets are 95 % intervals, of times from the fastest to the slowest repetition; names lead to their '
            'cells. The rules and thresholds: <code>ci/verdict.py</code>.</p>')


# ---- what was measured on what

# Facts of a run in the order in which they are shown; whatever else a file says of itself follows.
FACTS = ["date", "gpu", "gpu_name", "cpu", "device", "driver", "dtype", "kv_dtype", "threads", "num_cpus",
         "kvqbench_commit", "kvqbench_build", "libtorch", "cuda", "pytorch_version", "transformers_version", "cuda_version", "corpus",
         "corpus_sha256", "ppl_dataset", "ppl_tokens", "protocol", "seed", "read_gb_per_s", "vram_total_mb"]
NOT_SHOWN = {"kv_quant", "combo_elapsed_s", "experiment_id", "merged_from", "executable", "json_schema_version", "library_version"}


def facts_of(results, run):
    """name -> all values that the files of a run give, each once."""
    found = {}
    for file in results.files:
        if file.run == run and not file.superseded_by:
            for key, value in {"measured": file.timestamp.replace("T", " "), **file.facts}.items():
                if key not in NOT_SHOWN and key != "date" and not key.startswith("model_config ") and value is not None:
                    found.setdefault(key, [])
                    if str(value) not in found[key]:
                        found[key].append(str(value))
    if len(found.get("measured", [])) > 1:
        found["measured"] = [f"{min(found['measured'])} to {max(found['measured'])}"]
    order = {key: i for i, key in enumerate(["measured"] + FACTS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0].split(" ")[0], 99), item[0])))


def measured_section(results):
    parts = []
    for run in results.runs():
        cells = results.of(run)
        numbers = [cell for cell in cells if has_numbers(cell)]
        of = numbers or cells
        parts.append(f"<h3>{e(run)}</h3>")
        parts.append("<p>" + e(
            f"{len(of)} cells: " + "; ".join(filter(None, [
                commas(sorted({model_name(c.model) for c in of}), "model"), "attention " + commas(sorted({c.backend for c in of})),
                commas(sorted({c.spec for c in of}, key=spec_order), "scheme") if numbers else "distributions of keys and values",
                commas(map(context_label, sorted({c.context for c in of})), "context"), "batch " + commas(sorted({c.batch for c in of})),
                "on " + commas(sorted({c.device for c in of} - {"?"})) if {c.device for c in of} != {"?"} else ""]))
            + ".") + "</p>")
        facts = facts_of(results, run)
        parts.append("<details><summary>Facts of this run</summary>" + wide(table(
            ["fact", "value"], [[e(key), e(commas(values))] for key, values in facts.items()], ("text", "free")),
            f"Facts of {run}") + "</details>")
    return "".join(parts)


# ---- warnings

def warnings(results, missing=()):
    """[(kind, what it means, [cases])], kinds without a case left out."""
    name = lambda cell: f"{cell.run}: " * several(results.current(), "run") + (  # noqa: E731
        f"{model_name(cell.model)}, {cell.backend}, {cell.spec}, {context_label(cell.context)}, batch {cell.batch}")
    def why(cell, key, word):
        notes = cell.texts.get(key.split(".")[0] + ".label", "").split("; ")[1:]
        return "".join(f" ({note})" for note in notes if note.startswith(word + ": "))
    current = results.current()
    skipped = [(cell, measurement, reason) for cell in current for measurement, reason in cell.not_measured.items()]
    failed = [item for item in skipped if not item[2].startswith("skipped")]
    busy, scaled = [], []
    for file in results.files:
        if file.busy:
            busy.append(f"{file.path}: {file.busy}")
        if file.facts.get("cpu_scaling_enabled"):
            scaled.append(file.path)
    spread, single, noise, zero, throttled, disturbed, shared, overflow, unfused, hardly = ([] for _ in range(10))
    for cell in current:
        for key, value in cell.values.items():
            if key.endswith("tokens_per_s") and value:
                low, high = cell[key + "_min"], cell[key + "_max"]
                if low is not None and (high - low) / value > 0.1:
                    spread.append(f"{name(cell)}: {key.split('.')[0]} {low:.1f} to {high:.1f}, median {value:.1f} tokens/s")
            if key.rsplit(".", 1)[-1].startswith("throttled") and value and "/" not in key:
                throttled.append(f"{name(cell)}: {key}{why(cell, key, 'throttled')}")
            if key.endswith(".disturbed") and value:
                disturbed.append(f"{name(cell)}: {key.split('.')[0]}{why(cell, key, 'disturbed')}")
            if key.endswith(".foreign_processes") and value:
                shared.append(f"{name(cell)}: {key.split('.')[0]}{why(cell, key, 'foreign processes')}")
            if key.endswith(".encoded_share") and (reason := cell.hardly_encoded(key.split(".")[0])):
                hardly.append(f"{name(cell)}: {key.split('.')[0]}: {reason}")
            if key.endswith(".samples") and value == 1:
                single.append(f"{name(cell)}: {key.split('.')[0]}")
        if cell["prefill.prefill_ms"] is not None and cell["prefill.prefill_ms_min"] is None:
            single.append(name(cell))
        if ran := tables.unfused(cell):
            unfused.append(f"{name(cell)}: {ran}")
        floor, kld = cell["perplexity.kld_floor_nats"], cell["perplexity.kld_nats"]
        low = cell["perplexity.kld_nats_lo"]
        if cell.spec != "none" and floor and kld is not None and (kld if low is None else low) <= floor:
            noise.append(f"{name(cell)}: {kld:.5f} nats, rounding alone {floor:.5f}")
        low, high = cell["perplexity.delta_ppl_lo"], cell["perplexity.delta_ppl_hi"]
        if cell.spec != "none" and low is not None and high is not None and low <= 0 <= high:
            zero.append(f"{name(cell)}: {cell['perplexity.delta_ppl']:+.4f} [{low:+.4f}, {high:+.4f}]")
        reserved, total = cell["memory.vram_reserved_bytes"], cell["memory.vram_total_bytes"]
        if cell["memory.vram_overflow"] or reserved and total and reserved > total:
            overflow.append(f"{name(cell)}: {reserved / 2**20:.0f} of {total / 2**20:.0f} MiB" if reserved and total
                            else name(cell))
    superseded = [f"{file.path}, by {file.superseded_by}" for file in results.files if file.superseded_by]
    kinds = [
        ("Failed", "These cells were tried and have no number.", [f"{name(c)}: {m}: {r}" for c, m, r in failed]),
        ("Not read", "These files are left out.", [f"{path}: {reason}" for path, reason in results.refused]),
        ("Throttled", "The device ran below its clock; these times are too long.", throttled),
        ("Disturbed", "Others used the processor meanwhile; these times may be several times too long.", disturbed),
        ("Shared GPU", "Other processes were on it; its times may be too long.", shared),
        ("Busy machine", "Others used the processor when the run began; times that were not watched may be too long.", busy),
        ("Changing clock", "The processor may change its clock; times vary with it.", scaled),
        ("Spread", "The fastest and the slowest repetition are more than 10 % apart.", spread),
        ("More memory than the device has", "Part of it lay elsewhere; times are not the device's own.", overflow),
        ("Hardly encoded", "Too few encoded tokens: these numbers say nothing of the scheme.", hardly),
        ("Within the noise", "The KL divergence is not above what rounding alone does.", noise),
        ("Below its own confidence", "The interval of the change of perplexity has 0 in it: no change is shown.", zero),
        ("Not fused", "Backend fused has no kernel for these; they were decoded as said.", unfused),
        ("One repetition", "These were measured once and have no spread.", single),
        ("Skipped", "These cells cannot run here.",
         [f"{name(c)}: {m}: {r}" for c, m, r in skipped if (c, m, r) not in failed]),
        ("Superseded", "Newer files have measured all of these again; they are in tables/results.csv alone.", superseded),
        ("Figures left out", "These results do not have what they show.", [f"{title}: {why}" for title, why in missing])]
    return [kind for kind in kinds if kind[2]]


def warnings_section(found):
    if not found:
        return "<p>None: every cell has its numbers.</p>"
    return "".join(f"<details><summary><strong>{e(kind)}</strong> ({len(cases)}): {e(what)}</summary><ul>" +
                   "".join(f"<li>{e(case)}</li>" for case in cases) + "</ul></details>" for kind, what, cases in found)


# ---- the table

def results_section(results, cells):
    columns = columns_of(cells)
    sides = [(title, attribute, show) for title, attribute, show in (
        ("model", "model", model_name), ("scheme", "spec", str), ("context", "context", context_label), ("attention", "backend", str),
        ("batch", "batch", str), ("device", "device", str), ("run", "run", tables.file_name))
        if attribute in ("spec", "context") or several(cells, attribute)]
    filters = []
    for title, attribute, show in sides:
        order = sorted({getattr(cell, attribute) for cell in cells}, key=spec_order if attribute == "spec" else None)
        filters.append(f'<label>{e(title)}<select data-filter="{attribute}"><option value="">all</option>' + "".join(
            f'<option value="{e(value)}">{e(show(value))}</option>' for value in order) + "</select></label>")
    head = "".join(f'<th scope="col" aria-sort="none"{" class=text" if a not in ("context", "batch") else ""}>'
                   f'<button type="button">{e(t)}</button></th>' for t, a, _ in sides)
    head += "".join(f'<th scope="col" aria-sort="none"{" class=text" * (c.key == tables.KERNEL_COLUMN)}>'
                    f'<button type="button" title="{e(c.what)}">{e(firm(c.heading))}</button></th>' for c in columns)
    rows = []
    for i, cell in enumerate(cells):
        data = "".join(f' data-{a}="{e(getattr(cell, a))}"' for _, a, _ in sides)
        row = []
        for _, attribute, show in sides:
            text = e(show(getattr(cell, attribute)))
            if attribute == "spec":
                text = f'<a href="#cell-{i}" title="raw data of this cell">{text}</a>'
            kind = "" if attribute in ("context", "batch") else ' class="text"'
            row.append(f'<td{kind} data-value="{e(getattr(cell, attribute))}">{text}</td>')
        for column in columns:
            value, shown, words = cell[column.key], column.text(cell), column.key == tables.KERNEL_COLUMN
            key = column.words(cell) or "" if words else "" if value is None else repr(float(value))
            row.append(f'<td{" class=text" * words} data-value="{e(key)}">{e(shown)}</td>')
        rows.append(f"<tr{data}>{''.join(row)}</tr>")
    words = "".join(f"<li><strong>{e(c.heading)}</strong>: {e(c.what)}</li>" for c in columns)
    return (f'<div class="filters">{"".join(filters)}<label>search names<input id="search" type="search"></label>'
            '<button type="button" id="reset">show all</button><span id="count" role="status" class="soft"></span></div>'
            '<p class="soft hint">Click a heading to sort; brackets are 95 % intervals; a dash was not measured.</p>' +
            wide(f'<table id="results"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>', "Table of results", " tall") +
            f'<details><summary>What the columns are</summary><ul>{words}</ul></details>')


def section_of_rows(heads_and_rows, words, label):
    """A table that has rows of its own; nothing without rows."""
    heads, rows = heads_and_rows
    words_in = ("run", "model", "attention", "scheme", "kernel", "shape of", "what ran", "contexts", "items of", "number", "verdict")
    classes = ["text" if head in words_in else "" for head in heads]
    return f"<p>{e(words)}</p>" + wide(table(heads, [[e(text) for text in row] for row in rows], classes), label,
                                       " tall") if rows else ""


LATENCY_WORDS = ("Milliseconds of a decoding step as a line a + b context through all measured contexts, three or more; how far "
                 "it is off at worst; and from which context on a scheme is as fast as none: as measured, and where the "
                 "lines meet.")
KERNEL_WORDS = ("Of one layer; single calls in a CUDA graph, each on buffers of its own. Speed-up: over the faster of flash and "
                "cuDNN on 16 bits; divided by the ratio of bytes, 1 is all that fewer bytes can give.")

ITEM_WORDS = ("Every scheme against none on the same prompts: right answers that were lost and won, differences with their 95 % "
              "intervals, p of the exact McNemar test or of the paired t test, Holm's over this table, the difference that "
              "so many items find with 80 % power, and a verdict. Hardly encoded: attention read too few encoded tokens to "
              "say anything. No headroom: none is right too seldom or too often. Equivalent: the 90 % interval lies within "
              "the margin. Undecided is no proof of no difference.")


# ---- figures, statements, raw data, how to make it again

def figure_html(item, run):
    links = ", ".join(f'<a href="figures/{e(file)}">{e(file.rsplit(".", 1)[-1].upper())}</a>' for file in item.files)
    svg = item.svg.replace("<svg ", f'<svg role="img" aria-label="{e(item.title + ". " + item.alt)}" ', 1)
    return (f'<figure id="{e(item.name)}"><div class="drawn" tabindex="0" role="group" '
            f'aria-label="{e(item.title)}: figure">{svg}</div><figcaption><strong>{e(item.title)}{run}</strong>{e(item.alt)} '
            f'<span class="no-print">{links}</span></figcaption></figure>')


def figure_section(drawn):
    several_runs = len({item.run for item in drawn if item.run}) > 1
    shown = [figure_html(item, f' <span class="soft">({e(item.run)})</span>' if item.run and several_runs else "") for item in drawn]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def claims_section(claims):
    rows = [[f'<span class="{"holds" if c.holds else "fails"}">{"holds" if c.holds else "contradicted"}</span>',
             e(c.statement), e(c.where), e(c.finding)] for c in claims]
    return ("<p>What the reference study published, set against its own raw data. Every finding is computed from the files "
            "named above. Statements about code alone cannot be checked here.</p>" +
            wide(table(["verdict", "statement", "where", "what the data say"], rows, ("text", "free", "free", "free")),
                 "Table of published statements"))


def raw_section(cells):
    parts = []
    for i, cell in enumerate(cells):
        lines = [f"# {commas(file.path for file in cell.files)}"]
        for key in sorted(cell.values):
            value = cell.values[key]
            lines.append(f"{key} = {f'[{len(value)} numbers, in the file]' if isinstance(value, list) else repr(value)}")
        lines += [f"{key} = {text!r}" for key, text in sorted(cell.texts.items())]
        lines += [f"{key}: {reason}" for key, reason in sorted(cell.skipped.items())]
        parts.append(f'<details id="cell-{i}"><summary>{e(f"{cell.run}: {cell.place}")}</summary><pre tabindex="0">{e(chr(10).join(lines))}</pre>'
                     "</details>")
    return f'<div class="cells">{"".join(parts)}</div>'


GPU_STUDY = ("kernels", "models", "power", "batch", "kivi")  # its parts


def gpu_study_part(name):
    """The part of ci/gpu-study that writes a file of this name: kernels_ratios is of kernels, batch8 of batch."""
    part = name.split("_")[0].rstrip("0123456789")
    return part if part in GPU_STUDY else None


def reproduce_section(results, folders):
    commands = []
    for run in results.runs():
        cells = [cell for cell in results.of(run) if has_numbers(cell) or cell.skipped]
        files = [file for file in results.files if file.run == run and file.kind == "benchmarks"]
        if not cells or not files:
            continue
        facts = files[-1].facts
        commit = facts.get("kvqbench_commit", "")
        checkout = f"git checkout {commit.removesuffix('-dirty')}\n" if commit else ""
        made_by = {gpu_study_part(os.path.splitext(os.path.basename(file.path))[0]) for file in files}
        if None not in made_by:
            parts = [part for part in GPU_STUDY if part in made_by]
            commands.append(f"{checkout}ci/gpu-study --out results/{tables.file_name(run)} --only " + ",".join(parts))
            continue
        def option(name, values):
            return f" --{name}=" + ",".join(map(str, values))
        line = f"ci/study --out results/{tables.file_name(run)}"
        line += option("models", sorted({c.model for c in cells}))
        line += option("schemes", sorted({c.spec for c in cells}, key=spec_order))
        line += option("backends", sorted({c.backend for c in cells}))
        line += option("contexts", sorted({c.context for c in cells}))
        line += option("batch", sorted({c.batch for c in cells}))
        windows = {int(c["perplexity.windows"]) for c in cells if c["perplexity.windows"]}
        line += option("windows", [max(windows)]) if windows else ""
        line += option("needles", [facts.get("needles", "both")])
        for key in ("corpus", "protocol", "device", "seed", "runs", "decode_tokens"):
            line += option(key.replace("_", "-"), [facts[key]]) if facts.get(key) else ""
        commands.append(checkout + line)
    commands.append("ci/report " + " ".join(folders) + " --out OUT")
    text = "<p>The figures, tables and this page come from the results alone, by the last command.</p>"
    if any(file.kind != "benchmarks" for file in results.files):
        text += ("<p>Results of schema version 2.0 were measured by the reference study's own programs "
                 "(github.com/crack666/kv-cache-quantization); <code>kvqbench --protocol=study</code> with schemes "
                 "<code>@policy=hf</code> repeats its protocol.</p>")
    return text + "".join(f'<pre tabindex="0">{e(command)}</pre>' for command in commands)


def files_section(written):
    return "<ul>" + "".join(f'<li><a href="tables/{e(name)}">{e(name)}</a></li>' for name in written) + "</ul>"


def write(results, drawn, missing, claims, written, folders, out):
    cells = sorted((cell for cell in results.current() if has_numbers(cell)),
                   key=lambda c: (results.runs().index(c.run), model_name(c.model), c.backend, c.batch, c.context,
                                  spec_order(c.spec)))
    kernels = sorted((cell for cell in results.current() if not has_numbers(cell) and tables.kernels_of(cell)),
                     key=lambda c: (c.run, c.model, c.batch, c.context, spec_order(c.spec)))
    said = sentences.verdicts(results)
    linked = {id(cell): cell for of in said for sentence in of.sentences for cell in sentence.cells}
    raw = cells + kernels
    raw += [cell for key, cell in linked.items() if key not in {id(other) for other in raw}]
    numbers = {id(cell): i for i, cell in enumerate(raw)}
    picture = first_picture(drawn)
    found = warnings(results, missing)
    models, about = sorted({model_name(cell.model) for cell in cells}), "What quantizing the KV cache costs and buys: "
    sections = [("verdict", "What these results say", verdict_section(said, numbers, picture)),
                ("results-heading", "Results", results_section(results, cells) if cells else "<p>No numbers.</p>"),
                ("warnings", "Warnings", warnings_section(found)),
                ("measured", "What was measured on what", measured_section(results)),
                ("latency", "How decoding grows with the context", section_of_rows(
                    tables.latency_table(results, results.current()), LATENCY_WORDS, "Table of the latency model")),
                ("kernel-table", "Single kernels", section_of_rows(
                    tables.kernel_table(results, results.current()), KERNEL_WORDS, "Table of single kernels")),
                ("items", "Item by item", section_of_rows(tables.item_table(results), ITEM_WORDS, "Table of paired items")),
                ("figures", "Figures", figure_section([item for item in drawn if item is not picture])),
                ("statements", "Published statements", claims_section(claims) if claims else ""),
                ("raw", "Raw data of every cell", raw_section(raw)),
                ("reproduce", "How to make it again", reproduce_section(results, folders)),
                ("files", "Tables to take along", files_section(written))]
    sections = [section for section in sections if section[2]]
    parts = {
        "TITLE": e(about + commas(models[:6])), "HEADING": e(about) + ", ".join(f"<span>{e(model)}</span>" for model in models[:6]),
        "SUBTITLE": f"{len(raw)} cells of {len(results.runs())} run{'s' * (len(results.runs()) > 1)}; "
                    f'<a href="#warnings">{len(found)} kind{"s" * (len(found) != 1)} of warnings</a>; one file, no network needed.',
        "NAV": "".join(f'<li><a href="#{name}">{e(title)}</a></li>' for name, title, _ in sections),
        "BODY": "".join(f'<section aria-labelledby="{name}"><h2 id="{name}">{e(title)}</h2>{content}</section>'
                        for name, title, content in sections)}
    with open(os.path.join(HERE, "page.html"), encoding="utf-8") as file:
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], file.read())
    writing.write(os.path.join(out, "index.html"), page)
