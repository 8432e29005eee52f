"""Settings to conversations: sources, remapping, reports, refusals, the held-out split."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings
from unsloth_factory.data.duplicates import find_duplicates
from unsloth_factory.data.load import load_conversations, load_pairs
from unsloth_factory.data.split import read_validation_split, split_validation, write_validation_split
from unsloth_factory.data.thinking import thinking_mode
from unsloth_factory.data.types import Conversation, PreferencePair, Turn


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def qa(*names: str) -> list[dict]:
    return [{"question": f"q{name}", "answer": f"a{name}"} for name in names]


def questions(conversations) -> list[str]:
    return [conversation.turns[-2].content for conversation in conversations]


def test_folder_list_and_limits(tmp_path):
    folder = tmp_path / "资料 folder"
    folder.mkdir()
    b = write_rows(folder / "b.jsonl", qa("3", "4", "5"))
    a = write_rows(folder / "a.json", qa("1", "2"))
    (folder / "notes.md").write_text("not data")
    loaded, report = load_conversations(DataSettings(dataset=str(folder)))
    assert questions(loaded) == ["q1", "q2", "q3", "q4", "q5"]
    assert [entry["format"] for entry in report.files] == ["jsonl/qa", "jsonl/qa"]
    assert loaded[2].source == "b.jsonl:1"
    assert questions(load_conversations(DataSettings(dataset=f"{b}#1,{a}"))[0]) == ["q3", "q1", "q2"]
    limited, report = load_conversations(DataSettings(dataset=f"{b},{a}", data_limit=4))
    assert questions(limited) == ["q3", "q4", "q5", "q1"]
    assert (report.rows, report.used) == (4, 4)
    relative = DataSettings(dataset="b.jsonl", dataset_dir=str(folder))
    assert len(load_conversations(relative)[0]) == 3
    comma = write_rows(tmp_path / "a,b#2.jsonl", qa("9"))
    assert questions(load_conversations(DataSettings(dataset=comma))[0]) == ["q9"]


def test_bad_rows_are_counted(tmp_path):
    rows = [*qa("1", "2", "3"), {"question": "q", "answer": ""}, {"question": " ", "answer": "a"}, *qa("1")]
    loaded, report = load_conversations(DataSettings(dataset=write_rows(tmp_path / "a.jsonl", rows)))
    assert len(loaded) == report.used == 4
    assert report.rows == 6
    assert report.skipped == {"empty answer": 1, "empty question": 1}
    assert report.skipped_examples == ["a.jsonl:4 empty answer", "a.jsonl:5 empty question"]
    same = DataSettings(dataset=write_rows(tmp_path / "b.jsonl", [{"question": "q", "answer": "q"}, *qa("1")]))
    assert load_conversations(same)[1].notes == {"answers equal to their question (kept)": 1}
    loaded, report = load_conversations(replace(same, bad_rows="skip"))
    assert (questions(loaded), report.skipped) == (["q1"], {"answer equals question": 1})
    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used \(b\.jsonl:1 answer equals question\)"):
        load_conversations(replace(same, bad_rows="refuse"))


def test_mostly_bad_files_are_refused(tmp_path):
    rows = [*qa("1"), {"question": "q", "answer": ""}, {"question": "q", "answer": None}]
    with pytest.raises(UserError, match=r"2 of 3 rows cannot be used as qa \(1 x empty answer; .*first is a\.jsonl:2"):
        load_conversations(DataSettings(dataset=write_rows(tmp_path / "a.jsonl", rows)))
    (tmp_path / "b.jsonl").write_text("1\n2\n")
    with pytest.raises(UserError, match="no row can be read"):
        load_conversations(DataSettings(dataset=str(tmp_path / "b.jsonl")))


class Upper:
    """A normalizer that counts what it changes."""

    def normalize(self, text: str) -> tuple[str, int]:
        return text.replace("bp", "BP"), text.count("bp")


def test_system_prompt_and_terms(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "bp?"}, {"role": "assistant", "content": "<think>bp</think>bp bp"}]},
        {
            "messages": [
                {"role": "system", "content": "own bp"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ]
    settings = DataSettings(dataset=write_rows(tmp_path / "a.jsonl", rows))
    loaded, report = load_conversations(settings, system="domain", normalizer=Upper())
    assert loaded[0].turns == (Turn("system", "domain"), Turn("user", "BP?"), Turn("assistant", "BP BP", "BP"))
    assert loaded[1].turns[0] == Turn("system", "own bp")
    assert report.terms_normalized == 4
    assert thinking_mode(loaded) == "off"
    assert thinking_mode(loaded[:1]) == "on"


def test_columns(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"Frage": "q", "Antwort": "a", "output": "wrong"}])
    settings = DataSettings(dataset=path, columns={"prompt": "Frage", "response": "Antwort"})
    assert load_conversations(settings)[0][0].turns == (Turn("user", "q"), Turn("assistant", "a"))
    with pytest.raises(UserError, match="no column 'Fragen'.*Found: Frage, Antwort, output"):
        load_conversations(replace(settings, columns={"prompt": "Fragen", "response": "Antwort"}))
    with pytest.raises(UserError, match="unknown role. Known for alpaca: prompt"):
        load_conversations(replace(settings, columns={"promt": "Frage"}))
    with pytest.raises(UserError, match="make no known shape"):
        load_conversations(DataSettings(dataset=write_rows(tmp_path / "b.jsonl", [{"x": 1}])))
    with pytest.raises(UsageError, match="Did you mean sharegpt"):
        load_conversations(replace(settings, dataset_format="sharegtp"))


REGISTRY = {
    "mine": {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "tools": "tools"},
        "tags": {"role_tag": "wer", "content_tag": "was", "user_tag": "ich", "assistant_tag": "du"},
        "num_samples": 1,
    },
    "prefs": {"file_name": "prefs.json", "ranking": True, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}},
    "hub": {"hf_hub_url": "someone/something"},
    "gone": {"file_name": "gone.json"},
    "odd": {"file_name": "mine.json", "formatting": "xml"},
}


@pytest.fixture
def registry(tmp_path):
    talk = [{"wer": "ich", "was": "q"}, {"wer": "du", "was": "a"}]
    write_rows(tmp_path / "mine.json", [{"talk": talk}, {"talk": talk}])
    write_rows(tmp_path / "prefs.json", [{"p": "q", "c": "a", "r": "b"}])
    (tmp_path / "dataset_info.json").write_text(json.dumps(REGISTRY), encoding="utf-8")
    return tmp_path


def test_registry(registry):
    by_name, report = load_conversations(DataSettings(dataset="mine", dataset_dir=str(registry)))
    assert [c.turns for c in by_name] == [(Turn("user", "q"), Turn("assistant", "a"))]
    assert len(load_conversations(DataSettings(dataset=str(registry / "mine")))[0]) == 1
    assert len(load_conversations(DataSettings(dataset=str(registry / "mine.json")))[0]) == 2
    pairs, _ = load_pairs(DataSettings(dataset="prefs", dataset_dir=str(registry)), system="s")
    system, question = Turn("system", "s"), Turn("user", "q")
    assert pairs == [PreferencePair((system, question), Turn("assistant", "a"), Turn("assistant", "b"), "prefs.json:1")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub", r"not a local file \(hf_hub_url someone/something\)"),
        ("gone", r"gone\.json, which does not exist"),
        ("odd", "formatting 'xml'"),
        ("min", r"no such file or folder.*there is: mine\.json.*dataset_info\.json has mine"),
        ("mine#0", "after # a number of rows"),
    ],
)
def test_registry_faults(registry, name, message):
    with pytest.raises(UserError, match=message):
        load_conversations(DataSettings(dataset=name, dataset_dir=str(registry)))


def test_broken_registry_and_missing_things(tmp_path):
    with pytest.raises(UserError, match="--dataset: give"):
        load_conversations(DataSettings())
    with pytest.raises(UserError, match="does not exist either"):
        load_conversations(DataSettings(dataset=str(tmp_path / "no" / "file.json")))
    with pytest.raises(UserError, match="no file of a known type"):
        load_conversations(DataSettings(dataset=str(tmp_path)))
    (tmp_path / "dataset_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="broken JSON"):
        load_conversations(DataSettings(dataset="x", dataset_dir=str(tmp_path)))


def test_methods_and_shapes_must_match(tmp_path):
    preferences = write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    plain = write_rows(tmp_path / "q.jsonl", qa("1"))
    with pytest.raises(UserError, match="train with dpo"):
        load_conversations(DataSettings(dataset=preferences))
    with pytest.raises(UserError, match="columns chosen and rejected; found question, answer"):
        load_pairs(DataSettings(dataset=plain))
    renamed = DataSettings(dataset=plain, columns={"prompt": "question", "chosen": "answer", "rejected": "answer"})
    with pytest.raises(UserError, match="unknown role|cannot be used as preference"):
        load_pairs(renamed)


def conversations(*names: str) -> list[Conversation]:
    return [
        Conversation((Turn("user", name), Turn("assistant", name, "r" if name == "a" else None)), f"f:{i}")
        for i, name in enumerate(names)
    ]


def test_split_is_deterministic_and_keeps_duplicates_together():
    items = conversations(*[f"{i % 40}" for i in range(100)])
    train, held = split_validation(items, 0.2, 3407)
    assert (train, held) == split_validation(items, 0.2, 3407)
    assert held != split_validation(items, 0.2, 1)[1]
    assert len(held) == 20
    assert not {c.turns for c in train} & {c.turns for c in held}
    assert sorted(train + held, key=items.index) == items
    assert [items.index(c) for c in train] == sorted(items.index(c) for c in train)
    assert split_validation(items, 0, 1) == (items, [])
    assert len(split_validation(items, 7, 1)[1]) == 6, "groups of two and three: never more than asked for"
    assert len(split_validation(conversations("a", "b", "c"), 0.05, 1)[1]) == 1
    with pytest.raises(UserError, match="--val_split 100 holds out 100 of 100"):
        split_validation(items, 100, 1)


def test_held_out_samples_survive_the_disk(tmp_path):
    path = tmp_path / "validation_split.jsonl"
    items = conversations("a", "b\u2028c", "\U0001f600")
    write_validation_split(path, items)
    assert read_validation_split(path) == items
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["messages"][1] == {"role": "assistant", "content": "a", "reasoning_content": "r"}
    pair = PreferencePair((Turn("user", "q"),), Turn("assistant", "a"), Turn("assistant", "b"), "p:1")
    write_validation_split(path, [pair])
    assert read_validation_split(path)[0].turns == (Turn("user", "q"), Turn("assistant", "a"))
    path.write_text('{"messages": [{}]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: not a held-out sample"):
        read_validation_split(path)
    with pytest.raises(UserError, match="no held-out samples"):
        read_validation_split(tmp_path / "none.jsonl")


REAL = {
    "medical/toyhom_internal_medicine_gbk.csv": ("csv/qa", "gbk", 7644, 378),
    "medical/toyhom_first500_gbk.txt": ("txt/qa", "gbk", 500, 19),
    "medical/medical_o1_alpaca_300.json": ("json/alpaca", "utf-8", 300, 0),
    "medical/medical_o1_cot_100.json": ("json/qa", "utf-8", 100, 0),
    "medical/sharegpt_1000.jsonl": ("jsonl/sharegpt", "utf-8", 1000, 0),
    "medical/huatuo_1500_jsonl_named.json": ("jsonl/alpaca", "utf-8", 1500, 0),
    "legal/disc_law_qa_300.json": ("json/qa", "utf-8", 300, 2),
    "psychology/smile_200.jsonl": ("jsonl/sharegpt", "utf-8", 199, 0),
    "gsm8k/train.jsonl": ("jsonl/qa", "utf-8", 1000, 0),
    "gsm8k/test.jsonl": ("jsonl/qa", "utf-8", 300, 0),
    "llamafactory/alpaca_zh_demo.json": ("json/alpaca", "utf-8", 1000, 8),
    "llamafactory/identity": ("json/alpaca", "utf-8", 91, 0),
    "preference/dpo_zh_500.jsonl": ("jsonl/preference", "utf-8", 500, 0),
    "llamafactory/dpo_zh_demo": ("json/preference", "utf-8", 300, 11),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared_data, name):
    shape, encoding, used, duplicates = REAL[name]
    load = load_pairs if "dpo" in name else load_conversations
    items, report = load(DataSettings(dataset=str(shared_data / name)))
    assert len(items) == report.used == used
    assert (report.files[0]["format"], report.files[0]["encoding"]) == (shape, encoding)
    assert len(find_duplicates(items).exact) == duplicates
    reasoned = "on" if "medical_o1" in name else "off"
    if load is load_conversations:
        assert thinking_mode(items) == reasoned
    train, held = split_validation(items, 0.05, 3407)
    assert len(held) == round(0.05 * used)


def test_real_benchmark_files_can_be_read(shared_data):
    from unsloth_factory.data.readers import read_table

    counts = {}
    for split in ("dev", "val", "test"):
        tables = [read_table(path) for path in sorted((shared_data / "ceval" / split).glob("*.csv"))]
        assert len(tables) == 52
        assert all(row.problem is None for table in tables for row in table.rows)
        counts[split] = sum(len(table.rows) for table in tables)
    assert counts == {"dev": 260, "val": 1346, "test": 12342}


def test_real_pictures_and_running_text_are_refused(shared_data):
    with pytest.raises(UserError, match="6 x images need"):
        load_conversations(DataSettings(dataset=str(shared_data / "llamafactory/mllm_demo.json")))
    with pytest.raises(UserError, match="running text"):
        load_conversations(DataSettings(dataset=str(shared_data / "llamafactory/wiki_demo.txt")))
