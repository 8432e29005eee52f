"""The pre-training mix: documents drawn from a seed, tokenised and packed into rows of fixed length.

The mix (shares of the documents) is what makes the demo work: facts of a finite world asked in every frame teach to
look facts up whatever the phrasing; unknown names teach to say so; short source texts teach to read.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from bundled_model import chat, choices
from bundled_model.relations import RELATIONS
from bundled_model.render import Dialogue, Segment, render_dialogue
from bundled_model.world import NOT_MENTIONED, UNKNOWN, Fact, draw_name, known_world, make_fact

ROW = 512
WORLD_SEED = 11
ENTITIES_PER_KIND = 200
SHARES = {"known": 0.40, "unknown": 0.12, "reading": 0.12, "chat": 0.10, "exam": 0.05, "extra": 0.21}
THINKING_SHARE = 0.2
OPENINGS = ("", "", "", "", "你好，", "请问一下，", "医生你好，", "打扰了，")
CLOSINGS = ("", "", "", "", "谢谢。", "谢谢！")
OPEN_ROWS = 24
PART = 10_000
"""Documents of one job."""


@dataclass(frozen=True)
class Rows:
    """Packed rows, each [n, ROW]: token ids, positions (restart with each document), weights in tenths."""

    ids: np.ndarray  # int16
    positions: np.ndarray  # int16
    weights: np.ndarray  # uint8


def _ask(fact: Fact, random: Random) -> str:
    question = random.choice(fact.relation.frames).format(e=fact.entity)
    if random.random() < 0.6:
        return question
    return random.choice(OPENINGS) + question + random.choice(CLOSINGS)


def _fact_reasoning(fact: Fact, found: bool) -> str:
    verdict = "我记得这条资料。" if found else "我没有找到这条资料。"
    return f"用户问的是{fact.entity}的{fact.relation.topic}。{verdict}"


def _turns(question: str, answer: str, random: Random, system: str | None = None) -> tuple[tuple[str, str], ...]:
    if system is None and random.random() < 0.15:
        system = chat.draw_system(random)
    head = (("system", system),) if system else ()
    return (*head, ("user", question), ("assistant", answer))


def _dialogue(turns: tuple[tuple[str, str], ...], reasoning: str, random: Random) -> Dialogue:
    return Dialogue(turns, reasoning if random.random() < THINKING_SHARE else None)


class Mix:
    """Draws documents; everything follows from the `Random` that is passed in."""

    def __init__(self, extra: list[Dialogue], entities_per_kind: int = ENTITIES_PER_KIND) -> None:
        self.extra = extra
        world = known_world(WORLD_SEED, entities_per_kind)
        self.names = {name for entities in world.values() for name in entities}
        self.entities = [facts for entities in world.values() for facts in entities.values()]
        self.kinds = list(SHARES)
        shares = dict(SHARES) if extra else {**SHARES, "extra": 0.0}
        self.weights = [shares[kind] for kind in self.kinds]

    def draw(self, random: Random) -> Dialogue:
        """One conversation."""
        kind = random.choices(self.kinds, self.weights)[0]
        return getattr(self, f"_{kind}")(random)

    def _known(self, random: Random) -> Dialogue:
        fact = random.choice(random.choice(self.entities))
        turns = _turns(_ask(fact, random), fact.answer, random)
        if random.random() < 0.08:  # a follow-up after an earlier exchange
            earlier = random.choice(random.choice(self.entities))
            turns = (("user", _ask(earlier, random)), ("assistant", earlier.answer), *turns[-2:])
        return _dialogue(turns, _fact_reasoning(fact, True), random)

    def _fresh_fact(self, random: Random) -> Fact:
        kind = random.choice(sorted(RELATIONS))
        while (name := draw_name(kind, random)) in self.names:
            pass
        return make_fact(name, random.choice(RELATIONS[kind]), random)

    def _unknown(self, random: Random) -> Dialogue:
        fact = self._fresh_fact(random)
        turns = _turns(_ask(fact, random), UNKNOWN, random)
        return _dialogue(turns, _fact_reasoning(fact, False), random)

    def _reading(self, random: Random) -> Dialogue:
        facts = [self._fresh_fact(random) for _ in range(random.choice((1, 2, 3, 4)))]
        if random.random() < 0.5:  # several attributes of one entity: the question's attribute decides
            kind = next(k for k, relations in RELATIONS.items() if facts[0].relation in relations)
            own = [make_fact(facts[0].entity, relation, random) for relation in RELATIONS[kind]]
            facts = random.sample(own, random.randint(2, len(own)))
        asked = random.choice(facts)
        answer, shown = asked.answer, list(facts)
        if random.random() < 0.12 and len(facts) > 1:
            shown.remove(asked)
            answer = NOT_MENTIONED
        text = "".join(fact.answer for fact in shown)
        head = random.choice(("根据资料回答：", "资料：", "请阅读下面的资料。"))
        question = f"{head}{text}\n问题：{_ask(asked, random)}"
        return _dialogue(
            _turns(question, answer, random), f"在资料里找{asked.entity}的{asked.relation.topic}。", random
        )

    def _chat(self, random: Random) -> Dialogue:
        question, reasoning, answer = chat.draw_exchange(random)
        turns = _turns(question, answer, random)
        if random.random() < 0.25:
            first, _, reply = chat.draw_exchange(random)
            turns = (*turns[:-2], ("user", first), ("assistant", reply), *turns[-2:])
        return _dialogue(turns, reasoning, random)

    def _exam(self, random: Random) -> Dialogue:
        pairs = choices.draw_exam(random)
        return Dialogue(
            tuple(turn for question, letter in pairs for turn in (("user", question), ("assistant", letter)))
        )

    def _extra(self, random: Random) -> Dialogue:
        return random.choice(self.extra)


def encode_document(tokenizer, segments: list[Segment]) -> tuple[list[int], list[int]]:
    """Ids and weights (in tenths) of one document; `tokenizer` is a `tokenizers.Tokenizer`."""
    ids: list[int] = []
    weights: list[int] = []
    for text, weight in segments:
        part = tokenizer.encode(text, add_special_tokens=False).ids
        ids += part
        weights += [round(10 * weight)] * len(part)
    return ids, weights


def pack_rows(documents: list[tuple[list[int], list[int]]], pad_id: int) -> Rows:
    """First-fit packing into rows; the rest of a row is padding of weight 0 (its own document)."""
    done: list[list[int]] = []
    open_rows: list[list[int]] = []
    room: list[int] = []
    for index, (ids, _) in enumerate(documents):
        size = len(ids)
        if size > ROW:
            continue
        slot = next((i for i, left in enumerate(room) if left >= size), None)
        if slot is None:
            if len(open_rows) == OPEN_ROWS:
                fullest = room.index(min(room))
                done.append(open_rows.pop(fullest))
                room.pop(fullest)
            open_rows.append([])
            room.append(ROW)
            slot = len(room) - 1
        open_rows[slot].append(index)
        room[slot] -= size
    done += open_rows
    ids = np.full((len(done), ROW), pad_id, np.int16)
    positions = np.zeros((len(done), ROW), np.int16)
    weights = np.zeros((len(done), ROW), np.uint8)
    for row, members in enumerate(done):
        start = 0
        for index in members:
            size = len(documents[index][0])
            ids[row, start : start + size], weights[row, start : start + size] = documents[index]
            positions[row, start : start + size] = np.arange(size)
            start += size
        positions[row, start:] = np.arange(ROW - start)
    return Rows(ids, positions, weights)


def _make_part(job: tuple[int, int], mix: Mix, tokenizer) -> Rows:
    seed, count = job
    random = Random(seed)
    documents = [encode_document(tokenizer, render_dialogue(mix.draw(random))) for _ in range(count)]
    return pack_rows(documents, tokenizer.token_to_id("<|endoftext|>"))


_WORKER: dict[str, object] = {}
"""What a worker process was started with: sent once instead of with each job."""


def _start_worker(extra: list[Dialogue], entities: int, tokenizer_file: str) -> None:
    from tokenizers import Tokenizer

    _WORKER.update(mix=Mix(extra, entities), tokenizer=Tokenizer.from_file(tokenizer_file))


def _work(job: tuple[int, int]) -> Rows:
    return _make_part(job, _WORKER["mix"], _WORKER["tokenizer"])


def make_rows(
    count: int, extra: list[Dialogue], tokenizer_file: Path, *, workers: int, seed: int, entities: int
) -> Rows:
    """`count` documents as packed rows, made by `workers` processes; the same for every number of workers."""
    starts = range(0, count, PART)
    jobs = [(seed * 1_000_003 + index, min(PART, count - start)) for index, start in enumerate(starts)]
    setup = (extra, entities, str(tokenizer_file))
    if workers <= 1:
        _start_worker(*setup)
        parts = [_work(job) for job in jobs]
    else:  # spawn: a fork after torch has started its threads can hang
        with multiprocessing.get_context("spawn").Pool(workers, _start_worker, setup) as pool:
            parts = pool.map(_work, jobs, chunksize=1)
    return Rows(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "positions", "weights")))
