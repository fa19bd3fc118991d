"""What all figures share: style, panels, legends, heatmaps, and how one is saved.

A scheme has one colour and one marker in every figure (`look`). Nothing is told apart by colour alone: schemes and models
have markers and dashes of their own, colour scales grow monotonously darker, and heatmaps have their numbers written in.
Panels of one figure begin their axes alike, and one that does not begin at zero says so (`begin`).
"""

import gc
import math
import os
import re
import zlib
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.legend_handler import HandlerTuple  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402,F401

import labels  # noqa: E402
import tables  # noqa: E402
from tables import context_label, model_name, spec_order  # noqa: E402

gc.set_threshold(100_000, 50, 100)  # of its time a tenth was collecting garbage; so it takes 100 MB more

INK, PAPER, FAINT = "#232323", "#fefefe", "#8c8c8c"  # the page turns ink and paper to its own colours
# Okabe and Ito's hues and a few between them, of a lightness that stands out from white paper and from the dark page's
# alike (a contrast of 3 or more, as WCAG 2.2 wants of graphics).
BLUE, VERMILLION, GREEN, PINK, AMBER, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#cc8400", "#2f9bd6"
BROWN, GOLD, PURPLE, OLIVE, PLUM, TEAL = "#9a6431", "#a88500", "#8a5cb8", "#5f8d3b", "#b84a6e", "#1f8f9c"
COLOURS = [BLUE, VERMILLION, GREEN, PINK, AMBER, SKY, BROWN, GOLD, PURPLE, OLIVE, PLUM, TEAL]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1))]
FILLS = ["full", "left", "bottom", "right", "top", "none"]  # of a marker
MANY = 11  # schemes in a legend, at most: more are named where they stand, and the legend has their groups
DAMAGE, RATE = "YlOrBr", "Blues"
WIDTH = 6.3  # inches: the text of an A4 page

plt.rcParams.update({
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7.5, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.35, "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3, "lines.markersize": 4.5,
    "axes.linewidth": 0.7, "svg.hashsalt": "kvqbench", "pdf.fonttype": 42})


def subplots(*arguments, **keywords):
    # Not by rcParams: saving as PDF would lay out anew, without the room for the legend.
    return plt.subplots(*arguments, layout="constrained", **keywords)


@dataclass
class Drawing:
    figure: object
    alt: str       # what a reader who cannot see it should know
    rows: list     # of dicts: the numbers behind it


@dataclass
class Drawn:
    name: str
    title: str
    run: str
    alt: str
    svg: str       # to stand in a page: ink is currentColor, ids have the figure's name
    files: list = field(default_factory=list)


# ---- how a scheme looks: its text alone says, so that it looks the same in every figure of every report

# The schemes of most figures, each by itself: colour and marker.
SCHEMES = {"none": (INK, "o"), "int8-hqq": (BLUE, "s"), "int4-hqq": (VERMILLION, "^"), "int2-hqq": (PINK, "v"),
           "int4-hqq-kivi": (GREEN, "D"), "int2-hqq-kivi": (BROWN, "P"), "int4-quanto": (SKY, "X"), "int2-quanto": (OLIVE, "*")}
# Engines whose formats are measured (kvqbench --list-presets): name, how such specs begin, colour and marker.
ENGINES = [("llama.cpp", "llamacpp-", BLUE, "o"), ("vLLM", "vllm-", VERMILLION, "s"), ("TensorRT-LLM", "trtllm-", GREEN, "^"),
           ("SGLang", "sglang-", PINK, "D"), ("LMDeploy", "lmdeploy-", BROWN, "v"), ("MLX", "mlx-", SKY, "P"),
           ("transformers", "hf-", GOLD, "X"), ("KIVI", "kivi-", PURPLE, "*"), ("exllamav3", "exl", OLIVE, "<"),
           ("ik_llama.cpp", "ik-llamacpp-", SKY, "8"), ("TurboQuant, all layers", "turboquant-", PLUM, ">")]
PLAN = ("plan", "plan-", INK, (4, 1, 0))  # what ci/plan put together for a budget of bits
# Schemes by their own names, which keep the newest tokens in 16 bits.
FAMILIES = [("ggml types", ("q4_", "q5_", "q6_", "q8_", "iq4_"), TEAL, "p"),
            ("fp8 and fp4", ("fp8-", "nvfp4", "mxfp"), PLUM, "d"), ("int per token", ("int4-token", "int8-token"), PURPLE, "h")]
RESERVED = {*SCHEMES.values(), *((of[2], of[3]) for of in [*ENGINES, PLAN, *FAMILIES])}


def engine_of(spec):
    """The row of ENGINES that a spec belongs to, or None."""
    return next((engine for engine in ENGINES if spec.startswith(engine[1])), None)


def is_plan(spec):
    return spec.startswith(PLAN[1])


def family_of(spec):
    """The row of ENGINES, PLAN or FAMILIES that a spec belongs to, or None."""
    return next((of for of in [*ENGINES, PLAN, *FAMILIES] if spec.startswith(of[1])), None)


def group_of(spec):
    """What a legend of groups calls it."""
    name = spec.split("@")[0]
    if name in SCHEMES and name != "none":
        return "HQQ" if "-hqq" in name else "Quanto"
    return family_of(spec)[0] if family_of(spec) else name


def bits_said(spec):
    """The bits of the name, of the keys where values have others: 4 of int4-hqq, vllm-nvfp4 and plan-4.50; 16 of none."""
    digit = re.search(r"\d", spec.split("@")[0].removeprefix("exl3-"))
    return int(digit[0]) if digit else 16


def dash_of(bits):
    return DASHES[0] if bits > 8 else DASHES[1] if bits == 8 else DASHES[5] if bits > 4 else DASHES[2] if bits == 4 else \
        DASHES[3] if bits == 3 else DASHES[4]


def look(spec):
    """Colour, marker, how it is filled, and dash. A scheme by itself or its engine says colour and marker, bits say the
    dash; of schemes that are not known here a checksum says colour and marker, other than those of the known. A marker is
    filled in half where the spec has options, and open where an engine did not rotate yet."""
    name, _, options = spec.partition("@")
    if name in SCHEMES:
        colour, marker = SCHEMES[name]
    elif family_of(spec):
        colour, marker = family_of(spec)[2:]
    else:
        free = [(colour, marker) for colour in COLOURS for marker in MARKERS if (colour, marker) not in RESERVED]
        colour, marker = free[zlib.crc32(name.encode()) % len(free)]
    fill = "none" if name.endswith("-unrotated") else "left" if options and name in SCHEMES else "full"
    return {"color": colour, "marker": marker, "fillstyle": fill, "linestyle": dash_of(bits_said(name))}


def looks(specs):
    """spec -> its look, in their order. Where a legend names them one by one, those that would look alike are filled
    otherwise, and have other dashes where that is not enough; colour and marker stay."""
    found, seen = {}, []
    for spec in sorted(specs, key=spec_order):
        of = look(spec)
        if len(specs) <= MANY:
            kind = of["color"], of["marker"]
            fills = [of["fillstyle"], *(fill for fill in FILLS if fill != of["fillstyle"])]
            choices = [(fill, of["linestyle"]) for fill in fills] + [(fill, dash) for dash in DASHES for fill in fills]
            used = {fill for other, fill, _ in seen if other == kind}
            fill, dash = next((c for c in choices if c[0] not in used),
                              next((c for c in choices if (kind, *c) not in seen), choices[0]))
            seen.append((kind, fill, dash))
            of |= {"fillstyle": fill, "linestyle": dash}
        found[spec] = of
    return found


def styles(items):
    """item -> colour, marker and dash, of models, backends and what else is no scheme, in the order given."""
    return {item: {"color": COLOURS[i % 6], "marker": MARKERS[(i + 1) % 10], "linestyle": DASHES[(i + 1) % 6]}
            for i, item in enumerate(items)}


PARTS = {name: {"color": colour, "marker": marker, "linestyle": dash}  # of a cache
         for name, colour, marker, dash in (("keys", BLUE, "o", "-"), ("values", VERMILLION, "^", "--"), ("both", GREEN, "D", "-."))}


def point_look(of):
    """The look without its line."""
    return {"color": of["color"], "marker": of["marker"], "fillstyle": of["fillstyle"], "markerfacecoloralt": PAPER,
            "linestyle": "", **({"markerfacecolor": PAPER, "fillstyle": "full"} if of["fillstyle"] == "none" else {})}


def line_look(of):
    return {**point_look(of), "linestyle": of["linestyle"]}


def short_names(specs):
    """spec -> its name without options, unless another has the same."""
    names = [spec.split("@")[0] for spec in specs]
    return {spec: spec if names.count(name) > 1 else name for spec, name in zip(specs, names)}


def short_name(name):
    """Without its engine, where colour and marker say that and something is left that says the rest."""
    engine = engine_of(name)
    rest = name.removeprefix(engine[1]) if engine and engine[1] not in ("mlx-", "kivi-", "exl", "turboquant-") else name
    return rest if rest[:1].isalpha() and not rest.startswith("of-plan") else name


# ---- panels

def panels_of(results, cells, backends_apart=True):
    """(title, cells) for every model, backend (unless they are the lines) and batch size."""
    backends, batches = {cell.backend for cell in cells}, {cell.batch for cell in cells}
    devices = {cell.device for cell in cells}
    found = {}
    order = tables.models_by_kurtosis(results, {cell.model for cell in cells})
    for cell in sorted(cells, key=lambda c: (order.index(c.model), c.backend, c.batch, c.device)):
        title = model_name(cell.model) + (f", {cell.backend}" if backends_apart and len(backends) > 1 else "") + \
            (f", batch {cell.batch}" if len(batches) > 1 else "") + (f", {cell.device}" if len(devices) > 1 else "")
        found.setdefault(title, []).append(cell)
    return list(found.items())


def grid(count, height=2.0, columns=3, single=4.4, **kwargs):
    """A figure with `count` panels, `single` inches wide where there is one column; those left over are for the legend."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = subplots(rows, columns, figsize=(WIDTH if columns > 1 else single, height * rows + 0.5),
                                squeeze=False, **kwargs)
    for spare in axes.flat[count:]:
        spare.axis("off")
    figure.spare = axes.flat[count] if count < axes.size else None
    return figure, list(axes.flat)[:count]


SIDE_BY_SIDE = {tuple: HandlerTuple(ndivide=None, pad=0)}


def legend(figure, handles, grow=False):
    """In the panel that is left over, or below all of them, where room is made for it; the figure grows by that if it is
    much, or on request."""
    length = max(2.8, 0.85 * max((len(handle) for handle in handles if isinstance(handle, tuple)), default=0))
    how = {"handles": handles, "handlelength": length, "handler_map": SIDE_BY_SIDE}
    if figure.spare is not None:
        figure.spare.legend(loc="center", **how)
        return
    width, height = figure.get_size_inches()
    entry = 0.55 + 0.1 * (length - 2.8) + 0.06 * max(len(handle.get_label()) for handle in handles)  # inches
    rows = math.ceil(len(handles) / max(1, int(width / entry)))
    columns = math.ceil(len(handles) / rows)
    room = 0.1 + 0.16 * rows  # inches
    if grow or room > height / 3:  # what is drawn keeps its size
        height += room
        figure.set_size_inches(width, height)
    room /= height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.legend(loc="lower center", ncol=columns, borderaxespad=0, **how)


def plain_log(axis):
    """A logarithmic y axis with plain numbers: 1, 2 and 5 of each decade, or decades alone where there are many."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    few = high / low < 300
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    if few or 1e-3 < low and high < 1e6:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def scale_of(ranges):
    """How the y axes of all panels of a figure begin, by the (least, most) that each has to show: "log" where one of them
    spans more than eight times its least, "near" the least where that is more than half of the most in half of the panels
    or more, else at "zero"."""
    if any(most > 8 * least for least, most in ranges):
        return "log"
    return "near" if 2 * sum(least > most / 2 for least, most in ranges) >= len(ranges) else "zero"


def begin(axis, scale, least, most, below=0.0, above=0.0):
    """Sets a y axis that shows least to most, with room for `below` and `above` of that range. One that begins neither at
    zero nor is logarithmic says so."""
    if scale == "log":
        axis.set_ylim(least / 1.25 / (most / least) ** below, most * 1.25 * (most / least) ** above)
        plain_log(axis)
        return
    low = least if scale == "near" else 0
    room = max(most - low, 1e-3 * most)
    top = most + (0.08 + above) * room
    if scale == "zero":
        axis.set_ylim(-below * room, top)
        return
    for bins in (5, 10):  # more where the few begin far below
        ticks = MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(max(0, low - (0.04 + below) * room), top)
        if low - ticks[0] < (0.2 + below) * room:
            break
    axis.set_yticks([tick for tick in ticks if tick <= top])
    axis.set_ylim(ticks[0], top)
    if ticks[0] > 0:
        axis.text(0, 1.01, f"axis begins at {ticks[0]:g}", transform=axis.transAxes, fontsize=6.5, style="italic", va="bottom")
        for y in (0.02, 0.045):  # and looks broken off
            axis.plot([-0.012, 0.012], [y - 0.012, y + 0.012], transform=axis.transAxes, color=INK, lw=0.8, clip_on=False)


def axis_label(label, scale):
    return label + (", logarithmic" if scale == "log" else "")


def spec_handles(style):
    """Of schemes one by one, or of their groups where they are too many; then they are named where they stand."""
    if len(style) > MANY:
        return group_handles(style)
    return [Line2D([], [], label=spec, **line_look(of)) for spec, of in style.items()]


def group_handles(specs):
    """A handle a group, with the markers of all that are in it; no more than a legend may have."""
    groups = {}
    for spec in sorted(specs, key=spec_order):
        of = point_look(look(spec)) | {"fillstyle": "full", "markerfacecolor": look(spec)["color"]}
        marks = groups.setdefault(group_of(spec), [])
        if of not in marks:
            marks.append(of)
    order = [name for name, *_ in [*ENGINES, PLAN, *FAMILIES]]
    names = sorted(groups, key=lambda name: (name != "none", name in order, order.index(name) if name in order else 0))
    handles = [marks_handle(name, groups[name]) for name in names]
    if len(handles) > MANY:
        more = f"{len(handles) - MANY + 1} more, named where they stand"
        handles[MANY - 1:] = [Line2D([], [], linestyle="", label=more)]
    return handles


def marks_handle(label, marks):
    handle = tuple(Line2D([], [], **of) for of in marks)
    if len(handle) == 1:
        handle[0].set_label(label)
        return handle[0]
    return Labelled(handle, label)


class Labelled(tuple):
    """Handles that share a label."""

    def __new__(cls, handles, label):
        made = super().__new__(cls, handles)
        made.label = label
        return made

    def get_label(self):
        return self.label


def context_axis(axis, contexts):
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts)
    axis.set_xticklabels([context_label(context) for context in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")


def lines(results, cells, value, label, better, extra=None, seen=lambda per_spec: [], far=lambda per_spec: {}, handles=(),
          log=False, height=2.05):
    """Panels of `value(cell)` against context, a line a spec (a backend, where those alone differ). None where no line
    has two contexts. extra(axis, per_spec, few) draws more, with `handles` in the legend; seen(per_spec) are values that are to be
    seen beside the lines; far(per_spec) is {spec: (least, most)} of those that are named with their range instead. Specs
    that are too many for a legend are named at the ends of their lines, those first that are best somewhere."""
    panels, rows = [], []
    cells = [cell for cell in cells if value(cell) is not None]
    by_spec = len({cell.spec for cell in cells}) > 1 or len({cell.backend for cell in cells}) < 2
    for title, of in panels_of(results, cells, backends_apart=by_spec):
        per_spec = {}
        for cell in sorted(of, key=lambda c: c.context):
            per_spec.setdefault(cell.spec if by_spec else cell.backend, []).append((cell.context, value(cell), cell))
        per_spec = {spec: points for spec, points in per_spec.items() if len(points) > 1}
        if per_spec:
            panels.append((title, per_spec))
    if not panels:
        return None
    found = {spec for _, per_spec in panels for spec in per_spec}
    style = looks(found) if by_spec else styles(sorted(found))
    few = len(style) <= MANY
    if not few:
        height = max(height, 0.7 + 0.105 * max(len(per_spec) for _, per_spec in panels))
    columns = 3 if few else 1 if len(panels) < 3 else 2
    figure, axes = grid(len(panels), height, columns=columns, single=4.4 if few else WIDTH)
    away = [far(per_spec) for _, per_spec in panels]
    ranges = []
    for (_, per_spec), not_here in zip(panels, away):
        values = [p[1] for spec, points in per_spec.items() if spec not in not_here for p in points]
        values += seen(per_spec)
        ranges.append((min(values), max(values)))
    scale = "log" if log else scale_of(ranges)
    for axis, (title, per_spec), not_here, (least, most) in zip(axes, panels, away, ranges):
        for spec in style:
            if spec in per_spec:
                xs, ys, _ = zip(*per_spec[spec])
                size = {} if few else {"markersize": 3.5, "linewidth": 1}
                axis.plot(xs, ys, alpha=0.9, **(line_look(style[spec]) if by_spec else style[spec]), **size)
                rows += [{"panel": title, "spec" if by_spec else "backend": spec, "context": x, "value": y}
                         for x, y in zip(xs, ys)]
        context_axis(axis, sorted({p[0] for points in per_spec.values() for p in points}))
        if extra:
            extra(axis, per_spec, few)
        above = any(ends[0] > most for ends in not_here.values())
        room = 0.11 * len(not_here)  # for the names of what is not here
        begin(axis, scale, least, most, room * (not above), room * above)
        for i, (spec, (low, high)) in enumerate(not_here.items()):
            axis.text(0.03, 0.98 - 0.075 * i if above else 0.02 + 0.075 * (len(not_here) - 1 - i),
                      f"{spec}: {low:.3g} to {high:.3g}", transform=axis.transAxes, fontsize=6.5,
                      va="top" if above else "bottom")
        axis.set_title(title, pad=11 if scale == "near" else None)
        if axis in axes[::columns]:
            axis.set_ylabel(axis_label(label, scale))
    legend(figure, (spec_handles(style) if by_spec else
                    [Line2D([], [], label=name, **of) for name, of in style.items()]) + list(handles), grow=not few)
    if not few:
        name_lines(figure, axes, panels, away, style, better, short=columns > 1)
    return figure, axes, panels, style, rows


def best_somewhere(per_spec, better):
    """The specs that no other beats at one of the contexts."""
    pick = min if better == "less" else max
    every = {}
    for spec, points in per_spec.items():
        for context, value, _ in points:
            every.setdefault(context, []).append((value, spec))
    return {spec for values in every.values() for value, spec in values if value == pick(values)[0]}


def name_lines(figure, axes, panels, away, style, better, short):
    """Names at the right ends of lines: the best in bold, then `none`, the worst, and as many of the others as find room."""
    figure.draw_without_rendering()  # how high the axes are depends on the layout
    for axis, (_, per_spec), not_here in zip(axes, panels, away):
        names = short_names(list(per_spec))
        best = best_somewhere(per_spec, better)
        rank = sorted((spec for spec in per_spec if spec not in not_here), key=lambda spec: (
            spec not in best, spec != "none", (1 if better == "less" else -1) * -per_spec[spec][-1][1]))
        labels.name_ends(axis, [(short_name(names[spec]) if short else names[spec],
                                 per_spec[spec][-1][:2], style[spec]["color"], spec in best) for spec in rank])


def mesh(axis, values, norm, cmap):
    """Cells in colour, the first row on top; vectors, where imshow would make pixels."""
    rows, columns = values.shape
    axis.grid(False)
    drawn = axis.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(values),
                            norm=norm, cmap=cmap, edgecolors="face", linewidth=0.2)
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_ylim(rows - 0.5, -0.5)
    return drawn


def heatmap(axis, values, texts, rows, columns, norm, cmap):
    """Numbers written into their cells; what is missing is hatched."""
    grid_values = np.array([[math.nan if v is None else v for v in row] for row in values], float)
    axis.set_facecolor("none")
    image = mesh(axis, grid_values, norm, cmap)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is None:
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=FAINT, lw=0))
            elif texts:
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
                axis.text(x, y, texts[y][x], ha="center", va="center",
                          color="#ffffff" if dark else "#000000", fontsize=7)
    axis.set_xticks(range(len(columns)))
    axis.set_xticklabels(columns)
    axis.set_yticks(range(len(rows)))
    axis.set_yticklabels(rows)
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image


def for_page(svg, name):
    """The SVG to stand in a page: its ids are its own, ink follows the page, and paper is see-through."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink">',
                  svg, count=1)


def save(drawing, name, out):
    files = []
    drawing.figure.draw_without_rendering()
    drawing.figure.set_layout_engine("none")  # laid out once, not for every file; nor is its edge looked for in each
    box = drawing.figure.get_tightbbox(drawing.figure.canvas.get_renderer()).padded(0.04)  # inches
    for ending in ("pdf", "svg", "png"):
        path = os.path.join(out, f"{name}.{ending}")
        drawing.figure.savefig(path, dpi=200, bbox_inches=box,
                               metadata={} if ending == "png" else {"Date": None} if ending == "svg" else
                               {"CreationDate": None})
        files.append(os.path.basename(path))
    columns = list(dict.fromkeys(key for row in drawing.rows for key in row))
    tables.write_csv(os.path.join(out, name + ".csv"), columns, drawing.rows)
    return files + [name + ".csv"]
