"""As mlx-lm 0.32.2 takes it: generate.py, models/cache.py."""

from dataclasses import replace

from engine import OWN_GROUP, Engine, Option, Told, Words, neutral, preset_options, python_literals
from specs import NONE, Frame, Refused, encodes


class Mlx(Engine):
    kind = "per_layer_equal_bits"
    gaps = False

    def options(self, table):
        return [*preset_options(table, "mlx-lm-", r"--kv-bits (\d+)"), Option(NONE)]

    def frame(self, asked, option, _assignment, _table):
        return replace(option.frame, group=asked.group if asked.group in (32, 128) else 0)

    def tell(self, option, assignment, frame, table):
        group, bits = frame.group or OWN_GROUP, {option.pair: int(option.word) for option in self.options(table) if option.word}
        if not any(encodes(assignment)):
            return Told()
        if len(set(assignment)) == 1:
            return Told(["--kv-bits", option.word, "--kv-group-size", str(group), "--quantized-kv-start", "0"])
        text = f'''"""A cache of mlx-lm 0.32.2, a layer at a time: generate(model, tokenizer, prompt, prompt_cache=kv_cache())."""
from mlx_lm.models.cache import KVCache, QuantizedKVCache

# Of each layer, the bits of keys and values; None: 16 bits.
KV_BITS = {[bits.get(pair) for pair in assignment]}
KV_GROUP_SIZE = {group}


def kv_cache():
    return [KVCache() if bits is None else QuantizedKVCache(group_size=KV_GROUP_SIZE, bits=bits) for bits in KV_BITS]
'''
        return Told(files={"mlx_cache.py": text},
                    snippet="from mlx_cache import kv_cache\ngenerate(model, tokenizer, prompt, prompt_cache=kv_cache())")

    def read(self, flags, files, table, environment=()):
        options = {option.word: option for option in self.options(table)}
        if "mlx_cache.py" in files:
            said = python_literals(files["mlx_cache.py"])
            layers, group = said["KV_BITS"], said["KV_GROUP_SIZE"]
        else:
            words = Words()
            words.add_argument("--kv-bits", type=int)
            words.add_argument("--kv-group-size", type=int, default=OWN_GROUP)
            words.add_argument("--quantized-kv-start", type=int, default=5000)
            said = words.parse_args(flags)
            if said.kv_bits is not None and said.quantized_kv_start != 0:
                raise Refused("a quantized start other than 0 is no spec")
            layers, group = [said.kv_bits] * table.layers, said.kv_group_size
        used = [options[str(bits) if bits else ""] for bits in layers]
        frame = next((option.frame for option in used if option.word), Frame())
        assignment = [option.pair for option in used]
        return assignment, neutral(replace(frame, group=0 if group == OWN_GROUP else group), encodes(assignment))

    def habits(self, option, assignment, table):
        if len(set(assignment)) == 1 and assignment[0] != NONE:
            return ["by flags the cache is encoded after each call, so that the prompt's first chunk (of 2048 tokens) reads the "
                    "originals"]
        return []


ENGINE = Mlx("mlx")
