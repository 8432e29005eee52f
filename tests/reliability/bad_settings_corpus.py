"""Bad settings, registries, packs, plans and chat templates, each with the exit code and the line of its message."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bad_input_corpus import Case

# YAML for `uf sft FILE`; line of the fault, text of the message.
YAML: dict[str, tuple[str, int | None, str]] = {
    "unknown key": ("epochs: 1\nlearnig_rate: 1e-4\n", 2, "Did you mean learning_rate?"),
    "unknown key, far from all": ("epochs: 1\nzzzzzz: 1\n", 2, "unknown setting"),
    "plural": ("model: m\n\nepoch: 3\n", 3, "Did you mean epochs?"),
    "camel case": ("batchSize: 3\n", 1, "batch_size"),
    "doubled key": ("epochs: 1\nmodel: m\nepochs: 2\n", 3, "lines 1 and 3"),
    "doubled key below": ("model: m\ncolumns:\n  prompt: a\n  prompt: b\n", 4, "lines 3 and 4"),
    "doubled number key": ("1: a\n1: b\n", 2, "stands twice"),
    "octal": ("model: m\nlora_r: 012\n", 2, "012 is 10 in YAML 1.1 and 12 in YAML 1.2"),
    "octal below zero": ("epochs: -010\n", 1, "-8"),
    "base 60": ("model: m\nbatch_size: 1:30\n", 2, "must be a number"),
    "base 60 float": ("epochs: 1:30.5\n", 1, "must be a number"),
    "date": ("epochs: 2024-01-01\n", 1, "must be a number"),
    "impossible date": ("seed: 2024-99-99\n", 1, "must be a number"),
    "truth for a number": ("a: 1\nepochs: yes\n", 2, "not true/false"),
    "truth for a text": ("dataset: no\n", 1, "put it in quotes"),
    "truth for a choice": ("lr_scheduler_type: on\n", 1, "must be one of cosine"),
    "text for a truth": ("no_packing: maybe\n", 1, "must be true or false"),
    "text for a number": ("epochs: three\n", 1, "must be a number"),
    "comma number": ("learning_rate: 1,5e-4\n", 1, "must be a number"),
    "percent": ("warmup_ratio: 3%\n", 1, "must be a number"),
    "nan": ("epochs: .nan\n", 1, "finite"),
    "infinity": ("epochs: .inf\n", 1, "finite"),
    "infinity by exponent": ("epochs: 1e400\n", 1, "finite"),
    "5,000 digits": ("model: m\nseed: " + "9" * 5000 + "\n", 2, "cannot be read"),
    "huge integer": ("seed: " + "9" * 400 + "\n", 1, "must"),
    "huge exponent for an integer": ("max_steps: 1e30\n", 1, "must lie within"),
    "hex without digits": ("seed: 0x_\n", 1, "cannot be read"),
    "underscore float": ("epochs: ._\n", 1, "must be a number"),
    "fraction for an integer": ("batch_size: 1.5\n", 1, "whole number"),
    "too small": ("model: m\nepochs: -1\n", 2, "above 0"),
    "zero": ("batch_size: 0\n", 1, "at least 1"),
    "list for a number": ("epochs: [1, 2]\n", 1, "must be a number"),
    "mapping for a text": ("model: {name: m}\n", 1, "expects a text"),
    "nested list": ("dataset: [a, [b]]\n", 1, "expects a text"),
    "null for a number": ("epochs:\n", 1, "needs a value"),
    "groups": ("loop:\n  epochs: 3\n", 1, "unknown setting"),
    "two rules at once": ("epochs: 0\nlora_r: 0\n", 2, "at least 1"),
    "unclosed list": ("model: m\nepochs: [1\n", 3, "','"),
    "unclosed quote": ("model: 'm\nepochs: 1\n", 3, "end of stream"),
    "tab": ("model: m\n\tepochs: 1\n", 2, "'\\t'"),
    "indent": ("model: m\n  epochs: 1\n", 2, "not allowed"),
    "no space": ("model:m\nepochs: 1\n", 2, "not allowed"),
    "two documents": ("model: m\n---\nepochs: 1\n", 2, "another document"),
    "only a text": ("just words\n", None, "setting: value"),
    "only a list": ("- model\n", None, "setting: value"),
    "empty": ("", None, "setting: value"),
    "comments": ("# nothing\n", None, "setting: value"),
    "python object": ("model: !!python/object/apply:os.getcwd []\n", 1, "constructor"),
    "python name": ("model: !!python/name:os.system\n", 1, "constructor"),
    "unknown tag": ("model: !file a\n", 1, "constructor"),
    "wrong tag": ("seed: !!int x\n", 1, "cannot be read"),
    "wrong float tag": ("model: m\nseed: !!float x\n", 2, "cannot be read"),
    "wrong time tag": ("seed: !!timestamp x\n", 1, "cannot be read"),
    "unknown alias": ("model: *base\n", 1, "alias"),
    "alias in itself": ("model: &a [*a]\n", 1, "alias"),
    "many laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        6, "more than 100,000 values",
    ),
    "many laughs merged": (
        "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{p: *{a}, q: *{a}}}\n" for a, b in zip("abcdefghijklmnopqrst",
                                                                        "bcdefghijklmnopqrstu", strict=True)),
        None, "more than 100,000 values",
    ),
    "deep": ("model: " + "[" * 3000 + "]" * 3000 + "\n", None, "nested"),
    "deep mapping": ("".join(" " * i + "a:\n" for i in range(600)), None, "nested"),
    "list as a key": ("? [a, b]\n: 1\n", 1, "unhashable"),
    "mapping as a key": ("{a: 1}: 2\n", None, ""),
    "NUL": ('model: "a\\0b"\n', 1, "NUL"),
    "half pair": ('epochs: 1\nsystem: "\\ud83d"\n', 2, "surrogate"),
    "control character": ("model: m\nsystem: a\x07b\n", 2, "U+0007"),
    "not a flag": ("model: m\n--epochs: 3\n", 2, "unknown setting"),
    "stage of another command": ("model: m\nstage: dpo\n", 2, "uf dpo"),
    "unknown stage": ("stage: ppo\n", 1, "Known stages"),
    "4 bit and full": ("quantization_bit: 4\nfinetuning_type: full\n", 1, "cannot train"),
    "columns": ("columns: prompt\n", 1, "name=value"),
    "columns with a list": ("columns: {prompt: [a]}\n", 1, "names and texts"),
    "equals": ("model = tiny\nepochs = 3\n", None, "setting: value"),
    "json with a comma": ('{"epochs": 1,, "model": "m"}\n', 1, ""),
}  # fmt: skip
REGISTRIES: dict[str, tuple[str, str]] = {
    "cut": ('{"mine": {"file_name": "d.jso', "broken JSON"),
    "empty": ("", "broken JSON"),
    "list": ("[]", "an object"),
    "entry is text": ('{"mine": "d.json"}', "an object"),
    "deep": ('{"mine": ' * 5000, "broken JSON"),
    "no file": ('{"mine": {"hf_hub_url": "a/b"}}', "not downloaded"),
    "gone": ('{"mine": {"file_name": "gone.json"}}', "does not exist"),
    "file is a number": ('{"mine": {"file_name": 3}}', "file_name"),
    "file is a list": ('{"mine": {"file_name": ["d.json"]}}', "file_name"),
    "formatting": ('{"mine": {"file_name": "d.json", "formatting": "xml"}}', "xml"),
    "formatting is a list": ('{"mine": {"file_name": "d.json", "formatting": ["xml"]}}', "formatting"),
    "columns is a list": ('{"mine": {"file_name": "d.json", "columns": ["prompt"]}}', "columns"),
    "column is a number": ('{"mine": {"file_name": "d.json", "columns": {"prompt": 1}}}', "columns"),
    "unknown role": ('{"mine": {"file_name": "d.json", "columns": {"promt": "instruction"}}}', "promt"),
    "column is missing": ('{"mine": {"file_name": "d.json", "columns": {"prompt": "frage"}}}', "frage"),
    "tags is a list": ('{"mine": {"file_name": "d.json", "tags": ["x"]}}', "tags"),
    "tag is a number": ('{"mine": {"file_name": "d.json", "formatting": "sharegpt", "tags": {"role_tag": 1}}}', "tags"),
    "samples is a text": ('{"mine": {"file_name": "d.json", "num_samples": "ten"}}', "num_samples"),
    "samples below zero": ('{"mine": {"file_name": "d.json", "num_samples": -1}}', "num_samples"),
    "outside": ('{"mine": {"file_name": "../../../etc/hostname"}}', ""),
}
PACKS: dict[str, tuple[str, int | None]] = {
    "cut": ("name: [", 1),
    "empty": ("", None),
    "list": ("- a\n", None),
    "tag": ("name: !!python/name:os.system\n", 1),
    "doubled": ("name: a\nname: b\n", 2),
    "date": ("name: 2024-99-99\n", None),
    "deep": ("name: " + "[" * 3000, None),
    "list as a key": ("? [a]\n: 1\n", None),
    "NUL": ("name: a\x00b\n", None),
}
PLANS: dict[str, tuple[str, int | None, str]] = {
    "no stages": ("model: tiny\n", None, "stages"),
    "stages is a text": ("stages: sft\n", None, "stages"),
    "unknown stage": ("stages:\n  - sftt: {epochs: 1}\n", None, "Did you mean sft?"),
    "stage is a number": ("stages:\n  - 3\n", None, "stage 1"),
    "two commands in one": ("stages:\n  - {sft: {}, dpo: {}}\n", None, "stage 1"),
    "settings are a list": ("stages:\n  - sft: [epochs]\n", None, "stage 1"),
    "unknown key": ("stages:\n  - sft: {model: tiny, learnig_rate: 1}\n", 2, "learning_rate"),
    "unknown key outside": ("learnig_rate: 1\nstages:\n  - sft: {model: tiny}\n", None, "learning_rate"),
    "output is a number": ("output_dir: 2024\nstages:\n  - sft: {model: tiny, epochs: x}\n", None, "epochs"),
    "output is a list": ("output_dir: [a]\nstages:\n  - sft: {model: tiny}\n", None, "output_dir"),
    "output of a stage is a list": ("stages:\n  - sft: {output_dir: [a]}\n", 2, "output_dir"),
    "bad number": ("stages:\n  - sft: {model: tiny, epochs: three}\n", 2, "must be a number"),
    "doubled": ("stages:\n  - sft:\n      epochs: 1\n      epochs: 2\n", 4, "stands twice"),
    "octal": ("stages:\n  - sft: {lora_r: 012}\n", 2, "012"),
    "deep": ("stages: " + "[" * 3000, None, "nested"),
}
TEMPLATES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": ("{% for m in messages %}高{% endfor %}".encode("gbk"), "UTF-8"),
    "empty": (b"", "template"),
    "unclosed": (b"{% for m in messages %}", "template"),
    "unknown tag": (b"{% frobnicate %}", "template"),
    "unknown filter": (b"{{ messages | frobnicate }}", "template"),
    "raises": (b"{{ raise_exception('no') }}", "no"),
    "escape": (b"{{ ''.__class__.__mro__[1].__subclasses__() }}", "template"),
    "divides": (b"{{ 1 // 0 }}", "template"),
    "missing key": (b"{{ messages[9].content.x }}", "template"),
    "no messages": (b"fixed text", "template"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "UTF-8"),
}


def settings_cases() -> Iterator[Case]:
    for label, (text, line, says) in YAML.items():
        yield Case("yaml", label, "job.yaml", text.encode("utf-8"), "usage", line, says)
    chinese = "model: m\nsystem: 你是医生\nepochs: 1\n"
    yield Case("yaml", "GBK", "job.yaml", chinese.encode("gbk"), "usage", 2, "not UTF-8")
    yield Case("yaml", "UTF-16", "job.yaml", chinese.encode("utf-16"), "usage", 1, "not UTF-8")
    yield Case("yaml", "noise", "job.yaml", b"\x00\x01\x02" * 50, "usage", 1, "U+0000")
    yield Case("yaml", "too large", "job.yaml", b"a: 1\n" * 60_000, "usage", None, "at most")
    many = "".join(f"key{i}: 1\n" for i in range(3000)).encode()
    yield Case("yaml", "3,000 unknown keys", "job.yaml", many, "usage", 50, "and 2950 more mistakes")


def registry_cases() -> Iterator[Case]:
    for label, (text, says) in REGISTRIES.items():
        yield Case("registry", label, "dataset_info.json", text.encode(), "refused", None, says)
    entry = json.dumps({"医": {"file_name": "d.json"}}, ensure_ascii=False)
    yield Case("registry", "GBK", "dataset_info.json", entry.encode("gbk"), "refused", None, "dataset_info.json")


def pack_cases() -> Iterator[Case]:
    for label, (text, line) in PACKS.items():
        yield Case("pack", label, "pack.yaml", text.encode(), "usage", line, "pack.yaml")
    yield Case("pack", "GBK", "pack.yaml", "name: 医\n".encode("gbk"), "usage", None, "pack.yaml")


def plan_cases() -> Iterator[Case]:
    for label, (text, line, says) in PLANS.items():
        yield Case("plan", label, "plan.yaml", text.encode(), "usage", line, says)


def template_cases() -> Iterator[Case]:
    for label, (content, says) in TEMPLATES.items():
        yield Case("template", label, "chat.jinja", content, "refused", None, says)
