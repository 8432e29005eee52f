"""Who may ask the server, in which order, what becomes of clients that leave, and odd JSON."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest
from server_client import HELLO, Model, ask, chat, error_of, served

from unsloth_factory.inference.server.engine import Queue
from unsloth_factory.inference.server.requests import RequestError


def test_models_and_health():
    with served(Model()) as server:
        status, value = ask(server, None, "/v1/models", "GET")
        assert (status, [entry["id"] for entry in value["data"]]) == (200, ["m"])
        assert ask(server, None, "/v1/models/m", "GET")[1]["id"] == "m"
        assert ask(server, None, "/health", "GET")[0] == 200


def test_who_may_ask():
    with served(Model(), key="secret") as server:
        assert error_of(chat(server))[0] == 401
        assert ask(server, {"messages": HELLO}, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert ask(server, None, "/v1/models", "GET")[0] == 401
        assert ask(server, {"messages": HELLO}, headers={"Authorization": "Bearer secret"})[0] == 200
    with served(Model()) as server:  # a page that has its own name resolved to this machine
        assert ask(server, {"messages": HELLO}, headers={"Host": "evil.example:8000"})[0] == 403
        assert ask(server, {"messages": HELLO}, headers={"Host": "localhost:1"})[0] == 200


def test_one_at_a_time_in_the_order_of_coming():
    model = Model("abc", pause=0.03)
    with served(model) as server:
        threads = []
        for number in range(4):
            body = {"messages": [{"role": "user", "content": str(number)}]}
            threads.append(threading.Thread(target=ask, args=(server, body)))
            threads[-1].start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
    assert model.most == 1
    assert [asked[0] for asked in model.asked] == [f"user:{number}|" for number in range(4)]


def test_a_full_queue_sends_away():
    with served(Model("a" * 50, pause=0.01), most_waiting=1) as server:
        threads = [threading.Thread(target=chat, args=(server,)) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        status, message, _ = error_of(chat(server))
        assert status == 503
        assert "1 requests wait already" in message
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("streaming", [True, False])
def test_nothing_is_computed_for_a_client_that_left(streaming):
    model = Model("a" * 90, pause=0.02)
    with served(model) as server:
        client = socket.create_connection(("127.0.0.1", server.server_port))
        body = json.dumps({"messages": HELLO, "stream": streaming}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.2)
        client.close()
        time.sleep(0.2)
        assert model.running == 0
        assert 0 < model.made < 40
        model.text = "next"
        assert chat(server)[0] == 200


def test_stopping_breaks_the_answer_off_and_sends_the_waiting_away():
    model = Model("a" * 90, pause=0.05)
    found = []
    with served(model) as server:
        threads = [threading.Thread(target=lambda: found.append(_status(server))) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        started = time.monotonic()
        assert server.queue.close(5.0)
        assert time.monotonic() - started < 1.0
        for thread in threads:
            thread.join()
    assert model.made < 20
    assert sorted(map(str, found)) == ["503", "broken off"]


def test_stopping_waits_for_every_thread_but_not_for_idle_connections():
    with served(Model("a" * 90, pause=0.02)) as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        idle.request("GET", "/health")
        idle.getresponse().read()
        threading.Thread(target=lambda: _status(server), daemon=True).start()
        time.sleep(0.2)
        threads = list(server._connections)
        assert len(threads) == 2
        server.shutdown()
        started = time.monotonic()
        server.stop(5.0)
        assert time.monotonic() - started < 2.0
        assert not any(thread.is_alive() for thread in threads)
        assert server._connections == {}
        idle.close()


def _status(server):
    try:
        return chat(server)[0]
    except http.client.HTTPException:
        return "broken off"


def test_a_waiting_client_that_left_gives_its_place_up():
    queue = Queue(5)
    with queue.turn(lambda: False), pytest.raises(ConnectionError), queue.turn(lambda: True):
        pytest.fail("it had the turn")
    with queue.turn(lambda: False):
        pass
    assert queue.close(0.1)
    with pytest.raises(RequestError, match="stopping"), queue.turn(lambda: False):
        pytest.fail("it had the turn")


def test_one_connection_serves_several_requests():
    with served(Model()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        for _ in range(3):
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps({"messages": HELLO}),
                {"Content-Type": "application/json; charset=utf-8"},
            )
            assert json.loads(connection.getresponse().read())["choices"]
        connection.close()


def test_no_json_makes_it_fail():
    """Every field with values of every kind: an answer or a refusal in the right form, never a failure of ours."""
    odd = [
        None,
        True,
        0,
        -1,
        2**70,
        1e308,
        0.5,
        "",
        "x",
        "\ud800",
        [],
        ["a"],
        [[]],
        {},
        {"a": 1},
        [None],
        [{"role": []}],
    ]
    odd += [
        [{"role": "user", "content": value}]
        for value in (None, 3, "\ud800", [], [{}], [{"type": "text"}], {"type": "text"})
    ]
    fields = ["messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"]
    fields += ["seed", "stop", "stream", "stream_options", "n", "tools", "response_format", "chat_template_kwargs"]
    seen = set()
    with served(Model("ok")) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        for path, names in (("/v1/chat/completions", fields), ("/v1/completions", ["prompt", "echo"])):
            for name in names:
                for value in odd:
                    body = json.dumps({"messages": HELLO, "prompt": "hi", name: value})
                    connection.request("POST", path, body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    text = response.read().decode()
                    assert response.status in (200, 400, 404), (path, name, value, text)
                    seen.add(response.status)
                    if response.status != 200:
                        assert json.loads(text)["error"]["message"]
    assert seen == {200, 400, 404}
