"""The server's HTTP side over a stand-in model: forms, streams, stops, the queue, errors, and who may ask."""

from __future__ import annotations

import pytest
from server_client import HELLO, Model, ask, chat, error_of, served

from unsloth_factory.data.types import Turn
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.server.engine import StopStrings


def test_a_chat_completion():
    model = Model()
    with served(model, defaults={"system": "S", "thinking": False, "max_new_tokens": 50}) as server:
        status, value = chat(server, model="m", seed=5, temperature=0.5, top_p=0.9, max_tokens=40)
        template = server.engine.template
    assert status == 200
    assert value["object"] == "chat.completion"
    assert value["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "Hello, 世界!"},
        }
    ]
    assert value["usage"] == {"prompt_tokens": 17, "completion_tokens": 10, "total_tokens": 27}
    assert template.turns == (Turn("system", "S"), Turn("user", "hi"))
    assert template.thinking is False
    assert model.asked[0][1:] == (40, Sampling(temperature=0.5, top_p=0.9, top_k=20, seed=5))


def test_the_clients_system_prompt_and_thinking_win():
    with served(Model("<think>hm</think>yes"), defaults={"system": "S", "thinking": False}) as server:
        messages = [{"role": "developer", "content": [{"type": "text", "text": "mine"}]}, *HELLO]
        _, value = ask(server, {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}})
        assert server.engine.template.turns == (Turn("system", "mine"), Turn("user", "hi"))
        assert server.engine.template.thinking is True
    assert value["choices"][0]["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_a_stream_says_the_same():
    with served(Model("<think>hm</think>Hello, 世界!")) as server:
        _, events = chat(server, stream=True, stream_options={"include_usage": True})
        _, plain = chat(server, stream=True)
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"] for event in events[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, 世界!"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert [event["choices"][0]["finish_reason"] for event in events[-4:-2]] == [None, "stop"]
    assert events[-2]["usage"]["completion_tokens"] == 27
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events[:-1]}) == 1
    assert all("usage" not in event for event in plain[:-1])


def test_plain_completions_take_the_text_as_it_is():
    model = Model("<think>x")
    with served(model, defaults={"system": "S"}) as server:
        status, value = ask(server, {"prompt": "once<|im_end|>"}, "/v1/completions")
        _, events = ask(server, {"prompt": [104, 105], "stream": True}, "/v1/completions")
        assert error_of(ask(server, {"prompt": [70000]}, "/v1/completions"))[0] == 400
    assert status == 200
    assert value["object"] == "text_completion"
    assert value["choices"][0]["text"] == "<think>x"
    assert [asked[0] for asked in model.asked] == ["once<|im_end|>", "hi"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "<think>x"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_lengths_and_stop_strings():
    model = Model("one two three four")
    with served(model, max_positions=20) as server:
        assert chat(server, max_tokens=5)[1]["choices"][0]["finish_reason"] == "length"
        cut = chat(server, max_completion_tokens=90)[1]  # the context has 20, the prompt 8
        assert cut["usage"]["completion_tokens"] == 12
        assert cut["choices"][0]["finish_reason"] == "length"
        before = model.made
        stopped = chat(server, stop=[" thr", "zzz"])[1]
        assert stopped["choices"][0] | {"logprobs": 0} == {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": 0,
            "message": {"role": "assistant", "content": "one two"},
        }
        assert model.made - before == len("one two thr")  # nothing is computed beyond it
        assert chat(server, stop="one two three fiv")[1]["choices"][0]["message"]["content"] == "one two thre"


def test_stop_strings_by_pieces():
    for pieces in (["ab", "cd", "ef"], ["abcdef"], list("abcdef")):
        stops = StopStrings(("cde", "xyz"))
        assert "".join(map(stops.push, pieces)) + stops.finish() == "ab"
        assert stops.hit
    stops = StopStrings(("aab",))
    assert [stops.push(letter) for letter in "aaac"] == ["", "", "a", "aac"]
    assert stops.push("a") == ""
    assert stops.finish() == "a"
    both = StopStrings(("late", "la"))
    assert both.push("x late") == "x "
    assert StopStrings(()).push("abc") == "abc"


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
    ],
)
def test_what_is_not_understood_is_refused(fields, parameter):
    with served(Model()) as server:
        status, _, named = error_of(ask(server, {"messages": HELLO, **fields}))
        assert (status, named) == (400, parameter)
        assert chat(server)[0] == 200


def test_other_refusals(capsys):
    with served(Model()) as server:
        assert error_of(chat(server, model="gpt-4"))[0] == 404
        assert error_of(ask(server, {}, "/v1/embeddings"))[0] == 404
        assert error_of(ask(server, None, "/nothing", "GET"))[0] == 404
        assert error_of(ask(server, None, raw=b"{broken"))[:2] == (400, "The body is not a JSON object.")
        assert error_of(ask(server, None, raw=b"[" * 100_000))[0] == 400
        assert error_of(ask(server, None, raw=b"x" * 10, headers={"Content-Length": str(2**30)}))[0] == 413
        assert error_of(ask(server, {}, headers={"Content-Type": "text/plain"}))[0] == 415
        assert error_of(ask(server, {}, method="DELETE"))[0] == 501
        assert error_of(ask(server, {"messages": [{"role": "user", "content": "refuse"}]})) == (
            400,
            "the template refuses",
            None,
        )
        long = [{"role": "user", "content": "x" * 200}]
        status, value = ask(server, {"messages": long})
        assert (status, value["error"]["code"]) == (400, "context_length_exceeded")
        assert chat(server)[0] == 200
    with served(Model("broken")) as server:
        status, value = chat(server)
        assert (status, value["error"]["message"], value["error"]["type"]) == (500, "the child died", "server_error")
        _, events = chat(server, stream=True)
        assert events[-1]["error"]["message"] == "the child died"
        assert chat(server)[0] == 500  # it still answers
    with served(Model("bug")) as server:
        assert "terminal says more" in error_of(chat(server))[1]
    assert "RuntimeError: ours" in capsys.readouterr().err
