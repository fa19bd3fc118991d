"""As KVTuner babe775 takes it: flexible_quantized_cache.py."""

import itertools
import re

import yaml

from engine import OWN_GROUP, Engine, Option, Told, python_literals
from engines.transformers import Transformers
from specs import Frame


class KvTuner(Engine):
    """Its cache for HQQ (FlexibleHQQQuantizedCache), which encodes as transformers' does, with bits for keys and values."""
    kind = "per_layer"
    gaps = False
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

Q_GROUP_SIZE = {frame.group or OWN_GROUP}
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
        return assignment, Frame((residual, residual), policy="hf", prefill="raw", group=0 if group == OWN_GROUP else group)

    def habits(self, option, assignment, table):
        return ["the YAML says bits alone: how they are used stands in kvtuner_cache.py, for KVTuner's HQQ cache; its own "
                "searches are of its vanilla cache, which groups otherwise",
                "KVTuner imports CacheConfig from transformers, which 5.5.4 no longer has"]


ENGINE = KvTuner("kvtuner")
