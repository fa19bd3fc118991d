"""Tables as LaTeX: our own, in English and German, and what those of the reference study (study_tables.py) share with them."""

import re

import tables

TEXT = {
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
    for plain, escaped in (("\\", r"\textbackslash "), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#"), ("Δ", r"$\Delta$")):
        text = text.replace(plain, escaped)
    return text


def line(cells):
    return " & ".join(cells) + r" \\"


def column_text(column, cell):
    """What stands in a column of tables.COLUMNS; the interval below its number."""
    if (words := column.words(cell)) is not None:
        return "$" + words.replace("<=", r"\le") + "$"
    texts = [re.sub(r"(?<![\d.{$])([+-])(?=\d)", r"$\1$", re.sub(r"([+-]?[\d.]+)e([+-])0*(\d+)", r"$\1 \\times 10^{\2\3}$", text))
             for text in column.texts(cell)]
    return "--" if not texts else texts[0] if len(texts) == 1 else rf"\shortstack[r]{{{texts[0]} \\ {{\tiny {texts[1]}}}}}"


def results_table(cells, language):
    """Our tables, two for each model, backend, context and batch size: what it costs, and what it does to the answers,
    with the intervals."""
    parts = []
    quality = ("error.", "perplexity.", "needle.", "drift.", "reuse.")
    for (_, device, model, backend, context, batch), group in tables.groups_of(cells).items():
        where = TEXT["where"][language].format(model=tex(tables.model_name(model)), backend=tex(backend), context=context,
                                               batch=batch, device=tex(device))
        for is_quality in (False, True):
            columns = [column for column in tables.columns_of(group) if column.key != tables.KERNEL_COLUMN and
                       (column.key.startswith(quality) or tables.is_score(column.key)) == is_quality]
            if not columns:
                continue
            caption = TEXT["quality" if is_quality else "cost"][language].format(where=where)
            heads = [tex((column.heading if language == "en" else column.german).replace(" [95 %]", "")) for column in columns]
            lines = [r"\begin{table}[htbp]", r"\centering", r"\footnotesize", rf"\caption{{{caption}}}",
                     r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{' r' * len(columns)}}}", r"\toprule",
                     line([TEXT["scheme"][language], *heads]), r"\midrule"]
            lines += [line([rf"\texttt{{{tex(cell.spec)}}}", *(column_text(column, cell) for column in columns)]) for cell in group]
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
    head = line(stacked(head if language == "en" else GERMAN.get(head, head)) for head in heads)
    columns = "".join("r" if re.match(r"^(<=? |>=? )?[\d.-]+$", row) else "l" for row in rows[0])
    lines = [r"\begingroup\scriptsize\setlength{\tabcolsep}{2.5pt}", rf"\begin{{longtable}}{{{columns}}}",
             rf"\caption{{{TEXT[name][language]}}} \label{{tab:{name}}} \\", r"\toprule", head, r"\midrule", r"\endfirsthead",
             r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot"]
    lines += [line(tex(text).replace("<=", r"$\le$").replace("> ", "$>$ ") for text in row) for row in rows]
    return "\n".join(lines + [r"\end{longtable}", r"\endgroup"])
