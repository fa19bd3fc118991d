"""As SGLang 0.5.10 takes it: server_args.py, model_loader/weight_utils.py."""

import json

from engine import SCALES_GIVEN, SCALES_OF_ONE, Engine, Option, Told, Words, neutral, preset_options, scale_values
from specs import NONE, Frame, encodes


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
        scales = {str(table.place(layer)): max(of_layer) for layer, of_layer in enumerate(scale_values(assignment, amax))}
        told.files["kv_scales.json"] = json.dumps({"model_type": table.model_type or None, "kv_cache": {
            "dtype": "float8_e4m3fn", "scaling_factor": {"0": scales}}}, indent=1) + "\n"
        told.flags += ["--quantization-param-path", "kv_scales.json"]
        said = ["keys and values of a layer share a scale, the larger one; the file is for one GPU (--tp 1)"]
        if not table.model_type:
            said.append("kv_scales.json does not name the model_type, which is not known here: SGLang then leaves the scales "
                        "at 1")
        return said + [SCALES_GIVEN if amax else SCALES_OF_ONE]


ENGINE = SgLang("sglang")
