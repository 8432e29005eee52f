"""Statistics against numbers worked out by hand or taken from the literature."""

import math

import pytest

from unsloth_factory.scoring import (
    compare_proportions,
    macro_standard_error,
    mcnemar,
    perplexity,
    standard_error,
    wilson_interval,
)


def test_standard_error() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 7) == 0.0
    assert macro_standard_error([0.03, 0.04]) == pytest.approx(0.025)  # sqrt(0.0009 + 0.0016) / 2
    for p, n in ((1.2, 5), (0.5, 0)):
        with pytest.raises(ValueError, match="a share from 0 to 1"):
            standard_error(p, n)
    with pytest.raises(ValueError, match="no subjects"):
        macro_standard_error([])


def test_wilson_interval() -> None:
    # Newcombe 1998, Stat. Med. 17:857-872, table I: 81/263 and 15/148, 0/20, 1/29.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson_interval(3, 2)


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == pytest.approx(0.0625)  # 2 / 2^5
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)  # 2 (1 + 10) / 2^10
    assert mcnemar(9, 1) == mcnemar(1, 9)
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)


def test_mcnemar_is_continuous_where_it_becomes_approximate() -> None:
    assert mcnemar(950, 1051) == pytest.approx(mcnemar(950, 1050), rel=0.08)


def answers(both: int, only_base: int, only_tuned: int, neither: int) -> tuple[list[bool], list[bool]]:
    base = [True] * (both + only_base) + [False] * (only_tuned + neither)
    tuned = [True] * both + [False] * only_base + [True] * only_tuned + [False] * neither
    return base, tuned


def test_comparison_by_hand() -> None:
    found = compare_proportions(*answers(both=40, only_base=5, only_tuned=25, neither=30))
    assert (found.count, found.base, found.tuned) == (100, 0.45, 0.65)
    assert found.difference == pytest.approx(0.2)
    # sqrt((5 + 25) / 100 - 0.2²) / sqrt(100) = sqrt(0.26) / 10
    assert found.standard_error == pytest.approx(math.sqrt(0.26) / 10)
    assert (found.only_base_right, found.only_tuned_right) == (5, 25)
    assert found.p_value == pytest.approx(mcnemar(5, 25))
    assert found.verdict == "improved"


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((40, 25, 5, 30), "worse"),
        ((40, 10, 12, 38), "no significant difference"),
        ((100, 0, 0, 0), "no significant difference"),
        ((0, 0, 5, 0), "no significant difference"),  # five questions cannot prove it: p = 0.0625
        ((0, 0, 6, 0), "improved"),
    ],
)
def test_verdicts(counts: tuple[int, int, int, int], verdict: str) -> None:
    assert compare_proportions(*answers(*counts)).verdict == verdict


def test_comparison_refuses_unequal_or_no_answers() -> None:
    for base, tuned in (([], []), ([True], [])):
        with pytest.raises(ValueError, match="same questions"):
            compare_proportions(base, tuned)


def test_perplexity() -> None:
    assert perplexity(2 * math.log(4), 2) == pytest.approx(4)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="at least 1"):
        perplexity(1.0, 0)
