#!/usr/bin/env python3
"""Perplexity of an unquantized model by transformers, on the windows that kvqbench's `decode` protocol uses.

usage: compare_transformers.py MODEL_DIR TEXT_FILE CONTEXT WINDOWS [RESULTS.json]

float32, disjoint windows of CONTEXT tokens, every token but a window's first scored. With RESULTS.json (of
`kvqbench --benchmark_filter='^perplexity/.*/none/' --dtype=float32 ...`) compares `ppl` and `ppl_reference`
and exits with 1 where they differ by more than 0.2 %.
"""

import json
import math
import sys

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


def wikitext_rows(text):
    """The study's joining of WikiText-2's raw file; any other text is left as it is."""
    return "\n\n".join(row if row.strip() else "" for row in text.splitlines(keepends=True))


def main(arguments):
    if len(arguments) not in (4, 5):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    directory, path, context, windows = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    if path.endswith("wiki.test.raw"):
        text = wikitext_rows(text)
    ids = Tokenizer.from_file(f"{directory}/tokenizer.json").encode(text, add_special_tokens=False).ids
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    nll, count = 0.0, 0
    for window in range(min(windows, len(ids) // context)):
        tokens = torch.tensor([ids[window * context:(window + 1) * context]])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").double().item()
        count += context - 1
    ppl = math.exp(nll / count)
    print(f"transformers: ppl {ppl:.6f} over {count} tokens")
    if len(arguments) < 5:
        return 0
    with open(arguments[4], encoding="utf-8") as file:
        runs = [run for run in json.load(file)["benchmarks"] if run["name"].startswith("perplexity/")
                and "/none/" in run["name"]]
    worst = 0.0
    for run in runs:
        for key in ("ppl", "ppl_reference"):
            worst = max(worst, abs(run[key] / ppl - 1))
            print(f"kvqbench {run['name']}: {key} {run[key]:.6f}, {100 * (run[key] / ppl - 1):+.5f} %")
    return 0 if runs and worst <= 0.002 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
