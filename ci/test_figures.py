#!/usr/bin/python3
"""Tests of what figures of ci/report have in common: how schemes look, how axes begin, legends, names, Pareto fronts.
KVQ_BENCH_EXE: the kvqbench whose presets and schemes must look unlike each other (default build/release/kvqbench)."""

import itertools
import math
import os
import random
import re
import subprocess
import unittest
import warnings

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.legend import Legend
from matplotlib.text import Text
from scipy.optimize import lsq_linear

import costs
import drawing
import figures
import labels
import reading
from results import File, Results
from testing import BASELINES, HERE, KVQBENCH, STUDY

drawing.plt.rcParams["figure.max_open_warning"] = 0

# Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision deficiency, IEEE TVCG 15(6), 2009,
# severity 1: linear RGB as one without red and one without green cones sees it.
DEFICIENT = [np.eye(3),
             np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
             np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])]


def linear(colour):
    rgb = np.array([int(to_hex(colour)[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1


def contrast(a, b):
    """WCAG 2.2's."""
    light = sorted(0.05 + linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (a, b))
    return light[1] / light[0]


def lab(rgb):
    """CIE 1976 L*a*b* of linear sRGB, white D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(np.maximum(xyz, 0)), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(a, b):
    """The least distance in L*a*b* that two colours have for any of those who look."""
    return min(np.linalg.norm(lab(np.clip(matrix @ linear(a), 0, 1)) - lab(np.clip(matrix @ linear(b), 0, 1)))
               for matrix in DEFICIENT)


def kvqbench(flag):
    return subprocess.run([KVQBENCH, flag], capture_output=True, text=True, check=True).stdout


def kind(of):
    return of["color"], str(of["marker"])


def whole(of):
    return (*kind(of), of["fillstyle"], str(of["linestyle"]))


class Looks(unittest.TestCase):
    def test_its_text_alone_says_how_a_scheme_looks(self):
        specs = ["none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-hqq-kivi", "int2-hqq-kivi", "int4-quanto", "llamacpp-q4_0",
                 "llamacpp-q8_0", "vllm-fp8", "q8_0@residual=0", "fp8-e4m3", "plan-4.50", "int8-hqq+int4-hqq", "quarot-4",
                 "something-new", "int4-hqq@residual=64", *(f"other-{i}" for i in range(20))]
        shuffled = random.Random(1)
        for count in (1, 2, 3, 7, 11, 12, len(specs)) * 4:
            some = shuffled.sample(specs, count)
            for spec, of in drawing.looks(some).items():
                self.assertEqual(kind(of), kind(drawing.look(spec)), (spec, some))
        self.assertEqual(list(drawing.looks(["vllm-fp8", "int4-hqq", "none"])), ["none", "int4-hqq", "vllm-fp8"])

    def test_what_the_kept_pictures_show(self):
        """Pictures in documents are not drawn anew with every change: these looks stay."""
        for spec, colour, marker in (("int8-hqq", "#0072b2", "s"), ("int4-hqq", "#d55e00", "^"), ("int2-hqq", "#cc79a7", "v"),
                                     ("int4-hqq-kivi", "#009e73", "D"), ("llamacpp-q4_0", "#0072b2", "o"), ("vllm-fp8", "#d55e00", "s")):
            self.assertEqual(kind(drawing.look(spec)), (colour, marker))

    def test_known_schemes_and_engines_look_unlike_each_other(self):
        known = {**{name: pair for name, pair in drawing.SCHEMES.items()},
                 **{of[0]: of[2:] for of in [*drawing.ENGINES, drawing.PLAN, *drawing.FAMILIES]}}
        self.assertEqual(len(set(known.values())), len(known))
        groups = [str(of[3]) for of in [*drawing.ENGINES, drawing.PLAN, *drawing.FAMILIES]]
        self.assertEqual(len(set(groups)), len(groups))  # in one legend, so told apart in grey, too
        for (a, (colour, marker)), (b, (other, other_marker)) in itertools.combinations(known.items(), 2):
            if str(marker) == str(other_marker):
                self.assertGreater(difference(colour, other), 14, (a, b))
        hqq = [of for name, of in drawing.SCHEMES.items() if "-hqq" in name or name == "none"]
        self.assertEqual(len({marker for _, marker in hqq}), 6)
        for (a, _), (b, _) in itertools.combinations(hqq, 2):
            self.assertGreater(difference(a, b), 14)

    def test_colours_stand_out_from_light_and_from_dark_paper(self):
        with open(os.path.join(HERE, "page.html"), encoding="utf-8") as file:
            papers = re.findall(r"--paper: (#[0-9a-f]{3,6})", file.read())
        self.assertGreater(len(set(papers)), 1)
        for colour in [*drawing.COLOURS, *(colour for colour, _ in drawing.SCHEMES.values() if colour != drawing.INK)]:
            for paper in [*papers, drawing.PAPER]:
                self.assertGreaterEqual(contrast(colour, paper), 3, (colour, paper))

    def test_unknown_schemes_look_like_no_known_one(self):
        known = {*drawing.SCHEMES.values(), *(of[2:] for of in [*drawing.ENGINES, drawing.PLAN, *drawing.FAMILIES])}
        for i in range(500):
            self.assertNotIn((drawing.look(f"new-{i}")["color"], drawing.look(f"new-{i}")["marker"]), known)
        self.assertGreater(len({kind(drawing.look(f"new-{i}")) for i in range(500)}), 90)

    def test_what_would_look_alike_in_a_legend_is_filled_otherwise(self):
        first, *others = [f"new-{i}" for i in range(2000) if kind(drawing.look(f"new-{i}")) == kind(drawing.look("new-0"))]
        two = drawing.looks([first, others[0]])
        self.assertNotEqual(two[first]["fillstyle"], two[others[0]]["fillstyle"])
        many = drawing.looks([first, *others[:drawing.MANY - 1]])
        self.assertEqual(len(many), drawing.MANY)
        self.assertEqual(len({whole(of) for of in many.values()}), drawing.MANY)
        options = drawing.looks(["int4-hqq", "int4-hqq@residual=64", "int4-hqq@residual=32"])
        self.assertEqual((len({kind(of) for of in options.values()}), len({of["fillstyle"] for of in options.values()})), (1, 3))

    @unittest.skipUnless(os.path.exists(KVQBENCH), f"{KVQBENCH} is not there")
    def test_every_preset_and_scheme(self):
        presets = re.findall(r"^(\S+) +[\d.]+ +[\d.]+ ", kvqbench("--list-presets"), re.M)
        self.assertGreater(len(presets), 35)
        for preset in presets:
            self.assertIsNotNone(drawing.engine_of(preset), f"{preset}: an engine without colour and marker")
        schemes = re.findall(r"^  (\S+)  +.*head_dim|^  (none)  ", kvqbench("--help"), re.M)
        schemes = [a or b for a, b in schemes]
        self.assertGreater(len(schemes), 40)
        for some in (presets[:drawing.MANY], presets[12:12 + drawing.MANY], schemes[:drawing.MANY], schemes[-drawing.MANY:]):
            found = drawing.looks(some)
            self.assertEqual(len({whole(of) for of in found.values()}), len(some), some)

    def test_bits_say_the_dash(self):
        for spec, bits in (("none", 16), ("int8-hqq", 8), ("int4-hqq@group=32", 4), ("llamacpp-q5_1", 5), ("vllm-nvfp4", 4),
                           ("vllm-turboquant-3bit-nc", 3), ("exl3-6", 6), ("kivi-2", 2), ("plan-4.50", 4), ("mxfp8", 8)):
            self.assertEqual(drawing.bits_said(spec), bits, spec)
        dashes = [str(drawing.dash_of(bits)) for bits in (16, 8, 6, 4, 3, 2)]
        self.assertEqual(len(set(dashes)), 6)

    def test_nothing_else_is_told_apart_by_colour_alone(self):
        look = drawing.styles([f"model{i}" for i in range(10)])
        self.assertEqual(len({style["marker"] for style in look.values()}), 10)
        self.assertEqual(len({of["marker"] for of in drawing.PARTS.values()}), len(drawing.PARTS))
        for name in (drawing.DAMAGE, drawing.RATE):  # darker and darker, so that grey says the same
            colours = drawing.plt.get_cmap(name)(np.linspace(0, 1, 64))[:, :3] @ [0.2126, 0.7152, 0.0722]
            self.assertTrue((np.diff(colours) < 0).all(), name)


# ---- figures of results that are made up here

CONTEXTS = [1024, 2048, 4096]


def made_up(specs, models=("m",), contexts=CONTEXTS, speed=lambda i: 100 + 0.9 * i, seed=1, batches=(1,)):
    """Results in which every number of a spec is a number of its own, so that a point of a figure says whose it is."""
    results, jitter = Results(), random.Random(seed)
    file = File("f", "r", "benchmarks", "2026-01-01T00:00:00", {})
    results.files.append(file)
    for model in models:
        for i, spec in enumerate(specs):
            bits = 16 if spec == "none" else float(spec[5:]) if spec.startswith("plan-") else \
                drawing.bits_said(spec) + 0.5 + 0.001 * i
            kld = 1e-5 if spec == "none" else math.exp(-1.2 * bits) * (1 + jitter.random() + 0.01 * i) * (
                0.3 if spec.startswith("plan-") else 1)
            for context in contexts:
                for batch in batches:
                    cell = results.cell(file, "d", model, "fused", spec, context, batch)
                    rate = speed(i) * batch * (1 - 0.03 * math.log2(context / 1024)) * (1 + 1e-4 * i)
                    cell.values.update({
                        "kv_size.bits_per_element": bits, "kv_size.kv_bytes": 1e3 * context * bits, "decode.tokens_per_s": rate,
                        "decode.tokens_per_s_min": 0.99 * rate, "decode.tokens_per_s_max": 1.01 * rate,
                        "decode.peak_fraction": 0.7 + 0.001 * i, "decode.bytes_per_token": 1e9 + 1e6 * i,
                        "memory.vram_peak_bytes": 2**34 + 1e6 * context * bits / 16 + 1e6 * i,
                        "memory.beyond_weights_bytes": 1e8, "memory.vram_total_bytes": 2**37,
                        "kernel_attention.us": 10.0 + i, "kernel_attention.gb_per_s": 1e3 + 10 * i,
                        "kernel_attention.peak_fraction": 0.5 + 0.001 * i,
                        **{f"error.nmse_{side}/layer:{layer}": 0.01 * (1 + i + layer) for side in "kv" for layer in range(4)},
                        "needle.needle/depth:50": 1, "needle.needle/depth:10": 0})
                    if batch == 1:
                        cell.values.update({
                            "perplexity.kld_nats": kld, "perplexity.kld_nats_lo": 0.8 * kld, "perplexity.kld_nats_hi": 1.2 * kld,
                            "perplexity.kld_floor_nats": 1e-5, "perplexity.delta_ppl": 10 * kld, "perplexity.ppl_reference": 20.0})
    reading.derive(results)
    return results


def drawn(results, names=None):
    """name -> Drawing of every figure that the results' first run has, laid out."""
    found = {}
    for name, _, draw, _ in figures.FIGURES:
        if names is None or name in names:
            drawing_of = draw(results, results.of(results.runs()[0]))
            if not isinstance(drawing_of, str):
                drawing_of.figure.draw_without_rendering()
                found[name] = drawing_of
    return found


def marks(figure):
    """(colour, marker) of every line with markers that a figure has, with its numbers."""
    for axis in figure.axes:
        for line in axis.get_lines():
            if line.get_marker() not in ("None", None, "", "|") and line.get_color() != drawing.FAINT:
                yield to_hex(line.get_color()), str(line.get_marker()), np.asarray(line.get_xdata(), float), np.asarray(
                    line.get_ydata(), float)


def legends(figure):
    found = [legend for legend in figure.legends]
    for axis in figure.axes:
        found += [child for child in axis.get_children() if isinstance(child, Legend)]
    return found


def box_of(text):
    """Where the text itself is, without a line to its point."""
    return Text.get_window_extent(text)


def close_all():
    drawing.plt.close("all")


class Together(unittest.TestCase):
    """A scheme in every figure of two reports."""

    SETS = (["none", "int8-hqq", "int4-hqq", "int2-hqq", "int2-hqq-kivi"],
            ["int2-hqq", "int4-hqq", "llamacpp-q4_0", "none", "quarot-4", "vllm-fp8"],
            ["none", "int2-hqq", "int4-hqq", *(f"llamacpp-q{i}_{j}" for i in (4, 5, 8) for j in (0, 1, 2)), "kivi-2", "mlx-lm-4",
             "plan-4.00", "plan-6.00", "quarot-4"])

    def tearDown(self):
        close_all()

    def test_one_colour_and_one_marker_everywhere(self):
        seen = {}
        for specs in self.SETS:
            results = made_up(specs)
            for name, of in drawn(results).items():
                if "heatmap" in name or name in ("layer_error", "layer_sensitivity"):
                    continue  # no schemes but as names
                by_value = {}
                for row in of.rows:
                    by_value.setdefault(row["spec"], set()).add(row["achieved"] if "achieved" in row else
                                                               row["gb_per_s"] if "gb_per_s" in row else row["value"])
                found = set()
                for colour, marker, xs, ys in marks(of.figure):
                    for spec, values in by_value.items():
                        at = xs * (1e3 if max(values) > 10 * max(xs, default=1) else 1) if name in ("kernels", "roofline") else ys
                        if len(at) and all(any(math.isclose(v, value, rel_tol=1e-9) for value in values) for v in at):
                            seen.setdefault(spec, {}).setdefault((colour, marker), []).append(name)
                            found.add(spec)
                hidden = {"none"} if name == "pareto_kld" else set()  # it is the line of rounding
                self.assertEqual(found | hidden, set(by_value) | hidden, name)
        self.assertGreater(len(seen), 15)
        for spec, looks in seen.items():
            self.assertEqual(len(looks), 1, f"{spec}: {looks}")
            self.assertEqual(next(iter(looks)), kind(drawing.look(spec)), spec)
        self.assertGreater(len(seen["int2-hqq"][kind(drawing.look("int2-hqq"))]), 12)

    def test_legends_say_the_same_as_the_drawing(self):
        for specs in self.SETS[:2]:
            for name, of in drawn(made_up(specs)).items():
                for legend in legends(of.figure):
                    for handle, text in zip(legend.legendHandles, legend.get_texts()):
                        if text.get_text() in specs:
                            self.assertEqual((to_hex(handle.get_color()), str(handle.get_marker())),
                                             kind(drawing.look(text.get_text())), name)


class Kept(unittest.TestCase):
    """Figures of the kept runs, of the study, and of what is made up."""

    @classmethod
    def setUpClass(cls):
        cls.drawn = {}
        sources = {name: os.path.join(BASELINES, name)
                   for name in ("h200", "h200-presets", "smollm2-135m-cpu", "smollm2-135m-referee")}
        if os.path.isdir(STUDY):
            sources["study"] = os.path.join(STUDY, "raw", "long_context")
        for source, path in sources.items():
            for name, of in drawn(reading.load([path])).items():
                cls.drawn[source, name] = of
        presets = [f"{engine[1]}{i}" for engine in drawing.ENGINES[:8] for i in (8, 4, 2)]
        cls.many = ["none", *presets, *(f"plan-{bits}" for bits in ("3.00", "4.00", "5.00", "6.00"))]
        cls.strangers = ["none", *(f"stranger{i}-{i % 7 + 2}" for i in range(30))]
        lines = ["decode_speed", "latency_vs_context", "vram_vs_context", "memory_loglog"]
        for source, results, names in (
                ("few", made_up(["none", "int8-hqq", "int4-hqq", "int2-hqq"], batches=(1, 8)), None),
                ("many", made_up(cls.many), None),
                ("many, two models", made_up(cls.many, models=("a", "b")), ["latency_vs_context", "layer_error"]),
                ("strangers", made_up(cls.strangers), [*lines, "kernels", "layer_error"]),
                ("apart", made_up(["none", "int4-hqq"], models=("a", "b", "c"), speed=lambda i: (100, 15)[i]),
                 ["decode_speed", "latency_vs_context"])):
            for name, of in drawn(results, names).items():
                cls.drawn[source, name] = of

    @classmethod
    def tearDownClass(cls):
        close_all()

    @staticmethod
    def beginning(limits, scale):
        return "log" if scale == "log" else "zero" if limits[0] <= 0 else "near"

    def test_panels_begin_alike_and_say_so(self):
        found = {}
        for (source, name), of in self.drawn.items():
            if name not in ("decode_speed", "latency_vs_context", "vram_vs_context", "memory_loglog", "pareto_decode", "roofline",
                            "kernels"):
                continue
            sideways = name in ("roofline", "kernels")
            panels = [axis for axis in of.figure.axes if axis.get_title()]
            kinds = {self.beginning(axis.get_xlim() if sideways else axis.get_ylim(), axis.get_xscale() if sideways else
                                    axis.get_yscale()) for axis in panels}
            self.assertEqual(len(kinds), 1, f"{source}, {name}: panels begin unlike each other")
            found.setdefault(kinds.pop(), []).append((source, name))
            for axis in panels:
                begins = axis.get_xlim()[0] if sideways else axis.get_ylim()[0]
                says = [float(text.get_text().split()[-1]) for text in axis.texts if text.get_text().startswith("axis begins at")]
                if found.get("near", [None])[-1] == (source, name):
                    self.assertEqual(len(says), 1, f"{source}, {name}: does not say where it begins")
                    self.assertAlmostEqual(says[0], begins, delta=1e-5 * begins)
                    self.assertIn(round(begins, 9), [round(tick, 9) for tick in axis.get_yticks()])
                else:
                    self.assertEqual(says, [])
            if found.get("log", [None])[-1] == (source, name):
                said = [axis.get_title() if sideways else axis.get_ylabel() for axis in panels]
                self.assertTrue(all("logarithmic" in text for text in said if text), f"{source}, {name}")
                self.assertTrue(any("logarithmic" in text for text in said), f"{source}, {name}")
        self.assertEqual(set(found), {"log", "zero", "near"})  # each was seen
        self.assertIn(("h200", "decode_speed"), found["zero"])  # batch 8 and 32 span more than twofold
        self.assertIn(("h200", "latency_vs_context"), found["near"])
        if ("study", "latency_vs_context") in self.drawn:
            self.assertIn(("study", "latency_vs_context"), found["log"])

    def test_everything_drawn_is_within_its_axis(self):
        for (source, name), of in self.drawn.items():
            if name in ("decode_speed", "latency_vs_context", "vram_vs_context", "memory_loglog", "pareto_decode", "pareto_kld"):
                for axis in of.figure.axes:
                    low, high = axis.get_ylim()
                    for line in axis.get_lines():
                        ys = np.asarray(line.get_ydata(), float)
                        if line.get_transform() == axis.transData and len(ys):
                            # But what is named with its range instead.
                            if any(text.get_text().endswith(f" to {max(ys):.3g}") for text in axis.texts):
                                continue
                            inside = (ys >= low * (1 - 1e-9)) & (ys <= high * (1 + 1e-9))
                            self.assertTrue(inside.all(), (source, name, ys, low, high))

    def test_no_legend_has_more_than_twelve_entries(self):
        for (source, name), of in self.drawn.items():
            for legend in legends(of.figure):
                self.assertLessEqual(len(legend.get_texts()), 12, f"{source}, {name}")
        groups = [text.get_text() for text in self.drawn["many", "decode_speed"].figure.legends[0].get_texts()]
        self.assertEqual(groups[:3], ["none", "llama.cpp", "vLLM"])
        self.assertIn("21 more, named where they stand",
                      [text.get_text() for text in self.drawn["strangers", "decode_speed"].figure.legends[0].get_texts()])

    def names(self, axis):
        return [text for text in axis.texts if text.get_text() and not text.get_text().startswith(("axis begins", "slope", "device",
                                                                                                 "weights"))]

    def test_lines_that_are_too_many_for_a_legend_are_named_at_their_ends(self):
        for source, specs in (("many", self.many), ("strangers", self.strangers)):
            for name, pick in (("decode_speed", max), ("latency_vs_context", min), ("vram_vs_context", min), ("memory_loglog", min)):
                of = self.drawn[source, name]
                axis = of.figure.axes[0]
                last = {row["spec"]: row["value"] for row in of.rows if row["context"] == CONTEXTS[-1]}
                named = {text.get_text(): text for text in self.names(axis)}
                self.assertEqual(set(named), set(specs), (source, name))  # here there is room for all
                best = pick(last.values())
                for spec, value in last.items():
                    if value == best:
                        self.assertEqual(named[spec].get_fontweight(), "bold", (source, name, spec))
                boxes = sorted((box_of(text) for text in named.values()), key=lambda box: box.y0)
                for below, above in zip(boxes, boxes[1:]):
                    self.assertLessEqual(below.y1, above.y1)
                    self.assertGreater((above.y0 + above.y1) / 2 - (below.y0 + below.y1) / 2, 0.6 * above.height)
                order = sorted(last, key=last.get)
                self.assertEqual(sorted(named, key=lambda spec: box_of(named[spec]).y0), order, (source, name))
                width, height = of.figure.get_size_inches() * of.figure.dpi
                for box in boxes:
                    self.assertTrue(box.x0 > axis.get_window_extent().x1 and box.x1 <= width + 1 and box.y1 <= height)

    def test_where_names_find_no_room_the_best_and_none_have_theirs(self):
        specs = ["none", *(f"stranger{i}-4" for i in range(90))]
        of = drawn(made_up(specs), ["latency_vs_context"])["latency_vs_context"]
        axis = of.figure.axes[0]
        self.assertGreaterEqual(len(self.names(axis)), 60)
        self.assertIn("none", [text.get_text() for text in self.names(axis)])
        ends = [(f"line{i}", (0, i), "k", i == 0) for i in range(200)]
        figure, axis = drawing.subplots(figsize=(4, 2))
        axis.set_ylim(0, 200)
        figure.draw_without_rendering()
        labels.name_ends(axis, ends)
        named = [text.get_text() for text in axis.texts]
        self.assertLess(len(named), 30)
        self.assertEqual(named, [f"line{i}" for i in range(len(named))])

    def test_rows_of_shares_are_named_where_they_are_many(self):
        for source, specs in (("many", self.many), ("strangers", self.strangers)):
            of = self.drawn[source, "kernels"]
            self.assertEqual(legends(of.figure), [])
            ticks = [text.get_text() for text in of.figure.axes[0].get_yticklabels()]
            self.assertEqual(sorted(ticks), sorted(specs * len(CONTEXTS)))
        self.assertEqual([text.get_text() for text in legends(self.drawn["few", "kernels"].figure)[0].get_texts()],
                         ["none", "int8-hqq", "int4-hqq", "int2-hqq"])

    def test_layers_of_many_schemes_are_all_there(self):
        for source in ("many", "many, two models", "strangers"):
            of = self.drawn[source, "layer_error"]
            models = 2 if "two" in source else 1
            specs = self.strangers if source == "strangers" else self.many
            self.assertEqual(len({(row["model"], row["spec"]) for row in of.rows}), models * len(specs))
            self.assertEqual(len(of.figure.axes[0].get_yticklabels()), models * len(specs))
        rows = self.drawn["many", "needle_heatmap"].rows
        self.assertEqual(len(rows), len(self.many) * len(CONTEXTS) * 2)

    # ---- Pareto fronts

    def test_both_fronts_are_joined_and_named(self):
        of = self.drawn["many", "pareto_kld"]
        axis, rows = of.figure.axes[0], of.rows
        names = [text.get_text().split(", ")[0] for text in self.names(axis) if text.get_fontweight() == "bold"]
        for plans in (False, True):
            part = [row for row in rows if row["spec"].startswith("plan-") == plans]
            for row in part:  # by its meaning, each among its own
                beaten = any(other["bits_per_element"] <= row["bits_per_element"] and other["value"] <= row["value"] and
                             other is not row for other in part)
                self.assertEqual(row["on_front"], not beaten, row["spec"])
                if row["on_front"] and row["spec"] != "none":
                    self.assertIn(row["spec"], names)
            front = sorted((row["bits_per_element"], row["value"]) for row in part
                           if (row["on_front"] or plans) and row["spec"] != "none")
            colour = drawing.INK if plans else drawing.FAINT
            joined = [line for line in axis.get_lines() if to_hex(line.get_color()) == colour and line.get_linestyle() == "-" and
                      len(line.get_xdata()) == len(front) and np.allclose(np.column_stack(line.get_data()), front)]
            self.assertEqual(len(joined), 1, plans)
        self.assertIn("plans for a budget", [text.get_text() for legend in legends(of.figure) for text in legend.get_texts()])
        self.assertEqual(sum(row["on_front"] for row in rows if row["spec"].startswith("plan-")), 4)

    def test_area_of_markers_is_speed(self):
        of = self.drawn["many", "pareto_kld"]
        axis = of.figure.axes[0]
        speed = {row["value"]: row["decode_speed_of_none"] for row in of.rows}
        sizes = [(line.get_markersize() ** 2, speed[float(line.get_ydata()[0])]) for line in axis.get_lines()
                 if line.get_marker() not in ("None", "", None) and len(line.get_xdata()) == 1 and float(line.get_ydata()[0]) in speed]
        self.assertEqual(len(sizes), len(self.many) - 1)
        self.assertGreater(max(s for _, s in sizes), 1.2)
        ratios = [area / fast for area, fast in sizes]
        self.assertLess(max(ratios) / min(ratios), 1 + 1e-6)
        entries = [text.get_text() for legend in legends(of.figure) for text in legend.get_texts() if "×" in text.get_text()]
        self.assertEqual(entries, ["1× none's tokens a second", "1.5×"])
        for row in of.rows:
            if row["on_front"] and row["spec"] != "none":
                self.assertIn(f"{row['spec']}, {row['decode_speed_of_none']:.2f}×", [t.get_text() for t in self.names(axis)])

    def test_what_was_not_timed_is_small_and_without_times_there_are_no_sizes(self):
        results = made_up(["none", "int8-hqq", "int4-hqq", "int2-hqq"])
        for cell in results.cells:
            if cell.spec == "int4-hqq":
                del cell.values["decode.tokens_per_s"]
        of = costs.pareto_kld(results, results.cells)
        sizes = {float(line.get_ydata()[0]): line.get_markersize() for line in of.figure.axes[0].get_lines()
                 if len(line.get_xdata()) == 1 and line.get_marker() not in ("None", "", None)}
        by_spec = {row["spec"]: sizes[row["value"]] for row in of.rows if row["spec"] != "none"}
        self.assertEqual(by_spec["int4-hqq"], 3)
        self.assertGreater(by_spec["int8-hqq"], 4)
        self.assertIn("not timed", [text.get_text() for legend in legends(of.figure) for text in legend.get_texts()])
        of = self.drawn["smollm2-135m-referee", "pareto_kld"]
        self.assertNotIn("decode_speed_of_none", of.rows[0])
        self.assertFalse(any("×" in text.get_text() for legend in legends(of.figure) for text in legend.get_texts()))
        self.assertFalse(any("×" in text.get_text() for text in of.figure.axes[0].texts))

    def test_intervals_and_the_floor(self):
        of = self.drawn["smollm2-135m-cpu", "pareto_kld"]
        axis = of.figure.axes[0]
        bars = {(round(line.get_ydata()[0], 12), round(line.get_ydata()[1], 12)) for line in axis.get_lines()
                if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]}
        for row in of.rows:
            if row["spec"] != "none":
                self.assertIn((round(row["lo"], 12), round(row["hi"], 12)), bars, row["spec"])
        self.assertIn("16 bits: rounding alone", [text.get_text() for text in axis.texts])
        floor = next(row["value"] for row in of.rows if row["spec"] == "none")
        self.assertTrue(any(np.allclose(line.get_ydata(), floor, rtol=0.05) for line in axis.get_lines()
                            if line.get_linestyle() != "-" and len(line.get_ydata()) == 2))

    def test_what_is_hardly_encoded_is_left_out(self):
        results = made_up(["none", "int8-hqq", "int4-hqq"])
        for cell in results.cells:
            cell.values["perplexity.encoded_share"] = {"none": 0, "int8-hqq": 0.25, "int4-hqq": 0.24}[cell.spec]
        of = costs.pareto_kld(results, results.cells)
        self.assertEqual([row["spec"] for row in of.rows], ["int8-hqq", "none"])
        self.assertTrue(of.alt.endswith(" Hardly encoded and left out: int4-hqq."), of.alt)

    def test_floors_that_are_no_floors(self):
        for floor, words in ((-1.7e-9, None), (0.0, None), (1e-12, "16 bits: rounding alone, 1e-12")):
            for batches in ((1,), (1, 2)):
                results = made_up(["none", "int8-hqq", "int4-hqq"], batches=batches)
                for cell in results.cells:
                    cell.values["perplexity.kld_nats"] = floor if cell.spec == "none" else 0.1 * drawing.bits_said(cell.spec)
                    cell.values["perplexity.kld_floor_nats"] = floor
                    cell.values["perplexity.kld_nats_lo"] = 0.0 if cell.spec == "none" else 0.1
                    cell.values["perplexity.kld_nats_hi"] = 1e-9 if cell.spec == "none" else 1.0
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    figure = costs.pareto_kld(results, results.cells).figure
                    figure.draw_without_rendering()
                box = figure.get_tightbbox(figure.canvas.get_renderer())
                self.assertLess(max(box.width, box.height), 1.2 * max(figure.get_size_inches()))
                for axis in figure.axes[:len(batches)]:
                    self.assertGreater(axis.get_ylim()[0], 1e-4)  # and nothing is far from what there is to see
                    self.assertEqual([text.get_text() for text in axis.texts if "rounding" in text.get_text()], [words] * bool(words))

    def test_names_in_the_pareto_figures_do_not_cover_each_other(self):
        for (source, name), of in self.drawn.items():
            if name in ("pareto_kld", "pareto_decode") and source != "strangers":
                for axis in of.figure.axes:
                    boxes = [(text.get_text(), box_of(text)) for text in self.names(axis)]
                    for (a, box), (b, other) in itertools.combinations(boxes, 2):
                        self.assertFalse(box.x0 < other.x1 - 1 and other.x0 < box.x1 - 1 and box.y0 < other.y1 - 2 and
                                         other.y0 < box.y1 - 2, (source, name, a, b))

    def test_the_engines_figure(self):
        of = self.drawn["smollm2-135m-referee", "pareto_kld"]
        axis, rows = of.figure.axes[0], of.rows
        self.assertEqual(len(rows), 52)
        for row in rows:  # by its meaning, not by the sweep that found it
            beaten = any(other["bits_per_element"] <= row["bits_per_element"] and other["value"] <= row["value"] and
                         (other["bits_per_element"], other["value"]) != (row["bits_per_element"], row["value"]) for other in rows)
            self.assertEqual(row["on_front"], not beaten, row["spec"])
        entries = [text.get_text() for legend in legends(of.figure) for text in legend.get_texts()]
        self.assertEqual(sorted(entries), sorted({row["engine"] for row in rows if row["engine"]} | {
            "not rotated", "no other is better in both", "... that encodes every token"}))
        names = [text.get_text() for text in self.names(axis)]
        for row in rows:
            if row["on_front"] and row["spec"] != "none":
                self.assertIn(row["spec"].split("@")[0], names)
        unrotated = [row for row in rows if row["spec"].endswith("-unrotated")]
        arrows = [text for text in axis.texts if (getattr(text, "arrowprops", None) or {}).get("arrowstyle") == "-|>"]
        self.assertEqual((len(arrows), len(unrotated)), (5, 5))
        cells = reading.load([os.path.join(BASELINES, "smollm2-135m-referee")]).cells
        self.assertFalse(costs.encodes_at_once(next(c for c in cells if c.spec == "hf-hqq-4")))
        self.assertTrue(costs.encodes_at_once(next(c for c in cells if c.spec == "llamacpp-q4_0")))


class Scales(unittest.TestCase):
    def test_how_axes_begin(self):
        for ranges, scale in (([(200, 330)], "near"), ([(200, 330), (700, 2400)], "near"), ([(200, 330), (700, 2400), (3, 8)], "zero"),
                              ([(1, 9)], "log"), ([(200, 210), (1, 9)], "log"), ([(1, 3)], "zero")):
            self.assertEqual(drawing.scale_of(ranges), scale, ranges)

    def test_an_axis_begins_at_a_round_number_below_what_it_shows(self):
        for least, most in ((3.74, 4.55), (219, 326), (13.6, 17.4), (8.08, 10.64), (0.0123, 0.02), (1000.5, 1000.9)):
            figure, axis = drawing.subplots()
            drawing.begin(axis, "near", least, most)
            low, high = axis.get_ylim()
            self.assertTrue(0 < low < least and most < high, (least, most, low, high))
            self.assertGreater((most - least) / (high - low), 0.65)  # and not far below
            close_all()


class Names(unittest.TestCase):
    def test_short_names_say_something(self):
        for name, short in (("llamacpp-q8_0", "q8_0"), ("kivi-2", "kivi-2"), ("llamacpp-of-plan-4.5", "llamacpp-of-plan-4.5")):
            self.assertEqual(drawing.short_name(name), short)

    def test_labels_are_spread_by_least_squares(self):
        numbers = np.random.default_rng(1)
        for count in (1, 2, 3, 10, 28):
            for _ in range(10):
                wanted, gap = numbers.uniform(0, 200, count), 7.0
                order, offsets = np.argsort(wanted), gap * np.arange(count)
                # Of the steps between them, none of which is less than the gap.
                steps = lsq_linear(np.tril(np.ones((count, count))), wanted[order] - offsets, (0, np.inf), tol=1e-14).x
                found = np.array(labels.spread(list(wanted), gap, 0, 1e9))
                np.testing.assert_allclose(found[order], np.cumsum(steps) + offsets, atol=1e-4)
                found = np.array(labels.spread(list(wanted), gap, 0, 200.0))[order]
                self.assertTrue((np.diff(found) > gap - 1e-9).all() and found[0] > -1e-9 and found[-1] < 200 + 1e-9)
        self.assertEqual(labels.spread([150, 20, 80], 7, 0, 200), [150, 20, 80])

    def test_points_and_names_do_not_cover_each_other(self):
        figure, axis = drawing.subplots(figsize=(6, 4))
        points = [(4.5, 10 ** (0.01 * i)) for i in range(12)] + [(8.5, 1), (8.5, 1)]
        axis.plot(*zip(*points), linestyle="")
        axis.set_xlim(2, 10)
        axis.set_ylim(0, 3)
        figure.draw_without_rendering()
        xs = labels.side_by_side(axis, points, size=6)
        self.assertEqual((xs[0], xs[12]), (4.5, 8.5))  # the first keep their place
        places = labels.pixels(axis, [(x, y) for x, (_, y) in zip(xs, points)])
        for i, (ax, ay) in enumerate(places):
            for bx, by in places[:i]:
                self.assertGreaterEqual(math.hypot(ax - bx, ay - by), 6 - 1e-6)
        labels.name_points(axis, [(x, y) for x, (_, y) in zip(xs, points)], [f"scheme-{i}" for i in range(14)], fontsize=6)
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
        self.assertGreater(len(boxes), 8)
        for i, box in enumerate(boxes):
            self.assertTrue(all(axis.bbox.contains(*corner) for corner in box.corners()))
            for other in boxes[:i]:
                self.assertFalse(box.x0 < other.x1 - 0.5 and other.x0 < box.x1 - 0.5 and box.y0 < other.y1 - 0.5 and
                                 other.y0 < box.y1 - 0.5)
        drawing.plt.close(figure)

if __name__ == "__main__":
    unittest.main()
