"""Figures of what a KV cache costs: bytes, times, and how close these are to the machine's limits."""

import math

from matplotlib.legend import Legend

import labels
import tables
from drawing import (FAINT, INK, MANY, PAPER, PLAN, SIDE_BY_SIDE, WIDTH, Drawing, FuncFormatter, Line2D, LogLocator,
                     NullLocator, axis_label, begin, engine_of, grid, group_handles, is_plan, legend, lines, look,
                     looks, panels_of, point_look, scale_of, short_name, short_names, subplots)
from results import MIB, decode_ms_per_token
from tables import context_label, model_name, spec_order


def vram_vs_context(results, cells):
    def peak(cell):
        value = cell["memory.vram_peak_bytes"] or cell["memory.rss_peak_bytes"]
        return value / 2**30 if value else None
    def marks(per_spec):
        """(value, word, side) of the weights, and of the device where it is not far above, then its size in GiB."""
        of = [point[2] for points in per_spec.values() for point in points]
        total = next((c["memory.vram_total_bytes"] / 2**30 for c in of if c["memory.vram_total_bytes"]), None)
        weights = min((peak(c) - c["memory.beyond_weights_bytes"] / 2**30 for c in of if c["memory.beyond_weights_bytes"]),
                      default=None)
        near = total and max(map(peak, of)) > 0.4 * total
        return ([(weights, "weights", "bottom")] if weights else []) + ([(total, "device", "top")] if near else []), total
    def limit(axis, per_spec, few):
        found, total = marks(per_spec)
        if total and not any(word == "device" for _, word, _ in found):  # a line there would leave no room for the others
            axis.text(0.03, 0.97, f"device: {total:.0f} GiB", transform=axis.transAxes, fontsize=6.5, va="top")
        for value, word, side in found:
            axis.axhline(value, color=INK, lw=0.8, ls=(0, (1, 1)))
            axis.text(0.03, value, word, transform=axis.get_yaxis_transform(), fontsize=6.5, va=side)
    resident = not any(cell["memory.vram_peak_bytes"] for cell in cells)
    drawn = lines(results, cells, peak, "peak, GiB", "less", limit,
                  seen=lambda per_spec: [mark[0] for mark in marks(per_spec)[0]])
    if drawn is None:
        return "peak memory was not measured at two contexts or more"
    figure, *_, rows = drawn
    return Drawing(figure, f"Peak {'resident' if resident else 'GPU'} memory against context, a line a scheme.", rows)


def memory_loglog(results, cells):
    drawn = lines(results, cells, lambda c: c["kv_size.kv_bytes"] / MIB if c["kv_size.kv_bytes"] else None,
                  "KV cache, MiB", "less", log=True)
    if drawn is None:
        return "bytes of the KV cache are not known at two contexts or more"
    figure, axes, panels, _, rows = drawn
    for axis, (_, per_spec) in zip(axes, panels):
        axis.set_yscale("log", base=2)
        slopes = [math.log2(p[-1][1] / p[0][1]) / math.log2(p[-1][0] / p[0][0]) for p in per_spec.values()]
        axis.text(0.04, 0.92, f"slope {min(slopes):.3f}" + (f" to {max(slopes):.3f}" if max(slopes) - min(slopes) > 5e-4
                                                           else ""), transform=axis.transAxes, fontsize=7)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return Drawing(figure, "Bytes of the KV cache against context, both logarithmic; a slope of 1 is proportional.", rows)


def far_off(per_spec):
    """{spec: (least, most)} of lines that are nowhere within half as much again of `none`, if they are the lesser part and
    few enough to be named in a corner."""
    ends = {spec: (min(p[1] for p in points), max(p[1] for p in points)) for spec, points in per_spec.items()}
    low, high = ends.get("none", (0, math.inf))
    far = {spec: ends[spec] for spec in sorted(ends, key=spec_order)
           if ends[spec][0] > 1.5 * high or ends[spec][1] < low / 1.5}
    return far if 2 * len(far) <= len(ends) - len(far) and len(far) < 5 else {}


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
    def limits(per_spec):
        """spec -> [(context, limit)] of what is not far off."""
        far = far_off(per_spec)
        return {spec: [(x, y / cell["decode.peak_fraction"]) for x, y, cell in points] for spec, points in per_spec.items()
                if spec not in far}
    def floors(axis, per_spec, few):
        for spec, points in limits(per_spec).items():
            if few or spec == "none":
                axis.plot(*zip(*points), color=look(spec)["color"], lw=0.9, ls=(0, (1, 1)), alpha=0.9)
        if not few:  # from the least to the most of all
            by_context = {}
            for points in limits(per_spec).values():
                for x, y in points:
                    by_context.setdefault(x, []).append(y)
            xs = sorted(by_context)
            axis.fill_between(xs, [min(by_context[x]) for x in xs], [max(by_context[x]) for x in xs], color=FAINT,
                              alpha=0.25, lw=0)
    drawn = lines(results, timed, rate, "tokens a second", "more", floors, height=2.7, far=far_off,
                  seen=lambda per_spec: [y for points in limits(per_spec).values() for _, y in points],
                  handles=[Line2D([], [], color=FAINT, lw=0.9, ls=(0, (1, 1)), label="limit by bytes")])
    if drawn is None:
        return "decoding was not timed at two contexts or more beside its limit (peak_fraction)"
    figure, _, panels, style, rows = drawn
    limit_of = {(title, spec, x): y / cell["decode.peak_fraction"] for title, per_spec in panels
                for spec, points in per_spec.items() for x, y, cell in points}
    for row in rows:
        row["floor"] = limit_of[row["panel"], row.get("spec", row.get("backend")), row["context"]]
    return Drawing(figure, f"New tokens a second of {model_name(model)} against context; dotted: what the bytes of weights and "
                   "cache allow at the bandwidth measured in the same run" +
                   (" (of `none`; grey: from the least to the most that it allows)." if len(style) > MANY else ".") +
                   (f" Not fused and left out: {', '.join(left_out)}." if left_out else ""), rows)


def latency_vs_context(results, cells):
    def marks(axis, per_spec, few):
        for spec, points in per_spec.items() if few else ():
            context = points[0][2]["decode.break_even_context"]
            if context and points[0][0] < context <= points[-1][0]:
                axis.axvline(context, ymax=0.8, color=look(spec)["color"], lw=0.8, ls=(0, (4, 2)), alpha=0.7)
    drawn = lines(results, cells, decode_ms_per_token, "ms per token", "less", marks, far=far_off)
    if drawn is None:
        return "decoding was not timed at two contexts or more"
    figure, _, panels, style, rows = drawn
    for title, per_spec in panels:
        texts = {spec: points[0][2].texts.get("decode.break_even") for spec, points in per_spec.items()}
        for row in rows:
            if row["panel"] == title and "spec" in row:
                row["break_even"] = texts[row["spec"]]
    return Drawing(figure, "Time of a decoding step against context" + (
        "." if len(style) > MANY else "; vertical lines mark where a scheme breaks even with the unquantized cache."), rows)


def pareto_front(cells, value, better):
    """From fewest bits on, the cells that no other beats in both."""
    front, best = [], None
    for cell in sorted(cells, key=lambda c: (c["kv_size.bits_per_element"], value(c) if better == "less" else -value(c))):
        if best is None or (value(cell) > best if better == "more" else value(cell) < best):
            best = value(cell)
            front.append(cell)
    return front


SPEEDS = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4]  # times that of `none`, of which a legend shows some


def marker_size(speed, least=5.2):
    """Points across, of an area that is proportional to speed; None: not timed."""
    return least if speed is None else least * math.sqrt(min(max(speed, SPEEDS[0]), SPEEDS[-1]))


def speeds(cells):
    """spec -> decode speed against `none`, at the longest context at which both were timed, of cells that differ in spec
    and context alone."""
    times = {(cell.spec, cell.context): decode_ms_per_token(cell) for cell in cells if decode_ms_per_token(cell)}
    found = {}
    for spec, context in sorted(times, key=lambda key: key[1]):
        if ("none", context) in times:
            found[spec] = times["none", context] / times[spec, context]
    return found if len(found) > 1 else {}


def pareto_panels(results, cells, y_key, y_label, better, log, interval=False):
    """Bits per element against y at the longest context. What no other beats in both is joined, that of plans by a line of
    its own, and named. In a single panel, and of engines' formats, which have their engine's colour and marker, the others
    are named as well where there is room. Where speed is not the y axis, markers are as large as decoding is fast."""
    panels = []
    for title, of in panels_of(results, [c for c in cells if c["kv_size.bits_per_element"] and c[y_key] is not None]):
        longest = max(cell.context for cell in of)
        alike = {(c.model, c.backend, c.batch, c.device) for c in of}
        fast = {} if y_key.startswith("decode") else speeds(
            [c for c in cells if (c.model, c.backend, c.batch, c.device) in alike])
        of = sorted((c for c in of if c.context == longest), key=lambda c: c["kv_size.bits_per_element"])
        if len(of) > 1:
            panels.append((f"{title}, {context_label(longest)}", of, fast))
    if not panels:
        return None
    style = looks({c.spec for _, of, _ in panels for c in of})
    # Of several small panels the legend has to say what lines and sizes mean, too.
    grouped = len(style) > (MANY if len(panels) == 1 else MANY - 4) or any(engine_of(spec) or is_plan(spec) for spec in style)
    large = grouped or len(panels) == 1
    figure, axes = grid(len(panels), 4.6 if grouped else 3.4 if large else 2.2, columns=1 if large else 3,
                        single=WIDTH if large else 4.4)
    def bits(cell):
        return cell["kv_size.bits_per_element"]
    def size_of(cell):
        return abs(cell[y_key]) if log else cell[y_key]
    def ends(cell):
        return cell[y_key + "_lo"] or cell[y_key + "_min"], cell[y_key + "_hi"] or cell[y_key + "_max"]
    # One below zero is zero, but for rounding.
    floors = [next((c["perplexity.kld_floor_nats"] for c in of if (c["perplexity.kld_floor_nats"] or 0) > 0), None)
              if y_key == "perplexity.kld_nats" else None for _, of, _ in panels]
    # Where rounding is a line, `none` is that line, and what there is to see has the room.
    as_line = all(floor and any(c.spec != "none" for c in of) for floor, (_, of, _) in zip(floors, panels))
    # Where rounding does nothing that a logarithm could show, neither does `none`.
    nothing = log and y_key == "perplexity.kld_nats" and all(abs(c[y_key]) <= 1e-7 for _, of, _ in panels for c in of if c.spec == "none")
    shown_cells = [[c for c in of if not ((as_line or nothing) and c.spec == "none")] for _, of, _ in panels]
    most_bits = max(bits(c) for of in shown_cells for c in of)
    ranges = [(min(v), max(v)) for v in ([*map(size_of, of), *(e for c in of for e in ends(c) if e)] for of in shown_cells)]
    scale = "log" if log else scale_of(ranges).replace("log", "zero")
    rows, drawn = [], []
    for axis, (title, of, fast), floor, here, (least, most) in zip(axes, panels, floors, shown_cells, ranges):
        # `none` and rounding alone may be ever so small: they stand at the bottom then.
        bottom = min((abs(c[y_key]) for c in of if c.spec != "none" and c[y_key]), default=1e-6) / 10
        def shown(cell, bottom=bottom):
            return max(abs(cell[y_key]), bottom) if log else cell[y_key]
        plans = [c for c in here if is_plan(c.spec)]
        uniform = [c for c in of if not is_plan(c.spec)]
        front = pareto_front(uniform, size_of, better)
        plan_front = pareto_front(plans, size_of, better)
        rows += [{"panel": title, "spec": c.spec, "engine": engine_of(c.spec)[0] if engine_of(c.spec) else None,
                  "bits_per_element": bits(c), "value": c[y_key], "lo": ends(c)[0], "hi": ends(c)[1],
                  "on_front": c in front or c in plan_front, **({"decode_speed_of_none": fast.get(c.spec)} if fast else {})}
                 for c in of]
        front = [c for c in front if c in here]
        if floor and (floor >= bottom or as_line):
            axis.axhline(max(floor, bottom), color=INK, lw=0.8, ls=(0, (1, 1)))
            plain = next((bits(c) for c in of if c.spec == "none"), None)
            # At the left if a point is near to it at the right; of groups the legend is there.
            left = not grouped and any(bits(c) > most_bits / 2 and size_of(c) < 3 * floor for c in here)
            words = f"{plain:.0f} bits: rounding alone" if as_line and plain else "rounding alone"
            axis.text(0.01 if left else 0.99, max(floor, bottom), words + f", {floor:.1g}" * (floor < bottom),
                      transform=axis.get_yaxis_transform(), fontsize=6.5, va="bottom", ha="left" if left else "right")
        axis.plot([bits(c) for c in front], [shown(c) for c in front], color=FAINT, lw=1.4 if large else 0.9, zorder=1)
        axis.plot([bits(c) for c in plans], [shown(c) for c in plans], color=INK, lw=1, zorder=1)
        at_once = pareto_front([c for c in here if encodes_at_once(c) and not is_plan(c.spec)], size_of, better)
        if at_once == front or not grouped:
            at_once = []
        axis.plot([bits(c) for c in at_once], [shown(c) for c in at_once], color=FAINT, lw=1, ls=(0, (3, 2)), zorder=1)
        if log:
            axis.set_yscale("log")
        # A range that the layout below is made for.
        axis.plot([bits(c) for c in here], [shown(c) for c in here], linestyle="")
        for low, high in (ends(c) for c in here if interval):
            if low is not None and high is not None and (not log or low > 0):
                axis.plot([most_bits] * 2, [max(low, bottom), high], linestyle="")
        if not log:
            begin(axis, scale, least, most)
        axis.set_xlim(max(0, min(bits(c) for of in shown_cells for c in of) - 1.2) if as_line or nothing else 0,
                      most_bits + 1.2 if as_line or nothing else most_bits * 1.08)
        axis.set_title(title, pad=11 if scale == "near" else None)
        axis.set_xlabel("bits per element")
        if large or axis in axes[::3]:
            axis.set_ylabel(y_label)
        drawn.append((axis, here, fast, [front, at_once, plan_front], shown))
    handles = line_handles(drawn)
    if grouped and log and better == "less":  # the lower left is free: nothing is as good
        figure.spare = None
        lined = any(len(fronts[2]) > 1 for *_, fronts, _ in drawn)
        groups = group_handles({c.spec for of in shown_cells for c in of if not (lined and is_plan(c.spec))})
        if any(spec.endswith("-unrotated") for spec in style):
            groups.append(Line2D([], [], color=INK, marker="o", markerfacecolor=PAPER, linestyle="", label="not rotated"))
        axes[0].add_artist(axes[0].legend(handles=groups, loc="lower left", ncol=2, columnspacing=1.2, fontsize=7,
                                          handlelength=1.6, handler_map=SIDE_BY_SIDE))
    elif grouped:
        figure.spare = None
        legend(figure, group_handles({c.spec for of in shown_cells for c in of}))
    elif not large:  # else all are named
        legend(figure, [Line2D([], [], label=spec, **point_look(of)) for spec, of in style.items()
                        if any(c.spec == spec for here in shown_cells for c in here)] + handles)
    if handles and large:  # where nothing is: of errors at the upper right, of speeds at the lower
        axes[0].legend(handles=handles, loc="upper right" if log and better == "less" else "lower right", fontsize=7)
    figure.draw_without_rendering()  # names, and what steps aside, depend on the layout
    for axis, of, fast, fronts, shown in drawn:
        of = sorted(of, key=lambda c: ([c not in front for front in fronts], bits(c), shown(c)))
        points = [(bits(c), shown(c)) for c in of]
        beside = labels.side_by_side(axis, points, size=4.7) if large else [x for x, _ in points]
        for cell, x, (_, y) in zip(of, beside, points):
            own, (low, high) = point_look(style[cell.spec]), ends(cell)
            if interval and low is not None and high is not None and (not log or low > 0):
                axis.plot([x, x], [max(low, shown(cell) * 1e-3), high], color=own["color"], lw=1, alpha=0.8)
            size = marker_size(fast.get(cell.spec)) if cell.spec in fast or not fast else 3
            axis.plot(x, y, zorder=3, clip_on=False, markersize=size, **own)
        if grouped:
            join_rotated(axis, of, beside, points, style)
        name_cells(axis, of, beside, points, fronts, fast, "all" if large and not grouped else "some" if large else "front")
    return figure, rows


def encodes_at_once(cell):
    """Whether every token is encoded as it comes, none kept in 16 bits for a while: by what a preset's name stands for."""
    labels_of = [text for key, text in cell.texts.items() if key.endswith(".label")]
    return any("residual=0" in text for text in [cell.spec, *labels_of])


def line_handles(drawn):
    """What lines and the sizes of markers mean."""
    def any_of(index):
        return any(len(fronts[index]) > 1 for *_, fronts, _ in drawn)
    handles = [Line2D([], [], color=FAINT, lw=1.4, label="no other is better in both")] * any_of(0)
    handles += [Line2D([], [], color=FAINT, lw=1, ls=(0, (3, 2)), label="... that encodes every token")] * any_of(1)
    if any_of(2):
        handles.append(Line2D([], [], color=INK, lw=1, marker=PLAN[3], label="plans for a budget"))
    timed = [fast[c.spec] for _, of, fast, *_ in drawn for c in of if c.spec in fast]
    if timed:
        around = {1, max((speed for speed in SPEEDS if speed <= min(timed)), default=SPEEDS[0]),
                  min((speed for speed in SPEEDS if speed >= max(timed)), default=SPEEDS[-1])}
        handles += [Line2D([], [], color=FAINT, marker="o", linestyle="", markersize=marker_size(speed),
                           label=f"{speed:g}×" + " or more" * (speed == SPEEDS[-1]) +
                           " none's tokens a second" * (speed == min(around))) for speed in sorted(around)]
        if len(timed) < sum(len(of) for _, of, *_ in drawn):
            handles.append(Line2D([], [], color=FAINT, marker="o", linestyle="", markersize=3, label="not timed"))
    return handles


def join_rotated(axis, cells, xs, points, style):
    """An arrow from what an engine stored unrotated to the same rotated."""
    at = {cell.spec: (x, y) for cell, x, (_, y) in zip(cells, xs, points)}
    for spec, place in at.items():
        rotated = at.get(spec.removesuffix("-unrotated"))
        if spec.endswith("-unrotated") and rotated:
            arrow = axis.annotate("", rotated, place, zorder=2, arrowprops={
                "arrowstyle": "-|>", "mutation_scale": 6, "lw": 0.8, "color": style[spec]["color"], "alpha": 0.8, "shrinkA": 3,
                "shrinkB": 3, "connectionstyle": "arc3,rad=0.25"})
            arrow.set_in_layout(False)


def name_cells(axis, cells, xs, points, fronts, fast, which):
    """The names of the first front and of the plans' in full, and of the others by `which`: "all", "some", those for which
    there is room, or no more than the "front"."""
    scale = 72 / axis.figure.dpi
    places = [(x, y) for x, (_, y) in zip(xs, points)]
    obstacles = [(x - 3, y - 3, x + 3, y + 3) for x, y in labels.pixels(axis, places)]
    for item in [*(child for child in axis.get_children() if isinstance(child, Legend)),
                 *(text for text in axis.texts if text.get_text())]:
        box = item.get_window_extent()
        obstacles.append(tuple(value * scale for value in (box.x0, box.y0, box.x1, box.y1)))
    for front in fronts:
        line = sorted(labels.pixels(axis, [point for cell, point in zip(cells, points) if cell in front]))
        for (x0, y0), (x1, y1) in zip(line, line[1:]):
            obstacles += [(x - 0.3, y - 0.3, x + 0.3, y + 0.3)
                          for x, y in ((x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (i / 60 for i in range(61)))]
    names = short_names([cell.spec for cell in cells])
    bold = [cell in fronts[0] or cell in fronts[2] for cell in cells]
    def timed(spec):
        return f", {fast[spec]:.2f}×" if spec in fast and spec != "none" and which != "front" else ""
    obstacles = labels.name_points(axis, places, [names[c.spec] + timed(c.spec) if of else "" for c, of in zip(cells, bold)],
                                   obstacles, must=which != "front", fontsize=6 if which == "front" else 7.2, fontweight="bold")
    if which == "front":
        return
    rest = sorted(((place, short_name(names[cell.spec]) + timed(cell.spec)) for cell, place, of in zip(cells, places, bold) if not of and
                   not cell.spec.endswith("-unrotated")), key=lambda item: "+" in item[1])  # presets before bare specs
    labels.name_points(axis, [place for place, _ in rest], [name for _, name in rest], obstacles, must=which == "all",
                       fontsize=6)


def pareto_kld(results, cells):
    hardly = {c.spec for c in cells if c.hardly_encoded("perplexity")}
    cells = [c for c in cells if not c.hardly_encoded("perplexity")]
    left_out = sorted(hardly - {c.spec for c in cells if c["perplexity.kld_nats"] is not None}, key=spec_order)
    left_out = f" Hardly encoded and left out: {', '.join(left_out)}." if left_out else ""
    drawn = pareto_panels(results, cells, "perplexity.kld_nats", "KLD, nats", "less", True, interval=True)
    if drawn:
        words = ("KL divergence against bits per element, with 95 % intervals; the schemes that no other beats in both are joined" +
                 (" and named in bold, dashed those of formats that encode every token as it comes (hf-* and kivi-* keep the "
                  "newest in 16 bits). What lies on each other stands side by side; arrows lead from an engine's unrotated "
                  "format to the same rotated." if any(row["engine"] for row in drawn[1]) else "."))
        return Drawing(drawn[0], words + left_out, drawn[1])
    drawn = pareto_panels(results, cells, "perplexity.delta_ppl", "|change of ppl|", "less", True)
    if drawn:
        return Drawing(drawn[0], "Change of perplexity against bits per element (no KL divergence was measured); the "
                       "schemes that no other beats in both are joined." + left_out, drawn[1])
    return "no KL divergence beside the bits per element" + ("." + left_out if left_out else "")


def pareto_decode(results, cells):
    net = any(cell["decode.tokens_per_s_net"] for cell in cells)
    drawn = pareto_panels(results, cells, "decode.tokens_per_s_net" if net else "decode.tokens_per_s",
                          "net decode, tok/s" if net else "decode, tok/s", "more", False, interval=True)
    if drawn is None:
        return "no decoding was timed beside the bits per element"
    return Drawing(drawn[0], "Speed of decoding against bits per element; the schemes that no other beats in both are joined.",
                   drawn[1])


def shares(axis, entries, label, style, log, row_names):
    """What was reached of a limit: entries (group, spec, achieved, limit, share), a line each, groups apart; with row_names
    each is named, as there are too many for a legend."""
    groups = list(dict.fromkeys(entry[0] for entry in entries))
    places, y, last = [], 0.0, None
    heads = {}
    for group, *_ in entries:
        if group != last:
            y += (1.9 if row_names else 0.9) if last is not None else 1.0 if row_names and len(groups) > 1 else 0.0
            heads[group] = y - 1
        places.append(y)
        y, last = y + 1, group
    most = max(entry[3] for entry in entries)
    unit = 1e3 if most > 2e3 else 1
    label = label.replace("GB/s", "TB/s").replace("GFLOP/s", "TFLOP/s") if unit > 1 else label
    for y, (_, spec, value, limit, share) in zip(places, entries):
        axis.plot([value / unit, limit / unit], [y, y], color=FAINT, lw=0.8, zorder=1)
        axis.plot(value / unit, y, markersize=4, **point_look(style[spec]))
        axis.plot(limit / unit, y, color=INK, marker="|", markersize=6)
        axis.annotate(f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %", (max(value, limit) / unit, y),
                      (5, 0), textcoords="offset points", ha="left", va="center", fontsize=6)
    if len(groups) > 1 and not row_names:
        middle = {group: [y for y, entry in zip(places, entries) if entry[0] == group] for group in groups}
        axis.set_yticks([sum(of) / len(of) for of in middle.values()])
        axis.set_yticklabels(groups, fontsize=7)
        axis.tick_params(axis="y", length=0)
    else:
        axis.set_yticks(places)
        axis.set_yticklabels([entry[1] for entry in entries], fontsize=6 if row_names else None)
        axis.tick_params(axis="y", length=0)
        for group in groups if len(groups) > 1 else ():
            axis.text(0.01, heads[group], group.replace("\n", ", "), transform=axis.get_yaxis_transform(), fontsize=7,
                      fontweight="bold", va="center")
    axis.set_ylim(places[-1] + 0.8, -0.8)
    low = min(entry[2] for entry in entries)
    if not log:
        axis.set_xlim(0, 1.18 * most / unit)
    else:
        axis.set_xscale("log")
        axis.set_xlim(low / unit / 1.3, 1.3 * most / unit * (most / low) ** 0.12)
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if most / low < 30 else (1,)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_title(axis_label(label, "log" if log else "zero"))
    axis.grid(axis="y", visible=False)


def spans_decades(found):
    """Whether one of the panels {kind: entries} needs a logarithmic axis; then all have one."""
    return any(max(entry[3] for entry in entries) >= 20 * min(entry[2] for entry in entries) for entries in found.values())


def height_of(entries, row_names):
    """Inches of an axis of `shares`."""
    groups = len({entry[0] for entry in entries})
    return 0.55 + (0.2 * len(entries) if groups == 1 and not row_names else
                   0.115 * (len(entries) + (1.9 if row_names else 0.9) * (groups - 1)))


def spec_markers(style, entries):
    used = {entry[1] for entry in entries}
    return [Line2D([], [], label=spec, **point_look(of)) for spec, of in style.items() if spec in used]


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
    style = looks({row["spec"] for row in rows})
    columns, many, log = min(2, len(used)), len(style) > MANY, spans_decades(found)
    figure, axes = subplots(math.ceil(len(used) / columns), columns, squeeze=False, figsize=(
        WIDTH, max(height_of(entries, many) for entries in found.values()) * math.ceil(len(used) / columns) + 0.3))
    for spare in axes.flat[len(used):]:
        spare.axis("off")
    for axis, (kind, label) in zip(axes.flat, used):
        shares(axis, found[kind], label, style, log, many)
    figure.spare = None
    if len({row["panel"] for row in rows}) > 1 and not many:
        legend(figure, spec_markers(style, sum(found.values(), [])))
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
    style = looks({row["spec"] for row in rows})
    many, log = len(style) > MANY, spans_decades(found)
    heights = [[height_of(found[kind], many) for kind in part] for part in parts]
    figure, _ = subplots(figsize=(WIDTH, max(map(sum, heights)) + 0.3))
    figure.clear()
    columns = figure.add_gridspec(1, len(parts))
    for i, (part, of) in enumerate(zip(parts, heights)):
        spare = max(map(sum, heights)) - sum(of)  # below the shorter column
        column = columns[i].subgridspec(len(part) + (spare > 0.1), 1, height_ratios=of + [spare] * (spare > 0.1))
        for j, kind in enumerate(part):
            shares(figure.add_subplot(column[j]), found[kind], f"{kind}, GB/s", style, log, many)
    figure.spare = None
    if not many:
        legend(figure, spec_markers(style, sum(found.values(), [])))
    return Drawing(figure, "What single kernels reach (markers) of the read bandwidth (bars) measured in the same run.", rows)
