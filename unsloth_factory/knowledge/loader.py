"""Read a domain pack from YAML and check all of it, so that a typo is an error and not a rule that never fires."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unsloth_factory.knowledge.pack import (
    SEVERITIES,
    Association,
    DomainPack,
    Example,
    PackError,
    Relation,
    SafetyRule,
    Severity,
    Term,
)

MAX_BYTES = 1 << 22
PACKS = Path(__file__).parent / "packs"
SECTIONS = ("name", "title", "language", "system_prompt", "terms", "relations", "associations", "rules")
OPTIONAL_SECTIONS = ("protected_words",)
IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")


def available_packs() -> list[str]:
    """Names of the packs that come with the package, sorted."""
    return sorted(path.stem for path in PACKS.glob("*.yaml"))


def load_pack(name_or_path: str | Path) -> DomainPack:
    """Load a built-in pack by its name (`medical`) or any pack by the path of its YAML file.

    Raises:
        PackError: There is no such pack, or its file is wrong; the message names file, section, entry and field.
    """
    path = _find(str(name_or_path))
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise PackError(f"{path}: {path.stat().st_size} bytes; a pack has at most {MAX_BYTES}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PackError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error
    except OSError as error:
        raise PackError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_pack(text, str(path))


def parse_pack(text: str, file: str) -> DomainPack:
    """Parse and check the YAML text of one pack; `file` is its name in messages.

    Raises:
        PackError: As `load_pack`.
    """
    at = Place(file)
    root = _read_yaml(text, at)
    _check_keys(root, SECTIONS, OPTIONAL_SECTIONS, at)
    relations = _relations(root["relations"], at.inside("relations"))
    pack = DomainPack(
        name=_text(root, "name", at),
        title=_text(root, "title", at),
        language=_text(root, "language", at),
        system_prompt=_text(root, "system_prompt", at),
        terms=tuple(_term(entry, place) for entry, place in _entries(root, "terms", at)),
        relations=relations,
        associations=tuple(_association(e, relations, place) for e, place in _entries(root, "associations", at)),
        rules=tuple(_rule(entry, place) for entry, place in _entries(root, "rules", at)),
        protected_words=_texts(root, "protected_words", at),
    )
    _check_terms(pack, at.inside("terms"))
    _check_unique((rule.id for rule in pack.rules), "id", at.inside("rules"))
    for word in pack.protected_words:
        _check_length(word, "protected_words", at)
    pairs = (f"{a.condition} / {a.relation}" for a in pack.associations)
    _check_unique(pairs, "condition / relation", at.inside("associations"))
    return pack


@dataclass(frozen=True)
class Place:
    """Where in the file we are: file, section, entry."""

    file: str
    section: str = ""
    entry: str = ""

    def inside(self, section: str, entry: str = "") -> Place:
        """The same file, one level deeper."""
        return Place(self.file, section, entry)

    def error(self, message: str) -> PackError:
        """A PackError that starts with this place."""
        parts = [self.file, self.section and f"section {self.section}", self.entry and f"entry {self.entry}"]
        return PackError(": ".join([", ".join(part for part in parts if part), message]))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _find(name: str) -> Path:
    if name in available_packs():
        return PACKS / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix.lower() in (".yaml", ".yml") or len(path.parts) > 1:
        raise PackError(
            f"{name}: no such file. Give the path of a pack's YAML file or one of {_list(available_packs())}."
        )
    raise PackError(
        f"unknown domain pack {name!r}{_did_you_mean(name, available_packs())}. "
        f"Built in: {_list(available_packs())}; or give the path of your own YAML file."
    )


def _read_yaml(text: str, at: Place) -> Mapping[str, Any]:
    try:
        # The loader is a SafeLoader: no tag can make an object.
        root = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise at.error(f"{line}{error.problem or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, 5,000 digits
        raise at.error(str(error)) from error
    except RecursionError:
        raise at.error("nested too deeply") from None
    if not isinstance(root, dict):
        raise at.error(f"must be a mapping with the sections {_list(SECTIONS)}")
    return root


def _term(entry: Mapping[str, Any], at: Place) -> Term:
    _check_keys(entry, ("canonical",), ("variants", "english"), at)
    term = Term(
        canonical=_text(entry, "canonical", at),
        variants=_texts(entry, "variants", at),
        english=_text(entry, "english", at) if "english" in entry else "",
    )
    for word in (term.canonical, *term.variants):
        _check_length(word, "variants", at)
    return term


def _relations(value: object, at: Place) -> tuple[Relation, ...]:
    if not isinstance(value, dict) or not value:
        raise at.error("must map each relation's name to the words with which questions ask for it")
    for name in value:
        _check_identifier(name, "name", at)
    return tuple(Relation(name, _texts(value, name, at, at_least=1)) for name in value)


def _association(entry: Mapping[str, Any], relations: Sequence[Relation], at: Place) -> Association:
    _check_keys(entry, ("condition", "relation", "expects"), (), at)
    relation = _text(entry, "relation", at)
    names = [known.name for known in relations]
    if relation not in names:
        raise at.error(
            f"field relation: {relation!r} is not in section relations{_did_you_mean(relation, names)}. "
            f"Allowed: {_list(names)}"
        )
    accepts = tuple(
        tuple(wording.strip() for wording in word.split("|")) for word in _texts(entry, "expects", at, at_least=1)
    )
    if not all(wording for words in accepts for wording in words):
        raise at.error("field expects: an empty wording beside '|'")
    condition = _check_length(_text(entry, "condition", at), "condition", at)
    return Association(condition, relation, tuple(words[0] for words in accepts), accepts)


def _rule(entry: Mapping[str, Any], at: Place) -> SafetyRule:
    required = ("id", "severity", "description", "violates", "allows")
    _check_keys(entry, required, ("forbid", "require", "when", "unless"), at)
    rule = SafetyRule(
        id=_check_identifier(_text(entry, "id", at), "id", at),
        severity=_severity(entry, at),
        description=_text(entry, "description", at),
        forbid=_patterns(entry, "forbid", at),
        require=_patterns(entry, "require", at),
        when=_patterns(entry, "when", at),
        unless=_patterns(entry, "unless", at),
        violates=_examples(entry, "violates", at),
        allows=_examples(entry, "allows", at),
    )
    if bool(rule.forbid) == bool(rule.require):
        raise at.error("give exactly one of the fields forbid and require")
    if rule.require and not rule.when:
        raise at.error("field when: missing; a require rule says what the answer must speak of for it to apply")
    return rule


def _severity(entry: Mapping[str, Any], at: Place) -> Severity:
    value = _text(entry, "severity", at)
    for severity in SEVERITIES:
        if value == severity:
            return severity
    raise at.error(f"field severity: {value!r}{_did_you_mean(value, SEVERITIES)}. Allowed: {_list(SEVERITIES)}")


def _patterns(entry: Mapping[str, Any], field: str, at: Place) -> tuple[str, ...]:
    patterns = _texts(entry, field, at)
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise at.error(f"field {field}: bad regular expression {pattern!r}: {error}") from error
        if compiled.match(""):
            raise at.error(f"field {field}: {pattern!r} matches the empty text, so it would match everywhere")
    return patterns


def _examples(entry: Mapping[str, Any], field: str, at: Place) -> tuple[Example, ...]:
    values = entry[field]
    if not isinstance(values, list) or not values:
        raise at.error(f"field {field}: must be a list of at least one example answer")
    examples = []
    for value in values:
        if isinstance(value, dict):
            _check_keys(value, ("answer", "question"), (), at)
            examples.append(Example(_text(value, "answer", at), _text(value, "question", at)))
        else:
            examples.append(Example(_text({field: value}, field, at)))
    return tuple(examples)


def _entries(root: Mapping[str, Any], section: str, at: Place) -> list[tuple[Mapping[str, Any], Place]]:
    values = root[section]
    if not isinstance(values, list):
        raise at.inside(section).error(f"must be a list, is {type(values).__name__}")
    entries: list[tuple[Mapping[str, Any], Place]] = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise at.inside(section, str(number)).error(f"must be a mapping, is {value!r}")
        name = next((value[key] for key in ("id", "canonical", "condition") if value.get(key)), "")
        entries.append((value, at.inside(section, f"{number} ({name})" if name else str(number))))
    return entries


def _check_keys(entry: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], at: Place) -> None:
    allowed = [*required, *optional]
    for key in entry:
        if key not in allowed:
            raise at.error(f"unknown field {key!r}{_did_you_mean(str(key), allowed)}. Allowed: {_list(allowed)}")
    for key in required:
        if key not in entry:
            raise at.error(f"field {key}: missing. Required: {_list(required)}")


def _text(entry: Mapping[str, Any], field: str, at: Place) -> str:
    value = entry[field]
    if not isinstance(value, str) or not value.strip():
        hint = " (put it in quotes)" if isinstance(value, (int, float, bool)) else ""
        raise at.error(f"field {field}: must be text, is {value!r}{hint}")
    return value.strip()


def _texts(entry: Mapping[str, Any], field: str, at: Place, at_least: int = 0) -> tuple[str, ...]:
    values = entry.get(field, [])
    if not isinstance(values, list):
        raise at.error(f"field {field}: must be a list, is {values!r}")
    if len(values) < at_least:
        raise at.error(f"field {field}: must hold at least {at_least}")
    texts = tuple(_text({field: value}, field, at) for value in values)
    _check_unique(texts, field, at)
    return texts


def _check_identifier(value: object, field: str, at: Place) -> str:
    if not isinstance(value, str) or not IDENTIFIER.fullmatch(value):
        raise at.error(f"field {field}: {value!r} must be lower-case letters, digits and underscores")
    return value


def _check_length(word: str, field: str, at: Place) -> str:
    if len(word) < 2:
        raise at.error(f"field {field}: {word!r} is one character; at least 2, or it would be found everywhere")
    return word


def _check_unique(values: Iterable[str], field: str, at: Place) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise at.error(f"field {field}: {value!r} is given twice")
        seen.add(value)


def _check_terms(pack: DomainPack, at: Place) -> None:
    """Each wording may lead to one term only; otherwise the replacement would depend on the order in the file."""
    owner: dict[str, str] = {}
    for term in pack.terms:
        for word in (term.canonical, *term.variants):
            if word.lower() in owner:
                raise at.error(f"{word!r} belongs to {owner[word.lower()]!r} and to {term.canonical!r}; keep it in one")
            owner[word.lower()] = term.canonical


def _did_you_mean(value: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
