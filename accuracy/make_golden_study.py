#!/usr/bin/env python3
"""Makes the golden files of the study's protocols: study_protocol.py on a small random model and on SmolLM2.

usage: make_golden_study.py [--check]

Without --check writes accuracy/golden/study*.json and models/llama-study; with it, measures that model anew and
compares (golden_files.py). float32, with the libraries' metadata in float16 as in the study and in kvqbench. Packages:
accuracy/requirements.txt.
"""

import json
import os
import sys

import torch
from tokenizers import Tokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM

import golden_files
import study_protocol

SPECS = ("none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-hqq-kivi", "int2-hqq-kivi", "int4-quanto", "int2-quanto")
MODEL = os.path.join(golden_files.GOLDEN, "models", "llama-study")


def make_model():
    """A small random model that every scheme runs on, with the tiny tokenizer; BOS stands before a text."""
    torch.manual_seed(11)
    config = LlamaConfig(vocab_size=420, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
                         rope_theta=1000.0, initializer_range=0.3, tie_word_embeddings=True, bos_token_id=1,
                         eos_token_id=2)
    LlamaForCausalLM(config).half().save_pretrained(MODEL)
    os.remove(os.path.join(MODEL, "generation_config.json"))
    tokenizer = Tokenizer.from_file(os.path.join(golden_files.GOLDEN, "tokenizer", "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(os.path.join(MODEL, "tokenizer.json"), pretty=False)
    with open(os.path.join(MODEL, "tokenizer_config.json"), "w", encoding="utf-8") as out:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
                   "eos_token": "<|im_end|>"}, out)
        out.write("\n")


def cases(directory, text, specs, new_tokens, measure):
    context, windows = 256, 3
    result = study_protocol.run(*study_protocol.load(directory), text, specs, context, windows, new_tokens, measure)
    made = {}
    for spec, figures in result["specs"].items():
        made[spec] = {"ppl": [figures["ppl_reference"], figures["ppl"]], "needle": figures["needle"]}
        if "decode" in measure:
            made[spec]["decode"] = {key: figures["decode"][key] for key in ("prompt_tokens", "tokens", "kv_bytes",
                                                                            "study_peak_bytes")}
    return {"text": text, "context": context, "windows": windows, "new_tokens": new_tokens, "specs": made}


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    check = arguments == ["--check"]
    torch.set_num_threads(1)
    if not check:
        make_model()
    cache = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
    with open(os.path.join(cache, "texts", "pride-and-prejudice.txt"), encoding="utf-8") as file:
        text = file.read()
    return golden_files.write_or_check({
        "study.json": cases(MODEL, text[6000:8000], SPECS, 132, ("perplexity", "needle", "decode")),
        "study-smollm2.json": cases(os.path.join(cache, "models", "smollm2-135m"), text[:4000], ["int4-hqq"], 0,
                                    ("perplexity", "needle")),
    }, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
