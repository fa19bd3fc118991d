"""For tests: the parity tests' tiny model of a family (accuracy/golden/models/), widened to what schemes encode (heads of 64
channels, latents of 128), with random weights and the tokenizer of the parity tests."""

import json
import os
import shutil
import struct

import numpy as np

GOLDEN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "accuracy", "golden")
VOCAB, HEAD, LATENT = 420, 64, 128  # the tokenizer's words; channels


def write_tensors(path, shapes, random):
    """Matrices of random numbers, vectors of ones, as safetensors."""
    header, data = {}, b""
    for name, shape in shapes.items():
        part = (random.normal(0, 0.3, shape) if len(shape) > 1 else np.ones(shape)).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def shapes_of(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def write(folder, case, context=1024):
    """Makes the folder."""
    shutil.copytree(os.path.join(GOLDEN, "tokenizer"), folder)
    with open(os.path.join(GOLDEN, "models", case, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    shapes = shapes_of(os.path.join(GOLDEN, "models", case, "model.safetensors"))
    words, heads = config["vocab_size"], config["num_attention_heads"]
    latent, turned = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    wider = HEAD // (config.get("head_dim") or config["hidden_size"] // heads)
    for name, shape in shapes.items():
        part = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
        if shape[0] == words:
            shape[0] = VOCAB
        elif latent and "self_attn" in name:
            if part == "kv_a_layernorm":
                shape[0] = LATENT
            elif part == "kv_a_proj_with_mqa":
                shape[0] = LATENT + HEAD
            elif part == "kv_b_proj":
                shape[1] = LATENT
            elif part in ("q_proj", "q_b_proj"):
                shape[0] += heads * (HEAD - turned)
        elif part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            shape[0] *= wider
        elif part == "o_proj" and len(shape) > 1:
            shape[1] *= wider
    config |= {"vocab_size": VOCAB, "max_position_embeddings": context}
    if latent:
        config |= {"kv_lora_rank": LATENT, "qk_rope_head_dim": HEAD}
    if not latent or "head_dim" in config:  # of latents what turns
        config["head_dim"] = HEAD
    write_tensors(os.path.join(folder, "model.safetensors"), shapes, np.random.default_rng(1))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
