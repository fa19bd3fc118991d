#!/usr/bin/env python3
"""Makes the golden files of the architectures: tiny random models by transformers, and what they compute.

usage: make_golden_models.py [--check]

Writes accuracy/golden/models/<case>/{config.json,model.safetensors} and accuracy/golden/models.json; with
--check makes them anew and compares (golden_files.py). Packages: accuracy/requirements.txt.
"""

import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import (DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig,
                          GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import golden_files
from golden_files import short

VOCAB, TOKENS, GREEDY = 61, 40, 64
IDS = [(i * i * 7 + 3 * i + 5) % VOCAB for i in range(TOKENS)]
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)


def rope(**extra):
    return dict(rope_parameters=dict(rope_theta=1000.0, **extra))


LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
GEMMA3, GEMMA4 = (Gemma3TextConfig, Gemma3ForCausalLM), (Gemma4TextConfig, Gemma4ForCausalLM)
GPT2 = (GPT2Config, GPT2LMHeadModel)
SLIDING, FULL = "sliding_attention", "full_attention"

CASES = {
    "llama-gqa3": (*LLAMA, dict(SIZES, hidden_size=36, num_attention_heads=9, num_key_value_heads=3,
                                tie_word_embeddings=True, **rope())),
    "llama-mha": (*LLAMA, dict(SIZES, num_attention_heads=4, num_key_value_heads=4, vocab_size=420, **rope())),
    "llama-gqa7": (*LLAMA, dict(SIZES, hidden_size=28, num_attention_heads=7, num_key_value_heads=1, head_dim=8,
                                **rope())),
    "llama-gqa8-dim80": (*LLAMA, dict(SIZES, num_attention_heads=8, num_key_value_heads=1, head_dim=80,
                                      num_hidden_layers=1, **rope())),
    "llama-bias": (*LLAMA, dict(SIZES, **HEADS, attention_bias=True, mlp_bias=True, **rope())),
    "llama-linear": (*LLAMA, dict(SIZES, **HEADS, **rope(rope_type="linear", factor=4.0))),
    "llama-llama3": (*LLAMA, dict(SIZES, **HEADS, head_dim=16,
                                  **rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                         high_freq_factor=4.0, original_max_position_embeddings=64))),
    "llama-yarn": (*LLAMA, dict(SIZES, **HEADS, head_dim=32, **rope(rope_type="yarn", factor=4.0,
                                                                    original_max_position_embeddings=32))),
    "mistral-window": (*MISTRAL, dict(SIZES, **HEADS, sliding_window=12, **rope())),
    "mistral-full-dim96": (*MISTRAL, dict(SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=96,
                                          sliding_window=None, **rope())),
    "qwen2-gqa7": (*QWEN2, dict(SIZES, hidden_size=28, num_attention_heads=14, num_key_value_heads=2,
                                tie_word_embeddings=True, **rope())),
    "qwen2-window": (*QWEN2, dict(SIZES, **HEADS, use_sliding_window=True, sliding_window=9, max_window_layers=1,
                                  **rope())),
    "qwen3-gqa4": (*QWEN3, dict(SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=16, **rope())),
    "qwen3-bias": (*QWEN3, dict(SIZES, **HEADS, head_dim=128, num_hidden_layers=1, attention_bias=True, **rope())),
    "gemma3-local": (*GEMMA3, dict(SIZES, **HEADS, head_dim=16, num_hidden_layers=3, query_pre_attn_scalar=24,
                                   layer_types=[SLIDING, FULL, SLIDING], sliding_window=8,
                                   rope_parameters={SLIDING: dict(rope_type="default", rope_theta=100.0),
                                                    FULL: dict(rope_type="linear", factor=8.0,
                                                               rope_theta=1000.0)})),
    "gemma3-dim256": (*GEMMA3, dict(SIZES, num_attention_heads=1, num_key_value_heads=1, head_dim=256,
                                    num_hidden_layers=1, final_logit_softcapping=5.0, layer_types=[FULL])),
    "gemma4-shared": (*GEMMA4, dict(SIZES, **HEADS, head_dim=8, global_head_dim=16, num_hidden_layers=6,
                                    layer_types=[SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
                                    num_kv_shared_layers=3, sliding_window=8, hidden_size_per_layer_input=6,
                                    vocab_size_per_layer_input=VOCAB, use_double_wide_mlp=True,
                                    final_logit_softcapping=5.0)),
    "gemma4-plain": (*GEMMA4, dict(SIZES, num_attention_heads=5, num_key_value_heads=1, head_dim=8,
                                   global_head_dim=64, hidden_size_per_layer_input=0, sliding_window=8,
                                   layer_types=[SLIDING, FULL])),
    "gpt2": (*GPT2, dict(vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2, n_positions=128, bos_token_id=1,
                         eos_token_id=2)),
    "gpt2-inverse": (*GPT2, dict(vocab_size=VOCAB, n_embd=30, n_head=3, n_layer=3, n_positions=128, n_inner=50,
                                 bos_token_id=1, eos_token_id=2, scale_attn_by_inverse_layer_idx=True)),
}


def make(config_class, model_class, arguments):
    """A random model in which nothing is as it would be if it were left out: no norm of one, no bias of zero."""
    torch.manual_seed(7)
    model = model_class(config_class(initializer_range=0.3, **arguments)).eval()
    around = 0.0 if config_class is Gemma3TextConfig else 1.0  # its norms add one
    with torch.no_grad():
        for name, value in list(model.named_parameters()) + list(model.named_buffers()):
            if name.endswith("layer_scalar"):
                value.uniform_(0.6, 1.1)
            elif name.endswith("bias"):
                value.normal_(0, 0.3)
            elif "norm" in name or ".ln_" in name:
                value.uniform_(around - 0.5, around + 0.5)
        for value in model.state_dict().values():  # bfloat16 halves the files and loses nothing
            if value.is_floating_point() and value.dim() > 0:
                value.copy_(value.to(torch.bfloat16))
    return model


def save(model, target):
    model.config.save_pretrained(target)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
               if name not in tied and value.dim() > 0}
    save_file(tensors, os.path.join(target, "model.safetensors"), {"format": "pt"})


# The same models as the text half of a multimodal one.
WRAPPED = {"gemma3-wrapped": "gemma3-local", "gemma4-wrapped": "gemma4-shared"}


def wrap(source, target):
    """config.json one deeper, weights under another prefix."""
    os.makedirs(target, exist_ok=True)
    with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    with open(os.path.join(target, "config.json"), "w", encoding="utf-8") as out:
        json.dump({"model_type": config["model_type"].removesuffix("_text"), "text_config": config}, out, indent=1)
        out.write("\n")
    tensors = {name.replace("model.", "model.language_model.", 1): value
               for name, value in load_file(os.path.join(source, "model.safetensors")).items()}
    save_file(tensors, os.path.join(target, "model.safetensors"), {"format": "pt"})


def computed(model):
    positions = [0, 1, 17, TOKENS - 1]
    with torch.no_grad():
        cache = DynamicCache()  # without a config it keeps every token of sliding layers, too
        logits = model(torch.tensor([IDS]), past_key_values=cache, use_cache=True).logits[0]
        longer, closest = list(IDS), 1.0
        for _ in range(GREEDY):  # by hand: generate() would mask what it takes for padding
            last = model(torch.tensor([longer])).logits[0, -1]
            top = last.topk(2).values
            closest = min(closest, ((top[0] - top[1]) / last.norm()).item())
            longer.append(int(last.argmax()))
    assert closest > 1e-5, f"two tokens are nearly as likely ({closest}): take another seed"
    layers = [{"keys": [short(x) for x in layer.keys.reshape(-1)[::13]],
               "values": [short(x) for x in layer.values.reshape(-1)[::13]]} for layer in cache.layers]
    return {"ids": IDS, "positions": positions, "logits": [[short(x) for x in logits[i, :VOCAB]] for i in positions],
            "greedy": longer[TOKENS:], "cache": layers}


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    check = arguments == ["--check"]
    torch.set_num_threads(1)
    results = {}
    with golden_files.folder(check) as folder:
        for name, (config_class, model_class, extra) in CASES.items():
            model = make(config_class, model_class, extra)
            if not check:
                save(model, os.path.join(folder, "models", name))
            results[name] = computed(model)
        for name, source in WRAPPED.items():
            if not check:
                wrap(os.path.join(folder, "models", source), os.path.join(folder, "models", name))
            results[name] = results[source]
        return golden_files.write_or_check({"models.json": results}, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
