"""What lm-eval wrote of a task, as items of kvqbench (accuracy/samples.h) and as a benchmark of a results file.

A cell's folder has samples.jsonl and results.jsonl, which lm-eval wrote, and requests.jsonl (ci/lm_eval_client.py). Its
items: `right` is the task's score of one item (acc, exact_match, RULER's share of the length, or the first metric that
lies in 0..1), `nll` that of the right answer in nats a token, `margin` of a choice the log-probability of the right answer
over that of the best wrong one, `encoded_share` what the server said of the cache that answered. Of several filters (as
gsm8k's) the task's first counts.
"""

import hashlib
import json
import math
import os

import numpy
from scipy import stats

FIRST = ("acc", "exact_match", "em", "pass@1")  # of several metrics


class Refused(Exception):
    """What lm-eval wrote and this cannot read, and why."""


def lines(folder, name):
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(text) for text in file]
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}; remove {folder} to run it again") from None


def key(*arguments):
    """As ci/lm_eval_client.py makes it."""
    return hashlib.sha256(json.dumps(arguments, ensure_ascii=False).encode()).hexdigest()


def texts_of(sample):
    """[(context, continuation)], of generations (context,), of rolling ones (text,): of lm-eval's arguments the texts."""
    requests = sample["arguments"]
    requests = [requests[f"gen_args_{i}"] for i in range(len(requests))]
    return [tuple(request[name] for name in ("arg_0", "arg_1") if isinstance(request.get(name), str))
            for request in requests]


def is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def right_of(sample):
    of_length = str(sample["doc"].get("max_length")) if isinstance(sample["doc"], dict) else ""
    for name in (*FIRST, of_length, *sample["metrics"]):
        if name in sample["metrics"] and is_share(sample.get(name)):
            return float(sample[name])
    return None


def item_of(sample, asked):
    """One line, without its benchmark. `asked`: {key: line of requests.jsonl}."""
    name = str(sample["doc_id"])
    texts = texts_of(sample)
    try:
        requests = [asked[key(*text)] for text in texts]
    except KeyError:
        raise Refused(f"item {name} has a request that the client did not send") from None
    answers = [answer for request in requests for answer in request["answers"]]
    whole = requests[0]["prompt_sha256"] if len(requests) == 1 else \
        hashlib.sha256("".join(request["prompt_sha256"] for request in requests).encode()).hexdigest()
    item = {"sample": name, "cluster": name, "prompt_sha256": whole}
    right = right_of(sample)
    if right is not None:
        item["right"] = right
    # Log-likelihoods: the first of each request's answer, which lm-eval writes as text.
    if len(texts[0]) == 2 or "arg_1" not in sample["arguments"]["gen_args_0"]:
        firsts = [response[0] for response in sample["resps"]]
        values = [float(first[0] if isinstance(first, list) else first) for first in firsts]
        if not all(math.isfinite(value) for value in values):
            raise Refused(f"item {name} has a log-likelihood that is not finite")
        gold = 0 if len(values) == 1 else int(sample["target"]) if str(sample["target"]).isdigit() else None
        if gold is not None and gold < len(values):
            item["nll"] = -values[gold] / max(requests[gold]["scored"], 1)
            if len(values) > 1:
                item["margin"] = values[gold] - max(value for i, value in enumerate(values) if i != gold)
                item["answer"] = str(values.index(max(values)))
    else:
        answer = sample["filtered_resps"][0]
        item["answer"] = answer if isinstance(answer, str) else json.dumps(answer)
        item["cut"] = int(any(answer.get("finish_reason") == "length" for answer in answers))
    shares = [answer.get("kv", {}).get("encoded_share") for answer in answers]
    if shares and all(is_share(share) for share in shares):
        item["encoded_share"] = sum(shares) / len(shares)
    item["tokens"] = max(request["tokens"] for request in requests)
    item["lost_tokens"] = sum(request["tokens"] - request["sent"] for request in requests)
    return item


def convert(folder):
    """(items, facts): facts of the whole cell: what the server said of its cache, and its bytes a token."""
    asked = {line["request"]: line for line in lines(folder, "requests.jsonl")}
    samples = lines(folder, "samples.jsonl")
    if not samples:
        raise Refused(f"{folder}: lm-eval wrote no sample")
    results = lines(folder, "results.jsonl")[0]
    of_task = next(iter(results["results"].values()))
    filters = [name.split(",", 1)[1] for name in of_task if "," in name and "_stderr" not in name]
    used = {sample["filter"] for sample in samples}
    first = next((name for name in filters if name in used), samples[0]["filter"])
    try:
        items = [item_of(sample, asked) for sample in samples if sample["filter"] == first]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Refused(f"{folder}: no samples of lm-eval 0.4.13: {error!r}") from None
    said = [answer["kv"] for line in asked.values() for answer in line["answers"] if answer.get("kv")]
    facts = {"filter": first, "lm_eval": results.get("lm_eval_version", "?")}
    if said:
        constant = {name: value for name, value in said[0].items() if isinstance(value, str)}
        facts["cache"] = {name: value for name, value in constant.items() if all(kv.get(name) == value for kv in said)}
        stored = sum(kv.get("tokens", 0) for kv in said)
        if stored:
            facts["kv_bytes_per_token"] = sum(kv.get("kv_bytes", 0) for kv in said) / stored
            facts["encoded_tokens"] = sum(kv.get("encoded_tokens", 0) for kv in said)
            facts["stored_tokens"] = stored
    return items, facts


def interval(values, low=-math.inf):
    """Student's of a mean, 95 %."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * numpy.std(values, ddof=1) / math.sqrt(len(values))
    return max(low, float(numpy.mean(values) - half)), float(numpy.mean(values) + half)


def counters(items, facts):
    """Of one benchmark."""
    found = {}

    def add(name, values, scale=1, low=-math.inf):
        if not values:
            return
        found[name] = scale * float(numpy.mean(values))
        if name == "score" and all(value in (0, 1) for value in values):
            wilson = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
            ends = wilson.low, wilson.high
        else:
            ends = interval(values, low)
        if ends:
            found[name + "_lo"], found[name + "_hi"] = scale * float(ends[0]), scale * float(ends[1])
    for name, of, scale, low in (("score", "right", 100, 0), ("gold_nll", "nll", 1, 0), ("margin", "margin", 1, -math.inf)):
        add(name, [item[of] for item in items if of in item], scale, low)
    shares = [item["encoded_share"] for item in items if "encoded_share" in item]
    if shares:
        found["encoded_share"] = float(numpy.mean(shares))
    tokens = [item["tokens"] for item in items]
    found |= {"samples": len(items), "prompt_tokens": float(numpy.mean(tokens)), "prompt_tokens_min": min(tokens),
              "prompt_tokens_max": max(tokens),
              "shortened_share": float(numpy.mean([item["lost_tokens"] > 0 for item in items]))}
    if "cut" in items[0]:
        found["truncated_share"] = float(numpy.mean([item["cut"] for item in items]))
        found["empty_share"] = float(numpy.mean([not item["answer"].strip() for item in items]))
    for name in ("kv_bytes_per_token", "encoded_tokens", "stored_tokens"):
        if name in facts:
            found[name] = facts[name]
    return found
