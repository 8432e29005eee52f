"""validate, evaluate and chat through their commands, on a random model with an adapter in a run folder."""

from __future__ import annotations

import io
import json

import pytest
import torch

from unsloth_factory.commands import chat, evaluate, validate
from unsloth_factory.commands.source import resolve_source, system_prompt
from unsloth_factory.config.commands import ChatConfig, EvaluateConfig, ValidateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, FinishedRun, GenerationSettings, ModelSettings, TuningSettings
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder, RunManifest

SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def run_folder(random_model_dir, tmp_path_factory) -> RunFolder:
    """A finished LoRA run whose adapter really changes the model."""
    folder = RunFolder(tmp_path_factory.mktemp("run") / "mine")
    loaded = load_model(
        ModelSettings(model=str(random_model_dir)), for_training=True, tuning=TuningSettings(lora_r=4), seed=1
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder.path.mkdir()
    loaded.save_adapter(folder.final_adapter)
    folder.write(
        RunManifest(
            command="sft",
            model=str(random_model_dir),
            base_fingerprint=loaded.fingerprint,
            thinking="off",
            domain="medical",
            system="你是一名医生。",
        )
    )
    folder.template.write_text(loaded.tokenizer.chat_template, encoding="utf-8")
    rows = [("高血压患者平时注意什么？", "低盐饮食，按时服药。"), ("发热怎么办？", "多喝水。"), ("你好", "你好。")]
    with open(folder.validation_split, "w", encoding="utf-8") as file:
        for number, (question, answer) in enumerate(rows):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "source": f"d.csv:{number + 2}"}, ensure_ascii=False) + "\n")
    return folder


def test_validate_answers_as_base_and_as_tuned_from_one_load(run_folder, capsys, monkeypatch):
    loads = []
    original = validate.load_source
    monkeypatch.setattr(validate, "load_source", lambda *args: (loads.append(1), original(*args))[1])
    config = ValidateConfig(source=FinishedRun(run=str(run_folder.path)), generation=SHORT, max_samples=2)
    assert validate.run(config) == 0
    assert loads == [1]
    report = json.loads((run_folder.validation_results / "validation.json").read_text(encoding="utf-8"))
    assert report["n"] == 2
    assert report["settings"]["thinking"] is False
    assert report["settings"]["domain"] == "medical"
    assert report["metrics"]["base"].keys() == report["metrics"]["tuned"].keys()
    assert report["metrics"]["base"]["exact match"] == {"value": 0.0, "standard_error": 0.0, "n": 2, "better": "higher"}
    assert "exact match" in report["comparisons"]
    perplexity = report["comparisons"]["reference perplexity"]
    assert perplexity["base"] != perplexity["tuned"]
    assert min(perplexity["base"], perplexity["tuned"]) > 1
    assert report["metrics"]["tuned"]["token F1"]["n"] == 2
    page = (run_folder.validation_results / "validation.html").read_text(encoding="utf-8")
    assert "From base to tuned" in page
    assert "高血压患者平时注意什么？" in page
    assert "| **exact match** |" in (run_folder.validation_results / "validation.md").read_text(encoding="utf-8")
    lines = (run_folder.validation_results / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["source"] for record in records] == ["d.csv:2", "d.csv:3"]
    assert records[0]["reference"] == "低盐饮食，按时服药。"
    assert records[0]["base"]["answer"] != records[0]["tuned"]["answer"]
    assert records[0]["tuned"]["tokens"] <= 8
    printed = capsys.readouterr().out
    assert "exact match" in printed
    assert "validation.json" in printed


def test_answers_compared_by_an_encoder(run_folder, encoder_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bert_score", reason="BERTScore is part of the extra `eval`")
    settings = {"source": FinishedRun(run=str(run_folder.path)), "generation": SHORT, "save_dir": str(tmp_path)}
    assert validate.run(ValidateConfig(**settings, bertscore=str(encoder_dir), bertscore_layer=2)) == 0
    report = json.loads((tmp_path / "validation.json").read_text())
    for variant in ("base", "tuned"):
        assert 0 < report["metrics"][variant]["BERTScore F1"]["value"] < 1
    assert "BERTScore F1" in report["comparisons"]
    assert any("layer 2, no idf" in note for note in report["notes"])
    assert "BERTScore F1" in (tmp_path / "validation.html").read_text()
    monkeypatch.setattr(validate, "load_source", None)  # refused before anything is loaded
    for wrong, message in ((str(tmp_path / "none"), "is no folder"), (str(tmp_path), "holds no encoder")):
        with pytest.raises(UsageError, match=message):
            validate.run(ValidateConfig(**settings, bertscore=wrong))


def test_validate_a_dataset_without_a_run(random_model_dir, tmp_path, capsys):
    data = tmp_path / "qa.jsonl"
    data.write_text('{"question": "你好", "answer": "你好。"}\n', encoding="utf-8")
    config = ValidateConfig(
        model=ModelSettings(model=str(random_model_dir)),
        data=DataSettings(dataset=str(data)),
        generation=SHORT,
        save_dir=str(tmp_path / "out"),
    )
    assert validate.run(config) == 0
    report = json.loads((tmp_path / "out/validation.json").read_text(encoding="utf-8"))
    assert list(report["metrics"]) == ["base"]
    assert report["comparisons"] == {}
    assert report["metrics"]["base"]["term coverage"]["n"] == 0
    with pytest.raises(UsageError, match="Validate on what"):
        validate.run(ValidateConfig(model=ModelSettings(model=str(random_model_dir))))


@pytest.fixture
def toy_task(tmp_path):
    """A benchmark added by one YAML file."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "val").mkdir()
    header = "nr,stem,A,B,C,key\n"
    (tmp_path / "dev/salt.csv").write_text(header + "0,盐多吗？,多,少,无,B\n", encoding="utf-8")
    (tmp_path / "val/salt.csv").write_text(
        header + "0,血压高？,多盐,低盐,糖,B\n1,发热？,水,酒,盐,A\n", encoding="utf-8"
    )
    task = tmp_path / "toy.yaml"
    task.write_text(
        "title: Toy\nlayout: '{split}/{subject}.csv'\nletters: [A, B, C]\nfolder: .\n"
        "columns: {id: nr, question: stem, answer: key}\n"
        "prompts: {zh: {intro: '', question: \"{question}\\n{choices}\\n答案：\"}}\n",
        encoding="utf-8",
    )
    return task


@pytest.mark.parametrize("plain", [False, True])
def test_evaluate_a_benchmark_of_ones_own(run_folder, toy_task, capsys, plain):
    config = EvaluateConfig(
        source=FinishedRun(run=str(run_folder.path)), task=str(toy_task), n_shot=3, no_chat_template=plain
    )
    assert evaluate.run(config) == 0
    report = json.loads((run_folder.evaluation_results / "toy.json").read_text(encoding="utf-8"))
    assert report["n"] == 2
    assert report["settings"]["chat_template"] is not plain
    assert report["comparisons"]["macro accuracy"]["verdict"] == "no difference beyond the error"
    lines = (run_folder.evaluation_results / "toy_samples.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["base"]["logprobs"] != first["tuned"]["logprobs"]
    assert set(first["base"]["logprobs"]) == {"A", "B", "C"}
    printed = capsys.readouterr().out
    assert "letters chosen by tuned" in printed
    assert "3 worked examples were asked for" in printed


def test_choices_are_scored_where_the_model_answers(run_folder, toy_task):
    """The letter's log-probability equals that of a plain forward over the rendered conversation."""
    from unsloth_factory.data.template import ChatTemplate
    from unsloth_factory.data.types import Turn

    out = run_folder.path / "scored"
    source = FinishedRun(run=str(run_folder.path))
    assert evaluate.run(EvaluateConfig(source=source, task=str(toy_task), n_shot=1, save_dir=str(out))) == 0
    record = json.loads((out / "toy_samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    loaded = load_model(resolve_source(source, ModelSettings()).settings)
    template = ChatTemplate.from_tokenizer(loaded.tokenizer)
    turns = (
        Turn("user", "盐多吗？\nA. 多\nB. 少\nC. 无\n答案："),
        Turn("assistant", "B"),
        Turn("user", "血压高？\nA. 多盐\nB. 低盐\nC. 糖\n答案："),
    )
    text = template.render_prompt(turns, False)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    letter = loaded.tokenizer.encode(text + "B", add_special_tokens=False)[-1]
    with torch.no_grad():
        expected = loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letter]
    assert record["tuned"]["logprobs"]["B"] == pytest.approx(float(expected), abs=1e-4)
    assert record["prompt_tokens"] == len(ids)


def test_options_texts_are_scored_token_by_token(run_folder, toy_task):
    """Each option's log-probability, of several tokens, equals that of a plain forward without any adapter."""
    out = run_folder.path / "texts"
    source = FinishedRun(run=str(run_folder.path))
    config = EvaluateConfig(
        source=source, task=str(toy_task), n_shot=1, save_dir=str(out), no_chat_template=True, choice_mode="text"
    )
    assert evaluate.run(config) == 0
    record = json.loads((out / "toy_samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    loaded = load_model(ModelSettings(model=resolve_source(source, ModelSettings()).settings.model))
    prompt = "盐多吗？\n答案：少\n\n血压高？\n答案："
    start = len(loaded.tokenizer.encode(prompt))
    for letter, option in zip("ABC", ("多盐", "低盐", "糖"), strict=True):
        ids = loaded.tokenizer.encode(prompt + option)
        with torch.no_grad():
            scores = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(scores[place - 1, ids[place]]) for place in range(start, len(ids)))
        assert record["base"]["logprobs"][letter] == pytest.approx(expected, abs=1e-4)
    assert record["base"]["logprobs"] != record["tuned"]["logprobs"]


def test_evaluate_refuses_before_it_loads(run_folder, toy_task, monkeypatch):
    monkeypatch.setattr(evaluate, "load_source", lambda *_: pytest.fail("loaded"))
    source = FinishedRun(run=str(run_folder.path))
    with pytest.raises(UsageError, match=r"Did you mean salt\?"):
        evaluate.run(EvaluateConfig(source=source, task=str(toy_task), subjects="slat"))
    with pytest.raises(UsageError, match="ceval needs --task_dir"):
        evaluate.run(EvaluateConfig(source=source))
    with pytest.raises(UsageError, match="is no folder"):
        evaluate.run(EvaluateConfig(source=source, task_dir=str(toy_task)))


def talk_to(config: ChatConfig, text: str, monkeypatch, capsys) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert chat.run(config) == 0
    return capsys.readouterr()


def test_chat_in_a_pipe_answers_line_by_line(run_folder, monkeypatch, capsys):
    config = ChatConfig(source=FinishedRun(run=str(run_folder.path)), generation=SHORT)
    answer, aside = talk_to(config, "你好\n", monkeypatch, capsys)
    assert answer.strip()
    assert "engine standard" in aside
    out, err = talk_to(config, "你好\nclear\n\n你好\nexit\n再见\n", monkeypatch, capsys)
    assert out == 2 * answer
    assert "the conversation is forgotten" in err
    config = ChatConfig(source=config.source, generation=SHORT, no_context=True)
    assert talk_to(config, "你好\n你好\n", monkeypatch, capsys).out == 2 * answer


def test_chat_shows_thinking_apart_and_goes_on_after_an_interruption(monkeypatch, capsys):
    from rich.console import Console

    from unsloth_factory.inference.chat import ChatSession
    from unsloth_factory.inference.stream import StreamEvent

    class Template:
        def encode_prompt(self, turns, thinking):
            return [0] * len(turns[-1].content)

    def answer(prompt):
        yield StreamEvent("thinking", "想")
        yield StreamEvent("answer", "一\x1b[2J")
        if len(prompt) == 4:
            raise KeyboardInterrupt
        yield StreamEvent("answer", "二")

    session = ChatSession(template=Template(), answer_stream=answer, max_prompt_tokens=10)
    monkeypatch.setattr("sys.stdin", io.StringIO("stop\nlonger than the context\ngo\n"))
    chat.talk(session, Console(width=80))
    out, err = capsys.readouterr()
    assert out == "一[2J\n(stopped)\n一[2J二\n"
    assert err.count("想") == 2
    assert "error: The message makes a prompt of 23 tokens; 10 fit" in err


def test_ctrl_d_and_ctrl_c_at_the_prompt(monkeypatch, capsys):
    from rich.console import Console

    from unsloth_factory.inference.chat import ChatSession

    console = Console(width=80, force_terminal=True, color_system=None)
    keys = iter([KeyboardInterrupt, EOFError])

    def pressed(*_):
        raise next(keys)

    monkeypatch.setattr(console, "input", pressed)
    monkeypatch.setattr("sys.stdin", type("Tty", (io.StringIO,), {"isatty": lambda self: True})())
    chat.talk(ChatSession(template=None, answer_stream=None, max_prompt_tokens=1), console)
    assert "exit or Ctrl-D leaves" in capsys.readouterr().out


def test_explicit_flags_win_over_the_run(run_folder, random_model_dir, tmp_path):
    source = FinishedRun(run=str(run_folder.path))
    resolved = resolve_source(source, ModelSettings())
    assert resolved.settings.model == str(random_model_dir)
    assert resolved.settings.adapter == str(run_folder.final_adapter)
    assert resolved.settings.chat_template == str(run_folder.template)
    assert resolved.variants == ("base", "tuned")
    assert resolved.thinking is False
    assert system_prompt(resolved, None, None) == "你是一名医生。"
    assert system_prompt(resolved, "S", None) == "S"
    assert system_prompt(resolved, "", None) is None
    assert system_prompt(resolved, None, "legal") not in (None, "你是一名医生。")
    given = resolve_source(source, ModelSettings(model="tiny", adapter="mine", chat_template="chatml"))
    assert (given.settings.model, given.settings.adapter, given.settings.chat_template) == ("tiny", "mine", "chatml")
    with pytest.raises(UsageError, match="Give --run FOLDER of a training, or --model"):
        resolve_source(FinishedRun(), ModelSettings())
    with pytest.raises(UserError, match="not a run folder"):
        resolve_source(FinishedRun(run=str(tmp_path)), ModelSettings())


@pytest.mark.parametrize(("kind", "missing"), [("lora", "final_adapter"), ("full", "final_model")])
def test_a_run_that_has_not_finished(tmp_path, kind, missing):
    folder = RunFolder(tmp_path / "run")
    folder.write(RunManifest(command="sft", model="tiny", base_fingerprint="", finetuning_type=kind))
    with pytest.raises(UserError, match=rf"has no {missing}: its training has not finished"):
        resolve_source(FinishedRun(run=str(folder.path)), ModelSettings())
    (folder.path / missing).mkdir()
    resolved = resolve_source(FinishedRun(run=str(folder.path)), ModelSettings())
    assert resolved.variants == (("base", "tuned") if kind == "lora" else ("tuned",))


def test_a_gguf_outside_a_run_needs_its_model(tmp_path):
    with pytest.raises(UsageError, match="does not lie in a run folder"):
        chat.run(ChatConfig(gguf=str(tmp_path / "x.gguf")))
