#!/usr/bin/env python3
"""Milliseconds of a prefill by Hugging Face transformers on a GPU: what kvqbench's `prefill` of the scheme none is held against.

usage: python3 accuracy/prefill_transformers.py [--contexts 4096,32768] [--runs 5]

Mistral-7B's shape on random float16 weights, sdpa attention, logits of the last token, one call for the whole prompt, by
CUDA events after a warm-up. Needs torch and transformers. Prints one JSON line a context.
"""
import argparse
import json
import statistics
import time

import torch
import transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="4096,32768")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    config = transformers.MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=32768, sliding_window=None)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    a = torch.randn(8192, 8192, device="cuda")
    start = time.monotonic()
    while time.monotonic() - start < 2:  # as kvqbench does: a cold GPU runs faster than it can go on to
        for _ in range(16):
            a @ a
        torch.cuda.synchronize()
    for context in map(int, arguments.contexts.split(",")):
        ids = torch.randint(config.vocab_size, (1, context), device="cuda")
        times = []
        with torch.inference_mode():
            for _ in range(arguments.runs + 1):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
        times = times[1:]
        print(json.dumps({"transformers": transformers.__version__, "gpu": torch.cuda.get_device_name(), "context": context,
                          "prefill_ms": statistics.median(times), "prefill_ms_min": min(times), "prefill_ms_max": max(times)}))


if __name__ == "__main__":
    main()
