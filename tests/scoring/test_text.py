"""Text metrics: equal to their libraries called directly, perfect for equal texts, 0 where no word is shared."""

from __future__ import annotations

import pytest

from unsloth_factory.scoring import text as module
from unsloth_factory.scoring.text import corpus_scores, missing_libraries, text_scores, text_tokens, token_f1

PAIRS = [
    ("低盐饮食，按时服药，每天量血压。", "高血压患者应低盐饮食，规律服药，定期监测血压。"),
    ("服用阿司匹林100mg，每日1次", "阿司匹林 100 mg 每日一次口服。"),
    ("The cat sat on the mat.", "A cat was sitting on the mat, purring."),
    ("Take aspirin 100 mg daily", "服用阿司匹林"),
    ("", "低盐饮食"),
    ("是", "是"),
]
TOP = {"token F1": 1, "BLEU-4": 100, "chrF": 100, "ROUGE-1": 1, "ROUGE-2": 1, "ROUGE-L": 1}


def test_tokens():
    assert text_tokens("ＩｇＧ抗体 1.5mg, don't_stop! カナ") == [
        *("igg", "抗", "体", "1", "5mg", "don", "t", "stop", "カ", "ナ")
    ]
    assert text_tokens("Größe 𠀀") == ["größe", "𠀀"]
    assert text_tokens("，。 …") == []


def test_token_f1_by_hand():
    assert token_f1("the red cat", "a cat") == pytest.approx(2 * 1 / (2 + 1))
    assert token_f1("低盐低盐", "低盐饮食") == pytest.approx(2 * 2 / 8)
    assert token_f1("。", "！") == 1.0
    assert token_f1("。", "低") == 0.0


@pytest.mark.parametrize("text", ["低盐饮食，按时服药", "Take 100 mg of aspirin", "IgG 抗体阳性 1:160"])
def test_equal_texts_are_perfect_and_foreign_ones_nothing(text):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    assert text_scores(text, text) == pytest.approx(TOP)
    assert text_scores("ябв эюя", text) == pytest.approx(dict.fromkeys(TOP, 0.0))
    assert all(value <= top for value, top in zip(text_scores(text, text).values(), TOP.values(), strict=True))


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_bleu_and_chrf_are_sacrebleus(answer, reference):
    sacrebleu = pytest.importorskip("sacrebleu")
    tokenizer = "zh" if any("\u4e00" <= char <= "\u9fff" for char in reference) else "13a"
    bleu = sacrebleu.sentence_bleu(answer, [reference], tokenize=tokenizer, use_effective_order=True).score
    scores = text_scores(answer, reference)
    assert scores["BLEU-4"] == pytest.approx(bleu)
    assert scores["chrF"] == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score)


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_is_rouge_scores(answer, reference):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scores = text_scores(answer, reference)
    # Its own tokenizer knows ASCII alone: each of our tokens is given a name in it.
    names: dict[str, str] = {}
    texts = [" ".join(names.setdefault(t, f"w{len(names)}") for t in text_tokens(x)) for x in (reference, answer)]
    direct = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(*texts)
    for kind, name in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")):
        assert scores[name] == pytest.approx(direct[kind].fmeasure)


def test_english_rouge_needs_no_renaming():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    answer, reference = PAIRS[2]
    direct = scorer.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert text_scores(answer, reference)["ROUGE-L"] == pytest.approx(direct)
    assert direct > 0


def test_the_corpus_scores_carry_their_signatures():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = (list(column) for column in zip(*PAIRS[:2], strict=True))
    scores = corpus_scores(answers, references)
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert "tok:zh" in scores.bleu_signature
    assert corpus_scores([], []) is None
    assert "tok:13a" in corpus_scores([PAIRS[2][0]], [PAIRS[2][1]]).bleu_signature


def test_a_missing_library_leaves_its_metrics_out(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert missing_libraries() == {"sacrebleu": ("BLEU-4", "chrF"), "rouge_score": ("ROUGE-1", "ROUGE-2", "ROUGE-L")}
    assert text_scores("是", "是") == {"token F1": 1.0}
    assert corpus_scores(["是"], ["是"]) is None
