"""BERTScore is what its library says, for an encoder from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("bert_score", reason="BERTScore is part of the extra `eval`")

from unsloth_factory.scoring.bertscore import BertScorer  # noqa: E402

ANSWERS = ["ab 一丁七", "hello world", "", "一" * 300]
REFERENCES = ["ab 一丁", "hello there", "一丁", "一" * 300]


def test_equal_to_the_library(encoder_dir: Path) -> None:
    from bert_score import BERTScorer

    direct = BERTScorer(model_type=str(encoder_dir), num_layers=2)
    direct._tokenizer.model_max_length = 64
    wanted = direct.score([ANSWERS[0], ANSWERS[1]], [REFERENCES[0], REFERENCES[1]])[2].tolist()
    scorer = BertScorer(encoder_dir, 2)
    found = scorer(ANSWERS, REFERENCES)
    assert found[:2] == pytest.approx(wanted, abs=1e-6)
    assert 0 < min(wanted) < max(wanted) < 1
    assert found[2] == 0.0
    assert found[3] == pytest.approx(1.0, abs=1e-5)  # cut off at 64 tokens, both alike
    assert "layer 2" in scorer.signature


def test_which_layer(encoder_dir: Path, tmp_path: Path) -> None:
    assert BertScorer(encoder_dir).layer == 3
    published = tmp_path / "bert-base-chinese"
    published.mkdir()
    (published / "config.json").write_text((encoder_dir / "config.json").read_text().replace("3,", "12,"))
    assert BertScorer(published).layer == 8
    with pytest.raises(ValueError, match="has 3 layers, not 4"):
        BertScorer(encoder_dir, 4)


def test_a_folder_without_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no encoder"):
        BertScorer(tmp_path)
