#!/usr/bin/env python3
"""The reference study's measurements by transformers and hqq, to check `kvqbench --protocol=study` against.

usage: study_protocol.py MODEL_DIR TEXT_FILE OUT.json [--specs none,int4-hqq] [--context 512] [--windows 3]
           [--new-tokens 128] [--dtype float32] [--metadata float16] [--measure perplexity,needle,decode]
           [--results BENCHMARKS.json]

Specs: none, int8-hqq, int4-hqq, int2-hqq, int4-hqq-kivi, int2-hqq-kivi, and int4-quanto, int2-quanto where
optimum-quanto is installed. On the CPU. The study ran in float16, so its libraries stored scales and zero points
in float16, and so does kvqbench; in float32 they would keep them whole: --metadata float16 (default) rounds
them, float32 leaves the libraries as they are. --windows ends the text with that many windows.

--results compares with what kvqbench wrote (--protocol=study --dtype=float32, specs with @policy=hf) and exits
with 1 where the unquantized perplexity differs by more than 1e-4 of itself, or a needle's tokens, a verdict or
a decoded token of an unquantized cell differ; differences of quantized cells are printed.
"""

import argparse
import json
import math
import os
import re
import sys
import time

import torch
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, HQQQuantizedLayer, QuantizedCache, QuantoQuantizedLayer
from transformers.utils import logging

from compare_transformers import wikitext_rows

try:
    import make_golden_quanto  # lets quanto unpack without a compiler
except ImportError:
    make_golden_quanto = None

RESIDUAL = 128
DEPTHS = (0.1, 0.25, 0.5, 0.75, 0.9)
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
QUESTION = "The special magic number for this experiment is"
NUMBER = "7492"


def fail(text):
    print(f"study_protocol: {text}", file=sys.stderr)
    sys.exit(2)


def axes(spec):
    """Bits, library and group axes of keys and values; None for `none`."""
    if spec == "none":
        return None
    match = re.fullmatch(r"int([842])-(hqq|quanto)(-kivi)?", spec)
    if match is None:
        fail(f"--specs: no spec '{spec}'; there are none, int{{8,4,2}}-{{hqq,quanto}}, and the same with -kivi")
    bits, library, kivi = match.groups()
    if library == "quanto" and (kivi or bits == "8"):
        fail(f"--specs: transformers refuses '{spec}': quanto has 4 and 2 bits, and keys and values on one axis")
    if library == "quanto" and make_golden_quanto is None:
        fail(f"--specs: '{spec}' needs the package optimum-quanto")
    return int(bits), library, 0 if kivi or library == "quanto" else 1, 1 if library == "hqq" else 0


class WholeQuantizer(Quantizer):
    """hqq, where its packing would fail: it joins halves or quarters of the groups' rows (or of the 64
    rows of axis 0), so their number must be even, or a multiple of four."""

    @classmethod
    def quantize(cls, tensor, axis, nbits, group_size, **rest):
        rows = group_size if axis == 0 else tensor.numel() // group_size
        return Quantizer.quantize(tensor, axis=axis, nbits=nbits, group_size=group_size,
                                  bitpack=rows % (8 // nbits) == 0, **rest)


HALF_METADATA = True  # of run(): round scales and zero points to float16


class HqqLayer(HQQQuantizedLayer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.quantizer = WholeQuantizer

    def _quantize(self, tensor, axis):
        codes, meta = super()._quantize(tensor, axis)
        if HALF_METADATA:
            for name in ("scale", "zero"):
                meta[name] = meta[name].half().to(tensor.dtype)
        return codes, meta


class QuantoLayer(QuantoQuantizedLayer):
    def _quantize(self, tensor, axis):
        stored = super()._quantize(tensor, axis)
        if HALF_METADATA:
            stored._scale, stored._shift = (x.half().to(tensor.dtype) for x in (stored._scale, stored._shift))
        return stored


def make_cache(model, spec, layer_class=None, residual=RESIDUAL):
    """A cache as the study makes it: without a config, `none` keeps all tokens of sliding layers, too."""
    if spec == "none":
        return DynamicCache()
    bits, library, axis_key, axis_value = axes(spec)
    cache = QuantizedCache(library, model.config, nbits=bits, axis_key=axis_key, axis_value=axis_value,
                           q_group_size=64, residual_length=residual)
    layer_class = layer_class or (HqqLayer if library == "hqq" else QuantoLayer)
    cache.layers = [layer_class(bits, axis_key, axis_value, 64, residual) for _ in cache.layers]
    return cache


# ---- perplexity

def windows_of(tokens, length, count):
    """(begin, end, first target) of half-overlapping windows until one ends with the text."""
    windows, scored_until = [], 0
    for begin in range(0, tokens, length // 2):
        end = min(begin + length, tokens)
        windows.append((begin, end, scored_until))
        scored_until = end
        if end == tokens or len(windows) == count:
            break
    return windows


def reference_losses(model, ids, windows):
    """transformers' own loss of each window, what an earlier window had masked."""
    losses = []
    for begin, end, first in windows:
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, :first - begin] = -100
        losses.append(model(window, labels=labels, use_cache=False).loss.item())
    return losses


def quantized_losses(model, ids, windows, spec, reference, **cache_options):
    """Phase one fills the cache with the overlap; phase two is scored, by the loss of its own call."""
    losses = []
    for (begin, end, first), plain in zip(windows, reference):
        if first - begin < 128:
            losses.append(plain)
            continue
        cache = make_cache(model, spec, **cache_options)
        model(ids[:, begin:first], past_key_values=cache, use_cache=True)
        suffix = ids[:, first:end]
        losses.append(model(suffix, past_key_values=cache, use_cache=True, labels=suffix).loss.item())
    return losses


def perplexity_of(losses, windows):
    """A window's mean weighs as many tokens as the window has targets, scored or not."""
    total = sum(loss * (end - first) for loss, (_, end, first) in zip(losses, windows))
    return math.exp(total / windows[-1][1])


# ---- needle

def needle_prompt(tokenizer, context, depth):
    def tokens(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids)
    needle = f"{QUESTION} {NUMBER}. Remember this number: {NUMBER}."
    budget = context - tokens("\n\n" + QUESTION) - 10
    mean = sum(tokens(sentence) for sentence in NOISE) / len(NOISE)
    count = max(1, int((budget - tokens(needle)) / mean))
    sentences = [NOISE[i % len(NOISE)] for i in range(count)]
    sentences.insert(min(max(int(depth * count), 0), count - 1), needle)
    return " ".join(sentences) + "\n\n" + QUESTION


def needle_trials(model, tokenizer, spec, context):
    trials = []
    for depth in DEPTHS:
        ids = torch.tensor([tokenizer(needle_prompt(tokenizer, context, depth)).input_ids[:context]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
                             past_key_values=make_cache(model, spec))
        answer = out[0, ids.shape[1]:].tolist()
        text = tokenizer.decode(answer, skip_special_tokens=True)
        trials.append({"depth": round(100 * depth), "prompt_tokens": ids.shape[1], "tokens": answer, "text": text,
                       "success": NUMBER in text})
    return trials


# ---- decode, and what the cache takes

def cache_bytes(cache, spec):
    """Codes, packed; scales and zero points at two bytes as in the study's float16; and what is not encoded."""
    total = 0
    for layer in cache.layers:
        dense = [layer.keys, layer.values]
        if spec != "none":
            bits, library = axes(spec)[:2]
            for stored in (layer._quantized_keys, layer._quantized_values):
                if library == "hqq":
                    codes, meta = stored
                    elements = math.prod(meta["shape"])
                    if meta["packing"]:
                        assert codes.nbytes * 8 // bits == elements
                    total += elements * bits // 8 + 2 * (meta["scale"].numel() + meta["zero"].numel())
                else:
                    total += stored.numel() * bits // 8 + 2 * (stored._scale.numel() + stored._shift.numel())
        total += sum(x.nbytes for x in dense)
    return total


def decode_run(model, tokenizer, spec, context, new_tokens):
    ids = torch.tensor([tokenizer("Hello world " * (context // 2)).input_ids[:context]])
    def prefill():
        return model(ids, past_key_values=make_cache(model, spec), use_cache=True)
    original = prefill()
    kv_bytes = cache_bytes(original.past_key_values, spec)
    logits, start = original.logits, time.perf_counter()
    again = prefill()  # inside the study's timer
    prefilled = time.perf_counter()
    token, tokens, cache = ids[:, -1:], [], again.past_key_values
    for _ in range(new_tokens):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens.append(token.item())
    end = time.perf_counter()
    hidden = ids.shape[1] * model.config.get_text_config().hidden_size * model.dtype.itemsize
    return {"prompt_tokens": ids.shape[1], "tokens": tokens, "kv_bytes": kv_bytes,
            "study_peak_bytes": 3 * kv_bytes + logits.numel() * model.dtype.itemsize + hidden,
            "tokens_per_s": new_tokens / (end - start), "tokens_per_s_net": new_tokens / (end - prefilled),
            "reprefill_ms": 1e3 * (prefilled - start)}


# ---- all of it

def load(directory, dtype=torch.float32):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def run(model, tokenizer, text, specs, context, windows, new_tokens,
        measure=("perplexity", "needle", "decode"), metadata="float16"):
    global HALF_METADATA
    HALF_METADATA = metadata == "float16"
    ids = torch.tensor([tokenizer(text).input_ids])
    parts = windows_of(ids.shape[1], context, windows)
    result = {"context": context, "windows": parts, "specs": {}}
    reference = reference_losses(model, ids, parts) if "perplexity" in measure else []
    for spec in specs:
        made = result["specs"][spec] = {}
        if "perplexity" in measure:
            losses = reference if spec == "none" else quantized_losses(model, ids, parts, spec, reference)
            made.update(ppl_reference=perplexity_of(reference, parts), ppl=perplexity_of(losses, parts),
                        losses=losses)
        if "needle" in measure:
            made["needle"] = needle_trials(model, tokenizer, spec, context)
        if "decode" in measure:
            made["decode"] = decode_run(model, tokenizer, spec, context, new_tokens)
    return result


def compare(result, path):
    """Prints what differs from kvqbench's results; True where the unquantized cells agree."""
    with open(path, encoding="utf-8") as file:
        runs = {run["name"]: run for run in json.load(file)["benchmarks"] if not run.get("error_occurred")}
    agree, compared = True, 0
    for name, run in runs.items():
        measurement, _, _, spec, context, _ = name.split("/")
        if spec != "none" and not spec.endswith("@policy=hf"):
            continue
        spec = spec.removesuffix("@policy=hf")
        ours = result["specs"].get(spec)
        if ours is None or context != f"ctx:{result['context']}":
            continue
        differences = []
        if measurement == "perplexity" and "ppl" in ours:
            for key in ("ppl_reference", "ppl"):
                off = run[key] / ours[key] - 1
                print(f"{name}: {key} {run[key]:.6f}, here {ours[key]:.6f}: {off:+.1e}")
                if abs(off) > 1e-4:
                    differences.append(key)
        elif measurement == "needle" and "needle" in ours:
            texts = json.loads(run["label"].split("answers: ", 1)[1])
            for trial, text in zip(ours["needle"], texts, strict=True):
                key = f"/depth:{trial['depth']}"
                tokens = [int(run[f"answer{key}/token:{i}"]) for i in range(32) if f"answer{key}/token:{i}" in run]
                same = sum(a == b for a, b in zip(tokens, trial["tokens"]))
                print(f"{name}: depth {trial['depth']}: {same} of {len(trial['tokens'])} tokens equal")
                if tokens != trial["tokens"] or text != trial["text"] or run["needle" + key] != trial["success"]:
                    differences.append(key)
        elif measurement == "decode" and "decode" in ours:
            tokens = [int(run[f"token/step:{i + 1}"]) for i in range(len(ours["decode"]["tokens"]))]
            if tokens != ours["decode"]["tokens"]:
                differences.append("tokens")
        elif measurement == "kv_size" and "decode" in ours:
            if run["kv_bytes"] != ours["decode"]["kv_bytes"]:
                differences.append("kv_bytes")
        else:
            continue
        compared += 1
        print(f"{name}: {'differs: ' + ', '.join(differences) if differences else 'equal'}")
        agree = agree and (not differences or spec != "none")
    return agree and compared > 0


def main(arguments):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--specs", default="none,int4-hqq")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--metadata", default="float16", choices=("float16", "float32"))
    parser.add_argument("--measure", default="perplexity,needle,decode")
    parser.add_argument("--results")
    o = parser.parse_args(arguments)
    specs = o.specs.split(",")
    for spec in specs:
        axes(spec)
    if not os.path.isfile(os.path.join(o.model, "config.json")):
        fail(f"{o.model}: not a Hugging Face model directory; it has no config.json")
    try:
        with open(o.text, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{o.text}: {error}")
    if o.text.endswith("wiki.test.raw"):
        text = wikitext_rows(text)
    model, tokenizer = load(o.model, getattr(torch, o.dtype))
    result = run(model, tokenizer, text, specs, o.context, o.windows, o.new_tokens, o.measure.split(","), o.metadata)
    with open(o.out, "w", encoding="utf-8") as file:
        json.dump(result, file)
        file.write("\n")
    for spec, made in result["specs"].items():
        print(spec, f"ppl {made['ppl']:.6f}" if "ppl" in made else "")
    return 0 if o.results is None or compare(result, o.results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
