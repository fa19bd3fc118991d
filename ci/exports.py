"""Every table of a report as files: CSV, LaTeX and summaries."""

import json
import os

import study_tables
import tables
from latex import plain_longtable, results_table
from tables import file_name, has_numbers, write_csv


def flat_rows(results):
    """Every cell with all its single numbers, under their full names."""
    names = sorted({key for cell in results.cells for key, value in cell.values.items()
                    if "/" not in key and not isinstance(value, list)})
    whose = ["run", "device", "model", "backend", "spec", "context", "batch", "superseded"]
    return whose + names, [{**{name: getattr(cell, name) for name in whose}, **{name: cell.values[name] for name in names if name in cell.values}}
                           for cell in results.cells]


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
    heads, of_items = tables.item_table(results)
    for name, rows in (("kernels.csv", tables.kernel_rows(results, results.current())),
                       ("latency_model.csv", tables.latency_rows(results, results.current())),
                       ("items.csv", [dict(zip(heads, row)) for row in of_items])):
        if rows:
            write_csv(os.path.join(out, name), list(rows[0]), rows)
            written.append(name)
    for run, suffix in tables.run_suffixes(results).items():
        cells = [cell for cell in results.of(run) if has_numbers(cell)]
        if not cells:
            continue
        name = file_name(run)
        phase, (columns, rows) = study_tables.PHASES.get(name, "phase_" + name) + ".csv", study_tables.phase_csv(cells)
        if rows:
            write_csv(os.path.join(out, phase), columns, rows, line_end="\r\n")  # as the study's
            written.append(phase)
        for own, other, base, table in (
                ("en", "de", "delta_ppl_cross_model", lambda language: study_tables.delta_ppl_table(cells, language)),
                ("de", "en", "profiling_table_all", lambda language: study_tables.profiling_table(results, cells, language)),
                ("en", "de", "results_table", lambda language: results_table(cells, language)),
                ("en", "de", "latency_model", lambda language: plain_longtable(
                    tables.latency_table(results, cells), "latency_model", language)),
                ("en", "de", "kernels", lambda language: plain_longtable(
                    tables.kernel_table(results, results.of(run)), "kernels", language))):
            write_text(f"{base}{suffix}.tex", table(own))  # in the language of the study's own
            write_text(f"{base}{suffix}_{other}.tex", table(other))
        for model in sorted({cell.model for cell in cells if cell.batch == 1 and study_tables.known(cell)}):  # it knew no other batch
            write_text(f"summary_{file_name(model)}{suffix}.json",
                       json.dumps(study_tables.summary(cells, model), indent=2, ensure_ascii=False))
    write_text("model_metrics_table.tex", study_tables.model_metrics_table(results, "de"))
    write_text("model_metrics_table_en.tex", study_tables.model_metrics_table(results, "en"))
    return written
