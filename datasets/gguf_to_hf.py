#!/usr/bin/env python3
"""Converts a GGUF file of the llama architecture to a Hugging Face model directory.

usage: gguf_to_hf.py FILE.gguf OUT_DIR

Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Weights of every type
that the `gguf` package dequantizes become float32: a quantized weight is scale * code + minimum and has
in general no exact value in 16 bits. One tensor is in memory at a time. OUT_DIR appears only when all of
it is there. Bad input: one line on stderr, exit code 2.
"""

import json
import os
import shutil
import struct
import sys

try:
    import gguf
    import numpy as np
except ImportError as error:
    sys.exit(f"gguf_to_hf.py: {error}; datasets/fetch installs what this needs")


class InputError(Exception):
    """Something the user can mend."""


# GGUF name -> Hugging Face name, for `blk.N.` (model.layers.N.) and for the rest.
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# tokenizer.ggml.pre -> pre_tokenizer of tokenizer.json.
PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**BYTE_LEVEL, "use_regex": True},
        ],
    },
    "gpt-2": {**BYTE_LEVEL, "use_regex": True},
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type


class Metadata:
    """Fields of a GGUF file by name."""

    def __init__(self, reader):
        self.fields = reader.fields

    def get(self, key, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key):
        if key not in self.fields:
            raise InputError(f"metadata field {key} is missing")
        return self.fields[key].contents()


def make_config(meta, tensor_names):
    architecture = meta.need("general.architecture")
    if architecture != "llama":
        raise InputError(f"architecture '{architecture}' is not supported; supported: llama")
    if meta.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensor_names:
        raise InputError("rope scaling is not supported")
    heads = meta.need("llama.attention.head_count")
    hidden = meta.need("llama.embedding_length")
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise InputError("rotary positions on a part of head_dim are not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": meta.need("llama.block_count"),
        "hidden_size": hidden,
        "intermediate_size": meta.need("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(meta.need("tokenizer.ggml.tokens")),
        "max_position_embeddings": meta.need("llama.context_length"),
        # float32 in the file: 1e-5 is meant, not 9.999999747378752e-06.
        "rms_norm_eps": float(f"{meta.need('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def make_tokenizer(meta):
    model = meta.need("tokenizer.ggml.model")
    if model != "gpt2":
        raise InputError(f"tokenizer model '{model}' is not supported; supported: gpt2 (byte-level BPE)")
    pre = meta.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise InputError(f"pre-tokenizer '{pre}' is not supported; supported: "
                         + ", ".join(sorted(PRE_TOKENIZERS)))
    tokens = meta.need("tokenizer.ggml.tokens")
    types = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError("tokenizer.ggml.tokens: duplicates, or not as many as token types")
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": types[i] in (CONTROL, UNKNOWN)}
        for i, token in enumerate(tokens) if types[i] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in meta.need("tokenizer.ggml.merges")],
        },
    }
    def token_of(key):
        i = meta.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and not 0 <= i < len(tokens):
            raise InputError(f"tokenizer.ggml.{key}_token_id {i} is not a token")
        return None if i is None else tokens[i]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": token_of("bos"), "eos_token": token_of("eos"),
        "model_max_length": meta.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    if meta.get("tokenizer.chat_template"):
        config["chat_template"] = meta.get("tokenizer.chat_template")
    return tokenizer, config


def hugging_face_name(name):
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in LAYER_TENSORS:
        return f"model.layers.{int(parts[1])}.{LAYER_TENSORS[parts[2]]}"
    raise InputError(f"tensor {name} belongs to no layer of this architecture")


def expected_shapes(config):
    """Every tensor the configuration asks for and its shape, so that a lying file is found out early."""
    h, f = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes


def check_layout(reader, size):
    """Tensor data lies in the file and does not overlap."""
    end = 0
    for tensor in sorted(reader.tensors, key=lambda t: t.data_offset):
        begin = int(tensor.data_offset)
        if begin < end:
            raise InputError(f"tensor {tensor.name} overlaps another one")
        end = begin + int(tensor.n_bytes)
        if end > size:
            raise InputError(f"tensor {tensor.name} ends at byte {end}, the file has {size}")


def dequantize(tensor, heads):
    """float32 values in Hugging Face's order; `heads` of rotary Q and K rows, 0 for the others."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
    values = values.reshape([int(n) for n in reversed(tensor.shape)])
    if heads:
        # llama.cpp stores rotated pairs side by side; the half-split form wants them half a head apart.
        rows, columns = values.shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)
        values = values.reshape(rows, columns)
    return np.ascontiguousarray(values)


def write_safetensors(path, reader, config):
    expected = expected_shapes(config)
    entries = []
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if expected.pop(name, None) != shape:
            raise InputError(f"tensor {tensor.name} has shape {list(shape)}, "
                             "which is not what the metadata asks for")
        entries.append((name, shape, tensor))
    if expected:
        raise InputError(f"tensor for {min(expected)} is missing")
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in entries:
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, _, tensor in entries:
            heads = (config["num_attention_heads"] if "q_proj" in name
                     else config["num_key_value_heads"] if "k_proj" in name else 0)
            out.write(dequantize(tensor, heads).data)


def convert(source, target):
    if os.path.exists(target):
        raise InputError(f"{target} exists already; remove it first")
    try:
        size = os.path.getsize(source)
        reader = gguf.GGUFReader(source)
        meta = Metadata(reader)
        config = make_config(meta, {tensor.name for tensor in reader.tensors})
        check_layout(reader, size)
        tokenizer, tokenizer_config = make_tokenizer(meta)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error
    except Exception as error:  # the reader trusts the file: a broken one fails anywhere in it
        raise InputError(f"is not a sound GGUF file ({type(error).__name__}: {error})") from error
    part = f"{target}.part.{os.getpid()}"
    os.makedirs(part)
    try:
        for name, content in (("config.json", config), ("tokenizer.json", tokenizer),
                              ("tokenizer_config.json", tokenizer_config)):
            with open(os.path.join(part, name), "w", encoding="utf-8") as out:
                json.dump(content, out, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
                out.write("\n")
        write_safetensors(os.path.join(part, "model.safetensors"), reader, config)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    try:
        convert(sys.argv[1], sys.argv[2].rstrip("/"))
    except InputError as error:
        print(f"gguf_to_hf.py: {sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gguf_to_hf.py: {error.filename or sys.argv[2]}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
