#!/usr/bin/env python3
"""Makes tiny checkpoints as transformers itself writes them, and what it computes with them.

usage: make_golden_checkpoints.py [--check]

Writes accuracy/golden/checkpoints/<case>/: config.json and safetensors by save_pretrained alone, so in shards with an index,
without the head of tied embeddings, or with fp8 weights and their scales as DeepSeek-V3 and Qwen3 are published; and
accuracy/golden/checkpoints.json: the logits of those in 16 bits, by from_pretrained of the same folder. With --check compares
these. Packages: accuracy/requirements.txt.
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

import golden_files
from golden_files import short

VOCAB, TOKENS = 61, 24
IDS = [(i * i * 7 + 3 * i + 5) % VOCAB for i in range(TOKENS)]
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             initializer_range=0.3)
# Of each: the model, and how it is saved.
CASES = {
    "llama-shards": (LlamaForCausalLM, LlamaConfig(**SIZES), dict(max_shard_size="8KB")),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True), {}),
    "qwen3-tied-shards": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True), dict(max_shard_size="6KB")),
    "llama-fp8": (LlamaForCausalLM, LlamaConfig(**SIZES), {}),
}


def quantize(model):
    """Linear layers, but the head, as FP8Linear: e4m3 codes, and a scale for every block of 16 x 16."""
    settings = FineGrainedFP8Config(weight_block_size=(16, 16))
    whole = {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    replace_with_fp8_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings, pre_quantized=True)
    for name, module in model.named_modules():
        if not isinstance(module, FP8Linear):
            continue
        rows, columns = whole[name].shape
        padded = torch.nn.functional.pad(whole[name], (0, -columns % 16, 0, -rows % 16))
        blocks = padded.unfold(0, 16, 16).unfold(1, 16, 16)
        scale = blocks.abs().amax((2, 3)) / 448
        codes = padded / scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
        module.weight = torch.nn.Parameter(codes[:rows, :columns].to(torch.float8_e4m3fn), requires_grad=False)
        module.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    model.config.quantization_config = settings


def write(folder, model_class, config, how):
    torch.manual_seed(7)
    model = model_class(config).to(torch.bfloat16).eval()
    if folder.endswith("fp8"):
        quantize(model)
    model.save_pretrained(folder, **how)
    os.remove(os.path.join(folder, "generation_config.json"))


def computed(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    positions = [0, 7, TOKENS - 1]
    return {"ids": IDS, "positions": positions, "logits": [[short(x) for x in logits[i]] for i in positions]}


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    torch.set_num_threads(1)
    check, made = arguments == ["--check"], {}
    with golden_files.folder(check) as folder:
        for name, case in CASES.items():
            target = os.path.join(folder, "checkpoints", name)
            write(target, *case)
            if not name.endswith("fp8"):
                made[name] = computed(target)
        return golden_files.write_or_check({"checkpoints.json": made}, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
