"""What ci/lm-eval runs in its virtual environment: lm-eval's local-completions model against a server that is there.

usage: lm_eval_client.py JOB.json

JOB: base_url, model, tokenizer (a folder, or null: the server's own), probe and probe_ids (a text, and the server's tokens
of it), add_bos, max_length, batch, concurrent, seed, include_path, check (only whether every task is there), and cells:
[{out, task, limit, fewshot, metadata}]. Of each cell, in the folder `out`: lm-eval's samples as it writes them
(samples.jsonl), its results (results.jsonl: on one line), and requests.jsonl, which says of every request the tokens that
were sent and what the server said of the cache that answered. results.jsonl comes last: a cell that has it is whole.
"""

import contextvars
import hashlib
import json
import logging
import os
import sys
import tempfile

import aiohttp
import lm_eval
import requests
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager


def fail(text):
    print(f"lm-eval: {text}", file=sys.stderr)
    raise SystemExit(2)


def key(*arguments):
    """Of a request in samples.jsonl, too."""
    return hashlib.sha256(json.dumps(arguments, ensure_ascii=False).encode()).hexdigest()


def prompt_sha256(ids):
    """As PromptSha256 of accuracy/samples.h."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little", signed=True) for token in ids)).hexdigest()


class Client(LocalCompletionsAPI):
    """local-completions, which keeps of each answer what lm-eval throws away."""
    sent = contextvars.ContextVar("sent")  # the prompts of the call at hand; calls may overlap
    answers = {}                           # by the prompt's tokens
    windows = []                           # of the rolling request at hand

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.said = {}  # by key

    def model_call(self, messages, **arguments):
        self.sent.set(messages)
        return super().model_call(messages=messages, **arguments)

    async def amodel_call(self, *arguments, messages, **more):
        self.sent.set(messages)
        return await super().amodel_call(*arguments, messages=messages, **more)

    @classmethod
    def note(cls, outputs):
        outputs = outputs if isinstance(outputs, list) else [outputs]
        choices = [{"kv": output.get("kv"), **choice} for output in outputs
                   for choice in sorted(output["choices"], key=lambda choice: choice["index"])]
        for ids, choice in zip(cls.sent.get(), choices, strict=True):
            kept = {name: choice[name] for name in ("kv", "finish_reason") if choice.get(name) is not None}
            # A call that is tried again after an error tells the same.
            cls.answers[tuple(ids)] = kept

    @staticmethod
    def parse_logprobs(outputs, **arguments):
        Client.note(outputs)
        return LocalCompletionsAPI.parse_logprobs(outputs=outputs, **arguments)

    @staticmethod
    def parse_generations(outputs, **arguments):
        Client.note(outputs)
        return LocalCompletionsAPI.parse_generations(outputs=outputs, **arguments)

    def keep(self, name, parts, scored, tokens=None):
        """parts: the token lists that were sent for one request of so many `tokens`, of which `scored` were."""
        sent = sum(map(len, parts))
        self.said[name] = {"request": name, "prompt_sha256": prompt_sha256([token for ids in parts for token in ids]),
                           "tokens": tokens or sent, "sent": sent, "scored": scored,
                           "answers": [self.answers[tuple(ids)] for ids in parts]}

    def _loglikelihood_tokens(self, requests, **arguments):
        found = super()._loglikelihood_tokens(requests, **arguments)
        for texts, context, continuation in requests:
            ids = (context + continuation)[-self.max_length:]
            if texts is None:
                self.windows.append((ids, min(len(continuation), len(ids) - 1)))
            else:
                self.keep(key(*texts), [ids], min(len(continuation), len(ids) - 1), len(context) + len(continuation))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        found = []
        for request in requests:
            self.windows.clear()
            found += super().loglikelihood_rolling([request], disable_tqdm)
            self.keep(key(*request.args), [ids for ids, _ in self.windows], sum(scored for _, scored in self.windows))
        return found

    def generate_until(self, requests, disable_tqdm=False):
        found = super().generate_until(requests, disable_tqdm)
        for request, text in zip(requests, found, strict=True):
            context, how = request.args
            room = self.max_length - how.get("max_gen_toks", self._max_gen_toks)
            whole = self.tok_encode(context)
            self.keep(key(context), [whole[-room:]], len(self.tok_encode(text)), len(whole))
        return found


def client_of(job):
    tokenizer = {"tokenizer": job["tokenizer"], "tokenizer_backend": "huggingface"} if job["tokenizer"] else \
        {"tokenizer_backend": "remote"}
    client = Client(model=job["model"], base_url=job["base_url"] + "/v1/completions", max_length=job["max_length"],
                    batch_size=job["batch"], num_concurrent=job["concurrent"], seed=job["seed"], timeout=86400,
                    add_bos_token=job["add_bos"], **tokenizer)
    if client.tokenizer_backend == "huggingface":
        ids = client.tokenizer(job["probe"], add_special_tokens=False).input_ids
        if ids != job["probe_ids"]:
            fail(f"{job['tokenizer']}: transformers makes other tokens of its files than the server does")
    return client


def run(job, client, cell):
    folder = cell["out"]
    manager = manager_of(job, {**cell["metadata"], "tokenizer": job["tokenizer"]})
    client.said.clear()
    client.answers.clear()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tracker = EvaluationTracker(output_path=scratch)
        tracker.general_config_tracker.model_name_sanitized = "m"
        results = lm_eval.simple_evaluate(
            client, tasks=[cell["task"]], num_fewshot=cell["fewshot"], limit=cell["limit"], bootstrap_iters=0,
            log_samples=True, task_manager=manager, random_seed=job["seed"], numpy_random_seed=job["seed"],
            torch_random_seed=job["seed"], fewshot_random_seed=job["seed"])
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples)
        # In the order of the items, whatever that of the answers was.
        lines = sorted(samples[cell["task"]], key=lambda line: (line["filter"], line["doc_id"]))
        tracker.save_results_samples(cell["task"], lines)
        with open(os.path.join(scratch, "requests"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for _, line in sorted(client.said.items()))
        written = {entry.name.split("_")[0]: entry.path for entry in os.scandir(os.path.join(scratch, "m"))}
        os.replace(written["samples"], os.path.join(folder, "samples.jsonl"))
        os.replace(os.path.join(scratch, "requests"), os.path.join(folder, "requests.jsonl"))
        with open(written["results"], encoding="utf-8") as file:
            line = json.dumps(json.load(file))
        with open(written["results"], "w", encoding="utf-8") as file:
            file.write(line + "\n")
        os.replace(written["results"], os.path.join(folder, "results.jsonl"))


def manager_of(job, metadata=None):
    """Of our own tasks and RULER's where they are enough: to read all of lm-eval's takes five seconds."""
    ruler = os.path.join(os.path.dirname(lm_eval.__file__), "tasks", "ruler")
    manager = TaskManager(include_path=[ruler, *job["include_path"]], include_defaults=False, metadata=metadata)
    if all(cell["task"] in manager.all_tasks for cell in job["cells"]):
        return manager
    return TaskManager(include_path=job["include_path"], metadata=metadata)


def main(path):
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = manager_of(job)
    for cell in job["cells"]:
        if cell["task"] not in manager.all_subtasks:
            a_group = cell["task"] in manager.all_tasks
            fail(f"--tasks: '{cell['task']}' is " +
                 ("a group: name its tasks" if a_group else "none of lm-eval's, nor of --include-path"))
    if job["check"]:
        return
    client = client_of(job)
    for cell in job["cells"]:
        try:
            run(job, client, cell)
        except (requests.RequestException, aiohttp.ClientError):
            raise  # the server's, with its log
        except (ValueError, OSError, AssertionError) as error:
            fail(f"{cell['task']}: {' '.join(str(error).split()) or type(error).__name__}")
        print(f"lm-eval: {cell['task']} is done", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
