#!/usr/bin/python3
"""kvqserve as its clients see it: every row of vLLM's requests and answers that it has, kvqbench's own perplexity on the same
ids, clients that come together, go away, send too much, or nonsense."""

import array
import concurrent.futures
import ctypes
import glob
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
SERVE = os.environ["KVQ_SERVE_EXE"]
BENCH = os.environ["KVQ_BENCH_EXE"]
DEVICE = "--device=" + os.environ.get("KVQ_SERVE_DEVICE", "cpu")  # cuda: all of it on a GPU
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TEXT = "The capital of France is Paris. Grüße, 世界! " * 40


def write_tiny_model(path):
    """The tiny model of the parity tests with the tokenizer of the tokenizer tests, its heads widened to 64 channels, which
    schemes can encode, on random weights, and with room for 2048 tokens."""
    golden = os.path.join(HERE, "golden")
    shutil.copytree(os.path.join(golden, "models", "llama-mha"), path)
    shutil.copytree(os.path.join(golden, "tokenizer"), path, dirs_exist_ok=True)
    with open(os.path.join(path, "model.safetensors"), "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    numbers = random.Random(11)
    data, entries = b"", {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = list(entry["shape"])
        if any(word in name for word in ("q_proj", "k_proj", "v_proj")):
            shape[0] *= 8
        if "o_proj" in name:
            shape[1] *= 8
        norm = len(shape) == 1
        tensor = array.array("f", (1.0 if norm else 0.3 * numbers.gauss(0, 1) for _ in range(math.prod(shape)))).tobytes()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
    text = json.dumps(entries).encode()
    with open(os.path.join(path, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
    for name, changes in (("config.json", {"head_dim": 64, "max_position_embeddings": 2048}),
                          ("tokenizer_config.json", {"chat_template": CHATML})):
        with open(os.path.join(path, name)) as file:
            config = json.load(file)
        with open(os.path.join(path, name), "w") as file:
            json.dump({**config, **changes}, file)


class Server:
    def __init__(self, model, *flags):
        self.process = subprocess.Popen([SERVE, DEVICE, "--model=" + model, "--port=0", "--dtype=float32", "--kv-dtype=bfloat16", *flags],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("kvqserve: listening on http://127.0.0.1:"), line + self.process.stderr.read()
        self.port = int(line.rsplit(":", 1)[1])
        while self.get("/health")[0] != 200:
            time.sleep(0.01)

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, text, response.headers

    def get(self, path):
        status, text, _ = self.request("GET", path)
        return status, json.loads(text)

    def post(self, path, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text, _ = self.request("POST", path, data)
        return status, json.loads(text)

    def complete(self, **body):
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer

    def events(self, path, **body):
        status, text, headers = self.request("POST", path, json.dumps({**body, "stream": True}))
        assert status == 200 and headers["Content-Type"] == "text/event-stream", text
        events = text.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events
        return [json.loads(event[len("data: "):]) for event in events[:-2]]

    def stream(self, body):
        """The texts of a stream as they come; closed, the client is gone."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}))
        response = connection.getresponse()

        def texts():
            try:
                while (line := response.readline()) != b"data: [DONE]\n":
                    if line.startswith(b"data: "):
                        yield json.loads(line[len(b"data: "):])["choices"][0]["text"]
            finally:
                response.close()
                connection.close()
        return texts()

    def begin(self, body, headers=b""):
        """A request whose answer is not waited for."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=300)
        data = json.dumps(body).encode()
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (headers, len(data)) + data)
        return client

    def wait_for(self, **counts):
        for _ in range(3000):
            health = self.get("/health")[1]
            if all(health[key] == value for key, value in counts.items()):
                return
            time.sleep(0.01)
        raise AssertionError(f"{counts} did not come: {health}")

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


LONG = {"prompt": [[5, 6, 7]] * 1000, "max_tokens": 2000, "ignore_eos": True}


class Serve(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.model = os.path.join(cls.folder, "tiny")
        write_tiny_model(cls.model)
        cls.server = Server(cls.model, "--spec=int4-hqq@residual=16", "--body-mib=1")

    @classmethod
    def tearDownClass(cls):
        code = cls.server.end()
        shutil.rmtree(cls.folder)
        assert code == 0, code

    def refused(self, path, status, param=None, words="", **body):
        got, answer = self.server.post(path, body)
        self.assertEqual(got, status, answer)
        error = answer["error"]
        self.assertEqual(set(error), {"message", "type", "param", "code"})
        self.assertEqual((error["code"], error["param"]), (status, param), error)
        self.assertIn(words, error["message"])

    def test_models_say_what_is_served(self):
        model, = self.server.get("/v1/models")[1]["data"]
        self.assertEqual((model["id"], model["object"], model["max_model_len"]), ("tiny", "model", 2048))
        meta = model["meta"]
        self.assertEqual((meta["spec"], meta["residual"], meta["dtype"], meta["kv_dtype"]), ("int4-hqq@residual=16", "16", "Float", "BFloat16"))
        self.assertEqual(len(meta["model_sha256"]), 64)
        self.assertEqual(meta["n_vocab"], 420)

    def test_tokenize_and_back(self):
        status, answer = self.server.post("/tokenize", {"prompt": "Hello world", "return_token_strs": True})
        self.assertEqual((status, answer["tokens"][0], answer["count"], answer["max_model_len"]), (200, 1, len(answer["tokens"]), 2048))
        self.assertEqual(answer["token_strs"][0], "<|im_start|>")
        plain = self.server.post("/tokenize", {"prompt": "Hello world", "add_special_tokens": False})[1]["tokens"]
        self.assertEqual(plain, answer["tokens"][1:])
        self.assertEqual(self.server.post("/tokenize", {"content": "Hello world"})[1]["tokens"], plain)  # llama-server's default
        self.assertEqual(self.server.post("/tokenize", {"prompt": "<|im_end|>", "add_special_tokens": False})[1]["tokens"], [2])
        chat = self.server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})[1]["tokens"]
        text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        self.assertEqual(self.server.post("/detokenize", {"tokens": chat}), (200, {"prompt": text, "content": text}))
        info = self.server.get("/tokenizer_info")[1]
        self.assertEqual((info["bos_token"], info["eos_token"], info["chat_template"]), ("<|im_start|>", "<|im_end|>", CHATML))
        self.assertIn("tokenizer_class", info)
        self.refused("/detokenize", 400, "tokens", "420", tokens=[420])
        self.refused("/detokenize", 400, "tokens", "", tokens="x")
        self.refused("/tokenize", 400, "prompt", "", prompt=1)

    def test_completion_has_vllms_shape(self):
        answer = self.server.complete(model="tiny", prompt="Hello world", temperature=0, unknown_field={"x": 1})
        self.assertRegex(answer["id"], "^cmpl-[0-9a-f]{32}$")
        self.assertEqual((answer["object"], answer["model"]), ("text_completion", "tiny"))
        self.assertLess(abs(answer["created"] - time.time()), 600)
        choice, = answer["choices"]
        self.assertEqual(set(choice), {"index", "text", "logprobs", "finish_reason", "stop_reason"})
        self.assertEqual((choice["index"], choice["logprobs"], choice["finish_reason"], choice["stop_reason"]), (0, None, "length", None))
        tokens = len(self.server.post("/tokenize", {"prompt": "Hello world"})[1]["tokens"])
        usage = answer["usage"]
        self.assertEqual((usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]), (tokens, 16, tokens + 16))
        kv = answer["kv"]
        self.assertEqual((kv["spec"], kv["tokens"], kv["ran"]), ("int4-hqq@residual=16", tokens + 15, "sdpa on decoded tokens"))
        # Of 22 tokens the first 16 are encoded; 4 bits and two fp16 numbers for 64 channels, or 16 bits; 2 layers, 4 heads.
        stored = tokens + 15
        self.assertEqual(kv["encoded_tokens"], (stored - 1) // 16 * 16)
        self.assertEqual(kv["kv_bytes"], 2 * 2 * 4 * ((stored - 1) // 16 * 16 * (32 + 4) + (stored - (stored - 1) // 16 * 16) * 128))
        self.assertAlmostEqual(kv["encoded_share"], kv["encoded_tokens"] / stored)
        self.assertLessEqual({"prompt_n", "prompt_ms", "predicted_n", "predicted_ms"}, set(answer["timings"]))

    def test_four_kinds_of_prompt(self):
        texts = ["Hello world", "The capital"]
        ids = [self.server.post("/tokenize", {"prompt": text})[1]["tokens"] for text in texts]
        alone = [self.server.complete(prompt=text, temperature=0, logprobs=3) for text in texts]
        for prompt in (texts, ids):
            answer = self.server.complete(prompt=prompt, temperature=0, logprobs=3)
            self.assertEqual([choice["index"] for choice in answer["choices"]], [0, 1])
            self.assertEqual([choice["text"] for choice in answer["choices"]], [one["choices"][0]["text"] for one in alone])
            self.assertEqual([choice["logprobs"] for choice in answer["choices"]], [one["choices"][0]["logprobs"] for one in alone])
            self.assertEqual(answer["usage"]["total_tokens"], sum(one["usage"]["total_tokens"] for one in alone))
        self.assertEqual(self.server.complete(prompt=ids[0], temperature=0)["choices"][0]["text"], alone[0]["choices"][0]["text"])
        for wrong in (None, 1, [], [[]], ["a", 1], [1, "a"], [[1], "a"], [1.5], [420], [-1], [[420]], {}, ["a"] * 1025):
            self.refused("/v1/completions", 400, "prompt", "", prompt=wrong)

    def test_echo_scores_the_prompt(self):
        text = "Grüße, 世界! <|im_end|>the"
        for prompt in (text, self.server.post("/tokenize", {"prompt": text, "add_special_tokens": False})[1]["tokens"]):
            for new in (0, 1, 5):
                answer = self.server.complete(prompt=prompt, echo=True, max_tokens=new, logprobs=1, temperature=0)
                choice, = answer["choices"]
                lists = choice["logprobs"]
                entries = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
                self.assertEqual({name: len(values) for name, values in lists.items()},
                                 {"text_offset": entries, "token_logprobs": entries, "tokens": entries, "top_logprobs": entries})
                self.assertTrue(choice["text"].startswith(text))
                self.assertIsNone(lists["token_logprobs"][0])
                self.assertIsNone(lists["top_logprobs"][0])
                for token, logprob, top in list(zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"]))[1:]:
                    self.assertEqual(top[token], logprob)
                    self.assertLessEqual(len(top), 2)
                    self.assertEqual(max(top.values()) == logprob, len(top) == 1)
                # Offsets count characters; a token that is whole ones stands where its offset says.
                bos = 1 if prompt is text else 0  # which adds nothing to the text
                self.assertEqual(lists["text_offset"][:bos + 1], [0] * (bos + 1))
                for token, offset in list(zip(lists["tokens"], lists["text_offset"]))[bos:answer["usage"]["prompt_tokens"]]:
                    if not token.startswith("bytes:"):
                        self.assertEqual(choice["text"][offset:offset + len(token)], token)
                self.assertEqual(answer["usage"]["completion_tokens"], new)
        # Bytes that are no character are one U+FFFD each, or one for all that begin one.
        cut = self.server.post("/tokenize", {"prompt": "世", "add_special_tokens": False})[1]["tokens"]
        self.assertEqual(len(cut), 3)
        abc = self.server.post("/tokenize", {"prompt": "abc", "add_special_tokens": False})[1]["tokens"]
        prompt = cut[1:] + abc + cut[:2] + abc
        for stream in (False, True):
            body = {"prompt": prompt, "echo": True, "max_tokens": 3, "logprobs": 0, "temperature": 0}
            parts = [event["choices"][0] for event in self.server.events("/v1/completions", **body)] if stream else self.server.complete(**body)["choices"]
            text = "".join(part["text"] for part in parts)
            self.assertTrue(text.startswith("\ufffd\ufffdabc\ufffdabc"), text)
            tokens, offsets = ([value for part in parts for value in part["logprobs"][name]] for name in ("tokens", "text_offset"))
            self.assertEqual(offsets[:3] + offsets[2 + len(abc):][:3], [0, 1, 2, 5, 6, 6])
            self.assertEqual(offsets[len(prompt)], 9)
            for token, offset in zip(tokens[:len(prompt)], offsets):
                if not token.startswith("bytes:"):
                    self.assertEqual(text[offset:offset + len(token)], token)
        self.assertEqual(self.server.complete(prompt="abc", echo=True, max_tokens=0)["choices"][0]["text"], "abc")
        self.refused("/v1/completions", 400, "max_tokens", "", prompt="a", max_tokens=0)
        self.refused("/v1/completions", 400, "logprobs", "20", prompt="a", logprobs=21)

    def test_logprobs_are_a_distribution(self):
        top = self.server.complete(prompt="Hello", max_tokens=1, logprobs=20, temperature=0)["choices"][0]["logprobs"]["top_logprobs"][0]
        values = list(top.values())
        self.assertEqual(len(values), 20)
        self.assertEqual(values, sorted(values, reverse=True))
        self.assertLess(sum(math.exp(value) for value in values), 1)

    def test_stops(self):
        whole = self.server.complete(prompt="Hello", max_tokens=40, temperature=0, logprobs=0, ignore_eos=True)["choices"][0]
        text = whole["text"]
        stop = next(text[i:i + 3] for i in range(4, len(text)) if "\ufffd" not in text[i:i + 3])  # which stands for other bytes
        cut = self.server.complete(prompt="Hello", max_tokens=40, temperature=0, logprobs=0, stop=["never there", stop], ignore_eos=True)["choices"][0]
        self.assertEqual((cut["text"], cut["finish_reason"], cut["stop_reason"]), (text[:text.index(stop)], "stop", stop))
        self.assertEqual(cut["logprobs"]["tokens"], whole["logprobs"]["tokens"][:len(cut["logprobs"]["tokens"])])
        streamed = self.server.events("/v1/completions", prompt="Hello", max_tokens=40, temperature=0, stop=stop, ignore_eos=True)
        self.assertEqual("".join(event["choices"][0]["text"] for event in streamed), cut["text"])
        self.assertEqual((streamed[-1]["choices"][0]["finish_reason"], streamed[-1]["choices"][0]["stop_reason"]), ("stop", stop))
        # A stop token, and the model's own end, which is among the scored tokens and not in the text.
        tokens = whole["logprobs"]["tokens"]
        ids = [(i, self.server.post("/tokenize", {"prompt": token, "add_special_tokens": False})[1]["tokens"]) for i, token in enumerate(tokens)
               if i > 0 and ":" not in token and token not in tokens[:i]]
        at, ids = next((i, ids) for i, ids in ids if len(ids) == 1)
        cut = self.server.complete(prompt="Hello", max_tokens=40, temperature=0, stop_token_ids=[419, *ids], ignore_eos=True, logprobs=0)["choices"][0]
        self.assertEqual((cut["finish_reason"], cut["stop_reason"]), ("stop", ids[0]))
        self.assertEqual(cut["logprobs"]["tokens"], tokens[:at + 1])
        ended = [self.server.complete(prompt="Hello", max_tokens=1500, temperature=5, seed=seed, logprobs=0) for seed in range(4)]
        ended = [one for one in ended if one["choices"][0]["finish_reason"] == "stop"]
        self.assertTrue(ended, "the model's end never came in 1500 tokens at random")
        for one in ended:
            choice = one["choices"][0]
            self.assertIsNone(choice["stop_reason"])
            self.assertEqual(choice["logprobs"]["tokens"][-1], "<|im_end|>")
            self.assertEqual(len(choice["logprobs"]["tokens"]), one["usage"]["completion_tokens"])
            self.assertFalse(choice["text"].endswith("<|im_end|>"))

    def test_seed_and_sampling(self):
        texts = [self.server.complete(prompt="Hello", seed=seed, temperature=2)["choices"][0]["text"] for seed in (1, 1, 2, 3)]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(len(set(texts)), 3)
        greedy = self.server.complete(prompt="Hello", temperature=0)["choices"][0]["text"]
        for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}):
            self.assertEqual(self.server.complete(prompt="Hello", temperature=2, **one)["choices"][0]["text"], greedy)
        for key, wrong in (("temperature", -1), ("temperature", "x"), ("top_p", 0), ("top_p", 2), ("min_p", 2), ("top_k", -2),
                           ("seed", 1.5), ("stop", 1), ("stop", [1]), ("stream", 1), ("stop_token_ids", [420]), ("max_tokens", "a")):
            self.refused("/v1/completions", 400, key, "", prompt="a", **{key: wrong})

    def test_stream_is_the_answer_in_parts(self):
        body = {"prompt": ["Hello", "The capital"], "max_tokens": 12, "temperature": 0, "logprobs": 2, "echo": True}
        whole = self.server.complete(**body)
        events = self.server.events("/v1/completions", **body, stream_options={"include_usage": True})
        self.assertEqual(events[-1]["choices"], [])
        self.assertEqual(events[-1]["usage"]["total_tokens"], whole["usage"]["total_tokens"])
        for index, choice in enumerate(whole["choices"]):
            parts = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == index]
            self.assertEqual("".join(part["text"] for part in parts), choice["text"])
            for name, values in choice["logprobs"].items():
                self.assertEqual([value for part in parts for value in part["logprobs"][name]], values)
            self.assertEqual([part["finish_reason"] for part in parts], [None] * (len(parts) - 1) + ["length"])
        self.assertEqual(len({event["id"] for event in events}), 1)
        self.assertEqual(events[-2]["kv"]["spec"], "int4-hqq@residual=16")

    def test_chat(self):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0, "logprobs": True, "top_logprobs": 3}
        status, answer = self.server.post("/v1/chat/completions", body)
        self.assertEqual(status, 200, answer)
        self.assertRegex(answer["id"], "^chatcmpl-[0-9a-f]{32}$")
        self.assertEqual(answer["object"], "chat.completion")
        choice, = answer["choices"]
        prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        plain = self.server.complete(prompt=prompt, add_special_tokens=False, max_tokens=10, temperature=0, logprobs=3)["choices"][0]
        message = choice["message"]
        self.assertEqual((message["role"], message["content"], message["refusal"]), ("assistant", plain["text"], None))
        content = choice["logprobs"]["content"]
        self.assertEqual([one["logprob"] for one in content], plain["logprobs"]["token_logprobs"])
        self.assertEqual([one["token"] for one in content], plain["logprobs"]["tokens"])
        self.assertEqual([len(one["top_logprobs"]) for one in content], [3] * len(content))
        self.assertEqual(content[0]["top_logprobs"][0], {key: content[0][key] for key in ("token", "logprob", "bytes")})
        events = self.server.events("/v1/chat/completions", **body)
        self.assertEqual(events[0]["object"], "chat.completion.chunk")
        self.assertEqual(events[0]["choices"][0]["delta"], {"role": "assistant", "content": ""})
        self.assertEqual("".join(event["choices"][0]["delta"]["content"] for event in events), plain["text"])
        self.assertEqual([one for event in events[1:] for one in event["choices"][0]["logprobs"]["content"]], content)
        self.assertEqual(events[-1]["choices"][0]["finish_reason"], choice["finish_reason"])
        # The rest of the context, and an answer that was begun.
        begun = messages + [{"role": "assistant", "content": "It is"}]
        status, answer = self.server.post("/v1/chat/completions", {"messages": begun, "temperature": 0, "stop": [" "]})
        self.assertEqual(status, 200)
        opened = self.server.complete(prompt=prompt + "It is", add_special_tokens=False, max_tokens=1000, temperature=0, stop=[" "])
        self.assertEqual(answer["choices"][0]["message"]["content"], opened["choices"][0]["text"])
        for wrong in ([], "x", [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}],
                      [{"role": "assistant", "content": "", "tool_calls": [{}]}], [1],
                      [{"role": "assistant", "content": "", "reasoning_content": "x"}]):
            self.refused("/v1/chat/completions", 400, "messages", "", messages=wrong)
        status, answer = self.server.post("/v1/chat/completions", {**body, "messages": [{**messages[0], "reasoning_content": ""}, messages[1]]})
        self.assertEqual((status, answer.get("choices")), (200, [choice]), answer)
        self.refused("/v1/chat/completions", 400, "top_logprobs", "logprobs", messages=messages, top_logprobs=1)

    def test_refuses_by_name_what_it_does_not_do(self):
        for key, value in (("n", 2), ("best_of", 2), ("suffix", "x"), ("response_format", {"type": "json_object"}), ("logit_bias", {"1": 5}),
                           ("presence_penalty", 0.5), ("repetition_penalty", 1.1), ("tools", [{}]), ("prompt_logprobs", 1)):
            self.refused("/v1/completions", 400, key, key, prompt="a", **{key: value})
        for key, value in (("n", 1), ("best_of", 1), ("suffix", None), ("presence_penalty", 0), ("repetition_penalty", 1.0), ("tools", [])):
            self.server.complete(prompt="a", max_tokens=1, **{key: value})
        self.refused("/v1/completions", 404, "model", "tiny", prompt="a", model="other")
        # 1024 prompts of a token and 194 to come, 20 others wanted with each: 4.2 million.
        self.refused("/v1/completions", 400, "max_tokens", "fewer", prompt=[[5]] * 1024, max_tokens=194, logprobs=20)
        self.refused("/v1/completions", 400, "stop", "1024", prompt="a", stop="x" * 1025)
        self.refused("/v1/completions", 400, "stop_token_ids", "1024", prompt="a", stop_token_ids=[5] * 1025)
        self.refused("/v1/completions", 400, "max_tokens", "2048", prompt=[5] * 2000, max_tokens=49)
        self.assertEqual(self.server.complete(prompt=[5] * 2000, max_tokens=48, temperature=0, ignore_eos=True)["kv"]["tokens"], 2047)
        self.assertEqual(self.server.get("/nowhere")[0], 404)
        self.assertEqual(self.server.get("/v1/completions")[0], 404)
        self.assertEqual(self.server.get("/../../etc/passwd")[0], 404)

    def test_survives_nonsense(self):
        for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 500000, b'{"prompt": ' + b'{"a":' * 100000):
            status, answer = self.server.post("/v1/completions", body)
            self.assertEqual((status, answer["error"]["code"]), (400, 400))
        # Nested and closed: what recurses over it would end the process.
        deep = b"[" * 400000 + b"]" * 400000
        for path, key in (("/v1/completions", "temperature"), ("/v1/completions", "model"), ("/v1/completions", "stop"),
                          ("/v1/completions", "prompt"), ("/tokenize", "prompt"), ("/detokenize", "tokens")):
            status, answer = self.server.post(path, b'{"x": "a", "%s": %s}' % (key.encode(), deep))
            self.assertEqual((status, "64 deep" in answer["error"]["message"]), (400, True), answer)
        self.refused("/v1/completions", 400, "temperature", "[[", prompt="a", temperature=json.loads("[" * 60 + "]" * 60))
        status, answer = self.server.post("/v1/completions", {"model": "ü" * 150000, "prompt": "a"})
        self.assertEqual(status, 404)
        self.assertLess(len(answer["error"]["message"]), 200)
        self.assertIn("üü...", answer["error"]["message"])
        for ranges in ("bytes=0-9", "bytes=" + ",".join(["0-"] * 2000), "bytes=9-0", "bytes=" + "9" * 4000 + "-"):
            for method, path in (("GET", "/v1/models"), ("POST", "/tokenize")):
                status, text, _ = self.server.request(method, path, b'{"prompt": "a"}' if method == "POST" else None, {"Range": ranges})
                self.assertIn(status, (400, 416))
                self.assertEqual(json.loads(text)["error"]["code"], status)
        large = json.dumps({"prompt": "a" * (1 << 20)}).encode()
        self.assertEqual(self.server.post("/v1/completions", large)[0], 413)
        chunks = (large[i:i + 65536] for i in range(0, len(large), 65536))  # no length announced
        try:
            status, _, _ = self.server.request("POST", "/v1/completions", chunks)
            self.assertEqual(status, 413)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was sent
        # A body that is left unread is not taken for the next request, and one that is malformed is not too large.
        inner = b"GET /nowhere HTTP/1.1\r\n\r\n" * 1000  # more than is read at once
        size = b"Content-Length: %d\r\n\r\n" % len(inner)
        for status, head in ((400, b"Content-Type: multipart/form-data; boundary=x\r\n" + size), (400, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
                             (413, b"Transfer-Encoding: chunked\r\n\r\n180000\r\n" + b"a" * 0x180000 + b"\r\n0\r\n\r\n"),
                             (400, b"Range: bytes=0-9\r\n" + size)):
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as client:
                answer = b""
                try:
                    client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + head + inner)
                    while data := client.recv(65536):
                        answer += data
                except (BrokenPipeError, ConnectionResetError):
                    pass  # refused before all of it was sent
                if answer or status == 400:
                    self.assertTrue(answer.startswith(b"HTTP/1.1 %d " % status), answer[:100])
                    self.assertEqual(answer.count(b"HTTP/1.1"), 1, answer)
        self.assertEqual(self.server.post("/nowhere", {})[0], 404)
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as client:
            client.sendall(b"no HTTP at all\r\n\r\n")
            self.assertIn(b" 400 ", client.recv(1000))
        with socket.create_connection(("127.0.0.1", self.server.port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")  # and is gone
        self.server.complete(prompt="still there", max_tokens=1)

    def test_clients_together_get_their_own_answers(self):
        bodies = [{"prompt": TEXT[3 * i:3 * i + 20 + 7 * i], "max_tokens": 5 + i % 4, "temperature": 1, "seed": i, "logprobs": 2, "echo": i % 2 == 0}
                  for i in range(24)]
        alone = [self.server.complete(**body)["choices"] for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            for _ in range(2):
                self.assertEqual(list(pool.map(lambda body: self.server.complete(**body)["choices"], bodies)), alone)

    def test_side_by_side_answers_are_those_of_one_after_another(self):
        bodies = [{"prompt": TEXT[3 * i:3 * i + 20 + 7 * i], "max_tokens": 5 + i % 9, "temperature": i % 2, "seed": i, "logprobs": 2, "echo": i % 3 == 0}
                  for i in range(24)]
        bodies[5]["prompt"] = [TEXT[:90], TEXT[:120], "Paris"]
        server = Server(self.model, "--spec=int4-hqq@residual=16", "--parallel=4")
        health, one = server.get("/health")[1], self.server.get("/health")[1]
        self.assertEqual((health["slots"], health["running"], one["slots"]), (4, 0, 1))
        self.assertEqual(health["cache_bytes"], 4 * one["cache_bytes"])  # all there is, from the start
        what = lambda answer: (answer["choices"], answer["kv"])  # noqa: E731
        alone = [what(self.server.complete(**body)) for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            for _ in range(2):
                self.assertEqual(list(pool.map(lambda body: what(server.complete(**body)), bodies)), alone)
        server.wait_for(answered=48, running=0, waiting=0, cache_bytes=health["cache_bytes"])

        # Four streams: all have begun before one has ended; one is left, and the others do not know it.
        bodies = [{"prompt": [5, 6, 7 + i], "max_tokens": 700, "ignore_eos": True, "temperature": i % 2, "seed": i} for i in range(4)]
        streams = [server.stream(body) for body in bodies]
        texts = [next(stream) for stream in streams]
        health = server.get("/health")[1]
        self.assertEqual((health["running"], health["answered"], health["waiting"]), (4, 48, 0))
        streams[1].close()
        server.wait_for(cancelled=1, running=3, answered=48)
        # Its place is the next one's, which ends before the three.
        self.assertEqual(server.complete(**{**bodies[1], "max_tokens": 3})["choices"], self.server.complete(**{**bodies[1], "max_tokens": 3})["choices"])
        server.wait_for(cancelled=1, running=3, answered=49)
        for i in (3, 0, 2):
            self.assertEqual(texts[i] + "".join(streams[i]), self.server.complete(**bodies[i])["choices"][0]["text"])
        server.wait_for(cancelled=1, running=0, answered=52, failed=0)
        self.assertEqual(server.end(), 0)

    def test_perplexity_is_kvqbenchs(self):
        corpus = os.path.join(self.folder, "text.txt")
        with open(corpus, "w") as file:
            file.write(TEXT)
        windows, context = 3, 100
        for spec in ("int4-hqq@residual=16", "llamacpp-q4_0", "int2-hqq+int4-hqq@residual=32@sinks=4"):
            run = subprocess.run([BENCH, DEVICE, "--models=" + self.model, "--schemes=" + spec, "--benchmark_filter=^perplexity/", "--corpus-file=" + corpus,
                                  f"--contexts={context}", f"--windows={windows}", "--dtype=float32", "--kv-dtype=bfloat16",
                                  "--benchmark_format=json"], capture_output=True, text=True, check=True)
            perplexity = json.loads(run.stdout)["benchmarks"][0]["ppl"]
            server = self.server if spec == "int4-hqq@residual=16" else Server(self.model, "--spec=" + spec)
            ids = server.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False})[1]["tokens"]
            step = context - 1  # BOS stands before every window
            answer = server.complete(prompt=[[1] + ids[i * step:(i + 1) * step] for i in range(windows)], echo=True, logprobs=1, max_tokens=1)
            logprobs = [value for choice in answer["choices"] for value in choice["logprobs"]["token_logprobs"][1:-1]]
            self.assertEqual(len(logprobs), windows * step)
            self.assertLess(abs(sum(logprobs) / len(logprobs) + math.log(perplexity)), 1e-6 * math.log(perplexity), spec)
            if server is not self.server:
                self.assertEqual(server.end(), 0)

    def test_kept_prompts_give_the_same_answers(self):
        anew = Server(self.model, "--spec=int4-hqq@residual=16", "--no-reuse")
        body = {"prompt": TEXT[:200], "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True}
        for prompt in (TEXT[:200], TEXT[:200], TEXT[:150] + "another end"):
            kept, new = (server.complete(**{**body, "prompt": prompt}) for server in (self.server, anew))
            self.assertEqual(kept["choices"], new["choices"])
            cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (kept, new)]
            self.assertEqual((cached[0] % 16, cached[1]), (0, 0))
            self.assertEqual([answer["timings"]["prompt_n"] for answer in (kept, new)],
                             [answer["usage"]["prompt_tokens"] - count for answer, count in zip((kept, new), cached)])
        self.assertGreater(cached[0], 0)
        self.assertEqual(anew.end(), 0)

    def test_full_queue_and_clients_that_go_away(self):
        server = Server(self.model, "--queue=1")
        running = server.begin({**LONG, "stream": True})
        self.assertIn(b" 200 ", running.recv(1000))
        while b"data: " not in running.recv(10000):
            pass
        waiting = server.begin({"prompt": "Hello", "max_tokens": 2})
        server.wait_for(waiting=1)
        status, text, headers = server.request("POST", "/v1/completions", json.dumps({"prompt": "Hello"}))
        self.assertEqual((status, json.loads(text)["error"]["code"], headers["Retry-After"]), (503, 503, "1"))
        running.close()  # in the middle of its stream
        self.assertIn(b" 200 ", waiting.recv(1000))
        waiting.close()
        server.wait_for(waiting=0, cancelled=1, answered=1, refused=1)
        silent = server.begin(LONG)  # not a byte of its answer is due before its end
        time.sleep(0.3)
        silent.sendall(b"G")  # of a next request, which hides the end from who looks for it among what can be read
        silent.close()
        server.wait_for(cancelled=2)
        # Nor does one that says it is another.
        running = server.begin({**LONG, "stream": True})
        while b"data: " not in running.recv(10000):  # before, it may itself be waiting
            pass
        silent = server.begin({"prompt": "Hello", "max_tokens": 2}, b"REMOTE_ADDR: 203.0.113.7\r\nREMOTE_PORT: 1\r\n")
        server.wait_for(waiting=1)
        silent.close()  # waiting: it loses its place to the next
        for _ in range(20):
            time.sleep(0.3)  # until it is noticed
            waiting = server.begin({"prompt": "Hello", "max_tokens": 2})
            time.sleep(0.1)
            if server.get("/health")[1]["cancelled"] == 3:
                break
            self.assertIn(b" 503 ", waiting.recv(1000))
            waiting.close()
        server.wait_for(cancelled=3, waiting=1)
        running.close()
        self.assertIn(b" 200 ", waiting.recv(1000))
        waiting.close()
        server.wait_for(cancelled=4)
        self.assertEqual(server.complete(prompt="Hello", max_tokens=1)["usage"]["completion_tokens"], 1)
        last = server.begin({**LONG, "stream": True})
        self.assertIn(b" 200 ", last.recv(1000))
        self.assertEqual(server.end(), 0)  # while it works
        text = b""
        while data := last.recv(1 << 20):
            text += data
        last.close()
        self.assertRegex(text.decode(), r'(?s)data: \{"error":\{[^\n]*"code":503\}\}\n\ndata: \[DONE\]\n\n')

    def test_a_slow_client_does_not_keep_the_server(self):
        server = Server(self.model)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            stop = threading.Event()

            def drip():
                while not stop.wait(0.5):
                    try:
                        client.sendall(b" ")
                    except OSError:
                        return
            thread = threading.Thread(target=drip)
            thread.start()
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)  # alone it would take ten seconds
            time.sleep(1)
            self.assertIsNone(server.process.poll())
            begun = time.time()
            self.assertEqual(server.end(), 0)  # a second
            self.assertLess(time.time() - begun, 5)
            stop.set()
            thread.join()

    def test_a_server_that_cannot_listen_ends(self):
        server = Server(self.model)
        pid = server.process.pid
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file][1:]
        inode, = (row[9] for row in rows if row[3] == "0A" and row[1].endswith(f":{server.port:04X}"))
        listening, = (int(path.rsplit("/", 1)[1]) for path in glob.glob(f"/proc/{pid}/fd/*")
                      if os.path.realpath(path).endswith(f"socket:[{inode}]"))
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(438, os.pidfd_open(pid), listening, 0)  # pidfd_getfd
        if fd < 0:
            server.end()
            self.skipTest(os.strerror(ctypes.get_errno()))
        with socket.socket(fileno=fd) as theirs:
            theirs.shutdown(socket.SHUT_RDWR)
        self.assertEqual(server.process.wait(60), 1)
        self.assertIn("cannot take connections", server.process.stderr.read())
        server.end()

    def test_bad_flags_end_in_one_line(self):
        for flag, word in (("--nope", "--nope"), ("--spec=int5-hqq", "int5-hqq"), ("--model=/nowhere/x", "/nowhere/x"), ("--port=99999", "--port"),
                           ("--backend=x", "backend"), ("--context=99999", "--context"), ("--queue=0", "--queue"), ("--parallel=0", "--parallel"), ("--parallel=257", "--parallel"), ("--model=mistral-7b", "random"),
                           ("--host=203.0.113.7", "--host")):
            run = subprocess.run([SERVE, "--model=" + self.model, "--port=0", "--dtype=float32", flag], capture_output=True, text=True, timeout=60)
            lines = [line for line in run.stderr.splitlines() if "warning" not in line]
            self.assertEqual((run.returncode, len(lines)), (2, 1), run.stderr)
            self.assertIn(word, lines[0])
        self.assertIn("--spec", subprocess.run([SERVE, "--help"], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    unittest.main()
