"""As exllamav3 0148de2 takes it: model_init.py."""

import itertools
import re

from engine import Engine, Option, Told, Words, neutral
from specs import NONE, Frame, Refused, encodes


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


ENGINE = ExLlamaV3("exllamav3")
