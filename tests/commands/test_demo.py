"""`uf demo` proves what the project promises, and its page stands alone."""

from __future__ import annotations

import json
import re

from command_line import tree, uf


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    out = tmp_path / "demo"
    outcome = uf("demo", "--output_dir", out)
    assert outcome.code == 0, outcome.err
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    keys = "base_accuracy tuned_accuracy f16_accuracy quantized merge_max_abs_logit_diff token_parity seconds"
    assert set(keys.split()) <= set(summary)
    assert summary["questions"] >= 100
    assert summary["base_accuracy"] <= 0.20
    assert summary["tuned_accuracy"] >= 0.80
    assert abs(summary["f16_accuracy"] - summary["tuned_accuracy"]) <= 0.02
    assert abs(summary["quantized"]["q8_0"]["accuracy"] - summary["tuned_accuracy"]) <= 0.05
    assert summary["token_parity"] is True
    assert 0 < summary["merge_max_abs_logit_diff"] < 0.1
    assert summary["seconds"] > 0
    assert set(summary["quantized"]) == {"q8_0", "q6_k", "q4_k_m"}
    for kind, entry in summary["quantized"].items():
        assert entry["bytes"] == (out / "gguf" / f"demo-{kind}.gguf").stat().st_size
    assert set(summary["benchmarks"]["ceval"]) == {"metric", "questions", "base", "tuned"}

    page = (out / "report.html").read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert references
    assert all((first or second).startswith(("data:", "#")) for first, second in references), references
    assert "<script src" not in page
    assert f"{summary['tuned_accuracy']:.1%}".rstrip("%") in page

    before = tree(out)
    outcome = uf("demo", "--output_dir", out)
    assert outcome.code == 0
    assert outcome.out.count("unchanged, skipped") == 8
    changed = {name for name, state in tree(out).items() if before.get(name) != state}
    assert changed == {"summary.json", "report.html"}
