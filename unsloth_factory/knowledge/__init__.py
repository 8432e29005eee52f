"""Domain packs: the system prompt, terms, associations and safety rules of one field, each in one YAML file."""

from unsloth_factory.knowledge.loader import available_packs, load_pack
from unsloth_factory.knowledge.normalizer import TermNormalizer
from unsloth_factory.knowledge.pack import (
    Association,
    DomainPack,
    Example,
    PackError,
    Relation,
    SafetyRule,
    Term,
)

__all__ = [
    "Association",
    "DomainPack",
    "Example",
    "PackError",
    "Relation",
    "SafetyRule",
    "Term",
    "TermNormalizer",
    "available_packs",
    "load_pack",
]
