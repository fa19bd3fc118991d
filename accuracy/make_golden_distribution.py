#!/usr/bin/env python3
"""Makes the golden file of the distribution measurement: what NumPy says of given numbers, and of the keys and
values that transformers computes with the tiny models of make_golden_models.py.

usage: make_golden_distribution.py [--check]

Writes accuracy/golden/distribution.json; with --check makes it anew and compares (golden_files.py). Packages:
accuracy/requirements.txt.
"""

import sys

import numpy as np
import torch
from transformers import DynamicCache

import golden_files
import make_golden_models

BINS, RANGE = 200, 6.0
# kvqbench's keys and values were seen up to 1.6e-6 standard deviations from transformers'. No number may lie so
# near to the edge of a bin that it could fall into another one there: each model gets ids, those of
# make_golden_models.py plus this, for which the nearest is further off.
NEAREST_EDGE = 1e-5
MODELS = {"llama-gqa3": 13, "mistral-window": 21, "qwen3-gqa4": 15, "gemma4-shared": 16, "gpt2": 16}


def statistics(x, nearest_edge=0.0):
    """The study's definitions in float64; x [batch, heads, tokens, head_dim]."""
    x = x.astype(np.float64)
    mean, std, size = x.mean(), x.std(ddof=1), np.abs(x)
    z = (x - mean) / std
    edges = np.concatenate([np.abs(z[..., None] - np.linspace(-RANGE, RANGE, BINS + 1)).min(-1).ravel(),
                            np.abs(size / std - 3).ravel(), np.abs(size / std - 6).ravel()])
    assert edges.min() >= nearest_edge, f"a number lies {edges.min():.1e} from an edge: take other ids"
    channel_var, token_var = x.var(axis=2, ddof=1).mean(), x.var(axis=3, ddof=1).mean()
    channel_max = size.max(axis=(0, 2)).ravel()
    numbers = [mean, std, x.min(), x.max(), (z**4).mean() - 3, (size > 3 * std).mean(), (size > 6 * std).mean(),
               size.max() / size.mean(), channel_var, token_var]
    return {"statistics": [float(number) for number in numbers],  # in the order of ExpectEqual (distribution_test.cc)
            "outlier_channels": int((channel_max > 6 * std).sum()),
            "channel_max": [float(value) for value in channel_max],
            "histogram": [int(n) for n in np.histogram(z, bins=BINS, range=(-RANGE, RANGE))[0]]}


def given_numbers():
    cases = []
    for seed, (kind, shape) in enumerate([("normal", (1, 2, 50, 16)), ("outliers", (2, 1, 33, 32)),
                                          ("constant", (1, 1, 40, 16)), ("tiny", (1, 3, 20, 8)),
                                          ("offset", (2, 2, 17, 16)), ("bfloat16", (1, 4, 30, 8))]):
        x = golden_files.numbers(int(np.prod(shape)), seed, kind).reshape(shape)
        cases.append({"kind": kind, "shape": list(shape), "seed": seed, **statistics(x)})
    return cases


def captured(name, plus):
    """Keys, keys before rotation and values of every layer of a tiny model's cache."""
    ids = [(i + plus) % make_golden_models.VOCAB for i in make_golden_models.IDS]
    config_class, model_class, extra = make_golden_models.CASES[name]
    model = make_golden_models.make(config_class, model_class, extra)
    plain = []  # what a layer rotates: its keys behind k_norm, or as they were projected

    def keep(module, inputs, output):
        plain.append(output)

    for module_name, module in model.named_modules():
        parent, _, last = module_name.rpartition(".")
        if last == "k_norm" or (last == "k_proj" and not hasattr(model.get_submodule(parent), "k_norm")):
            module.register_forward_hook(keep)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    layers = []
    for i, layer in enumerate(cache.layers):
        sides = {"k": layer.keys, "v": layer.values}
        if plain:  # [batch, tokens, heads * head_dim], or heads apart
            heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]
            sides["k_pre_rope"] = plain[i].reshape(1, -1, heads, head_dim).transpose(1, 2)
        layers.append({side: statistics(x.numpy(), NEAREST_EDGE) for side, x in sides.items()})
    return {"ids": ids, "layers": layers}


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    torch.set_num_threads(1)
    made = {"numbers": given_numbers(), "models": {name: captured(name, plus) for name, plus in MODELS.items()}}
    return golden_files.write_or_check({"distribution.json": made}, arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
