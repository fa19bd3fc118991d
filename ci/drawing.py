"""What all figures share: style, panels, legends, heatmaps, and how one is saved.

Nothing is told apart by colour alone: schemes and models have markers and dashes of their own, colour scales grow
monotonously darker, and heatmaps have their numbers written in.
"""

import math
import os
import re
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402,F401

import tables  # noqa: E402
from tables import context_label, model_name, spec_order  # noqa: E402

INK, PAPER, FAINT = "#232323", "#fefefe", "#8c8c8c"  # the page turns ink and paper to its own colours
# Okabe and Ito's palette less its black and yellow.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1))]
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


# Engines whose formats are measured (kvqbench --list-presets): name, how such specs begin, colour and marker.
ENGINES = [("llama.cpp", "llamacpp-", "#0072b2", "o"), ("vLLM", "vllm-", "#d55e00", "s"),
           ("TensorRT-LLM", "trtllm-", "#009e73", "^"), ("SGLang", "sglang-", "#cc79a7", "D"),
           ("LMDeploy", "lmdeploy-", "#8a5a2b", "v"), ("MLX", "mlx-", "#56b4e9", "P"), ("transformers", "hf-", "#b58900", "X"),
           ("KIVI", "kivi-", "#7b4fa3", "*"), ("exllamav3", "exl", "#5f8d3b", "<"),
           ("ik_llama.cpp", "ik-llamacpp-", "#3b6f8d", "p"),
           ("TurboQuant, all layers", "turboquant-", "#b04a6e", ">")]


def engine_of(spec):
    """The row of ENGINES that a spec belongs to, or None."""
    return next((engine for engine in ENGINES if spec.startswith(engine[1])), None)


def styles(items):
    """item -> colour, marker and dash; `none` is ink, an engine's specs have its colour and marker."""
    found, i, of_engine = {}, 0, {}
    for item in items:
        if item == "none":
            found[item] = {"color": INK, "marker": "o", "linestyle": "-"}
        elif engine_of(item):
            name, _, colour, marker = engine_of(item)
            of_engine[name] = of_engine.get(name, -1) + 1
            found[item] = {"color": colour, "marker": marker, "linestyle": DASHES[of_engine[name] % 6], "alpha": 0.9}
        else:
            found[item] = {"color": COLOURS[i % 6], "marker": MARKERS[(i + 1) % 10], "linestyle": DASHES[(i + 1) % 6],
                           "alpha": 0.9}
            i += 1
    return found


def looks(results, specs):
    """spec -> its style, in their order: that of all specs of the results, so that a scheme looks the same in every figure."""
    every = styles(sorted({cell.spec for cell in results.cells}, key=spec_order))
    return {spec: every[spec] for spec in sorted(specs, key=spec_order)}


def specs_of(cells):
    return sorted({cell.spec for cell in cells}, key=spec_order)


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


def legend(figure, handles):
    """In the panel that is left over, or below all of them, where room is made for it."""
    if figure.spare is not None:
        figure.spare.legend(handles=handles, loc="center", handlelength=2.8)
        return
    width, height = figure.get_size_inches()
    entry = 0.55 + 0.06 * max(len(handle.get_label()) for handle in handles)  # inches
    rows = math.ceil(len(handles) / max(1, int(width / entry)))
    columns = math.ceil(len(handles) / rows)
    room = 0.1 + 0.16 * rows  # inches
    if room > height / 3:  # of many specs: what is drawn keeps its size
        height += room
        figure.set_size_inches(width, height)
    room /= height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.legend(handles=handles, loc="lower center", ncol=columns, handlelength=2.8, borderaxespad=0)


def plain_log(axis):
    """A logarithmic y axis with plain numbers: 1, 2 and 5 of each decade, or decades alone where there are many."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    few = high / low < 300
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    if few or 1e-3 < low and high < 1e6:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def spec_handles(style):
    return [Line2D([], [], label=spec, **look) for spec, look in style.items()]


def context_axis(axis, contexts):
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts)
    axis.set_xticklabels([context_label(context) for context in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")


def lines(results, cells, value, label, reference=None, height=2.05):
    """Panels of `value(cell)` against context, a line a spec (a backend, where those alone differ). None where no line
    has two contexts."""
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
    style = looks(results, found) if by_spec else styles(sorted(found))
    figure, axes = grid(len(panels), height)
    for axis, (title, per_spec) in zip(axes, panels):
        for spec in style:
            if spec in per_spec:
                axis.plot([p[0] for p in per_spec[spec]], [p[1] for p in per_spec[spec]], **style[spec])
                rows += [{"panel": title, "spec" if by_spec else "backend": spec, "context": p[0], "value": p[1]}
                         for p in per_spec[spec]]
        context_axis(axis, sorted({p[0] for points in per_spec.values() for p in points}))
        values = [p[1] for points in per_spec.values() for p in points]
        if max(values) > 8 * min(values):
            plain_log(axis)
        else:
            axis.set_ylim(0, 1.08 * max(values))
        axis.set_title(title)
        if axis in axes[::3]:
            axis.set_ylabel(label)
        if reference:
            reference(axis, per_spec)
    return figure, axes, panels, style, rows


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
    drawing.figure.canvas.draw()
    drawing.figure.set_layout_engine("none")  # laid out once, not for every file
    for ending in ("pdf", "svg", "png"):
        path = os.path.join(out, f"{name}.{ending}")
        drawing.figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.04,
                               metadata={} if ending == "png" else {"Date": None} if ending == "svg" else
                               {"CreationDate": None})
        files.append(os.path.basename(path))
    columns = list(dict.fromkeys(key for row in drawing.rows for key in row))
    tables.write_csv(os.path.join(out, name + ".csv"), columns, drawing.rows)
    return files + [name + ".csv"]
