"""`helix serve`: Megatron's own text-generation server on several ranks, asked by a real HTTP client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from helix_megatron import cli
from helix_megatron.generate import serve
from helix_megatron.generate.requests import Limits, Refused, check_room, check_sampling, parse, prompts_of
from tests.generate import tiny_model

for package in ("zmq", "msgpack", "quart", "hypercorn"):
    pytest.importorskip(package)

PROMPTS = ["hello there", "a", "one more, a longer one that takes more than a single block of the cache, yes"]
NEW = 12
LENGTH, QUEUE = 160, 6


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid):
    """Every living process below `pid`."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    children = {}
    for child, parent in zip(table[::2], table[1::2]):
        children.setdefault(int(parent), []).append(int(child))
    found, todo = [], [pid]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


class Client:
    def __init__(self, port):
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def post(self, body, path="/v1/completions"):
        """(status, document)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def tokens(self, prompt, **more):
        settings = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}
        status, found = self.post(settings)
        assert status == 200, found
        return [choice["generation_token_ids"] for choice in found["choices"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder):
    return tiny_model.greedy(folder, PROMPTS, NEW)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """(process, client) of a server with 4 ranks."""
    port, output = free_port(), tmp_path_factory.mktemp("serve") / "out"
    command = [sys.executable, "-m", "helix_megatron.cli", "serve", "--model", folder, "--port", port]
    command += ["--tensor-model-parallel-size", 4, "--cache-dir", output.parent / "cache"]
    command += ["--max-sequence-length", LENGTH, "--max-batch-size", 4, "--max-queue", QUEUE]
    with open(output, "w") as file:
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while f"http://127.0.0.1:{port}/v1/completions" not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)
    yield process, Client(port)
    below = descendants(process.pid)
    process.kill()
    process.wait()
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_completions_are_those_of_transformers(server, expected):
    client = server[1]
    assert [client.tokens(prompt)[0] for prompt in PROMPTS] == expected
    assert client.tokens(PROMPTS) == expected
    status, found = client.post({"prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}, "/completions")
    assert status == 200 and found["object"] == "text_completion"
    assert found["usage"] == {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    assert found["choices"][0]["finish_reason"] == "length"


def test_concurrent_requests(server, expected):
    client = server[1]
    with ThreadPoolExecutor(QUEUE) as pool:
        found = list(pool.map(lambda number: client.tokens(PROMPTS[number % 3])[0], range(QUEUE)))
    assert found == [expected[number % 3] for number in range(QUEUE)]


BAD = [
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[1]", "not an object"),
    ({}, "'prompt' is missing or empty"),
    ({"prompt": ""}, "prompt 0 is empty"),
    ({"prompt": ["a", ""]}, "prompt 1 is empty"),
    ({"prompt": [[]]}, "prompt 0 is empty"),
    ({"prompt": ["a", [1]]}, "mixes"),
    ({"prompt": [1, 300]}, "prompt 0 has a token outside 0 ... 258"),
    ({"prompt": {"a": 1}}, "'prompt' is missing"),
    ({"prompt": "a" * LENGTH}, f"prompt 0 has {LENGTH} tokens; this server takes {LENGTH}"),
    ({"prompt": "a", "top_k": 5}, "'top_k' needs 'top_p': 0"),
    ({"prompt": "a", "top_p": 2}, "'top_p' is 2"),
    ({"prompt": "a", "temperature": "hot"}, "'temperature' is \"hot\""),
    ({"prompt": "a", "max_tokens": 0}, "'max_tokens' is 0"),
    ({"prompt": "a", "stream": True}, "'stream' is not supported"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "log-probabilities of the prompt"),
    ({"prompt": "a", "logprobs": 1.5}, "'logprobs' must be"),
    ({"prompt": "a", "stop": [""]}, "'stop' must be"),
    ({"prompt": "a", "n": 3}, "'n' other than 1"),
]


def test_a_bad_request_is_refused_and_the_others_go_on(server, expected):
    client = server[1]
    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(client.tokens, PROMPTS[2])
        for body, message in BAD:
            status, found = client.post(body)
            assert status == 400 and message in found["error"]["message"], (body, found)
        status, found = client.post({"messages": [{"role": "user", "content": "x"}]}, "/v1/chat/completions")
        assert status == 400 and "no chat template" in found["error"]["message"]
        assert going_on.result() == expected[2:]
    assert client.tokens(PROMPTS[0]) == expected[:1]


def test_a_full_queue_refuses_and_a_client_that_leaves_disturbs_nobody(server, expected):
    client = server[1]
    status, found = client.post({"prompt": ["a"] * (QUEUE + 1)})
    assert status == 503 and f"this server takes {QUEUE}" in found["error"]["message"]
    body = json.dumps(
        {"prompt": PROMPTS[0], "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    ).encode()
    with socket.create_connection(("127.0.0.1", client.port)) as leaving:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        leaving.sendall(head.encode() + body)
    assert client.tokens(PROMPTS[2]) == expected[2:]
    assert client.tokens(PROMPTS[0]) == expected[:1]


def test_sigterm_to_every_process_leaves_no_rank_and_no_port(server):
    process, client = server
    below = descendants(process.pid)
    assert len(below) >= 6  # the fork server, 4 ranks, the coordinator, the front end
    for pid in [*below, process.pid]:  # to all of them, as Slurm and service managers do
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=90) == 0
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in below) and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    assert [pid for pid in below if os.path.exists(f"/proc/{pid}")] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", client.port)) != 0
    serve.refuse_port("127.0.0.1", client.port)  # it is free again


# ---- without ranks ----
def test_what_cannot_be_served_is_refused_before_a_rank_starts(folder, tmp_path, capsys):
    given = ["serve", "--model", str(folder), "--cache-dir", str(tmp_path)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main([*given, "--max-sequence-length", "99", "--port", str(taken.getsockname()[1])]) == 2
        assert "choose another --port" in capsys.readouterr().err
    assert cli.main([*given, "--max-sequence-length", "513"]) == 2
    assert "knows 512 positions" in capsys.readouterr().err
    assert cli.main([*given, "--max-queue", "0"]) == 2
    assert "--max-queue 0" in capsys.readouterr().err


def test_limits_hold_exactly():
    limits = Limits(sequence=4, vocabulary=10, requests=3)
    assert prompts_of({"prompt": [1, 2, 9]}, limits, list) == 1
    assert prompts_of({"prompt": [[1], [2]]}, limits, list) == 2
    for prompt in ([1, 2, 3, 4], [10], [-1], [True]):
        with pytest.raises(Refused):
            prompts_of({"prompt": prompt}, limits, list)
    check_sampling({"temperature": 0, "top_k": 3}, limits)
    check_sampling({"temperature": 1.0, "top_k": 3, "top_p": 0, "max_tokens": 1}, limits)
    with pytest.raises(Refused):
        check_sampling({"top_k": 10, "top_p": 0}, limits)
    check_room(1, 2, limits)
    with pytest.raises(Refused) as refused:
        check_room(2, 2, limits)
    assert refused.value.status == 503
    assert parse(b'{"a": 1}') == {"a": 1}
