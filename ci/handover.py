"""From a spec, or a plan with a scheme for each layer, to the nearest setting that an engine can take today: its own flags,
files or lines of Python, the spec that this amounts to, and in plain sentences what it cannot say or does otherwise.

An assignment is a list of (keys' scheme, values' scheme), one a layer. A Frame is what a spec says of all layers: residual,
sinks, policy, prefill, rotate, group. ENGINES has an object for each engine; Table what they need to know of a model, from
kvqbench (load). Which formats an engine has, and the frame they run in, is read from kvqbench's presets; what stands here is
how an engine wants to be told, and what no preset says. Sources: llama.cpp 0c1e57098, ik_llama.cpp 8337e4cd3, vLLM 0.33.0
(config/cache.py, engine/arg_utils.py, layers/quantization/kv_cache.py), transformers 5.5.4 (cache_utils.py), SGLang 0.5.10
(server_args.py, model_loader/weight_utils.py), TensorRT-LLM's llmapi, LMDeploy 0.18.0 (messages.py), mlx-lm 0.32.2
(generate.py, models/cache.py), exllamav3 0148de2 (model_init.py), KVTuner babe775 (flexible_quantized_cache.py).
"""

import argparse
import ast
import itertools
import json
import math
import os
import re
import shlex
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy
import yaml

import writing

HERE = os.path.dirname(os.path.abspath(__file__))
KVQBENCH = os.environ.get("KVQ_BENCH_EXE", os.path.join(os.path.dirname(HERE), "build", "release", "kvqbench"))
NONE = ("none", "none")
SIDES = ("keys", "values")
FP8_MAX = 448.0  # of e4m3
TINY = 1e-9  # beside scores and bits; what breaks ties is larger


class Refused(Exception):
    """Bad input, and why."""


# ---- specs. kvqbench parses and judges them (fixtures/cache/spec.h, load); here they become data.

@dataclass(frozen=True)
class Frame:
    residual: tuple = (128, 128)  # of keys, of values
    sinks: int = 0
    policy: str = "append"
    prefill: str = "stored"
    rotate: tuple = ("none", "none")
    group: int = 0                # 0: each scheme's own
    window_cache: str = "full"    # of layers with a sliding window


@dataclass(frozen=True)
class Preset:
    name: str
    spec: str
    flags: str


def halves(text):
    first, plus, second = text.partition("+")
    return first, second if plus else first


def whole(spec, key, text):
    return int(text) if text.isdigit() else _refuse(f"spec '{spec}': {key} wants a whole number, not '{text}'")


def _refuse(text):
    raise Refused(text)


def parse_spec(text, layers, presets=()):
    """Of so many layers: the assignment and the frame."""
    name, at, rest = text.partition("@")
    known = {preset.name: preset.spec for preset in presets}
    whole_text = known[name] + at + rest if name in known else text
    schemes, *options = whole_text.split("@")
    pair, frame, dense, ranges = halves(schemes), {}, (0, 0), []
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            _refuse(f"spec '{text}': '@{option}' wants the form @key=value")
        if key in ("sinks", "group"):
            frame[key] = whole(text, key, value)
        elif key == "residual":
            frame[key] = tuple(whole(text, key, half) for half in halves(value))
        elif key == "dense":
            dense = tuple(whole(text, key, half) for half in halves(value))
        elif key == "rotate":
            frame[key] = halves(value)
        elif key in ("policy", "prefill", "window-cache"):
            frame[key.replace("-", "_")] = value
        elif key == "layers":
            span, colon, stored = value.partition(":")
            first, dash, last = span.partition("-")
            if not colon:
                _refuse(f"spec '{text}': layers wants FIRST-LAST:SCHEME[+SCHEME], not '{value}'")
            ranges.append((whole(text, key, first), whole(text, key, last if dash else first), halves(stored)))
        else:
            _refuse(f"spec '{text}': no key '{key}'; the keys are group, residual, sinks, policy, prefill, window-cache, "
                    "rotate, dense, layers")
    if frame.get("policy", "append") != "append":
        frame["prefill"] = "raw"  # by their own rules
    assignment = [NONE if layer < dense[0] or layer >= layers - dense[1] else pair for layer in range(layers)]
    for first, last, stored in ranges:
        if last >= layers:
            _refuse(f"spec '{text}': layers {first}-{last}, but the cache has layers 0-{layers - 1}")
        assignment[first:last + 1] = [stored] * (last + 1 - first)
    return assignment, Frame(**frame)


def pair_text(pair):
    return pair[0] if pair[0] == pair[1] else "+".join(pair)


def both_text(pair):
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}+{pair[1]}"


def runs(layers):
    """[1, 2, 3, 7] as [(1, 3), (7, 7)]."""
    found = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer - 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return found


def runs_text(layers):
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs(layers)]
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(parts)


def encodes(assignment):
    """Whether keys, and values, are encoded in any layer."""
    return tuple(any(pair[side] != "none" for pair in assignment) for side in (0, 1))


def write_spec(assignment, frame):
    """The spec that stores this; of two ways to say it, that with fewer @layers."""
    window = "" if frame.window_cache == "full" else f"@window-cache={frame.window_cache}"
    if not any(encodes(assignment)):
        return "none" + window
    base = Counter(pair for pair in assignment if pair != NONE).most_common(1)[0][0]
    text, default = pair_text(base), Frame()
    if frame.policy != "append":
        text += f"@policy={frame.policy}"
    for key in ("residual", "rotate"):
        if getattr(frame, key) != getattr(default, key):
            text += f"@{key}={both_text(getattr(frame, key))}"
    if frame.prefill == "raw" and frame.policy == "append":
        text += "@prefill=raw"
    for key in ("sinks", "group"):
        if getattr(frame, key):
            text += f"@{key}={getattr(frame, key)}"
    text += window
    first = 0
    for pair, same in itertools.groupby(assignment):
        last = first + len(list(same)) - 1
        if pair != base:
            text += f"@layers={first}-{last}:{pair_text(pair)}"
        first = last + 1
    return text


# ---- what is known of a model

@dataclass
class Table:
    layers: int
    head_dim: int
    kv_heads: int
    presets: list            # of class Preset, those for its head_dim
    schemes: dict            # name: (whether keys of that head_dim can be stored so, whether values can)
    bits: dict               # (0 for keys or 1 for values, scheme): bits per encoded element, all metadata counted
    directory: str = ""      # of the model, where it is one of Hugging Face
    model_type: str = ""     # of its config.json

    def named(self, start):
        return [preset for preset in self.presets if preset.name.startswith(start)]

    def fits(self, pair):
        return all(self.schemes.get(scheme, (False, False))[side] for side, scheme in enumerate(pair))

    def size(self, pair):
        return self.bits[0, pair[0]] + self.bits[1, pair[1]]


def parse_presets(text):
    """Of `kvqbench --list-presets`: those that the model's head_dim allows."""
    found = []
    for line in text.splitlines()[2:]:
        columns = re.split(r"\s{2,}", line.strip(), maxsplit=5)
        if len(columns) == 6 and columns[1] != "-":
            found.append(Preset(columns[0], columns[4], columns[5]))
    return found


def parse_schemes(text, head_dim):
    """Of `kvqbench --help`: each scheme, and whether keys and values of that head_dim can be stored so."""
    def allows(part):
        several, some = re.search(r"head_dim a multiple of (\d+)", part), re.search(r"head_dim (\d[\d, or]*\d)", part)
        return "refused" not in part and (not several or head_dim % int(several[1]) == 0) and \
            (not some or head_dim in map(int, re.findall(r"\d+", some[1])))
    found = {}
    for line in re.search(r"\nschemes\n(.*?)\n  keys of a spec", text, re.S)[1].splitlines():
        name, _, rest = line.strip().partition(" ")
        keys, colon, values = rest.partition("values:")
        found[name] = (allows(keys), allows(values if colon else rest))
    return found


def kvqbench(*arguments):
    """What it prints; its own line where it refuses."""
    try:
        done = subprocess.run([KVQBENCH, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Refused(f"{KVQBENCH}: {error.strerror}; build it (ci/build release kvqbench)") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it failed and said nothing"]
        raise Refused(lines[-1].removeprefix("kvqbench: "))
    return done.stdout


def spec_of(name):
    """Of a benchmark's name."""
    return name.split("/ctx:")[0].rsplit("/", 1)[1]


def load(model, specs=()):
    """The table of a model, as kvqbench's --models names it, with the schemes of all engines and those of the specs, which
    kvqbench judges first."""
    presets = parse_presets(kvqbench("--list-presets", f"--models={model}"))
    run = ["--benchmark_filter=^kv_size/", f"--models={model}", "--benchmark_format=json"]
    context = json.loads(kvqbench(*run, "--schemes=" + ",".join(["none", *specs]), "--contexts=128"))["context"]
    shape = json.loads(next(value for key, value in context.items() if key.startswith("model_config ")))
    table = Table(shape["num_layers"], shape["head_dim"], shape["num_kv_heads"], presets, {}, {})
    table.schemes = parse_schemes(kvqbench("--help"), table.head_dim)
    if os.path.isfile(os.path.join(model, "config.json")):
        table.directory = model
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            table.model_type = json.load(file).get("model_type", "")
    pairs = {pair for engine in ENGINES.values() for pair in engine.pairs(table)}
    for spec in specs:
        pairs |= set(parse_spec(spec, table.layers, presets)[0])
    wanted = {}  # a spec with one side encoded: its bits are that side's
    for pair in pairs:
        for side, scheme in enumerate(pair):
            if scheme != "none":
                wanted[f"none+{scheme}" if side else f"{scheme}+none"] = (side, scheme)
    sized = json.loads(kvqbench(*run, "--schemes=" + ",".join(sorted(wanted)), "--contexts=1024"))["benchmarks"]
    table.bits = {wanted[spec_of(cell["name"])]: cell["encoded_bits_per_element"] for cell in sized}
    table.bits |= {(0, "none"): 16.0, (1, "none"): 16.0}
    return table


def amax_of(values):
    """Of the numbers of a `distribution` cell (results.Cell.values): of each layer the largest |key| and |value|."""
    found = []
    for layer in itertools.count():
        ends = [[values.get(f"distribution.{end}_{side}/layer:{layer}") for end in ("min", "max")] for side in "kv"]
        if None in ends[0] + ends[1]:
            return found
        found.append(tuple(max(abs(low), abs(high)) for low, high in ends))


# ---- what an engine is told

@dataclass
class Projection:
    engine: str
    assignment: list
    frame: Frame
    spec: str                # the same in kvqbench's grammar, to be measured
    exact: bool              # nothing that was asked for is stored otherwise
    flags: list = field(default_factory=list)        # words of a command line
    environment: dict = field(default_factory=dict)  # variables
    files: dict = field(default_factory=dict)        # name: text or bytes
    snippet: str = ""                                # lines of Python
    lost: list = field(default_factory=list)         # sentences: what it cannot say, then what it does otherwise


@dataclass
class Told:
    """A setting in the engine's words."""
    flags: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    snippet: str = ""


@dataclass(frozen=True)
class Option:
    pair: tuple
    frame: Frame = Frame()
    word: str = ""           # what the engine calls it
    remark: str = ""         # what its preset says beside


def turned(rotation, head_dim):
    """A rotation by its name without a block, where the block is all that it could be."""
    whole_block = 1 << (head_dim & -head_dim).bit_length() - 1
    return rotation.removesuffix(f":{whole_block}")


def neutral(frame, sides):
    """The frame without what means nothing where a side has nothing encoded."""
    if not any(sides):
        return Frame()
    default = Frame()
    return replace(frame, **{key: tuple(getattr(frame if sides[side] else default, key)[side] for side in (0, 1))
                             for key in ("residual", "rotate")})


def frame_lost(asked, stored, sides, head_dim):
    """A sentence for each thing in which two frames differ, of the sides that are encoded in both."""
    lost = []
    if not any(sides):
        return lost
    if asked.policy != stored.policy:
        lost.append({"hf": "the first call reads the originals, and every flush encodes everything again",
                     "kivi": "keys are encoded in full blocks, values as they leave a window",
                     "append": "every token is encoded once and never again"}[stored.policy] +
                    f": that is policy {stored.policy}, not {asked.policy}")
    for side in (0, 1):
        want, has = asked.residual[side], stored.residual[side]
        if sides[side] and want != has:
            lost.append(f"the newest {SIDES[side]}: residual {want} was planned, the engine " +
                        (f"keeps up to {has} tokens in 16 bits" if has else "encodes every token as it comes"))
    if asked.sinks != stored.sinks:
        lost.append(f"the first {asked.sinks} tokens are not kept in 16 bits: no sinks")
    if asked.prefill != stored.prefill:
        lost.append("a prompt's own attention reads the originals, not what is stored" if stored.prefill == "raw" else
                    "a prompt's own attention reads what is stored, not the originals")
    for side in (0, 1):
        want, has = asked.rotate[side], stored.rotate[side]
        if sides[side] and turned(want, head_dim) != turned(has, head_dim):
            lost.append(f"{SIDES[side]}: rotation {want} was planned, the engine has {has}, beyond what its formats do "
                        "themselves")
    if asked.window_cache != stored.window_cache:
        lost.append("how many tokens a layer with a sliding window keeps is not handed over: it is the engine's own default")
    if asked.group != stored.group:
        lost.append(f"groups of {asked.group or 'the default size'} were planned, the engine has " +
                    (f"groups of {stored.group}" if stored.group else "its formats' own"))
    return lost


def layers_lost(asked, stored):
    """A sentence for each scheme of keys or values that became another, with its layers."""
    changed = {}
    for layer, (want, has) in enumerate(zip(asked, stored, strict=True)):
        for side in (0, 1):
            if want[side] != has[side]:
                changed.setdefault((side, want[side], has[side]), []).append(layer)
    return [f"{runs_text(at)}: planned {want} {SIDES[side]}, the engine stores {has} {SIDES[side]}"
            for (side, want, has), at in changed.items()]


class Score:
    """How far a setting is from what was asked: score(layer, side, scheme), and the encoded bits it may have."""

    def __init__(self, asked, table, cost=None):
        self.asked, self.table, self.cost = asked, table, cost
        self.budget = math.inf if cost is None else sum(table.size(pair) for pair in asked) + TINY

    def __call__(self, layer, side, scheme):
        want, bits = self.asked[layer][side], self.table.bits
        if self.cost is None:
            return abs(bits[side, scheme] - bits[side, want]) + 1e-4 * (scheme != want) + 1e-7 * bits[side, scheme]
        try:
            return 0.0 if scheme == "none" else self.cost[layer][side][scheme]
        except (KeyError, IndexError):
            raise Refused(f"the costs have none for {scheme} {SIDES[side]} of layer {layer}") from None

    def pair(self, layer, pair):
        return self(layer, 0, pair[0]) + self(layer, 1, pair[1])

    def rank(self, assignment, tie=0.0):
        """To be least: bits beyond the budget first, then the distance."""
        over = sum(self.table.size(pair) for pair in assignment) - self.budget
        return max(0.0, over), sum(self.pair(layer, pair) for layer, pair in enumerate(assignment)) + tie


def knapsack(choices, budget):
    """Of choices[layer] = [(bits, score), ...]: the indices of least score within the budget, or else of fewest bits."""
    front = [(0.0, 0.0, None)]
    for of_layer in choices:
        grown = sorted(((bits + more, score + worse, (trail, index)) for bits, score, trail in front
                        for index, (more, worse) in enumerate(of_layer)), key=lambda state: state[:2])
        front, best = [], math.inf
        for state in grown:
            if state[1] < best - TINY:
                front.append(state)
                best = state[1]
    within = [state for state in front if state[0] <= budget]
    trail, picked = (within[-1] if within else front[0])[2], []
    while trail:
        trail, index = trail
        picked.append(index)
    return picked[::-1]


class Engine:
    """What one engine stores and how it is told. `kind` is what of a per-layer assignment it can express:
      uniform               one type for keys and one for values, of all layers
      uniform_pair          one of a few pairs for all layers
      skip                  one pair, and any set of layers in 16 bits
      ends                  keys and values apart: one type, another for the first N and another for the last N layers
      per_layer_equal_bits  each layer one of a few pairs, whose keys and values have the same bits
      per_layer             each layer a type for keys and one for values
    """
    kind = "uniform"

    def __init__(self, name):
        self.name = name

    # Of each engine:
    def options(self, table):
        """Its pairs, NONE among them where it can, with their words and frames."""
        raise NotImplementedError

    def tell(self, option, assignment, frame, table):
        raise NotImplementedError

    def read(self, flags, files, table, environment=()):
        """(assignment, frame) that an engine given these would store, by the parser of its format."""
        raise NotImplementedError

    def frame(self, asked, option, _assignment, _table):
        """The nearest frame that it runs the option in."""
        return option.frame

    def habits(self, _option, _assignment, _table):
        """What it does otherwise than kvqbench replays, whatever was asked."""
        return []

    def forced(self, _option, _layers):
        """Layers that it keeps in 16 bits by itself."""
        return set()

    # Of all:
    def pairs(self, table):
        return [option.pair for option in self.options(table) if table.fits(option.pair)]

    def menu(self, table):
        """(keys' scheme, values' scheme, the spec's keys of the frame it runs in)."""
        return [(*option.pair, write_spec([option.pair], option.frame).partition("@")[2])
                for option in self.options(table) if table.fits(option.pair)]

    def constraint(self, layers, table):
        """What of an assignment it can express, as data for an integer program: x[layer, pair] of `pairs`; layers of a
        group in `equal` share their keys' scheme, values' scheme, or pair. `skip`: beside one pair for all, NONE anywhere;
        `forced` are the layers that are NONE with a pair of that name."""
        pairs, everything = self.pairs(table), list(range(layers))
        equal = {"uniform": {"keys": [everything], "values": [everything]}, "uniform_pair": {"pair": [everything]}}
        forced = {option.pair: sorted(self.forced(option, layers)) for option in self.options(table)
                  if self.forced(option, layers)}
        return {"kind": self.kind, "layers": layers, "pairs": pairs, "equal": equal.get(self.kind, {}), "forced": forced}

    def project(self, assignment, frame, table, cost=None, amax=None):
        """The nearest setting. What can be expressed as it is asked is taken as it is. Else, with cost[layer][side][scheme]
        (KLD; side 0 keys, 1 values; 16 bits cost nothing), the cheapest that has no more encoded bits than was asked for, or
        where every setting has more, that with the fewest. Without costs the one whose bits differ least, over layers and
        sides. Of equals, the same scheme's name, then the likest frame, then the fewest bits, then the presets' order.
        amax: of each layer the largest |key| and |value|, for engines that want scales."""
        if len(assignment) != table.layers:
            raise Refused(f"{len(assignment)} layers were given, the model has {table.layers}")
        for side, scheme in {(side, pair[side]) for pair in assignment for side in (0, 1)}:
            if (side, scheme) not in table.bits:
                raise Refused(f"no scheme '{scheme}' is known for {SIDES[side]}")
        if amax is not None and len(amax) != table.layers:
            raise Refused(f"the largest keys and values are of {len(amax)} layers, the model has {table.layers}")
        option, stored = self.nearest(assignment, frame, table, None)
        if cost is not None and stored != assignment:
            option, stored = self.nearest(assignment, frame, table, cost)
        has = neutral(self.frame(frame, option, stored, table), encodes(stored))
        told = self.tell(option, stored, has, table)
        both = tuple(a and b for a, b in zip(encodes(assignment), encodes(stored), strict=True))
        lost = layers_lost(assignment, stored) + frame_lost(frame, has, both, table.head_dim)
        exact = not lost
        more = sum(map(table.size, stored)) - sum(map(table.size, assignment))
        if more > TINY:
            lost.append(f"it needs {sum(map(table.size, stored)) / 2 / table.layers:.3f} bits an encoded element, "
                        f"{more / 2 / table.layers:.3f} more than was planned")
        lost += [option.remark] * bool(option.remark) + self.habits(option, stored, table) + \
            self.scales(option, stored, table, amax, told)
        if self.read(told.flags, told.files, table, told.environment) != (stored, has):
            raise RuntimeError(f"{self.name}: what was written does not say {write_spec(stored, has)}")
        return Projection(self.name, stored, has, write_spec(stored, has), exact, told.flags, told.environment, told.files,
                          told.snippet, lost)

    def scales(self, _option, _assignment, _table, _amax, _told):
        """Adds files with scales, where it takes some; sentences on them."""
        return []

    def nearest(self, asked, frame, table, cost):
        """The option and the assignment."""
        score = Score(asked, table, cost)
        options = [option for option in self.options(table) if table.fits(option.pair)]
        found = []
        if self.kind.startswith("per_layer"):
            choices = [[(table.size(option.pair), score.pair(layer, option.pair) + 1e-8 * at)
                        for at, option in enumerate(options)] for layer in range(table.layers)]
            picked = [options[index] for index in knapsack(choices, score.budget)]
            first = next((option for option in picked if option.pair != NONE), picked[0])
            return first, [option.pair for option in picked]
        for at, option in enumerate(options):
            stored = [option.pair] * table.layers
            if self.kind == "skip" and option.pair != NONE:
                stored = self.skipping(option, table, score)
            unlike = len(frame_lost(frame, self.frame(frame, option, stored, table), encodes(stored), table.head_dim))
            found.append((score.rank(stored, 1e-5 * unlike + 1e-8 * at), at, option, stored))
        return min(found)[2:]

    def skipping(self, option, table, score):
        """One pair, and 16 bits in those layers where that helps most, while there are bits for them."""
        skipped, one = self.forced(option, table.layers), table.size(NONE) - table.size(option.pair)
        spare = score.budget - sum(table.size(NONE if layer in skipped else option.pair) for layer in range(table.layers))
        gains = sorted((score.pair(layer, NONE) - score.pair(layer, option.pair), layer) for layer in range(table.layers)
                       if layer not in skipped)
        for gain, layer in gains:
            if gain < 0 and one <= spare and len(skipped) < table.layers - 1:
                skipped = skipped | {layer}
                spare -= one
        return [NONE if layer in skipped else option.pair for layer in range(table.layers)]


def preset_options(table, start, pattern):
    """Of the presets of an engine: the pair, the frame and, by the pattern, the engine's word; what stands in brackets."""
    found = []
    for preset in table.named(start):
        word, layers = re.search(pattern, preset.flags), 64
        assignment, frame = parse_spec(preset.spec, layers)
        remark = re.search(r" \((?:scales of 1[^;)]*(?:; )?)?(.*)\)$", preset.flags)  # scales have sentences of their own
        found.append(Option(assignment[layers // 2], frame, word[1], remark[1] if remark else ""))
    return found


class Words(argparse.ArgumentParser):
    """Of an engine's flags."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message):
        raise Refused(message)


def python_literals(text):
    """name: value of the assignments of literals in a Python file."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass
    return found


# ---- llama.cpp

class LlamaCpp(Engine):
    kind = "uniform"
    native = "f16"

    def types(self, table):
        """scheme: llama.cpp's name for it."""
        found = {}
        for preset in table.named("llamacpp-"):
            words = re.search(r"-ctk (\S+) -ctv (\S+?)(?:;|$)", preset.flags).groups()
            found |= zip(halves(preset.spec.partition("@")[0]), words)
        return found | {"none": self.native}

    def frames(self, table):
        """Rotated, and not."""
        rotated, plain = Frame(residual=(0, 0)), Frame(residual=(0, 0))
        for preset in table.named("llamacpp-"):
            if not preset.name.endswith("-unrotated") and table.head_dim % 64 == 0:
                rotated = parse_spec(preset.spec, 1)[1]
        return rotated, plain

    def options(self, table):
        return [Option(pair, self.frames(table)[0]) for pair in itertools.product(self.types(table), repeat=2)]

    def frame(self, asked, option, _assignment, table):
        rotated, plain = self.frames(table)
        return plain if asked.rotate == ("none", "none") else rotated

    def tell(self, option, assignment, frame, table):
        words = self.types(table)
        keys, values = (words[scheme] for scheme in option.pair)
        flags = ["-ctk", keys, "-ctv", values] + ["-fa", "on"] * (values != self.native)
        turned, _ = self.frames(table)
        off = any(encodes(assignment)) and turned.rotate != ("none", "none") and frame.rotate == ("none", "none")
        return Told(flags, {"LLAMA_ATTN_ROT_DISABLE": "1"} if off else {})

    def read(self, flags, files, table, environment=()):
        schemes = {word: scheme for scheme, word in self.types(table).items()}
        words = Words()
        for flag, long in (("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v")):
            words.add_argument(flag, long, choices=schemes, default=self.native)
        words.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto")
        said = words.parse_args(flags)
        pair = schemes[said.cache_type_k], schemes[said.cache_type_v]
        rotated, plain = self.frames(table)
        off = dict(environment).get("LLAMA_ATTN_ROT_DISABLE") == "1"
        assignment = [pair] * table.layers
        return assignment, neutral(plain if off else rotated, encodes(assignment))

    def habits(self, option, assignment, table):
        keys, values = encodes(assignment)
        words = [self.types(table)[scheme] for scheme in option.pair]
        said = ["attention rounds queries to 8 bits where it reads quantized keys: always on a CPU, while decoding on a "
                "GPU"] * keys
        if "iq4_nl" in words:
            said.append("a CUDA build has no attention for iq4_nl: it runs on the CPU")
        elif (keys or values) and words not in (["q8_0"] * 2, ["q4_0"] * 2):
            said.append(f"a CUDA build reads {words[0]} keys with {words[1]} values as they are only where it was made "
                        "with -DGGML_CUDA_FA_QUANTS=all; else from 16-bit copies")
        return said


class IkLlamaCpp(LlamaCpp):
    """first and last are counts of layers; last counts where both name a layer. With a base type that is not quantized, -khad
    and -vhad are turned off."""
    kind = "ends"

    def types(self, table):
        own = {scheme: word for scheme, word in (("q6_0", "q6_0"), ("q8_kv", "q8_KV")) if scheme in table.schemes}
        upstream = super().types(table)
        return {scheme: word for scheme, word in upstream.items() if scheme != "none"} | own | {"none": self.native}

    def frames(self, table):
        size = 1 << (table.head_dim & -table.head_dim).bit_length() - 1
        turned = ("hadamard",) * 2 if size >= 64 or size == table.head_dim else ("none",) * 2
        return Frame(residual=(0, 0), rotate=turned), Frame(residual=(0, 0))

    def frame(self, asked, option, _assignment, table):
        rotated, _ = self.frames(table)
        return replace(rotated, rotate=tuple("none" if asked.rotate[side] == "none" or option.pair[side] == "none" else
                                             rotated.rotate[side] for side in (0, 1)))

    def nearest(self, asked, frame, table, cost):
        score, layers = Score(asked, table, cost), table.layers
        fronts = []
        for side in (0, 1):
            fit = [scheme for scheme in self.types(table) if table.schemes[scheme][side]]
            sums = numpy.zeros((len(fit), layers + 1))  # of the first layers
            sums[:, 1:] = numpy.cumsum([[score(layer, side, scheme) for layer in range(layers)] for scheme in fit], axis=1)
            bits = [table.bits[side, scheme] for scheme in fit]
            first, last = numpy.meshgrid(numpy.arange(layers), numpy.arange(layers), indexing="ij")
            inside = first + last < layers
            first, last = first[inside], last[inside]
            all_bits, all_scores, blocks = [], [], []
            for base, head, tail in itertools.product(range(len(fit)), repeat=3):
                sane = ((first > 0) == (head != base)) & ((last > 0) == (tail != base))
                a, b = first[sane], last[sane]
                all_bits.append(a * bits[head] + b * bits[tail] + (layers - a - b) * bits[base])
                all_scores.append(sums[head][a] + sums[tail][layers] - sums[tail][layers - b] + sums[base][layers - b] -
                                  sums[base][a] + 1e-7 * ((a > 0) + 1.0 * (b > 0) + (a + b) / layers))
                blocks.append((base, head, tail, a, b))
            fronts.append(self.front(fit, all_bits, all_scores, blocks))
        (bits_k, score_k, keys), (bits_v, score_v, values) = fronts
        room = numpy.searchsorted(bits_v, score.budget - bits_k, side="right") - 1
        sums = numpy.where(room >= 0, score_k + score_v[numpy.maximum(room, 0)], numpy.inf)
        k = int(sums.argmin()) if numpy.isfinite(sums).any() else 0
        v = max(int(room[k]), 0)
        stored = list(zip(self.spread(keys[k], layers), self.spread(values[v], layers), strict=True))
        return Option((keys[k][0], values[v][0]), word=json.dumps([keys[k], values[v]])), stored

    @staticmethod
    def front(fit, all_bits, all_scores, blocks):
        """Bits, scores and what they are of, without those that have more of both than another."""
        starts = numpy.concatenate([[0], numpy.cumsum([len(bits) for bits in all_bits])])
        bits, scores = numpy.concatenate(all_bits), numpy.concatenate(all_scores)
        order = numpy.lexsort((scores, bits))
        best = numpy.minimum.accumulate(scores[order])
        kept = order[numpy.concatenate([[True], best[1:] < best[:-1] - TINY])]
        said = []
        for index in kept:
            block = int(numpy.searchsorted(starts, index, side="right")) - 1
            base, head, tail, first, last = blocks[block]
            at = index - starts[block]
            said.append((fit[base], fit[head], int(first[at]), fit[tail], int(last[at])))
        return bits[kept], scores[kept], said

    @staticmethod
    def spread(said, layers):
        base, head, first, tail, last = said
        return [tail if layer >= layers - last else head if layer < first else base for layer in range(layers)]

    def tell(self, option, assignment, frame, table):
        words, flags = self.types(table), []
        for letter, (base, head, first, tail, last) in zip("kv", json.loads(option.word)):
            flags += [f"-ct{letter}", words[base]]
            flags += [f"-ct{letter}-first", f"{words[head]},{first}"] * (first > 0)
            flags += [f"-ct{letter}-last", f"{words[tail]},{last}"] * (last > 0)
        flags += ["-khad"] * (frame.rotate[0] != "none") + ["-vhad"] * (frame.rotate[1] != "none")
        return Told(flags + ["-fa", "on"] * encodes(assignment)[1])

    def read(self, flags, files, table, environment=()):
        schemes, words = {word: scheme for scheme, word in self.types(table).items()}, Words()
        for letter in "kv":
            words.add_argument(f"-ct{letter}", choices=schemes, default=self.native)
            words.add_argument(f"-ct{letter}-first", default=f"{self.native},-1")
            words.add_argument(f"-ct{letter}-last", default=f"{self.native},-1")
            words.add_argument(f"-{letter}had", action="store_true")
        words.add_argument("-fa", choices=("on", "off", "auto"), default="on")
        said, sides, rotate = vars(words.parse_args(flags)), [], []
        for letter in "kv":
            base = schemes[said[f"ct{letter}"]]
            (head, first), (tail, last) = (said[f"ct{letter}_{end}"].split(",") for end in ("first", "last"))
            sides.append(self.spread((base, schemes[head], int(first), schemes[tail], max(int(last), 0)), table.layers))
            rotate.append("hadamard" if said[f"{letter}had"] and base != "none" else "none")
        assignment = list(zip(*sides, strict=True))
        return assignment, neutral(Frame(residual=(0, 0), rotate=tuple(rotate)), encodes(assignment))

    def habits(self, option, assignment, table):
        return ["attention rounds queries to 8 bits where it reads quantized keys"] * encodes(assignment)[0]


# ---- vLLM, SGLang, TensorRT-LLM, LMDeploy: pairs by name

def scale_values(assignment, amax):
    """Of each layer: k_scale, v_scale."""
    return [tuple(largest / FP8_MAX if largest > 0 else 1.0 for largest in of_layer) if amax else (1.0, 1.0)
            for of_layer in (amax or assignment)]


SCALES_OF_ONE = "the scales are 1: no largest keys and values were given (--amax), which fp8 with scales of 1 clips at 448"
SCALES_GIVEN = "the engine divides keys and values by scales of amax / 448 before it rounds them; kvqbench's fp8 has scales of 1"


def safetensors(tensors):
    """A file of float32 tensors of one number: the header's length, a header in JSON, the numbers."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(tensors)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(tensors)}f", *tensors.values())


class Vllm(Engine):
    kind = "skip"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

    def options(self, table):
        return [Option(NONE, word="auto"), *preset_options(table, "vllm-", r"--kv-cache-dtype (\S+)")]

    def forced(self, option, layers):
        n = min(2, layers // 2) if option.word.startswith("turboquant_") else 0
        return {*range(n), *range(layers - n, layers)}

    def tell(self, option, assignment, frame, table):
        skipped = [layer for layer, pair in enumerate(assignment) if pair == NONE and option.pair != NONE and
                   layer not in self.forced(option, table.layers)]
        return Told(["--kv-cache-dtype", option.word] +
                    (["--kv-cache-dtype-skip-layers", *map(str, skipped)] if skipped else []))

    def read(self, flags, files, table, environment=()):
        options = {option.word: option for option in self.options(table)}
        words = Words()
        words.add_argument("--kv-cache-dtype", choices=options, default="auto")
        words.add_argument("--kv-cache-dtype-skip-layers", nargs="+", default=[])
        said = words.parse_args(flags)
        option = options[said.kv_cache_dtype]
        skipped = {*map(int, said.kv_cache_dtype_skip_layers), *self.forced(option, table.layers)}
        assignment = [NONE if layer in skipped else option.pair for layer in range(table.layers)]
        return assignment, neutral(option.frame, encodes(assignment))

    def habits(self, option, assignment, table):
        said = []
        if option.word.startswith("fp8") and "token" not in option.word:
            said.append("FlashAttention 3 (Hopper) rounds queries and probabilities to fp8, too")
        if option.word == "int4_per_token_head":
            said.append("on CUDA the Hadamard transform is computed in 16 bits")
        return said

    def scales(self, option, assignment, table, amax, told):
        if option.word != "fp8":
            return []
        tensors = {}
        for layer, (keys, values) in enumerate(scale_values(assignment, amax)):
            for name, scale in (("k_scale", keys), ("v_scale", values)):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = scale
        told.files["kv_scales.safetensors"] = safetensors(tensors)
        config = {}
        said = ["the scales count where kv_scales.safetensors lies in the model's folder and config.json is merged with its "
                "own"]
        if table.directory:
            with open(os.path.join(table.directory, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            said = ["the scales count where these files lie in the model's folder; config.json is its own with "
                    "kv_cache_scheme added"]
            index = os.path.join(table.directory, "model.safetensors.index.json")
            if os.path.isfile(index):
                with open(index, encoding="utf-8") as file:
                    shards = json.load(file)
                shards["weight_map"] |= {name: "kv_scales.safetensors" for name in tensors}
                told.files["model.safetensors.index.json"] = json.dumps(shards, indent=2) + "\n"
        quantized = config.setdefault("quantization_config", {"quant_method": "compressed-tensors", "config_groups": {},
                                                              "ignore": []})
        if quantized.get("quant_method") != "compressed-tensors":
            said.append(f"the model's weights are quantized by {quantized.get('quant_method')}, which has its own way to say "
                        "scales; kv_cache_scheme is compressed-tensors'")
        quantized["kv_cache_scheme"] = self.scheme
        told.files["config.json"] = json.dumps(config, indent=2) + "\n"
        return said + [SCALES_GIVEN if amax else SCALES_OF_ONE]


class TensorRtLlm(Engine):
    kind = "uniform_pair"

    def options(self, table):
        return [Option(NONE, word="auto"), *preset_options(table, "trtllm-", r"dtype: (\w+)")]

    def tell(self, option, assignment, frame, table):
        return Told(["--extra_llm_api_options", "trtllm.yaml"],
                    files={"trtllm.yaml": yaml.safe_dump({"kv_cache_config": {"dtype": option.word}})})

    def read(self, flags, files, table, environment=()):
        words = Words()
        words.add_argument("--extra_llm_api_options")
        said = yaml.safe_load(files[words.parse_args(flags).extra_llm_api_options])
        option = {option.word: option for option in self.options(table)}[said["kv_cache_config"]["dtype"]]
        assignment = [option.pair] * table.layers
        return assignment, neutral(option.frame, encodes(assignment))

    def habits(self, option, assignment, table):
        return ["the scales are those of the checkpoint, or 1", "whether a prompt's own attention reads what is stored is not "
                "documented"] * (option.pair != NONE)


class SgLang(Engine):
    kind = "uniform_pair"

    def options(self, table):
        as_it_comes = Frame(residual=(0, 0))
        return [Option(NONE, word="auto"), Option(("fp8-e4m3",) * 2, as_it_comes, "fp8_e4m3"),
                Option(("fp8-e5m2",) * 2, as_it_comes, "fp8_e5m2"),
                *preset_options(table, "sglang-", r"--kv-cache-dtype (\S+)")]

    def tell(self, option, assignment, frame, table):
        return Told(["--kv-cache-dtype", option.word])

    def read(self, flags, files, table, environment=()):
        options = {option.word: option for option in self.options(table)}
        words = Words()
        words.add_argument("--kv-cache-dtype", choices=options, default="auto")
        words.add_argument("--quantization-param-path")
        option = options[words.parse_args(flags).kv_cache_dtype]
        assignment = [option.pair] * table.layers
        return assignment, neutral(option.frame, encodes(assignment))

    def scales(self, option, assignment, table, amax, told):
        if option.word != "fp8_e4m3":
            return []
        scales = {str(layer): max(of_layer) for layer, of_layer in enumerate(scale_values(assignment, amax))}
        told.files["kv_scales.json"] = json.dumps({"model_type": table.model_type or None, "kv_cache": {
            "dtype": "float8_e4m3fn", "scaling_factor": {"0": scales}}}, indent=1) + "\n"
        told.flags += ["--quantization-param-path", "kv_scales.json"]
        said = ["keys and values of a layer share a scale, the larger one; the file is for one GPU (--tp 1)"]
        if not table.model_type:
            said.append("kv_scales.json does not name the model_type, which is not known here: SGLang then leaves the scales "
                        "at 1")
        return said + [SCALES_GIVEN if amax else SCALES_OF_ONE]


class LmDeploy(Engine):
    """Its PyTorch engine."""
    kind = "uniform_pair"

    def options(self, table):
        as_it_comes = Frame(residual=(0, 0))
        return [Option(NONE, word="0"), *preset_options(table, "lmdeploy-", r"--quant-policy (\d+)"),
                Option(("fp8-e4m3",) * 2, as_it_comes, "16"), Option(("fp8-e5m2",) * 2, as_it_comes, "17")]

    def tell(self, option, assignment, frame, table):
        return Told(["--backend", "pytorch", "--quant-policy", option.word])

    def read(self, flags, files, table, environment=()):
        options = {option.word: option for option in self.options(table)}
        words = Words()
        words.add_argument("--backend", choices=("pytorch", "turbomind"), default="turbomind")
        words.add_argument("--quant-policy", choices=options, default="0")
        said = words.parse_args(flags)
        if said.backend != "pytorch":
            raise Refused("--backend turbomind stores 8 and 4 bits by another formula")
        assignment = [options[said.quant_policy].pair] * table.layers
        return assignment, neutral(options[said.quant_policy].frame, encodes(assignment))

    def habits(self, option, assignment, table):
        return ["the scales are 1, and there is no way to say others"] * (option.word in ("16", "17"))


# ---- transformers, MLX, KVTuner: a layer at a time

class Transformers(Engine):
    kind = "per_layer_equal_bits"
    name_of = re.compile(r"int(\d)-(hqq|quanto)(-kivi)?$")

    def options(self, table):
        return [*(Option((scheme, scheme), Frame(policy="hf", prefill="raw")) for scheme in sorted(table.schemes)
                  if self.name_of.match(scheme) and table.fits((scheme, scheme))), Option(NONE)]

    def frame(self, asked, option, assignment, table):
        has = Frame(policy="hf", prefill="raw", group=asked.group if asked.group in (32, 64, 128) else 0)
        sides = encodes(assignment)
        # One number for keys and values; where every token was to be encoded as it comes, its default: without a residual it
        # would encode everything again at every second token.
        wanted = [asked.residual[side] for side in (0, 1) if sides[side]] or [128]
        return replace(has, residual=(max(wanted) or 128,) * 2)

    def layer(self, scheme):
        """backend, nbits, axis_key, axis_value. HQQ's axis 1 are neighbouring channels of a token, as are quanto's axis 0."""
        bits, backend, kivi = self.name_of.match(scheme).groups()
        axis = 1 if backend == "hqq" else 0
        return backend, int(bits), 0 if kivi else axis, axis

    def scheme(self, backend, bits, axis_key, axis_value):
        names = [f"int{bits}-{backend}{kivi}" for kivi in ("", "-kivi")]
        found = [name for name in names if self.layer(name) == (backend, bits, axis_key, axis_value)]
        return found[0] if found else _refuse(f"no scheme groups as {backend} does with axis_key={axis_key}, "
                                              f"axis_value={axis_value}")

    def tell(self, option, assignment, frame, table):
        group, residual = frame.group or 64, frame.residual[0]
        if not any(encodes(assignment)):
            return Told(files={"cache_config.json": json.dumps({"cache_implementation": "dynamic"}) + "\n"},
                        snippet="model.generate(**inputs)")
        if len(set(assignment)) == 1:
            backend, bits, axis_key, axis_value = self.layer(assignment[0][0])
            said = {"cache_implementation": "quantized", "cache_config": {
                "backend": backend, "nbits": bits, "axis_key": axis_key, "axis_value": axis_value, "q_group_size": group,
                "residual_length": residual}}
            return Told(files={"cache_config.json": json.dumps(said, indent=1) + "\n"},
                        snippet='import json\nmodel.generate(**inputs, **json.load(open("cache_config.json")))')
        layers = "".join(f"    {None if pair == NONE else self.layer(pair[0])},\n" for pair in assignment)
        text = f'''"""A cache of transformers 5.5.4, a layer at a time: model.generate(..., past_key_values=kv_cache())."""
from transformers.cache_utils import Cache, DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

# Of each layer: backend, nbits, axis_key, axis_value; None: 16 bits.
LAYERS = [
{layers}]
Q_GROUP_SIZE = {group}
RESIDUAL_LENGTH = {residual}


def kv_cache():
    classes = {{"hqq": HQQQuantizedLayer, "quanto": QuantoQuantizedLayer}}
    return Cache(layers=[DynamicLayer() if layer is None else classes[layer[0]](*layer[1:], Q_GROUP_SIZE, RESIDUAL_LENGTH)
                         for layer in LAYERS])
'''
        return Told(files={"transformers_cache.py": text},
                    snippet="from transformers_cache import kv_cache\nmodel.generate(**inputs, past_key_values=kv_cache())")

    def read(self, flags, files, table, environment=()):
        if "cache_config.json" in files:
            said = json.loads(files["cache_config.json"])
            if said["cache_implementation"] == "dynamic":
                return [NONE] * table.layers, Frame()
            config = {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64,
                      "residual_length": 128} | said["cache_config"]
            layers = [(config["backend"], config["nbits"], config["axis_key"], config["axis_value"])] * table.layers
            group, residual = config["q_group_size"], config["residual_length"]
        else:
            said = python_literals(files["transformers_cache.py"])
            layers, group, residual = said["LAYERS"], said["Q_GROUP_SIZE"], said["RESIDUAL_LENGTH"]
        assignment = [NONE if layer is None else (self.scheme(*layer),) * 2 for layer in layers]
        frame = Frame((residual, residual), policy="hf", prefill="raw", group=0 if group == 64 else group)
        return assignment, neutral(frame, encodes(assignment))

    def habits(self, option, assignment, table):
        said = []
        rows = {}
        for scheme in {pair[0] for pair in assignment if pair != NONE}:
            backend, bits, _, _ = self.layer(scheme)
            if backend == "hqq" and table.kv_heads * table.head_dim // 64 % (8 // bits):
                rows[8 // bits] = scheme
        for packed, scheme in sorted(rows.items()):
            said.append(f"hqq packs {packed} groups into one and fails where their number is no multiple of that, so of "
                        f"{scheme} on {table.kv_heads} KV heads of {table.head_dim} at some lengths of the prompt or of a flush")
        return said


class Mlx(Engine):
    kind = "per_layer_equal_bits"

    def options(self, table):
        return [*preset_options(table, "mlx-lm-", r"--kv-bits (\d+)"), Option(NONE)]

    def frame(self, asked, option, _assignment, _table):
        return replace(option.frame, group=asked.group if asked.group in (32, 128) else 0)

    def tell(self, option, assignment, frame, table):
        group, bits = frame.group or 64, {option.pair: int(option.word) for option in self.options(table) if option.word}
        if not any(encodes(assignment)):
            return Told()
        if len(set(assignment)) == 1:
            return Told(["--kv-bits", option.word, "--kv-group-size", str(group), "--quantized-kv-start", "0"])
        text = f'''"""A cache of mlx-lm 0.32.2, a layer at a time: generate(model, tokenizer, prompt, prompt_cache=kv_cache())."""
from mlx_lm.models.cache import KVCache, QuantizedKVCache

# Of each layer, the bits of keys and values; None: 16 bits.
KV_BITS = {[bits.get(pair) for pair in assignment]}
KV_GROUP_SIZE = {group}


def kv_cache():
    return [KVCache() if bits is None else QuantizedKVCache(group_size=KV_GROUP_SIZE, bits=bits) for bits in KV_BITS]
'''
        return Told(files={"mlx_cache.py": text},
                    snippet="from mlx_cache import kv_cache\ngenerate(model, tokenizer, prompt, prompt_cache=kv_cache())")

    def read(self, flags, files, table, environment=()):
        options = {option.word: option for option in self.options(table)}
        if "mlx_cache.py" in files:
            said = python_literals(files["mlx_cache.py"])
            layers, group = said["KV_BITS"], said["KV_GROUP_SIZE"]
        else:
            words = Words()
            words.add_argument("--kv-bits", type=int)
            words.add_argument("--kv-group-size", type=int, default=64)
            words.add_argument("--quantized-kv-start", type=int, default=5000)
            said = words.parse_args(flags)
            if said.kv_bits is not None and said.quantized_kv_start != 0:
                raise Refused("a quantized start other than 0 is no spec")
            layers, group = [said.kv_bits] * table.layers, said.kv_group_size
        used = [options[str(bits) if bits else ""] for bits in layers]
        frame = next((option.frame for option in used if option.word), Frame())
        assignment = [option.pair for option in used]
        return assignment, neutral(replace(frame, group=0 if group == 64 else group), encodes(assignment))

    def habits(self, option, assignment, table):
        if len(set(assignment)) == 1 and assignment[0] != NONE:
            return ["by flags the cache is encoded after each call, so that the prompt's first chunk (of 2048 tokens) reads the "
                    "originals"]
        return []


class KvTuner(Engine):
    """Its cache for HQQ (FlexibleHQQQuantizedCache), which encodes as transformers' does, with bits for keys and values."""
    kind = "per_layer"
    name_of = re.compile(r"int(\d)-hqq$")

    def options(self, table):
        schemes = [scheme for scheme in ("int8-hqq", "int4-hqq", "int2-hqq") if scheme in table.schemes]
        return [Option(pair, Frame(policy="hf", prefill="raw")) for pair in itertools.product(schemes, repeat=2)]

    frame = Transformers.frame

    def tell(self, option, assignment, frame, table):
        bits = [[int(self.name_of.match(scheme)[1]) for scheme in pair] for pair in assignment]
        text = yaml.safe_dump({layer: {"nbits_key": keys, "nbits_value": values}
                               for layer, (keys, values) in enumerate(bits)})
        return Told(files={"kvtuner.yaml": text, "kvtuner_cache.py": f'''\
"""KVTuner's cache, a layer at a time: model.generate(..., past_key_values=kv_cache(model))."""
from flexible_quant.flexible_quantized_cache import FlexibleHQQQuantizedCache, FlexibleQuantizedCacheConfig

Q_GROUP_SIZE = {frame.group or 64}
RESIDUAL_LENGTH = {frame.residual[0]}


def kv_cache(model):
    return FlexibleHQQQuantizedCache(cache_config=FlexibleQuantizedCacheConfig(
        backend="hqq", axis_key=1, axis_value=1, q_group_size=Q_GROUP_SIZE, residual_length=RESIDUAL_LENGTH,
        device=str(model.device), compute_dtype=model.dtype, per_layer_quant=True, per_layer_config_path="kvtuner.yaml"))
'''}, snippet="from kvtuner_cache import kv_cache\nmodel.generate(**inputs, past_key_values=kv_cache(model))")

    def read(self, flags, files, table, environment=()):
        said, frame = yaml.safe_load(files["kvtuner.yaml"]), python_literals(files["kvtuner_cache.py"])
        assignment = [tuple(f"int{said[layer][f'nbits_{side}']}-hqq" for side in ("key", "value"))
                      for layer in range(table.layers)]
        group, residual = frame["Q_GROUP_SIZE"], frame["RESIDUAL_LENGTH"]
        return assignment, Frame((residual, residual), policy="hf", prefill="raw", group=0 if group == 64 else group)

    def habits(self, option, assignment, table):
        return ["the YAML says bits alone: how they are used stands in kvtuner_cache.py, for KVTuner's HQQ cache; its own "
                "searches are of its vanilla cache, which groups otherwise",
                "KVTuner imports CacheConfig from transformers, which 5.5.4 no longer has"]


class ExLlamaV3(Engine):
    kind = "uniform"

    def options(self, table):
        schemes = sorted((scheme for scheme in table.schemes if re.match(r"exl3-\d$", scheme)), reverse=True)
        return [*(Option(pair, Frame(residual=(0, 0))) for pair in itertools.product(schemes, repeat=2)), Option(NONE)]

    def tell(self, option, assignment, frame, table):
        return Told(["-cq", ",".join(scheme[-1] for scheme in option.pair)] if option.pair != NONE else [])

    def read(self, flags, files, table, environment=()):
        words = Words()
        words.add_argument("-cq", "--cache_quant")
        words.add_argument("-cca", "--cache_compand_a", type=float, default=0.0)
        said = words.parse_args(flags)
        if said.cache_compand_a:
            raise Refused("-cca: no scheme compands")
        bits = said.cache_quant.split(",") if said.cache_quant else []
        assignment = [(f"exl3-{bits[0]}", f"exl3-{bits[-1]}") if bits else NONE] * table.layers
        return assignment, neutral(Frame(residual=(0, 0)), encodes(assignment))


ENGINES = {engine.name: engine for engine in (
    LlamaCpp("llama.cpp"), IkLlamaCpp("ik_llama.cpp"), Vllm("vllm"), Transformers("transformers"), SgLang("sglang"),
    TensorRtLlm("tensorrt-llm"), LmDeploy("lmdeploy"), Mlx("mlx"), ExLlamaV3("exllamav3"), KvTuner("kvtuner"))}


def written(projection, out):
    """Writes its files to a folder of `out` that has the engine's name; what the engine is to be told, and what is lost, in
    lines."""
    lines = [f"{projection.engine}: {projection.spec}" + (", as asked" if projection.exact else "")]
    words = [f"{name}={value}" for name, value in projection.environment.items()] + [shlex.join(projection.flags)]
    lines += ["  " + " ".join(words)] * any(words) + ["  >>> " + line for line in projection.snippet.splitlines()]
    for name, text in projection.files.items():
        os.makedirs(os.path.join(out, projection.engine), exist_ok=True)
        writing.write(os.path.join(out, projection.engine, name), text)
        lines.append("  wrote " + os.path.join(out, projection.engine, name))
    return "\n".join(lines + ["  - " + sentence for sentence in projection.lost])
