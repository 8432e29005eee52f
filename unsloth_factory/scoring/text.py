"""How near an answer's words are to a reference's: token F1, and BLEU-4, chrF and ROUGE by their libraries.

Chinese is compared character by character. A word segmenter (jieba) would give other, slightly lower ROUGE scores that
depend on its dictionary: a new version of it, or a term of medicine or law that it does not know, moves the score of an
unchanged answer. sacrebleu's own Chinese tokenizer splits into characters for the same reason.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")
HAS_CJK = re.compile(f"[{CJK}]")
ARTICLES = frozenset(("a", "an", "the"))
LIBRARIES = {"sacrebleu": ("BLEU-4", "chrF"), "rouge_score": ("ROUGE-1", "ROUGE-2", "ROUGE-L")}
"""Module -> the metrics it computes."""
INSTALL_HINT = "pip install 'unsloth-factory[eval]'"


@dataclass(frozen=True)
class CorpusScores:
    """BLEU-4 and chrF over all answers at once (0 to 100), with sacrebleu's signatures, which make them quotable."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str


def missing_libraries() -> dict[str, tuple[str, ...]]:
    """Libraries that are not installed, each with the metrics that are left out for want of it."""
    return {name: metrics for name, metrics in LIBRARIES.items() if find_spec(name) is None}


def text_tokens(text: str) -> list[str]:
    """Words of a text in lower case; a Chinese or Japanese character is a word. Punctuation is none.

    On ASCII text these are the tokens of rouge-score's default tokenizer. Full-width forms are folded (NFKC).
    """
    return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bag of tokens, 0 to 1; articles do not count.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1 (SQuAD). Two texts without any token are equal: 1.
    """
    given, expected = _content(answer), _content(reference)
    if not given or not expected:
        return float(given == expected)
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected))


def _content(text: str) -> list[str]:
    return [token for token in text_tokens(text) if token not in ARTICLES]


def text_scores(answer: str, reference: str) -> dict[str, float]:
    """Every text metric of one answer whose library is installed.

    "token F1" and the ROUGE F-measures are 0 to 1; "BLEU-4" (sentence BLEU of effective order) and "chrF" are 0 to 100,
    as their library gives them. Sources: Papineni et al. 2002 (BLEU), Popović 2015 (chrF), Lin 2004 (ROUGE), Post 2018,
    arXiv:1804.08771 (sacrebleu).
    """
    scores = {"token F1": token_f1(answer, reference)}
    missing = missing_libraries()
    if "sacrebleu" not in missing:
        tokenizer = bleu_tokenizer([reference])
        # exp(log(...)) of a perfect score is 100.00000000000004
        scores["BLEU-4"] = min(100.0, _bleu(tokenizer, True).sentence_score(answer, [reference]).score)
        scores["chrF"] = min(100.0, _chrf().sentence_score(answer, [reference]).score)
    if "rouge_score" not in missing:
        scored = _rouge().score(reference, answer)
        scores |= {f"ROUGE-{kind[5:].upper()}": float(scored[kind].fmeasure) for kind in ("rouge1", "rouge2", "rougeL")}
    return scores


def bleu_tokenizer(references: Sequence[str]) -> str:
    """The tokenizer of sacrebleu for these references: zh where half of them or more have Chinese in them, else 13a."""
    chinese = sum(HAS_CJK.search(reference) is not None for reference in references)
    return "zh" if 2 * chinese >= max(1, len(references)) else "13a"


def corpus_scores(answers: Sequence[str], references: Sequence[str]) -> CorpusScores | None:
    """BLEU-4 and chrF over all answers, as papers report them; None without sacrebleu or answers."""
    if not answers or "sacrebleu" in missing_libraries():
        return None
    bleu, chrf = _bleu(bleu_tokenizer(references), False), _chrf()
    bleu_score = bleu.corpus_score(list(answers), [list(references)]).score
    chrf_score = chrf.corpus_score(list(answers), [list(references)]).score
    return CorpusScores(bleu_score, str(bleu.get_signature()), chrf_score, str(chrf.get_signature()))


@lru_cache(maxsize=4)
def _bleu(tokenizer: str, effective_order: bool) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer, effective_order=effective_order)


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


class _Tokens:
    """rouge-score asks its tokenizer for a list of words."""

    def tokenize(self, text: str) -> list[str]:
        return text_tokens(text)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    # rouge-score imports nltk, which wants a folder for downloads (it makes none here) and fails without a home
    os.environ.setdefault("NLTK_DATA", tempfile.gettempdir())
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Tokens())
