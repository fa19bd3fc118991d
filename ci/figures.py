"""Figures of results, each as PDF, SVG and PNG with its numbers as CSV.

A figure is a function of the results and of the cells of one run; it returns a Drawing, or the reason why these
results do not have it. drawing.py has what they share, costs.py those of bytes and times.
"""

import math
import os
import re

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

import claims
import labels
import tables
from costs import (decode_speed, kernels, latency_vs_context, memory_loglog, pareto_decode, pareto_kld, roofline,
                   vram_vs_context)
from drawing import (COLOURS, DAMAGE, FAINT, INK, PARTS, RATE, WIDTH, Drawing, Drawn, Line2D, MaxNLocator, for_page, grid,
                     heatmap, legend, look, mesh, panels_of, plt, point_look, save, styles, subplots)
from tables import context_label, model_name, spec_order


# ---- what quantizing does to the answers

def kurtosis_vs_ppl_delta(results, cells):
    points = claims.kurtosis_points(results, cells)
    models = tables.models_by_kurtosis(results, {point[0] for point in points})
    if len(models) < 2:
        return "needs int4-hqq or int2-hqq and the distribution of keys of two models or more"
    figure, axis = subplots(figsize=(WIDTH, 3.4))
    low, high = 1e-4, max(10.0, max(point[3] for point in points) * 3)
    for top, bottom, word in ((0.01, low, "no change"), (1, 0.01, "noticeable"), (high, 1, "broken")):
        shade = {"no change": 0.04, "noticeable": 0.12, "broken": 0.22}[word]
        axis.axhspan(bottom, top, color=FAINT, alpha=shade, lw=0)
        axis.text(0.008, bottom * 1.25, word, transform=axis.get_yaxis_transform(), ha="left", va="bottom", fontsize=7,
                  style="italic")
    for model, spec, kurtosis, delta in points:
        axis.plot(kurtosis, max(delta, low), markersize=6, zorder=3, **point_look(look(spec)))
    rho, p = claims.spearman([point[2] for point in points], [point[3] for point in points])
    axis.set_yscale("log")
    axis.set_ylim(low * 0.8, high)
    axis.set_xlim(left=0)
    axis.set_xlabel("mean excess kurtosis of keys over layers")
    axis.set_ylabel("|change of perplexity|")
    axis.set_title(f"Spearman {rho:.2f}, n = {len(points)}, p = {p:.3f}" if len(points) > 3 else "", loc="left")
    figure.spare = None
    legend(figure, [Line2D([], [], label=spec, **point_look(look(spec)))
                    for spec in sorted({point[1] for point in points}, key=spec_order)])
    figure.draw_without_rendering()
    for model in models:  # between its points
        of = [(kurtosis, max(delta, low)) for m, _, kurtosis, delta in points if m == model]
        axis.plot(*zip(*of), color=FAINT, lw=0.6, zorder=1)
    places = [(kurtosis, max(delta, low)) for _, _, kurtosis, delta in points]
    named = [max((p for p in points if p[0] == model), key=lambda p: p[3]) for model in models]
    labels.name_points(axis, [(p[2], max(p[3], low)) for p in named], [model_name(p[0]) for p in named],
                       [(x - 4, y - 4, x + 4, y + 4) for x, y in labels.pixels(axis, places)], must=True, fontsize=7)
    return Drawing(figure, f"Change of perplexity grows with the kurtosis of keys: Spearman {rho:.2f} over "
                   f"{len(points)} pairs of model and scheme.",
                   [{"model": m, "spec": s, "key_kurtosis_mean": k, "abs_delta_ppl": d, "spearman": rho, "p": p}
                    for m, s, k, d in points])


def rows_of_heatmap(results, cells, key):
    """Titles and cells of rows, a row for each panel, and for each context where the value depends on it."""
    rows = []
    for title, of in panels_of(results, [c for c in cells if c.spec != "none" and c[key] is not None]):
        windows = {cell["perplexity.window_tokens"] for cell in of}
        contexts = sorted({cell.context for cell in of})
        if windows != {None}:  # windows of one length, whatever the context
            contexts = contexts[-1:]
        for context in contexts:
            label = title if windows != {None} or len(contexts) == 1 else f"{title}, {context_label(context)}"
            rows.append((label, {cell.spec: cell for cell in of if cell.context == context}))
    return rows


def spec_heatmap(rows, specs, values, texts, norm, cmap):
    """Rows of panels, columns of schemes; the other way round where schemes are too many to stand side by side."""
    upright = len(specs) > 9
    height = 0.9 + 0.17 * len(specs) if upright else 1.1 + 0.32 * len(rows)
    figure, axis = subplots(figsize=(min(WIDTH, 3.6 + 0.8 * len(rows)) if upright else WIDTH, height))
    if upright:
        image = heatmap(axis, [list(column) for column in zip(*values)], [list(column) for column in zip(*texts)], specs,
                        [title.replace(", ", "\n") for title in rows], norm, cmap)
    else:
        image = heatmap(axis, values, texts, rows, spec_ticks(specs), norm, cmap)
    return figure, axis, image


def spec_ticks(specs):
    return [spec.replace("-kivi", "\n-kivi").replace("@", "\n@") for spec in specs]


def delta_ppl_heatmap(results, cells):
    rows = rows_of_heatmap(results, cells, "perplexity.delta_ppl")
    if not rows:
        return "no change of perplexity was measured"
    specs = sorted({spec for _, of in rows for spec in of}, key=spec_order)
    values = [[abs(of[s]["perplexity.delta_ppl"]) if s in of else None for s in specs] for _, of in rows]
    def text(value):
        digits = 4 if abs(value) < 0.01 else 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
        return f"{value:+,.{digits}f}"
    texts = [[text(of[s]["perplexity.delta_ppl"]) if s in of else "" for s in specs] for _, of in rows]
    figure, axis, image = spec_heatmap([title for title, _ in rows], specs,
                                       [[None if v is None else max(v, 1e-4) for v in row] for row in values], texts,
                                       LogNorm(1e-4, 100, clip=True), DAMAGE)
    figure.colorbar(image, ax=axis, label="|change of perplexity|", extend="max", fraction=0.05)
    return Drawing(figure, "Change of perplexity by model and scheme; darker is worse.",
                   [{"row": title, "spec": s, "delta_ppl": of[s]["perplexity.delta_ppl"],
                     "lo": of[s]["perplexity.delta_ppl_lo"], "hi": of[s]["perplexity.delta_ppl_hi"]}
                    for title, of in rows for s in specs if s in of])


def stability_heatmap(results, cells):
    rows = [(title, of) for title, of in rows_of_heatmap(results, cells, "perplexity.delta_ppl")
            if all(cell["perplexity.ppl_reference"] for cell in of.values())]
    if not rows:
        return "no change of perplexity was measured"
    specs = sorted({spec for _, of in rows for spec in of}, key=spec_order)
    percent = [[100 * of[s]["perplexity.delta_ppl"] / of[s]["perplexity.ppl_reference"] if s in of else None
                for s in specs] for _, of in rows]
    bands = ["< 1 %", "1 to 10 %", "10 to 100 %", "> 100 %"]
    values = [[None if v is None else sum(abs(v) >= limit for limit in (1, 10, 100)) for v in row] for row in percent]
    texts = [["" if v is None else f"{v:+.2f} %" if abs(v) < 1 else f"{v:+.1f} %" if abs(v) < 100 else f"{v:+,.0f} %"
              for v in row] for row in percent]
    figure, axis, image = spec_heatmap([title for title, _ in rows], specs, values, texts,
                                       BoundaryNorm([-0.5, 0.5, 1.5, 2.5, 3.5], 4),
                                       ListedColormap(["#fff7dc", "#fec44f", "#d95f0e", "#7f2704"]))
    bar = figure.colorbar(image, ax=axis, ticks=range(4), fraction=0.05)
    bar.ax.set_yticklabels(bands)
    bar.ax.tick_params(length=0)
    bar.set_label("change of perplexity")
    return Drawing(figure, "Change of perplexity in percent, in bands of 1, 10 and 100 percent.",
                   [{"row": title, "spec": s, "delta_ppl_percent": percent[i][j], "band": bands[values[i][j]]}
                    for i, (title, _) in enumerate(rows) for j, s in enumerate(specs) if percent[i][j] is not None])


def needle_heatmap(results, cells):
    def trials(cell):
        """depth -> share found, of the constant number and of random ones."""
        found = {}
        for key, value in cell.values.items():
            part = re.match(r"needle\.needle(?:_random)?/depth:(\d+)$", key)
            if part:
                found.setdefault(int(part[1]), []).append(value)
        return {depth: sum(values) / len(values) for depth, values in found.items()}
    panels = [(title, [(cell, trials(cell)) for cell in of if trials(cell)]) for title, of in panels_of(results, cells)]
    panels = [(title, of) for title, of in panels if of]
    if not panels:
        return "no needle was searched"
    specs = sorted({cell.spec for _, of in panels for cell, _ in of}, key=spec_order)
    rows = [{"panel": title, "spec": cell.spec, "context": cell.context, "depth_percent": depth, "found": found[depth]}
            for title, of in panels for spec in specs for depth in sorted({d for _, trial in of for d in trial})
            for cell, found in sorted(of, key=lambda item: item[0].context) if cell.spec == spec and depth in found]
    if len(specs) > 8:
        return Drawing(needle_shares(panels, specs), "How many of the hidden numbers are found, over all depths, by model, "
                       "context and scheme.", rows)
    figure, axes = subplots(len(panels), len(specs), squeeze=False, sharey=True,
                                figsize=(WIDTH, 0.75 + 1.05 * len(panels)))
    for y, (title, of) in enumerate(panels):
        contexts = sorted({cell.context for cell, _ in of})
        depths = sorted({depth for _, found in of for depth in found})
        for x, spec in enumerate(specs):
            found = {cell.context: trial for cell, trial in of if cell.spec == spec}
            axis = axes[y][x]
            values = [[found.get(context, {}).get(depth) for context in contexts] for depth in depths]
            texts = [["" if v in (None, 1) else "×" if v == 0 else f"{v:.1f}" for v in row] for row in values]
            heatmap(axis, values, texts, [f"{depth} %" for depth in depths],
                            [context_label(context) for context in contexts], plt.Normalize(-0.15, 1.1), RATE)
            axis.set_xticks(np.arange(len(contexts) + 1) - 0.5, minor=True)
            axis.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
            axis.grid(which="minor", color="#ffffff", linewidth=1, alpha=1)
            axis.tick_params(which="minor", length=0)
            axis.tick_params(labelsize=6.5)
            if y == 0:
                axis.set_title(spec.replace("-kivi", "\n-kivi").replace("@", "\n@"), fontsize=7.5)
            if x == 0:
                axis.set_ylabel(title + "\ndepth", fontsize=7.5)
    figure.supxlabel("context, tokens (dark: found; ×: not found)", fontsize=8)
    return Drawing(figure, "Whether a hidden number is found, by depth and context, for each model and scheme.", rows)


def needle_shares(panels, specs):
    """Of many schemes: rows of them, columns of contexts, the share found over depths in each cell."""
    columns = [(title, context) for title, of in panels for context in sorted({cell.context for cell, _ in of})]
    share = {(title, cell.context, cell.spec): sum(found.values()) / len(found) for title, of in panels for cell, found in of}
    values = [[share.get((*column, spec)) for column in columns] for spec in specs]
    figure, axis = subplots(figsize=(min(WIDTH, 2.4 + 0.55 * len(columns)), 0.9 + 0.17 * len(specs)))
    heatmap(axis, values, [["" if v is None else f"{100 * v:.0f} %" for v in row] for row in values], specs,
            [f"{title}\n{context_label(context)}" if len(panels) > 1 else context_label(context) for title, context in columns],
            plt.Normalize(-0.15, 1.1), RATE)
    axis.set_xlabel("context, tokens")
    if len(panels) == 1:
        axis.set_title(panels[0][0])
    return figure


# ---- what is in the cache

def distributions(results):
    found = [(model, results.distribution(model)) for model in {cell.model for cell in results.current()}]
    found = {model: cell for model, cell in found if cell is not None}
    return [(model, found[model]) for model in tables.models_by_kurtosis(results, found)]


NO_DISTRIBUTION = "no distribution of keys and values was measured (measurement `distribution`)"


def layer_kurtosis_profile(results, cells):
    found = distributions(results)
    if not found:
        return NO_DISTRIBUTION
    sides = [("keys", "k")] + ([("keys before RoPE", "k_pre_rope")] if any(
        cell.layers("distribution.kurtosis_k_pre_rope") for _, cell in found) else []) + [("values", "v")]
    strips = [(model, label, cell.layers("distribution.kurtosis_" + side)) for label, side in sides
              for model, cell in found if cell.layers("distribution.kurtosis_" + side)]
    every = [max(v, 0.1) for _, _, layers in strips for v in layers if v is not None]
    norm = LogNorm(max(0.1, min(every)), max(every))
    figure, axes = subplots(len(strips), 1, squeeze=False, figsize=(WIDTH, 0.5 + 0.46 * len(strips)))
    rows = []
    for axis, (model, label, layers) in zip(axes.flat, strips):
        image = mesh(axis, np.array([[math.nan if v is None else max(v, norm.vmin) for v in layers]]), norm, DAMAGE)
        peak = max(range(len(layers)), key=lambda i: -math.inf if layers[i] is None else layers[i])
        axis.plot(peak, -0.68, marker="v", color=INK, markersize=3.5, clip_on=False)
        axis.text(peak + len(layers) * 0.012, -0.72, f"{layers[peak]:.1f}", fontsize=6.5, va="center")
        axis.set_yticks([0])
        axis.set_yticklabels([f"{model_name(model)}\n{label}"], fontsize=7)
        axis.set_xticks(range(0, len(layers), 4))
        axis.tick_params(length=0, labelsize=6)
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        rows += [{"model": model, "side": label, "layer": i, "kurtosis": v} for i, v in enumerate(layers)]
    axes.flat[-1].set_xlabel("layer of the cache (▼ largest)")
    figure.colorbar(image, ax=list(axes.flat), label="excess kurtosis", fraction=0.03)
    return Drawing(figure, "Excess kurtosis of keys and of values, layer by layer; a triangle marks the largest.", rows)


def kurtosis_violin(results, cells):
    found = distributions(results)
    if not found:
        return NO_DISTRIBUTION
    # The study's split: heavy tails would flatten the others.
    heavy = [cell["distribution.kurtosis_k_mean"] > 15 for _, cell in found]
    parts = [[item for item, is_heavy in zip(found, heavy) if is_heavy == wanted] for wanted in (False, True)]
    parts = [part for part in parts if part]
    figure, axes = subplots(1, len(parts), squeeze=False, figsize=(WIDTH if len(found) > 1 else 3.6, 3.0),
                                gridspec_kw={"width_ratios": [len(part) for part in parts]})
    rows = []
    for axis, part in zip(axes.flat, parts):
        top = 0
        for i, (model, cell) in enumerate(part):
            for shift, side, colour, marker in ((-0.2, "k", COLOURS[0], "o"), (0.2, "v", COLOURS[1], "^")):
                layers = [v for v in cell.layers("distribution.kurtosis_" + side) if v is not None]
                body = axis.violinplot([layers], [i + shift], widths=0.36, showextrema=False)["bodies"][0]
                body.set(facecolor=colour, alpha=0.35, edgecolor=colour)
                jitter = np.random.default_rng(0).uniform(-0.05, 0.05, len(layers))
                axis.plot(i + shift + jitter, layers, linestyle="", marker=marker, markersize=2.2, color=colour)
                axis.plot([i + shift - 0.12, i + shift + 0.12], [np.mean(layers)] * 2, color=INK, lw=1.2)
                top = max(top, max(layers))
                rows += [{"model": model, "side": side, "layer": j, "kurtosis": v}
                         for j, v in enumerate(cell.layers("distribution.kurtosis_" + side))]
        axis.set_ylim(-2, max(20, top * 1.08))
        axis.set_xticks(range(len(part)))
        axis.set_xticklabels([model_name(model) for model, _ in part])
        axis.set_xlim(-0.5, len(part) - 0.5)
        axis.grid(axis="x", visible=False)
    axes.flat[0].set_ylabel("excess kurtosis of a layer")
    axes.flat[0].legend(handles=[Line2D([], [], color=COLOURS[0], marker="o", linestyle="", label="keys"),
                                 Line2D([], [], color=COLOURS[1], marker="^", linestyle="", label="values"),
                                 Line2D([], [], color=INK, label="mean")], loc="upper left")
    return Drawing(figure, "How excess kurtosis spreads over layers, keys and values of each model.", rows)


def kv_key_distributions(results, cells):
    found = [(model, [d for d in cell.layers("distribution.density_k") if d]) for model, cell in distributions(results)]
    found = [(model, layers) for model, layers in found if layers]
    if not found:
        return "no histogram of keys was measured (measurement `distribution`)"
    style = styles([model for model, _ in found])
    figure, axes = subplots(1, 2, figsize=(WIDTH, 2.9))
    rows = []
    for model, layers in found:
        density = np.mean(np.array(layers, float), axis=0)
        centers = -6 + 12 * (np.arange(len(density)) + 0.5) / len(density)
        for axis in axes:
            axis.plot(centers, np.where(density > 0, density, np.nan), color=style[model]["color"],
                      linestyle=style[model]["linestyle"], label=model_name(model))
        rows += [{"model": model, "z": round(z, 4), "density": d} for z, d in zip(centers, density)]
    normal_x = np.linspace(-6, 6, 241)
    for axis in axes:
        axis.plot(normal_x, np.exp(-normal_x**2 / 2) / math.sqrt(2 * math.pi), color=INK, lw=0.9, label="N(0, 1)")
        axis.set_xlim(-5.2, 5.2)
        axis.set_xlabel("standardized key")
    axes[0].set_ylabel("density, mean of layers")
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[1].set_ylim(5e-4, 2)
    axes[0].legend(loc="upper left", fontsize=6.5, handlelength=2.4)
    return Drawing(figure, "Mean density of standardized keys against the normal distribution, linear and logarithmic.",
                   rows)


def layer_values(cells, prefix, names):
    """Cells that have `prefix.name/layer:i`, each with {name: values by layer}."""
    for cell in cells:
        found = {name: cell.layers(f"{prefix}.{name}") for name in names}
        if any(found.values()):
            yield cell, {name: layers for name, layers in found.items() if layers}


def strips_by_layer(panels, words, label):
    """Many schemes, a line each: colour by layer, keys, values and what else is measured side by side. What is zero (layers
    that are not encoded) has none."""
    parts = [name for name in words if any(name in found for _, found in panels)]
    several = len({cell.model for cell, _ in panels}) > 1
    every = [v for _, found in panels for layers in found.values() for v in layers if v is not None and v > 0]
    norm = LogNorm(min(every, default=1e-9), max(every, default=1))
    figure, axes = subplots(1, len(parts), squeeze=False, sharey=True, figsize=(WIDTH, 0.9 + 0.15 * len(panels)))
    for axis, name in zip(axes.flat, parts):
        count = max(len(found.get(name, [])) for _, found in panels)
        values = [[v if v is not None and v > 0 else math.nan for v in found.get(name, [])] for _, found in panels]
        image = mesh(axis, np.array([row + [math.nan] * (count - len(row)) for row in values]), norm, DAMAGE)
        axis.set_yticks(range(len(panels)))
        axis.set_yticklabels([f"{model_name(cell.model)}, " * several + cell.spec for cell, _ in panels], fontsize=6.5)
        axis.tick_params(length=0)
        axis.set_title(words[name])
        axis.set_xlabel("layer")
    figure.colorbar(image, ax=list(axes.flat), label=label, fraction=0.05)
    return figure, [{"model": cell.model, "spec": cell.spec, "context": cell.context, "layer": i, "part": words[name], "value": v}
                    for cell, found in panels for name, layers in found.items() for i, v in enumerate(layers)]


def by_layer(results, cells, prefix, names, label):
    panels = [(cell, found) for _, of in panels_of(results, cells)
              for cell, found in layer_values(sorted(of, key=lambda c: (c.context, spec_order(c.spec))), prefix, names)
              if cell.batch == min(other.batch for other in cells)]
    if not panels:
        return None
    if len(panels) > 12:  # more than a page: the longest context alone
        panels = [(cell, found) for cell, found in panels if cell.context == max(c.context for c, _ in panels)]
    if len(panels) > 12:
        return strips_by_layer(panels, names, label)
    figure, axes = grid(len(panels), 1.75, sharey=True)
    rows, words = [], names
    style = {name: PARTS[word] for name, word in names.items()}
    several = len({(cell.model, cell.context) for cell, _ in panels}) > 1
    for axis, (cell, found) in zip(axes, panels):
        for name, layers in found.items():
            axis.plot(range(len(layers)), [math.nan if v is None else max(v, 1e-9) for v in layers], markersize=2.5,
                      **style[name])
            low, high = cell.layers(f"{prefix}.{name}_lo"), cell.layers(f"{prefix}.{name}_hi")
            if low and high and None not in low + high:
                axis.fill_between(range(len(low)), np.maximum(low, 1e-9), np.maximum(high, 1e-9), lw=0, alpha=0.2,
                                  color=style[name]["color"])
            rows += [{"model": cell.model, "spec": cell.spec, "context": cell.context, "layer": i, "part": words[name],
                      "value": v} for i, v in enumerate(layers)]
        axis.set_yscale("log")
        axis.set_title((f"{model_name(cell.model)} {context_label(cell.context)}\n" if several else "") + cell.spec)
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[::3]:
        axis.set_ylabel(label)
    legend(figure, [Line2D([], [], label=words[name], **style[name]) for name in words
                    if any(name in found for _, found in panels)])
    return figure, rows


def layer_sensitivity(results, cells):
    drawn = by_layer(results, cells, "sensitivity", {"kld_nats_k": "keys", "kld_nats_v": "values", "kld_nats_kv": "both"},
                     "KLD, nats")
    if drawn is None:
        return "no sensitivity of layers was measured (measurement `sensitivity`, on request)"
    return Drawing(drawn[0], "KL divergence when one layer alone is encoded: its keys, its values, both.", drawn[1])


def layer_error(results, cells):
    drawn = by_layer(results, cells, "error", {"nmse_k": "keys", "nmse_v": "values"}, "nmse")
    if drawn is None:
        return "no error of encoded keys and values was measured (measurement `error`)"
    return Drawing(drawn[0], "Error of encoded keys and values, layer by layer, for each scheme.", drawn[1])


# ---- everything

# name, title, function, whether it is drawn for every run (else once).
FIGURES = [
    ("pareto_kld", "Quality against size", pareto_kld, True),
    ("delta_ppl_heatmap", "Change of perplexity", delta_ppl_heatmap, True),
    ("stability_heatmap", "Change of perplexity in percent", stability_heatmap, True),
    ("decode_speed", "Speed of decoding against context", decode_speed, True),
    ("pareto_decode", "Speed against size", pareto_decode, True),
    ("needle_heatmap", "Needle in a haystack", needle_heatmap, True),
    ("latency_vs_context", "Time of a step against context", latency_vs_context, True),
    ("vram_vs_context", "Peak memory against context", vram_vs_context, True),
    ("memory_loglog", "Size of the KV cache against context", memory_loglog, True),
    ("roofline", "Against the machine's limits", roofline, True),
    ("kernels", "Kernels against the bandwidth", kernels, True),
    ("layer_error", "Error by layer", layer_error, True),
    ("layer_sensitivity", "Sensitivity by layer", layer_sensitivity, True),
    ("kurtosis_vs_ppl_delta", "Kurtosis against change of perplexity", kurtosis_vs_ppl_delta, True),
    ("layer_kurtosis_profile", "Kurtosis by layer", layer_kurtosis_profile, False),
    ("kurtosis_violin", "Spread of kurtosis", kurtosis_violin, False),
    ("kv_key_distributions", "Distribution of keys", kv_key_distributions, False),
]


def draw_all(results, out):
    """Draws every figure for which there are numbers; returns those drawn and [(title, why not)]."""
    os.makedirs(out, exist_ok=True)
    suffixes = tables.run_suffixes(results)
    runs = [run for run in results.runs() if any(tables.has_numbers(cell) for cell in results.of(run))]
    drawn, missing = [], []
    for name, title, draw, every_run in FIGURES:
        reasons = set()
        for run in runs if every_run else [""]:
            drawing = draw(results, [c for c in results.of(run) if tables.has_numbers(c) or c.values] if run else [])
            if isinstance(drawing, str):
                reasons.add(drawing)
                continue
            full = name + (suffixes[run] if run else "")
            files = save(drawing, full, out)
            plt.close(drawing.figure)
            with open(os.path.join(out, full + ".svg"), encoding="utf-8") as file:
                drawn.append(Drawn(full, title, run, drawing.alt, for_page(file.read(), full), files))
        if not any(item.name.startswith(name) for item in drawn):
            missing += [(title, reason) for reason in sorted(reasons)] or [(title, "no results")]
    return drawn, missing
