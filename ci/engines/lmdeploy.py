"""As LMDeploy 0.18.0 takes it: messages.py."""

from engine import Engine, Option, Told, Words, neutral, preset_options
from specs import NONE, Frame, Refused, encodes


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


ENGINE = LmDeploy("lmdeploy")
