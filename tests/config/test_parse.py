"""Flags, YAML, aliases, and every way to get them wrong."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from unsloth_factory.cli import main
from unsloth_factory.config.commands import (
    ChatConfig,
    DpoConfig,
    EvaluateConfig,
    MergeConfig,
    ServeConfig,
    SftConfig,
    ValidateConfig,
)
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.fields import settings_of
from unsloth_factory.config.parse import build, flat_values, parse
from unsloth_factory.config.table import COMMANDS

REFERENCE = {
    "sft": "--model m --domain medical --dataset d.json --dataset_format alpaca --output_dir o --epochs 3 "
    "--max_seq_length 4096 --batch_size 1 --accumulation_steps 2 --dataloader_workers 2 --learning_rate 2e-4 "
    "--data_limit 6000 --no_packing --lr_scheduler_type cosine --save_steps 500 --logging_steps 10 --resume auto "
    "--lora_r 16 --lora_alpha 32 --lora_dropout 0.05",
    "dpo": "--model m --dataset d.json --output_dir o --beta 0.1 --adapter a --learning_rate 5e-6",
    "validate": "--model m --adapter a --domain medical --dataset d.json --max_samples 100",
    "evaluate": "--model m --adapter a --task ceval --task_dir d --n_shot 5 --lang zh --batch_size 4 --save_dir s",
    "chat": "--model m --adapter a --system hello --think_chain --max_new_tokens 512 --no_context",
    "merge": "--model m --adapter a --output o --dtype float16 --max_shard_size 4GB",
}


@pytest.mark.parametrize("command", REFERENCE)
def test_reference_flags_are_accepted(command: str) -> None:
    config_type = COMMANDS[command].config_type
    words = shlex.split(REFERENCE[command])
    values = flat_values(parse(config_type, words, command).config)
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            assert str(values[word[2:]]) == str(True if value.startswith("--") else type(values[word[2:]])(value))


def test_kebab_equals_snake() -> None:
    kebab = parse(SftConfig, ["--max-seq-length", "512", "--lora-r=8"]).config
    snake = parse(SftConfig, ["--max_seq_length", "512", "--lora_r", "8"]).config
    assert kebab == snake
    assert kebab.data.max_seq_length == 512
    assert kebab.tuning.lora_r == 8


def test_flag_beats_yaml_beats_default(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("epochs: 5\nlearning_rate: 1e-4\nlora_rank: 4\n")
    config = parse(SftConfig, [str(job), "--epochs", "2"]).config
    assert (config.loop.epochs, config.loop.learning_rate, config.tuning.lora_r) == (2, 1e-4, 4)
    assert config.loop.batch_size == SftConfig().loop.batch_size
    assert parse(SftConfig, [str(job), "epochs=1"]).config.loop.epochs == 1


def test_llama_factory_yaml_runs(tmp_path: Path) -> None:
    job = tmp_path / "lf.yaml"
    job.write_text(
        "### model\nmodel_name_or_path: base\n### method\nstage: sft\ndo_train: true\nfinetuning_type: lora\n"
        "lora_target: all\nlora_rank: 8\nquantization_bit: 4\n### dataset\ndataset: identity,alpaca\ntemplate: qwen3\n"
        "cutoff_len: 1024\nmax_samples: 1000\noverwrite_cache: true\n### train\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\nnum_train_epochs: 3.0\nlr_scheduler_type: cosine\n"
        "warmup_ratio: 0.1\nbf16: true\nresume_from_checkpoint: null\nval_size: 0.1\noptim: adamw_torch\n"
    )
    parsed = parse(SftConfig, [str(job)], "sft")
    config = parsed.config
    assert config.model.model == "base"
    assert (config.data.dataset, config.data.data_limit) == ("identity,alpaca", 1000)
    assert (config.loop.accumulation_steps, config.loop.optimizer, config.run.resume) == (8, "adamw", None)
    assert [note.split(": ")[1] for note in parsed.notes] == ["do_train", "template", "overwrite_cache", "bf16"]
    with pytest.raises(UsageError, match=r"stage: sft is not what `dpo` does.*Use `uf sft`"):
        parse(DpoConfig, [str(job)], "dpo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learnig_rate", "1"], r"--learnig_rate: unknown setting. Did you mean learning_rate\?"),
        (["--epochs", "three"], "--epochs three: must be a number"),
        (["--epochs", "-1"], "--epochs -1.0: above 0"),
        (["--batch_size", "1.5"], "must be a whole number"),
        (["--batch_size"], "--batch_size: needs a value"),
        (["--batch_size", "--epochs", "1"], "--batch_size: needs a value"),
        (["--learning_rate", "nan"], "finite"),
        (["--lr_scheduler_type", "cosin"], "must be one of cosine, linear, constant"),
        (["--quantization_bit", "8"], "must be one of 4"),
        (["--quantization_bit", "4", "--finetuning_type", "full"], "4-bit weights cannot train"),
        (["--columns", "prompt"], "name=value"),
        (["--time_budget", "soon"], "--time_budget soon: must be a time span such as 90"),
        (["--time_budget", "30m1h"], "time span"),
        (["--time_budget", ""], "time span"),
        (["--time_budget", "1.2.3h"], "must be a number"),
        (["--time_budget", "0"], "--time_budget 0.0: above 0"),
        (["--extend_epochs", "2"], "--extend_epochs 2: continues an earlier training; add --resume auto"),
        (["stray"], "stray: not a flag"),
        (["missing.yaml"], "no such settings file"),
    ],
)
def test_wrong_flags(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(SftConfig, words)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("2.5h", 9000), ("1h30m", 5400), ("1h 30m 5s", 5405), ("1d", 86400)],
)
def test_time_spans(text: str, seconds: float, tmp_path: Path) -> None:
    assert parse(SftConfig, ["--time_budget", text]).config.run.time_budget == seconds
    (tmp_path / "job.yaml").write_text(f"time_budget: {text}\n")
    assert parse(SftConfig, [str(tmp_path / "job.yaml")]).config.run.time_budget == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("14.5GiB", 29 * 2**29), ("16 gb", 16 * 10**9), ("8000MiB", 8000 * 2**20), (str(3 * 2**30), 3 * 2**30)],
)
def test_amounts_of_memory(text: str, count: int, tmp_path: Path) -> None:
    assert parse(SftConfig, ["--max_memory", text]).config.model.max_memory == count
    (tmp_path / "job.yaml").write_text(f"max_memory: {text}\n")
    assert parse(SftConfig, [str(tmp_path / "job.yaml")]).config.model.max_memory == count


@pytest.mark.parametrize("text", ["14.5", "16", "-3GiB", "1e9", "much", "true", "1GiB"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--max_memory"):
        parse(SftConfig, ["--max_memory", text])


def test_low_memory_is_the_fast_engines() -> None:
    with pytest.raises(UsageError, match="--low_memory true: needs --engine fast"):
        parse(SftConfig, ["--low_memory"])
    assert parse(SftConfig, ["--low_memory", "--engine", "fast"]).config.model.low_memory


def test_all_mistakes_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse(SftConfig, ["--epoch", "x", "--lora_r", "0.5", "--seed", "true"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1\nepochs: 2\n", r"job.yaml:2: key 'epochs' stands twice \(lines 1 and 2\)"),
        ("epochs: [1\n", "job.yaml"),
        ("- a\n", "expected `setting: value` lines"),
        ("epochs: yes\n", "must be a number, not true/false"),
        ("dataset: no\n", "put it in quotes"),
        ("x: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("deepspeed: ds.json\n", "unknown setting"),
    ],
)
def test_wrong_yaml(tmp_path: Path, text: str, message: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(UsageError, match=message):
        parse(SftConfig, [str(job)])


def test_yaml_numbers_as_text_and_truths(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("system: no\n")
    with pytest.raises(UsageError, match="system.*put it in quotes"):
        parse(SftConfig, [str(job)])
    job.write_text("system: 'no'\n")
    assert parse(SftConfig, [str(job)]).config.data.system == "no"
    job.write_text("learning_rate: 1e-4\nno_packing: yes\ncolumns: {prompt: ask, response: answer}\n")
    config = parse(SftConfig, [str(job)]).config
    assert config.loop.learning_rate == 1e-4
    assert config.loop.no_packing
    assert config.data.columns == {"prompt": "ask", "response": "answer"}


def test_group_defaults_of_a_command_hold() -> None:
    assert parse(ChatConfig, []).config.generation.temperature == 0.6
    assert parse(ChatConfig, ["--top_k", "5"]).config.generation.temperature == 0.6
    assert parse(ChatConfig, ["--think_chain", "false"]).config.generation.think_chain is False
    assert parse(EvaluateConfig, ["--think_chain"]).config.think_chain is True


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for setting in settings_of(COMMANDS[command].config_type).values():
        assert setting.help, f"--{setting.name} has no help text"
        assert f"--{setting.name}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_values_round_trip(command: str) -> None:
    config = COMMANDS[command].config_type()
    assert build(type(config), flat_values(config)) == config


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    assert main(["sft", "--nonsense"]) == 2
    assert main(["--version"]) == 0
    assert main([]) == 0
    assert "Did you mean" not in capsys.readouterr().err.splitlines()[0]
    assert main(["evalute"]) == 2
    assert "Did you mean evaluate?" in capsys.readouterr().err


def test_merge_dtype_alias() -> None:
    assert parse(MergeConfig, ["--infer_dtype", "bfloat16"]).config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [
        *(
            (ValidateConfig, flag, value)
            for flag in ("batch_size", "max_samples", "bertscore_layer")
            for value in (0, -1)
        ),
        *((EvaluateConfig, flag, 0) for flag in ("batch_size", "max_samples", "max_new_tokens", "thinking_budget")),
        (EvaluateConfig, "n_shot", -1),
        (ServeConfig, "port", 65536),
        (ServeConfig, "max_waiting", -1),
    ],
)
def test_numbers_that_mean_nothing_are_refused(kind: type, flag: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{flag} {value}: (at least|from)"):
        parse(kind, [f"--{flag}", str(value)])
