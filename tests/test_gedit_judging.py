"""Defends: judgements say what was judged and nothing more: failures are bounds, no question is asked twice, a killed
run ends as an unbroken one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.gedit.cli import cli
from benchmarks.gedit.judging import Asking, MadeEdit, judge_folder
from benchmarks.gedit.price import patch_tokens, preview, tile_tokens
from benchmarks.gedit.questions import jobs_of, plan
from benchmarks.gedit.report import notes_of
from benchmarks.gedit.rows import edited_path, load_tasks
from benchmarks.gedit.rules import Sample, aggregate, overall
from benchmarks.gedit.verdict import (
    answered_by,
    column_scorecard,
    columns,
    drift,
    freeze_anchors,
    read_judgements,
    repeat_noise,
    rows_of,
    score_made,
    summary,
)
from benchmarks.judge.access import Access
from benchmarks.judge.endpoint import Endpoint
from benchmarks.judge.protocol import Reply, fake_judge, prepare_images, read_rgb
from benchmarks.judge.wording import load_wording
from benchmarks.scores.scorecard import read_scorecard, read_scores
from data.errors import UserError, UserErrors
from data.records import GEDIT_CATEGORIES
from tasks.environment import PROJECT
from tests.gedit_sets import png, row, settings, write_edited, write_manifest
from tests.judge_server import Server, judge_server

WORDING = load_wording(None)
HOW = {"seed": 0, "resamples": 200, "confidence": 0.95}


def rows(count: int = 6) -> list[dict]:
    categories = ("subject-add", "material_alter")
    return [row(f"k{i}", f"play n{i}", categories[i % 2], intersection=i < 4) for i in range(count)]


def graded(first: float, second: float, model: str = "m1") -> Reply:
    return Reply("ok", json.dumps({"score": [first, second]}), model)


def tasks_of(tmp_path: Path, entries: list[dict]):
    tasks = load_tasks(write_manifest(tmp_path / "set", entries), tmp_path / "sources")
    write_edited(tmp_path / "student", tasks)
    return tasks


def constant(scores: dict[str, float] | None = None):
    """A judge that gives the same two scores always, or per question kind; counts its questions."""
    asked: list[str] = []
    lock = threading.Lock()

    def ask(question, turns):
        with lock:
            asked.append(question.kind)
        value = (scores or {}).get(question.kind, 5.0)
        text = json.dumps({"score": [value, 9.0], "reasoning": f"{question.kind} words"})
        return Reply("ok", text, "m1", "stop", {"prompt_tokens": 10, "completion_tokens": 2})

    return ask, asked


def asking(ask, **changes) -> Asking:
    """`make_ask` among the changes opens another judge than `ask`."""
    return Asking(**{"make_ask": lambda *_: ask, "concurrency": 3, "say": lambda text: None, **changes})


def judge(tmp_path: Path, tasks, ask, out: str = "out", with_settings=None, anchors: Path | None = None, **changes):
    folders = tmp_path / "student", tmp_path / out
    how = {"settings": with_settings or settings(), "asking": asking(ask, **changes), "anchors": anchors}
    return judge_folder(tasks, *folders, model="student", **how)


def test_scores_pass_from_the_judge_to_rows_and_scorecard(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows())
    ask, asked = constant({"semantic": 4.0, "quality": 9.0})
    judge(tmp_path, tasks, ask)
    assert sorted(asked) == ["quality"] * 6 + ["semantic"] * 6
    found = read_judgements(tmp_path / "out", WORDING)
    expected = {"O": 6.0, "sc": 4.0, "pq": 9.0, "sc1": 4.0, "sc2": 9.0, "pq1": 9.0, "pq2": 9.0}
    scores = rows_of(found)
    assert [score.values for score in scores] == [expected] * 6 and found.answered_by == "m1"
    assert scores[0].reasons == ("semantic [4.0, 9.0]: semantic words", "quality [9.0, 9.0]: quality words")
    assert (tmp_path / "out" / scores[0].image).resolve() == edited_path(tmp_path / "student", tasks[0]).resolve()
    card, _ = column_scorecard(found, "en/full", allow_partial=False, **HOW)
    paths = ("gedit/average", "gedit/subject-add", "gedit/material_alter")
    assert {path: metric.mean for path, metric in card.metrics.items()} == dict.fromkeys(paths, 6.0)
    identity = card.identities["gedit"]
    known = {"language": "en", "subset": "full", "set": "custom", "repeats": 1, "coverage": 1.0, "images": {}}
    assert card.benchmarks["gedit"]["n"] == 6 and known.items() <= identity.items()
    assert (
        identity["statuses"] == {"ok": 6}
        and identity["bounds"] == [6.0, 6.0]
        and identity["judge"]["answered_by"] == "m1"
    )
    assert identity["judge"]["wording"] == WORDING.identity()
    means = columns(found, allow_partial=False)
    assert list(means) == ["en/full", "en/intersection", "en/paper"]
    assert means["en/intersection"].average.n == 4 and list(means["en/paper"].categories) == ["subject-add"]


def test_a_category_without_intersection_rows_is_said_and_not_dropped(tmp_path: Path) -> None:
    entries = [
        row(f"k{index}", "x", ("subject-add", "tone_transfer")[index % 2], intersection=index % 2 == 0)
        for index in range(6)
    ]
    judge(tmp_path, tasks_of(tmp_path, entries), constant()[0])
    found, without = read_judgements(tmp_path / "out", WORDING), r"en/intersection: no row of \['tone_transfer'\]"
    table = columns(found, allow_partial=True)
    assert re.search(without, table["en/intersection"]) and list(table["en/paper"].categories) == ["subject-add"]
    with pytest.raises(UserError, match=without):
        column_scorecard(found, "en/intersection", allow_partial=True, **HOW)


def test_the_macro_average_is_not_the_mean_over_samples(tmp_path: Path) -> None:
    entries = [row(f"k{index}", "x", "subject-add" if index < 3 else "tone_transfer") for index in range(5)]
    tasks = tasks_of(tmp_path, entries)
    table = {task.key: float(index) for index, task in enumerate(tasks)}
    files = {task.key: edited_path(tmp_path / "student", task) for task in tasks}
    images = {key: prepare_images(None, read_rgb(file), settings())[0] for key, file in files.items()}

    def ask(question, turns):
        value = next(table[key] for key, image in images.items() if question.images[-1] == image)
        return graded(value, value)

    judge(tmp_path, tasks, ask)
    average = columns(read_judgements(tmp_path / "out", WORDING), allow_partial=False)["en/full"].average
    assert average.overall == pytest.approx((1.0 + 3.5) / 2) and average.overall != pytest.approx(np.mean(range(5)))


def test_images_that_cannot_be_judged_have_a_status_and_cost_nothing(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))
    edited_path(tmp_path / "student", tasks[0]).unlink()
    edited_path(tmp_path / "student", tasks[1]).write_bytes(b"\x89PNG no more")
    edited_path(tmp_path / "student", tasks[2]).write_bytes(png("wide", (64, 32)))
    ask, asked = constant()
    judge(tmp_path, tasks, ask)
    found = read_judgements(tmp_path / "out", WORDING)
    assert [score.status for score in rows_of(found)] == ["missing_image", "bad_image", "ok", "ok"] and len(asked) == 4
    assert [score.values for score in rows_of(found)][:2] == [{}, {}]
    refused = columns(found, allow_partial=False)["en/full"]
    assert "2 of 4 samples have a score" in refused and "would be 2.50 or 7.50" in refused
    with pytest.raises(UserErrors, match="have no score"):
        column_scorecard(found, "en/full", allow_partial=False, **HOW)
    whole = summary(found, allow_partial=True, **HOW)
    assert whole["stretched"] == 1
    average = whole["columns"]["en/full"]["average"]
    assert (average["overall"], average["low"], average["high"], average["coverage"]) == (5.0, 2.5, 7.5, 0.5)
    assert average["statuses"] == {"missing_image": 1, "bad_image": 1, "ok": 2}


def test_nothing_is_asked_twice_and_failures_only_on_demand(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))
    calls: list[str] = []

    def failing(question, turns):
        calls.append(question.text)
        return Reply("api_error", "", error="down") if "play n1" in question.text else graded(5, 5)

    judge(tmp_path, tasks, failing)
    assert len(calls) == 8
    judge(tmp_path, tasks, failing)
    assert len(calls) == 8
    first = rows_of(read_judgements(tmp_path / "out", WORDING))
    assert [score.status for score in first] == ["ok", "api_error", "ok", "ok"] and "down" in first[1].reasons[0]
    ask, asked = constant()
    judge(tmp_path, tasks, ask, retry=["api_error"])
    assert asked == ["semantic"]
    assert [score.status for score in rows_of(read_judgements(tmp_path / "out", WORDING))] == ["ok"] * 4


def test_a_changed_image_is_a_new_question_and_equal_images_share_one(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))
    edited_path(tmp_path / "student", tasks[0]).write_bytes(png("same"))
    edited_path(tmp_path / "student", tasks[1]).write_bytes(png("same"))
    ask, asked = constant()
    judge(tmp_path, tasks, ask)
    assert sorted(asked) == ["quality"] * 3 + ["semantic"] * 4
    edited_path(tmp_path / "student", tasks[2]).write_bytes(png("new"))
    judge(tmp_path, tasks, ask)
    assert len(asked) == 9
    assert {score.status for score in rows_of(read_judgements(tmp_path / "out", WORDING))} == {"ok"}


def test_images_that_a_stage_has_made_are_scored_wherever_they_lie(tmp_path: Path) -> None:
    tasks = load_tasks(write_manifest(tmp_path / "set", rows(3)), tmp_path / "sources")
    made = []
    for index, task in enumerate(tasks):
        for k in range(2):
            file = tmp_path / f"{task.key}-{k}.png"
            if index < 2 or k:
                file.write_bytes(png(f"{task.key} {k}"))
            made.append(MadeEdit(task, file, f"images/{task.key}-{k}.png", k, 10 * index + k))
    ask, asked = constant({"semantic": 4.0, "quality": 9.0})
    how = {"model": "m", "settings": settings(), "asking": asking(ask)}
    found = score_made(made, tmp_path / "store", **how)
    expected = [(edit.task.key, edit.k, edit.seed, edit.image) for edit in made]
    assert [(row.example_id, row.k, row.seed, row.image) for row in found] == expected
    assert [row.status for row in found] == ["ok"] * 4 + ["missing_image", "ok"]
    assert {row.values.get("O") for row in found} == {6.0, None}
    assert len(asked) == 10 and answered_by(tmp_path / "store", settings()) == "m1"
    assert score_made(made, tmp_path / "store", **how) == found and len(asked) == 10


def test_judges_are_not_mixed(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))
    judge(tmp_path, tasks, constant()[0])
    with pytest.raises(UserErrors, match=r"judge\.temperature: the folder has 0\.0, this command 0\.5"):
        judge(tmp_path, tasks, constant()[0], with_settings=settings(temperature=0.5))

    def floating(question, turns):
        return graded(5, 5, "m1" if "n1" in question.text else "m2")

    judge(tmp_path, tasks, floating, out="floating")
    with pytest.raises(UserErrors, match=r"2 models answered: \{'m1': 1, 'm2': 7\}"):
        read_judgements(tmp_path / "floating", WORDING)


def test_unfinished_judgements_make_no_score(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))
    judge(tmp_path, tasks, constant()[0], shard=(0, 2))
    with pytest.raises(UserErrors, match="4 questions have no answer yet"):
        read_judgements(tmp_path / "out", WORDING)
    ask, asked = constant()
    judge(tmp_path, tasks, ask, shard=(1, 2))
    assert len(asked) == 4 and len(rows_of(read_judgements(tmp_path / "out", WORDING))) == 4


def test_a_silent_server_is_given_up_and_what_was_judged_is_kept(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(40))
    calls: list[int] = []

    def silent(question, turns):
        calls.append(1)
        return Reply("api_error", "", error="no route")

    with pytest.raises(UserError, match="20 questions in a row got no answer, the last one: no route"):
        judge(tmp_path, tasks, silent, concurrency=2)
    assert len(calls) < 30


def test_repeats_are_averaged_and_their_spread_is_known(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))

    def noisy(question, turns):
        if question.repeat == 2 and "n1" in question.text:
            return Reply("ok", "no idea")
        return graded(4.0 + question.repeat, 10) if question.kind == "semantic" else graded(9, 9)

    judge(tmp_path, tasks, noisy, with_settings=settings(repeats=3))
    found = read_judgements(tmp_path / "out", WORDING)
    values = [overall((4.0 + repeat, 10), (9, 9))[2] for repeat in range(3)]
    means = [np.mean(values), np.mean(values[:2]), np.mean(values), np.mean(values)]
    assert [row.values["O"] for row in rows_of(found)] == pytest.approx(means)
    noise, spread = repeat_noise(found), pytest.approx(np.std(values, ddof=1))
    assert (noise["samples"], noise["within"], noise["of_mean"]) == (3, spread, spread)
    assert summary(found, allow_partial=False, **HOW)["failed_questions"] == {"semantic unparseable": 1}


def test_the_anchors_show_a_judge_that_has_drifted(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(8))
    judge(tmp_path, tasks, fake_judge())
    frozen = read_judgements(tmp_path / "out", WORDING)
    assert freeze_anchors(frozen, tmp_path / "anchors", count=6, seed=0) == 6
    table = json.loads((tmp_path / "anchors" / "anchors.json").read_text(encoding="utf-8"))
    assert sorted(entry["category"] for entry in table["anchors"]) == ["material_alter"] * 3 + ["subject-add"] * 3
    judge(tmp_path, tasks, fake_judge(), out="steady", anchors=tmp_path / "anchors")
    steady = drift(read_judgements(tmp_path / "steady", WORDING), **HOW)
    assert (steady["difference"], steady["drifted"], steady["n"]) == (0.0, False, 6)

    def kinder(question, turns):
        scores = json.loads(fake_judge()(question, turns).text)["score"]
        return graded(*(min(10, grade + 2) for grade in scores), "fake")

    judge(tmp_path, tasks, kinder, out="kinder", anchors=tmp_path / "anchors")
    found = read_judgements(tmp_path / "kinder", WORDING)
    moved = drift(found, **HOW)
    assert moved["difference"] > 1.0 and moved["drifted"] and moved["largest"]
    assert len(rows_of(found)) == 8  # anchors are no samples
    assert "has drifted: anchors +" in "".join(notes_of(found, "en/full", allow_partial=False, **HOW))
    other = settings(max_tokens=65)
    judge(tmp_path, tasks, fake_judge(), out="other", anchors=tmp_path / "anchors", with_settings=other)
    with pytest.raises(UserError, match="frozen with other settings"):
        drift(read_judgements(tmp_path / "other", WORDING), **HOW)
    next((tmp_path / "anchors" / "images").iterdir()).write_bytes(png("exchanged"))
    with pytest.raises(UserErrors, match="the anchors have changed"):
        judge(tmp_path, tasks, fake_judge(), out="exchanged", anchors=tmp_path / "anchors")


def test_the_price_is_known_before_the_first_question(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(4))
    said: list[str] = []

    def never(*_):
        raise AssertionError("nothing may be asked")

    estimate = judge(tmp_path, tasks, None, make_ask=never, only_preview=True, prices=(2.0, 8.0), say=said.append)
    assert (estimate.questions, estimate.answered, estimate.completion_tokens) == (8, 0, 640)
    jobs = jobs_of(plan(tasks, tmp_path / "student", tmp_path / "out"), 1)
    text = sum(len(WORDING.text(job.kind, job.entry.instruction)) for job in jobs)
    assert estimate.prompt_tokens == pytest.approx(text / 4 + 12 * tile_tokens(32, 32), abs=8)
    assert estimate.price == pytest.approx((estimate.prompt_tokens * 2.0 + 640 * 8.0) / 1e6)
    assert "8 questions to ask" in said[0]
    with pytest.raises(UserError, match="not within the highest price, 0.001"):
        judge(tmp_path, tasks, None, make_ask=never, highest_price=0.001, prices=(2.0, 8.0))
    order: list[str] = []
    ask, _ = constant()

    def opened(*_):
        order.append("asked")
        return ask

    judge(tmp_path, tasks, None, make_ask=opened, say=lambda line: order.append("said"))
    assert order[:2] == ["said", "asked"]


def test_ten_thousand_judgements_are_averaged_in_seconds() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 11, (10_000, 4)).astype(float)
    names = [(f"s{index}", GEDIT_CATEGORIES[index % 11]) for index in range(len(scores))]
    samples = [Sample(*name, tuple(row[:2]), tuple(row[2:])) for name, row in zip(names, scores)]
    begun = time.process_time()
    found = aggregate(samples, GEDIT_CATEGORIES)
    assert time.process_time() - begun < 5.0 and found.average.n == 10_000
    o = np.sqrt(scores[:, :2].min(1) * scores[:, 2:].min(1))
    assert found.average.overall == pytest.approx(np.mean([o[start::11].mean() for start in range(11)]))


def test_image_tokens_follow_the_published_rules() -> None:
    assert [tile_tokens(512, 512), tile_tokens(1024, 1024), tile_tokens(2048, 4096)] == [255, 765, 1105]
    assert patch_tokens(512, 512) == 19 * 19
    assert preview([], 3, 1, settings(), "tiles", None).price is None


def test_other_resizings_are_other_questions(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(2))
    edited_path(tmp_path / "student", tasks[0]).write_bytes(png("wide", (64, 32)))
    sizes: dict[str, set] = {}
    for resize in ("match-source", "area512", "none"):
        seen = sizes[resize] = set()

        def ask(question, turns, seen=seen):
            seen.add(tuple(Image.open(io.BytesIO(image)).size for image in question.images))
            return graded(5, 5)

        judge(tmp_path, tasks, ask, out=resize, with_settings=settings(resize=resize))
    assert sizes["match-source"] == {((32, 32), (32, 32)), ((32, 32),)}
    assert sizes["none"] == {((32, 32), (64, 32)), ((64, 32),), ((32, 32), (32, 32)), ((32, 32),)}
    assert sizes["area512"] == {((512, 512), (724, 362)), ((724, 362),), ((512, 512), (512, 512)), ((512, 512),)}


# --- a server, the command line, and a kill ---------------------------------------------------------------------------


def test_every_sample_of_a_faulty_server_ends_in_its_status(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-test-77")
    scripts = {
        "n0": ["good"],
        "n1": ["limit", "good"],
        "n2": ["declines"],
        "n3": ["cut"],
        "n4": ["reset"],
        "n5": ["truncated", "broken_inside", "fenced"],
    }
    tasks = tasks_of(tmp_path, rows())
    with judge_server(scripts) as server:
        endpoint = Endpoint(server.url, "JUDGE_KEY", 5.0, 3, 0.01, 0.1, 0)
        judge(tmp_path, tasks, None, make_ask=Access(settings(), endpoint))
    found = rows_of(read_judgements(tmp_path / "out", WORDING))
    assert [score.status for score in found] == ["ok", "ok", "refused", "unparseable", "api_error", "ok"]
    assert [server.calls[name] for name in scripts] == [1, 2, 1, 2, 3, 3] and server.calls["quality"] == 6
    assert all(score.values["O"] == 6.0 if score.status == "ok" else score.values == {} for score in found)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file() and b"sk-test-77" in file.read_bytes()]


def test_a_refused_key_ends_the_run_at_once_and_leaves_nothing_that_was_given_up(tmp_path: Path) -> None:
    scripts = {f"n{index}": ["broken_inside"] for index in range(12)} | {"n7": ["no_key"]}
    tasks = tasks_of(tmp_path, rows(12))
    halts: list[threading.Event] = []
    with judge_server(scripts) as server:
        access = Access(settings(), Endpoint(server.url, "", 5.0, 4, 60.0, 60.0, 0))

        def opened(halt, processes):
            halts.append(halt)
            return access(halt, processes)

        with pytest.raises(UserError, match="the key is refused"):
            judge(tmp_path, tasks, None, make_ask=opened, concurrency=24)
    kept = (tmp_path / "out" / "shards" / "0-of-1.jsonl").read_text(encoding="utf-8")
    assert halts[0].is_set() and "api_error" not in kept


def command(tmp_path: Path, server: Server, out: str) -> list[str]:
    folders = {"--data": tmp_path / "set", "--images": tmp_path / "student", "--out": tmp_path / out}
    others = {"--judge-model": "judge", "--base-url": server.url, "--key-variable": "", "--concurrency": 1}
    return ["judge", "--custom-set", *(str(word) for option in (folders | others).items() for word in option)]


FILES = ("summary.json", "scorecard.json", "scores.parquet", "report.html")


def finish(folder: Path, *options: str) -> dict[str, bytes]:
    """The files that follow from the judgements."""
    for step in ("verdict", "report"):
        assert cli([step, "--judgements", str(folder), "--resamples", "200", *options]) == 0
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_killed_run_ends_as_an_unbroken_one_and_repeats_no_answered_question(tmp_path: Path) -> None:
    tasks_of(tmp_path, rows())
    with judge_server({"n3": ["declines"]}) as server:
        assert cli(command(tmp_path, server, "unbroken")) == 0
    with judge_server({"n3": ["declines"]}) as server:
        reached, hold = threading.Event(), threading.Event()

        def stop_at_the_sixth() -> None:
            if server.calls.total() == 6:
                reached.set()
                hold.wait(60)

        server.before = stop_at_the_sixth
        words = [sys.executable, "-m", "benchmarks", "gedit", *command(tmp_path, server, "killed")]
        child = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.DEVNULL)
        assert reached.wait(120)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        hold.set()
        server.before = lambda: None
        shard = tmp_path / "killed" / "shards" / "0-of-1.jsonl"
        assert shard.read_bytes().count(b"\n") == 5
        with shard.open("ab") as file:
            file.write(b'{"key": "torn')  # as a kill within a write leaves it
        with pytest.raises(UserErrors, match="7 questions have no answer yet"):
            cli(["verdict", "--judgements", str(tmp_path / "killed")])
        assert cli(command(tmp_path, server, "killed")) == 0
        assert server.calls.total() == 13  # 12 questions, and once more the one that was under way
        assert cli(command(tmp_path, server, "killed")) == 0
        assert server.calls.total() == 13
    with pytest.raises(UserErrors, match="have no score"):
        finish(tmp_path / "killed")
    killed, unbroken = (finish(tmp_path / name, "--allow-partial") for name in ("killed", "unbroken"))
    assert killed == unbroken
    card = read_scorecard(tmp_path / "killed" / "scorecard.json")
    assert card.identities["gedit"]["statuses"] == {"ok": 5, "refused": 1}
    assert len(read_scores(tmp_path / "killed")) == 6


def test_any_number_of_workers_gives_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    tasks_of(tmp_path, rows())
    scripts = {"n1": ["empty", "good"], "n3": ["declines"], "n4": ["fenced"]}
    for name, options in (("alone", []), ("together", ["--workers", "2", "--concurrency", "4"])):
        with judge_server(scripts) as server:
            assert cli([*command(tmp_path, server, name), *options]) == 0
            assert server.calls.total() == 13  # 12 questions, one of them twice
            assert cli([*command(tmp_path, server, name), *options]) == 0
            assert server.calls.total() == 13
    alone, together = (finish(tmp_path / name, "--allow-partial") for name in ("alone", "together"))
    assert alone == together


def test_workers_of_a_silent_server_give_up_and_keep_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    tasks = tasks_of(tmp_path, rows(40))
    with judge_server({f"n{index}": ["bad_request"] for index in range(40)} | {"quality": ["bad_request"]}) as server:
        access = Access(settings(), Endpoint(server.url, "", 5.0, 1, 0.01, 0.01, 0))
        with pytest.raises(UserError, match="20 questions in a row got no answer"):
            judge(tmp_path, tasks, None, make_ask=access, workers=2, concurrency=4)
        assert 20 <= server.calls.total() <= 24
    kept = (tmp_path / "out" / "shards" / "0-of-1.jsonl").read_text(encoding="utf-8").count("api_error")
    assert kept == server.calls.total()
    with judge_server({}) as server:
        access = Access(settings(), Endpoint(server.url, "", 5.0, 1, 0.01, 0.01, 0))
        judge(tmp_path, tasks, None, make_ask=access, workers=2, concurrency=4, retry=["api_error"])
    assert {score.values["O"] for score in rows_of(read_judgements(tmp_path / "out", WORDING))} == {6.0}


def test_questions_of_which_none_is_answered_make_no_result(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, rows(2))
    access = Access(settings(), Endpoint("http://127.0.0.1:9/v1", "", 5.0, 1, 0.01, 0.01, 0))
    fault = "none of 4 questions got an answer, the last one: 1 tries, the last one: APIConnectionError"
    with pytest.raises(UserError, match=fault):
        judge(tmp_path, tasks, None, make_ask=access)


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    tasks_of(tmp_path, rows(2))
    folders = {"--data": tmp_path / "set", "--images": tmp_path / "student", "--out": tmp_path / "o"}
    base = ["judge", "--judge-model", "m", *(str(word) for option in folders.items() for word in option)]
    with pytest.raises(UserErrors, match="not the official GEdit-Bench"):
        cli(base)
    with pytest.raises(SystemExit):
        cli([*base, "--judge", "oracle"])
    with pytest.raises(UserErrors, match=r"base_url = 'judge\.local'"):
        cli([*base, "--custom-set", "--base-url", "judge.local"])
    with pytest.raises(UserError, match="unknown step 'detect'"):
        cli(["detect"])
    assert cli([*base, "--custom-set", "--judge", "fake"]) == 0
    with pytest.raises(UserError, match="'own' wording, not with this 'custom' one"):
        (tmp_path / "semantic.txt").write_text("<instruction>", encoding="utf-8")
        (tmp_path / "quality.txt").write_text("?", encoding="utf-8")
        cli(["verdict", "--judgements", str(tmp_path / "o"), "--wording", str(tmp_path)])
