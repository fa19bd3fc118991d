#!/usr/bin/env python3
"""Makes the golden files of the parity tests with the Python packages the tests compare against.

usage: make_golden.py [--check] [--model DIR]

Without --check writes accuracy/golden/*; with it, makes them anew and compares (golden_files.py). --model: where
SmolLM2-135M is (default: the cache). The tiny models are make_golden_models.py's. Packages:
accuracy/requirements.txt.
"""

import json
import os
import sys

import torch
from hqq.core.quantize import Quantizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

import golden_files
from golden_files import numbers, short


def hqq_cases():
    shapes = [(1, 1, 64), (2, 3, 64), (3, 65, 64), (8, 2, 128), (1, 64, 128), (3, 128, 64)]
    cases = []
    for case, (heads, tokens, head_dim) in enumerate(shapes):
        for kind in ("normal", "outliers", "constant", "tiny", "offset", "bfloat16"):
            count = heads * tokens * head_dim
            if count > 4096 and kind not in ("normal", "outliers"):
                continue
            x = torch.from_numpy(numbers(count, case, kind)).reshape(1, heads, tokens, head_dim)
            for bits in (8, 4, 2):
                for axis in (1, 0):
                    # Unpacked: the package cannot pack an odd number of groups.
                    codes, meta = Quantizer.quantize(x, nbits=bits, axis=axis, group_size=64, device="cpu",
                                                     bitpack=False)
                    codes = codes.reshape(-1)
                    text = "".join(f"{int(c):02x}" if bits == 8 else f"{int(c):x}" for c in codes)
                    cases.append({"heads": heads, "tokens": tokens, "head_dim": head_dim, "seed": case,
                                  "kind": kind, "bits": bits, "axis": axis, "codes": text,
                                  "scale": [short(s) for s in meta["scale"].reshape(-1)],
                                  "zero": [short(z) for z in meta["zero"].reshape(-1)]})
    # Large cases dominate the size: keep those of few groups whole, of the others every 37th code.
    for case in cases:
        if len(case["scale"]) > 64:
            step = 37
            width = 2 if case["bits"] == 8 else 1
            codes = [case["codes"][i:i + width] for i in range(0, len(case["codes"]), width)]
            case.update(step=step, codes="".join(codes[::step]), scale=case["scale"][::step],
                        zero=case["zero"][::step])
    return cases


def cache_calls(cache, heads, head_dim, dtype=torch.float32, text=lambda x: [short(v) for v in x]):
    """QuantizedCache.update replayed, over two flushes: every 29th number that each call returns."""
    calls = []
    for call, tokens in enumerate((8, 1, 1, 1, 1, 3, 1, 2)):
        count = heads * tokens * head_dim
        k, v = (torch.from_numpy(numbers(count, 100 + 2 * call + side, "outliers"))
                .reshape(1, heads, tokens, head_dim).to(dtype) for side in (0, 1))
        k_out, v_out = cache.update(k, v, 0)
        calls.append({"tokens": tokens, "keys": text(k_out.reshape(-1)[::29]),
                      "values": text(v_out.reshape(-1)[::29])})
    return calls


def hf_cache_cases():
    cases = []
    for bits, kivi in ((8, False), (4, False), (2, False), (4, True), (2, True)):
        heads, head_dim, residual = 2, 64, 4
        cache = QuantizedCache("hqq", LlamaConfig(num_hidden_layers=1), nbits=bits, axis_key=0 if kivi else 1,
                               axis_value=1, q_group_size=64, residual_length=residual)
        cases.append({"bits": bits, "kivi": kivi, "heads": heads, "head_dim": head_dim,
                      "residual": residual, "calls": cache_calls(cache, heads, head_dim)})
    return cases


TEXTS = [
    "", "Hello world", "The capital of France is Paris.\n", "  leading and trailing  ", "a\n\n\nb\t\tc   d \n ",
    "don't we'll I'm they've IT'S", "x = [i**2 for i in range(10)]  # code\n\treturn {\"a\": 1}",
    "1234567890 3.14159 1,000,000 ½ ²", "naïve café, Größe, señor, Ελληνικά, русский, 日本語, 한국어, العربية",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 ☃️", "zero\u200bwidth\u00a0nbsp\u3000wide\u2028line", "control \x01\x02\x7f and \x04",
    "<|im_start|>user\nhi<|im_end|>", "<|endoftext|><|endoftext|>x", "A" * 300, " " * 100 + "end",
]
INVALID = [b"ab\xff\xfecd", b"\xc3\x28", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"ok\x80"]


def tiny_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    os.makedirs(os.path.join(folder, "tokenizer"), exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer", "tokenizer.json"), pretty=False)
    with open(os.path.join(folder, "tokenizer", "tokenizer_config.json"), "w", encoding="utf-8") as out:
        json.dump({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True}, out)
        out.write("\n")
    return tokenizer


def tokenizer_cases(tokenizer):
    texts = TEXTS + [b.decode("utf-8", errors="replace") for b in INVALID]
    cases = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids),
                      "with_special": tokenizer.decode(ids, skip_special_tokens=False)})
    # Every cut through the ids of a text with long characters: bytes that form no UTF-8.
    ids = tokenizer.encode(TEXTS[9], add_special_tokens=False).ids
    cuts = [{"ids": ids[a:b], "decoded": tokenizer.decode(ids[a:b])}
            for a in range(0, min(len(ids), 24), 3) for b in range(a + 1, min(len(ids), a + 6))]
    return {"texts": cases, "cuts": cuts,
            "invalid": [{"hex": b.hex(), "ids": tokenizer.encode(b.decode("utf-8", errors="replace"),
                                                                 add_special_tokens=False).ids}
                        for b in INVALID]}


def smollm2(model_dir, text):
    """nll of the first 256 tokens of the default text, in float32."""
    tokenizer = Tokenizer.from_file(os.path.join(model_dir, "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = tokenizer.encode(text[:4000], add_special_tokens=False).ids[:256]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return {"ids": ids, "nll": [short(x) for x in nll]}


def main(arguments):
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    check = "--check" in arguments
    cache = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
    model_dir = (arguments[arguments.index("--model") + 1] if "--model" in arguments
                 else os.path.join(cache, "models", "smollm2-135m"))
    with open(os.path.join(cache, "texts", "pride-and-prejudice.txt"), encoding="utf-8") as file:
        text = file.read()
    torch.set_num_threads(1)
    with golden_files.folder(check) as folder:
        return golden_files.write_or_check({
            "hqq.json": hqq_cases(), "hf_cache.json": hf_cache_cases(),
            "tokenizer.json": tokenizer_cases(tiny_tokenizer(folder)),
            "tokenizer-smollm2.json":
                tokenizer_cases(Tokenizer.from_file(os.path.join(model_dir, "tokenizer.json"))),
            "smollm2.json": smollm2(model_dir, text),
        }, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
