"""Defends: GEdit's arithmetic (minima, geometric mean, macro average, statuses never scores) and a micro judge that an
unedited copy cannot please.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.gedit.rules import Sample, aggregate, overall
from benchmarks.micro import MicroScorer, judge_edit, nearest_style
from benchmarks.scores.scorecard import STATUSES
from benchmarks.scores.scorer import CONTROLS, DrawnImage
from data.errors import UserError, UserErrors
from data.microworld import BACKGROUNDS, COLORS, SHAPES, STYLES, Scene, Thing, World, edit_example, render
from data.microworld import example as example_of
from data.randomness import numpy_generator
from data.records import BUCKETS, CAPABILITIES, EDITS, GENEVAL_TAGS, Example

WORLD = World()


def sample(name: str, category: str, sc: float, pq: float) -> Sample:
    return Sample(name, category, (sc, 10.0), (10.0, pq))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_sample_is_worth_the_geometric_mean_of_its_minima():
    assert overall((4.0, 9.0), (10.0, 9.0)) == (4.0, 9.0, 6.0)
    assert overall((0.0, 10.0), (10.0, 10.0)) == (0.0, 10.0, 0.0)


@pytest.mark.parametrize("bad", [(), (math.nan, 1.0), (11.0,), (-1.0,), (math.inf,)])
def test_what_is_no_score_is_refused(bad):
    with pytest.raises(UserError, match="finite numbers from 0 to 10"):
        overall(bad, (5.0,))
    with pytest.raises(UserErrors, match="x a"):
        aggregate([Sample("a", "x", (5.0,), bad)], ["x"])


def test_the_average_weighs_categories_and_o_is_averaged_per_sample():
    rows = [
        sample("a", "x", 4.0, 9.0),
        sample("b", "x", 9.0, 4.0),
        sample("c", "x", 0.0, 10.0),
        sample("a", "y", 10.0, 10.0),
    ]
    total = aggregate(rows, ["x", "y"])
    assert total.categories["x"].overall == pytest.approx(4.0)  # (6 + 6 + 0) / 3, not sqrt(13/3 * 23/3)
    assert total.categories["x"].sc == pytest.approx(13 / 3)
    assert total.average.overall == pytest.approx(7.0)  # (4 + 10) / 2; the mean over samples would be 5.5
    assert (total.average.n, total.average.coverage) == (4, 1.0)


def test_failures_are_bounds_and_not_scores():
    rows = [
        sample("a", "x", 8.0, 8.0),
        Sample("b", "x", status="refused"),
        Sample("c", "x", status="unparseable"),
        sample("d", "x", 4.0, 4.0),
    ]
    with pytest.raises(
        UserErrors, match=r"2 of 4 samples have a score \(\{'refused': 1, 'unparseable': 1\}\); at least 99%"
    ):
        aggregate(rows, ["x"])
    means = aggregate(rows, ["x"], allow_partial=True).categories["x"]
    assert (means.overall, means.low, means.high, means.coverage) == (6.0, 3.0, 8.0, 0.5)
    assert means.statuses == {"ok": 2, "refused": 1, "unparseable": 1}


def test_coverage_is_over_all_categories():
    """One failed row of 99 refuses no headline where the whole set has enough."""
    rows = [sample(str(index), "x", 8.0, 8.0) for index in range(98)] + [Sample("98", "x", status="refused")]
    total = aggregate([*rows, *(sample(str(index), "y", 4.0, 4.0) for index in range(60))], ["x", "y"])
    assert total.average.coverage == 158 / 159 and total.categories["x"].coverage < 0.99
    assert (total.average.low, total.average.high) == (
        pytest.approx((8 * 98 / 99 + 4) / 2),
        pytest.approx(((8 * 98 + 10) / 99 + 4) / 2),
    )
    with pytest.raises(UserErrors, match=r"98 of 99 samples have a score .*: judge the rest.*would be 7\.92 or 8\.02"):
        aggregate(rows, ["x"])


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
def test_a_failed_judgement_with_a_score_is_refused(status):
    with pytest.raises(UserErrors, match=status):
        aggregate([Sample("a", "x", (5.0,), (5.0,), status), sample("b", "x", 1.0, 1.0)], ["x"], allow_partial=True)


def test_all_faults_are_named_at_once():
    rows = [
        sample("a", "x", 5.0, 5.0),
        sample("a", "x", 5.0, 5.0),
        sample("b", "z", 5.0, 5.0),
        Sample("c", "x", status="lost"),
    ]
    with pytest.raises(UserErrors) as caught:
        aggregate(rows, ["x", "y"])
    text = str(caught.value)
    for part in ("x a: 2 judgements", "z b: not one of the categories", "'lost'", "y: none of 0 samples"):
        assert part in text


# --- the micro judge --------------------------------------------------------------------------------------------------


def edits(category: str, count: int = 60):
    rng = numpy_generator(0, 0, 0, category)
    return [edit_example(WORLD, rng, category, ("train", "eval")[index % 2]) for index in range(count)]


@pytest.mark.parametrize("category", EDITS)
def test_the_ground_truth_is_perfect_and_an_unedited_copy_fails(category):
    for record, source, target in edits(category):
        before = render(WORLD, source)
        truth = judge_edit(WORLD, record, before, render(WORLD, target))
        assert (truth.sc1, truth.sc2, truth.pq1, truth.pq2, truth.exact, truth.reasons) == (
            10.0,
            10.0,
            10.0,
            10.0,
            True,
            (),
        )
        copy = judge_edit(WORLD, record, before, before)
        assert (copy.sc1, copy.sc2, copy.exact) == (0.0, 10.0, False)
        assert copy.reasons


@pytest.mark.parametrize("category", EDITS)
def test_a_random_other_scene_scores_near_nothing(category):
    examples = edits(category)
    pairs = zip(examples, examples[1:] + examples[:1], strict=True)
    judged = [
        judge_edit(WORLD, record, render(WORLD, source), render(WORLD, other))
        for (record, source, _), (_, _, other) in pairs
    ]
    assert np.mean([overall((one.sc1, one.sc2), (one.pq1, one.pq2))[2] for one in judged]) < 2.0
    assert np.mean([one.exact for one in judged]) < 0.1


SOURCE = Scene("white", (Thing("circle", "red", 0), Thing("square", "blue", 8)))


def judged(category: str, prompt: str, target: Scene, touched: list[int], result: Scene):
    record = {
        "category": category,
        "prompt": prompt,
        "source": SOURCE.to_json(),
        "target": target.to_json(),
        "touched": touched,
    }
    return judge_edit(WORLD, record, render(WORLD, SOURCE), render(WORLD, result))


def with_things(*things: Thing) -> Scene:
    return replace(SOURCE, things=things)


CIRCLE, SQUARE = SOURCE.things
ADD = ("subject-add", "add a green cross", with_things(CIRCLE, SQUARE, Thing("cross", "green", 4)), [4])
REMOVE = ("subject-remove", "remove the red circle", with_things(SQUARE), [0])
REPLACE = ("subject-replace", "replace the red circle with a cross", with_things(Thing("cross", "red", 0), SQUARE), [0])
RECOLOR = (
    "color_alter",
    "change the color of the red circle to green",
    with_things(Thing("circle", "green", 0), SQUARE),
    [0],
)


@pytest.mark.parametrize(
    ("task", "result", "sc1", "untouched", "exact"),
    [
        (ADD, with_things(CIRCLE, SQUARE, Thing("cross", "green", 2)), 10.0, True, True),  # any free place will do
        (ADD, with_things(CIRCLE, SQUARE, Thing("cross", "yellow", 2)), 20 / 3, True, False),
        (ADD, with_things(CIRCLE, SQUARE, Thing("square", "yellow", 2)), 10 / 3, True, False),
        (ADD, with_things(CIRCLE, SQUARE, Thing("cross", "green", 2), Thing("cross", "green", 4)), 10.0, False, False),
        (ADD, with_things(CIRCLE, Thing("cross", "green", 8)), 0.0, False, False),  # on taken ground
        (ADD, with_things(CIRCLE, Thing("cross", "green", 2)), 10.0, False, False),  # the square was lost
        (REMOVE, with_things(CIRCLE), 0.0, False, False),  # the wrong one
        (REMOVE, with_things(Thing("cross", "green", 0), SQUARE), 5.0, True, False),
        (REMOVE, with_things(Thing("circle", "red", 4), SQUARE), 5.0, False, False),  # moved, not removed
        (REPLACE, with_things(Thing("cross", "green", 0), SQUARE), 20 / 3, True, False),
        (REPLACE, with_things(SQUARE), 10 / 3, True, False),
        (REPLACE, with_things(SQUARE, Thing("cross", "red", 4)), 10 / 3, False, False),
        (RECOLOR, with_things(Thing("square", "green", 0), SQUARE), 5.0, True, False),
        (RECOLOR, with_things(Thing("circle", "yellow", 0), SQUARE), 0.0, True, False),
        (RECOLOR, with_things(Thing("circle", "green", 0), Thing("square", "green", 8)), 10.0, False, False),
    ],
)
def test_each_half_right_edit_earns_its_share(task, result, sc1, untouched, exact):
    found = judged(*task, result)
    assert found.sc1 == pytest.approx(sc1) and found.exact is exact
    assert (found.sc2 == 10.0) is untouched
    assert found.pq1 == found.pq2 == 10.0


def test_losing_another_thing_costs_a_good_part_of_preservation():
    assert 1.0 < judged(*REMOVE, with_things()).sc2 < 6.0
    assert judged(*REMOVE, Scene("black", (SQUARE,))).sc2 == 0.0


def test_global_edits_are_asked_to_keep_every_thing():
    change = ("background_change", "change the background to black", replace(SOURCE, background="black"), [])
    assert (
        judged(*change, replace(SOURCE, background="pink")).sc1,
        judged(*change, replace(SOURCE, background="pink")).sc2,
    ) == (0.0, 10.0)
    lost = judged(*change, Scene("black", (CIRCLE,)))
    assert lost.sc1 == 10.0 and lost.sc2 == pytest.approx(20 / 3)  # F1 of one found and two wanted
    recolored = judged(*change, Scene("black", (CIRCLE, Thing("square", "green", 8))))
    assert recolored.sc2 == pytest.approx(5.0)


def test_the_style_is_read_whatever_the_scene():
    rng = numpy_generator(0, 0, 0, "styles")
    for _ in range(40):
        _, source, _ = edit_example(WORLD, rng, "style_change", "train")
        for style in STYLES:
            image = render(WORLD, replace(source, style=style)).astype(float) + 8 * rng.standard_normal(
                (WORLD.size, WORLD.size, 3)
            )
            assert nearest_style(WORLD, source, np.clip(image, 0, 255).astype(np.uint8)) == style
    night = ("style_change", "make it night", replace(SOURCE, style="night"), [])
    assert judged(*night, replace(SOURCE, style="inverted")).sc1 == 0.0


def test_smears_cost_quality():
    rng = numpy_generator(0, 0, 0, "smear")
    record, source, target = edits("subject-add")[0]
    image = render(WORLD, target)
    image[:, :8] = rng.integers(0, 256, (WORLD.size, 8, 3))
    found = judge_edit(WORLD, record, render(WORLD, source), image)
    assert found.pq1 < 6.0 and found.pq2 < 9.0


def test_records_without_what_they_need_are_named():
    image = render(WORLD, SOURCE)
    with pytest.raises(UserError, match="add it.*one touched cell"):
        judge_edit(
            WORLD,
            {
                "category": "subject-add",
                "prompt": "add it",
                "source": SOURCE.to_json(),
                "target": SOURCE.to_json(),
                "touched": [],
            },
            image,
            image,
        )
    with pytest.raises(UserError, match="motion_change"):
        judge_edit(
            WORLD, {"category": "motion_change", "source": SOURCE.to_json(), "target": SOURCE.to_json()}, image, image
        )


# --- from records to rows ---------------------------------------------------------------------------------------------


@pytest.fixture
def targets(tmp_path):
    """Eight examples a category, each with its target as if a model had drawn it."""
    drawn = []
    for category in (*GENEVAL_TAGS, *EDITS):
        rng = numpy_generator(1, 0, 0, category)
        for index in range(8):
            capability = next(name for name in BUCKETS if category in CAPABILITIES[name].categories)
            record, source, target = example_of(WORLD, rng, category, "eval")
            example = Example(f"{category}-{index}", "eval", capability, category, record["prompt"], record=record)
            files = [tmp_path / f"{example.id}{part}.png" for part in ("", "-source")]
            for scene, file in zip((target, source), files, strict=True):
                if scene is not None:
                    Image.fromarray(render(WORLD, scene)).save(file)
            drawn.append(DrawnImage("m", example, 0, 7, files[0].name, files[0], files[1] if source else None))
    return drawn


def test_the_controls_are_the_ends_of_the_scale(targets):
    scorer = MicroScorer(WORLD)
    rows = scorer.controls(targets, seed=0)
    truth, shuffled = ([row for row in rows if row.model == name] for name in CONTROLS)
    assert len(truth) == len(shuffled) == len(targets) and len(rows) == 2 * len(targets)
    for score in truth:
        assert score.values == (
            {"correct": 1.0} if score.benchmark == "geneval" else {"O": 10.0, "sc": 10.0, "pq": 10.0, "exact": 1.0}
        )
        assert score.image == f"{score.example_id}.png"
    for score in shuffled:
        assert score.image != f"{score.example_id}.png" and score.image.startswith(score.category)
    assert np.mean([score.values["correct"] for score in shuffled if score.benchmark == "geneval"]) < 0.35
    assert np.mean([score.values["O"] for score in shuffled if score.benchmark == "gedit"]) < 1.5
    assert scorer.controls(targets, seed=0) == rows != scorer.controls(targets, seed=1)
    with pytest.raises(UserError, match="single_object has a single example"):
        scorer.controls(targets[:1], seed=0)


def test_a_row_says_what_was_scored(targets):
    drawn = replace(targets[-1], k=3, image="a.png")
    (row,) = MicroScorer(WORLD).score([drawn])
    about = ("m", "gedit", drawn.example.category, drawn.example.id, 3, 7, "a.png", "ok")
    assert (row.model, row.benchmark, row.category, row.example_id, row.k, row.seed, row.image, row.status) == about
    with pytest.raises(UserError, match=f"{drawn.example.id}: an edit without a source image"):
        MicroScorer(WORLD).score([replace(drawn, source=None)])


def test_a_smaller_world_is_judged_as_well():
    world = World(shapes=SHAPES[:3], colors=tuple(COLORS), backgrounds=tuple(BACKGROUNDS), grid=4)
    for category in EDITS:
        rng = numpy_generator(2, 0, 0, category)
        for _ in range(10):
            record, source, target = edit_example(world, rng, category, "train")
            assert judge_edit(world, record, render(world, source), render(world, target)).exact
