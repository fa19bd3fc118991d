#!/usr/bin/env python3
"""Makes accuracy/golden/ruler.json: hashes of the prompts that RULER's own scripts write, and their answers.

usage: make_golden_ruler.py RULER [--check]

RULER is a checkout of NVIDIA/RULER (c3f5e3b). Its scripts run as they are, with SmolLM2's tokenizer from the cache, but
for what cannot be had: the essays are Pride and Prejudice, split into sentences by the regular expression below where
RULER has NLTK's (so do niah_single_2 and the others of essays in kvqbench), and questions are asked about
golden/ruler/*.json, which `documents` below makes up. transformers is imported before a script begins: version 5 imports
`rich`, which draws a number from the generator that the script has just seeded, and version 4.44.2, RULER's own, does not.
Packages: transformers and numpy as in accuracy/requirements.txt (or RULER's), wonderwords 3.0.1, scipy, tenacity, tqdm.
"""

import concurrent.futures
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile

import golden_files

CACHE = os.environ.get("KVQ_CACHE") or os.path.expanduser("~/.cache/kvqbench")
SAMPLES = 3
NLTK = '''import re
def sent_tokenize(text):
    return re.split(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))(?<!Mr\\.)(?<!Mrs\\.)(?<!Dr\\.)(?<!St\\.) """, text)
'''


def niah(haystack, keys="words", values="numbers", k=1, v=1, q=1):
    return "niah", {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values, "num_needle_k": k,
                    "num_needle_v": v, "num_needle_q": q}


def vt(hops):
    return "variable_tracking", {"type_haystack": "noise", "num_chains": 1, "num_hops": hops}


# scripts/synthetic.yaml, then the easier rungs.
TASKS = {
    "niah_single_1": niah("noise"), "niah_single_2": niah("essay"), "niah_single_3": niah("essay", values="uuids"),
    "niah_multikey_1": niah("essay", k=4), "niah_multikey_2": niah("needle"),
    "niah_multikey_3": niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": niah("essay", v=4), "niah_multiquery": niah("essay", q=4), "vt": vt(4),
    "cwe": ("common_words_extraction", {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10}),
    "fwe": ("freq_words_extraction", {"alpha": 2.0}),
    "qa_1": ("qa", {"dataset": "squad"}), "qa_2": ("qa", {"dataset": "hotpotqa"}),
    "niah_keys_2": niah("noise", k=2), "niah_keys_4": niah("noise", k=4), "niah_keys_8": niah("noise", k=8),
    "vt_hops_1": vt(1), "vt_hops_2": vt(2), "vt_hops_3": vt(3),
}
LENGTHS = (1024, 2048, 4096)


def documents():
    """Questions about made-up documents, in the formats of SQuAD and of HotpotQA."""
    draw = random.Random(7)
    names = ["Aldwin", "Berta", "Corvin", "Doris", "Egon", "Frida", "Gustav", "Hanna", "Ivo", "Jutta"]
    towns = ["Lund", "Parma", "Ghent", "Tartu", "Braga", "Cork", "Bergen", "Olomouc", "Zadar", "Nîmes"]
    squad, hotpot = [], []
    for article in range(12):
        paragraphs = []
        for _ in range(5):
            name, town, year = draw.choice(names), draw.choice(towns), draw.randrange(1500, 1900)
            context = f"{name} {article}-{len(paragraphs)} was born in {town} in {year}, and left it {draw.randrange(9)} years later."
            answers = [{"text": town, "answer_start": 0}, {"text": f"in {town}", "answer_start": 0}]
            paragraphs.append({"context": context, "qas": [
                {"question": f"Where was {name} born?", "is_impossible": False, "answers": answers},
                {"question": "Who was he?", "is_impossible": True, "answers": []}]})
        squad.append({"title": f"Article {article}", "paragraphs": paragraphs})
        pages = [[f"{draw.choice(names)} {article}.{i}", [f"He lived in {draw.choice(towns)}.", f" He wrote {draw.randrange(99)} books."]]
                 for i in range(10)]
        hotpot.append({"question": f"How many books did {pages[0][0]} write?", "answer": pages[0][1][1].split()[2],
                       "context": pages})
    return {"ruler/squad.json": {"data": squad}, "ruler/hotpotqa.json": hotpot}


def prepare(ruler, folder, files):
    """The scripts of RULER in a folder of their own, with what they read."""
    shutil.copytree(os.path.join(ruler, "scripts", "data"), folder, dirs_exist_ok=True)
    with open(os.path.join(CACHE, "texts", "pride-and-prejudice.txt"), encoding="utf-8") as file:
        essays = {"text": file.read()}
    for name, data in (("PaulGrahamEssays", essays), ("english_words", {}), ("squad", files["ruler/squad.json"]),
                       ("hotpotqa", files["ruler/hotpotqa.json"])):
        with open(os.path.join(folder, "synthetic", "json", name + ".json"), "w", encoding="utf-8") as out:
            json.dump(data, out)
    os.makedirs(os.path.join(folder, "nltk"))
    for name, text in (("nltk/__init__.py", ""), ("nltk/tokenize.py", NLTK),
                       ("sitecustomize.py", "from transformers import AutoTokenizer\n")):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
            out.write(text)
    sys.path.insert(0, os.path.join(folder, "synthetic"))
    import constants  # of RULER
    return constants.TASKS


def run(folder, bases, task, length):
    script, settings = TASKS[task]
    base = bases[script]
    command = [sys.executable, os.path.join(folder, "synthetic", script + ".py"), "--save_dir", os.path.join(folder, str(length)),
               "--save_name", task, "--tokenizer_path", os.path.join(CACHE, "models", "smollm2-135m"), "--tokenizer_type", "hf",
               "--max_seq_length", str(length), "--tokens_to_generate", str(base["tokens_to_generate"]),
               "--num_samples", str(SAMPLES), "--random_seed", "42", "--template", base["template"] + base["answer_prefix"]]
    for name, value in settings.items():
        command += ["--" + name, str(value)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": folder, "TOKENIZERS_PARALLELISM": "false"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{task} at {length}: {done.stderr.strip().splitlines()[-1]}")
    with open(os.path.join(folder, str(length), task, "validation.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"sha256": hashlib.sha256((row["input"] + row["answer_prefix"]).encode()).hexdigest(),
             "outputs": row["outputs"], "length": row["length"]} for row in rows]


def cases():
    for length in LENGTHS:
        for task in TASKS:
            # RULER draws places for eight needles among five lines there, and ends.
            if (task == "niah_keys_8" and length < 4096) or (task.startswith("qa") and length > 2048):
                continue
            yield task, length


def main(arguments):
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    files = documents()
    with tempfile.TemporaryDirectory() as folder:
        bases = prepare(arguments[0], folder, files)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            made = {case: pool.submit(run, folder, bases, *case) for case in cases()}
            files["ruler.json"] = {f"{task}/{length}": rows.result() for (task, length), rows in made.items()}
    return golden_files.write_or_check(files, arguments[1:] == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
