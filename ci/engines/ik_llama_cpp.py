"""As ik_llama.cpp 8337e4cd3 takes it."""

import itertools
import json
from dataclasses import replace

import numpy

from engine import TINY, Option, Score, Told, Words, neutral
from engines.llama_cpp import LlamaCpp
from specs import Frame, encodes


class IkLlamaCpp(LlamaCpp):
    """first and last are counts of layers; last counts where both name a layer. With a base type that is not quantized, -khad
    and -vhad are turned off."""
    kind = "ends"
    latents, gaps = False, False

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


ENGINE = IkLlamaCpp("ik_llama.cpp")
