"""As vLLM 0.33.0 takes it: config/cache.py, engine/arg_utils.py, layers/quantization/kv_cache.py."""

import json
import os
import struct

from engine import SCALES_GIVEN, SCALES_OF_ONE, Engine, Option, Told, Words, neutral, preset_options, scale_values
from specs import NONE, encodes


def safetensors(tensors):
    """A file of float32 tensors of one number: the header's length, a header in JSON, the numbers."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(tensors)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(tensors)}f", *tensors.values())


class Vllm(Engine):
    kind = "skip"
    latents = True
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

    def options(self, table):
        options = [Option(NONE, word="auto"), *preset_options(table, "vllm-", r"--kv-cache-dtype (\S+)")]
        # Which layers TurboQuant leaves dense where some keep no tokens is not known here.
        return [option for option in options if not (table.gaps and option.word.startswith("turboquant_"))]

    def forced(self, option, layers):
        n = min(2, layers // 2) if option.word.startswith("turboquant_") else 0
        return {*range(n), *range(layers - n, layers)}

    def tell(self, option, assignment, frame, table):
        skipped = [layer for layer, pair in enumerate(assignment) if pair == NONE and option.pair != NONE and
                   layer not in self.forced(option, table.layers)]
        return Told(["--kv-cache-dtype", option.word] +
                    (["--kv-cache-dtype-skip-layers", *(str(table.place(layer)) for layer in skipped)] if skipped else []))

    def read(self, flags, files, table, environment=()):
        options = {option.word: option for option in self.options(table)}
        words = Words()
        words.add_argument("--kv-cache-dtype", choices=options, default="auto")
        words.add_argument("--kv-cache-dtype-skip-layers", nargs="+", default=[])
        said = words.parse_args(flags)
        option = options[said.kv_cache_dtype]
        skipped, forced = {*map(int, said.kv_cache_dtype_skip_layers)}, self.forced(option, table.layers)
        assignment = [NONE if layer in forced or table.place(layer) in skipped else option.pair for layer in range(table.layers)]
        return assignment, neutral(option.frame, encodes(assignment))

    def habits(self, option, assignment, table):
        said = []
        if option.word.startswith("fp8") and "token" not in option.word and not table.latent:
            said.append("FlashAttention 3 (Hopper) rounds queries and probabilities to fp8, too")
        if option.word == "int4_per_token_head":
            said.append("on CUDA the Hadamard transform is computed in 16 bits")
        return said

    def scales(self, option, assignment, table, amax, told):
        if option.word != "fp8":
            return []
        tensors = {}
        for layer, (keys, values) in enumerate(scale_values(assignment, amax)):
            if table.latent:
                keys = values = max(keys, values)
            for name, scale in (("k_scale", keys), ("v_scale", values)):
                tensors[f"model.layers.{table.place(layer)}.self_attn.{name}"] = scale
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
        said += ["latent and rotary key of a layer share a scale, the larger one"] * table.latent
        return said + [SCALES_GIVEN if amax else SCALES_OF_ONE]


ENGINE = Vllm("vllm")
