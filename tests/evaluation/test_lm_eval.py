"""C-Eval against lm-evaluation-harness on the very same prompts, and against its clock. See `make peers`.

The whole takes half an hour on a core; PEER_SUBJECTS=logic,law takes these subjects alone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.evaluation_speed import first_rows
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.choice.benchmark import load_benchmark
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, evaluate, model_scorers
from unsloth_factory.model.load import load_model

pytestmark = pytest.mark.peer
LETTERS = "ABCD"


def random_model(folder: Path, tokenizer_dir: Path, family: str) -> Path:
    """Two random layers under the real Qwen2 vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = AutoConfig.for_model(
        family, vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Recorder(PromptMaker):
    """Keeps what it rendered."""

    def subject(self, subject, shots, questions, max_tokens):
        prompts = super().subject(subject, shots, questions, max_tokens)
        self.seen.append((subject.name, prompts))
        return prompts


def ours(model: Path, folder: Path, plain: bool):
    """(scores [n, 4], report, prompts by subject, seconds, tokenizer): all of `uf evaluate` but loading the model."""
    loaded = load_model(ModelSettings(model=str(model)))
    template = None if plain else ChatTemplate.from_tokenizer(loaded.tokenizer)
    maker = Recorder(benchmark=load_benchmark("ceval"), tokenizer=loaded.tokenizer, template=template)
    object.__setattr__(maker, "seen", [])
    options = ChoiceOptions(n_shot=5, max_tokens=loaded.max_positions, subjects=os.environ.get("PEER_SUBJECTS"))
    start = time.perf_counter()
    result = evaluate(maker, folder, model_scorers(loaded, ["base"]), options)
    seconds = time.perf_counter() - start
    scores = np.array([[record["base"]["logprobs"][letter] for letter in LETTERS] for record in result.records])
    return scores, result, maker.seen, seconds


def theirs(model: Path, prompts: list, probe: int = 12) -> tuple[np.ndarray, float, int, object]:
    """(log-probabilities [n, 4], seconds, batch size, the harness' model): the quickest batch size of 1, 2 and 4."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)

    def score(texts: list[str], batch_size: int) -> tuple[np.ndarray, float]:
        peer.batch_size_per_gpu = batch_size
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(text, letter), idx=index)
            for text in texts
            for index, letter in enumerate(LETTERS)
        ]
        start = time.perf_counter()
        answers = peer.loglikelihood(requests, disable_tqdm=True)
        return np.array([value for value, _ in answers]).reshape(-1, len(LETTERS)), time.perf_counter() - start

    texts = [prompt.text for prompt in prompts]
    score(texts[:1], 1)
    times = {size: score(texts[:: max(1, len(texts) // probe)], size)[1] for size in (1, 2, 4)}
    best = min(times, key=times.__getitem__)
    scores, seconds = score(texts, best)
    return scores, seconds, best, peer


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "chat"])
@pytest.mark.parametrize(("kind", "rows"), [("bundled", None), ("qwen2", 5), ("qwen3", 5)])
def test_ceval_equals_the_harness(kind, rows, plain, shared_data, tiny_model_dir, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import mean, mean_stderr

    if not plain:
        rows = 1
    model = tiny_model_dir
    if kind != "bundled":
        model = random_model(tmp_path / "model", shared_data / "qwen2-tokenizer", kind)
    scores, result, seen, seconds = ours(model, first_rows(shared_data / "ceval", tmp_path / "data", rows), plain)
    prompts = [prompt for _, group in seen for prompt in group.prompts]
    other, other_seconds, batch_size, peer = theirs(model, prompts)
    with capsys.disabled():
        gap = np.abs(scores - other).max()
        print(
            f"\n{kind}, {'plain' if plain else 'chat'}, {len(prompts)} questions: {seconds:.1f} s, lm-eval at batch "
            f"{batch_size} {other_seconds:.1f} s: {other_seconds / seconds:.1f} x; log-probs within {gap:.2e}"
        )
    if plain:
        assert [list(prompt.ids) for prompt in prompts] == [list(peer.tok_encode(prompt.text)) for prompt in prompts]
        np.testing.assert_allclose(scores, other, atol=1e-3, rtol=0)
    else:
        # The harness counts white space at the prompt's end to the continuation: the same sum on every choice.
        shift = (scores - other).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(scores - shift, other, atol=1e-3, rtol=0)
    assert (scores.argmax(axis=1) == other.argmax(axis=1)).all()
    assert len(set(other.argmax(axis=1))) >= 2, "a model that always says the same letter proves little"

    by_subject, place = {}, 0
    for name, group in seen:
        key = [record["answer"] for record in result.records[place : place + len(group.prompts)]]
        best = other[place : place + len(group.prompts)].argmax(axis=1)
        by_subject[name] = [float(LETTERS[choice] == answer) for choice, answer in zip(best, key, strict=True)]
        place += len(group.prompts)
    metrics = result.report.metrics["base"]
    everything = [value for values in by_subject.values() for value in values]
    assert metrics["micro accuracy"].value == pytest.approx(mean(everything), abs=1e-12)
    assert metrics["micro accuracy"].standard_error == pytest.approx(mean_stderr(everything), abs=1e-12)
    for name, values in by_subject.items():
        row = result.report.details["subjects"][name]
        assert row["base"] == pytest.approx(mean(values), abs=1e-12)
        if len(values) > 1:
            assert row["standard_errors"]["base"] == pytest.approx(mean_stderr(values), abs=1e-12)
    groups = {name: row["group"] for name, row in result.report.details["subjects"].items()}
    for metric, members in (
        ("macro accuracy", list(by_subject)),
        *((group, [name for name in by_subject if groups[name] == group]) for group in sorted(set(groups.values()))),
        ("hard", [subject.name for subject in load_benchmark("ceval").subjects if subject.hard]),
    ):
        scored = {name: by_subject[name] for name in members if name in by_subject}
        if metric in metrics:
            value, error = their_group(scored)
            assert metrics[metric].value == pytest.approx(value, abs=1e-12)
            if min(map(len, scored.values())) > 1:
                assert metrics[metric].standard_error == pytest.approx(error, abs=1e-12)


def their_group(by_subject: dict[str, list[float]]) -> tuple[float, float]:
    """(score, standard error) of the harness' group of these subjects that does not weight them by size.

    That is the macro average. A group that does weight has the micro average as its score, but another error: pooled
    within the subjects, as if their scores did not differ; the error of all questions is that of one task.
    """
    from lm_eval.api.group import Group
    from lm_eval.api.metrics import mean, mean_stderr
    from lm_eval.config.group import AggMetricConfig

    class Subjects(Group):
        def get_all_tasks(self, recursive=True):
            return [SimpleNamespace(task_name=name) for name in by_subject]

    group = Subjects("ceval", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=False)])
    result = group.aggregate(
        {
            name: {
                "acc,none": mean(values),
                "acc_stderr,none": mean_stderr(values) if len(values) > 1 else 0.0,
                "sample_len": len(values),
            }
            for name, values in by_subject.items()
        }
    )
    return result["acc,none"], result["acc_stderr,none"]
