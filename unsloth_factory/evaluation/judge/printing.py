"""A judgement, or people's ratings, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.evaluation.tables import delta_table


def print_judgement(report: EvalReport, console: Console) -> None:
    """Scores by dimension, wins, ratings, and how far the judge can be trusted."""
    console.print(f"judged by {report.model['judge']}: {report.n:,} questions", highlight=False, markup=False)
    if any(metric.n for values in report.metrics.values() for metric in values.values()):
        console.print(f"scores from 1 to 5 ({report.settings['scale']})", highlight=False, soft_wrap=True)
        console.print(delta_table(report))
    for line in judgement_lines(report.details["pairs"], report.details["ratings"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def judgement_lines(pairs: Sequence[Mapping[str, Any]], ratings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Wins of each pair, and the ratings, best first."""
    for pair in pairs:
        yield win_line(pair)
        if pair.get("orders_disagree") is not None:
            line = f"  the order of showing changed {pair['orders_disagree']:.0%} of its verdicts"
            preferred = pair["first_shown_preferred"]
            yield line + (f"; the first shown won {preferred:.0%} of the decided ones" if preferred is not None else "")
    for variant, rating in sorted(ratings.items(), key=lambda item: -item[1]["value"]):
        low, high = rating["interval"]
        yield f"rating {variant}: {rating['value']:.0f}, 95 % interval [{low:.0f}, {high:.0f}]"


def win_line(pair: Mapping[str, Any]) -> str:
    """One pair in words."""
    if not pair["n"]:
        return f"{pair['of']} against {pair['against']}: no question has a verdict"
    low, high = pair["interval"]
    line = f"{pair['of']} against {pair['against']}: win rate {pair['win_rate']:.1%} [{low:.1%}, {high:.1%}], "
    line += f"{pair['wins']} wins, {pair['ties']} ties, {pair['losses']} losses, p = {pair['p_value']:.3g}: "
    return (
        line
        + str(pair["verdict"])
        + (f" ({pair['without_verdict']} without a verdict)" if pair.get("without_verdict") else "")
    )
