"""Rows fit the sequence length; answers are never cut."""

from __future__ import annotations

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.encode import GAP, describe_sample, encode_pairs, encode_samples
from unsloth_factory.data.types import Conversation, DataReport, PreferencePair, Turn

LONG = "开始" + "高血压患者平时需要注意什么" * 30 + "结束"
ANSWER = Turn("assistant", "应低盐饮食，按时服药。")


def conversation(*turns: Turn, source: str = "d.csv:3") -> Conversation:
    return Conversation(turns, source)


def decoded(template, ids) -> str:
    return template.tokenizer.decode(ids.tolist())


@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral", "deepseek"])
def test_the_middle_of_the_question_is_cut(template_of, family):
    template = template_of(family)
    report = DataReport()
    whole = template.encode_conversation(conversation(Turn("user", LONG), ANSWER))[0]
    (row,) = encode_samples([conversation(Turn("user", LONG), ANSWER)], template, 120, report=report)
    assert 100 < len(row.ids) <= 120
    assert row.ids[row.trained].tolist() == whole.ids[whole.trained].tolist()
    prompt = decoded(template, row.ids[~row.trained])
    asked = prompt[prompt.index("开始") : prompt.index("结束") + 2]
    assert GAP in asked
    assert row.ids[~row.trained].tolist() == template.encode_prompt((Turn("user", asked),), False)
    assert (report.shortened, report.dropped_too_long) == (1, 0)


@pytest.mark.parametrize("family", ["qwen3", "qwen25"])
def test_oldest_turns_go_first_and_the_system_text_stays(template_of, family):
    template = template_of(family)
    system = Turn("system", "Be kind.")
    turns = [system]
    for number in range(6):
        turns += [Turn("user", f"question number {number}"), Turn("assistant", f"answer number {number}")]
    longest = max(len(row.ids) for row in template.encode_conversation(conversation(*turns)))
    rows = encode_samples([conversation(*turns)], template, longest - 10)
    text = decoded(template, rows[-1].ids)
    assert "Be kind." in text
    assert "question number 0" not in text
    assert "question number 1" in text
    assert text.endswith("answer number 5<|im_end|>")
    assert len(rows[-1].ids) <= longest - 10


def test_a_long_row_of_many_turns_becomes_windows(template_of):
    """Append-only templates train all answers in one row: none of them is lost when that row is cut."""
    template = template_of("llama3")
    turns = []
    for number in range(8):
        turns += [Turn("user", f"question {number}"), Turn("assistant", f"answer {number}")]
    (whole,) = template.encode_conversation(conversation(*turns))
    report = DataReport()
    limit = len(whole.ids) // 3
    rows = encode_samples([conversation(*turns)], template, limit, report=report)
    assert all(len(row.ids) <= limit for row in rows)
    text = "".join(decoded(template, row.ids[row.trained]) for row in rows)
    assert text == "".join(f"answer {number}<|eot_id|>" for number in range(8))
    assert report.dropped_too_long == 0
    assert report.shortened == len(rows) - 1


def test_an_answer_that_does_not_fit_is_dropped(template_of):
    template = template_of("qwen3")
    short = conversation(Turn("user", "Sugar?"), Turn("assistant", "Avoid."))
    long = conversation(Turn("user", "Sugar and salt?"), Turn("assistant", LONG))
    report = DataReport(rows=2, used=2)
    assert len(encode_samples([long, short], template, 100, report=report)) == 1
    assert (report.shortened, report.dropped_too_long) == (0, 1)
    with pytest.raises(UserError, match="--max_seq_length 100"):
        encode_samples([long], template, 100)


def test_drop(template_of):
    template = template_of("qwen3")
    report = DataReport()
    rows = [conversation(Turn("user", LONG), ANSWER), conversation(Turn("user", "盐?"), ANSWER)]
    (row,) = encode_samples(rows, template, 120, "drop", report)
    assert "盐?" in decoded(template, row.ids)
    assert (report.shortened, report.dropped_too_long) == (0, 1)


def test_token_statistics(template_of):
    template = template_of("qwen3")
    report = DataReport()
    rows = encode_samples(
        [conversation(Turn("user", "q" * n), ANSWER) for n in (1, 40, 90)], template, 512, report=report
    )
    lengths = [len(row.ids) for row in rows]
    assert report.tokens["total"] == sum(lengths)
    assert report.tokens["max"] == max(lengths)
    assert report.tokens["p50"] == sorted(lengths)[1]
    assert report.tokens["trained"] == sum(int(row.trained.sum()) for row in rows)
    assert report.tokens["trained_share"] == pytest.approx(report.tokens["trained"] / sum(lengths), abs=1e-4)
    with pytest.raises(UserError, match="no sample"):
        encode_samples([], template, 512)


def test_a_row_without_trained_tokens_is_refused(template_of, monkeypatch):
    template = template_of("qwen3")
    encode = template.encode_conversations

    def untrained(conversations):
        rows = encode(conversations)
        for row in rows:
            row[0].trained[:] = False
        return rows

    monkeypatch.setattr(template, "encode_conversations", untrained)
    with pytest.raises(UserError, match=r"d\.csv:3"):
        encode_samples([conversation(Turn("user", "q"), ANSWER)], template, 512)


def test_pairs_are_shortened_together(template_of):
    template = template_of("qwen3")
    pair = PreferencePair((Turn("user", LONG),), ANSWER, Turn("assistant", "多吃盐。"), "p:1")
    report = DataReport()
    (encoded,) = encode_pairs([pair], template, 120, report=report)
    assert max(len(encoded.chosen.ids), len(encoded.rejected.ids)) <= 120
    prompts = [decoded(template, row.ids[~row.trained]) for row in (encoded.chosen, encoded.rejected)]
    assert prompts[0] == prompts[1]
    assert report.shortened == 1
    assert report.tokens["trained"] == int(encoded.chosen.trained.sum() + encoded.rejected.trained.sum())


def test_describe_marks_the_trained_part(template_of):
    template = template_of("qwen25")
    turns = (Turn("user", "A"), Turn("assistant", "B"), Turn("user", "C"), Turn("assistant", "D"))
    text = describe_sample(template, template.encode_conversation(conversation(*turns))[0])
    assert text.plain.endswith("⟦B<|im_end|>⟧\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n⟦D<|im_end|>⟧")
    assert [span.style for span in text.spans] == ["dim", "bold green"] * 2
