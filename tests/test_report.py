"""Defends: the report page needs no other file and shows every figure with its interval and rows; the PNG sheets open and show what they were given."""

import base64
import re
from dataclasses import replace
from html import unescape
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from benchmarks.report import edit_strips, extremes, sample_grid, scorecard_plot, write_report
from benchmarks.scorecard import ExampleScore, Scorecard, scorecard
from data.errors import UserError

HOW = {"seed": 0, "resamples": 200, "confidence": 0.95}
NAMES = ("student", "base", "local teacher", "ground_truth", "shuffled")


def picture(index: int) -> np.ndarray:
    return np.full((24, 24, 3), (index * 7 % 256, 90, 160), dtype=np.uint8)


def rows(model: str, level: int) -> list[ExampleScore]:
    found = []
    for index in range(12):
        correct = float(index % 6 <= level)
        reasons = () if correct else ("expected circle >= 1, found 0 <& more>",)
        found.append(ExampleScore(model, "geneval", "colors", f"c{index}", 0, index, {"correct": correct}, reasons, f"images/c{index}.png"))
        values = {"O": min(10.0, index * 0.5 + level), "exact": 0.0}
        found.append(ExampleScore(model, "gedit", "subject-add", f"a{index}", 0, index, values, (), f"images/a{index}.png"))
    return found


@pytest.fixture
def results(tmp_path):
    """(folder with images, cards, candidate rows, prompts)."""
    scores = {name: rows(name, level) for name, level in zip(NAMES, (3, 4, 2, 5, 0), strict=True)}
    expected = {"colors": {(f"c{index}", 0) for index in range(12)}, "subject-add": {(f"a{index}", 0) for index in range(12)}}
    teachers = {"student": {"t2i": scores["base"], "local_edit": scores["local teacher"]}}
    cards = {name: scorecard(name, found, teachers.get(name, {}), expected, {"weights": f"digest-of-{name}"}, **HOW) for name, found in scores.items()}
    (tmp_path / "images").mkdir()
    for index, score in enumerate(scores["student"]):
        Image.fromarray(picture(index)).save(tmp_path / score.image)
    prompts = {score.example_id: f"a photo of <{score.example_id}> & co" for score in scores["student"]}
    return tmp_path, cards, scores["student"], prompts


def page(results, **changes) -> str:
    folder, cards, scores, prompts = results
    write_report(folder / "report.html", **{"cards": cards, "scores": scores, "prompts": prompts, "folder": folder, **changes})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(results):
    text = page(results)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert Image.open(BytesIO(base64.b64decode(sources[0].split(",")[1]))).size == (24, 24)
    assert 'name="viewport"' in text


def test_every_figure_stands_on_the_page_with_its_interval(results):
    text = page(results)
    for name, card in results[1].items():
        assert name in text
        for path, metric in card.metrics.items():
            digits = 2 if path.startswith("gedit") else 3
            assert f"{metric.mean:.{digits}f}<br><small>[{metric.low:.{digits}f}, {metric.high:.{digits}f}] n={metric.n}</small>" in text
    assert text.count("<svg") == len(results[1]["student"].metrics)
    assert "digest-of-student" in text


def test_every_row_and_its_reasons_stand_on_the_page(results):
    text = page(results, files=["reports/score/scores.parquet"])
    rows_part = unescape(text[text.index("<h2>Rows</h2>") :])
    for score in results[2]:
        assert f"<td>{score.example_id}</td><td>0</td><td>{score.seed}</td>" in rows_part and score.image in rows_part
    assert "expected circle >= 1, found 0 <& more>" in rows_part and "reports/score/scores.parquet" in rows_part


def test_text_is_escaped(results):
    text = page(results, title="<b>bold</b>")
    assert "<c1>" not in text and "&lt;c1&gt; &amp; co" in text
    assert "<b>bold</b>" not in text and "found 0 <&" not in text


def test_the_source_stands_beside_the_candidate_s_image(results):
    folder, _, scores, _ = results
    source = folder / "source.png"
    Image.fromarray(picture(30)).save(source)
    text = page(results, images={score.example_id: [("source", source)] for score in scores})
    assert text.count("<figcaption>source</figcaption>") == text.count("<figcaption>student</figcaption>") > 0
    assert base64.b64encode(source.read_bytes()).decode() in text


def test_worst_and_best_are_the_ends_and_never_the_same(results):
    edits = [score for score in results[2] if score.category == "subject-add"]
    worst, best = extremes(edits, 2)
    assert [score.example_id for score in worst] == ["a0", "a1"] and [score.example_id for score in best] == ["a11", "a10"]
    assert extremes(edits[::-1], 2) == (worst, best)
    worst, best = extremes(edits[:3], 5)
    assert len(worst) == 2 and len(best) == 1
    failed = replace(edits[5], status="refused", values={})
    assert extremes([*edits[:5], failed], 1)[0] == [failed]


def test_what_is_missing_is_named(results):
    folder, _, _, prompts = results
    with pytest.raises(UserError, match="1 scored examples have no prompt.*c3"):
        page(results, prompts={name: text for name, text in prompts.items() if name != "c3"})
    with pytest.raises(UserError, match="candidate"):
        page(results, cards={})
    (folder / "images/a0.png").unlink()
    with pytest.raises(UserError, match=r"a0\.png: no such image"):
        page(results)


def test_a_grid_holds_the_images(tmp_path):
    images = [np.full((24, 24, 3), color, dtype=np.uint8) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    sample_grid(images, ["a photo of a red circle on a white background", "two", "three"], tmp_path / "grid.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    shares = [(sheet == color).all(1).mean() for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    assert min(shares) > 0.05 and max(shares) == pytest.approx(min(shares), rel=0.05)
    with pytest.raises(UserError, match="3 images with 1 titles"):
        sample_grid(images, ["one"], tmp_path / "grid.png")
    with pytest.raises(UserError, match="0 images"):
        sample_grid([], [], tmp_path / "grid.png")


def test_strips_show_source_teacher_and_student_in_this_order(tmp_path):
    red, green, blue = (np.full((24, 24, 3), color, dtype=np.uint8) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250)))
    edit_strips([red, red], [green, green], [blue, blue], ["add a circle", "remove it"], tmp_path / "strips.png")
    sheet = np.asarray(Image.open(tmp_path / "strips.png").convert("RGB"))
    places = [np.nonzero((sheet == color).all(-1))[1].mean() for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    assert places[0] < places[1] < places[2]
    with pytest.raises(UserError, match="'students': 1"):
        edit_strips([red, red], [green, green], [blue], ["a", "b"], tmp_path / "strips.png")


def test_the_plot_draws_every_model(results):
    folder, cards, _, _ = results
    scorecard_plot(cards, folder / "plot.png")
    sheet = np.asarray(Image.open(folder / "plot.png").convert("RGB")).reshape(-1, 3)
    for color in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7), (0x56, 0xB4, 0xE9)):
        assert (sheet == color).all(1).sum() > 500
    with pytest.raises(UserError, match="no metric"):
        scorecard_plot({"empty": Scorecard("m", {}, {}, {})}, folder / "plot.png")


def test_files_appear_whole(results):
    page(results)
    assert not [path for path in results[0].iterdir() if path.name.startswith(".")]
