"""Specs of kvqbench as data, and what an engine's setting needs to know of a model. kvqbench parses and judges specs
(fixtures/cache/spec.h, handover.load).

An assignment is a list of (keys' scheme, values' scheme), one a layer. A Frame is what a spec says of all layers: residual,
sinks, policy, prefill, rotate, group."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass

NONE = ("none", "none")
SIDES = ("keys", "values")


class Refused(Exception):
    """Bad input, and why."""


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
    return int(text) if text.isdigit() else refuse(f"spec '{spec}': {key} wants a whole number, not '{text}'")


def refuse(text):
    raise Refused(text)


def pair_of(text, latent=False):
    """Keys' and values' schemes; of latents, where a scheme alone is the latent's, that and the rotary key's."""
    return halves(text) if "+" in text or not latent else (text, "none")


def parse_spec(text, layers, presets=(), latent=False):
    """Of so many layers: the assignment and the frame."""
    name, at, rest = text.partition("@")
    known = {preset.name: preset.spec for preset in presets}
    whole_text = known[name] + at + rest if name in known else text
    schemes, *options = whole_text.split("@")
    pair, frame, dense, ranges = pair_of(schemes, latent), {}, (0, 0), []
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            refuse(f"spec '{text}': '@{option}' wants the form @key=value")
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
                refuse(f"spec '{text}': layers wants FIRST-LAST:SCHEME[+SCHEME], not '{value}'")
            ranges.append((whole(text, key, first), whole(text, key, last if dash else first), pair_of(stored, latent)))
        else:
            refuse(f"spec '{text}': no key '{key}'; the keys are group, residual, sinks, policy, prefill, window-cache, "
                    "rotate, dense, layers")
    if frame.get("policy", "append") != "append":
        frame["prefill"] = "raw"  # by their own rules
    assignment = [NONE if layer < dense[0] or layer >= layers - dense[1] else pair for layer in range(layers)]
    for first, last, stored in ranges:
        if last >= layers:
            refuse(f"spec '{text}': layers {first}-{last}, but the cache has layers 0-{layers - 1}")
        assignment[first:last + 1] = [stored] * (last + 1 - first)
    return assignment, Frame(**frame)


def pair_text(pair, latent=False):
    """As pair_of reads it."""
    return pair[0] if pair[1] == ("none" if latent else pair[0]) else "+".join(pair)


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


def write_spec(assignment, frame, latent=False):
    """The spec that stores this; of two ways to say it, that with fewer @layers."""
    window = "" if frame.window_cache == "full" else f"@window-cache={frame.window_cache}"
    if not any(encodes(assignment)):
        return "none" + window
    base = Counter(pair for pair in assignment if pair != NONE).most_common(1)[0][0]
    text, default = pair_text(base, latent), Frame()
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
            text += f"@layers={first}-{last}:{pair_text(pair, latent)}"
        first = last + 1
    return text


# ---- what is known of a model

@dataclass
class Table:
    layers: int              # of the cache
    head_dim: int            # or channels of a latent
    kv_heads: int
    presets: list            # of class Preset, those for its head_dim
    schemes: dict            # name: (whether keys of that head_dim can be stored so, whether values can)
    bits: dict               # (0 for keys or 1 for values, scheme): bits per encoded element, all metadata counted
    directory: str = ""      # of the model, where it is one of Hugging Face
    model_type: str = ""     # of its config.json
    rotary_dim: int = 0      # of latent attention: channels of the rotary key
    kv_layers: tuple = ()    # which of the model's layers the cache's are; nothing: all of them
    model_layers: int = 0

    @property
    def latent(self):
        return self.rotary_dim > 0

    @property
    def sides(self):
        return ("latents", "rotary keys") if self.latent else SIDES

    @property
    def widths(self):
        return self.head_dim, self.rotary_dim or self.head_dim

    def share(self, side):
        """Of the two sides' elements, twice what is this one's."""
        return 2 * self.widths[side] / sum(self.widths)

    @property
    def gaps(self):
        """Whether layers that keep nothing lie among those that do (at the end they may read what others keep)."""
        return self.kv_layers != tuple(range(len(self.kv_layers)))

    def place(self, layer):
        """Which of the model's layers one of the cache's is."""
        return self.kv_layers[layer] if self.kv_layers else layer

    def named(self, start):
        return [preset for preset in self.presets if preset.name.startswith(start)]

    def fits(self, pair):
        return all(self.schemes.get(scheme, (False, False))[side] for side, scheme in enumerate(pair))

    def size(self, pair):
        """Twice the bits per element, encoded ones: of keys and of values."""
        return sum(self.share(side) * self.bits[side, scheme] for side, scheme in enumerate(pair))


def parse_presets(text):
    """Of `kvqbench --list-presets`: those that the model's head_dim allows."""
    found = []
    for line in text.splitlines()[2:]:
        columns = re.split(r"\s{2,}", line.strip(), maxsplit=5)
        if len(columns) == 6 and columns[1] != "-":
            found.append(Preset(columns[0], columns[4], columns[5]))
    return found


def parse_schemes(text, widths):
    """Of `kvqbench --help`: each scheme, and whether keys and values of these channels a head can be stored so."""
    def allows(part, head_dim):
        several, some = re.search(r"head_dim a multiple of (\d+)", part), re.search(r"head_dim (\d[\d, or]*\d)", part)
        return "refused" not in part and (not several or head_dim % int(several[1]) == 0) and \
            (not some or head_dim in map(int, re.findall(r"\d+", some[1])))
    found = {}
    for line in re.search(r"\nschemes\n(.*?)\n  keys of a spec", text, re.S)[1].splitlines():
        name, _, rest = line.strip().partition(" ")
        keys, colon, values = rest.partition("values:")
        found[name] = (allows(keys, widths[0]), allows(values if colon else rest, widths[1]))
    return found
