"""Optional extra training text: permissively licensed chat sets from a folder, and the package's knowledge packs.

Only weights are made from it; no text of it is stored in the repository. A file that is not there is skipped.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bundled_model.render import Dialogue

LONGEST_ANSWER = 260
"""Characters. A longer answer is left out: a document has to fit a row of 512 tokens with its end."""
LONGEST_QUESTION = 160
LONGEST_REASONING = 120


def _json_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _exchange(question: str, answer: str, reasoning: str | None = None) -> Iterator[Dialogue]:
    question, answer = question.strip(), answer.strip()
    if not question or not 2 <= len(answer) <= LONGEST_ANSWER or len(question) > LONGEST_QUESTION:
        return
    if "<" in question or "<" in answer:
        return
    if reasoning is not None:
        cut = reasoning.strip().replace("\n\n", "\n")[:LONGEST_REASONING]
        stop = max(cut.rfind(mark) for mark in "。！？")
        if stop < 10:
            return
        reasoning = cut[: stop + 1]
    yield Dialogue((("user", question), ("assistant", answer)), reasoning)


def _alpaca(path: Path) -> Iterator[Dialogue]:
    for row in _json_rows(path):
        question, answer = (row["instruction"] + "\n" + row.get("input", "")).strip(), row["output"]
        if answer.startswith("<think>"):
            reasoning, _, answer = answer.removeprefix("<think>").partition("</think>")
            yield from _exchange(row["input"], answer, reasoning)
        else:
            yield from _exchange(question, answer)


def _columns(question: str, answer: str, reasoning: str | None = None) -> Callable[[Path], Iterator[Dialogue]]:
    def read(path: Path) -> Iterator[Dialogue]:
        for row in _json_rows(path):
            yield from _exchange(row[question], row[answer], row[reasoning] if reasoning else None)

    return read


def _sharegpt(path: Path) -> Iterator[Dialogue]:
    for row in _json_rows(path):
        turns = [turn["value"] for turn in row["conversations"][:2]]
        if len(turns) == 2:
            yield from _exchange(*turns)


def _smile(path: Path) -> Iterator[Dialogue]:
    for row in _json_rows(path):
        turns = [("user" if t["role"] == "client" else "assistant", t["content"].strip()) for t in row["dialogue"]]
        for end in range(2, len(turns) + 1, 2):
            window = tuple(turns[max(0, end - 4) : end])
            if window[-1][0] == "assistant" and sum(len(text) for _, text in window) < 400:
                yield Dialogue(window)


def _gbk_csv(path: Path) -> Iterator[Dialogue]:
    with path.open(encoding="gb18030", newline="") as file:
        for row in csv.DictReader(file):
            yield from _exchange(row["ask"], row["answer"])


READERS: dict[str, Callable[[Path], Iterator[Dialogue]]] = {
    "llamafactory/alpaca_zh_demo.json": _alpaca,
    "medical/huatuo_1500_jsonl_named.json": _alpaca,
    "medical/medical_o1_alpaca_300.json": _alpaca,
    "medical/medical_o1_cot_100.json": _columns("Question", "Response", "Complex_CoT"),
    "medical/sharegpt_1000.jsonl": _sharegpt,
    "medical/toyhom_internal_medicine_gbk.csv": _gbk_csv,
    "psychology/smile_200.jsonl": _smile,
    "legal/disc_law_qa_300.json": _columns("input", "output"),
}


def _mostly_chinese(text: str) -> bool:
    return sum("\u4e00" <= char <= "\u9fff" for char in text) >= 0.6 * len(text)


def read_extra_text(folder: Path | None) -> list[Dialogue]:
    """All usable conversations of the known files under `folder`, without duplicates, in a fixed order."""
    if folder is None:
        return []
    found: dict[Dialogue, None] = {}
    for name, reader in READERS.items():
        path = folder / name
        if path.is_file():
            before = len(found)
            found.update((d, None) for d in reader(path) if _mostly_chinese("".join(text for _, text in d.turns)))
            print(f"  {name}: {len(found) - before} conversations", flush=True)
    return list(found)


RELATION_NAMES = {
    "symptom": "常见症状",
    "test": "检查",
    "treatment": "治疗方法",
    "complication": "并发症",
    "prevention": "预防方法",
    "contraindication": "禁忌",
    "element": "构成要件",
    "consequence": "法律后果",
    "deadline": "期限",
    "evidence": "证据",
    "exception": "例外情形",
    "procedure": "办理程序",
    "right": "权利",
    "support": "支持方法",
    "technique": "缓解技巧",
}
PACK_FRAMES = ("{}有哪些？", "请说说{}。", "请问{}是什么？", "我想了解{}。")
PACK_REPEATS = 3
"""Each pack conversation counts this often: a few hundred among ten thousand others."""


def read_packs(folder: Path) -> list[Dialogue]:
    """Questions and answers made of the associations of the knowledge packs (none if the folder is not there)."""
    import yaml

    dialogues = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            pack = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            print(f"  {path.name}: skipped, {error}", flush=True)
            continue
        for entry in pack.get("associations") or []:
            condition, expects = entry.get("condition"), entry.get("expects") or []
            if not condition or not expects:
                continue
            topic = f"{condition}的{RELATION_NAMES.get(entry.get('relation'), '要点')}"
            names = "、".join(str(name).split("|")[0] for name in expects)
            for frame in PACK_FRAMES:
                turns = (("user", frame.format(topic)), ("assistant", f"{topic}包括{names}。"))
                dialogues += [Dialogue(turns)] * PACK_REPEATS
    return dialogues
