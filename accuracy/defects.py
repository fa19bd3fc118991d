#!/usr/bin/env python3
"""How far each defect of the reference study moves its numbers, on SmolLM2-135M: the table of accuracy/README.md.

usage: defects.py [--kvqbench FILE] [--model DIR] [--text FILE] [--results FILE.json]

Measures with kvqbench wherever it can make both numbers. Two rows change one thing inside the study's own
library (transformers' QuantizedCache with hqq, in float32): what a flush encodes, and how kivi groups keys.
Prints the table; --results also keeps all figures. All in float32; 12 minutes of one core.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

import torch

import study_protocol as study

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
HF = "@policy=hf"


# ---- the study's cache, changed in one thing

class EncodesOnce(study.HqqLayer):
    """A flush encodes what is new, as a block of its own; what is encoded stays as it is."""

    def update(self, *arguments):
        self.sides = iter(("_quantized_keys", "_quantized_values"))
        return super().update(*arguments)

    def _quantize(self, tensor, axis):
        blocks = getattr(self, next(self.sides), [])
        done = sum(meta["shape"][-2] for _, meta in blocks)
        return blocks + [super()._quantize(tensor[..., done:, :].contiguous(), axis)]

    def _dequantize(self, blocks):
        return torch.cat([super(EncodesOnce, self)._dequantize(block) for block in blocks], -2)


class EncodesOriginals(study.HqqLayer):
    """A flush encodes everything anew as the library does, but from the originals."""

    def update(self, keys, values, *arguments):
        self.seen = [torch.cat([old, new], -2)
                     for old, new in zip(getattr(self, "seen", (keys[..., :0, :], values[..., :0, :])), (keys, values))]
        self.sides = iter(self.seen)
        return super().update(keys, values, *arguments)

    def _quantize(self, tensor, axis):
        return super()._quantize(next(self.sides), axis)


class PerChannel(study.HqqLayer):
    """Keys in groups of 64 tokens of one channel of one head; the last group repeats the last token."""

    def _quantize(self, tensor, axis):
        if axis == 1:
            return super()._quantize(tensor, axis)
        missing = -tensor.shape[-2] % 64
        whole = torch.cat([tensor, tensor[..., -1:, :].expand(-1, -1, missing, -1)], -2)
        return super()._quantize(whole.transpose(-1, -2).contiguous(), 1), tensor.shape[-2]

    def _dequantize(self, stored):
        if isinstance(stored[1], dict):
            return super()._dequantize(stored)
        return super()._dequantize(stored[0]).transpose(-1, -2)[..., :stored[1], :]


@torch.no_grad()
def continued_ppl(model, ids, spec, layer_class, prompt=256, call=64):
    """ppl of a text's continuation, fed in calls of half of 128 tokens at residual_length 64: that flushes
    every 128 tokens, as single tokens do at the study's residual_length 128."""
    cache = study.make_cache(model, spec, layer_class, residual=call)
    model(ids[:, :prompt], past_key_values=cache, use_cache=True)
    nll, count = 0.0, 0
    for begin in range(prompt, ids.shape[1] - 1, call):
        part = ids[:, begin:begin + call]
        logits = model(part, past_key_values=cache, use_cache=True).logits[0]
        targets = ids[0, begin + 1:begin + call + 1]
        nll += torch.nn.functional.cross_entropy(logits[:len(targets)], targets, reduction="sum").item()
        count += len(targets)
    return math.exp(nll / count)


def drift(model, ids):
    figures = {}
    for spec in ("int4-hqq", "int2-hqq", "int4-hqq-kivi", "int2-hqq-kivi"):
        figures[spec] = {name: continued_ppl(model, ids[:, :1024], spec, layer_class) for name, layer_class in
                         (("study", study.HqqLayer), ("originals", EncodesOriginals), ("once", EncodesOnce))}
    return figures


@torch.no_grad()
def kivi_grouping(model, ids):
    """Perplexity by the study's protocol with prefixes of 256 tokens and of 253."""
    figures = {}
    for context in (512, 506):
        windows = study.windows_of(ids.shape[1], context, 6)
        reference = study.reference_losses(model, ids, windows)
        for spec in ("int4-hqq-kivi", "int2-hqq-kivi"):
            figures[f"{spec}/{context}"] = {
                "reference": study.perplexity_of(reference, windows),
                **{name: study.perplexity_of(
                    study.quantized_losses(model, ids, windows, spec, reference, layer_class=layer_class), windows)
                   for name, layer_class in (("study", study.HqqLayer), ("right", PerChannel))}}
    return figures


# ---- what kvqbench measures

def kvqbench(options, flags):
    """The runs of one call by measurement, spec and context."""
    common = [f"--models={options.model}", f"--corpus-file={options.text}", "--dtype=float32"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "out.json")
        subprocess.run([options.kvqbench, *common, *flags, f"--benchmark_out={path}"], check=True,
                       stdout=subprocess.DEVNULL)
        with open(path, encoding="utf-8") as file:
            benchmarks = json.load(file)["benchmarks"]
    runs = {}
    for run in benchmarks:
        if run.get("error_occurred"):
            raise SystemExit(f"defects: {run['name']}: {run['error_message']}")
        measurement, _, _, spec, context, _ = run["name"].split("/")
        runs[measurement, spec, int(context.split(":")[1])] = run
    return runs


def windows_of(run):
    """Each window's sums, as perplexity.cc names them."""
    names = ("targets", "scored", "scored_reference", "nll", "nll_reference", "nll_reference_first")
    return [{name: run[f"{name}/window:{i}"] for name in names} for i in range(int(run["windows"]))]


def delta_as_study(windows):
    """Change of perplexity as the study weighs: a window's mean counts once for every target."""
    targets = sum(w["targets"] for w in windows)
    return (math.exp(sum(w["targets"] * w["nll"] / w["scored"] for w in windows) / targets)
            - math.exp(sum(w["targets"] * w["nll_reference"] / w["scored_reference"] for w in windows) / targets))


def delta_of_scored(windows):
    """Change of perplexity over the tokens that both models score, each counted once."""
    count = sum(w["scored"] for w in windows)
    reference = sum(w["nll_reference"] - (w["nll_reference_first"] if w["scored"] < w["scored_reference"] else 0)
                    for w in windows)
    return math.exp(sum(w["nll"] for w in windows) / count) - math.exp(reference / count)


def measure(options):
    """All figures, by the row they are for."""
    quality = kvqbench(options, ["--protocol=study", "--contexts=512", "--windows=8",
                                 f"--schemes=int4-hqq{HF},int2-hqq{HF}", "--benchmark_filter=perplexity"])
    windows = {spec: windows_of(run) for (_, spec, _), run in quality.items()}
    speed = ["--contexts=1024", f"--schemes=none,int4-hqq{HF}"]
    replayed = kvqbench(options, ["--protocol=study", *speed, "--benchmark_filter=decode|memory|kv_size"])
    honest = kvqbench(options, ["--protocol=decode", *speed, "--benchmark_filter=memory"])
    needles = [kvqbench(options, ["--protocol=study", "--contexts=512", f"--schemes=int4-hqq{HF},int2-hqq{HF}",
                                  f"--seed={seed}", "--benchmark_filter=needle"]) for seed in (1, 2, 3, 4)]
    model, tokenizer = study.load(options.model)
    with open(options.text, encoding="utf-8") as file:
        ids = torch.tensor([tokenizer(file.read()[:20000]).input_ids])
    specs = [f"int4-hqq{HF}", f"int2-hqq{HF}"]
    return {
        "decode": {spec: {key: replayed["decode", spec, 1024][key] for key in
                          ("tokens_per_s", "tokens_per_s_net", "reprefill_ms")} for spec in ("none", specs[0])},
        "first window": {spec: {"study": delta_as_study(windows[spec]), "right": delta_as_study(windows[spec][1:])}
                         for spec in specs},
        "weights": {spec: {"study": delta_as_study(windows[spec]), "right": delta_of_scored(windows[spec])}
                    for spec in specs},
        "drift": drift(model, ids),
        "kivi": kivi_grouping(model, ids),
        "memory": {"study": replayed["memory", "none", 1024]["rss_grown_bytes"],
                   "right": honest["memory", "none", 1024]["rss_grown_bytes"]},
        "memory by formula": {spec: {"study": replayed["memory", spec, 1024]["study_peak_bytes"],
                                     "right": replayed["kv_size", spec, 1024]["kv_bytes"]
                                     + 4 * (model.config.vocab_size + model.config.hidden_size)}
                              for spec in ("none", specs[0])},
        "needle": {spec: {"study": needles[0]["needle", spec, 512]["needle_rate"],
                          "right": sum(run["needle", spec, 512]["needle_random_rate"] for run in needles) / len(needles),
                          "trials": 5 * len(needles)} for spec in specs},
    }


# ---- the table

def rows(f):
    """Defect, spec, what the study does, what is right, both numbers, their difference."""
    mib = 2**20
    for spec, x in f["decode"].items():
        yield ("prefill inside the decode timer", spec, "128 tokens over (prefill + steps)", "over the steps",
               f"{x['tokens_per_s']:.1f} tok/s", f"{x['tokens_per_s_net']:.1f} tok/s",
               f"{100 * (x['tokens_per_s'] / x['tokens_per_s_net'] - 1):+.0f} %")
    for spec, x in f["first window"].items():
        yield ("first window never quantized", spec, "delta ppl of 8 windows, the first one never quantized",
               "of the other 7", f"{x['study']:+.4f}", f"{x['right']:+.4f}",
               f"{100 * (x['study'] / x['right'] - 1):+.1f} %")
    for spec, x in f["weights"].items():
        yield ("unscored tokens weighted", spec, "delta ppl; a window's first target gets the mean of the others "
               "where quantized, its own nll where not", "over the targets that both score", f"{x['study']:+.4f}",
               f"{x['right']:+.4f}", f"{100 * (x['study'] / x['right'] - 1):+.1f} %")
    for spec, x in f["drift"].items():
        yield ("a flush re-encodes what is decoded", spec, "ppl of 768 tokens behind a prompt of 256, six flushes",
               "each token encoded once", f"{x['study']:.4f}", f"{x['once']:.4f}",
               f"{x['study'] - x['once']:+.4f}; all anew from the originals: {x['originals'] - x['once']:+.4f}")
    for name, x in f["kivi"].items():
        spec, context = name.split("/")
        yield ("kivi groups across heads", spec, f"delta ppl, prefix of {int(context) // 2} tokens, axis 0 of all keys",
               "64 tokens of one channel of one head", f"{x['study'] - x['reference']:+.4f}",
               f"{x['right'] - x['reference']:+.4f}", f"{x['study'] - x['right']:+.4f}")
    x = f["memory"]
    yield ("peak memory counts three caches", "none", "resident growth with three caches and all logits",
           "with one cache and the last logits", f"{x['study'] / mib:.0f} MiB", f"{x['right'] / mib:.0f} MiB",
           f"{(x['study'] - x['right']) / mib:+.0f} MiB")
    for spec, x in f["memory by formula"].items():
        yield ("the same by formula", spec, "3 caches, logits and hidden states of all tokens",
               "1 cache, those of the last token", f"{x['study'] / mib:.1f} MiB", f"{x['right'] / mib:.1f} MiB",
               f"{(x['study'] - x['right']) / mib:+.1f} MiB")
    for spec, x in f["needle"].items():
        yield ("one constant needle", spec, "five depths, always 7492", f"random numbers, {x['trials']} trials",
               f"{x['study']:.2f}", f"{x['right']:.2f}", f"{x['study'] - x['right']:+.2f}")


def main(arguments):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--kvqbench", default=os.path.join(HERE, "..", "build", "release", "kvqbench"))
    parser.add_argument("--model", default=os.path.join(CACHE, "models", "smollm2-135m"))
    parser.add_argument("--text", default=os.path.join(CACHE, "texts", "pride-and-prejudice.txt"))
    parser.add_argument("--results")
    options = parser.parse_args(arguments)
    figures = measure(options)
    if options.results:
        with open(options.results, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")
    print("| defect | spec | the study | right | its number | right number | difference |")
    print("|---|---|---|---|---:|---:|---:|")
    for row in rows(figures):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
