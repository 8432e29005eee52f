"""The delta table, and the pages made of it: regressions first, everything escaped, Chinese that wraps."""

from __future__ import annotations

import pytest
from rich.console import Console

from unsloth_factory.evaluation.pages import html_page, markdown_page
from unsloth_factory.evaluation.report import Comparison, EvalReport, Metric
from unsloth_factory.evaluation.rows import number, silent_faults, table_rows
from unsloth_factory.evaluation.tables import print_report

NASTY = '<script>alert("1")</script> | `x` 高血压'


def report(compared: bool = True) -> EvalReport:
    metrics = {
        "base": {
            "exact match": Metric(0.25, 0.05, 40),
            "BLEU-4": Metric(31.26, 2.0, 40),
            "term coverage": Metric(0.0, 0.0, 0),
            "empty answers": Metric(0.0, 0.0, 40, "lower"),
            "major violations per answer": Metric(0.0, 0.0, 40, "lower"),
        },
        "tuned": {
            "exact match": Metric(0.75, 0.05, 40),
            "BLEU-4": Metric(21.26, 2.0, 40),
            "term coverage": Metric(0.0, 0.0, 0),
            "empty answers": Metric(0.0, 0.0, 40, "lower"),
            "major violations per answer": Metric(0.1, 0.05, 40, "lower"),
        },
    }
    comparisons = {
        "exact match": Comparison(0.25, 0.75, 0.5, (0.3, 0.7), 0.001, "better"),
        "BLEU-4": Comparison(31.26, 21.26, -10.0, (-14.0, -6.0), 0.001, "worse"),
        "major violations per answer": Comparison(0.0, 0.1, 0.1, (0.0, 0.2), 0.1, "no difference beyond the error"),
    }
    worst = {
        "source": "d.csv:2",
        "question": NASTY,
        "reference": "好" * 900,
        "problems": [NASTY],
        "base": "",
        "tuned": NASTY,
    }
    return EvalReport(
        task="validation",
        model={"model": "tiny"},
        settings={"max_new_tokens": 64},
        n=40,
        metrics=metrics if compared else {"tuned": metrics["tuned"]},
        comparisons=comparisons if compared else {},
        headline="exact match",
        notes=("a note",),
        details={
            "causes": [{"name": "truncation", "evidence": "4 of 40 answers", "advice": "give more"}],
            "corpus": {"tuned": {"bleu": 20.0, "bleu_signature": "tok:zh", "chrf": 30.0, "chrf_signature": "nc:6"}},
            "json_fields": {"病名": {"n": 3, **({"base": 0.5} if compared else {}), "tuned": 1.0}},
            "rules_broken": {"tuned": {"no_vomiting": 1}},
            "worst": [worst, {**worst, "problems": []}],
        },
    )


def test_regressions_come_first_and_silent_rows_are_left_out():
    rows = table_rows(report())
    assert [row.name for row in rows] == ["BLEU-4", "exact match", "major violations"]
    assert rows[0].values == ("31.3", "21.3")
    assert (rows[0].delta, rows[0].interval, rows[0].verdict) == ("-10.0", "[-14.0, -6.0]", "worse")
    assert rows[0].bounds == pytest.approx((-1.0, -6 / 14))
    assert rows[2].verdict == "within error"
    assert silent_faults(report()) == ["empty answers"]
    assert silent_faults(report(compared=False)) == ["empty answers"]
    assert [number(value) for value in (0.5, 9.999, 10.04)] == ["0.500", "9.999", "10.0"]


@pytest.mark.parametrize("compared", [True, False])
def test_the_html_page_is_whole_and_escaped(compared):
    page = html_page(report(compared))
    assert "<script>" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count('class="card sample"') == 1  # the one with problems
    assert "好" * 900 in page
    assert "overflow-wrap: anywhere" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing to fetch
    for text in ("truncation", "病名", "no_vomiting", "a note", "tok:zh", "In no answer: empty answers"):
        assert text in page
    assert ("From base to tuned" in page) == compared
    assert page.index(">BLEU-4<") < page.index("<b>exact match</b>") or not compared


@pytest.mark.parametrize("compared", [True, False])
def test_the_markdown_is_a_table_that_no_answer_can_break(compared):
    page = markdown_page(report(compared))
    assert "\\<script\\>" in page
    for line in page.splitlines():
        if line.startswith("|") and "d.csv:2" in line:
            bars = line.replace("\\|", "").count("|")
            assert bars == (7 if compared else 6)
    assert "好" * 900 not in page
    assert "…" in page
    assert "**worse**" in page or not compared
    assert "| **exact match** |" in page


def test_the_printed_table_fits_80_columns(capsys):
    print_report(report(), Console(width=80))
    printed = capsys.readouterr().out
    table = printed[: printed.index("* exact match:")]
    assert all(len(line) <= 80 for line in table.splitlines()[1:])
    assert table.index("BLEU-4") < table.index("exact match *")
    assert "in no answer: empty answers" in printed
    assert "likely cause: truncation: 4 of 40 answers. What to do: give more" in printed


def test_many_files_are_rows_and_nothing_is_cut_off():
    console = Console(width=80, record=True, force_terminal=False)
    metrics = {"macro accuracy": Metric(0.25, 0.012, 40), "micro accuracy": Metric(0.75, 0.012, 40)}
    metrics |= {group: Metric(0.5, 0.02, 9) for group in ("STEM", "Humanities", "Social Science", "Other", "hard")}
    names = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq2_xxs")
    agreed = {"q8_0": {"with": "f16", "n": 40, "same_choice": 30, "mean_difference": 0.1, "largest_difference": 1.0}}
    found = EvalReport(
        task="C-Eval val",
        model={"gguf": {"q8_0": {"path": "/x/m-q8_0.gguf", "bytes": 2**20, "sha256": "ab"}}},
        settings={"n_shot": 5},
        n=40,
        metrics=dict.fromkeys(names, metrics),
        headline="macro accuracy",
        details={"agreement": agreed},
    )
    print_report(found, console)
    out = console.export_text()
    assert "…" not in out
    assert "iq2_xxs" in out
    assert out.count("0.250±0.012") == 6
    assert "q8_0 chooses as f16 in 30 of 40 questions (75.00%)" in out
    page = markdown_page(found)
    assert page.startswith("# C-Eval val\n")
    assert "| q8_0 | /x/m-q8_0.gguf | 1.0 | ab |" in page
    assert "q8_0 chooses as f16" in page
    assert "gguf {" not in page


def test_a_validation_of_many_files_is_shown_in_parts_that_fit():
    console = Console(width=80, record=True, force_terminal=False)
    names = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq2_xxs")
    metrics = {
        "exact match": Metric(0.25, 0.012, 40),
        "reference perplexity": Metric(5635.0, 751.6, 40, "lower"),
        "major violations per answer": Metric(0.125, 0.031, 40, "lower"),
    }
    found = EvalReport("validation", {}, {}, 40, dict.fromkeys(names, metrics), headline="exact match")
    print_report(found, console)
    out = console.export_text()
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert out.count("5635.0±751.6") == out.count("0.250±0.012") == out.count("0.125±0.031") == 6
    heads = [line.split()[1:] for line in out.splitlines() if line.strip().startswith("metric")]
    assert heads == [list(names[:4]), list(names[4:])]
