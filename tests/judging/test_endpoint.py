"""The client of OpenAI-compatible servers: retries, refusals, and a key that is never shown."""

from __future__ import annotations

import threading
import time

import pytest
from chat_server import serving

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.inference import endpoint as module
from unsloth_factory.inference.endpoint import Endpoint, EndpointDown, RequestRefused
from unsloth_factory.inference.parallel import in_parallel

ASK = [{"role": "user", "content": "hello there"}]


def endpoint_of(server, model="fake", **options) -> tuple[Endpoint, list[float]]:
    pauses: list[float] = []
    return Endpoint(server.url, model, sleep=pauses.append, **options), pauses


def test_a_reply_with_its_tokens():
    with serving(lambda body: "fine thanks") as server:
        client, _ = endpoint_of(server, None)
        assert client.model == "fake"  # the only one
        reply = client.chat(ASK, max_tokens=7, seed=3)
    assert (reply.text, reply.finished, reply.prompt_tokens, reply.completion_tokens) == ("fine thanks", True, 2, 2)
    assert server.bodies == [{"model": "fake", "messages": ASK, "max_tokens": 7, "temperature": 0.0, "seed": 3}]
    assert "Authorization" not in server.headers_seen[0]


def test_busy_servers_are_asked_again_and_say_how_long_to_wait():
    answers = iter([(429, {"error": {"message": "slow down"}}, {"Retry-After": "7"}), (503, {}), "now"])
    with serving(lambda body: next(answers)) as server:
        client, pauses = endpoint_of(server)
        assert client.chat(ASK, max_tokens=5).text == "now"
    assert pauses[0] == 7.0
    assert 1.0 <= pauses[1] <= 2.0


def test_a_server_that_stays_busy_is_given_up_with_growing_pauses():
    with serving(lambda body: (500, {"error": "broken"}, {"Retry-After": "9999"})) as server:
        client, pauses = endpoint_of(server)
        with pytest.raises(RequestRefused, match="6 attempts failed, the last one with: 500 broken"):
            client.chat(ASK, max_tokens=5)
    assert len(server.bodies) == 6
    assert pauses == [module.LONGEST_PAUSE] * 5


def test_a_server_that_hangs_is_asked_again():
    answers = iter([1.0, "now"])
    with serving(lambda body: next(answers)) as server:
        client, pauses = endpoint_of(server, timeout=0.2)
        assert client.chat(ASK, max_tokens=5).text == "now"
    assert len(pauses) == 1


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    refusal = (401, {"error": {"message": "Incorrect API key provided: sk-very-secret"}})
    with serving(lambda body: refusal) as server:
        client, pauses = endpoint_of(server, key_variable="MY_KEY")
        with pytest.raises(EndpointDown) as caught:
            client.chat(ASK, max_tokens=5)
    assert server.headers_seen[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in f"{caught.value!r} {vars(client)}"
    assert "MY_KEY (set)" in str(caught.value)
    assert pauses == []  # asking again would not help


def test_newer_models_get_the_names_that_they_know():
    def answer(body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}
        if "temperature" in body:
            return 400, {"error": {"message": "Unsupported value: 'temperature' does not support 0.0."}}
        return "fine"

    with serving(answer) as server:
        client, _ = endpoint_of(server)
        assert client.chat(ASK, max_tokens=5).text == "fine"
        assert client.chat(ASK, max_tokens=6).text == "fine"
    assert len(server.bodies) == 4
    assert server.bodies[-1] == {"model": "fake", "messages": ASK, "max_completion_tokens": 6}


def test_several_requests_at_once_learn_the_names():
    together = threading.Barrier(4)

    def answer(body):
        if "max_tokens" in body:
            together.wait(5)  # all four are refused at the same time
            return 400, {"error": {"message": "use 'max_completion_tokens', not max_tokens"}}
        if "odd" in body:
            return 400, {"error": {"message": "unknown field odd"}}
        return "fine"

    with serving(answer) as server:
        client, _ = endpoint_of(server)
        replies = dict(in_parallel(lambda _: client.chat(ASK, max_tokens=5, extra={"odd": 1}), range(4), 4))
    assert [getattr(reply, "text", reply) for reply in replies.values()] == ["fine"] * 4


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ((400, {"error": {"message": "too long"}}), RequestRefused, "400 too long"),
        ((404, {"error": {"message": "no such model"}}), EndpointDown, "no such model"),
        ((200, {"choices": []}), RequestRefused, "no chat completion"),
        ((200, {"choices": [{"message": {"content": ["x"]}}]}), RequestRefused, "no chat completion"),
        ((200, {"choices": [{"message": {"content": "x"}}], "usage": "none"}), RequestRefused, "no chat completion"),
        ((302, {}, {"Location": "http://example.com/"}), RequestRefused, "302"),  # not followed
    ],
)
def test_refusals(answer, kind, message):
    with serving(lambda body: answer) as server:
        client, pauses = endpoint_of(server)
        with pytest.raises(kind, match=message):
            client.chat(ASK, max_tokens=5)
    assert pauses == []


def test_addresses():
    with pytest.raises(EndpointDown, match="nobody answers there. Is the server started"):
        Endpoint("http://127.0.0.1:9", "m").chat(ASK, max_tokens=5)
    for text in ("127.0.0.1:8000", "ftp://a", "http://a:b", "http://user:secret@a/v1", "http://a/v1?key=secret"):
        with pytest.raises(UsageError) as caught:
            Endpoint(text, "m", flag="--judge")
        assert "secret" not in str(caught.value)
    assert Endpoint("http://a:1", "m").url == "http://a:1/v1"
    assert Endpoint("https://a/api/v3/", "m").url == "https://a:443/api/v3"
    with serving(lambda body: "", models=("a", "b")) as server, pytest.raises(UsageError, match="it offers: a, b"):
        Endpoint(server.url)


def test_work_in_parallel_comes_with_its_index_and_its_failures():
    def work(number: int) -> int:
        if number == 3:
            raise UserError("three")
        time.sleep(0.01 * (5 - number))
        return number * number

    found = dict(in_parallel(work, range(5), 3))
    assert isinstance(found.pop(3), UserError)
    assert found == {0: 0, 1: 1, 2: 4, 4: 16}
    assert list(in_parallel(work, [], 3)) == []


def test_a_closed_iterator_starts_nothing_more():
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.02)
        return number

    replies = in_parallel(work, range(100), 2)
    next(replies)
    replies.close()
    time.sleep(0.1)
    assert len(started) < 10
