"""Does the GGUF file answer as the model did in training? Prompts, token ids, greedy answers, distributions.

Every difference is measured on the file that ships, loaded by llama.cpp with all tensors checked, against
transformers in float32 on the stored merged weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.export.probes import probe_conversations, probe_texts
from unsloth_factory.export.streamed import StreamedModel
from unsloth_factory.export.weights import WeightFolder
from unsloth_factory.inference.distributions import kl_divergence
from unsloth_factory.inference.llama_cpp import LlamaCpp

# KL divergence in nats that 99 % of the positions keep, by number format of the file; none exceeds ten times it.
# llama.cpp rounds the activations of a product to the format of its weights: an f32 file of the demo's model reads
# 4e-10, its f16 file (the same weights) 6e-5 at the worst of 732 positions, sharper models 1.4e-4 at single ones.
KL_LIMITS = {"f32": 1e-4, "f16": 1e-4, "bf16": 3e-3, "q8_0": 3e-2}
KL_OUTLIER = 10.0
# A greedy token may differ only where transformers itself prefers its own by less than this (logits): a near tie.
GREEDY_GAPS = {"f32": 0.05, "f16": 0.05, "bf16": 0.25}
ANSWER_TOKENS = 24
FIXED_QUESTIONS = 8  # of the probe conversations, answered beside the run's own
MODES: dict[str, bool | None] = {"on": True, "off": False, "unset": None}


@dataclass(frozen=True, kw_only=True)
class ParityProbe:
    """What the check needs to know of the model and its training."""

    folder: Path
    """Merged model that was converted."""
    template: ChatTemplate
    outtype: str
    thinking: str = "unset"
    """Mode of the training prompts: on, off or unset."""
    system: str | None = None
    questions: tuple[tuple[Turn, ...], ...] = ()
    """Further prompts, such as held-out ones of the run."""


def check_parity(llama: LlamaCpp, probe: ParityProbe, figures: dict[str, Any]) -> None:
    """Run all checks.

    Args:
        llama: The file, loaded.
        probe: What it is compared with.
        figures: Filled as the checks go: conversations, texts, token_parity, greedy_equal, greedy_prompts, near_ties,
            positions, kl_max, kl_p99, kl_mean, top1, notes.

    Raises:
        UserError: A gate failed: its name, the value, the limit and what to do.
    """
    conversations = _renderable(probe)
    figures |= {"conversations": len(conversations), "token_parity": False, "notes": []}
    _check_prompts(llama, probe, conversations, figures)
    figures["texts"] = _check_texts(llama, probe.template)
    figures["token_parity"] = True
    _check_answers(llama, probe, conversations, figures)


def _renderable(probe: ParityProbe) -> list[tuple[Turn, ...]]:
    """The run's questions and the probe conversations that the template accepts (some know no system role)."""
    kept = []
    for turns in (*probe.questions, *probe_conversations(probe.template.control_tokens, probe.system)):
        try:
            probe.template.render_prompt(turns, None)
        except UserError:
            continue
        kept.append(turns)
    return kept


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [
        {"role": t.role, "content": t.content, **({"reasoning_content": t.reasoning} if t.reasoning else {})}
        for t in turns
    ]


def _check_prompts(
    llama: LlamaCpp, probe: ParityProbe, conversations: list[tuple[Turn, ...]], figures: dict[str, Any]
) -> None:
    """llama.cpp's server and tokenizer must make the training's prompt of every conversation, in every mode."""
    for mode, flag in MODES.items():
        for turns in conversations:
            expected = probe.template.render_prompt(turns, flag)
            found = llama.render(_messages(turns), flag)
            if found != expected and not (flag is None and _chose_trained_mode(found, turns, probe, figures)):
                raise UserError(_prompt_message(llama, mode, expected, found))
            ids = _llama_ids(llama, probe.template, expected, turns)
            if ids != probe.template.encode_prompt(turns, flag):
                raise UserError(
                    f"{llama.path.name}: gate token parity failed (thinking {mode}): llama.cpp tokenises the prompt of "
                    f"{turns[-1].content[:60]!r} differently from training. The tokenizer's pre-tokenizer is not the "
                    "one written into the file; --no_check keeps the file, but it will answer worse than in training."
                )


def _chose_trained_mode(found: str, turns: Sequence[Turn], probe: ParityProbe, figures: dict[str, Any]) -> bool:
    """Left unset, llama.cpp may choose enable_thinking by itself; that is fine when it is the trained mode."""
    trained = MODES[probe.thinking]
    if trained is None or found != probe.template.render_prompt(turns, trained):
        return False
    note = f"llama.cpp chooses enable_thinking={str(trained).lower()} by itself, the mode of the training"
    if note not in figures["notes"]:
        figures["notes"].append(note)
    return True


def _prompt_message(llama: LlamaCpp, mode: str, expected: str, found: str) -> str:
    at = len(os.path.commonprefix([expected, found]))
    start = max(0, at - 20)
    advice = (
        "Left unset, llama.cpp chooses enable_thinking by itself for this template; a client must say it: "
        '"chat_template_kwargs": {"enable_thinking": ...}. '
        if mode == "unset"
        else ""
    )
    return (
        f"{llama.path.name}: gate prompt parity failed (thinking {mode}): training rendered "
        f"...{expected[start : at + 40]!r}, llama.cpp renders ...{found[start : at + 40]!r}. {advice}"
        "Train with a chat template that llama.cpp renders equally (--chat_template), or keep the file with --no_check."
    )


def _llama_ids(llama: LlamaCpp, template: ChatTemplate, prompt: str, turns: Sequence[Turn]) -> list[int]:
    """Ids of a rendered prompt by llama.cpp's tokenizer, control tokens typed in the contents as ordinary text.

    The server's endpoints would turn those into control tokens; whoever serves the file must send ids, as `uf` does.
    """
    ids: list[int] = []
    rest = prompt
    for turn in turns:
        typed = [text for text in template.control_tokens if text in turn.content]
        before, content, after = rest.partition(turn.content.strip())  # some templates strip it
        if not typed or not content:
            continue
        pieces = _cut(content, typed)
        ids += llama.tokenize(before + pieces[0], True)
        for number, piece in enumerate(pieces[1:], start=1):
            ids += _plain(llama, template, piece) if number % 2 else llama.tokenize(piece, True) if piece else []
            if number == len(pieces) - 2:  # the last clean piece is tokenised together with the template behind it
                break
        rest = pieces[-1] + after
    return ids + llama.tokenize(rest, True)


def _cut(text: str, typed: list[str]) -> list[str]:
    """Clean text, control token, clean text, ... (odd places are control tokens; longest token first)."""
    pattern = "|".join(re.escape(token) for token in sorted(typed, key=len, reverse=True))
    return re.split(f"({pattern})", text)


def _plain(llama: LlamaCpp, template: ChatTemplate, token: str) -> list[int]:
    """A control token's text as ordinary text, in two parts so that no tokenizer recognises it."""
    control = {template.tokenizer.convert_tokens_to_ids(text) for text in template.control_tokens}
    for at in range(1, len(token)):
        ids = llama.tokenize(token[:at], True) + llama.tokenize(token[at:], True)
        if not control.intersection(ids):
            return ids
    return []


def _check_texts(llama: LlamaCpp, template: ChatTemplate) -> int:
    """Plain texts must have the same ids in both tokenizers; returns how many were compared."""
    texts = probe_texts()
    wanted = template.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, wanted, strict=True):
        if llama.tokenize(text, True) != ids:
            raise UserError(
                f"{llama.path.name}: gate token parity failed: {text[:60]!r} has other token ids in llama.cpp than in "
                "training. The pre-tokenizer written into the file is not the model's; --no_check keeps the file."
            )
    return len(texts)


def _check_answers(
    llama: LlamaCpp, probe: ParityProbe, conversations: list[tuple[Turn, ...]], figures: dict[str, Any]
) -> None:
    """llama.cpp answers; transformers reads prompt and answer at once and must agree at every position.

    By induction over the positions a greedy answer is transformers' own exactly when its argmax agrees at each of
    them, so one forward pass with streamed weights replaces a generation that would not fit the memory.
    """
    asked = conversations[: len(probe.questions) + FIXED_QUESTIONS]
    prompts = [probe.template.encode_prompt(turns, MODES[probe.thinking]) for turns in asked]
    room = min(llama.max_positions, 1024) - ANSWER_TOKENS
    prompts = [ids for ids in prompts if len(ids) <= room]
    answers = [llama.generate(ids, ANSWER_TOKENS, probe.template.stop_ids) for ids in prompts]
    stop = probe.template.stop_ids[0]
    rows = [
        [*ids, *answer.ids, *([stop] if answer.stopped else [])] for ids, answer in zip(prompts, answers, strict=True)
    ]
    kls, agree, near, wrong = [], [], 0, []
    with WeightFolder(probe.folder) as stored:
        for number, reference in enumerate(StreamedModel(probe.folder, stored.tensor).logits(rows)):
            found = llama.logits(rows[number])
            kls.append(kl_divergence(reference, found))
            agree.append(reference.argmax(-1) == found[:, : reference.shape[1]].argmax(-1))
            gap = _greedy_gap(
                reference, prompts[number], rows[number], answers[number].stopped, probe.template.stop_ids
            )
            near += 0 < gap <= GREEDY_GAPS.get(probe.outtype, np.inf)
            if gap > GREEDY_GAPS.get(probe.outtype, np.inf):
                wrong.append(gap)
    kl = np.concatenate(kls)
    figures |= {
        "greedy_prompts": len(rows),
        "greedy_equal": len(rows) - len(wrong),
        "near_ties": int(near),
        "positions": len(kl),
        "kl_max": float(kl.max()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_mean": float(kl.mean()),
        "top1": float(np.concatenate(agree).mean()),
    }
    _gate(llama, probe.outtype, figures, max(wrong, default=0.0))


def _greedy_gap(
    reference: np.ndarray, prompt: list[int], row: list[int], stopped: bool, stop_ids: Sequence[int]
) -> float:
    """By how many logits, at most, transformers prefers another token within the answer; 0 when never."""
    worst = 0.0
    for at in range(len(prompt), len(row)):
        logits = reference[at - 1]
        best = int(logits.argmax())
        at_stop = stopped and at == len(row) - 1
        if best == row[at] or (at_stop and best in stop_ids):
            continue
        own = max(logits[i] for i in stop_ids) if at_stop else logits[row[at]]
        worst = max(worst, float(logits[best] - own))
    return worst


def _gate(llama: LlamaCpp, outtype: str, figures: dict[str, Any], worst_gap: float) -> None:
    limit = KL_LIMITS[outtype]
    if not (figures["kl_p99"] <= limit and figures["kl_max"] <= KL_OUTLIER * limit):
        raise UserError(
            f"{llama.path.name}: gate KL failed: KL divergence from transformers {figures['kl_p99']:.2e} nats at the "
            f"99th percentile, {figures['kl_max']:.2e} at most; limits for {outtype}: {limit:.0e} and "
            f"{KL_OUTLIER * limit:.0e}. {_finer(outtype)}--no_check keeps the file."
        )
    if worst_gap:
        raise UserError(
            f"{llama.path.name}: gate greedy answers failed: {figures['greedy_equal']} of {figures['greedy_prompts']} "
            f"equal transformers', limit all; it prefers another token by {worst_gap:.3f} logits. "
            f"{_finer(outtype)}--no_check keeps the file."
        )


def _finer(outtype: str) -> str:
    """Advice to take a format with more digits, where there is one."""
    finer = {"q8_0": "f16 or f32", "bf16": "f16 or f32", "f16": "f32"}.get(outtype)
    return f"Convert with --outtype {finer}; " if finer else ""
