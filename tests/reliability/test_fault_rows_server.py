"""Row 41 of the table of faults: bad requests to `uf serve`, a GGUF file behind it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from unsloth_factory.commands import serve
from unsloth_factory.commands.source import resolve_source
from unsloth_factory.config.commands import ServeConfig
from unsloth_factory.config.settings import FinishedRun, ModelSettings
from unsloth_factory.inference.server.http import ModelServer

HELLO = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def server(exported) -> Iterator[ModelServer]:
    config = ServeConfig(source=FinishedRun(run=str(exported.run)), gguf=str(exported.gguf), port=0)
    console = Console(stderr=True, quiet=True)
    resolved = resolve_source(config.source, ModelSettings())
    with serve.open_engine(config, resolved, console) as engine:
        made = serve.open_server(config, resolved, engine, console)
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()
        made.stop()


def ask(server: ModelServer, body: bytes) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    value = json.loads(response.read())
    connection.close()
    return response.status, value


def request(**fields: object) -> bytes:
    return json.dumps({"messages": HELLO, "max_tokens": 4, **fields}).encode()


BAD = {
    "no JSON": b"{broken",
    "no object": b"[1, 2]",
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "20,000 deep": b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "messages of a wrong type": request(messages="hello"),
    "content of a wrong type": request(messages=[{"role": "user", "content": {"a": 1}}]),
    "half a surrogate pair": request(messages=[{"role": "user", "content": "\ud800"}]),
    "negative max_tokens": request(max_tokens=-1),
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "a grammar": request(grammar="root ::= " + "(" * 20_000),
    "a prompt beyond the context": request(messages=[{"role": "user", "content": "字" * 100_000}]),
}


@pytest.mark.parametrize("name", BAD)
def test_fault_41_bad_request_to_the_server(server, name):
    """It is refused with 4xx in OpenAI's form, and the next request is answered."""
    status, value = ask(server, BAD[name])
    assert 400 <= status < 500, (status, value)
    assert value["error"]["message"]
    assert "Traceback" not in value["error"]["message"]
    status, value = ask(server, request(temperature=0))
    assert status == 200
    assert value["choices"][0]["finish_reason"] in ("stop", "length")


def test_fault_41_fields_of_other_servers_never_reach_llama_cpp(server):
    """A negative n_discard crashed a llama.cpp server once; here no field is passed on that is not known."""
    status, value = ask(server, request(n_discard=-1, cache_prompt="x", slot_id=2**40, temperature=0))
    assert status == 200
    assert value["choices"]
