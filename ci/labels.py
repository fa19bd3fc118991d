"""Points that lie on each other, side by side, and their names, each beside its own: for figures with many of them."""

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


def name_points(axis, points, names, obstacles=(), size=6.0, **text):
    """Writes names beside points (x, y), the first ones first, where they cover no marker, no other name and none of the
    obstacles (left, bottom, right, top, in points); those for which there is no room are left out. A name that stands off
    has a line to its point. Returns the boxes that are taken now."""
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
        for dx, dy, across, up in PLACES:
            x0 = x + dx - {"left": 0, "right": width, "center": width / 2}[across]
            y0 = y + dy - {"bottom": 0, "top": height, "center": height / 2}[up]
            box = (x0, y0, x0 + width, y0 + height)
            far = math.hypot(dx, dy) > 10
            # A line to its point, as boxes along it.
            line = [(x + dx * t - 0.4, y + dy * t - 0.4, x + dx * t + 0.4, y + dy * t + 0.4)
                    for t in (i / 12 for i in range(1, 13)) if math.hypot(dx * t, dy * t) > size / 2 + 0.5] if far else []
            if box[0] >= left and box[2] <= right and box[1] >= bottom and box[3] <= top and not any(
                    overlap(part, other) for part in [box, *line] for other in taken):
                break
        else:
            drawn.remove()
            continue
        drawn.set(ha=across, va=up, in_layout=False)
        drawn.set_position((dx, dy))
        if far:
            lines.append(axis.annotate("", point, (dx, dy), textcoords="offset points", zorder=2, arrowprops={
                "arrowstyle": "-", "lw": 0.4, "color": drawn.get_color(), "alpha": 0.6, "shrinkA": 0, "shrinkB": size / 2}))
            lines[-1].set_in_layout(False)
        taken += [box, *line]
    return taken
