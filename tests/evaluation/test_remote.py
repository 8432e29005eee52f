"""A server's model under test: validated and evaluated like a local one, with nothing loaded here."""

from __future__ import annotations

import json

import pytest
from chat_server import serving

from unsloth_factory.commands import evaluate, evaluate_generated, validate
from unsloth_factory.config.commands import EvaluateConfig, ValidateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.judging import EndpointSettings, JudgeSettings
from unsloth_factory.config.settings import DataSettings, FinishedRun, GenerationSettings
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.endpoint import Endpoint, Reply
from unsloth_factory.inference.remote import RemoteModel, RemoteTemplate
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.run.folder import RunFolder, RunManifest


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    for module in (validate, evaluate_generated, evaluate):
        monkeypatch.setattr(module, "load_source", lambda *_: pytest.fail("loaded"))


def test_prompts_and_answers_go_through_unchanged():
    template = RemoteTemplate()
    turns = (Turn("system", "S"), Turn("user", '引号" <|im_end|>\n'))
    prompt = template.encode_prompt(turns)
    assert template.messages(prompt) == [{"role": t.role, "content": t.content} for t in turns]
    for reply, expected in (
        (Reply("你好，世界", completion_tokens=3), (None, "你好，世界", [])),
        (Reply("<think>\nhm\n</think>\n\nyes", completion_tokens=50), ("hm", "yes", [])),
        (Reply("yes", "hm", completion_tokens=2), ("hm", "yes", [])),
        (Reply("<think>never done", finished=False, completion_tokens=4), ("never done", "", [])),
        (Reply("", completion_tokens=0), (None, "", [])),
    ):
        ids = template.encode_reply(reply)
        assert len(ids) == reply.completion_tokens
        assert template.decode_answer(ids) == expected


def test_answers_are_in_the_order_of_the_prompts_and_settings_are_sent():
    def answer(body):
        text = body["messages"][0]["content"]
        return 0.2 if text == "slow" else f"to {text}"

    with serving(answer) as server:
        remote = RemoteModel(Endpoint(server.url), RemoteTemplate(), thinking=False, at_a_time=3)
        prompts = [remote.template.encode_prompt((Turn("user", text),)) for text in ("slow", "b", "c")]
        made = remote.answer(prompts, max_new_tokens=9, sampling=Sampling(temperature=0.5, top_p=0.9, seed=4))
    assert [remote.template.decode_answer(one.ids)[1] for one in made] == ["too late", "to b", "to c"]
    settings = {name: value for name, value in server.bodies[0].items() if name != "messages"}
    assert settings == {
        "model": "fake",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 4,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_servers_that_do_not_know_the_thinking_switch_are_asked_without_it():
    def answer(body):
        if "chat_template_kwargs" in body:
            return 400, {"error": {"message": "Unrecognized request argument: chat_template_kwargs"}}
        return "fine"

    with serving(answer) as server:
        remote = RemoteModel(Endpoint(server.url), RemoteTemplate(), thinking=True, at_a_time=1)
        prompt = remote.template.encode_prompt((Turn("user", "q"),))
        assert len(remote.answer([prompt, prompt], max_new_tokens=5)) == 2
    assert len(server.bodies) == 3


def test_a_failed_request_is_no_wrong_answer():
    with serving(lambda body: (400, {"error": "context length"})) as server:
        remote = RemoteModel(Endpoint(server.url), RemoteTemplate())
        with pytest.raises(UserError, match="context length"):
            remote.answer([remote.template.encode_prompt((Turn("user", "q"),))], max_new_tokens=5)


@pytest.fixture
def run(tmp_path):
    """A run of which only the record and the held-out samples are left."""
    folder = RunFolder(tmp_path / "run")
    folder.final_adapter.mkdir(parents=True)
    folder.write(RunManifest(command="sft", model="gone", base_fingerprint="", thinking="off", system="你是一名医生。"))
    rows = [("高血压怎么办？", "低盐饮食。"), ("发热怎么办？", "多喝水。")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "source": "d:1"})
        for q, a in rows
    ]
    folder.validation_split.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_validate_a_servers_model_as_the_run_was_trained(run, capsys):
    def answer(body):
        if "JSON object" in body["messages"][-1]["content"]:
            return '{"winner": "A"}'
        return "低盐饮食" if "高血压" in body["messages"][-1]["content"] else "不知道。"

    with serving(answer, models=("medic",)) as server:
        config = ValidateConfig(
            source=FinishedRun(run=str(run.path)),
            remote=EndpointSettings(endpoint=server.url),
            generation=GenerationSettings(max_new_tokens=33),
        )
        assert validate.run(config) == 0
        body = server.bodies[0]
        assert body["messages"][0] == {"role": "system", "content": "你是一名医生。"}
        assert (body["max_tokens"], body["chat_template_kwargs"]) == (33, {"enable_thinking": False})
        report = json.loads((run.validation_results / "endpoint.json").read_text(encoding="utf-8"))
        assert report["metrics"]["medic"]["exact match"]["value"] == 0.5
        assert report["metrics"]["medic"]["stopped by itself"]["value"] == 1.0
        assert report["model"] == {"model": "medic", "endpoint": server.url, "engine": "endpoint"}
        assert (run.validation_results / "endpoint.html").is_file()
        assert "endpoint_samples.jsonl" in capsys.readouterr().out
        asked = len(server.bodies)
        judged = ValidateConfig(
            source=config.source, remote=config.remote, judging=JudgeSettings(judge=server.url, judge_mode="pairwise")
        )
        assert validate.run(judged) == 0  # one variant: nothing to compare, nothing asked
        assert len(server.bodies) == asked
        assert (run.validation_results / "endpoint_judge.json").is_file()
    with pytest.raises(UsageError, match="--gguf and --endpoint"):
        validate.run(ValidateConfig(source=config.source, remote=config.remote, gguf="all"))


def test_validate_without_a_run(tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text('{"question": "你好", "answer": "你好。"}\n', encoding="utf-8")
    with serving(lambda body: "你好") as server:
        config = ValidateConfig(
            data=DataSettings(dataset=str(data)),
            remote=EndpointSettings(endpoint=server.url, endpoint_model="other"),
            save_dir=str(tmp_path / "out"),
        )
        assert validate.run(config) == 0
    assert server.bodies[0]["model"] == "other"
    assert "chat_template_kwargs" not in server.bodies[0]
    report = json.loads((tmp_path / "out/endpoint.json").read_text(encoding="utf-8"))
    assert report["metrics"]["other"]["exact match"]["value"] == 1.0


def test_gsm8k_by_a_server(tmp_path):
    rows = {"train": [("1+1", "<<1+1=2>>2\n#### 2")], "test": [("2+2", "x\n#### 4"), ("3+3", "x\n#### 6")]}
    for split, pairs in rows.items():
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def answer(body):
        return "<think>6?</think>The answer is 4."

    with serving(answer) as server:
        remote = EndpointSettings(endpoint=server.url)
        config = EvaluateConfig(task="gsm8k", task_dir=str(tmp_path), remote=remote, save_dir=str(tmp_path / "o"))
        assert evaluate.run(config) == 0
        with pytest.raises(UsageError, match="scored by log-probabilities"):
            evaluate.run(EvaluateConfig(task="ceval", task_dir=str(tmp_path), remote=remote))
    messages = server.bodies[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]  # the worked example is a turn
    report = json.loads((tmp_path / "o/gsm8k_endpoint.json").read_text(encoding="utf-8"))
    assert report["metrics"]["fake"]["accuracy"]["value"] == 0.5
    lines = (tmp_path / "o/gsm8k_endpoint_samples.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["fake"]["reasoning"] == "6?"
    assert first["prompt_tokens"] == sum(len(message["content"]) for message in messages) // 4
