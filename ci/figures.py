"""Figures of results, each as PDF, SVG and PNG with its numbers as CSV.

A figure is a function of the results and of the cells of one run; it returns a Drawing, or the reason why these
results do not have it. drawing.py has what they share.
"""

import math
import os
import re

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

import claims
import tables
from drawing import (COLOURS, DAMAGE, FAINT, INK, RATE, WIDTH, Drawing, Drawn, FuncFormatter, Line2D, LogLocator,
                     MaxNLocator, NullLocator, for_page, grid, heatmap, legend, lines, mesh, panels_of, plt, save,
                     spec_handles, specs_of, styles, subplots)
from results import MIB, decode_ms_per_token
from tables import context_label, model_name, spec_order


# ---- what quantizing does to the answers

def kurtosis_vs_ppl_delta(results, cells):
    points = claims.kurtosis_points(results, cells)
    models = tables.models_by_kurtosis(results, {point[0] for point in points})
    if len(models) < 2:
        return "needs int4-hqq or int2-hqq and the distribution of keys of two models or more"
    look = styles(models)
    figure, axis = subplots(figsize=(WIDTH, 3.4))
    low, high = 1e-4, max(10.0, max(point[3] for point in points) * 3)
    for top, bottom, word in ((0.01, low, "no change"), (1, 0.01, "noticeable"), (high, 1, "broken")):
        shade = {"no change": 0.04, "noticeable": 0.12, "broken": 0.22}[word]
        axis.axhspan(bottom, top, color=FAINT, alpha=shade, lw=0)
        axis.text(0.008, bottom * 1.25, word, transform=axis.get_yaxis_transform(), ha="left", va="bottom", fontsize=7,
                  style="italic")
    for model, spec, kurtosis, delta in points:
        axis.plot(kurtosis, max(delta, low), color=look[model]["color"], marker=look[model]["marker"], markersize=7,
                  linestyle="", markerfacecolor=look[model]["color"] if spec == "int2-hqq" else "none",
                  markeredgewidth=1.4, zorder=3)
    rho, p = claims.spearman([point[2] for point in points], [point[3] for point in points])
    axis.set_yscale("log")
    axis.set_ylim(low * 0.8, high)
    axis.set_xlim(left=0)
    axis.set_xlabel("mean excess kurtosis of keys over layers")
    axis.set_ylabel("|change of perplexity|")
    axis.set_title(f"Spearman {rho:.2f}, n = {len(points)}, p = {p:.3f}" if len(points) > 3 else "", loc="left")
    handles = [Line2D([], [], color=look[m]["color"], marker=look[m]["marker"], linestyle="", label=model_name(m))
               for m in models]
    handles += [Line2D([], [], color=INK, marker="o", linestyle="", label="int2-hqq"),
                Line2D([], [], color=INK, marker="o", linestyle="", markerfacecolor="none", label="int4-hqq")]
    figure.spare = None
    legend(figure, handles)
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
    figure, axis = subplots(figsize=(WIDTH, 1.1 + 0.32 * len(rows)))
    norm = LogNorm(1e-4, 100, clip=True)
    image = heatmap(axis, [[None if v is None else max(v, 1e-4) for v in row] for row in values], texts,
                    [title for title, _ in rows], spec_ticks(specs), norm, DAMAGE)
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
    figure, axis = subplots(figsize=(WIDTH, 1.1 + 0.32 * len(rows)))
    cmap = ListedColormap(["#fff7dc", "#fec44f", "#d95f0e", "#7f2704"])
    image = heatmap(axis, values, texts, [title for title, _ in rows], spec_ticks(specs),
                    BoundaryNorm([-0.5, 0.5, 1.5, 2.5, 3.5], 4), cmap)
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
    figure, axes = subplots(len(panels), len(specs), squeeze=False, sharey=True,
                                figsize=(WIDTH, 0.75 + 1.05 * len(panels)))
    rows = []
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
            rows += [{"panel": title, "spec": spec, "context": context, "depth_percent": depth, "found": values[i][j]}
                     for i, depth in enumerate(depths) for j, context in enumerate(contexts) if values[i][j] is not None]
    figure.supxlabel("context, tokens (dark: found; ×: not found)", fontsize=8)
    return Drawing(figure, "Whether a hidden number is found, by depth and context, for each model and scheme.", rows)


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
    look = styles([model for model, _ in found])
    figure, axes = subplots(1, 2, figsize=(WIDTH, 2.9))
    rows = []
    for model, layers in found:
        density = np.mean(np.array(layers, float), axis=0)
        centers = -6 + 12 * (np.arange(len(density)) + 0.5) / len(density)
        for axis in axes:
            axis.plot(centers, np.where(density > 0, density, np.nan), color=look[model]["color"],
                      linestyle=look[model]["linestyle"], label=model_name(model))
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


def by_layer(results, cells, prefix, names, label):
    panels = [(cell, found) for _, of in panels_of(results, cells)
              for cell, found in layer_values(sorted(of, key=lambda c: (c.context, spec_order(c.spec))), prefix, names)
              if cell.batch == min(other.batch for other in cells)]
    if not panels:
        return None
    if len(panels) > 12:  # more than a page: the longest context alone
        panels = [(cell, found) for cell, found in panels if cell.context == max(c.context for c, _ in panels)][:12]
    figure, axes = grid(len(panels), 1.75, sharey=True)
    rows, words = [], {name: word for name, word in names.items()}
    look = dict(zip(words, styles(words).values()))
    several = len({(cell.model, cell.context) for cell, _ in panels}) > 1
    for axis, (cell, found) in zip(axes, panels):
        for name, layers in found.items():
            axis.plot(range(len(layers)), [math.nan if v is None else max(v, 1e-9) for v in layers], markersize=2.5,
                      **look[name])
            low, high = cell.layers(f"{prefix}.{name}_lo"), cell.layers(f"{prefix}.{name}_hi")
            if low and high and None not in low + high:
                axis.fill_between(range(len(low)), np.maximum(low, 1e-9), np.maximum(high, 1e-9), lw=0, alpha=0.2,
                                  color=look[name]["color"])
            rows += [{"model": cell.model, "spec": cell.spec, "context": cell.context, "layer": i, "part": words[name],
                      "value": v} for i, v in enumerate(layers)]
        axis.set_yscale("log")
        axis.set_title((f"{model_name(cell.model)} {context_label(cell.context)}\n" if several else "") + cell.spec)
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[::3]:
        axis.set_ylabel(label)
    legend(figure, [Line2D([], [], label=words[name], **look[name]) for name in words
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


# ---- what it costs

def vram_vs_context(results, cells):
    def peak(cell):
        value = cell["memory.vram_peak_bytes"] or cell["memory.rss_peak_bytes"]
        return value / 2**30 if value else None
    def limit(axis, per_spec):
        total = next((p[2]["memory.vram_total_bytes"] for points in per_spec.values() for p in points
                      if p[2]["memory.vram_total_bytes"]), None)
        if total:
            axis.axhline(total / 2**30, color=INK, lw=0.8, ls=(0, (1, 1)))
            axis.text(0.02, total / 2**30, "device", transform=axis.get_yaxis_transform(), fontsize=6.5, va="top")
            axis.set_ylim(top=max(axis.get_ylim()[1], 1.08 * total / 2**30))
    resident = not any(cell["memory.vram_peak_bytes"] for cell in cells)
    drawn = lines(results, cells, peak, "peak, GiB", reference=limit)
    if drawn is None:
        return "peak memory was not measured at two contexts or more"
    figure, axes, _, style, rows = drawn
    legend(figure, spec_handles(style))
    return Drawing(figure, f"Peak {'resident' if resident else 'GPU'} memory against context, a line a scheme.", rows)


def memory_loglog(results, cells):
    drawn = lines(results, cells, lambda c: c["kv_size.kv_bytes"] / MIB if c["kv_size.kv_bytes"] else None,
                  "KV cache, MiB")
    if drawn is None:
        return "bytes of the KV cache are not known at two contexts or more"
    figure, axes, panels, style, rows = drawn
    for axis, (_, per_spec) in zip(axes, panels):
        axis.set_yscale("log", base=2)
        values = [point[1] for points in per_spec.values() for point in points]
        axis.set_ylim(min(values) / 1.4, max(values) * 1.6)
        slopes = [math.log2(p[-1][1] / p[0][1]) / math.log2(p[-1][0] / p[0][0]) for p in per_spec.values()]
        axis.text(0.04, 0.92, f"slope {min(slopes):.3f}" + (f" to {max(slopes):.3f}" if max(slopes) - min(slopes) > 5e-4
                                                           else ""), transform=axis.transAxes, fontsize=7)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend(figure, spec_handles(style))
    return Drawing(figure, "Bytes of the KV cache against context, both logarithmic; a slope of 1 is proportional.", rows)


def latency_vs_context(results, cells):
    def marks(axis, per_spec):
        for spec, points in per_spec.items():
            context = points[0][2]["decode.break_even_context"]
            if context and points[0][0] < context <= points[-1][0]:
                axis.axvline(context, color=colours[spec], lw=0.8, ls=(0, (4, 2)), alpha=0.7)
    colours = {spec: look["color"] for spec, look in styles(specs_of(
        [c for c in cells if decode_ms_per_token(c)])).items()}
    drawn = lines(results, cells, decode_ms_per_token, "ms per token", reference=marks)
    if drawn is None:
        return "decoding was not timed at two contexts or more"
    figure, axes, panels, style, rows = drawn
    for axis, (title, per_spec) in zip(axes, panels):
        texts = {spec: points[0][2].texts.get("decode.break_even") for spec, points in per_spec.items()}
        for row in rows:
            if row["panel"] == title and "spec" in row:
                row["break_even"] = texts[row["spec"]]
    legend(figure, spec_handles(style))
    return Drawing(figure, "Time of a decoding step against context; vertical lines mark where a scheme breaks even with "
                   "the unquantized cache.", rows)


def pareto_panels(results, cells, y_key, y_label, better, log, interval=False):
    """Bits per element against y at the longest context; the schemes that no other beats in both are joined."""
    panels = []
    for title, of in panels_of(results, [c for c in cells if c["kv_size.bits_per_element"] and c[y_key] is not None]):
        longest = max(cell.context for cell in of)
        of = sorted((c for c in of if c.context == longest), key=lambda c: c["kv_size.bits_per_element"])
        if len(of) > 1:
            panels.append((f"{title}, {context_label(longest)}", of))
    if not panels:
        return None
    look = styles(sorted({c.spec for _, of in panels for c in of}, key=spec_order))
    figure, axes = grid(len(panels), 2.2 if len(panels) > 1 else 3.0)
    rows = []
    for axis, (title, of) in zip(axes, panels):
        front, best = [], None
        for cell in of:  # from fewest bits on
            value = abs(cell[y_key]) if log else cell[y_key]
            if best is None or (value > best if better == "more" else value < best):
                best = value
                front.append(cell)
        # `none` and rounding alone may be ever so small: they stand at the bottom then.
        bottom = min((abs(c[y_key]) for c in of if c.spec != "none" and c[y_key]), default=1e-6) / 10
        def shown(cell, key):
            return max(abs(cell[key]), bottom) if log else cell[key]
        axis.plot([c["kv_size.bits_per_element"] for c in front], [shown(c, y_key) for c in front], color=FAINT, lw=0.9,
                  zorder=1)
        for cell in of:
            x, y = cell["kv_size.bits_per_element"], shown(cell, y_key)
            low, high = cell[y_key + "_lo"] or cell[y_key + "_min"], cell[y_key + "_hi"] or cell[y_key + "_max"]
            if interval and low is not None and high is not None and (not log or low > 0):
                axis.plot([x, x], [max(low, bottom) if log else low, high], color=look[cell.spec]["color"], lw=1)
            axis.plot(x, y, linestyle="", color=look[cell.spec]["color"],
                      marker=look[cell.spec]["marker"], markersize=5.5)
            rows.append({"panel": title, "spec": cell.spec, "bits_per_element": x, "value": cell[y_key], "lo": low,
                         "hi": high, "on_front": cell in front})
        floor = next((c["perplexity.kld_floor_nats"] for c in of if c["perplexity.kld_floor_nats"]), None)
        if y_key == "perplexity.kld_nats" and floor and floor >= bottom:
            axis.axhline(floor, color=INK, lw=0.8, ls=(0, (1, 1)))
            axis.text(0.98, floor, "rounding alone", transform=axis.get_yaxis_transform(), fontsize=6.5, va="bottom",
                      ha="right")
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlim(0, max(c["kv_size.bits_per_element"] for c in of) * 1.08)
        axis.set_title(title)
        axis.set_xlabel("bits per element")
        if axis in axes[::3]:
            axis.set_ylabel(y_label)
    legend(figure, [Line2D([], [], label=s, color=l["color"], marker=l["marker"], linestyle="")
           for s, l in look.items()])
    return figure, rows


def pareto_kld(results, cells):
    drawn = pareto_panels(results, cells, "perplexity.kld_nats", "KLD, nats", "less", True, interval=True)
    if drawn:
        return Drawing(drawn[0], "KL divergence against bits per element; the schemes that none beats in both are joined.",
                       drawn[1])
    drawn = pareto_panels(results, cells, "perplexity.delta_ppl", "|change of ppl|", "less", True)
    if drawn:
        return Drawing(drawn[0], "Change of perplexity against bits per element (no KL divergence was measured); the "
                       "schemes that none beats in both are joined.", drawn[1])
    return "no KL divergence beside the bits per element"


def pareto_decode(results, cells):
    net = any(cell["decode.tokens_per_s_net"] for cell in cells)
    drawn = pareto_panels(results, cells, "decode.tokens_per_s_net" if net else "decode.tokens_per_s",
                          "net decode, tok/s" if net else "decode, tok/s", "more", False, interval=True)
    if drawn is None:
        return "no decoding was timed beside the bits per element"
    return Drawing(drawn[0], "Speed of decoding against bits per element; the schemes that none beats in both are joined.",
                   drawn[1])


def roofline(results, cells):
    """Bytes a second against the bandwidth that the same run measured, and operations against its GEMM rate."""
    kinds = [("decode", "decode (weights and cache read), GB/s"), ("quantize", "quantize, GB/s"),
             ("dequantize", "dequantize, GB/s"), ("prefill", "prefill, GFLOP/s")]
    def achieved(cell, kind):
        if kind == "decode" and cell["decode.bytes_per_token"] and cell["decode.tokens_per_s"]:
            return cell["decode.bytes_per_token"] * cell["decode.tokens_per_s"] / cell.batch / 1e9
        if kind == "prefill" and cell["prefill.gflop"] and cell["prefill.prefill_ms"]:
            return cell["prefill.gflop"] / cell["prefill.prefill_ms"] * 1e3
        return cell[kind + ".gb_per_s"]
    rows, groups = [], {}
    panels = panels_of(results, cells)
    for title, of in panels:
        longest = max(cell.context for cell in of)
        for cell in sorted((c for c in of if c.context == longest), key=lambda c: spec_order(c.spec)):
            for kind, label in kinds:
                share, value = cell[kind + ".peak_fraction"], achieved(cell, kind)
                if share and value:
                    groups.setdefault(kind, []).append((f"{title}, " * (len(panels) > 1) + cell.spec, cell.spec,
                                                        value, value / share, share))
                    rows.append({"panel": title, "measurement": kind, "spec": cell.spec, "context": cell.context,
                                 "achieved": value, "limit": value / share, "share": share})
    if not groups:
        return "no limit was measured beside the times (peak_fraction)"
    most = max(len(group) for group in groups.values())
    used = [(kind, label) for kind, label in kinds if kind in groups]
    columns = 2 if len(used) > 1 and len(panels) == 1 else 1
    figure, axes = subplots(math.ceil(len(used) / columns), columns, squeeze=False, figsize=(
        WIDTH, (0.75 + 0.2 * most) * math.ceil(len(used) / columns)))
    look = styles(specs_of(cells))
    for spare in axes.flat[len(used):]:
        spare.axis("off")
    for axis, (kind, label) in zip(axes.flat, used):
        for y, (title, spec, value, limit, share) in enumerate(groups[kind]):
            axis.plot([value, limit], [y, y], color=FAINT, lw=0.8, zorder=1)
            axis.plot(value, y, color=look[spec]["color"], marker=look[spec]["marker"])
            axis.plot(limit, y, color=INK, marker="|", markersize=9)
            axis.text(math.sqrt(value * limit), y - 0.12, f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %",
                      ha="center", va="bottom", fontsize=6.5)
        axis.set_yticks(range(len(groups[kind])))
        axis.set_yticklabels([item[0] for item in groups[kind]])
        axis.set_ylim(len(groups[kind]) - 0.5, -0.7)
        axis.set_xscale("log")
        low, high = min(item[2] for item in groups[kind]), max(max(item[2:4]) for item in groups[kind])
        axis.set_xlim(low / 1.3, high * 1.3)
        few = high / low < 30
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(label)
        axis.grid(axis="y", visible=False)
    return Drawing(figure, "What was reached (markers) of the machine's limits (bars), measured in the same run.", rows)


# ---- everything

# name, title, function, whether it is drawn for every run (else once).
FIGURES = [
    ("delta_ppl_heatmap", "Change of perplexity", delta_ppl_heatmap, True),
    ("stability_heatmap", "Change of perplexity in percent", stability_heatmap, True),
    ("pareto_kld", "Quality against size", pareto_kld, True),
    ("pareto_decode", "Speed against size", pareto_decode, True),
    ("needle_heatmap", "Needle in a haystack", needle_heatmap, True),
    ("latency_vs_context", "Time of a step against context", latency_vs_context, True),
    ("vram_vs_context", "Peak memory against context", vram_vs_context, True),
    ("memory_loglog", "Size of the KV cache against context", memory_loglog, True),
    ("roofline", "Against the machine's limits", roofline, True),
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
