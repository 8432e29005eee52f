"""What a training looks at beside its loss, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import DEMO, uf

from unsloth_factory.commands.watch import GENERAL, check_watch, general_conversations
from unsloth_factory.config.commands import DpoConfig, SftConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.parse import configure, parse
from unsloth_factory.config.settings import WatchSettings
from unsloth_factory.training.watch.forgetting import split_general


def test_a_run_with_everything_watched(tmp_path: Path) -> None:
    outcome = uf(
        "sft", "--model", "tiny", "--dataset", DEMO / "handbook_train.jsonl#40",
        "--eval_dataset", DEMO / "handbook_questions.jsonl#12", "--output_dir", tmp_path / "run", "--max_steps", 4,
        "--eval_steps", 2, "--max_seq_length", 256, "--metric_for_best_model", "eval_exact_match",
        "--sample_generations", 9, "--sample_max_new_tokens", 12, "--early_stopping_patience", 5,
    )  # fmt: skip
    assert outcome.code == 0, outcome.words
    records = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().split("\n") if line]
    assert [record["step"] for record in records] == [0] * 9 + [2] * 9 + [4] * 9
    assert all(record["source"].startswith("handbook_questions.jsonl:") for record in records)
    assert len({record["answer"] for record in records}) >= 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= lines[3]["eval_exact_match_low"] <= lines[3]["eval_exact_match"] <= 1
    assert (
        "Watched every 2 steps: loss of 12 held-out samples, loss of 32 general answers (2,609 tokens), "
        "9 answers to held-out questions" in outcome.words
    )
    assert "Early stop after 5 evaluations in a row without a better exact_match" in outcome.words
    assert "there is nothing to forget" in outcome.words  # the bundled model talks about one handbook only
    assert "Final weights: step " in outcome.words


def test_the_bundled_general_questions() -> None:
    rows = general_conversations(WatchSettings(), ["one held out"])
    assert len(rows) == 64
    assert len({row.turns for row in rows}) == 64
    for part in split_general(rows):
        chinese = [row for row in part if re.search(r"[\u4e00-\u9fff]", row.turns[0].content + row.turns[1].content)]
        asked_in_english = [row for row in part if re.match(r"[A-Z]", row.turns[0].content)]
        assert len(part) == 32
        assert len(asked_in_english) == 16
        assert 16 <= len(chinese) <= 20  # translations into Chinese are asked in English
    assert GENERAL.stat().st_size < 20_000


def test_where_nothing_is_held_out_general_questions_are_not_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    assert general_conversations(WatchSettings(general_dataset=missing), []) == []
    assert general_conversations(WatchSettings(forgetting="off", general_dataset=missing), ["one"]) == []
    assert len(general_conversations(WatchSettings(forgetting="stop"), [])) == 64
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(UsageError, match="needs two rows or more"):
        general_conversations(WatchSettings(general_dataset=str(tmp_path / "one.jsonl")), ["one"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"early_stopping_patience": 3}, "--early_stopping_patience: no sample is held out"),
        ({"metric_for_best": "exact_match", "load_best": True}, "--load_best, --metric_for_best: no sample"),
        ({"sample_generations": 3}, "--sample_generations: no sample is held out.*--val_split"),
    ],
)
def test_an_evaluation_that_will_not_take_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        general_conversations(WatchSettings(**values), [])


@pytest.mark.parametrize(
    ("config_type", "command", "values", "message"),
    [
        (SftConfig, "sft", {"metric_for_best": "rewards/margins"}, "only dpo has rewards"),
        (SftConfig, "sft", {"metric_for_best": "term_coverage"}, "needs a domain pack; give --domain"),
        (DpoConfig, "dpo", {"forgetting": "replay"}, "--forgetting replay: dpo trains on pairs"),
    ],
)
def test_what_a_method_cannot_give(config_type: Any, command: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_watch(configure(config_type, **values), command)
    check_watch(configure(DpoConfig, metric_for_best="rewards/margins"), "dpo")
    check_watch(configure(SftConfig, metric_for_best="term_coverage", domain="medical"), "sft")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--early_stopping_patience", "0"], "--early_stopping_patience"),
        (["--early_stopping_min_delta", "-1"], "--early_stopping_min_delta"),
        (["--forgetting_limit", "0"], "--forgetting_limit"),
        (["--sample_generations", "-2"], "--sample_generations"),
        (["--replay_samples", "0"], "--replay_samples"),
        (["--max_bad_steps", "0"], "--max_bad_steps"),
        (["--loss_spike", "ignore"], "--loss_spike"),
        (["--metric_for_best", "accuracy"], "--metric_for_best"),
    ],
)
def test_values_out_of_range(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(SftConfig, arguments)


def test_names_of_the_peers() -> None:
    config = parse(
        SftConfig,
        ["--early_stopping_steps", "3", "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss"],
    ).config
    assert (config.watch.early_stopping_patience, config.watch.load_best, config.watch.metric_for_best) == (
        3, True, "loss",
    )  # fmt: skip
    assert parse(SftConfig, ["--load_best", "false"]).config.watch.takes_best is False
    assert parse(SftConfig, ["--early_stopping_patience", "2"]).config.watch.takes_best is True
    assert parse(SftConfig, ["--forgetting", "stop"]).config.watch.takes_best is True
    assert parse(SftConfig, []).config.watch.takes_best is False
