"""A benchmark is a YAML file: where its files lie, their columns, the prompt around a question, its groups.

The comments of `benchmarks/ceval.yaml` explain the keys. A benchmark of one's own: `--task path/to/file.yaml`. A table
with the columns question, A, B, ... and answer needs no YAML: `--task path/to/file.csv`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import yaml

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.data.readers import read_table

MAX_BYTES = 1 << 20
Mode = Literal["letter", "text", "generate"]
"""What is scored after the question: the letter of an option, its whole text, or what the model answers freely."""
ASKED_FREELY = {
    "zh": ("请选出正确答案，并在最后一行写出：答案：X（X 是选项字母）。", "答案：{letter}"),
    "en": (
        "Choose the correct answer. End with the line: Answer: X, where X is its letter.",
        "Answer: {letter}",
    ),
}
"""By language: what is asked behind the options, and how a worked example answers."""
FOLDER = Path(__file__).parent.parent / "benchmarks"
TABLES = (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".parquet")
_TEXT, _LIST, _TABLE = (str, "a text"), (list, "a list"), (dict, "a mapping")
_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("name", "title", "layout", "shots_split", "shots_as", "folder"), _TEXT),
    **dict.fromkeys(("letters", "header", "scored_splits", "submission_splits", "hard"), _LIST),
    **dict.fromkeys(("prompts", "columns"), _TABLE),
    "version": (int, "a whole number"),
    "subjects": ((list, dict), "a list of names, or keys and values"),
}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The text of one question in one language."""

    intro: str
    """Before the first question; may hold {subject}."""
    question: str
    """Holds {question} and {choices}; ends where the letter is expected."""
    choice: str = "{letter}. {text}"
    """One line of {choices}."""
    text_question: str = ""
    """As `question`, where the options' texts are scored. Empty: `question` without its line of {choices}."""
    generate_question: str = ""
    """As `question`, where the answer is generated. Empty: `question` up to {choices}, and what is asked for."""
    generate_answer: str = ""
    """What a worked example then answers; holds {letter}."""
    delimiter: str = ""
    """Between the prompt and the answer where no chat template separates them."""

    def freely(self, lang: str) -> tuple[str, str]:
        """(the question's text, the answer of a worked example) where the answer is generated."""
        request, answer = ASKED_FREELY.get(lang, ASKED_FREELY["en"])
        question = self.question.split("{choices}")[0] + "{choices}\n\n" + request
        return self.generate_question or question, self.generate_answer or answer

    def template(self, mode: Mode) -> str:
        """The question's text with its places still open."""
        if mode == "letter":
            return self.question
        return self.text_question or self.question.replace("{choices}\n", "").replace("{choices}", "")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One file of questions. `titles` by language; the group it counts for."""

    name: str
    titles: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    hard: bool = False

    def title(self, lang: str) -> str:
        """The subject as the prompt names it."""
        return self.titles.get(lang) or self.name.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A multiple-choice benchmark."""

    name: str
    version: int
    title: str
    layout: str
    """Path of a file below the benchmark's folder, with {split} and {subject}."""
    prompts: Mapping[str, Prompt]
    """By language."""
    subjects: tuple[Subject, ...] = ()
    """Empty: every file that fits the layout is a subject."""
    letters: tuple[str, ...] = ("A", "B", "C", "D")
    columns: Mapping[str, str] = field(default_factory=dict)
    """role (id, question, answer, or a letter) -> column; a role that is not named has a column of its own name."""
    header: tuple[str, ...] = ()
    """Names of the columns of files that have no header line."""
    shots_split: str = "dev"
    """Empty: there are no worked examples."""
    scored_splits: tuple[str, ...] = ("val",)
    """Splits whose answers are known."""
    submission_splits: tuple[str, ...] = ()
    """Splits without answers: the chosen letters are written for the benchmark's server."""
    shots_as: Literal["turns", "prompt"] = "turns"
    """With a chat template: each worked example a user turn and an assistant turn, or all in one user turn."""
    folder: str | None = None
    """Default folder of the data, relative to the YAML file."""

    def column(self, role: str) -> str:
        """The column of a role."""
        return self.columns.get(role, role)

    @property
    def default_split(self) -> str:
        """What is scored unless another split is asked for."""
        return (*self.scored_splits, *self.submission_splits)[0]

    def prompt(self, lang: str | None) -> Prompt:
        """The prompt of a language; the first for None.

        Raises:
            UsageError: The benchmark has none in that language.
        """
        lang = lang or next(iter(self.prompts))
        if lang not in self.prompts:
            raise UsageError(f"--lang {lang}: {self.name} has prompts in {', '.join(self.prompts)}.")
        return self.prompts[lang]


def load_benchmark(name_or_path: str) -> Benchmark:
    """Read a built-in benchmark by name, a YAML file, or the questions of a table alone.

    Raises:
        UsageError: No such benchmark.
        UserError: The file is broken: it is named, with the field.
    """
    if name_or_path.endswith(TABLES):
        return table_benchmark(Path(name_or_path).expanduser())
    path, values = read_yaml(name_or_path)
    return _benchmark(path, values)


def read_yaml(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    """The file of a built-in benchmark, or the file that is named, and what is in it.

    Raises:
        UsageError: No such benchmark.
        UserError: It is not YAML of keys and values.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(
            f"--task {name_or_path}: no such benchmark.{hint} Known: {', '.join(known)}, a YAML file or a .csv."
        )
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes; the file of a benchmark has at most {MAX_BYTES}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, such as those of {FOLDER / 'ceval.yaml'}.")
    return path, values


def table_benchmark(path: Path) -> Benchmark:
    """A benchmark of the questions of one table: columns question, A, B, ... and answer; no worked examples.

    Raises:
        UsageError: There is no such file.
        UserError: A column is missing.
    """
    if not path.is_file():
        raise UsageError(f"--task {path}: there is no such file.")
    columns = read_table(path).columns
    count = next((place for place, letter in enumerate(ascii_uppercase) if letter not in columns), len(ascii_uppercase))
    missing = [name for name in ("question", "A", "B", "answer") if name not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; it has: {', '.join(columns)}. A table of multiple-choice "
            "questions has question, A, B (and C, D, ...) and answer, a letter; one of questions with reference "
            "answers has question and answer. Other names: write a YAML file."
        )
    prompts = {
        "zh": Prompt(intro="", question="{question}\n{choices}\n答案："),
        "en": Prompt(intro="", question="{question}\n{choices}\nAnswer:", delimiter=" "),
    }
    return Benchmark(
        name=path.stem,
        version=1,
        title=path.stem,
        layout="{subject}" + path.suffix,
        prompts=prompts,
        subjects=(Subject(name=path.stem),),
        letters=tuple(ascii_uppercase[:count]),
        shots_split="",
        scored_splits=("test",),
        folder=str(path.parent.resolve()),
    )


def _benchmark(path: Path, values: dict[str, Any]) -> Benchmark:
    values = {"name": path.stem, "version": 1, "title": path.stem, **values}
    _check_types(path, values)
    prompts = values.get("prompts")
    if not isinstance(prompts, dict) or not prompts:
        raise UserError(f"{path}, field prompts: one prompt by language is needed (zh or en), with intro and question.")
    values["prompts"] = {lang: build(Prompt, path, f"prompts.{lang}", value) for lang, value in prompts.items()}
    values["subjects"] = _subjects(path, values.pop("subjects", None) or {}, values.pop("hard", None) or [])
    for name in ("letters", "header", "scored_splits", "submission_splits"):
        if name in values:
            values[name] = tuple(str(item) for item in values[name])
    if values.get("folder"):
        values["folder"] = str((path.parent / values["folder"]).resolve())
    benchmark = build(Benchmark, path, "", values)
    _check(path, benchmark)
    return benchmark


def _check_types(path: Path, values: dict[str, Any]) -> None:
    for name, value in values.items():
        kind, words = _TYPES.get(str(name), (object, ""))
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{path}, field {name}: {words} is expected, not {value!r}.")
    for field_name in ("prompts", "subjects"):
        inner = values.get(field_name)
        for name, value in inner.items() if isinstance(inner, dict) else ():
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{path}, field {field_name}.{name}: keys and values are expected, not {value!r}.")
            for key, text in (value or {}).items():
                if not isinstance(text, str):
                    raise UserError(f"{path}, field {field_name}.{name}.{key}: a text is expected, not {text!r}.")


def _subjects(path: Path, subjects: Any, hard: list[str]) -> tuple[Subject, ...]:
    if isinstance(subjects, list):
        subjects = {str(name): {} for name in subjects}
    unknown = [name for name in hard if name not in subjects]
    if unknown:
        raise UserError(f"{path}, field hard: {', '.join(unknown)} is no subject of the file.")
    found = []
    for name, value in subjects.items():
        value = dict(value or {})
        group = value.pop("group", None)
        found.append(Subject(name=name, titles=value, group=group, hard=name in hard))
    return tuple(found)


def build(kind: Any, path: Path, where: str, values: Any) -> Any:
    """A dataclass from a mapping; unknown and missing keys are named."""
    if not isinstance(values, dict):
        raise UserError(f"{path}, field {where}: keys and values are expected, not {values!r}.")
    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
            raise UserError(f"{path}, field {f'{where}.{key}'.lstrip('.')}: unknown.{hint}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{path}, {where or 'top level'}: {str(error).split(')', 1)[-1].strip()}.") from error


def _check(path: Path, benchmark: Benchmark) -> None:
    if benchmark.layout.count("{subject}") != 1:
        raise UserError(f"{path}, field layout: {benchmark.layout} must hold {{subject}} once.")
    if len(benchmark.letters) < 2:
        raise UserError(f"{path}, field letters: at least two choices are needed.")
    if benchmark.shots_as not in ("turns", "prompt"):
        raise UserError(f"{path}, field shots_as: turns or prompt, not {benchmark.shots_as}.")
    if not benchmark.scored_splits and not benchmark.submission_splits:
        raise UserError(f"{path}, field scored_splits: at least one split is needed.")
    missing = [role for role in ("question", *benchmark.letters) if benchmark.column(role) not in benchmark.header]
    if benchmark.header and missing:
        raise UserError(f"{path}, field header: no column for {', '.join(missing)}.")
    for lang, prompt in benchmark.prompts.items():
        for mark in ("{question}", "{choices}"):
            if mark not in prompt.question:
                raise UserError(f"{path}, field prompts.{lang}.question: {mark} is missing.")
        if "{question}" not in prompt.template("text"):
            raise UserError(f"{path}, field prompts.{lang}.text_question: {{question}} is missing.")
        if "{letter}" not in prompt.freely(lang)[1]:
            raise UserError(f"{path}, field prompts.{lang}.generate_answer: {{letter}} is missing.")


def select_subjects(benchmark: Benchmark, folder: Path, split: str, wanted: str | None) -> tuple[Subject, ...]:
    """The subjects to score: all, or those named by commas.

    Raises:
        UsageError: An unknown subject, with the nearest known one.
        UserError: The folder holds no file of the benchmark's layout.
    """
    subjects = benchmark.subjects or _discover(benchmark, folder, split)
    if not wanted:
        return subjects
    by_name = {subject.name: subject for subject in subjects}
    chosen: dict[str, Subject] = {}
    for name in (part.strip() for part in wanted.split(",")):
        if name and name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(by_name)}."
            raise UsageError(f"--subjects {name}: {benchmark.name} has no such subject. {hint}")
        if name:
            chosen[name] = by_name[name]
    if not chosen:
        raise UsageError(f"--subjects {wanted!r} names none.")
    return tuple(chosen.values())


def _discover(benchmark: Benchmark, folder: Path, split: str) -> tuple[Subject, ...]:
    layout = benchmark.layout.replace("{split}", split)
    before, after = layout.split("{subject}", 1)
    names = []
    for path in sorted(folder.glob(layout.replace("{subject}", "*"))):
        relative = path.relative_to(folder).as_posix()
        names.append(relative[len(before) : len(relative) - len(after)])
    if not names:
        raise UserError(
            f"{folder} holds no {layout.replace('{subject}', 'SUBJECT')}. Give --task_dir the folder above."
        )
    return tuple(Subject(name=name) for name in names)
