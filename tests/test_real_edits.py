"""Defends: edits of a real family are scored by the judge that section `judge` names, through validate and score; what
it did not grade is no score.

A tiny SD3, GenEval's networks in tiny, and a judge on loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.gedit.scorer import GeditScorer
from benchmarks.judge.access import name_of_local
from benchmarks.params import BenchmarkParams, JudgeParams, RequestParams, ServerParams
from benchmarks.scorers import scorer_of
from benchmarks.scores.scorecard import ExampleScore, read_scorecard, read_scores
from data.errors import UserError, UserErrors
from data.records import Example, read_examples, write_examples
from model.route import Route
from tasks.checks import rescore
from tasks.checks.preflight import judge_faults
from tasks.environment import PROJECT
from tasks.params.reading import faults_of
from tasks.params.sections import RoutingParams, SamplingParams
from tasks.stages import absorb as absorbing
from tasks.stages import distill as distilling
from tasks.stages import encode as encoding
from tasks.stages import score as scoring
from tasks.stages import validate as validating
from tests.judge_server import judge_server
from tests.test_families_pipeline import LOOP, WORLD, Home, distil_params, save_curated, save_teachers
from tests.test_judge_local import checkpoint as checkpoint
from tests.tiny_evaluator import tiny_clip, tiny_mask2former
from tests.tiny_families import save_family

FAMILY = "sd3"
NUMBERS: dict[str, Any] = {"seed": 0, "resamples": 50, "confidence": 0.9}
ROUTES = RoutingParams(
    (Route("local_edit", "local", 1.0),)
)  # what random networks see in T2I is as likely as not nothing, of which no part can be retained
SAMPLING = SamplingParams("eval", steps=2, guidance=2.0, images_per_prompt=1, seed=0, batch=4)
RECORD = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
QUESTIONS = 12  # of validate: two teachers, the second guided as well, two edits, two questions about each


def judge_params(url: str, **changes: Any) -> JudgeParams:
    values: dict[str, Any] = {
        "kind": "endpoint",
        "model": "judge",
        "wording": "",
        "language": "en",
        "categories": (),
        "repeats": 1,
        "request": RequestParams(0.0, 0, 64, True, "png", "match-source", False, {}),
        "server": ServerParams(url, "", "test", 5.0, 2, 0.01, 0.1, 0),
        "dtype": "float32",
        "concurrency": 1,
        "workers": 1,
        "retry": ("api_error",),
        "prices": None,
        "highest_price": None,
    }
    return JudgeParams(**{**values, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("edits")
    made = Home(FAMILY, root / "curated", root / "teachers", root / "encoded")
    save_teachers(made.teachers, FAMILY, save_family(root / "pipeline", FAMILY))
    save_curated(made.curated)
    examples = [
        replace(one, record=RECORD) if one.capability == "t2i" else replace(one, prompt=f"play e{one.row} a red circle")
        for one in read_examples(made.curated)
    ]
    write_examples(made.curated, examples)
    tiny_mask2former(root / "detector")
    tiny_clip(root / "classifier")
    return made


@pytest.fixture(scope="module")
def students(home: Home) -> dict[str, Path]:
    """One step of everything."""
    encoding.encode(
        encoding.Params(home.backbone, batch=3, cache=False),
        curated=home.curated,
        teachers=home.teachers,
        out=home.encoded,
    )
    folders = {"encoded": home.encoded, "teachers": home.teachers}
    here = Path.cwd()
    os.chdir(home.curated.parent)  # states for resuming lie in runs/
    try:
        distilling.distill(distil_params(home, steps=1, routing=ROUTES), **folders, out=home.curated.parent / "student")
        routes = (Route("local_edit", "student", 1.0, {"guidance": 1.5}),)
        absorption = absorbing.Params(
            backbone=home.backbone, routes=routes, steps=1, learning_rate=1e-3, rollout_steps=4, **LOOP
        )
        absorbing.absorb(
            absorption, **folders, student=home.curated.parent / "student", out=home.curated.parent / "absorbed"
        )
    finally:
        os.chdir(here)
    return {"student": home.curated.parent / "student", "absorbed": home.curated.parent / "absorbed"}


def benchmark_of(root: Path) -> BenchmarkParams:
    return BenchmarkParams(str(root / "detector"), str(root / "classifier"), "cpu", batch=4, workers=1, scheduler="")


def run_validate(root: Path, project: Path, judge: JudgeParams) -> dict[str, Any]:
    """The stage, in `project`; the detector sees small pictures. A child process runs it, too."""
    import benchmarks.geneval.detector

    benchmarks.geneval.detector.SHORT_SIDE = 64
    project.mkdir(exist_ok=True)
    os.chdir(project)
    home = Home(FAMILY, root / "curated", root / "teachers", root / "encoded")
    params = validating.Params(WORLD, home.backbone, SAMPLING, ROUTES, benchmark_of(root), judge, **NUMBERS, floors={})
    return validating.validate(
        params,
        curated=home.curated,
        teachers=home.teachers,
        out=project / "validated",
        report=project / "validate.json",
    )


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.geneval.detector.SHORT_SIDE", 64)
    monkeypatch.chdir(tmp_path)


def made_by(project: Path) -> dict[str, bytes]:
    """Every file that the stage has made."""
    return {
        str(path.relative_to(project)): path.read_bytes()
        for name in ("validated", "validate.json")
        for path in (project / name).rglob("*")
        if path.is_file()
    } | {"validate.json": (project / "validate.json").read_bytes()}


def test_a_killed_validation_ends_as_an_unbroken_one_and_asks_nothing_twice(home: Home, tmp_path: Path) -> None:
    root = home.curated.parent
    with judge_server({"e5": ["fenced"], "e6": ["empty", "good"]}) as server:
        run_validate(root, tmp_path / "unbroken", judge_params(server.url))
        asked = server.calls.total()
        assert QUESTIONS < asked <= QUESTIONS + 2  # an unreadable reply is asked for once more
    rows = [row for row in read_scores(tmp_path / "unbroken" / "validated") if row.benchmark == "gedit"]
    assert {(row.model, row.category, row.status) for row in rows} == {
        (name, "subject-add", "ok") for name in ("base", "local", "local_guided")
    } and len(rows) == 6
    assert all(
        row.values["O"] == 6.0 and row.values["sc1"] == 8.0 and "the {hat} is red" in row.reasons[0] for row in rows
    )
    assert all((tmp_path / "unbroken" / "validated" / row.image).is_file() for row in rows)
    with judge_server({"e5": ["fenced"], "e6": ["empty", "good"]}) as server:
        reached, hold = threading.Event(), threading.Event()

        def stop_at_the_fifth() -> None:
            if server.calls.total() == 5:
                reached.set()
                hold.wait(300)

        server.before = stop_at_the_fifth
        call = f"run_validate(Path({str(root)!r}), Path({str(tmp_path / 'killed')!r}), judge_params({server.url!r}))"
        code = f"from tests.test_real_edits import *; {call}"
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.DEVNULL,
        )
        assert reached.wait(300)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        hold.set()
        server.before = lambda: None
        assert not (tmp_path / "killed" / "validated").exists() and not (tmp_path / "killed" / "validate.json").exists()
        run_validate(root, tmp_path / "killed", judge_params(server.url))
        assert server.calls.total() <= asked + 2  # the one under way, and the first try of a question that needed two
    assert made_by(tmp_path / "killed") == made_by(tmp_path / "unbroken")


def score_params(home: Home, judge: JudgeParams) -> scoring.Params:
    return scoring.Params(
        WORLD, home.backbone, SAMPLING, ROUTES, benchmark_of(home.curated.parent), judge, **NUMBERS, shown=1
    )


def test_score_names_its_judge_and_a_judge_that_changed_in_between_is_refused(
    home: Home, students: dict[str, Path], tmp_path: Path
) -> None:
    folders = {"curated": home.curated, "teachers": home.teachers, "validated": tmp_path / "validated", **students}
    with judge_server({}) as server:
        judge = judge_params(server.url, prices=(2.0, 8.0))
        folders |= {"scorecard": tmp_path / "card.json", "metrics": tmp_path / "metrics"}
        run_validate(home.curated.parent, tmp_path, judge)
        with pytest.raises(UserError, match="not within the highest price, 1e-06"):
            scoring.score(score_params(home, replace(judge, highest_price=1e-6)), **folders, out=tmp_path / "score")
        asked = server.calls.total()
        scoring.score(score_params(home, judge), **folders, out=tmp_path / "score")
        assert asked < server.calls.total() <= asked + 12  # three models' edits; equal images share a question
        again = server.calls.total()
        first = (tmp_path / "card.json").read_bytes()
        scoring.score(score_params(home, judge), **folders, out=tmp_path / "score")
        assert server.calls.total() == again and (tmp_path / "card.json").read_bytes() == first
        means = rescore.rescore(
            score_params(home, judge),
            curated=home.curated,
            teachers=home.teachers,
            validated=tmp_path / "validated",
            checkpoint=students["absorbed"],
            out=tmp_path / "rescored",
        )
        assert server.calls.total() == again and means["gedit/average"] == 6.0
        (tmp_path / "card.json").unlink()
        server.model = "judge-of-today"
        with pytest.raises(
            UserError,
            match=r"2 models answered under the name judge: \{'judge-2026-01-01': \d+, 'judge-of-today': \d+\}",
        ):
            other = replace(SAMPLING, seed=1)
            scoring.score(replace(score_params(home, judge), sampling=other), **folders, out=tmp_path / "other")
        assert not (tmp_path / "other").exists() and not (tmp_path / "card.json").exists()
    card = read_scorecard(tmp_path / "rescored" / "scorecard.json")
    assert (
        card.metrics["gedit/subject-add"].mean,
        card.metrics["retention/local_edit"].mean,
        card.metrics["gedit/average"].n,
    ) == (6.0, 1.0, 2)
    identity = card.identities["gedit"]
    assert (identity["coverage"], identity["statuses"], identity["language"], identity["judge"]["answered_by"]) == (
        1.0,
        {"ok": 2},
        "en",
        "judge-2026-01-01",
    )
    assert "evaluator" in card.identities["geneval"]
    page = (tmp_path / "score" / "report.html").read_text(encoding="utf-8")
    assert "Edits: judge judge-2026-01-01 (endpoint, test), wording own, language en, 1 judgement(s) an image." in page
    assert "the {hat} is red" in page and page.count("semantic [8.0, 6.0]") >= 4


def test_what_the_judge_did_not_grade_is_no_score(home: Home, tmp_path: Path) -> None:
    root = home.curated.parent
    with judge_server({"e5": ["declines"]}) as server:
        with pytest.raises(UserErrors, match=r"subject-add: 1 of 2 images have no score \(\{'refused': 1\}\)"):
            run_validate(root, tmp_path, judge_params(server.url))
        assert not (tmp_path / "validated").exists() and not (tmp_path / "validate.json").exists()
        asked = server.calls.total()
        with pytest.raises(UserErrors, match="have no score"):
            run_validate(root, tmp_path, judge_params(server.url))
        assert server.calls.total() == asked  # a refusal is an answer
        server.scripts = {}
        run_validate(root, tmp_path, judge_params(server.url, retry=("api_error", "refused")))
    assert {row.status for row in read_scores(tmp_path / "validated")} == {"ok"}


def test_a_teacher_that_scores_nothing_is_refused_before_anything_is_learned_from_it(
    home: Home, tmp_path: Path
) -> None:
    with judge_server({name: ["bad"] for name in ("e5", "e6", "quality")}) as server:
        with pytest.raises(
            UserErrors, match="local: scores 0 on its own local_edit, so no student could retain anything"
        ):
            run_validate(home.curated.parent, tmp_path, judge_params(server.url))
    assert not json.loads((tmp_path / "validate.json").read_text())["passed"]


def test_a_category_of_one_example_is_refused_before_anything_is_drawn(home: Home, tmp_path: Path) -> None:
    copied = tmp_path / "home"
    shutil.copytree(home.curated.parent, copied)
    examples, dropped = read_examples(copied / "curated"), {"e6"}
    write_examples(
        copied / "curated", [one for one in examples if not (one.split == "eval" and dropped & set(one.prompt.split()))]
    )
    with judge_server({}) as server:
        with pytest.raises(
            UserErrors, match="subject-add: a single example in the eval split .* hold out two or more, or none"
        ):
            run_validate(copied, tmp_path, judge_params(server.url))
        assert not server.calls.total()


def test_a_judge_that_is_not_there_is_one_message_and_nothing_is_made(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = home.curated.parent
    drawn: list[int] = []
    monkeypatch.setattr("tasks.scoring.sampling.draw", lambda *_, **how: drawn.append(1))
    with pytest.raises(
        UserError, match=r"judge judge: no server answers at http://127\.0\.0\.1:9/v1 .* nothing was asked or drawn"
    ):
        run_validate(root, tmp_path, judge_params("http://127.0.0.1:9/v1"))
    unset = ServerParams("http://127.0.0.1:9/v1", "NO_SUCH_KEY", "", 5.0, 1, 0.0, 0.0, 0)
    with pytest.raises(UserError, match="the environment variable NO_SUCH_KEY is not set"):
        run_validate(root, tmp_path, judge_params("", server=unset))
    with pytest.raises(UserError, match=r"judge\.kind = none, but there are edits to score \(subject-add\)"):
        run_validate(root, tmp_path, judge_params("", kind="none", model=""))
    with pytest.raises(UserError, match="gone: no such folder; the local judge needs"):
        run_validate(root, tmp_path, judge_params("", kind="local", model=str(tmp_path / "gone")))
    assert (
        not drawn
        and not [path for path in tmp_path.iterdir() if path.name != "runs"]
        and not list(tmp_path.glob("runs/judgements/*"))
    )


def test_a_judge_that_stops_answering_leaves_nothing_half_made(home: Home, tmp_path: Path) -> None:
    root = home.curated.parent
    everything = {f"e{row}": ["broken_inside"] for row in (5, 6)} | {"quality": ["broken_inside"]}
    with judge_server(everything) as server:
        with pytest.raises(
            UserError, match="none of 4 questions got an answer, the last one: 2 tries, the last one: HTTP 500"
        ):
            run_validate(root, tmp_path, judge_params(server.url))
        assert not (tmp_path / "validated").exists() and not (tmp_path / "validate.json").exists()
        server.scripts = {}
        run_validate(root, tmp_path, judge_params(server.url))  # what got no answer is asked again
    assert {row.values.get("O") for row in read_scores(tmp_path / "validated") if row.benchmark == "gedit"} == {6.0}


def test_the_judge_may_be_a_network_on_this_machine(home: Home, checkpoint: Path, tmp_path: Path) -> None:
    """A tiny Qwen2.5-VL with random weights: it is asked, its words are kept, and they are no score."""
    request = RequestParams(0.0, 0, 6, True, "png", "match-source", False, {})
    with pytest.raises(UserErrors, match=r"subject-add: 2 of 2 images have no score \(\{'unparseable': 2\}\)"):
        run_validate(
            home.curated.parent, tmp_path, judge_params("", kind="local", model=str(checkpoint), request=request)
        )
    (shard,) = tmp_path.glob("runs/judgements/*/shards/*.jsonl")
    assert (
        shard.read_bytes().count(b"\n") == 4
        and checkpoint.name in shard.read_text(encoding="utf-8")
        and not (tmp_path / "validated").exists()
    )
    other = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, other)
    assert name_of_local(other) == name_of_local(checkpoint)
    (weights,) = other.glob("*.safetensors")
    trained = tmp_path / "trained" / checkpoint.name
    shutil.copytree(checkpoint, trained)
    save_file({name: value + 1 for name, value in load_file(weights).items()}, trained / weights.name, {"format": "pt"})
    assert name_of_local(trained) != name_of_local(checkpoint)  # so its answers are kept elsewhere


def test_workers_of_the_stage_give_the_bytes_of_one_process(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    for name, changes in (("alone", {}), ("together", {"workers": 2, "concurrency": 4})):
        with judge_server({"e6": ["fenced"]}) as server:
            run_validate(home.curated.parent, tmp_path / name, judge_params(server.url, **changes))
            assert server.calls.total() <= QUESTIONS
    assert made_by(tmp_path / "alone") == made_by(tmp_path / "together")


def test_language_and_categories_choose_what_is_judged(home: Home) -> None:
    examples = read_examples(home.curated)
    edit, drawn = (next(one for one in examples if one.capability == kind) for kind in ("local_edit", "t2i"))
    chinese = replace(edit, id="cn", record={"instruction_language": "cn"})
    benchmark, judge = benchmark_of(home.curated.parent), judge_params("http://127.0.0.1:9/v1")

    def judged(detector: str = benchmark.detector, **changes: Any) -> list[Example]:
        scorer = scorer_of(replace(benchmark, detector=detector), replace(judge, **changes), WORLD)
        return [example for example in (drawn, edit, chinese) if scorer.judges(example)]

    assert judged() == [drawn, edit]
    assert judged(language="cn") == [drawn, chinese]
    assert judged(categories=("color_alter",)) == [drawn]
    assert judged("micro") == [drawn, edit, chinese]
    with pytest.raises(UserError, match=r"record\.instruction_language = 'zh'; choose one of \['en', 'cn'\]"):
        GeditScorer(benchmark, judge).judges(replace(edit, record={"instruction_language": "zh"}))
    nobody = scorer_of(benchmark, replace(judge, kind="none"), WORLD)
    nobody.check([drawn])  # nobody judges where nothing is edited


def test_the_report_says_what_has_no_score_and_how_far_that_could_move_the_average() -> None:
    rows = [ExampleScore("m", "gedit", "subject-add", f"a{index}", 0, 0, {"O": 6.0}) for index in range(3)]
    rows += [
        ExampleScore("m", "gedit", "subject-add", "a3", 0, 0, {}, status="refused"),
        ExampleScore("m", "gedit", "color_alter", "c", 0, 0, {"O": 8.0}),
    ]
    about = {
        "judge": {"answered_by": "", "model": "j", "kind": "endpoint", "provider": "p", "wording": {"name": "own"}},
        "language": "en",
        "repeats": 3,
    }
    scorer = GeditScorer(BenchmarkParams("x", "", "cpu", 1, 1, ""), judge_params("http://127.0.0.1:9/v1"))
    first, second = scorer.notes(rows, {"gedit": about})
    assert first.startswith("Edits: judge j (endpoint, p)") and "3 judgement(s)" in first
    bounds = "Had these images earned 0 or 10, the average would be 6.25 or 7.50."
    assert second == f"Without a score: 1 refused in subject-add. {bounds}"
    assert scorer.notes(rows, {}) == []


def test_faults_of_the_judge_are_known_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def document(
        kind: str, capability: str = "local_edit", detector: str = "facebook/x", variable: str = "NO_SUCH_KEY"
    ) -> dict[str, Any]:
        server = {"key_variable": variable}
        routes = [{"capability": capability, "teacher": "t", "weight": 1.0}]
        return {
            "judge": {"kind": kind, "server": server},
            "benchmark": {"detector": detector},
            "routing": {"routes": routes},
        }

    assert "judge.kind = 'none': the routes edit (local_edit)" in judge_faults(document("none"))[0]
    assert "judge.server.key_variable = 'NO_SUCH_KEY'" in judge_faults(document("endpoint"))[0]
    for fine in (
        document("none", "t2i"),
        document("none", detector="micro"),
        document("endpoint", variable=""),
        document("local"),
        {},
    ):
        assert judge_faults(fine) == []
    faults = faults_of(
        judge_params("ftp://x", categories=("colors",), server=replace(judge_params("ftp://x").server, tries=0))
    )
    assert len(faults) == 2 and faults[0].startswith("categories[0] = 'colors': expected one of subject-add, ")
    assert faults[1] == "server.tries = 0: expected 1 or more"
    assert [fault.split(" ")[0] for fault in faults_of(judge_params("ftp://x", model=""))] == [
        "model",
        "server.base_url",
    ]


__all__ = ["Path", "judge_params", "run_validate"]
