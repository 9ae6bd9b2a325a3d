"""Defends: the report page needs no other file and shows every figure with its interval and rows; the PNG sheets open
and show what they were given.
"""

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from benchmarks.geneval.confusion import color_confusion, confusions, count_confusion
from benchmarks.geneval.prompts import official_records
from benchmarks.geneval.rules import Detection, verdict
from benchmarks.scores.figures import edit_strips, sample_grid, scorecard_plot
from benchmarks.scores.page import Report, add_champion, extremes, write_report
from benchmarks.scores.scorecard import ExampleScore, Scorecard, scorecard, write_scorecard
from data.errors import UserError
from data.files import write_text
from tasks.release.review import write_review
from tests.candidates import PARAMS

HOW = {"seed": 0, "resamples": 200, "confidence": 0.95}
NAMES = ("student", "base", "local teacher", "ground_truth", "shuffled")


def picture(index: int) -> np.ndarray:
    return np.full((24, 24, 3), (index * 7 % 256, 90, 160), dtype=np.uint8)


def rows(model: str, level: int) -> list[ExampleScore]:
    found = []
    for index in range(12):
        correct = float(index % 6 <= level)
        reasons = () if correct else ("expected circle >= 1, found 0 <& more>",)
        found.append(
            ExampleScore(
                model, "geneval", "colors", f"c{index}", 0, index, {"correct": correct}, reasons, f"images/c{index}.png"
            )
        )
        values = {"O": min(10.0, index * 0.5 + level), "exact": 0.0}
        found.append(
            ExampleScore(model, "gedit", "subject-add", f"a{index}", 0, index, values, (), f"images/a{index}.png")
        )
    return found


@pytest.fixture
def results(tmp_path):
    """(folder with images, cards, candidate rows, prompts)."""
    scores = {name: rows(name, level) for name, level in zip(NAMES, (3, 4, 2, 5, 0), strict=True)}
    expected = {
        "colors": {(f"c{index}", 0) for index in range(12)},
        "subject-add": {(f"a{index}", 0) for index in range(12)},
    }
    teachers = {"student": {"t2i": scores["base"], "local_edit": scores["local teacher"]}}
    cards = {
        name: scorecard(name, found, teachers.get(name, {}), expected, {"weights": f"digest-of-{name}"}, **HOW)
        for name, found in scores.items()
    }
    (tmp_path / "images").mkdir()
    for index, score in enumerate(scores["student"]):
        Image.fromarray(picture(index)).save(tmp_path / score.image)
    prompts = {score.example_id: f"a photo of <{score.example_id}> & co" for score in scores["student"]}
    return tmp_path, cards, scores["student"], prompts


def page(results, **changes) -> str:
    folder, cards, scores, prompts = results
    values = {"cards": cards, "scores": scores, "prompts": prompts, "folder": folder, **changes}
    write_report(folder / "report.html", Report(**values))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_says_on_which_split_it_was_drawn(results):
    folder, cards, scores, prompts = results
    texts = {}
    for split in ("dev", "eval"):
        drawn = replace(cards["student"], identities={"sampling": {"split": split, "steps": 16}})
        texts[split] = page((folder, {**cards, "student": drawn}, scores, prompts))
    assert "drawn on the dev split, on which numbers are chosen: not to be reported" in " ".join(texts["dev"].split())
    assert "drawn on the eval split." in texts["eval"] and "not to be reported" not in texts["eval"]
    assert "drawn on the" not in page(results)  # images made elsewhere have no split


def test_the_page_needs_no_other_file(results):
    text = page(results)
    sources, links = re.findall(r'src="([^"]*)"', text), re.findall(r'href="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [
        link for link in links if not link.startswith("#") and not (results[0] / link).is_file()
    ]  # a file is offered, never needed
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert Image.open(BytesIO(base64.b64decode(sources[0].split(",")[1]))).size == (24, 24)
    assert 'name="viewport"' in text


def test_every_figure_stands_on_the_page_with_its_interval(results):
    text = page(results)
    for name, card in results[1].items():
        assert name in text
        for path, metric in card.metrics.items():
            digits = 2 if path.startswith("gedit") else 3
            shown = f"{metric.mean:.{digits}f}</a>" if name == "student" else f"{metric.mean:.{digits}f}"
            assert f"{shown}<br><small>[{metric.low:.{digits}f}, {metric.high:.{digits}f}] n={metric.n}</small>" in text
    assert text.count("<svg") == len(results[1]["student"].metrics)
    assert "digest-of-student" in text


def anchored(text: str) -> dict[str, str]:
    """id -> what stands from there to the next heading."""
    return {part.split('"', 1)[0]: part for part in re.split(r'<h[2-4] id="', text)[1:]}


def test_every_figure_leads_to_the_images_that_earned_it(results):
    folder, cards, scores, _ = results
    others = {name: (folder, [replace(score, model=name) for score in scores]) for name in ("base", "shuffled")}
    text = page(results, others=others)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and {link[1:] for link in re.findall(r'href="(#[^"]*)"', text)} <= set(ids)
    parts, rows_of = anchored(text), {}
    for name in cards:
        line = text[text.index(f"<td>{name}</td>", text.index('id="figures"')) :].split("</tr>")[0]
        rows_of[name] = dict(
            zip(
                cards["student"].metrics,
                re.findall(r"<td>(?!student|base|shuffled|ground)(.*?)<br>", line),
                strict=False,
            )
        )
    for name in ("student", "base", "shuffled"):
        for path, category in (
            ("geneval/colors", "colors"),
            ("gedit/subject-add", "subject-add"),
            ("geneval/overall", "colors"),
            ("gedit/average", "subject-add"),
        ):
            (target,) = re.findall(r'href="#([^"]*)"', rows_of[name][path])
            assert parts[target].count('<div class="one"') == 12 and f"{name}, {category}</h4>" in parts[target]
    assert "href" not in rows_of["ground_truth"]["geneval/colors"]
    first = parts[re.findall(r'href="#([^"]*)"', rows_of["student"]["gedit/subject-add"])[0]]
    values = [float(value) for value in re.findall(r'<b class="[a-z]*">([0-9.]+)</b>', first)]
    assert values == sorted(score.values["O"] for score in scores if score.category == "subject-add")  # worst first
    assert first.index("images/a0.png") < first.index("images/a11.png")


def test_a_page_that_would_be_too_large_links_other_models_images_and_says_so(results, monkeypatch):
    others = {name: (results[0], [replace(score, model=name) for score in results[2]]) for name in ("base", "shuffled")}
    assert page(results, others=others).count('<div class="one"') == 72
    monkeypatch.setattr("benchmarks.scores.page.MOST_IMAGES", 48)
    text = page(results, others=others)
    assert (
        text.count('<div class="one"') == 48
        and "The values of shuffled are links to their images: the page would hold more than 48 images." in text
    )
    places = anchored(text)
    links = [
        link
        for name, part in places.items()
        if name.startswith("m2-")
        for link in re.findall(r'<a href="(images/[^"]*)"><b', part)
    ]
    assert sorted(links) == sorted(
        score.image for score in results[2]
    )  # every value still leads to the image that earned it


def test_large_images_become_small_ones(results):
    folder = results[0]
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (600, 900, 3), dtype=np.uint8)).save(folder / "images/c0.png")
    text = page(results)
    shown = [
        Image.open(BytesIO(base64.b64decode(uri))).size
        for uri in re.findall(r'src="data:image/webp;base64,([^"]*)"', text)
    ]
    assert sorted(shown) == [(112, 75), (320, 213)] or shown == [
        (112, 75)
    ]  # among all; and large where it is one of the best or worst
    (folder / "images/c0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c0\.png: not a readable image"):
        page(results)


def test_differences_and_notes_stand_on_the_page(results):
    row = {
        "a": "student",
        "b": "base",
        "path": "gedit/average",
        "difference": -0.5,
        "low": -0.9,
        "high": -0.1,
        "p": 0.01,
        "n": 12,
        "discordant": 7,
    }
    text = page(
        results,
        comparisons=[row, {**row, "path": "gedit/subject-add", "low": -1.0, "high": 0.3}],
        notes=["The <judge> has drifted"],
    )
    assert (
        '<td class="bad">-0.50</td><td>[-0.90, -0.10]</td>' in text
        and '<td class="">-0.50</td><td>[-1.00, +0.30]</td>' in text
    )
    assert "The &lt;judge&gt; has drifted" in text
    assert "Paired differences" not in page(results)


# --- what was asked and what was found --------------------------------------------------------------------------------


def test_the_champion_is_set_beside_the_candidate_later(results):
    text, cards = page(results), results[1]
    row = {"difference": -0.5, "low": -0.9, "high": -0.1, "p": 0.01, "n": 12}
    found = add_champion(text, cards["student"], cards["base"], "3", {"gedit/average": row}, "score/")
    assert (
        "champion, version 3" in found
        and '<td class="bad">-0.50<br><small>[-0.90, -0.10] n=12</small></td><td>0.01</td>' in found
    )
    section = found[found.index("Against the champion") : found.index("By category</h2>")]
    for path in ("geneval/overall", "gedit/subject-add"):
        digits = 2 if path.startswith("gedit") else 3
        mean, theirs = (f"{cards[name].metrics[path].mean:.{digits}f}" for name in ("student", "base"))
        (target,) = re.findall(
            rf'<td><a href="#(m0-[^"]*)">{mean}</a><br>', section[section.index(f"<td>{path}</td>") :].split("</tr>")[0]
        )
        assert f'id="{target}"' in found and f"<td>{theirs}<br>" in section
    assert (
        'href="images/' in text
        and 'href="images/' not in found
        and 'href="score/images/' in found
        and 'href="#figures"' in found
    )
    theirs = cards["base"].metrics["geneval/overall"].mean
    for page_of, expected in (
        ("file:///runs/3/report.html", "file:///runs/3/report.html#m0-"),
        ("http://h/#/runs/3/report.html", 'http://h/#/runs/3/report.html"'),
    ):
        linked = add_champion(text, cards["student"], cards["base"], "3", None, "score/", page_of)
        assert re.search(rf'<td><a href="{re.escape(expected)}[^>]*>{theirs:.3f}</a>', linked)
    assert "no paired difference" in add_champion(text, cards["student"], cards["base"], "3", None, "")
    with pytest.raises(UserError, match="no place for the champion"):
        add_champion(found, cards["student"], cards["base"], "3", None, "")


def test_a_review_page_exists_exactly_while_there_is_a_champion(results, tmp_path):
    cards = results[1]
    champion = {"version": "2", "scorecard": cards["base"].to_json(), "scores": None}
    assert write_review(tmp_path, PARAMS, champion) is None  # no page was made
    write_scorecard(tmp_path / "reports/scorecard.json", cards["student"])
    write_text(tmp_path / "reports/score/report.html", page(results))
    found = write_review(tmp_path, PARAMS, champion)
    assert found == tmp_path / "reports/review.html" and "champion, version 2" in found.read_text(encoding="utf-8")
    assert write_review(tmp_path, PARAMS, None) is None and not found.exists()


def verdicts(cases):
    """Rows and records from (record, detections), through the real verdict, so that its words and their reading stay
    together.
    """
    scores, records = [], {}
    for index, (record, found) in enumerate(cases):
        outcome = verdict(record, found)
        scores.append(
            ExampleScore(
                "m", "geneval", record["tag"], f"x{index}", 0, 0, {"correct": float(outcome.correct)}, outcome.reasons
            )
        )
        records[f"x{index}"] = record
    return scores, records


def things(*colors: str) -> list[Detection]:
    return [Detection("circle", color, 0.99, (0, 0, 9, 9)) for color in colors]


def test_counts_are_confused_as_the_verdict_found_them():
    record = {
        "tag": "counting",
        "prompt": "three circles",
        "include": [{"class": "circle", "count": 3}],
        "exclude": [{"class": "circle", "count": 4}],
    }
    scores, records = verdicts([(record, {"circle": things(*["red"] * found)}) for found in (3, 3, 2, 0, 5)])
    assert count_confusion(scores, records) == {"3": {"3": [0, 1], "2": [2], "0": [3], "5": [4]}}
    assert count_confusion(scores, {}) == {} and color_confusion(scores, records) == {}


def test_colours_are_confused_as_the_verdict_saw_them():
    one = {"tag": "colors", "prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    square = Detection("square", "green", 0.99, (20, 0, 29, 9))
    two = {
        "tag": "color_attr",
        "prompt": "a red circle and a blue square",
        "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
    }
    scores, records = verdicts(
        [
            (one, {"circle": things("red")}),
            (one, {"circle": things("blue")}),
            (one, {}),
            (two, {"circle": things("red"), "square": [square]}),
        ]
    )
    assert color_confusion(scores, records) == {
        "blue": {"green": [3]},
        "red": {"red": [0, 3], "blue": [1], "nothing": [2]},
    }


def test_the_confusions_stand_on_the_page_and_lead_to_an_image(results):
    records = {f"c{index}": {"include": [{"class": "circle", "count": 1, "color": "red"}]} for index in range(12)}
    text = page(results, confusions=confusions(results[2], records))
    assert "Which colour" in text and "How many things" not in text
    assert re.search(r'<td class="hit"><a href="#e0">8</a></td>', text) and re.search(
        r'<td class="miss"><a href="#e\d+">4</a></td>', text
    )
    assert "Which colour" not in page(results)


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
    assert [score.example_id for score in worst] == ["a0", "a1"] and [score.example_id for score in best] == [
        "a11",
        "a10",
    ]
    assert extremes(edits[::-1], 2) == (worst, best)
    worst, best = extremes(edits[:3], 5)
    assert len(worst) == 2 and len(best) == 1
    failed = replace(edits[5], status="refused", values={})
    assert extremes([*edits[:5], failed], 1)[0] == [failed]


def shown_examples(text: str) -> dict[str, str]:
    """Category -> what the section of the worst and best images says of it."""
    part = text[text.index('<h2 id="examples">') : text.index('<h2 id="images">')]
    return {piece.split("<", 1)[0]: piece for piece in part.split("<h3>")[1:]}


def test_failures_are_shown_only_where_something_failed(results):
    folder, cards, scores, prompts = results
    shown = shown_examples(page(results))
    assert '<p class="note">4 failures in 12</p>' in shown["colors"]
    assert shown["colors"].count('<div class="card failure">') == 2 and shown["colors"].count("failure: correct 0") == 2
    assert "expected circle &gt;= 1" in shown["colors"] and shown["colors"].count("best: correct 1") == 2
    perfect = [
        replace(score, values={"correct": 1.0} if score.benchmark == "geneval" else {"O": 9.0}, reasons=())
        for score in scores
    ]
    perfect = [replace(score, values={"O": 9.5}) if score.example_id == "a3" else score for score in perfect]
    shown = shown_examples(page((folder, cards, perfect, prompts)))
    for category in ("colors", "subject-add"):
        assert '<p class="note">no failures in 12</p>' in shown[category]
        assert "failure:" not in shown[category] and "card failure" not in shown[category]
    assert "lowest" not in shown["colors"] and shown["colors"].count('<div class="card best">') == 2  # all alike
    assert shown["subject-add"].count("lowest: O 9<") == 2 and "best: O 9.5<" in shown["subject-add"]
    broken = [replace(score, status="refused", values={}, reasons=()) for score in perfect]
    shown = shown_examples(page((folder, cards, broken, prompts)))
    assert "12 failures in 12" in shown["colors"] and 'card best"' not in shown["colors"]


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
    sample_grid(
        images, ["a photo of a red circle on a white background", "two", "three"], tmp_path / "grid.png", columns=2
    )
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    shares = [(sheet == color).all(1).mean() for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    assert min(shares) > 0.05 and max(shares) == pytest.approx(min(shares), rel=0.05)
    with pytest.raises(UserError, match="3 images with 1 titles"):
        sample_grid(images, ["one"], tmp_path / "grid.png")
    with pytest.raises(UserError, match="0 images"):
        sample_grid([], [], tmp_path / "grid.png")


def test_strips_show_source_teacher_and_student_in_this_order(tmp_path):
    red, green, blue = (
        np.full((24, 24, 3), color, dtype=np.uint8) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))
    )
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


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="the time to open a page is measured in Chromium, which is not installed"
)
def test_the_full_set_s_page_opens_in_under_two_seconds(tmp_path):
    """553 prompts, four images each."""
    rng, rows_, expected = np.random.default_rng(0), [], {}
    (tmp_path / "images").mkdir()
    for index, record in enumerate(official_records()):
        for k in range(4):
            name = f"images/{index}-{k}.jpg"
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(tmp_path / name, quality=85)
            correct = float((index + k) % 3 > 0)
            rows_.append(
                ExampleScore(
                    "m",
                    "geneval",
                    record["tag"],
                    str(index),
                    k,
                    4 * index + k,
                    {"correct": correct},
                    () if correct else ("why",),
                    name,
                )
            )
            expected.setdefault(record["tag"], set()).add((str(index), k))
    prompts = {str(index): record["prompt"] for index, record in enumerate(official_records())}
    card = scorecard("m", rows_, {}, expected, {}, **HOW)
    write_report(tmp_path / "report.html", Report(cards={"m": card}, scores=rows_, prompts=prompts, folder=tmp_path))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('<div class="one"') == 2212 and len(text) < 25e6
    clock = '<script>addEventListener("load",()=>{document.title="opened "+Math.round(performance.now())})</script>'
    (tmp_path / "timed.html").write_text(text + clock, encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path / 'timed.html'}",
    ]
    times = []
    for _ in range(3):
        dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        times.append(int(re.search(r"<title>opened (\d+)</title>", dumped).group(1)))
    assert min(times) < 2000, times


def test_files_appear_whole(results):
    page(results)
    assert not [path for path in results[0].iterdir() if path.name.startswith(".")]
