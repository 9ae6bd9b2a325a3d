"""Defends: a win is one in both orders, a judge that prefers a place decides nothing, a failure is a bound and never a
tie; strengths follow from the counts alone; no question is asked twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from benchmarks.gedit.rows import edited_path, load_tasks
from benchmarks.geneval.images import image_path, write_metadata
from benchmarks.geneval.prompts import as_jsonl, official_records
from benchmarks.judge.asking import Asking
from benchmarks.judge.protocol import Question, Reply, fake_judge, prepare_images, read_rgb
from benchmarks.judge.wording import PREFERRED_EDIT, PREFERRED_IMAGE, load_pair_wording
from benchmarks.pairwise.card import WIN_RATE, read_pairwise, write_pairwise
from benchmarks.pairwise.cli import cli
from benchmarks.pairwise.contests import of_edits, of_prompts
from benchmarks.pairwise.davidson import ELO, fit, strengths
from benchmarks.pairwise.judging import judge_pairs
from benchmarks.pairwise.verdict import pairwise, read_judged
from benchmarks.scores.statistics import compare_paired
from data.errors import UserError, UserErrors
from tests.gedit_sets import png, row, settings, write_manifest
from tests.judge_server import judge_server

WORDING = load_pair_wording(None)
SETTINGS = settings(wording=WORDING)
BOOTSTRAP = {"seed": 0, "resamples": 200, "confidence": 0.95}
HOW = {"highest_lean": 0.1, "allow_partial": False, **BOOTSTRAP}
PAIR = ("candidate", "champion")
WORDS = {1.0: "A", 0.5: "tie", 0.0: "B"}
Ask = Callable[[Question, object], Reply]


def rows(count: int = 8) -> list[dict]:
    return [row(f"k{i}", f"play n{i}.", ("subject-add", "color_alter")[i % 2]) for i in range(count)]


def edits(tmp_path: Path, models=PAIR, entries=None) -> tuple[list, dict[str, Path]]:
    """A set of edits with a folder of images a model."""
    tasks = load_tasks(write_manifest(tmp_path / "set", entries or rows()), tmp_path / "sources")
    folders = {model: tmp_path / model for model in models}
    for model, folder in folders.items():
        for task in tasks:
            path = edited_path(folder, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(f"{model} {task.id}"))
    return tasks, folders


def judge(tmp_path: Path, tasks, folders, ask, out: str = "out", with_settings=SETTINGS, **changes):
    options = {"make_ask": lambda *_: ask, "concurrency": 3, "say": lambda text: None, **changes}
    contests = of_edits(tasks, folders, tmp_path / out)
    about = {"set": {"suite": "gedit", "digest": "x", "kind": "custom"}, "made_with": {name: {} for name in folders}}
    how = {"about": about, "settings": with_settings, "asking": Asking(**options)}
    return judge_pairs(contests, list(folders), tmp_path / out, **how)


def preferring(folders, tasks, prefer: Callable[[str, str, str], float]) -> tuple[Ask, list[Question]]:
    """A judge that knows the pictures: prefer(key, first model, second model) -> 1, 0.5 or 0 for the first shown."""
    names = {}
    for model, folder in folders.items():
        for task in tasks:
            (image,) = prepare_images(None, read_rgb(edited_path(folder, task)), SETTINGS)
            names[image] = (task.key, model)
    asked: list[Question] = []

    def ask(question: Question, turns: object) -> Reply:
        asked.append(question)
        (key, first), (_, second) = (names[image] for image in question.images[-2:])
        text = json.dumps({"winner": WORDS[prefer(key, first, second)], "reasoning": "so"})
        return Reply("ok", text, "m1", "stop", {"prompt_tokens": 10, "completion_tokens": 2})

    return ask, asked


def likes(model: str) -> Callable[[str, str, str], float]:
    return lambda key, first, second: 1.0 if first == model else 0.0 if second == model else 0.5


# --- orders and verdicts ----------------------------------------------------------------------------------------------


def test_a_model_wins_where_both_orders_say_so(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)

    def prefer(key: str, first: str, second: str) -> float:
        """k0 and k1 to the candidate, k2 to the champion, k3 a tie; k4 the first place, k5 the second; k6 only in one
        order to the candidate, k7 only in one to the champion."""
        place = {"k4": 1.0, "k5": 0.0, "k3": 0.5}
        if key in place:
            return place[key]
        if key in ("k6", "k7"):
            better = "candidate" if key == "k6" else "champion"
            return likes(better)(key, first, second) if first == "candidate" else 0.5
        return likes("candidate" if key in ("k0", "k1") else "champion")(key, first, second)

    ask, asked = preferring(folders, tasks, prefer)
    judge(tmp_path, tasks, folders, ask)
    assert len(asked) == 16 and {question.kind for question in asked} == {PREFERRED_EDIT}
    assert all(len(question.images) == 3 for question in asked)
    card = pairwise(read_judged(tmp_path / "out", WORDING), **HOW)
    found = card.against["champion"]
    values = {key.removeprefix("en-"): value for prompts in found.values.values() for key, value in prompts.items()}
    assert values == {"k0": 1.0, "k1": 1.0, "k2": 0.0, **dict.fromkeys(("k3", "k4", "k5", "k6", "k7"), 0.5)}
    assert (found.won, found.tied, found.lost, found.turned, found.lean) == (2 / 8, 5 / 8, 1 / 8, 4 / 8, 0.0)
    assert (found.coverage, found.statuses, found.bounds) == (1.0, {"ok": 8}, (9 / 16, 9 / 16))
    assert found.p == 1.0  # two against one
    metric = found.metrics[WIN_RATE]
    assert (metric.mean, metric.n) == (9 / 16, 8) and 0.0 <= metric.low <= metric.mean <= metric.high <= 1.0
    assert set(found.metrics) == {WIN_RATE, "pairwise/subject-add", "pairwise/color_alter"}
    assert card.candidate == "candidate" and card.identity["judge"]["answered_by"] == "m1"
    assert card.strengths["candidate"].elo - card.strengths["champion"].elo == pytest.approx(ELO * math.log(2.5 / 1.5))


def test_who_stands_first_changes_no_number(tmp_path: Path) -> None:
    """The other model as the candidate: the answers are the same ones, the win rate its complement."""
    tasks, folders = edits(tmp_path)
    ask, _ = preferring(folders, tasks, lambda key, *pair: 0.5 if key < "k3" else likes("candidate")(key, *pair))
    judge(tmp_path, tasks, folders, ask)
    swapped = dict(reversed(folders.items()))
    judge(tmp_path, tasks, swapped, ask, out="swapped")
    ours, theirs = (pairwise(read_judged(tmp_path / name, WORDING), **HOW) for name in ("out", "swapped"))
    one, other = ours.against["champion"], theirs.against["candidate"]
    assert one.metrics[WIN_RATE].mean == pytest.approx(1.0 - other.metrics[WIN_RATE].mean)
    assert (one.won, one.lost) == (other.lost, other.won) and one.won > 0.5
    keys = [{line.split('"key":"')[1][:64] for line in file.read_text().splitlines()} for file in shards(tmp_path)]
    assert keys[0] == keys[1] and len(keys[0]) == 16  # so one folder's answers could serve the other


def shards(tmp_path: Path) -> list[Path]:
    return [tmp_path / name / "shards" / "0-of-1.jsonl" for name in ("out", "swapped")]


@pytest.mark.parametrize(("place", "word"), [(1.0, "first"), (0.0, "second")])
def test_a_judge_that_prefers_a_place_decides_nothing(tmp_path: Path, place: float, word: str) -> None:
    tasks, folders = edits(tmp_path)
    judge(tmp_path, tasks, folders, preferring(folders, tasks, lambda *_: place)[0])
    judged = read_judged(tmp_path / "out", WORDING)
    with pytest.raises(UserErrors, match=f"candidate against champion: the judge leans 1.000 to the {word} place"):
        pairwise(judged, **HOW)
    found = pairwise(judged, **{**HOW, "highest_lean": 1.0}).against["champion"]
    assert (found.tied, found.turned, abs(found.lean)) == (1.0, 1.0, 1.0)


def test_equal_pictures_tie_and_nobody_is_asked(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)
    for task in tasks[:3]:
        edited_path(folders["candidate"], task).write_bytes(edited_path(folders["champion"], task).read_bytes())
    ask, asked = preferring(folders, tasks, likes("candidate"))
    judge(tmp_path, tasks, folders, ask)
    found = pairwise(read_judged(tmp_path / "out", WORDING), **HOW).against["champion"]
    assert len(asked) == 10 and (found.won, found.tied, found.coverage) == (5 / 8, 3 / 8, 1.0)


def test_a_failure_is_a_status_and_a_bound(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)
    edited_path(folders["champion"], tasks[1]).unlink()
    edited_path(folders["candidate"], tasks[3]).write_bytes(b"\x89PNG no more")
    good, _ = preferring(folders, tasks[:1] + tasks[2:3] + tasks[4:], likes("candidate"))

    def ask(question: Question, turns: object) -> Reply:
        if "n4." in question.text:
            return Reply("ok", "I'm sorry, but I can't assist with that.", "m1")
        return Reply("ok", "who knows", "m1") if "n6." in question.text and not turns else good(question, turns)

    judge(tmp_path, tasks, folders, ask)
    judged = read_judged(tmp_path / "out", WORDING)
    with pytest.raises(UserErrors, match=r"5 of 8 contests have a verdict .* would be 0\.625 or 1\.000"):
        pairwise(judged, **HOW)
    found = pairwise(judged, **{**HOW, "allow_partial": True}).against["champion"]
    assert found.statuses == {"bad_image": 1, "missing_image": 1, "ok": 5, "refused": 1}
    assert (found.coverage, found.metrics[WIN_RATE].mean, found.metrics[WIN_RATE].n) == (5 / 8, 1.0, 5)
    assert found.bounds == (0.625, 1.0) and sum(map(len, found.values.values())) == 5
    for task in tasks[1::2]:
        edited_path(folders["champion"], task).unlink(missing_ok=True)
    judge(tmp_path, tasks, folders, ask)
    with pytest.raises(UserErrors, match="color_alter: no contest has a verdict"):
        pairwise(read_judged(tmp_path / "out", WORDING), **{**HOW, "allow_partial": True})


def test_repeats_are_averaged(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)
    names = {}

    def prefer(key: str, first: str, second: str) -> float:
        names[key, first] = names.get((key, first), -1) + 1
        return likes("candidate")(key, first, second) if names[key, first] == 0 else 0.5

    three = settings(wording=WORDING, repeats=3)
    judge(tmp_path, tasks, folders, preferring(folders, tasks, prefer)[0], with_settings=three, concurrency=1)
    found = pairwise(read_judged(tmp_path / "out", WORDING), **HOW).against["champion"]
    assert all(value == pytest.approx(2 / 3) for prompts in found.values.values() for value in prompts.values())
    assert (found.won, found.tied) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_a_gate_can_compare_the_win_rate(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)
    judge(tmp_path, tasks, folders, preferring(folders, tasks, likes("candidate"))[0])
    card = pairwise(read_judged(tmp_path / "out", WORDING), **HOW)
    write_pairwise(tmp_path / "reports" / "pairwise.json", card)
    again = read_pairwise(tmp_path / "reports" / "pairwise.json")
    assert again == card
    ours, even = again.against["champion"].groups()
    assert list(ours) == list(even) and all(len(ours[name]) == len(even[name]) == 4 for name in ours)
    compared = compare_paired(ours, even, binary=False, **BOOTSTRAP)
    assert compared.difference == 0.5 and compared.n == 8
    (tmp_path / "reports" / "pairwise.json").write_text('{"candidate": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"pairwise\.json: not a card of pairwise judgements"):
        read_pairwise(tmp_path / "reports" / "pairwise.json")


# --- images of prompts ------------------------------------------------------------------------------------------------


def test_images_of_prompts_are_compared_without_a_source(tmp_path: Path) -> None:
    records = official_records()[:2] + official_records()[100:102]
    folders = {model: tmp_path / model for model in PAIR}
    for model, folder in folders.items():
        write_metadata(folder, records)
        for index in range(4):
            for k in range(2):
                path = folder / image_path(index, k)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(f"{model} {index} {k}"))
    (tmp_path / "prompts.jsonl").write_text(as_jsonl(records), encoding="utf-8")
    contests = of_prompts(records, folders, tmp_path / "out")
    assert [(one.example_id, one.k, one.kind) for one in contests[:3]] == [
        ("00000", 0, PREFERRED_IMAGE),
        ("00000", 1, PREFERRED_IMAGE),
        ("00001", 0, PREFERRED_IMAGE),
    ]
    words = ["--images", str(folders["candidate"]), "--against", str(folders["champion"]), "--judge", "fake"]
    words += ["--judge-model", "fake", "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    assert cli(["judge", *words]) == 0
    judged = read_judged(tmp_path / "out", WORDING)
    found = pairwise(judged, **{**HOW, "highest_lean": 1.0}).against["champion"]
    assert found.metrics[WIN_RATE].n == 4 and {name: len(rows) for name, rows in found.values.items()} == {
        "single_object": 2,
        "two_object": 2,
    }
    (folders["champion"] / image_path(0, 1)).unlink()
    with pytest.raises(UserErrors, match="00000 has 1"):
        of_prompts(records, folders, tmp_path / "out")


# --- strengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(500, 300, 400), (20, 5, 5), (7, 0, 0), (0, 9, 0), (0, 0, 0), (1, 2, 1)])
def test_two_models_have_a_closed_form(counts: tuple[int, int, int]) -> None:
    won, tied, lost = (count + 0.5 for count in counts)
    a, b, ties = fit(np.array([counts]), [(0, 1)], 2)
    assert a - b == pytest.approx(math.log(won / lost), abs=1e-9) and a + b == pytest.approx(0.0)
    assert ties == pytest.approx(math.log(tied / math.sqrt(won * lost)), abs=1e-9)


def expected_counts(truth: np.ndarray, ties: float, pairs, total: float) -> np.ndarray:
    table = []
    for a, b in pairs:
        weights = np.exp([truth[a], ties + (truth[a] + truth[b]) / 2, truth[b]])
        table.append(total * weights / weights.sum() - 0.5)  # what is added is taken off
    return np.array(table)


def test_known_strengths_are_found_whatever_the_order_of_the_models() -> None:
    truth, ties = np.array([0.7, -0.2, 0.1, -0.6]), -0.4
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    found = fit(expected_counts(truth, ties, pairs, 1000.0), pairs, 4)
    np.testing.assert_allclose(found, [*truth, ties], atol=1e-9)
    for order in permutations(range(4)):
        renamed = [(order[a], order[b]) for a, b in pairs]
        again = fit(expected_counts(truth, ties, pairs, 1000.0), renamed, 4)
        np.testing.assert_allclose(again[list(order)], truth, atol=1e-9)
    turned = [(b, a) for a, b in pairs]
    again = fit(expected_counts(truth, ties, pairs, 1000.0)[:, ::-1], turned, 4)
    np.testing.assert_allclose(again, found, atol=1e-9)


def test_the_fit_is_the_likelihood_s_maximum_and_a_circle_is_even() -> None:
    counts, pairs = np.array([[12.0, 3.0, 5.0], [2.0, 6.0, 9.0], [4.0, 4.0, 4.0]]), [(0, 1), (1, 2), (0, 2)]

    def loss(values: np.ndarray) -> float:
        truth, ties, total = np.array([0.0, *values[:2]]), values[2], 0.0
        for (a, b), observed in zip(pairs, counts + 0.5):
            logits = np.array([truth[a], ties + (truth[a] + truth[b]) / 2, truth[b]])
            total -= observed @ (logits - np.log(np.exp(logits).sum()))
        return total

    best = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    found = fit(counts, pairs, 3)
    np.testing.assert_allclose([*(found[1:3] - found[0]), found[3]], best, atol=1e-5)
    circle = fit(np.array([[9.0, 1.0, 2.0]] * 3), [(0, 1), (1, 2), (2, 0)], 3)
    np.testing.assert_allclose(circle[:3], 0.0, atol=1e-12)


def test_models_that_were_never_compared_have_no_strengths() -> None:
    with pytest.raises(UserError, match="never compared"):
        fit(np.ones((1, 3)), [(0, 1)], 3)
    chain = fit(np.array([[5.0, 1.0, 1.0], [5.0, 1.0, 1.0]]), [(0, 1), (1, 2)], 3)
    assert chain[0] > chain[1] > chain[2]


def test_intervals_of_strengths_are_of_prompts_and_repeat() -> None:
    rng = np.random.default_rng(0)
    ends = np.eye(3)[rng.choice(3, p=[0.5, 0.2, 0.3], size=(60, 3))]  # (prompts, pairs, 3)
    names, pairs = ["a", "b", "c"], [(0, 1), (0, 2), (1, 2)]
    found = strengths({"x": ends[:30], "y": ends[30:]}, pairs, names, **BOOTSTRAP)
    assert found == strengths({"x": ends[:30], "y": ends[30:]}, pairs, names, **BOOTSTRAP)
    assert all(one.low < one.elo < one.high for one in found.values())
    assert sum(one.elo for one in found.values()) == pytest.approx(0.0, abs=1e-9)
    twice = strengths({"x": np.repeat(ends, 4, axis=0)}, pairs, names, **BOOTSTRAP)
    assert twice["a"].high - twice["a"].low < 0.7 * (found["a"].high - found["a"].low)


def test_several_models_stand_in_one_order(tmp_path: Path) -> None:
    models = ("candidate", "champion", "base")
    tasks, folders = edits(tmp_path, models)
    ranks = {name: place for place, name in enumerate(models)}

    def prefer(key: str, first: str, second: str) -> float:
        return 0.5 if key == "k0" else float(ranks[first] < ranks[second])

    ask, asked = preferring(folders, tasks, prefer)
    judge(tmp_path, tasks, folders, ask)
    card = pairwise(read_judged(tmp_path / "out", WORDING), **HOW)
    assert len(asked) == 3 * 8 * 2 and list(card.against) == ["champion", "base"]
    elo = [card.strengths[name].elo for name in models]
    assert elo == sorted(elo, reverse=True) and elo[1] == pytest.approx(0.0, abs=1e-9)
    assert any(line.startswith("candidate against base: win rate 0.9") for line in card.lines())


# --- asking -----------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice_and_the_price_is_known_before(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)
    said: list[str] = []

    def never(*_: object):
        raise AssertionError("nothing may be asked")

    how = {"make_ask": never, "only_preview": True, "prices": (2.0, 8.0), "say": said.append}
    estimate = judge(tmp_path, tasks, folders, None, **how)
    assert (estimate.questions, estimate.answered, estimate.completion_tokens) == (16, 0, 16 * 80)
    assert not (tmp_path / "out").exists() and "16 questions to ask" in said[0]
    text = sum(math.ceil(len(WORDING.text(PREFERRED_EDIT, task.instruction)) / 4) for task in tasks)
    assert estimate.prompt_tokens == 2 * (text + 8 * 3 * 255)
    with pytest.raises(UserError, match="not within the highest price"):
        judge(tmp_path, tasks, folders, None, make_ask=never, prices=(2.0, 8.0), highest_price=1e-3)
    ask, asked = preferring(folders, tasks, likes("candidate"))
    judge(tmp_path, tasks, folders, ask, shard=(0, 2))
    assert len(asked) == 8
    with pytest.raises(UserErrors, match="8 questions have no answer yet"):
        read_judged(tmp_path / "out", WORDING)
    judge(tmp_path, tasks, folders, ask)
    judge(tmp_path, tasks, folders, ask)
    assert len(asked) == 16
    edited_path(folders["champion"], tasks[0]).write_bytes(png("new"))
    judge(tmp_path, tasks, folders, fake_judge())
    assert len(asked) == 16
    with pytest.raises(UserErrors, match=r"2 models answered: \{'fake': 2, 'm1': 14\}"):
        read_judged(tmp_path / "out", WORDING)


def test_judges_and_wordings_are_not_mixed(tmp_path: Path) -> None:
    tasks, folders = edits(tmp_path)
    ask, _ = preferring(folders, tasks, likes("candidate"))
    judge(tmp_path, tasks, folders, ask)
    with pytest.raises(UserErrors, match=r"judge\.temperature: the folder has 0\.0, this command 0\.5"):
        judge(tmp_path, tasks, folders, ask, with_settings=settings(wording=WORDING, temperature=0.5))
    with pytest.raises(UserErrors, match="models: the folder has"):
        judge(tmp_path, tasks, dict(reversed(folders.items())), ask)
    texts = tmp_path / "texts"
    texts.mkdir()
    with pytest.raises(UserErrors, match=r"(?s)preferred_edit\.txt: cannot be read.*preferred_image\.txt: cannot be"):
        load_pair_wording(texts)
    for kind in (PREFERRED_EDIT, PREFERRED_IMAGE):
        (texts / f"{kind}.txt").write_text("Which? <instruction>", encoding="utf-8")
    with pytest.raises(UserError, match="'own' wording, not with this 'custom' one"):
        read_judged(tmp_path / "out", load_pair_wording(texts))
    (texts / "preferred_image.txt").write_text("Which?", encoding="utf-8")
    with pytest.raises(UserErrors, match="has no <instruction>"):
        load_pair_wording(texts)


def test_the_command_line_asks_a_server_and_goes_on_where_it_stopped(tmp_path: Path, capsys) -> None:
    """k0 and k2 are won in both orders, k1 is a tie, k3 is called for the first place."""
    scripts = {
        "n0": ["first", "second"],
        "n1": ["tie"],
        "n2": ["fenced", "first", "second"],
        "n3": ["first"],
        "n4": ["second", "first"],
        "n5": ["tie"],
    }
    edits(tmp_path, entries=rows(6))
    with judge_server(scripts) as server:
        words = ["judge", "--custom-set", "--judge-model", "judge", "--base-url", server.url, "--key-variable", ""]
        words += ["--data", str(tmp_path / "set"), "--images", str(tmp_path / "candidate"), "--concurrency", "1"]
        words += ["--against", str(tmp_path / "champion"), "--out", str(tmp_path / "out"), "--json-schema"]
        assert cli([*words, "--preview"]) == 0 and not server.requests
        for _ in range(2):
            assert cli(words) == 0
            assert server.calls.total() == 13  # 12 questions, and one more reply that was no preference
    schema = server.requests[0]["response_format"]["json_schema"]
    assert schema["name"] == "preference" and schema["schema"]["properties"]["winner"]["enum"] == ["A", "B", "tie"]
    assert len(server.requests[0]["messages"][0]["content"]) == 4  # text, source, two results
    verdict = ["verdict", "--judgements", str(tmp_path / "out"), "--resamples", "200"]
    with pytest.raises(UserErrors, match=r"leans 0\.167 to the first place"):
        cli(verdict)
    for to in ("one.json", "two.json"):
        assert cli([*verdict, "--highest-lean", "0.2", "--to", str(tmp_path / to)]) == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    found = read_pairwise(tmp_path / "one.json").against["champion"]
    assert (found.won, found.tied, found.lost) == (pytest.approx(2 / 6), pytest.approx(3 / 6), pytest.approx(1 / 6))
    printed = capsys.readouterr().out
    assert "candidate against champion: win rate 0.583" in printed and "leans +0.167" in printed


def test_the_command_line_refuses_what_it_cannot_tell_apart(tmp_path: Path) -> None:
    edits(tmp_path, entries=rows(2))
    other = tmp_path / "other" / "candidate"
    base = ["judge", "--judge", "fake", "--judge-model", "fake", "--out", str(tmp_path / "o"), "--custom-set"]
    images = ["--images", str(tmp_path / "candidate"), "--against"]
    with pytest.raises(UserErrors, match="have one name"):
        cli([*base, *images, str(other), "--data", str(tmp_path / "set")])
    with pytest.raises(UserError, match="name one set"):
        cli([*base, *images, str(tmp_path / "champion")])
    with pytest.raises(UserError, match="no image at fullset"):
        cli([*base, *images, str(tmp_path / "nobody"), "--data", str(tmp_path / "set")])
    with pytest.raises(UserError, match="unknown step 'report'"):
        cli(["report"])
