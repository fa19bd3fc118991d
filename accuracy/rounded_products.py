#!/usr/bin/env python3
"""Why llama.cpp's perplexity tool sees more of a cache's error on a CPU than there is: a model in NumPy with its roundings.

usage: rounded_products.py MODEL_DIR TEXT_FILE [TOKENS [SCORED_FROM]]

llama.cpp's CPU kernels multiply quantized weights with activations rounded to 8 bits in groups of 32, and quantized keys
with queries rounded so, too; the cache that it compares with is one of float16. This computes a model of the llama family
in float32, with activations, queries, keys and values rounded or not (all rotated by 64 channels, as since April 2026),
and prints KLD (nats) and top-1 agreement of each with the float16 cache, by the same activations: over one window of
TOKENS (512), those from SCORED_FROM (128) on. Packages: accuracy/requirements.txt.
"""

import json
import os
import sys

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

F = np.float32
HADAMARD = np.array([[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)], F) / 8


def float16(x):
    return x.astype(np.float16).astype(F)


def whole(x):
    return x


def q8_0(x):
    groups = x.reshape(-1, 32)
    d = np.abs(groups).max(1, keepdims=True) / F(127)
    q = np.rint(np.divide(groups, d, out=np.zeros_like(groups), where=d != 0))
    return (q * float16(d)).reshape(x.shape)


def q4_0(x):
    groups = x.reshape(-1, 32)
    d = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1) / F(-8)
    q = np.minimum(15, np.floor(np.divide(groups, d, out=np.zeros_like(groups), where=d != 0) + F(8.5)))
    return ((q - 8) * float16(d)).reshape(x.shape)


def moved(x):
    """Values by one part in 100,000: a change that nothing should see."""
    return x * (1 + F(1e-5) * np.random.default_rng(3).standard_normal(x.shape).astype(F))


class Model:
    def __init__(self, folder):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        self.weights = load_file(os.path.join(folder, "model.safetensors"))

    def log_probabilities(self, ids, scored_from, activations, queries, keys, values):
        """Of the tokens after positions scored_from ..., each argument a rounding."""
        config, weights, n = self.config, self.weights, len(ids)
        heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        angles = np.arange(n)[:, None] * F(config["rope_theta"]) ** (-np.arange(0, dim // 2) / F(dim / 2))
        cosine, sine = np.cos(angles).astype(F), np.sin(angles).astype(F)
        mask = np.triu(np.full((n, n), -np.inf, F), 1)

        def product(x, name):
            return activations(np.ascontiguousarray(x)) @ weights[name + ".weight"].T

        def norm(x, name):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + F(config["rms_norm_eps"])) * weights[name + ".weight"]

        def rope(x):
            a, b = x[..., :dim // 2], x[..., dim // 2:]
            return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], -1)

        def rotated(x, rounding):
            x = x.reshape(-1, n, dim // 64, 64) @ HADAMARD
            return rounding(np.ascontiguousarray(x).reshape(-1, n, dim))

        x = weights["model.embed_tokens.weight"][ids]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            normed = norm(x, layer + "input_layernorm")
            q, k, v = (product(normed, f"{layer}self_attn.{side}_proj").reshape(n, -1, dim).transpose(1, 0, 2)
                       for side in "qkv")
            q, k, v = rotated(rope(q), queries), rotated(rope(k), keys), rotated(v, values)
            out = np.empty((heads, n, dim), F)
            for head in range(heads):
                scores = q[head] @ k[head * kv_heads // heads].T / F(np.sqrt(dim)) + mask
                weight = np.exp(scores - scores.max(1, keepdims=True))
                out[head] = weight @ v[head * kv_heads // heads] / weight.sum(1, keepdims=True)
            out = rotated(out, whole).transpose(1, 0, 2).reshape(n, -1)
            x = x + product(out, layer + "self_attn.o_proj")
            normed = norm(x, layer + "post_attention_layernorm")
            gate = product(normed, layer + "mlp.gate_proj")
            x = x + product(gate / (1 + np.exp(-gate)) * product(normed, layer + "mlp.up_proj"), layer + "mlp.down_proj")
        logits = activations(norm(x, "model.norm")[scored_from:]) @ weights["model.embed_tokens.weight"].T
        logits = logits.astype(np.float64) - logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def main(folder, text_file, tokens=512, scored_from=128):
    with open(text_file, encoding="utf-8") as file:
        text = file.read(20 * int(tokens))
    ids = Tokenizer.from_file(os.path.join(folder, "tokenizer.json")).encode(text).ids[:int(tokens) + 1]
    model, scored_from = Model(folder), int(scored_from)
    for words, activations in (("activations as they are", whole), ("activations of 8 bits", q8_0)):
        def run(queries, keys, values):
            return model.log_probabilities(np.array(ids[:-1]), scored_from, activations, queries, keys, values)
        reference = run(float16, float16, float16)
        nll = -reference[np.arange(len(reference)), ids[scored_from + 1:]].mean()
        print(f"{words}: perplexity {np.exp(nll):.3f}", flush=True)
        for name, rounding in (("values moved by 1e-5", (float16, float16, lambda x: moved(float16(x)))),
                               ("q8_0", (float16, q8_0, q8_0)), ("q8_0, queries of 8 bits", (q8_0, q8_0, q8_0)),
                               ("q8_0 + q4_0, queries of 8 bits", (q8_0, q8_0, q4_0)),
                               ("q4_0", (float16, q4_0, q4_0)), ("q4_0, queries of 8 bits", (q8_0, q4_0, q4_0))):
            other = run(*rounding)
            print(f"  {name}: KLD {(np.exp(reference) * (reference - other)).sum(1).mean():.5f}, "
                  f"top-1 {100 * (reference.argmax(1) == other.argmax(1)).mean():.1f} %", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        print(__doc__.strip())
        sys.exit(2)
    sys.exit(main(*sys.argv[1:]))
