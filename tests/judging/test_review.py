"""Blind review: the sheet hides who is who, and the ratings come back un-blinded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest

from unsloth_factory.commands import validate as command
from unsloth_factory.config.commands import ValidateConfig
from unsloth_factory.config.errors import UserError
from unsloth_factory.config.judging import ReviewSettings
from unsloth_factory.evaluation.judge.prompts import Case
from unsloth_factory.evaluation.validation.review import make_sheet, read_ratings, review_result
from unsloth_factory.run.atomic import write_json, write_text

N = 40


def cases() -> list[Case]:
    """Answers that do not say whose they are: odd numbers are the first model's."""
    found = [
        Case(f"d:{n}", f"question {n}?", f"reference {n}", {"base": f"text {2 * n + 1}", "tuned": f"text {2 * n}"})
        for n in range(N)
    ]
    found.append(Case("d:same", "same?", "", {"base": "alike", "tuned": " alike\n"}))
    return found


def sheet_of(page: str) -> dict:
    match = re.search(r'<script type="application/json" id="sheet">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def owner(text: str) -> str:
    return "base" if int(text.split()[1]) % 2 else "tuned"


def ratings_for(page: str, path, choose, rater="Li"):
    """What the sheet would save; choose(item) gives the choice."""
    sheet = sheet_of(page)
    entries = [{"item": item["id"], "choice": choose(item), "seconds": 1.0} for item in sheet["items"]]
    entries = [entry for entry in entries if entry["choice"]]
    return write_json(path, {"sheet": sheet["id"], "rater": rater, "made": "", "ratings": entries})


def the_better(name: str):
    return lambda item: "left" if owner(item["left"]) == name else "right"


def test_the_page_does_not_say_who_is_who():
    key, page = make_sheet(cases(), "a secret that nobody knows")
    assert not re.search(r"base|tuned|secret that|d:\d", page, re.IGNORECASE)
    items = sheet_of(page)["items"]
    assert len(items) == N
    assert key.same_text == 1
    sides = [owner(item["left"]) for item in items]
    assert 8 <= sides.count("base") <= N - 8  # not always on one side
    assert [key.left[item["id"]] for item in items] == sides
    assert [item["question"] for item in items] != [case.question for case in cases()[:N]]  # nor in the old order
    assert all(cases()[key.rows[item["id"]]].question == item["question"] for item in items)
    assert "http" not in page.replace("http-equiv", "")  # nothing to fetch


def test_the_order_follows_from_the_secret_alone():
    first, again, other = (make_sheet(cases(), secret)[0] for secret in ("a", "a", "b"))
    assert first == again
    assert first.left != other.left
    assert first.sheet != other.sheet


def test_texts_stay_texts():
    attack = '</script><script>alert(1)</script><img src=x onerror="a">'
    _, page = make_sheet([Case("s", attack, "", {"base": attack, "tuned": "fine"})], "s")
    assert attack not in page
    assert "<img" not in page
    assert page.count("<script") == 2
    assert sheet_of(page)["items"][0]["question"] == attack


def test_ratings_are_unblinded(tmp_path):
    key, page = make_sheet(cases(), "s")
    path = ratings_for(page, tmp_path / "r.json", the_better("tuned"))
    result = review_result([read_ratings(path, key)], key, {})
    assert (result["of"], result["wins"], result["ties"], result["losses"]) == ("tuned", N, 1, 0)
    assert result["verdict"] == "better"
    assert result["agreement_with_judge"] is None
    always_left = ratings_for(page, tmp_path / "l.json", lambda item: "left")
    biased = review_result([read_ratings(always_left, key)], key, {})
    assert biased["left_preferred"] == 1.0
    assert biased["wins"] == list(key.left.values()).count("tuned")
    assert biased["verdict"].startswith("no difference")


def test_several_raters_and_the_judge(tmp_path):
    key, page = make_sheet(cases(), "s")

    def zhao(item):
        return the_better("base")(item) if int(item["id"]) <= 20 else "both_bad"

    files = [
        ratings_for(page, tmp_path / "1", the_better("tuned"), "Li"),
        ratings_for(page, tmp_path / "2", the_better("tuned"), "Wang"),
        ratings_for(page, tmp_path / "3", zhao, "Zhao"),
    ]
    judged = {row: "tuned" if row % 2 else "tie" for row in range(N)}
    result = review_result([read_ratings(path, key) for path in files], key, judged)
    assert result["wins"] == N  # two of three
    assert result["both_bad"] == 20
    pairs = {tuple(pair["raters"]): pair for pair in result["agreement_of_raters"]}
    assert pairs["Li", "Wang"]["same"] == 1.0
    assert pairs["Li", "Zhao"]["same"] == 0.0
    assert result["agreement_with_judge"] == {"n": N, "same": 0.5, "kappa": 0.0}
    two = review_result([read_ratings(files[0], key), read_ratings(files[2], key)], key, {})
    assert (two["wins"], two["ties"]) == (20, 21)  # one against one is a tie; a preference beats a tie


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"sheet": "other"}, "ratings of sheet other"),
        (lambda v: v | {"ratings": []}, "nothing is rated"),
        (lambda v: v | {"ratings": [{"item": "99", "choice": "left"}]}, "item 99 is not of this sheet"),
        (lambda v: v | {"ratings": [{"item": "1", "choice": "A"}]}, "item 1 is not of this sheet"),
        (lambda v: v | {"ratings": [{"item": "1", "choice": "left"}] * 2}, "item twice"),
        (lambda v: v | {"ratings": "x"}, "not a file that a sheet saves"),
        (lambda v: [], "not a file that a sheet saves"),
    ],
)
def test_files_that_are_no_ratings(tmp_path, change, message):
    key, page = make_sheet(cases(), "s")
    path = ratings_for(page, tmp_path / "r.json", lambda item: "same")
    write_json(path, change(json.loads(path.read_text(encoding="utf-8"))))
    with pytest.raises(UserError, match=message):
        read_ratings(path, key)


def test_the_command_writes_the_sheet_and_reads_it_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_source", lambda *_: pytest.fail("loaded"))
    records = [
        {"source": case.source, "question": case.question, "reference": case.reference}
        | {name: {"answer": text} for name, text in case.answers.items()}
        for case in cases()
    ]
    write_json(tmp_path / "validation.json", {"metrics": {"base": {}, "tuned": {}}})
    write_text(tmp_path / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    verdict = {"pairs": [{"first": "base", "second": "tuned", "winner": "tuned"}]}
    judged = [{"source": r["source"], "question": r["question"], **verdict} for r in reversed(records[10:])]
    write_text(tmp_path / "judge_samples.jsonl", "".join(json.dumps(record) + "\n" for record in judged))

    def run(**options) -> str:
        assert command.run(ValidateConfig(save_dir=str(tmp_path), reviewing=ReviewSettings(**options))) == 0
        return " ".join(capsys.readouterr().out.split())

    with pytest.raises(UserError, match=r"review_key.json is missing"):
        run(ratings=str(tmp_path / "r.json"))
    assert f"{N} questions (1 more got the same answer from both)" in run(review=True)
    page = (tmp_path / "review.html").read_text(encoding="utf-8")
    run(review=True)
    assert page == (tmp_path / "review.html").read_text(encoding="utf-8")  # ratings under way stay valid
    path = ratings_for(page, tmp_path / "r.json", lambda i: the_better("tuned")(i) if int(i["id"]) > 4 else None)
    printed = run(ratings=str(path))
    assert "tuned against base: win rate 98.6%" in printed
    assert "4 questions are not rated yet" in printed
    result = json.loads((tmp_path / "review.json").read_text(encoding="utf-8"))
    assert result["wins"] == 36
    both = sum(int(row) >= 10 for row in result["verdicts"])  # the judge left the first ten out
    assert 26 <= both <= 30
    assert result["agreement_with_judge"] == {"n": both, "same": 1.0, "kappa": 1.0}
    assert f"the judge agrees on 100% of {both}" in printed
    (tmp_path / "review_key.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        run(ratings=str(path))


def test_nothing_to_review():
    with pytest.raises(UserError, match="the same answer to all"):
        make_sheet(cases()[-1:], "s")
    with pytest.raises(UserError, match=r"answers of tuned alone"):
        make_sheet([Case("s", "q", "", {"tuned": "a"})], "s")
    key, _ = make_sheet([Case("s", "q", "", {"f16": "a", "q8_0": "b", "q4_k_m": "c"})], "s")
    assert key.variants == ("f16", "q4_k_m")


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_script_has_no_syntax_error(tmp_path):
    _, page = make_sheet(cases(), "s")
    script = page.split("<script>")[1].split("</script>")[0]
    path = write_text(tmp_path / "page.js", script)
    assert subprocess.run(["node", "--check", str(path)], capture_output=True, check=False).returncode == 0


DRIVE = """<script>
const key = k => document.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
let saved = ""; HTMLAnchorElement.prototype.click = function () { saved = this.href.split(",").slice(1).join(","); };
(async () => {
  const pause = ms => new Promise(r => setTimeout(r, ms));
  key("1"); await pause(60);
  for (const k of "1234") { key(k); await pause(200); }
  key("s");
  document.body.insertAdjacentHTML("beforeend", `<p id="saved">${saved}</p>`);
})();
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium shows the page")
def test_the_page_is_rated_with_keys_and_saves_what_is_read_back(tmp_path):
    key, page = make_sheet(cases(), "s")
    path = write_text(tmp_path / "review.html", page.replace("</body>", DRIVE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *flags, "--virtual-time-budget=4000", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    match = re.search(r'id="saved">([^<]*)<', shown.split("</script>")[-1])
    assert match
    write_text(tmp_path / "r.json", unquote(match[1]))
    ratings = read_ratings(tmp_path / "r.json", key)
    # the first 1 is struck twice within the pause: the item is rated once and none is passed over
    assert ratings.choices == {"1": "left", "2": "right", "3": "same", "4": "both_bad"}
