"""`uf validate --judge`: what it judges, compares, refuses and costs."""

from __future__ import annotations

import json
import re

import pytest
from chat_server import serving
from judge_cases import FOURS, longer_wins, shown

from unsloth_factory.commands import validate as command
from unsloth_factory.config.commands import ValidateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.judging import JudgeSettings
from unsloth_factory.config.settings import DataSettings, GenerationSettings, ModelSettings
from unsloth_factory.evaluation.judge.judges import LoadedJudge
from unsloth_factory.inference.endpoint import Reply
from unsloth_factory.run.atomic import write_json, write_text


@pytest.fixture
def kept(tmp_path):
    """A folder as `uf validate` leaves it."""
    records = [
        {"source": f"d:{n}", "question": f"q{n}?", "reference": "r"}
        | {name: {"answer": text, "scores": {}} for name, text in (("base", "b"), ("tuned", "t" * (n + 1)))}
        for n in range(3)
    ]
    write_json(tmp_path / "validation.json", {"metrics": {"base": {}, "tuned": {}}})
    write_text(tmp_path / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_the_command_judges_what_is_there_without_loading_a_model(kept, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_source", lambda *_: pytest.fail("loaded"))
    monkeypatch.setenv("UF_API_KEY", "sk-secret")
    with serving(longer_wins) as server:
        settings = JudgeSettings(judge=server.url)
        assert command.run(ValidateConfig(save_dir=str(kept), judging=settings)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "judge fake: 12 requests (0 more are in the cache), about" in printed
    assert "tuned against base: win rate 83.3%" in printed
    assert "the order of showing changed 0% of its verdicts" in printed
    report = json.loads((kept / "judge.json").read_text(encoding="utf-8"))
    assert report["comparisons"]["overall score"]["tuned"] == 2.0
    assert len((kept / "judge_samples.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert not [path for path in kept.iterdir() if b"sk-secret" in path.read_bytes()]
    assert "sk-secret" not in printed


def test_the_command_answers_first_where_nothing_is_there(random_model_dir, tmp_path, capsys):
    data = tmp_path / "qa.jsonl"
    row = [("user", "你好"), ("assistant", "你好。"), ("user", "再见"), ("assistant", "再见。")]
    data.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n", encoding="utf-8")
    with serving(lambda body: FOURS) as server:
        config = ValidateConfig(
            model=ModelSettings(model=str(random_model_dir)),
            data=DataSettings(dataset=str(data)),
            generation=GenerationSettings(max_new_tokens=4),
            judging=JudgeSettings(judge=server.url),
            save_dir=str(tmp_path / "out"),
        )
        assert command.run(config) == 0
        assert command.run(config) == 0
    assert len(server.bodies) == 1  # one variant, one question, and the second time it is known
    assert "user: 你好" in shown(server.bodies[0])["EARLIER CONVERSATION"]
    report = json.loads((tmp_path / "out/judge.json").read_text(encoding="utf-8"))
    assert report["metrics"]["base"]["safety"]["value"] == 4.0


def keep(folder, answers: dict[str, dict[str, str]]) -> str:
    """A validation's files: question -> variant -> answer."""
    variants = list(next(iter(answers.values())))
    write_json(folder / "validation.json", {"metrics": {variant: {} for variant in variants}})
    records = [
        {"source": "d", "question": q, "reference": "r"} | {name: {"answer": text} for name, text in given.items()}
        for q, given in answers.items()
    ]
    write_text(folder / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def test_further_runs_are_compared_and_rated(tmp_path, capsys):
    questions = [f"q{n}" for n in range(6)]
    ours = keep(tmp_path / "ours", {q: {"base": "x", "tuned": "xx"} for q in questions})
    second = tmp_path / "second" / "validation_results"
    keep(second, {q: {"base": "x", "tuned": "xxxx"} for q in reversed(questions[1:])})
    plain = keep(tmp_path / "plain", {q: {"base": "xxx"} for q in questions})
    with serving(longer_wins) as server:

        def judge(*others, **options):
            settings = JudgeSettings(
                judge=server.url, judge_mode="pairwise", judge_against=",".join(map(str, others)), **options
            )
            return command.run(ValidateConfig(save_dir=ours, judging=settings))

        assert judge(tmp_path / "second", plain, judge_price="1000,2000") == 0
        printed = " ".join(capsys.readouterr().out.split())
        report = json.loads((tmp_path / "ours/judge.json").read_text(encoding="utf-8"))
        for others, message in (
            ([tmp_path / "nothing"], "no answers of a validation there"),
            ([plain, plain], "a second model by the name of plain"),
            ([keep(tmp_path / "foreign", {"other": {"base": "x"}})], "none of its questions is among ours"),
        ):
            with pytest.raises(UserError, match=message):
                judge(*others)
    assert report["n"] == 5
    assert "1 of 6 questions were not answered by all" in printed
    cost = float(re.search(r"a cost of about ([\d.]+)", printed)[1])
    tokens = [
        int(n.replace(",", "")) for n in re.search(r"about ([\d,]+) tokens in and ([\d,]+) out", printed).groups()
    ]
    assert cost == pytest.approx((1000 * tokens[0] + 2000 * tokens[1]) / 1e6, abs=0.006)
    ratings = {name: rating["value"] for name, rating in report["details"]["ratings"].items()}
    assert sorted(ratings, key=ratings.get) == ["base", "tuned", "plain", "second"]
    page = (tmp_path / "ours/judge.html").read_text(encoding="utf-8")
    assert re.findall(r"<td>(\w+)</td><td class=\"num\">\d+</td>", page) == ["second", "plain", "tuned", "base"]
    assert page.count("Lost by tuned") == 1
    assert page.count('<div class="card sample">') == 5
    assert printed.index("rating second") < printed.index("rating base")


@pytest.mark.parametrize("price", ["1", "a,b", "1,-2", "1,2,3"])
def test_prices_that_are_none(price):
    with pytest.raises(UsageError, match="two numbers by a comma"):
        JudgeSettings(judge_price=price)


def test_damaged_answers_and_wrong_flags(kept):
    (kept / "samples.jsonl").write_text('{"question": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"samples.jsonl: not the answers of a validation"):
        command.run(ValidateConfig(save_dir=str(kept), judging=JudgeSettings(judge="http://127.0.0.1:9/v1")))
    with pytest.raises(UsageError, match="judge_concurrency 0"):
        JudgeSettings(judge_concurrency=0)
    with pytest.raises(UsageError) as caught:
        JudgeSettings(judge_key_env="sk-this-is-a-key")
    assert "sk-this" not in str(caught.value)


def test_a_local_model_judges(random_model_dir, tmp_path):
    """A random model says nothing plain; what counts is that every prompt is answered, and the long ones refused."""
    from unsloth_factory.data.template import ChatTemplate
    from unsloth_factory.model.load import load_model

    loaded = load_model(ModelSettings(model=str(random_model_dir)))
    judge = LoadedJudge(loaded, ChatTemplate.from_tokenizer(loaded.tokenizer), 8, 2)
    prompts = [[{"role": "user", "content": "judge this " * n}] for n in (1, 3, 2000, 2)]
    replies = dict(judge.ask(prompts))
    assert sorted(replies) == [0, 1, 2, 3]
    assert isinstance(replies.pop(2), UserError)
    assert all(isinstance(reply, Reply) and reply.completion_tokens <= 8 for reply in replies.values())
    assert replies[1].prompt_tokens > replies[0].prompt_tokens
    alone = dict(judge.ask([prompts[1]]))[0]
    assert alone.text == replies[1].text
