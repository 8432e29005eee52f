"""A server's model under test: validated and evaluated like a local one, with nothing loaded here."""

from __future__ import annotations

import json

import pytest
from chat_server import serving

from unsloth_factory.commands import evaluate, validate
from unsloth_factory.commands.evaluating import generated as evaluate_generated
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
    messages = server.bodies[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]  # the worked example is a turn
    report = json.loads((tmp_path / "o/gsm8k_endpoint.json").read_text(encoding="utf-8"))
    assert report["metrics"]["fake"]["accuracy"]["value"] == 0.5
    lines = (tmp_path / "o/gsm8k_endpoint_samples.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["fake"]["reasoning"] == "6?"
    assert first["prompt_tokens"] == sum(len(message["content"]) for message in messages) // 4


QUESTIONS = 30


@pytest.fixture
def toy_task(tmp_path):
    """Thirty questions whose right letter goes round; the worked example is apart."""
    for split, rows in (
        ("dev", ["0,shot,x,y,z,B"]),
        ("val", [f"{n},q{n}?,x,y,z,{'ABC'[n % 3]}" for n in range(QUESTIONS)]),
    ):
        (tmp_path / split).mkdir()
        text = "nr,stem,A,B,C,key\n" + "\n".join(rows) + "\n"
        (tmp_path / split / "toy.csv").write_text(text, encoding="utf-8")
    task = tmp_path / "toy.yaml"
    task.write_text(
        "title: Toy\nlayout: '{split}/{subject}.csv'\nletters: [A, B, C]\nfolder: .\n"
        "columns: {id: nr, question: stem, answer: key}\n"
        "prompts: {zh: {intro: '', question: \"{question}\\n{choices}\\n答案：\"}}\n",
        encoding="utf-8",
    )
    return task


def letters(top: dict[str, float]):
    """A chat completion with the likeliest first tokens."""
    entries = [{"token": token, "logprob": value} for token, value in top.items()]
    message = {"role": "assistant", "content": next(iter(top))}
    choice = {"message": message, "logprobs": {"content": [{"token": "x", "logprob": -1, "top_logprobs": entries}]}}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 11}}


def number_of(body) -> int:
    return int(body["messages"][-1]["content"].split("?")[0][1:])


def evaluated(toy_task, answer, **options):
    with serving(answer) as server:
        remote = EndpointSettings(endpoint=server.url)
        config = EvaluateConfig(task=str(toy_task), remote=remote, save_dir=str(toy_task.parent / "o"), **options)
        assert evaluate.run(config) == 0
    report = json.loads((toy_task.parent / "o/toy_endpoint.json").read_text(encoding="utf-8"))
    lines = (toy_task.parent / "o/toy_endpoint_samples.jsonl").read_text(encoding="utf-8").splitlines()
    return server, report, list(map(json.loads, lines))


def test_choices_are_scored_by_a_servers_log_probabilities(toy_task):
    def knows(body):
        right = "ABC"[number_of(body) % 3]
        # the right letter wins only if the two ways to write it are added up
        return letters({"D": -0.1, "ABC"[number_of(body) % 3 - 1]: -1.0, right: -1.2, f" {right}": -1.2, "the": -9.0})

    server, report, records = evaluated(toy_task, knows)
    body = next(body for body in server.bodies if number_of(body) == 4)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == "B"
    assert body["messages"][2]["content"] == "q4?\nA. x\nB. y\nC. z\n答案："
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert report["metrics"]["fake"]["micro accuracy"]["value"] == 1.0
    assert [record["id"] for record in records[:3]] == ["0", "1", "2"]
    scores = records[0]["fake"]["logprobs"]
    assert scores["A"] == pytest.approx(-1.2 + 0.693147, abs=1e-4)
    assert scores["C"] == -1.0
    assert scores["B"] == -10.0  # less than all that was shown
    assert records[0]["prompt_tokens"] == 11
    assert not any("no letter" in note for note in report["notes"])


def test_no_letter_at_all_is_chance_and_is_said(toy_task):
    _, report, records = evaluated(toy_task, lambda body: letters({"<think>": -0.1, "The": -3.0}))
    chosen = [record["fake"]["choice"] for record in records]
    assert min(chosen.count(letter) for letter in "ABC") >= 3  # not always the same one
    assert "In 30 questions no letter was among the likeliest" in report["notes"][-1]
    assert evaluated(toy_task, lambda body: letters({"<think>": -0.1, "The": -3.0}))[2] == records


def test_servers_without_log_probabilities_and_flags_that_need_a_tokenizer(toy_task):
    with pytest.raises(UserError, match="gives no log-probabilities"):
        evaluated(toy_task, lambda body: "A")

    def refuses(body):
        return (400, {"error": {"message": "logprobs: not supported here."}}) if "logprobs" in body else "A"

    with pytest.raises(UserError, match="gives no log-probabilities"):
        evaluated(toy_task, refuses)
    with pytest.raises(UsageError, match="no --choice_mode"):
        evaluated(toy_task, refuses, choice_mode="text")
    with pytest.raises(UsageError, match="no --no_chat_template"):
        evaluated(toy_task, refuses, no_chat_template=True)
    with pytest.raises(UsageError, match="are for generated answers"):
        evaluated(toy_task, refuses, max_samples=3)
