"""`helix serve`: Megatron's own text-generation server on several ranks, asked by a real HTTP client."""

import asyncio
import contextlib
import json
import math
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
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_megatron import cli
from helix_megatron.check import tiny_model
from helix_megatron.generate import serve
from helix_megatron.generate.messages import check_messages
from helix_megatron.generate.requests import (
    Limits,
    Refused,
    RequestOptions,
    check_fields,
    check_prompts,
    check_room,
    parse,
)
from helix_megatron.generate.stops import Stops, StopSearch
from tests.ports import free_port

for package in ("zmq", "msgpack", "quart", "hypercorn"):
    pytest.importorskip(package)

PROMPTS = ["hello there", "a", "one more, a longer one that takes more than a single block of the cache, yes"]
NEW = 12
LENGTH, QUEUE = 160, 6


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

    def health(self):
        """Its status; None when nobody answers."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def tokens(self, prompt, **more):
        settings = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}
        status, found = self.post(settings)
        assert status == 200, found
        return [choice["generation_token_ids"] for choice in found["choices"]]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}{{ m.content }}<|b|>{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)
BOS = 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that may also end at a token of its third answer, but of no other."""
    folder = tiny_model.make(tmp_path_factory.mktemp("tiny"))
    first, _, third = tiny_model.greedy(folder, PROMPTS, NEW)
    later = next(token for token in third[2:] if token not in [*first, *third[:2]])
    tiny_model.end_at(folder, tiny_model.EOS, later)
    return folder


@pytest.fixture(scope="module")
def chat_tokenizer(folder, tmp_path_factory):
    """Folder of the model's tokenizer, with a chat template that writes the BOS."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>", bos_token="<|a|>",
        additional_special_tokens=["<|b|>"], chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    ).save_pretrained(out := tmp_path_factory.mktemp("tokenizer"))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def expected(folder):
    return tiny_model.greedy(folder, PROMPTS, NEW)


@pytest.fixture(scope="module")
def reference(folder, chat_tokenizer):
    """(the tokens and their log-probabilities that transformers chooses after some, its tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(ids, new, eos=tiny_model.EOS):
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=new, eos_token_id=eos, pad_token_id=tiny_model.EOS,
        )[0]  # fmt: skip
        with torch.no_grad():
            logprobs = model(out[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return out[len(ids) :].tolist(), logprobs

    return greedy, AutoTokenizer.from_pretrained(chat_tokenizer)


@contextlib.contextmanager
def serving(command, folder, output, tokenizer, **environment):
    """(process, client) of a server that answers."""
    port = free_port()
    command = [sys.executable, *command, "serve", "--model", folder, "--port", port, "--tokenizer", tokenizer]
    command += ["--cache-dir", folder.parent / "cache", "--max-sequence-length", LENGTH]
    command += ["--max-batch-size", 4, "--max-queue", QUEUE]
    command += ["--tensor-model-parallel-size", environment.pop("ranks")]
    with open(output, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )  # fmt: skip
    below = []
    try:
        deadline = time.monotonic() + 300
        while f"http://127.0.0.1:{port}/v1/completions" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        below = descendants(process.pid)
        yield process, Client(port)
    finally:
        below += descendants(process.pid)
        process.kill()
        process.wait()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(folder, chat_tokenizer, tmp_path_factory):
    """(process, client) of a server with 4 ranks."""
    output = tmp_path_factory.mktemp("serve") / "out"
    with serving(["-m", "helix_megatron.cli"], folder, output, chat_tokenizer, ranks=4) as running:
        yield running


def test_completions_are_those_of_transformers(server, expected):
    client = server[1]
    assert [client.tokens(prompt)[0] for prompt in PROMPTS] == expected
    assert client.tokens(PROMPTS) == expected
    status, found = client.post({"prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}, "/completions")
    assert status == 200 and found["object"] == "text_completion"
    assert found["usage"] == {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    assert found["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_are_one_for_each_token(server, reference):
    client, (greedy, tokenizer) = server[1], reference
    tokens, logprobs = greedy(tokenizer(PROMPTS[0]).input_ids, NEW)
    right = [row[token].item() for row, token in zip(logprobs, tokens)]
    body = {"max_tokens": NEW, "temperature": 0}
    status, found = client.post({**body, "prompt": PROMPTS[0], "logprobs": 3})
    choice = found["choices"][0]
    assert status == 200 and choice["generation_token_ids"] == tokens
    assert choice["logprobs"]["tokens"] == [tokenizer.decode([token]) for token in tokens]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(right, abs=1e-3)
    best = [sorted(found.values(), reverse=True) for found in choice["logprobs"]["top_logprobs"]]
    assert len(best) == NEW and [row[0] for row in best] == pytest.approx(right, abs=1e-3)
    body |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    status, found = client.post(body, "/v1/chat/completions")
    ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
    tokens, logprobs = greedy(ids, NEW)
    content = found["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [tokenizer.decode([token]) for token in tokens]
    right = [row[token].item() for row, token in zip(logprobs, tokens)]
    assert [entry["logprob"] for entry in content] == pytest.approx(right, abs=1e-3)
    assert {len(entry["top_logprobs"]) for entry in content} <= {1, 2}  # two tokens may have the same text


def test_chat_begins_as_the_template_says(server, reference):
    client, (greedy, tokenizer) = server[1], reference
    messages = [{"role": "system", "content": "be good"}, {"role": "user", "content": "hi"}]
    right = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert right[0] == BOS and right.count(BOS) == 2
    answer, _ = greedy(right, NEW)
    parts = [messages[0], {"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}]
    for asked, more in [(messages, {}), (messages, {"add_BOS": True}), (parts, {"max_tokens": None})]:
        body = {"messages": asked, "max_completion_tokens": NEW, "temperature": 0, "model": "any", **more}
        status, found = client.post(body, "/v1/chat/completions")
        assert status == 200, found
        message = found["choices"][0]["message"]
        assert message["prompt_token_ids"] == right and message["generation_token_ids"] == answer
        assert found["usage"]["prompt_tokens"] == len(right)
    # the next turn begins with the tokens of this one, as they were
    body["messages"] = [*messages, message, {"role": "user", "content": "more"}]
    status, found = client.post(body, "/v1/chat/completions")
    assert status == 200 and found["choices"][0]["message"]["prompt_token_ids"][: len(right)] == right


def test_an_answer_ends_before_its_first_stop_text(server, reference):
    client, (greedy, tokenizer) = server[1], reference
    prompt = tokenizer(PROMPTS[0]).input_ids
    tokens, _ = greedy(prompt, 40, eos=None)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    inside = [place for place, one in enumerate(text) if one != "\N{REPLACEMENT CHARACTER}"][4:]
    assert len(inside) > 4
    stops = [text[inside[3] : inside[3] + 3], text[inside[-1]], text[inside[0] : inside[0] + 1]]
    body = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    for stop in [*stops, stops, ["never in it", stops[0]]]:
        words = [stop] if isinstance(stop, str) else stop
        right = text[: min(text.find(word) for word in words if word in text)]
        status, found = client.post({**body, "prompt": prompt, "stop": stop, "logprobs": 0})
        choice = found["choices"][0]
        assert status == 200 and choice["text"] == right and choice["finish_reason"] == "stop", (stop, choice)
        kept = choice["generation_token_ids"]
        assert kept == tokens[: len(kept)]
        assert tokenizer.decode(kept, skip_special_tokens=True)[: len(right)] == right
        assert len(kept) < 40 and found["usage"]["completion_tokens"] == len(kept)
        assert len(choice["logprobs"]["token_logprobs"]) == len(kept) == len(choice["logprobs"]["tokens"])
    status, found = client.post({**body, "prompt": prompt, "stop": "never in it"})
    assert found["choices"][0]["text"] == text and found["choices"][0]["finish_reason"] == "length"
    # chat, and an end of text at the last token that is allowed
    messages = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text = tokenizer.decode(greedy(ids, 40, eos=None)[0], skip_special_tokens=True)
    stop = next(text[place : place + 2] for place in range(5, 40) if "\ufffd" not in text[place : place + 2])
    status, found = client.post({**body, "messages": messages, "stop": [stop]}, "/v1/chat/completions")
    choice = found["choices"][0]
    assert choice["message"]["content"] == text[: text.find(stop)] and choice["finish_reason"] == "stop"
    status, found = client.post({"prompt": PROMPTS[1], "max_tokens": 1, "temperature": 0})
    assert found["choices"][0]["generation_token_ids"] == [tiny_model.EOS]
    assert found["choices"][0]["finish_reason"] == "stop"

def test_an_answer_ends_at_any_of_the_models_ends(server, folder, expected):
    from transformers import AutoTokenizer

    assert 1 < len(expected[2]) < NEW and expected[2][-1] != tiny_model.EOS
    status, found = server[1].post({"prompt": PROMPTS[2], "max_tokens": NEW, "temperature": 0})
    (choice,) = found["choices"]
    assert (status, choice["finish_reason"], choice["generation_token_ids"]) == (200, "stop", expected[2])
    assert choice["text"].startswith(AutoTokenizer.from_pretrained(folder).decode(expected[2][:-1]))
    (goes_on,) = server[1].tokens(PROMPTS[2], ignore_eos=True)
    assert len(goes_on) == NEW and goes_on[: len(expected[2])] == expected[2]


def test_concurrent_requests(server, expected):
    client = server[1]
    with ThreadPoolExecutor(QUEUE) as pool:
        found = list(pool.map(lambda number: client.tokens(PROMPTS[number % 3])[0], range(QUEUE)))
    assert found == [expected[number % 3] for number in range(QUEUE)]


SURROGATE = b'{"prompt": "\\ud800"}'
BAD = [
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[1]", "not an object"),
    (SURROGATE, "surrogate"),
    (b'{"prompt": "a", "stop": ["\\udfff"]}', "surrogate"),
    ({}, "'prompt' is missing or empty"),
    ({"prompt": ""}, "prompt 0 is empty"),
    ({"prompt": ["a", ""]}, "prompt 1 is empty"),
    ({"prompt": [[]]}, "prompt 0 is empty"),
    ({"prompt": ["a", [1]]}, "mixes"),
    ({"prompt": [1, 300]}, "prompt 0 has a token outside 0 ... 258"),
    ({"prompt": {"a": 1}}, "'prompt' is missing"),
    ({"prompt": "a" * 1000 * LENGTH}, "prompt 0 has 160000 characters, more than 2560 tokens; this server"),
    ({"prompt": [300] * 1000 * LENGTH}, "prompt 0 has 160000 tokens; this server takes"),
    ({"prompt": "a" * LENGTH}, f"prompt 0 has {LENGTH} tokens; this server takes {LENGTH}"),
    ({"prompt": "a", "top_k": 5}, "'top_k' needs 'top_p': 0"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "log-probabilities of the prompt"),
    ({"prompt": "a", "seed": 1}, "'seed' is not obeyed"),
    ({"prompt": "a", "temprature": 1}, '"temprature" is no field of this server; it takes echo, '),
    ({"prompt": "a", "messages": []}, '"messages" is no field'),
]
BAD_FIELDS = {
    "temperature": ["hot", True, -1, 1e-40, 1e39, 1e300, 10**400, math.nan, math.inf, 1e-3, [1]],
    "top_p": [2, -0.1, 1e-46, "1", math.nan],
    "top_k": [-1, 259, 1.5, True, 10**30],
    "max_tokens": [0, -1, 10**30, 2**31, 1.5, "3", True],
    "stop": ["", [""], 3, [3], {}, ["a"] * 65, "a" * 1025],
    "ignore_eos": [1, "true"],
    "n": [3, 0, True],
    "stream": [True, "no"],
    "frequency_penalty": [0.5, "0"],
    "presence_penalty": [-1],
    "logit_bias": [{"5": 100}],
    "response_format": [{"type": "json_object"}],
    "best_of": [2],
}
BAD_COMPLETIONS = {**BAD_FIELDS, "logprobs": [1.5, 21, -1, True], "echo": ["yes"], "suffix": ["x"]}
BAD_CHAT = {
    **BAD_FIELDS,
    "max_completion_tokens": [0, 10**30],
    "logprobs": [1, "true"],
    "top_logprobs": [100_000, 21, -1, 1.5],
    "skip_prompt_log_probs": [False],
    "add_BOS": [1],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, 3],
    "parallel_tool_calls": ["no"],
    "prevent_retokenization": [0],
}
CHAT_PATH = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
BAD_MESSAGES = [
    ([], "'messages' is missing or empty"),
    ("hi", "'messages' is missing or empty"),
    ([3], "message 0 is 3"),
    ([HI, None], "message 1 is null"),
    ([{"content": "x"}], "message 0 has no 'role'"),
    ([{"role": 3, "content": "x"}], "message 0 has no 'role'"),
    ([{"role": "user"}], "message 0 has no 'content'"),
    ([{"role": "user", "content": 3}], "the content 3"),
    ([{"role": "user", "content": {"text": "a"}}], "the content {"),
    ([{"role": "user", "content": [3]}], "has a part 3"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "type text alone"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "has a part"),
    ([{**HI, "tool_calls": {}}], "tool_calls {}"),
    ([{**HI, "tool_calls": [3]}], "tool call 0 of message 0 is 3"),
    ([{**HI, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "a JSON object"),
    ([{**HI, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "a JSON object"),
    ([{**HI, "generation_token_ids": [1, 259]}], "a token outside 0 ... 258 in generation_token_ids"),
    ([{**HI, "prompt_token_ids": [-1]}], "a token outside 0 ... 258 in prompt_token_ids"),
    ([{**HI, "prompt_token_ids": ["a"]}], "no list of tokens"),
]
BAD_CHATS = [
    ({"messages": [{"role": "robot", "content": "x"}]}, "does not take these messages: no robots"),
    ({"messages": [{**HI, "content": "a" * LENGTH}]}, f"the prompt has {LENGTH + 3} tokens"),
    ({"messages": [HI], "top_logprobs": 3}, "'top_logprobs' needs 'logprobs'"),
    ({"messages": [HI], "max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    ({"messages": [HI], "tools": [3]}, "tool 0 is 3"),
    ({"messages": [HI], "tools": {}}, "'tools' is {}"),
    ({"messages": [HI], "tools": [{"function": {"name": "f", "parameters": "x"}}]}, "a JSON object"),
    ({"messages": [HI], "chat_template_kwargs": []}, "must be an object"),
    ({"messages": [HI], "chat_template_kwargs": {"chat_template": "x"}}, "the server sets it"),
    ({"messages": [HI], "chat_template_kwargs": {"tokenize": False}}, "the server sets it"),
    ({"messages": [HI], "chat_template_kwargs": {"max_length": 1}}, "the server sets it"),
    ({"messages": [HI], "chat_template_kwargs": {"messages": []}}, "the server sets it"),
    ({"messages": [HI], "chat_template_kwargs": {"self": 1}}, "the server sets it"),
]


def test_a_bad_request_is_refused_and_the_others_go_on(server, expected):
    client = server[1]
    bad = [(body, "/v1/completions", message) for body, message in BAD]
    bad += [({"messages": messages}, CHAT_PATH, message) for messages, message in BAD_MESSAGES]
    bad += [(body, CHAT_PATH, message) for body, message in BAD_CHATS]
    for path, base, fields in [
        ("/v1/completions", {"prompt": "a"}, BAD_COMPLETIONS), (CHAT_PATH, {"messages": [HI]}, BAD_CHAT)
    ]:  # fmt: skip
        bad += [({**base, name: value}, path, f"'{name}' is ") for name in fields for value in fields[name]]
    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(client.tokens, PROMPTS[2])
        for body, path, message in bad:
            status, found = client.post(body, path)
            assert status == 400 and message in found["error"]["message"], (body, found)
        for path in ("/v1/start_profile", "/stop_profile", "/v1/models"):
            status, found = client.post({}, path)
            assert status == 404 and "there are /v1/completions, " in found["error"]["message"]
        status, found = client.post(b" " * (2**24 + 1))
        assert status == 413 and "has 16777217 bytes; this server takes 16777216" in found["error"]["message"]
        assert going_on.result() == expected[2:]
    assert client.tokens(PROMPTS[0]) == expected[:1]
    assert client.health() == 200


def test_what_clients_send_without_meaning_it_is_taken(server, expected):
    nothing = {"stream": False, "stream_options": None, "n": 1, "user": "me", "model": "x", "logit_bias": {}}
    nothing |= {"frequency_penalty": 0, "presence_penalty": 0.0, "seed": 3, "stop": None, "max_tokens": NEW}
    nothing |= {"logprobs": None, "best_of": 1, "temperature": 0, "top_p": None, "suffix": None}
    assert server[1].tokens(PROMPTS[0], **nothing) == expected[:1]
    assert server[1].post({"prompt": "a", "temperature": 0.01, "top_p": 1e-6, "max_tokens": 3})[0] == 200
    assert server[1].post({"prompt": "a", "temperature": 1e38, "logprobs": 20, "max_tokens": 3})[0] == 200
    assert server[1].post({"prompt": "a", "top_p": 0, "top_k": 258, "max_tokens": 2**31 - 1})[0] == 200


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


@pytest.mark.parametrize("fault, body", [
    ("temperature", {"prompt": "a", "temperature": 1e-40}),
    ("rank", {"prompt": [1, 258]}),
])  # fmt: skip
def test_a_failed_engine_is_said_and_leaves_no_process(folder, chat_tokenizer, tmp_path, fault, body):
    here, output = os.path.dirname(__file__), tmp_path / "out"
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [os.path.join(here, "serve_fault_worker.py")]
    with serving(
        command, folder, output, chat_tokenizer, ranks=2, FAULT=fault, PYTHONPATH=path
    ) as (process, client):
        below = descendants(process.pid)
        assert client.health() == 200
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(client.post, {"prompt": "a", "max_tokens": LENGTH, "ignore_eos": True})
            status, found = client.post(body)
            assert status == 503 and "the engine has failed" in found["error"]["message"]
            assert waiting.result()[0] == 503
        assert client.health() == 503
        if fault == "rank":
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) not in (0, -signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(os.path.exists(f"/proc/{pid}") for pid in below) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [pid for pid in below if os.path.exists(f"/proc/{pid}")] == []
    text = output.read_text()
    assert "Traceback" in text and "in async_forward" in text, text
    assert ("planted" if fault == "rank" else "probability tensor contains") in text, text


# ---- without ranks ----
class Loop:
    """The task of an engine's loop: running, or ended by SystemExit in an except block, as Megatron does."""

    def __init__(self, error=None):
        self._end = error and SystemExit(1)
        if error:
            self._end.__context__ = error

    def done(self):
        return self._end is not None

    def cancelled(self):
        return False

    def exception(self):
        return self._end


def test_every_rank_hears_of_a_failure_on_one(monkeypatch):
    from torch.distributed import HashStore, distributed_c10d

    store = HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(serve, "_front_ends", list)
    alive = SimpleNamespace(is_alive=lambda: True)

    def watch(primary, error=None, coordinator=alive):
        engine = SimpleNamespace(engine_loop_task=Loop(error), inference_coordinator_process=coordinator)
        return serve.FailureWatch(SimpleNamespace(engine=engine, is_primary_rank=primary))

    async def ended(*watches):
        return await asyncio.wait_for(asyncio.gather(*(one.failure() for one in watches)), 60)

    async def still_running(one):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(one.failure(), 1.5)

    dead = SimpleNamespace(is_alive=lambda: False)
    told = watch(True, coordinator=dead)
    told.told = True
    asyncio.run(still_running(told))  # its coordinator was told to end
    assert asyncio.run(ended(watch(True, coordinator=dead))) == ["the engine's coordinator has ended"]
    store.delete_key(serve.FailureWatch._KEY)
    first, second, third = watch(True), watch(False, ZeroDivisionError("planted")), watch(False)
    message = "the engine has failed: ZeroDivisionError: planted"
    other = f"the server has failed on another rank: {message}"
    assert asyncio.run(ended(first, second, third)) == [other, message, other]
    assert [one.mine for one in (first, second, third)] == [False, True, False]
    assert repr(second.cause) == "ZeroDivisionError('planted')"


def test_a_port_is_refused_under_torchrun_too(monkeypatch, capsys):
    """By the rank that will listen there, before the model is read."""
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["serve", "--model", "nowhere", "--port", "65536"]) == 2
    assert "--port 65536: give a number" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["serve", "--model", "nowhere", "--port", "65536"]) == 2
    assert "--port" not in capsys.readouterr().err


def test_what_cannot_be_served_is_refused_before_a_rank_starts(folder, tmp_path, capsys):
    given = ["serve", "--model", str(folder), "--cache-dir", str(tmp_path)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main([*given, "--max-sequence-length", "99", "--port", str(taken.getsockname()[1])]) == 2
        assert "choose another --port" in capsys.readouterr().err
    for flags, message in [
        (["--port", "65536"], "--port 65536: give a number from 1 to 65535"),
        (["--port", "0"], "--port 0: give a number"),
        (["--host", "::1"], "--host ::1: Address family for hostname not supported; give an IPv4 address"),
    ]:
        assert cli.main([*given, "--max-sequence-length", "99", *flags]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*given, "--max-sequence-length", "513"]) == 2
    assert "knows 512 positions" in capsys.readouterr().err
    assert cli.main([*given, "--max-queue", "0"]) == 2
    assert "--max-queue 0" in capsys.readouterr().err


LIMITS = Limits(sequence=4, vocabulary=10, requests=3)


def test_a_text_that_is_far_too_long_is_not_tokenised_to_its_end():
    """One of few tokens is, however many characters it has."""
    seen = []

    def tokenize(text):
        seen.append(len(text))
        return [1] * (len(text.split()) or 1)

    with pytest.raises(Refused, match=r"1000 characters, more than 32 tokens; this server takes 4, answer"):
        check_prompts({"prompt": "a " * 500}, LIMITS, tokenize)
    assert check_prompts({"prompt": "a" * 1000}, LIMITS, tokenize) == 1
    assert seen == [64, 64, 1000]


def test_the_largest_body_has_room_for_a_queue_of_prompts():
    assert LIMITS.body == 2**24
    assert Limits(2**17, 10, 128).body == 2**29 and Limits(2**17, 10, 2**10).body == 2**30


def test_limits_hold_exactly():
    assert check_prompts({"prompt": [1, 2, 9]}, LIMITS, list) == 1
    assert check_prompts({"prompt": [[1], [2]]}, LIMITS, list) == 2
    for prompt in ([1, 2, 3, 4], [10], [-1], [True]):
        with pytest.raises(Refused):
            check_prompts({"prompt": prompt}, LIMITS, list)
    body = {"temperature": 0, "top_k": 3}
    assert check_fields({**body, "user": "me", "stop": None}, LIMITS, chat=False) == body
    check_fields({"temperature": 1.0, "top_k": 3, "top_p": 0, "max_tokens": 1}, LIMITS, chat=False)
    check_fields({"logprobs": 10}, LIMITS, chat=False)
    for bad in ({"top_k": 10, "top_p": 0}, {"logprobs": 11}, {"top_logprobs": None, "nobody": None}):
        with pytest.raises(Refused):
            check_fields(bad, LIMITS, chat=False)
    check_room(1, 2, LIMITS)
    with pytest.raises(Refused) as refused:
        check_room(2, 2, LIMITS)
    assert refused.value.status == 503
    assert parse(b'{"a": 1}') == {"a": 1}


def test_the_queue_is_asked_again_when_the_tokens_are_there():
    """A chat template may take its time; others come meanwhile."""
    from quart import Quart, g

    from helix_megatron.generate.front_end import EngineClient

    waiting = {}

    def add_request(tokens, params):
        waiting[len(waiting)] = future = asyncio.get_running_loop().create_future()
        return future

    megatrons = SimpleNamespace(completion_futures=waiting, add_request=add_request)
    client = EngineClient(megatrons, SimpleNamespace(bos=None), LIMITS, frozenset())

    async def ask():
        async with Quart(__name__).app_context():
            g.asked = RequestOptions([])
            for _ in range(LIMITS.requests):
                client.add_request([1], SimpleNamespace(add_BOS=False)).cancel()
            with pytest.raises(Refused, match="the queue is full: 3 prompts are here") as refused:
                client.add_request([1], SimpleNamespace(add_BOS=False))
            assert refused.value.status == 503

    asyncio.run(ask())


def test_tokens_of_an_answer_want_an_end_of_text():
    from quart import Quart, g

    from helix_megatron.generate.front_end import FrontTokenizer

    async def ask():
        async with Quart(__name__).app_context():
            assert FrontTokenizer(SimpleNamespace(eod=7)).eos_id == 7 and "refused" not in g
            with pytest.raises(Refused):
                FrontTokenizer(SimpleNamespace(eod=None)).eos_id  # noqa: B018
            assert g.refused.status == 400 and "'prevent_retokenization': false" in str(g.refused)

    asyncio.run(ask())


def test_messages_that_lose_nothing_are_taken():
    check_messages(
        {
            "messages": [
                {"role": "developer", "content": "x", "anything": [1]},
                {"role": "assistant", "content": None, "tool_calls": [CALL, {"function": {"name": "g"}}]},
                {"role": "tool", "content": ["a", {"text": "b"}], "tool_call_id": "1"},
                {"role": "assistant", "content": "", "prompt_token_ids": [9], "generation_token_ids": None},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False, "documents": []},
        },
        LIMITS,
    )


def decode(tokens):
    """Bytes, and a special token 256 that no text shows."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(
    st.text("abé✓", max_size=30), st.lists(st.text("abé✓", min_size=1, max_size=4), min_size=1, max_size=3)
)  # fmt: skip
def test_a_stop_text_is_found_with_the_token_that_ends_it(text, words):
    data = text.encode()
    stops, found = Stops(tuple(words)), StopSearch(Stops(tuple(words)), decode)
    right = next(
        (k for k in range(len(data) + 1) if any(word.encode() in data[:k] for word in words)), None
    )
    assert next((k for k in range(len(data) + 1) if found.found(list(data[:k]))), None) == right
    places = [text.index(word) for word in words if word in text]
    if right is None:
        assert not places and stops.cut(list(data), decode) is None
        return
    kept, before = stops.cut(list(data), decode)
    assert before == text[: min(places)]
    assert data[:kept] == before.encode()


def test_a_stop_may_be_a_special_token_and_a_token_may_hold_more_than_the_stop():
    stops = Stops(("x",), frozenset([256]))
    assert stops.cut([97, 256, 98], decode) == (1, "a") == stops.cut([97, 120, 256], decode)
    assert stops.cut([97, 98], decode) is None and stops.cut([120], decode) == (0, "")
    search = StopSearch(stops, decode)
    assert [search.found([97, 256, 98][:k]) for k in range(4)] == [False, False, True, True]
    words = {0: "one ", 1: "two xthree"}
    assert stops.cut([0, 1, 0], lambda tokens: "".join(words[t] for t in tokens)) == (2, "one two ")


def test_stop_words_are_told_from_special_tokens(chat_tokenizer):
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(str(chat_tokenizer), {"library": "huggingface"})
    assert Stops.of(["<|b|>", "ab", "c"], tokenizer) == Stops(("ab", "c"), frozenset([258]))
    assert Stops.of(["<|a|>", "<|a|>c"], tokenizer) == Stops(("<|a|>c",), frozenset([257]))  # 257: the BOS
    begins = SimpleNamespace(  # every text with its BOS
        bos=257, tokenize=lambda text: [257, *tokenizer.tokenize(text)], detokenize=tokenizer.detokenize
    )
    assert Stops.of(["<|a|>", "<|b|>", "ab"], begins) == Stops(("ab",), frozenset([257, 258]))
