"""The files of the tokenizers that make_golden_tokenizers.py tests with, family by family.

Each has the normalizer, pre-tokenizer, decoder, post-processor and flags of the family's own files. TRAINED are
small ones, trained here; REAL have the vocabularies of the models, from the GGUF files of llama.cpp.
"""

import io
import json
import os

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, pre_tokenizers, trainers

SPACE = "\u2581"
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF and SentencePiece
VOCABULARY = 560

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
FALLBACK = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FALLBACK_MODEL = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}


def sequence(kind, *stages):
    return {"type": "Sequence", kind: list(stages)}


def split(pattern, behavior):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def gpt4(digits):
    """GPT-4's pattern, with how many digits stay together: Llama-3 three, Qwen2 one."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits +
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return sequence("pretokenizers", split({"Regex": pattern}, "Isolated"), {**BYTES, "use_regex": False})


# Normalizer and pre-tokenizer.
LLAMA_STAGES = sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, REPLACE), None
GEMMA_STAGES = REPLACE, split({"String": " "}, "MergedWithPrevious")
LLAMA3_STAGES = None, gpt4("{1,3}")
QWEN_STAGES = {"type": "NFC"}, gpt4("")


def template(ids, before=None, behind=None):
    def special(token):
        return [{"SpecialToken": {"id": token, "type_id": 0}}] if token else []
    single = [*special(before), {"Sequence": {"id": "A", "type_id": 0}}, *special(behind)]
    return {"type": "TemplateProcessing", "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                               for token in (before, behind) if token}}


def added(content, i, **flags):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True, **flags}


def behind(vocabulary, contents, **flags):
    """Added tokens with the ids behind the vocabulary."""
    return [added(content, len(vocabulary) + i, **flags) for i, content in enumerate(contents)]


def tokenizer_json(vocabulary, merges, tokens, stages, decoder, post_processor=None, **model):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             **model, "vocab": vocabulary, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
            "normalizer": stages[0], "pre_tokenizer": stages[1], "post_processor": post_processor,
            "decoder": decoder, "model": model}


def write(path, content):
    """Bytes, text, or a value as JSON."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    with open(path, "wb") as out:
        out.write(content if isinstance(content, bytes) else content.encode())


def save(folder, tokenizer, **config):
    write(os.path.join(folder, "tokenizer.json"), tokenizer)
    write(os.path.join(folder, "tokenizer_config.json"), config)


def save_gpt2(folder, vocabulary, merges):
    write(os.path.join(folder, "vocab.json"), vocabulary)
    write(os.path.join(folder, "merges.txt"), "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write(os.path.join(folder, "config.json"), {"model_type": "gpt2"})


# ---- trained here. `texts` is what they are trained on.

def train(texts, stages, first=(), size=VOCABULARY, **options):
    """Vocabulary and merges behind a normalizer and a pre-tokenizer; `first` get the lowest ids."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json({}, [], [], stages, FALLBACK[2])))
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, max_token_length=16, **options)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learned = sorted(set(model["vocab"]) - set(first), key=model["vocab"].get)
    merges = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & set(first)]
    return {token: i for i, token in enumerate([*first, *learned])}, merges


def train_bytes(texts, stages, **options):
    return train(texts, stages, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)


def train_fallback(texts, stages, specials):
    """As SentencePiece does it: few characters have tokens, the others are bytes."""
    return train(texts, stages, [*specials, *(f"<0x{byte:02X}>" for byte in range(256))], limit_alphabet=110)


def llama3(folder, texts):
    vocabulary, merges = train_bytes(texts, LLAMA3_STAGES)
    del merges[3::5]  # Llama-3, too, has words that no merge leads to: ignore_merges finds them whole
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    tokens = behind(vocabulary, [begin, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", end])
    post = sequence("processors", {**BYTES, "trim_offsets": False}, template({begin: len(vocabulary)}, begin))
    save(folder, tokenizer_json(vocabulary, merges, tokens, LLAMA3_STAGES, BYTES, post, ignore_merges=True),
         bos_token=begin, eos_token=end, tokenizer_class="PreTrainedTokenizerFast")


def qwen(folder, texts):
    vocabulary, merges = train_bytes(texts, QWEN_STAGES)
    special, plain = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>"]
    tokens = behind(vocabulary, special + plain)
    for token in tokens[3:]:
        token["special"] = False
    # tokenizer_config.json has the tokens of tokenizer.json once more, and one that is only there.
    everything = [*tokens, added("</tool_call>", len(vocabulary) + len(tokens), special=False)]
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in everything}
    save(folder, tokenizer_json(vocabulary, merges, tokens, QWEN_STAGES, BYTES, {**BYTES, "use_regex": False},
                                continuing_subword_prefix="", end_of_word_suffix=""),
         add_bos_token=False, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
         tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=decoder)


def gpt2(folder, texts):
    vocabulary, merges = train_bytes(texts, (None, BYTES))
    save_gpt2(folder, {**vocabulary, "<|endoftext|>": len(vocabulary)}, merges)


def save_llama(folder, texts, stages, specials, before, post_processor=True, string_merges=False, **flags):
    vocabulary, merges = train_fallback(texts, stages, specials)
    tokens = [added(token, vocabulary[token], **flags.get(token, {})) for token in specials]
    post = template(vocabulary, before if post_processor else None)
    if string_merges:  # as files had them before tokenizers 0.20
        merges = [" ".join(pair) for pair in merges]
    save(folder, tokenizer_json(vocabulary, merges, tokens, stages, sequence("decoders", *FALLBACK, STRIP), post,
                                **FALLBACK_MODEL),
         add_bos_token=post_processor, add_eos_token=False, bos_token=before, eos_token=specials[2],
         unk_token="<unk>", tokenizer_class="LlamaTokenizer")


def mistral(folder, texts):
    save_llama(folder, texts, LLAMA_STAGES, ["<unk>", "<s>", "</s>"], "<s>")


def mistral3(folder, texts):
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    save_llama(folder, texts, (None, metaspace), ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>")


def yi(folder, texts):
    """Some tokens are normalized: "<unk>" is looked for as "▁<unk>"."""
    specials = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|im_start|>", "<|im_end|>"]
    flags = {token: {"normalized": True} for token in (*specials[:3], "<|im_end|>")}
    save_llama(folder, texts, LLAMA_STAGES, specials, specials[1], post_processor=False, string_merges=True,
               **flags, **{"<|Human|>": {"special": False}})


def gemma(folder, texts):
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    plain = ["<unused0>", "<unused1>", "<unused12>", "\n\n", "\n\n\n", SPACE * 2, SPACE * 3,
             "<table>", "<td>", "</td>", "</table>"]
    vocabulary, merges = train_fallback(texts, GEMMA_STAGES, specials + plain)
    tokens = [added(token, vocabulary[token], special=token in specials) for token in specials + plain]
    save(folder, tokenizer_json(vocabulary, merges, tokens, GEMMA_STAGES, sequence("decoders", *FALLBACK),
                                template(vocabulary, "<bos>"), **FALLBACK_MODEL),
         add_bos_token=True, add_eos_token=False, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
         tokenizer_class="GemmaTokenizer")


def words(folder, texts):
    """Metaspace as it is by default, unknown tokens that are not fused, and a template with EOS."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always"}
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary, merges = train(texts, (None, metaspace), specials, size=300, limit_alphabet=90)
    # Merges across words, which splitting keeps from being made.
    for pair in (("e", SPACE + "t"), ("d", SPACE + "a")):
        vocabulary["".join(pair)] = len(vocabulary)
        merges.insert(0, list(pair))
    tokens = [added(token, vocabulary[token]) for token in specials]
    save(folder, tokenizer_json(vocabulary, merges, tokens, (None, metaspace), metaspace,
                                template(vocabulary, "<s>", "</s>"), unk_token="<unk>"),
         bos_token="<s>", eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")


def flags(folder, texts):
    """Every flag of added tokens, behind two normalizers, three splits, and a space before each piece."""
    exclamation = {"type": "Replace", "pattern": {"String": "\uff01"}, "content": "!"}
    stages = (sequence("normalizers", {"type": "NFC"}, exclamation),
              sequence("pretokenizers", split({"String": ","}, "MergedWithPrevious"),
                       {"type": "Digits", "individual_digits": True}, {**BYTES, "add_prefix_space": True}))
    vocabulary, merges = train_bytes(texts, stages, size=300)
    of_token = {
        "word": {"single_word": True}, "cut": {"lstrip": True}, "keep": {"rstrip": True},
        "<both>": {"lstrip": True, "rstrip": True, "special": False},
        "CAFE\u0301": {"normalized": True, "special": False}, "nai\u0308ve": {"normalized": True, "special": False},
        "kept": {"normalized": True, "special": False}, "Half\uff01": {"normalized": True, "single_word": True},
        " x": {"special": False}, "caf": {"special": False}}
    tokens = [added(token, len(vocabulary) + i, **its) for i, (token, its) in enumerate(of_token.items())]
    save(folder, tokenizer_json(vocabulary, merges, tokens, stages, BYTES),
         tokenizer_class="PreTrainedTokenizerFast")


def sentencepiece_model(folder, texts, config, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in texts if "\0" not in text), model_writer=model,
        model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, character_coverage=0.99,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2, **options)
    write(os.path.join(folder, "tokenizer.model"), model.getvalue())
    write(os.path.join(folder, "tokenizer_config.json"), {"add_bos_token": True, **config})


def model_llama(folder, texts):
    sentencepiece_model(folder, texts, {"tokenizer_class": "LlamaTokenizer", "legacy": True})


def model_llama_first(folder, texts):
    sentencepiece_model(folder, texts, {"tokenizer_class": "LlamaTokenizer", "legacy": False},
                        user_defined_symbols=["[INST]", "[/INST]"])


def model_gemma(folder, texts):
    sentencepiece_model(folder, texts, {"tokenizer_class": "GemmaTokenizer"}, add_dummy_prefix=False,
                        pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>",
                        control_symbols=["<mask>"],
                        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n\n"])


TRAINED = {"llama-3": llama3, "qwen": qwen, "gpt2": gpt2, "mistral": mistral, "mistral-v0.3": mistral3, "yi": yi,
           "gemma": gemma, "words": words, "flags": flags, "model-llama": model_llama,
           "model-llama-first": model_llama_first, "model-gemma": model_gemma}


# ---- real vocabularies, from the fields tokens, token_type, scores and merges of a GGUF file.

def tokens_behind(tokens, types, count):
    """The model's own vocabulary, and the tokens added to it; what fills up the embedding is neither."""
    return {token: i for i, token in enumerate(tokens[:count])}, [
        added(token, i, special=types[i] == CONTROL)
        for i, token in enumerate(tokens) if i >= count and not token.startswith("[PAD")]


def real_llama3(folder, tokens, types, scores, merges):
    vocabulary, extra = tokens_behind(tokens, types, 128000)
    begin = "<|begin_of_text|>"
    post = sequence("processors", BYTES, template({begin: 128000}, begin))
    save(folder, tokenizer_json(vocabulary, merges, extra, LLAMA3_STAGES, BYTES, post, ignore_merges=True),
         bos_token=begin, eos_token="<|end_of_text|>", tokenizer_class="PreTrainedTokenizerFast")


def real_qwen2(folder, tokens, types, scores, merges):
    vocabulary, extra = tokens_behind(tokens, types, 151643)
    save(folder, tokenizer_json(vocabulary, merges, extra, QWEN_STAGES, BYTES, BYTES), add_bos_token=False,
         eos_token="<|endoftext|>", tokenizer_class="Qwen2Tokenizer")


def real_gpt2(folder, tokens, types, scores, merges):
    save_gpt2(folder, {token: i for i, token in enumerate(tokens)}, (merge.split(" ") for merge in merges))


def real_gemma4(folder, tokens, types, scores, merges):
    vocabulary = {token: i for i, token in enumerate(tokens)}
    extra = [added(token, i, special=types[i] == CONTROL)
             for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)]
    save(folder, tokenizer_json(vocabulary, merges, extra, GEMMA_STAGES, sequence("decoders", *FALLBACK),
                                template(vocabulary, "<bos>"), **FALLBACK_MODEL),
         bos_token="<bos>", eos_token="<eos>", tokenizer_class="GemmaTokenizer")


def real_llama2(folder, tokens, types, scores, merges):
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.remove_extra_whitespaces = False
    write(os.path.join(folder, "tokenizer.model"), model.SerializeToString())
    write(os.path.join(folder, "tokenizer_config.json"),
          {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"})


# Family: the name in ggml-vocab-<name>.gguf, and who writes it.
REAL = {"gpt2": ("gpt-2", real_gpt2), "llama-2": ("llama-spm", real_llama2), "llama-3": ("llama-bpe", real_llama3),
        "qwen2": ("qwen2", real_qwen2), "gemma-4": ("gemma-4", real_gemma4)}
