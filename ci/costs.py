"""Figures of what a KV cache costs: bytes, times, and how close these are to the machine's limits."""

import math

import labels
import tables
from drawing import (FAINT, INK, PAPER, WIDTH, Drawing, FuncFormatter, Line2D, LogLocator, NullLocator, engine_of, grid,
                     legend, lines, looks, panels_of, spec_handles, specs_of, subplots)
from results import MIB, decode_ms_per_token
from tables import context_label, model_name, spec_order

def vram_vs_context(results, cells):
    def peak(cell):
        value = cell["memory.vram_peak_bytes"] or cell["memory.rss_peak_bytes"]
        return value / 2**30 if value else None
    def limit(axis, per_spec):
        of = [point[2] for points in per_spec.values() for point in points]
        low, high = min(map(peak, of)), max(map(peak, of))
        total = next((c["memory.vram_total_bytes"] / 2**30 for c in of if c["memory.vram_total_bytes"]), None)
        weights = min((peak(c) - c["memory.beyond_weights_bytes"] / 2**30 for c in of if c["memory.beyond_weights_bytes"]),
                      default=None)
        marks = [(weights, "weights", "bottom")] if weights else []
        if total and high > 0.4 * total:
            marks.append((total, "device", "top"))
        elif total:  # far above: a line there would leave no room for the others
            axis.text(0.03, 0.97, f"device: {total:.0f} GiB", transform=axis.transAxes, fontsize=6.5, va="top")
        for value, word, side in marks:
            axis.axhline(value, color=INK, lw=0.8, ls=(0, (1, 1)))
            axis.text(0.03, value, word, transform=axis.get_yaxis_transform(), fontsize=6.5, va=side)
        values = [low, high] + [value for value, _, _ in marks]
        if weights and min(values) > max(values) / 2:  # what is added to the weights, not they, is to be seen
            spread = max(values) - min(values)
            axis.set_ylim(min(values) - 0.06 * spread, max(values) + 0.2 * spread)
        elif total and high > 0.4 * total:
            axis.set_ylim(top=max(axis.get_ylim()[1], 1.08 * total))
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


def far_off(per_spec):
    """{spec: (least, most)} of lines that are nowhere within half as much again of `none`, if they are the lesser part."""
    ends = {spec: (min(p[1] for p in points), max(p[1] for p in points)) for spec, points in per_spec.items()}
    low, high = ends.get("none", (0, math.inf))
    far = {spec: ends[spec] for spec in sorted(ends, key=spec_order)
           if ends[spec][0] > 1.5 * high or ends[spec][1] < low / 1.5}
    return far if 2 * len(far) <= len(ends) - len(far) else {}


def focus(axis, per_spec, more=()):
    """Turns an axis to what is not far off, which is named with its range instead; `more` are values to be seen, too."""
    far = far_off(per_spec)
    shown = [point[1] for spec, points in per_spec.items() if spec not in far for point in points] + list(more)
    low, high = min(shown), max(shown)
    if low <= high / 2 and not far and not more:
        return
    above = any(ends[0] > high for ends in far.values())
    base, room = (low if low > high / 2 else 0), 0.11 * len(far) * (high - low)  # for the names
    margin = 0.08 * (high - base)
    axis.set_yscale("linear")
    axis.set_ylim(max(0, base - margin - room * (not above)), high + margin + room * above)
    for i, (spec, (least, most)) in enumerate(far.items()):
        axis.text(0.03, 0.98 - 0.075 * i if above else 0.02 + 0.075 * (len(far) - 1 - i), f"{spec}: {least:.3g} to {most:.3g}",
                  transform=axis.transAxes, fontsize=6.5, va="top" if above else "bottom")


def decode_speed(results, cells):
    """Of the model with most of such cells: the figure that says it in short."""
    def rate(cell):
        return 1e3 * cell.batch / decode_ms_per_token(cell) if cell["decode.peak_fraction"] else None
    timed = [cell for cell in cells if rate(cell)]
    model = max(sorted({cell.model for cell in timed}), default=None,
                key=lambda model: len({(c.context, c.batch, c.spec) for c in timed if c.model == model}))
    timed = [cell for cell in timed if cell.model == model]
    # Beside steps that are one graph the others would be a figure about launching kernels.
    graphs = [cell for cell in timed if "in one graph" in cell.texts.get("decode.label", "")]
    left_out = sorted({c.spec for c in timed} - {c.spec for c in graphs}, key=spec_order) if graphs else []
    timed = graphs or timed
    def floors(axis, per_spec):
        found = {spec: [(x, y / cell["decode.peak_fraction"]) for x, y, cell in points] for spec, points in per_spec.items()}
        near = [spec for spec in per_spec if spec not in far_off(per_spec)]
        focus(axis, per_spec, [y for spec in near for _, y in found[spec]])
        seen.update(near)
        for spec in near:
            axis.plot(*zip(*found[spec]), color=colours[spec], lw=0.9, ls=(0, (1, 1)), alpha=0.9)
    colours = {spec: look["color"] for spec, look in looks(results, specs_of(timed)).items()}
    seen = set()
    drawn = lines(results, timed, rate, "tokens a second", reference=floors, height=2.7)
    if drawn is None:
        return "decoding was not timed at two contexts or more beside its limit (peak_fraction)"
    figure, axes, panels, style, rows = drawn
    limits = {(title, spec, x): y / cell["decode.peak_fraction"] for title, per_spec in panels
              for spec, points in per_spec.items() for x, y, cell in points}
    for row in rows:
        row["floor"] = limits[row["panel"], row.get("spec", row.get("backend")), row["context"]]
    legend(figure, spec_handles({spec: look for spec, look in style.items() if spec in seen}) +
           [Line2D([], [], color=FAINT, lw=0.9, ls=(0, (1, 1)), label="limit by bytes")])
    return Drawing(figure, f"New tokens a second of {model_name(model)} against context; dotted: what the bytes of weights and "
                   "cache allow at the bandwidth measured in the same run." +
                   (f" Not fused and left out: {', '.join(left_out)}." if left_out else ""), rows)


def latency_vs_context(results, cells):
    def marks(axis, per_spec):
        focus(axis, per_spec)
        for spec, points in per_spec.items():
            context = points[0][2]["decode.break_even_context"]
            if context and points[0][0] < context <= points[-1][0]:
                axis.axvline(context, ymax=0.8, color=colours[spec], lw=0.8, ls=(0, (4, 2)), alpha=0.7)
    colours = {spec: look["color"] for spec, look in looks(results, specs_of(
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


def pareto_front(cells, value, better):
    """From fewest bits on, the cells that no other beats in both."""
    front, best = [], None
    for cell in sorted(cells, key=lambda c: (c["kv_size.bits_per_element"], value(c) if better == "less" else -value(c))):
        if best is None or (value(cell) > best if better == "more" else value(cell) < best):
            best = value(cell)
            front.append(cell)
    return front


def pareto_panels(results, cells, y_key, y_label, better, log, interval=False):
    """Bits per element against y at the longest context; the schemes that no other beats in both are joined. Engines'
    formats are many: they have their engine's colour and marker and are named where they stand."""
    panels = []
    for title, of in panels_of(results, [c for c in cells if c["kv_size.bits_per_element"] and c[y_key] is not None]):
        longest = max(cell.context for cell in of)
        of = sorted((c for c in of if c.context == longest), key=lambda c: c["kv_size.bits_per_element"])
        if len(of) > 1:
            panels.append((f"{title}, {context_label(longest)}", of))
    if not panels:
        return None
    look = looks(results, {c.spec for _, of in panels for c in of})
    engines = any(map(engine_of, look))
    figure, axes = grid(len(panels), 4.6 if engines else 2.2 if len(panels) > 1 else 3.0, columns=1 if engines else 3,
                        single=WIDTH if engines else 4.4)
    rows, drawn = [], []
    for axis, (title, of) in zip(axes, panels):
        # `none` and rounding alone may be ever so small: they stand at the bottom then.
        bottom = min((abs(c[y_key]) for c in of if c.spec != "none" and c[y_key]), default=1e-6) / 10
        def shown(cell, key=y_key):
            return max(abs(cell[key]), bottom) if log else cell[key]
        def bits(cell):
            return cell["kv_size.bits_per_element"]
        def ends(cell):
            return cell[y_key + "_lo"] or cell[y_key + "_min"], cell[y_key + "_hi"] or cell[y_key + "_max"]
        front = pareto_front(of, lambda c: abs(c[y_key]) if log else c[y_key], better)
        rows += [{"panel": title, "spec": c.spec, "engine": engine_of(c.spec)[0] if engine_of(c.spec) else None,
                  "bits_per_element": bits(c), "value": c[y_key], "lo": ends(c)[0], "hi": ends(c)[1], "on_front": c in front}
                 for c in of]
        floor = next((c["perplexity.kld_floor_nats"] for c in of if c["perplexity.kld_floor_nats"]), None)
        # Where rounding is a line, `none` is that line, and what there is to see has the room.
        plain = [c for c in of if c.spec == "none"] if engines and y_key == "perplexity.kld_nats" and floor else []
        of, front = [c for c in of if c not in plain], [c for c in front if c not in plain]
        if y_key == "perplexity.kld_nats" and floor and (floor >= bottom or plain):
            axis.axhline(floor, color=INK, lw=0.8, ls=(0, (1, 1)))
            axis.text(0.99, floor, f"{bits(plain[0]):.0f} bits: rounding alone" if plain else "rounding alone",
                      transform=axis.get_yaxis_transform(), fontsize=6.5, va="bottom", ha="right")
        axis.plot([bits(c) for c in front], [shown(c) for c in front], color=FAINT, lw=1.4 if engines else 0.9, zorder=1)
        at_once = pareto_front([c for c in of if encodes_at_once(c)], lambda c: abs(c[y_key]) if log else c[y_key], better)
        if engines:
            axis.plot([bits(c) for c in at_once], [shown(c) for c in at_once], color=FAINT, lw=1, ls=(0, (3, 2)), zorder=1)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.08 * max(c[y_key + "_max"] or c[y_key] for c in of))
        most = max(bits(c) for c in of)
        axis.set_xlim(max(0, min(bits(c) for c in of) - 1.2) if plain else 0, most * 1.08 if not plain else most + 1.2)
        axis.set_title(title)
        axis.set_xlabel("bits per element")
        if engines or axis in axes[::3]:
            axis.set_ylabel(y_label)
        drawn.append((axis, of, front, at_once, bits, shown, ends))
        if engines:  # a range that the layout below is made for
            axis.plot([bits(c) for c in of], [shown(c) for c in of], linestyle="")
    if engines:
        engine_legend(figure, axes, look, log and better == "less")
    for axis, of, front, at_once, bits, shown, ends in drawn:
        of = sorted(of, key=lambda c: (c not in front, c not in at_once, bits(c), shown(c)))
        points = [(bits(c), shown(c)) for c in of]
        beside = labels.side_by_side(axis, points, size=4.7) if engines else [x for x, _ in points]
        for cell, x, (_, y) in zip(of, beside, points):
            of_spec, (low, high) = look[cell.spec], ends(cell)
            if interval and low is not None and high is not None and (not log or low > 0):
                axis.plot([x, x], [max(low, shown(cell) * 1e-3), high], color=of_spec["color"], lw=1, alpha=0.8)
            before = cell.spec.endswith("-unrotated")
            axis.plot(x, y, linestyle="", color=of_spec["color"], marker=of_spec["marker"], zorder=3,
                      markersize=5 if engines else 5.5, markerfacecolor=PAPER if before else of_spec["color"])
        if engines:
            join_rotated(axis, of, beside, points, look)
            name_cells(axis, of, beside, points, [front, at_once])
    if not engines:
        legend(figure, [Line2D([], [], label=s, color=l["color"], marker=l["marker"], linestyle="")
                        for s, l in look.items()])
    return figure, rows


def encodes_at_once(cell):
    """Whether every token is encoded as it comes, none kept in 16 bits for a while: by what a preset's name stands for."""
    labels_of = [text for key, text in cell.texts.items() if key.endswith(".label")]
    return any("residual=0" in text for text in [cell.spec, *labels_of])


def engine_legend(figure, axes, look, corner_is_free):
    """Of engines, not of their formats: in the lower left, where nothing is as good, or below. Then the figure has its
    layout, on which names and what steps aside depend."""
    found = {engine_of(spec) or (spec, spec, look[spec]["color"], look[spec]["marker"]): 0 for spec in look if spec != "none"}
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=name) for name, _, colour, marker in found]
    if any(spec.endswith("-unrotated") for spec in look):
        handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor=PAPER, linestyle="", label="not rotated"))
    handles += [Line2D([], [], color=FAINT, lw=1.4, label="no other is better in both"),
                Line2D([], [], color=FAINT, lw=1, ls=(0, (3, 2)), label="... that encodes every token")]
    figure.spare = None
    if corner_is_free:
        axes[0].legend(handles=handles, loc="lower left", ncol=2, handlelength=1.6, columnspacing=1.2, fontsize=7)
    else:
        legend(figure, handles)
    figure.canvas.draw()


def join_rotated(axis, cells, xs, points, look):
    """An arrow from what an engine stored unrotated to the same rotated."""
    at = {cell.spec: (x, y) for cell, x, (_, y) in zip(cells, xs, points)}
    for spec, place in at.items():
        rotated = at.get(spec.removesuffix("-unrotated"))
        if spec.endswith("-unrotated") and rotated:
            arrow = axis.annotate("", rotated, place, zorder=2, arrowprops={
                "arrowstyle": "-|>", "mutation_scale": 6, "lw": 0.8, "color": look[spec]["color"], "alpha": 0.8, "shrinkA": 3,
                "shrinkB": 3, "connectionstyle": "arc3,rad=0.25"})
            arrow.set_in_layout(False)


def name_cells(axis, cells, xs, points, fronts):
    """The names of the first front in full, then as many of the others as find room."""
    scale = 72 / axis.figure.dpi
    places = [(x, y) for x, (_, y) in zip(xs, points)]
    obstacles = [(x - 3, y - 3, x + 3, y + 3) for x, y in labels.pixels(axis, places)]
    for item in [axis.get_legend(), *(text for text in axis.texts if text.get_text())]:
        if item:
            box = item.get_window_extent()
            obstacles.append(tuple(value * scale for value in (box.x0, box.y0, box.x1, box.y1)))
    for front in fronts:
        line = sorted(labels.pixels(axis, [point for cell, point in zip(cells, points) if cell in front]))
        for (x0, y0), (x1, y1) in zip(line, line[1:]):
            obstacles += [(x - 0.3, y - 0.3, x + 0.3, y + 0.3)
                          for x, y in ((x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (i / 60 for i in range(61)))]
    obstacles = labels.name_points(axis, places, [c.spec.split("@")[0] if c in fronts[0] else "" for c in cells], obstacles,
                                   fontsize=7.2, fontweight="bold")
    def short(spec):  # colour and marker say whose it is
        engine = engine_of(spec)
        return spec.split("@")[0].removeprefix(engine[1] if engine and engine[1] not in ("mlx-", "kivi-", "exl", "turboquant-") else "")
    rest = sorted(((place, short(cell.spec)) for cell, place in zip(cells, places) if cell not in fronts[0] and
                   not cell.spec.endswith("-unrotated")), key=lambda item: "+" in item[1])  # presets before bare specs
    labels.name_points(axis, [place for place, _ in rest], [name for _, name in rest], obstacles, fontsize=6)


def pareto_kld(results, cells):
    drawn = pareto_panels(results, cells, "perplexity.kld_nats", "KLD, nats", "less", True, interval=True)
    if drawn:
        words = ("KL divergence against bits per element, with 95 % intervals; the schemes that no other beats in both are joined" +
                 (" and named in bold, dashed those of formats that encode every token as it comes (hf-* and kivi-* keep the "
                  "newest in 16 bits). What lies on each other stands side by side; arrows lead from an engine's unrotated "
                  "format to the same rotated." if any(row["engine"] for row in drawn[1]) else "."))
        return Drawing(drawn[0], words, drawn[1])
    drawn = pareto_panels(results, cells, "perplexity.delta_ppl", "|change of ppl|", "less", True)
    if drawn:
        return Drawing(drawn[0], "Change of perplexity against bits per element (no KL divergence was measured); the "
                       "schemes that no other beats in both are joined.", drawn[1])
    return "no KL divergence beside the bits per element"


def pareto_decode(results, cells):
    net = any(cell["decode.tokens_per_s_net"] for cell in cells)
    drawn = pareto_panels(results, cells, "decode.tokens_per_s_net" if net else "decode.tokens_per_s",
                          "net decode, tok/s" if net else "decode, tok/s", "more", False, interval=True)
    if drawn is None:
        return "no decoding was timed beside the bits per element"
    return Drawing(drawn[0], "Speed of decoding against bits per element; the schemes that no other beats in both are joined.",
                   drawn[1])


def shares(axis, entries, label, look):
    """What was reached of a limit: entries (group, spec, achieved, limit, share), a line each, groups apart."""
    groups = list(dict.fromkeys(entry[0] for entry in entries))
    places, y, last = [], 0.0, None
    for group, *_ in entries:
        y += 0.9 if last not in (None, group) else 0.0
        places.append(y)
        y, last = y + 1, group
    most = max(entry[3] for entry in entries)
    unit = 1e3 if most > 2e3 else 1
    label = label.replace("GB/s", "TB/s").replace("GFLOP/s", "TFLOP/s") if unit > 1 else label
    for y, (_, spec, value, limit, share) in zip(places, entries):
        axis.plot([value / unit, limit / unit], [y, y], color=FAINT, lw=0.8, zorder=1)
        axis.plot(value / unit, y, color=look[spec]["color"], marker=look[spec]["marker"], markersize=4)
        axis.plot(limit / unit, y, color=INK, marker="|", markersize=6)
        axis.annotate(f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %", (max(value, limit) / unit, y),
                      (5, 0), textcoords="offset points", ha="left", va="center", fontsize=6)
    if len(groups) > 1:
        middle = {group: [y for y, entry in zip(places, entries) if entry[0] == group] for group in groups}
        axis.set_yticks([sum(of) / len(of) for of in middle.values()])
        axis.set_yticklabels(groups, fontsize=7)
        axis.tick_params(axis="y", length=0)
    else:
        axis.set_yticks(places)
        axis.set_yticklabels([entry[1] for entry in entries])
    axis.set_ylim(places[-1] + 0.8, -0.8)
    low = min(entry[2] for entry in entries)
    if most / low < 20:
        axis.set_xlim(0, 1.18 * most / unit)
    else:
        axis.set_xscale("log")
        axis.set_xlim(low / unit / 1.3, 1.3 * most / unit * (most / low) ** 0.12)
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if most / low < 30 else (1,)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_title(label)
    axis.grid(axis="y", visible=False)


def height_of(entries):
    """Inches of an axis of `shares`."""
    groups = len({entry[0] for entry in entries})
    return 0.55 + (0.2 * len(entries) if groups == 1 else 0.115 * (len(entries) + 0.9 * (groups - 1)))


def spec_markers(look, entries):
    used = {entry[1] for entry in entries}
    return [Line2D([], [], label=spec, color=of["color"], marker=of["marker"], linestyle="") for spec, of in look.items()
            if spec in used]


LIMITS = "What was reached (markers) of the machine's limits (bars), measured in the same run."


def roofline(results, cells):
    """Bytes a second against the bandwidth that the same run measured, and operations against its GEMM rate."""
    kinds = [("decode", "decode (weights and cache), GB/s"), ("quantize", "quantize, GB/s"),
             ("dequantize", "dequantize, GB/s"), ("prefill", "prefill, GFLOP/s")]
    def achieved(cell, kind):
        if kind == "decode" and cell["decode.bytes_per_token"] and cell["decode.tokens_per_s"]:
            return cell["decode.bytes_per_token"] * cell["decode.tokens_per_s"] / cell.batch / 1e9
        if kind == "prefill" and cell["prefill.gflop"] and cell["prefill.prefill_ms"]:
            return cell["prefill.gflop"] / cell["prefill.prefill_ms"] * 1e3
        return cell[kind + ".gb_per_s"]
    rows, found = [], {}
    for title, panel in panels_of(results, [c for c in cells if any(c[kind + ".peak_fraction"] for kind, _ in kinds)]):
        for kind, _ in kinds:
            of = [c for c in panel if c[kind + ".peak_fraction"] and achieved(c, kind)]
            for cell in sorted(of, key=lambda c: spec_order(c.spec)):
                if cell.context == max(c.context for c in of):
                    share, value = cell[kind + ".peak_fraction"], achieved(cell, kind)
                    found.setdefault(kind, []).append((title.replace(", ", "\n"), cell.spec, value, value / share, share))
                    rows.append({"panel": title, "measurement": kind, "spec": cell.spec, "context": cell.context,
                                 "achieved": value, "limit": value / share, "share": share})
    if not found:
        return "no limit was measured beside the times (peak_fraction)"
    used = [(kind, label) for kind, label in kinds if kind in found]
    columns = min(2, len(used))
    figure, axes = subplots(math.ceil(len(used) / columns), columns, squeeze=False, figsize=(
        WIDTH, max(map(height_of, found.values())) * math.ceil(len(used) / columns) + 0.3))
    for spare in axes.flat[len(used):]:
        spare.axis("off")
    look = looks(results, {row["spec"] for row in rows})
    for axis, (kind, label) in zip(axes.flat, used):
        shares(axis, found[kind], label, look)
    figure.spare = None
    if len({row["panel"] for row in rows}) > 1:
        legend(figure, spec_markers(look, sum(found.values(), [])))
    return Drawing(figure, LIMITS, rows)


def kernels(results, cells):
    """Single kernels: bytes a second against the bandwidth, attention beside what surrounds it."""
    rows, found = [], {}
    several = len({cell.model for cell in cells if tables.kernels_of(cell)}) > 1
    for row in tables.kernel_rows(results, cells):
        if row["peak_fraction"]:
            group = f"{model_name(row['model'])}\n" * several + context_label(row["context"]) + \
                (f", batch {row['batch']}" if row["batch"] > 1 else "")
            value, share = row["gb_per_s"], row["peak_fraction"]
            found.setdefault(row["kernel"], []).append((group, row["spec"], value, value / share, share))
            rows.append({key: row[key] for key in ("kernel", "model", "spec", "context", "batch", "us", "gb_per_s")} |
                        {"limit": value / share, "share": share})
    if not found:
        return "no single kernel was timed beside its limit (measurements `kernel_...`, on request)"
    parts = [[kind for kind in found if kind == "attention"], [kind for kind in found if kind != "attention"]]
    parts = [part for part in parts if part]
    heights = [[height_of(found[kind]) for kind in part] for part in parts]
    figure, _ = subplots(figsize=(WIDTH, max(map(sum, heights)) + 0.3))
    figure.clear()
    columns = figure.add_gridspec(1, len(parts))
    look = looks(results, {row["spec"] for row in rows})
    for i, (part, of) in enumerate(zip(parts, heights)):
        spare = max(map(sum, heights)) - sum(of)  # below the shorter column
        column = columns[i].subgridspec(len(part) + (spare > 0.1), 1, height_ratios=of + [spare] * (spare > 0.1))
        for j, kind in enumerate(part):
            shares(figure.add_subplot(column[j]), found[kind], f"{kind}, GB/s", look)
    figure.spare = None
    legend(figure, spec_markers(look, sum(found.values(), [])))
    return Drawing(figure, "What single kernels reach (markers) of the read bandwidth (bars) measured in the same run.", rows)
