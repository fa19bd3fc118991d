#!/usr/bin/env python3
"""Makes the golden files of the tokenizer tests with Hugging Face `tokenizers`, transformers and sentencepiece.

usage: make_golden_tokenizers.py [--check]

Without --check trains a small tokenizer for each kind of file that the families of the study use, and writes it
with what Python makes of the texts to accuracy/golden/tokenizers/<family>/. With --check computes that anew from
the tokenizers that are there, and compares.

Where the cache has the sources of llama-cpp-python 0.3.36 (ci/live-parity brings them), takes real vocabularies
(Llama-2, Llama-3, Qwen2, GPT-2, Gemma-4) from them. They are too large to be committed: they are written as
Hugging Face files to <cache>/tokenizers/<family>/, and hashes of what Python makes of the texts to
accuracy/golden/tokenizers/real.json.

Texts: accuracy/golden/tokenizers/texts.json (in it `invalid` is bytes in hex, and the ids of the text number
`cut` are decoded in parts, too), Pride and Prejudice from the cache, and WikiText-2 where
$KVQ_SHARED/datasets/wiki.test.raw is. Packages: accuracy/requirements.txt.
"""

import hashlib
import json
import os
import sys
import tarfile
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils import logging

from tokenizer_families import LLAMA_STAGES, REAL, TRAINED, USER_DEFINED, write

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden", "tokenizers")
CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
SHARED = os.environ.get("KVQ_SHARED") or os.path.join(HERE, "..", "..", "shared")
SDIST = os.path.join(CACHE, "downloads", "llama_cpp_python-0.3.36.tar.gz")
BOOK, WIKI = "pride-and-prejudice", "wiki.test.raw"


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


TEXTS, INVALID, CUT = read_json(os.path.join(GOLDEN, "texts.json")).values()
TEXTS_AND_INVALID = TEXTS + [bytes.fromhex(data).decode("utf-8", errors="replace") for data in INVALID]


def whole_texts():
    with open(os.path.join(CACHE, "texts", BOOK + ".txt"), encoding="utf-8") as file:
        texts = {BOOK: file.read()}
    path = os.path.join(SHARED, "datasets", WIKI)
    if os.path.exists(path):
        with open(path, encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
        rows = [line + "\n" for line in lines[:-1]] + lines[-1:]
        # The study's text: rows joined by a blank line.
        texts[WIKI] = "\n\n".join(row if row.strip() else "" for row in rows if row)
    return texts


def code_points():
    """Every character of the planes in use, beside letters, marks, digits, apostrophes and tokens of `flags`."""
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x33480, 61), *range(0xE0000, 0xE0200)]
    return "".join(f"x'{chr(c)}e {chr(c)}\u0334a{chr(c)} 1{chr(c)}cut word{chr(c)}\n" for c in points)


# ---- who has the say

class HuggingFace:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class SentencePiece:
    """sentencepiece; `otherwise` for decoding, and for texts with special tokens, which it does not look for."""

    def __init__(self, path, otherwise):
        self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model.serialized_model_proto())
        self.special = [piece.piece for i, piece in enumerate(proto.pieces)
                        if self.model.is_control(i) or self.model.is_unknown(i) or piece.type == USER_DEFINED]
        self.decode = otherwise.decode
        self.otherwise = otherwise

    def has_special(self, text):
        return any(token in text for token in self.special)

    def encode(self, text):
        return self.otherwise.encode(text) if self.has_special(text) else self.model.encode(text)


def reference(folder):
    """`tokenizers` for tokenizer.json, transformers where tokenizer_config.json has tokens of its own and for
    GPT-2's files, sentencepiece for its model."""
    def path(name):
        return os.path.join(folder, name)
    config = read_json(path("tokenizer_config.json")) if os.path.exists(path("tokenizer_config.json")) else {}
    if os.path.exists(path("tokenizer.json")) and "added_tokens_decoder" not in config:
        return HuggingFace(Tokenizer.from_file(path("tokenizer.json")))
    tokenizer = AutoTokenizer.from_pretrained(folder)._tokenizer
    if not os.path.exists(path("tokenizer.model")) or config.get("legacy") is False:
        return HuggingFace(tokenizer)
    if config["tokenizer_class"] == "LlamaTokenizer":
        # transformers 5 reads any of these with Metaspace, which adds no space before a space, as sentencepiece
        # does; the files that it made before, Mistral's and Yi's among them, have this normalizer.
        shell = {**json.loads(tokenizer.to_str()), "normalizer": LLAMA_STAGES[0], "pre_tokenizer": None}
        tokenizer = Tokenizer.from_str(json.dumps(shell))
    return SentencePiece(path("tokenizer.model"), HuggingFace(tokenizer))


# ---- what it makes of the texts

def digest(ids):
    return {"count": len(ids), "sha256": hashlib.sha256("".join(f"{i} " for i in ids).encode()).hexdigest()}


def golden(folder):
    tokenizer, special = reference(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text) for text in TEXTS_AND_INVALID]
    decoded, with_special = ([tokenizer.decode(one, skip_special_tokens=skip) for one in ids] for skip in (True, False))
    cut = ids[CUT]
    result = {
        "ids": ids,
        # Only where decoding does not give the text back, and where special tokens make a difference.
        "decoded": {str(i): text for i, text in enumerate(decoded) if text != TEXTS_AND_INVALID[i]},
        "with_special": {str(i): text for i, text in enumerate(with_special) if text != decoded[i]},
        "cuts": [[a, b, tokenizer.decode(cut[a:b])]
                 for a in range(0, min(len(cut), 60), 3) for b in (a + 1, a + 3, a + 5)],
        "with_bos": [special(text).input_ids for text in ("", "Hello")],
        "bos": special.bos_token_id, "eos": special.eos_token_id,
        "whole": {name: digest(tokenizer.encode(text)) for name, text in whole_texts().items()},
    }
    if isinstance(tokenizer, HuggingFace) and "ByteLevel" in tokenizer.tokenizer.to_str():
        # For the others a character is a character.
        result["code_points"] = digest(tokenizer.encode(code_points()))
    return result


def real_vocabularies():
    """Writes them, and returns by family llama.cpp's own test texts with the ids of the real tokenizers."""
    import gguf  # only here

    vectors = {}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(SDIST) as archive:
        wanted = {f"ggml-vocab-{name}.gguf{end}" for name, _ in REAL.values() for end in ("", ".inp", ".out")}
        for member in archive:
            name = os.path.basename(member.name)
            if name in wanted:
                write(os.path.join(folder, name), archive.extractfile(member).read())
        for family, (name, make) in REAL.items():
            path = os.path.join(folder, f"ggml-vocab-{name}.gguf")
            fields = gguf.GGUFReader(path).fields
            keys = [f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores", "merges")]
            make(os.path.join(CACHE, "tokenizers", family),
                 *(fields[key].contents() if key in fields else None for key in keys))
            with open(path + ".inp", encoding="utf-8", newline="") as file:
                texts = file.read().split("\n__ggml_vocab_test__\n")
            with open(path + ".out", encoding="utf-8") as file:
                ids = [[int(i) for i in line.split()] for line in file.read().split("\n")]
            vectors[family] = list(zip(texts, ids))
    return vectors


def real_golden(family, vectors):
    tokenizer = reference(os.path.join(CACHE, "tokenizers", family))
    for text, ids in vectors:  # else what stands around the vocabulary is not the family's
        if tokenizer.encode(text) != ids:
            raise AssertionError(f"{family}: {text!r} is {tokenizer.encode(text)}, in llama.cpp's vectors {ids}")
    chosen = [i for i, text in enumerate(TEXTS_AND_INVALID)
              if isinstance(tokenizer, HuggingFace) or not tokenizer.has_special(text)]
    joined = "".join(TEXTS_AND_INVALID[i] + "\n" for i in chosen)
    result = {name: digest(tokenizer.encode(text)) for name, text in whole_texts().items()}
    return {**result, "texts": {**digest(tokenizer.encode(joined)), "of": chosen}}


def differs(path, made):
    """Compares with the file; WikiText-2 does not count where it is not here."""
    known, made = read_json(path), json.loads(json.dumps(made))
    for values, others in [(known, made), *((known[key], made[key]) for key in known if key in made)]:
        if isinstance(values, dict) and WIKI not in others:
            values.pop(WIKI, None)
    wrong = sorted(key for key in {*known, *made} if known.get(key) != made.get(key))
    print(f"tokenizers/{os.path.relpath(path, GOLDEN)}: {'differs in ' + ', '.join(wrong) if wrong else 'equal'}")
    return bool(wrong)


def main(arguments):
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    logging.set_verbosity_error()
    check = "--check" in arguments
    made = {}
    texts = whole_texts()[BOOK][:60000].split("\n") + TEXTS * 3
    for family, make in TRAINED.items():
        folder = os.path.join(GOLDEN, family)
        if not check:
            make(folder, texts)
        made[os.path.join(folder, "golden.json")] = golden(folder)
    if os.path.exists(SDIST):
        vectors = real_vocabularies()
        made[os.path.join(GOLDEN, "real.json")] = {family: real_golden(family, vectors[family]) for family in REAL}
    if check:
        return 1 if sum(differs(path, value) for path, value in made.items()) else 0
    for path, value in made.items():
        write(path, value)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
