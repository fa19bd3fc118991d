"""What an engine is told, and the nearest that it can take: class Engine, with a subclass in each file of ci/engines. Which
formats an engine has, and the frame they run in, is read from kvqbench's presets; what stands in those files is how an
engine wants to be told, and what no preset says."""

import argparse
import ast
import math
import re
from dataclasses import dataclass, field, replace

from specs import NONE, Frame, Refused, encodes, parse_spec, runs_text, write_spec

FP8_MAX = 448.0  # of e4m3
TINY = 1e-9  # beside scores and bits; what breaks ties is larger


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


def frame_lost(asked, stored, sides, table):
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
            lost.append(f"the newest {table.sides[side]}: residual {want} was planned, the engine " +
                        (f"keeps up to {has} tokens in 16 bits" if has else "encodes every token as it comes"))
    if asked.sinks != stored.sinks:
        lost.append(f"the first {asked.sinks} tokens are not kept in 16 bits: no sinks")
    if asked.prefill != stored.prefill:
        lost.append("a prompt's own attention reads the originals, not what is stored" if stored.prefill == "raw" else
                    "a prompt's own attention reads what is stored, not the originals")
    for side in (0, 1):
        want, has = asked.rotate[side], stored.rotate[side]
        if sides[side] and turned(want, table.widths[side]) != turned(has, table.widths[side]):
            lost.append(f"{table.sides[side]}: rotation {want} was planned, the engine has {has}, beyond what its formats do "
                        "themselves")
    if asked.window_cache != stored.window_cache:
        lost.append("how many tokens a layer with a sliding window keeps is not handed over: it is the engine's own default")
    if asked.group != stored.group:
        lost.append(f"groups of {asked.group or 'the default size'} were planned, the engine has " +
                    (f"groups of {stored.group}" if stored.group else "its formats' own"))
    return lost


def layers_lost(asked, stored, names):
    """A sentence for each scheme of keys or values that became another, with its layers."""
    changed = {}
    for layer, (want, has) in enumerate(zip(asked, stored, strict=True)):
        for side in (0, 1):
            if want[side] != has[side]:
                changed.setdefault((side, want[side], has[side]), []).append(layer)
    return [f"{runs_text(at)}: planned {want} {names[side]}, the engine stores {has} {names[side]}"
            for (side, want, has), at in changed.items()]


class Score:
    """How far a setting is from what was asked: score(layer, side, scheme), and the encoded bits it may have."""

    def __init__(self, asked, table, cost=None):
        self.asked, self.table, self.cost = asked, table, cost
        self.budget = math.inf if cost is None else sum(table.size(pair) for pair in asked) + TINY

    def __call__(self, layer, side, scheme):
        want, bits = self.asked[layer][side], self.table.bits
        if self.cost is None:
            return self.table.share(side) * abs(bits[side, scheme] - bits[side, want]) + 1e-4 * (scheme != want) + 1e-7 * bits[side, scheme]
        try:
            return 0.0 if scheme == "none" else self.cost[layer][side][scheme]
        except (KeyError, IndexError):
            raise Refused(f"the costs have none for {scheme} {self.table.sides[side]} of layer {layer}") from None

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


OWN_GROUP = 64  # of every scheme whose groups a spec can choose, as of the engines that have such


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
    latents = False  # whether it is known what it stores of them, and is told
    gaps = True      # whether its setting can be that of a model of which some layers keep nothing

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
    def unknown(self, table):
        """Why it cannot be said how it stores the cache of this model, or nothing."""
        if table.latent and not self.latents:
            return "what it stores of latents, or how it is told, is not known here: nothing is handed over"
        if table.gaps and not self.gaps:
            return (f"{table.model_layers - table.layers} of the model's {table.model_layers} layers keep no keys and values, and how its "
                    "cache is made then is not known here: nothing is handed over")
        return ""

    def pairs(self, table):
        return [option.pair for option in self.options(table) if table.fits(option.pair)]

    def menu(self, table):
        """(keys' scheme, values' scheme, the spec's keys of the frame it runs in)."""
        return [(*option.pair, write_spec([option.pair], option.frame, table.latent).partition("@")[2])
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
        if self.unknown(table):
            raise Refused(f"{self.name}: {self.unknown(table)}")
        if len(assignment) != table.layers:
            raise Refused(f"{len(assignment)} layers were given, the model has {table.layers}")
        for side, scheme in {(side, pair[side]) for pair in assignment for side in (0, 1)}:
            if (side, scheme) not in table.bits:
                raise Refused(f"no scheme '{scheme}' is known for {table.sides[side]}")
        if amax is not None and len(amax) != table.layers:
            raise Refused(f"the largest keys and values are of {len(amax)} layers, the model has {table.layers}")
        if frame.group == OWN_GROUP:
            frame = replace(frame, group=0)
        option, stored = self.nearest(assignment, frame, table, None)
        if cost is not None and stored != assignment:
            option, stored = self.nearest(assignment, frame, table, cost)
        has = neutral(self.frame(frame, option, stored, table), encodes(stored))
        told = self.tell(option, stored, has, table)
        both = tuple(a and b for a, b in zip(encodes(assignment), encodes(stored), strict=True))
        lost = layers_lost(assignment, stored, table.sides) + frame_lost(frame, has, both, table)
        exact = not lost
        more = sum(map(table.size, stored)) - sum(map(table.size, assignment))
        if more > TINY:
            lost.append(f"it needs {sum(map(table.size, stored)) / 2 / table.layers:.3f} bits an encoded element, "
                        f"{more / 2 / table.layers:.3f} more than was planned")
        lost += [option.remark] * bool(option.remark) + self.habits(option, stored, table) + \
            self.scales(option, stored, table, amax, told)
        if self.read(told.flags, told.files, table, told.environment) != (stored, has):
            raise RuntimeError(f"{self.name}: what was written does not say {write_spec(stored, has, table.latent)}")
        return Projection(self.name, stored, has, write_spec(stored, has, table.latent), exact, told.flags, told.environment, told.files,
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
            unlike = len(frame_lost(frame, self.frame(frame, option, stored, table), encodes(stored), table))
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


def scale_values(assignment, amax):
    """Of each layer: k_scale, v_scale."""
    return [tuple(largest / FP8_MAX if largest > 0 else 1.0 for largest in of_layer) if amax else (1.0, 1.0)
            for of_layer in (amax or assignment)]


SCALES_OF_ONE = "the scales are 1: no largest keys and values were given (--amax), which fp8 with scales of 1 clips at 448"
SCALES_GIVEN = "the engine divides keys and values by scales of amax / 448 before it rounds them; kvqbench's fp8 has scales of 1"
