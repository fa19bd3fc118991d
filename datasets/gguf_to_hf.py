#!/usr/bin/python3
"""Converts a GGUF file to a Hugging Face model directory.

usage: gguf_to_hf.py FILE.gguf OUT_DIR

Reads the architectures llama (what is called so: Llama, Mistral, SmolLM, Yi, ...), qwen2, qwen3 and gemma3, with
byte-level BPE (of the pre-tokenizers PRE_TOKENIZERS below) or SentencePiece's, in one file or split
(give NAME-00001-of-0000N.gguf). Whatever the file asks for beyond that is refused by name.

Writes config.json, model.safetensors, tokenizer_config.json, and tokenizer.json or tokenizer.model. Weights of 16 bits
stay as they are; those of every other type that the `gguf` package dequantizes become float32: a quantized
weight is scale * code + minimum and has in general no exact value in 16 bits. One tensor is in memory at a time. OUT_DIR
appears only when all of it is there. Bad input: one line on stderr, exit code 2; 3 where a Python package is missing.

What a GGUF file does not say is lost: a sliding window of Mistral 7B v0.1, and whether a text is brought into
Unicode's normalization form C (qwen2's is, as transformers does it).
"""

import json
import os
import re
import shutil
import struct
import sys

# Where this Python has no gguf of its own: the wheel that datasets/fetch brings.
CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
sys.path.append(os.path.join(CACHE, "downloads", "gguf-0.19.0-py3-none-any.whl"))

try:
    import gguf
    import numpy as np
except ImportError as error:
    print(f"gguf_to_hf.py: {error}; reading GGUF files needs the Python packages gguf and numpy: ci/setup brings them, "
          "or pip install gguf", file=sys.stderr)
    sys.exit(3)

np.seterr(all="ignore")  # broken blocks have numbers that are none


class InputError(Exception):
    """Something the user can mend."""


# ---- tensors. GGUF name -> Hugging Face name, both without .weight or .bias: of a layer (blk.N. -> model.layers.N.),
# and of the rest.
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = {**ATTENTION, **MLP, "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA3_FREQUENCIES = "rope_freqs.weight"

# ---- metadata of the architecture, behind its name and a dot: what is read, and what changes no number.
KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "vocab_size",
}
GEMMA_KEYS = {
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping",
}
MEANINGLESS_KEYS = {"rope.scaling.finetuned", "tensor_data_layout", "mm.tokens_per_image"}
MEANINGLESS_VALUES = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0}


class Family:
    """What one general.architecture is."""

    def __init__(self, model_type, model_class, layer=LAYER, keys=KEYS, flags=(), biases=(), norm_offset=0, permuted=False):
        self.model_type, self.model_class = model_type, model_class  # of config.json
        self.layer, self.keys = layer, keys
        self.flags = flags  # (key of config.json, the modules that all have a bias where it is true)
        self.biases = biases  # the modules that always have one
        self.norm_offset = norm_offset  # that llama.cpp has added to every norm weight
        self.permuted = permuted  # rows of Q and K: the two of a rotated pair side by side


ATTENTION_BIAS, MLP_BIAS = ("attention_bias", ATTENTION), ("mlp_bias", MLP)
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", flags=(ATTENTION_BIAS, MLP_BIAS), permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**LAYER, **HEAD_NORMS}, flags=(ATTENTION_BIAS,)),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**LAYER, **HEAD_NORMS, **GEMMA_NORMS}, KEYS | GEMMA_KEYS,
                     flags=(ATTENTION_BIAS,), norm_offset=1),
}

# ---- tokenizers
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT2_WORDS = {**BYTE_LEVEL, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}


def sequence(*stages):
    return {"type": "Sequence", "pretokenizers": list(stages)}


def split(*patterns, behind=()):
    """Each pattern's matches apart, then bytes as letters; `behind`: stages between."""
    return sequence(*({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                      for pattern in patterns), *behind, {**BYTE_LEVEL, "use_regex": False})


def gpt4(digits):
    """GPT-4's pattern, with how many digits stay together."""
    return (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = (WORD + UPPER + "*" + LOWER + "+|" + WORD + UPPER + "+" + LOWER
          + r"*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = {"pre_tokenizer": GPT2_WORDS}
DIGITS_APART = {"pre_tokenizer": sequence(DIGITS, GPT2_WORDS)}
LLAMA3 = {"pre_tokenizer": split(gpt4("{1,3}")), "ignore_merges": True, "add_bos": True}
QWEN2 = {"pre_tokenizer": split(gpt4("")), "normalizer": NFC}
# tokenizer.ggml.pre -> what tokenizer.json says, as the files of its models do; and whether a text begins
# with BOS where the file does not say.
PRE_TOKENIZERS = {
    "gpt-2": GPT2, "smollm": DIGITS_APART, "starcoder": DIGITS_APART, "refact": DIGITS_APART,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2,
    "deepseek-coder": {"pre_tokenizer": split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                                              "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", behind=[DIGITS])},
    "tekken": {"pre_tokenizer": split(TEKKEN), "ignore_merges": True, "add_bos": True},
}
SPACE = "\u2581"  # of SentencePiece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type


def unsound(error):
    return InputError(f"is not a sound GGUF file, or truncated ({type(error).__name__}: {error})")


def listed(names):
    return ", ".join(sorted(names))


# ---- reading

class Reader(gguf.GGUFReader):
    """The package's, which beyond a file's end reads nothing and goes on, for as many numbers as an array says it has."""

    def _get(self, offset, dtype, count=1, *order, **override_order):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise EOFError(f"bytes {offset} to {end} are asked for, the file has {len(self.data)}")
        return super()._get(offset, dtype, count, *order, **override_order)


class Model:
    """A GGUF file, or all parts of a split one: its metadata by key, its tensors."""

    def __init__(self, path):
        first = self.read(path)
        self.fields, self.tensors = first.fields, list(first.tensors)
        parts = self.get("split.count", 1)
        name = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path, re.DOTALL)
        if parts > 1:
            if not name or int(name[3]) != parts:
                raise InputError(f"is one of {parts} parts, which must be named NAME-00001-of-{parts:05}.gguf")
            if self.get("split.no") != 0 or int(name[2]) != 1:
                raise InputError(f"is not the first of {parts} parts; give {name[1]}00001-of-{name[3]}.gguf")
            for i in range(2, parts + 1):
                part = f"{name[1]}{i:05}-of-{name[3]}.gguf"
                try:
                    self.tensors += self.read(part).tensors
                except InputError as error:
                    raise InputError(f"its part {part}: {error}") from error
            if len(self.tensors) != self.need("split.tensors.count"):
                raise InputError(f"its parts have {len(self.tensors)} tensors, "
                                 f"split.tensors.count says {self.need('split.tensors.count')}")
        self.names = {tensor.name for tensor in self.tensors}
        if len(self.names) != len(self.tensors):
            raise InputError("its parts have a tensor of the same name")
        architecture = self.need("general.architecture")
        if architecture not in FAMILIES:
            raise InputError(f"architecture '{architecture}' is not supported; supported: {listed(FAMILIES)}")
        self.architecture, self.family = architecture, FAMILIES[architecture]

    @staticmethod
    def read(path):
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise InputError("is no GGUF file: it does not begin with GGUF")
            reader = Reader(path)
            if reader.endianess != gguf.GGUFEndian.LITTLE:
                raise InputError("is big-endian; python3 -m gguf.scripts.gguf_convert_endian FILE little turns it")
            check_layout(reader, size)
            return reader
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error
        except Exception as error:  # the reader trusts the file: a broken one fails anywhere in it
            raise unsound(error) from error

    def get(self, key, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key):
        if key not in self.fields:
            raise InputError(f"metadata field {key} is missing")
        return self.fields[key].contents()

    def key(self, key):
        return f"{self.architecture}.{key}"

    def number(self, key, default=None):
        """A number of the architecture. A list, one a layer, must be of equal ones."""
        value = self.get(self.key(key), default) if default is not None else self.need(self.key(key))
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise InputError(f"metadata field {self.key(key)} differs from layer to layer, which is not supported")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise InputError(f"metadata field {self.key(key)} is {value!r}, it must be a positive number")
        return value

    def whole(self, key, default=None):
        return int(self.number(key, default))

    def real(self, key, default=None):
        """float32 in the file: 1e-5 is meant, not 9.999999747378752e-06."""
        return float(f"{self.number(key, default):.7g}")

    def check_keys(self):
        """Nothing that a model asks for is left out silently."""
        for key in self.fields:
            if not key.startswith(self.architecture + "."):
                continue
            short = key[len(self.architecture) + 1:]
            if short in self.family.keys or short in MEANINGLESS_KEYS:
                continue
            if short not in MEANINGLESS_VALUES or self.get(key) != MEANINGLESS_VALUES[short]:
                raise InputError(f"metadata field {key} ({str(self.get(key))[:40]}) is not supported")


def check_layout(reader, size):
    """Tensor data lies in the file, behind its header, and does not overlap, and can be turned into numbers."""
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda t: t.data_offset):
        begin = int(tensor.data_offset)
        if begin < end:
            raise InputError(f"tensor {tensor.name} overlaps another one, or the header")
        end = begin + int(tensor.n_bytes)
        if end > size:
            raise InputError(f"tensor {tensor.name} ends at byte {end}, the file has {size}")
        try:
            gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], np.uint8), tensor.tensor_type)
        except NotImplementedError:
            raise InputError(f"tensor {tensor.name} has type {tensor.tensor_type.name}, which the gguf package does not "
                             "dequantize") from None


# ---- config.json

def make_config(model):
    model.check_keys()
    heads, hidden = model.whole("attention.head_count"), model.whole("embedding_length")
    head_dim = model.whole("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if model.whole(key, head_dim) != head_dim:
            raise InputError(f"metadata field {model.key(key)} is {model.whole(key)}, supported is only the head's "
                             f"length, {head_dim}")
    layers = model.whole("block_count")
    if layers > len(model.tensors):
        raise InputError(f"metadata field {model.key('block_count')} is {layers}, the file has {len(model.tensors)} tensors in all")
    tokens = model.need("tokenizer.ggml.tokens")
    config = {
        "architectures": [model.family.model_class],
        "model_type": model.family.model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": model.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(tokens),
        "max_position_embeddings": model.whole("context_length"),
        "rms_norm_eps": model.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": model.real("rope.freq_base", 10000.0),
        "hidden_act": "silu",
    }
    scaling = rope_scaling(model, config)
    if scaling:
        config["rope_scaling"] = scaling
    if model.architecture == "gemma3":
        add_gemma3(model, config)
    for flag, modules in model.family.flags:
        config[flag] = any(f"blk.0.{module}.bias" in model.names for module in modules)
    config.update({
        "tie_word_embeddings": "output.weight" not in model.names,
        "bos_token_id": model.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": model.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    })
    return config


def rope_scaling(model, config):
    kind = model.get(model.key("rope.scaling.type"), "none")
    if LLAMA3_FREQUENCIES in model.names:
        return llama3_scaling(model, config, kind)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"rope scaling '{kind}' is not supported; supported: linear, yarn, Llama 3's")
    scaling = {"rope_type": kind, "factor": model.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = model.whole("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            if model.key(f"rope.scaling.yarn_{key}") in model.fields:
                scaling[key] = model.real(f"rope.scaling.yarn_{key}")
    return scaling


def llama3_scaling(model, config, kind):
    """Llama 3's scaling from the divisors of its frequencies.

    Long waves are divided by `factor`, short ones by one, those between by 1 / ((1 - s) / factor + s), where s goes from
    0 at a wave of original / low positions to 1 at one of original / high. Only original : low : high shows in
    them; low and high are 1 and 4 in all that was published.
    """
    tensor = next(t for t in model.tensors if t.name == LLAMA3_FREQUENCIES)
    divisors = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)
    pairs = config["head_dim"] // 2
    if divisors.shape != (pairs,):
        raise InputError(f"tensor {LLAMA3_FREQUENCIES} has {divisors.size} numbers, the heads ask for {pairs}")
    factor = float(f"{divisors.max(initial=0):.6g}")
    waves = 2 * np.pi * config["rope_theta"] ** (np.arange(pairs) / pairs)
    low, high, original = 1.0, 4.0, 8192.0
    if kind == "none" and factor == 1 and divisors.min() == 1:
        return None
    between = (divisors > 1.0001) & (divisors < factor * 0.9999)
    if between.any():
        share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        original = float(np.round(np.median(waves[between] * (low + share * (high - low)))))
    share = np.clip((original / waves - low) / (high - low), 0, 1)
    if kind != "none" or not np.allclose(divisors, 1 / ((1 - share) / factor + share), rtol=1e-4):
        raise InputError(f"tensor {LLAMA3_FREQUENCIES} is not Llama 3's rope scaling, no other is supported")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": int(original)}


def add_gemma3(model, config):
    layers = config["num_hidden_layers"]
    slides = [False] * layers
    if model.key("attention.sliding_window") in model.fields:
        config["sliding_window"] = model.whole("attention.sliding_window")
        period = model.get(model.key("attention.sliding_window_pattern"), 6)
        slides = period if isinstance(period, list) else [(i + 1) % period != 0 for i in range(layers)]
        if len(slides) != layers:
            raise InputError(f"metadata field {model.key('attention.sliding_window_pattern')} has {len(slides)} layers, "
                             f"{layers} there are")
    del config["hidden_act"]
    config.update({
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_local_base_freq": model.real("rope.freq_base_swa", 10000.0),
        # Not in the file; llama.cpp, too, tells the 27B model by its layers.
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if layers == 62
                                 else config["head_dim"],
    })
    if model.key("final_logit_softcapping") in model.fields:
        config["final_logit_softcapping"] = model.real("final_logit_softcapping")


# ---- tokenizer

class Vocabulary:
    """Tokens and their types, and the special ones among them."""

    def __init__(self, model, defaults):
        self.tokens = model.need("tokenizer.ggml.tokens")
        self.types = list(model.get("tokenizer.ggml.token_type", [NORMAL] * len(self.tokens)))
        if len(self.types) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise InputError("tokenizer.ggml.tokens: duplicates, or not as many as token types")
        self.special = {}
        for name in ("bos", "eos", "unknown"):
            key = f"tokenizer.ggml.{name}_token_id"
            i = model.get(key, defaults.get(name))
            if i is None:
                continue
            if not 0 <= i < len(self.tokens):
                raise InputError(f"{key} {i} is not a token")
            # An id of config.json may be a word's: that one is not looked for in texts as if it were special.
            if name == "unknown" or self.types[i] in (CONTROL, UNKNOWN, USER_DEFINED):
                self.special[name] = self.tokens[i]

    def adds(self, model, name, default):
        added = bool(model.get(f"tokenizer.ggml.add_{name}_token", default))
        if added and name not in self.special:
            raise InputError(f"tokenizer.ggml.{name}_token_id is no special token, but is to stand at an end of every text")
        return added


def make_tokenizer(model):
    """{file name: content}: a JSON value, or bytes."""
    kind = model.need("tokenizer.ggml.model")
    if kind == "gpt2":
        files, config = byte_level_bpe(model)
    elif kind == "llama":
        files, config = sentencepiece(model)
    else:
        raise InputError(f"tokenizer model '{kind}' is not supported; supported: gpt2 (byte-level BPE) and llama "
                         "(SentencePiece)")
    config["model_max_length"] = model.whole("context_length")
    config["clean_up_tokenization_spaces"] = False
    if model.get("tokenizer.chat_template"):
        config["chat_template"] = model.get("tokenizer.chat_template")
    return {**files, "tokenizer_config.json": config}


def byte_level_bpe(model):
    pre = model.need("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise InputError(f"pre-tokenizer '{pre}' is not supported; supported: {listed(PRE_TOKENIZERS)}")
    stages = PRE_TOKENIZERS[pre]
    vocabulary = Vocabulary(model, {})
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    ends = {name: vocabulary.special[name] for name, default in (("bos", stages.get("add_bos", False)), ("eos", False))
            if vocabulary.adds(model, name, default)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": stages.get("normalizer"), "pre_tokenizer": stages["pre_tokenizer"],
        "post_processor": template(vocabulary.tokens, ends) if ends else None,
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": stages.get("ignore_merges", False),
            # What fills the embedding up is no token.
            "vocab": {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] != UNUSED},
            "merges": [merge.split(" ", 1) for merge in model.need("tokenizer.ggml.merges")],
        },
    }
    return {"tokenizer.json": tokenizer}, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": "bos" in ends,
        "bos_token": vocabulary.special.get("bos"), "eos_token": vocabulary.special.get("eos"),
    }


def template(tokens, ends):
    """A post-processor that puts BOS before a text and EOS behind it."""
    def special(name):
        return [{"SpecialToken": {"id": ends[name], "type_id": 0}}] if name in ends else []
    def text(name, kind):
        return {"Sequence": {"id": name, "type_id": kind}}
    return {
        "type": "TemplateProcessing",
        "single": [*special("bos"), text("A", 0), *special("eos")],
        "pair": [*special("bos"), text("A", 0), *special("eos"), *special("bos"), text("B", 1), *special("eos")],
        "special_tokens": {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
                           for token in ends.values()},
    }


def field(number, value):
    """A field of a protocol buffer: bytes, a float, or a whole number."""
    def varint(n):
        data = bytearray()
        while n >= 0x80:
            data.append(n & 0x7F | 0x80)
            n >>= 7
        return bytes(data) + bytes([n])
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece(model):
    """tokenizer.model: GGUF has its pieces, scores and types as they were."""
    types = model.get("tokenizer.ggml.token_type", [])
    vocabulary = Vocabulary(model, {"bos": 1, "eos": 2, "unknown": types.index(UNKNOWN) if UNKNOWN in types else 0})
    tokens, types, unknown = vocabulary.tokens, vocabulary.types, vocabulary.special["unknown"]
    scores = model.need("tokenizer.ggml.scores")
    count = len(tokens)
    while count and types[count - 1] == UNUSED:  # fills the embedding up
        count -= 1
    if len(scores) != len(tokens):
        raise InputError(f"tokenizer.ggml.scores has {len(scores)} scores, there are {len(tokens)} tokens")
    if UNUSED in types[:count]:
        raise InputError(f"token '{tokens[types.index(UNUSED)]}' is unused and not at the end, which is not supported")
    normal = {score for score, kind in zip(scores, types) if kind == NORMAL}
    if len(normal) < 2:
        raise InputError("tokenizer.ggml.scores are all equal: the converter that made the file has lost which "
                         "pieces merge first")
    pieces = []
    for token, score, kind in zip(tokens[:count], scores, types):
        if kind == USER_DEFINED and not token.strip(" "):
            token = token.replace(" ", SPACE)  # llama.cpp's converter turned it round
        if token == unknown or kind == UNKNOWN:  # there is one
            kind = UNKNOWN if token == unknown else CONTROL
        pieces.append(field(1, field(1, token.encode()) + field(2, float(score)) + field(3, kind)))
    prefix = bool(model.get("tokenizer.ggml.add_space_prefix", True))
    trainer = (field(3, 2)  # BPE
               + field(35, int(BYTE in types))
               + b"".join(field(number, vocabulary.special[name].encode())
                          for number, name in ((45, "unknown"), (46, "bos"), (47, "eos")) if name in vocabulary.special))
    normalizer = field(3, int(prefix)) + field(4, 0) + field(5, 1)  # spaces stay, as SPACE
    return {"tokenizer.model": b"".join(pieces) + field(2, trainer) + field(3, normalizer)}, {
        "tokenizer_class": "GemmaTokenizer" if model.architecture == "gemma3" else "LlamaTokenizer",
        "add_bos_token": vocabulary.adds(model, "bos", True), "add_eos_token": vocabulary.adds(model, "eos", False),
        "bos_token": vocabulary.special.get("bos"), "eos_token": vocabulary.special.get("eos"),
        "unk_token": unknown,
        "add_prefix_space": prefix, "legacy": True,
    }


# ---- model.safetensors

def expected_tensors(family, config):
    """{GGUF name: (Hugging Face name, shape)} of all that the configuration asks for."""
    h, f = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, q), "ffn_gate": (f, h),
              "ffn_up": (f, h), "ffn_down": (h, f), "attn_q_norm": (config["head_dim"],),
              "attn_k_norm": (config["head_dim"],), "token_embd": (config["vocab_size"], h),
              "output": (config["vocab_size"], h)}  # the other norms: (h,)
    biases = {*family.biases, *(module for flag, modules in family.flags if config[flag] for module in modules)}
    tensors = {f"{module}.weight": (f"{name}.weight", shapes.get(module, (h,))) for module, name in TOP.items()
               if module != "output" or not config["tie_word_embeddings"]}
    for i in range(config["num_hidden_layers"]):
        for module, name in family.layer.items():
            shape, prefix = shapes.get(module, (h,)), f"model.layers.{i}.{name}"
            tensors[f"blk.{i}.{module}.weight"] = (f"{prefix}.weight", shape)
            if module in biases:
                tensors[f"blk.{i}.{module}.bias"] = (f"{prefix}.bias", shape[:1])
    return tensors


def stored_type(tensor, offset):
    """Its type in model.safetensors, and the bytes of one element there."""
    kinds = gguf.GGMLQuantizationType
    return {kinds.F16: ("F16", 2), kinds.BF16: ("BF16", 2)}.get(None if offset else tensor.tensor_type, ("F32", 4))


def values_of(tensor, shape, heads, offset):
    """The values as they are stored, in Hugging Face's order; `heads` of rotated Q and K rows, 0 for the others."""
    if stored_type(tensor, offset)[0] == "F32":
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
        values = values - np.float32(offset) if offset else values
    else:
        values = tensor.data.view("<u2")
    if heads:
        # llama.cpp stores rotated pairs side by side; the half-split form wants them half a head apart.
        values = values.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(values.reshape(shape))


def write_safetensors(path, model, config):
    expected = expected_tensors(model.family, config)
    entries, header, end = [], {"__metadata__": {"format": "pt"}}, 0
    for tensor in model.tensors:
        if tensor.name == LLAMA3_FREQUENCIES:
            continue
        if tensor.name not in expected:
            raise InputError(f"tensor {tensor.name} belongs to no layer of this architecture")
        name, shape = expected.pop(tensor.name)
        if tuple(int(n) for n in reversed(tensor.shape)) != shape:
            raise InputError(f"tensor {tensor.name} has shape {[int(n) for n in reversed(tensor.shape)]}, "
                             f"the metadata asks for {list(shape)}")
        offset = model.family.norm_offset if "norm" in tensor.name else 0
        dtype, size = stored_type(tensor, offset)
        begin, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        entries.append((tensor, shape, offset))
    if expected:
        raise InputError(f"tensor {min(expected)} is missing")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    permuted = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"} if model.family.permuted else {}
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor, shape, offset in entries:
            heads = permuted.get(tensor.name.split(".")[-2])
            out.write(values_of(tensor, shape, config[heads] if heads else 0, offset).data)


def convert(source, target):
    if os.path.exists(target):
        raise InputError(f"{target} exists already; remove it first")
    try:
        model = Model(source)
        config = make_config(model)
        files = {"config.json": config, **make_tokenizer(model)}
    except (InputError, OSError):
        raise
    except Exception as error:  # metadata of other types than they should have
        raise unsound(error) from error
    part = f"{target}.part.{os.getpid()}"
    os.makedirs(part)
    try:
        for name, content in files.items():
            if not isinstance(content, bytes):
                content = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
                content = (content + "\n").encode()
            with open(os.path.join(part, name), "wb") as out:
                out.write(content)
        write_safetensors(os.path.join(part, "model.safetensors"), model, config)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    try:
        convert(sys.argv[1], sys.argv[2].rstrip("/"))
        return 0
    except InputError as error:
        reason = " ".join(str(error).split())
    except OSError as error:
        reason = f"{error.filename or sys.argv[2]}: {error.strerror}"
    except MemoryError:
        reason = "memory does not hold its largest tensor"
    print(f"gguf_to_hf.py: {sys.argv[1]}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
