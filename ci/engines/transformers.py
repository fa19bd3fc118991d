"""As transformers 5.5.4 takes it: cache_utils.py."""

import json
import re
from dataclasses import replace

from engine import OWN_GROUP, Engine, Option, Told, neutral, python_literals
from specs import NONE, Frame, encodes, refuse


class Transformers(Engine):
    kind = "per_layer_equal_bits"
    gaps = False
    name_of = re.compile(r"int(\d)-(hqq|quanto)(-kivi)?$")

    def options(self, table):
        return [*(Option((scheme, scheme), Frame(policy="hf", prefill="raw")) for scheme in sorted(table.schemes)
                  if self.name_of.match(scheme) and table.fits((scheme, scheme))), Option(NONE)]

    def frame(self, asked, option, assignment, table):
        has = Frame(policy="hf", prefill="raw", group=asked.group if asked.group in (32, 128) else 0)
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
        return found[0] if found else refuse(f"no scheme groups as {backend} does with axis_key={axis_key}, "
                                              f"axis_value={axis_value}")

    def tell(self, option, assignment, frame, table):
        group, residual = frame.group or OWN_GROUP, frame.residual[0]
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
            config = {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": OWN_GROUP,
                      "residual_length": 128} | said["cache_config"]
            layers = [(config["backend"], config["nbits"], config["axis_key"], config["axis_value"])] * table.layers
            group, residual = config["q_group_size"], config["residual_length"]
        else:
            said = python_literals(files["transformers_cache.py"])
            layers, group, residual = said["LAYERS"], said["Q_GROUP_SIZE"], said["RESIDUAL_LENGTH"]
        assignment = [NONE if layer is None else (self.scheme(*layer),) * 2 for layer in layers]
        frame = Frame((residual, residual), policy="hf", prefill="raw", group=0 if group == OWN_GROUP else group)
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


ENGINE = Transformers("transformers")
