"""A cloze of Jane Austen's novels: a passage that ends with a sentence, whose last word is asked for, a name. As in LAMBADA
(Paperno et al. 2016, arXiv:1606.06031), most of whose words are names, the passage says it before: here twice at least
outside its newest words, which a cache with a residual window keeps in 16 bit."""

import random
import re

import datasets

NEWEST = 110  # words: more than the 128 tokens of the usual residual
OFTEN = 2
TITLE = r"\b(Mr|Mrs|Dr|St|Esq)\.$"  # ends no sentence


def paragraphs(text):
    """Lines of a paragraph joined, italics' underscores dropped, headings of chapters left out."""
    found = [" ".join(part.split()).replace("_", "") for part in re.split(r"\n\s*\n", text)]
    return [part for part in found if part and not re.match(r"(chapter|volume)\b", part, re.IGNORECASE)]


def bare(word):
    return re.sub(r"[^a-z]", "", word.lower())


def passages(text, words, chance):
    """Of disjoint stretches of so many words, the passage and the word of one sentence's end, where one fits."""
    stream = [part for paragraph in paragraphs(text) for part in re.findall(r"\S+", paragraph)]
    for begin in range(0, len(stream) - 2 * words, 2 * words):
        fitting = []
        for at in range(begin + words, begin + 2 * words):
            found = re.fullmatch(r"([A-Z][a-z]{2,})[.!?;]\W*", stream[at])
            if not found or re.search(TITLE, stream[at]):
                continue
            first = re.search(r"[.!?]\W*$", stream[at - 1]) and not re.search(TITLE, stream[at - 1])  # of its sentence
            if not first and [bare(word) for word in stream[at - words:at - NEWEST]].count(found[1].lower()) >= OFTEN:
                fitting.append((at, found[1]))
        if fitting:
            at, word = chance.choice(fitting)
            yield {"passage": " ".join(stream[at - words:at]), "word": word, "at": at}


def cloze(context=512, seed=42, texts=None, **_):
    """`texts`: {novel: file}. `context`: tokens, of which four make about three words."""
    words = context * 3 // 4
    chance, docs = random.Random(seed), []
    for novel, path in sorted(texts.items()):
        with open(path, encoding="utf-8") as file:
            docs += [{"novel": novel, **doc} for doc in passages(file.read(), words, chance)]
    chance.shuffle(docs)
    return {"test": datasets.Dataset.from_list(docs)}
