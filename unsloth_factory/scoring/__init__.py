"""Pure functions from answers (and references) to numbers; used by validation, benchmarks and training rewards."""

from unsloth_factory.scoring.answers import (
    LengthStats,
    Repetition,
    control_token_leak,
    exact_match,
    length_stats,
    normalize_answer,
    repetition_loop,
    stopped_rate,
)
from unsloth_factory.scoring.coverage import Coverage, asked_associations, association_coverage, term_coverage
from unsloth_factory.scoring.rules import Violation, failed_examples, rule_violations
from unsloth_factory.scoring.significance import (
    Comparison,
    compare_proportions,
    macro_standard_error,
    mcnemar,
    perplexity,
    standard_error,
    wilson_interval,
)

__all__ = [
    "Comparison",
    "Coverage",
    "LengthStats",
    "Repetition",
    "Violation",
    "asked_associations",
    "association_coverage",
    "compare_proportions",
    "control_token_leak",
    "exact_match",
    "failed_examples",
    "length_stats",
    "macro_standard_error",
    "mcnemar",
    "normalize_answer",
    "perplexity",
    "repetition_loop",
    "rule_violations",
    "standard_error",
    "stopped_rate",
    "term_coverage",
    "wilson_interval",
]
