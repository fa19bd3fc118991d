"""Points that lie on each other, side by side, and names, each beside its point or at the end of its line: for figures with
many of them."""

import math


def pixels(axis, points):
    """Where points of data are on the canvas, in points of 1/72 inch."""
    return [tuple(value * 72 / axis.figure.dpi for value in axis.transData.transform(point)) for point in points]


def side_by_side(axis, points, size=6.0):
    """x of each of the points (x, y) so that markers of `size` points do not cover each other: those before keep their
    place, the others step to the right. To be called when the figure has its layout."""
    placed, found = [], []
    for (x, y), (at_x, at_y) in zip(points, pixels(axis, points)):
        step = next(step for step in (i * size / 6 for i in range(400))  # the first that is far enough from all
                    if all(math.hypot(at_x + step - px, at_y - py) >= size for px, py in placed))
        placed.append((at_x + step, at_y))
        found.append(axis.transData.inverted().transform(((at_x + step) * axis.figure.dpi / 72,
                                                          at_y * axis.figure.dpi / 72))[0] if step else x)
    return found


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Where a name may stand: (x, y) in points from its marker, how it is aligned.
PLACES = [(6, 0, "left", "center"), (-6, 0, "right", "center"), (5, 5, "left", "bottom"), (5, -5, "left", "top"),
          (-5, 5, "right", "bottom"), (-5, -5, "right", "top"), (0, 6, "center", "bottom"), (0, -6, "center", "top")]
PLACES += [(dx, dy, align, "center") for reach in (14, 22, 32, 44, 58, 74) for dy in (0, 7, -7, 14, -14, 22, -22, 30, -30)
           for dx, align in ((reach, "left"), (-reach, "right"))]


def name_points(axis, points, names, obstacles=(), size=6.0, must=False, **text):
    """Writes names beside points (x, y), the first ones first, where they cover no marker, no other name and none of the
    obstacles (left, bottom, right, top, in points); those for which there is no room are left out, unless they must
    stand. A name that stands off has a line to its point. Returns the boxes that are taken now."""
    frame = axis.get_window_extent()
    scale = 72 / axis.figure.dpi
    left, bottom, right, top = (value * scale for value in (frame.x0, frame.y0, frame.x1, frame.y1))
    renderer = axis.figure.canvas.get_renderer()
    taken, lines = list(obstacles), []
    for point, name, (x, y) in zip(points, names, pixels(axis, points)):
        if not name:
            continue
        drawn = axis.annotate(name, point, (0, 0), textcoords="offset points", zorder=5, **text)
        box = drawn.get_window_extent(renderer)
        width, height = box.width * scale, box.height * scale
        def at(place):
            """The box of the name there, and a line to its point if it stands off, as boxes along it."""
            dx, dy, across, up = place
            x0 = x + dx - {"left": 0, "right": width, "center": width / 2}[across]
            y0 = y + dy - {"bottom": 0, "top": height, "center": height / 2}[up]
            line = [(x + dx * t - 0.4, y + dy * t - 0.4, x + dx * t + 0.4, y + dy * t + 0.4)
                    for t in (i / 12 for i in range(1, 13)) if math.hypot(dx * t, dy * t) > size / 2 + 0.5] if math.hypot(dx, dy) > 10 else []
            return (x0, y0, x0 + width, y0 + height), line
        inside = [place for place in PLACES for (x0, y0, x1, y1), _ in [at(place)]
                  if x0 >= left and x1 <= right and y0 >= bottom and y1 <= top]
        def free(boxes):
            return not any(overlap(part, other) for part in boxes for other in taken)
        place = next((place for place in inside for box, line in [at(place)] if free([box, *line])), None)
        if place is None and must:  # its line may cross something, then it may itself
            place = next((place for place in inside if free([at(place)[0]])), next(iter(inside), PLACES[0]))
        if place is None:
            drawn.remove()
            continue
        (box, line), (dx, dy, across, up), far = at(place), place, bool(at(place)[1])
        drawn.set(ha=across, va=up, in_layout=False)
        drawn.set_position((dx, dy))
        if far:
            lines.append(axis.annotate("", point, (dx, dy), textcoords="offset points", zorder=2, arrowprops={
                "arrowstyle": "-", "lw": 0.4, "color": drawn.get_color(), "alpha": 0.6, "shrinkA": 0, "shrinkB": size / 2}))
            lines[-1].set_in_layout(False)
        taken += [box, *line]
    return taken


def spread(wanted, gap, low, high):
    """Places of labels `gap` apart between low and high, in the order of what they want and as near to it as the others let
    them, by least squares: a monotone regression of what is wanted less the gaps below it."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks = []  # [mean, how many]
    for k, i in enumerate(order):
        blocks.append([wanted[i] - gap * k, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (before, size), (mean, count) = blocks[-2:]
            blocks[-2:] = [[(before * size + mean * count) / (size + count), size + count]]
    found = [0.0] * len(wanted)
    starts = [mean for mean, count in blocks for _ in range(count)]
    for k, i in enumerate(order):
        found[i] = min(max(starts[k], low), high - gap * (len(wanted) - 1)) + gap * k
    return found


def name_ends(axis, ends, fontsize=6.2):
    """Names of lines (name, last point, colour, bold) right of the axis, those first in the list that find no room for all,
    each with a thin line to where its own ends. To be called when the figure has its layout."""
    scale = 72 / axis.figure.dpi
    height = axis.get_window_extent().height * scale
    gap = 1.12 * fontsize
    ends = ends[:int((height + gap) / gap)]
    wanted = [y - axis.get_window_extent().y0 * scale for _, y in pixels(axis, [end[1] for end in ends])]
    for (name, point, colour, bold), y in zip(ends, spread(wanted, gap, 0, height)):
        axis.annotate(name, point, (1.03, y / height), textcoords="axes fraction", fontsize=fontsize, va="center", ha="left",
                      fontweight="bold" if bold else "normal", annotation_clip=False, arrowprops={
                          "arrowstyle": "-", "lw": 0.5, "color": colour, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 2})
