#!/usr/bin/python3
"""Clients of all kinds at once, for as long as one likes: best against a kvqserve built with sanitizers.

usage: accuracy/serve_soak.py [--seconds=600] [--clients=32] [--port=8000] [--requests=64]

First each of the requests is sent alone. Then the clients send them in any order, together; drop connections in the middle of
requests and of answers; send what is no HTTP, no JSON, no request, or too much. Every answer to a right request must be, but
for its id and its times, the one that it had alone. At the end the server must be idle and give the same answers once more.
Exit code 1: something was wrong, and what."""
import argparse
import collections
import http.client
import json
import random
import socket
import sys
import threading
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=600)
parser.add_argument("--clients", type=int, default=32)
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--requests", type=int, default=64)
options = parser.parse_args()

WORDS = "The capital of France is Paris and Grüße go to 世界, where one 12345 follows \n another; def f(x): return x".split(" ")


def make_requests(count):
    draw = random.Random(42)
    shared = " ".join(draw.choices(WORDS, k=60))  # a beginning that many have in common
    requests = []
    for i in range(count):
        text = (shared[:draw.choice((0, 100, 200, len(shared)))] + " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))).strip()
        body = {"max_tokens": draw.randint(1, 8), "temperature": draw.choice((0, 0.7)), "seed": i, "stream": draw.random() < 0.4}
        if draw.random() < 0.3:
            body["stop"] = [draw.choice(WORDS), "e"]
        if draw.random() < 0.25:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": text}]
            if draw.random() < 0.5:
                body.update(logprobs=True, top_logprobs=draw.randint(0, 5))
        else:
            path = "/v1/completions"
            body["prompt"] = draw.choice((text, [text, text[:20]]))
            if draw.random() < 0.6:
                body.update(logprobs=draw.randint(0, 5), echo=draw.random() < 0.7)
        requests.append((path, json.dumps(body).encode()))
    return requests


def post(path, body, timeout=600):
    connection = http.client.HTTPConnection("127.0.0.1", options.port, timeout=timeout)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def essence(text):
    """What an answer says: of a stream the parts put together."""
    if text.startswith(b"data: "):
        events = text.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        parts = collections.defaultdict(list)
        for event in events[:-2]:
            for choice in json.loads(event[len("data: "):])["choices"]:
                parts[choice["index"]].append({key: value for key, value in choice.items() if key != "index"})
        return json.dumps(parts, sort_keys=True)
    answer = json.loads(text)
    return json.dumps({"choices": answer["choices"], "kv": answer["kv"],
                       "usage": {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")}}, sort_keys=True)


def raw(data, read=0, wait=0.0):
    """Sends bytes and closes, having read some of what comes."""
    with socket.create_connection(("127.0.0.1", options.port), timeout=60) as client:
        client.sendall(data)
        time.sleep(wait)
        if read:
            client.recv(read)


def http_bytes(path, body, length=None):
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n").encode() + body


counts, faults, lock = collections.Counter(), [], threading.Lock()


def client(number, until, requests, alone):
    draw = random.Random(number)
    while time.time() < until and len(faults) < 20:
        path, body = requests[which := draw.randrange(len(requests))]
        kind = draw.choices(("right", "dropped", "half", "broken", "large", "chunked", "noise", "other"), (60, 14, 6, 6, 2, 2, 5, 5))[0]
        try:
            if kind == "right":
                status, text = post(path, body)
                if status == 503:
                    kind = "full"
                    time.sleep(1)  # as Retry-After says
                elif status != 200 or essence(text) != alone[which]:
                    with lock:
                        faults.append(f"request {which} got {status}: {text[:300]}\n  alone: {alone[which][:300]}")
            elif kind == "dropped":
                raw(http_bytes(path, body), draw.choice((0, 1, 200)), draw.random() * 0.5)
            elif kind == "half":
                raw(http_bytes(path, body[:draw.randrange(len(body))], len(body)), 0, draw.random() * 0.2)
            elif kind == "broken":
                cut = draw.randrange(len(body) - 1)
                status, text = post(path, draw.choice((body[:cut], body[:cut] + b"\xff" + body[cut:], b"[" * 100000, b'{"prompt":' * 10000)))
                if status != 400 or json.loads(text)["error"]["code"] != 400:
                    with lock:
                        faults.append(f"a broken request got {status}: {text[:300]}")
            elif kind == "large":
                status, text = post(path, b'{"prompt": "' + b"a" * (9 << 20) + b'"}')
                if status != 413:
                    with lock:
                        faults.append(f"9 MiB got {status}: {text[:300]}")
            elif kind == "chunked":
                raw(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 160, 100)
            elif kind == "noise":
                raw(bytes(draw.randrange(256) for _ in range(draw.randrange(2000))) + b"\r\n\r\n", 0)
            else:
                connection = http.client.HTTPConnection("127.0.0.1", options.port, timeout=600)
                connection.request("GET", draw.choice(("/health", "/v1/models", "/tokenizer_info", "/nope", "/" + "x" * 20000)))
                connection.getresponse().read()
                connection.close()
        except (ConnectionError, http.client.HTTPException, socket.timeout) as error:
            # Refused in the middle of what it sends, a client may see its connection broken; a right request never.
            if kind == "right" or not isinstance(error, ConnectionError):
                with lock:
                    faults.append(f"{kind}: {error!r}")
        with lock:
            counts[kind] += 1


def main():
    requests = make_requests(options.requests)
    alone = []
    for path, body in requests:
        status, text = post(path, body)
        assert status == 200, (status, text, body)
        alone.append(essence(text))
    print(f"{len(requests)} requests alone: done", flush=True)
    until = time.time() + options.seconds
    threads = [threading.Thread(target=client, args=(i, until, requests, alone)) for i in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connection = http.client.HTTPConnection("127.0.0.1", options.port, timeout=600)
    for _ in range(600):
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read())
        if health["waiting"] == 0:
            break
        time.sleep(0.1)
    for which, (path, body) in enumerate(requests):
        if essence(post(path, body)[1]) != alone[which]:
            faults.append(f"request {which} has another answer at the end")
    print(dict(counts), health)
    for fault in faults:
        print("fault:", fault)
    return 1 if faults or health["waiting"] else 0


if __name__ == "__main__":
    sys.exit(main())
