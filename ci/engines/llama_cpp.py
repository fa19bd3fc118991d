"""As llama.cpp 0c1e57098 takes it."""

import itertools
import re

from engine import Engine, Option, Told, Words, neutral
from specs import Frame, encodes, halves, parse_spec


class LlamaCpp(Engine):
    kind = "uniform"
    latents = True
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
        pairs = itertools.product(self.types(table), repeat=2)
        # Of latent attention a token is one row, which has one type.
        return [Option(pair, self.frames(table)[0]) for pair in pairs if not table.latent or pair[0] == pair[1]]

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
        if table.latent and keys:
            said.append("a token is one row, the latent and the rotary key, of the type that -ctk names")
        if "iq4_nl" in words:
            said.append("a CUDA build has no attention for iq4_nl: it runs on the CPU")
        elif (keys or values) and words not in (["q8_0"] * 2, ["q4_0"] * 2):
            said.append(f"a CUDA build reads {words[0]} keys with {words[1]} values as they are only where it was made "
                        "with -DGGML_CUDA_FA_QUANTS=all; else from 16-bit copies")
        return said


ENGINE = LlamaCpp("llama.cpp")
