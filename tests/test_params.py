"""params.yaml is read strictly: what is filled is exactly what is written, and every fault of the file is named at once
with its dotted key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from data.errors import UserError, UserErrors
from data.microworld import World
from tasks.params.reading import check_sections, load_params, shared_fields
from tasks.params.sections import SHARED, SamplingParams

VALID = """
world: {shapes: [circle, square], colors: [red, green], backgrounds: [white, gray],
  styles: [plain, night], grid: 3, cell: 8}
backbone: {name: micro, micro: {width: 8, layers: 1, heads: 2, latent_channels: 4}, pretrained: null}
sampling: {split: eval, steps: 4, guidance: 1, images_per_prompt: 1, seed: 0, batch: 8}
routing: {routes: [{capability: t2i, teacher: base, weight: 1}]}
execution: {device: auto, processes: 1, micro_batch: 0, rollout_batch: 0, precision: fp32,
  compile: none, attention: auto, checkpointing: auto, merge_rollout: auto, shard_base: false}
benchmark: {detector: micro, classifier: "", device: cpu, batch: 8, workers: 1, scheduler: ""}
judge: {kind: none, model: "", wording: "", language: en, categories: [], repeats: 1, dtype: bfloat16,
  concurrency: 8, workers: 1, retry: [api_error],
  request: {temperature: 0, seed: 0, max_tokens: 512, text_first: true, image_format: png,
    resize: none, json_schema: false, extra: {}},
  server: {base_url: "http://127.0.0.1:1/v1", key_variable: "", provider: "", timeout_s: 1, tries: 1,
    wait_s: 0, longest_wait_s: 0, per_minute: 0},
  prices: null, highest_price: null}
train:
  steps: 2
  rate: 1e-3
  routes: [{capability: t2i, teacher: base, weight: 1}, {capability: edit, teacher: joint, weight: 0.5}]
  betas: [5, 2]
  optimizer: muon
  limit: null
  ema: true
  floors: {geneval/overall: .7}
"""


@dataclass(frozen=True)
class Route:
    capability: str
    teacher: str
    weight: float


@dataclass(frozen=True)
class Train:
    steps: int
    rate: float
    routes: list[Route]
    betas: tuple[float, float]
    optimizer: Literal["adamw", "muon"]
    limit: int | None
    ema: bool
    floors: dict[str, float]
    world: World

    def faults(self) -> list[str]:
        known = ("t2i", "edit")
        return [
            f"routes[{i}].capability = {route.capability!r}: unknown"
            for i, route in enumerate(self.routes)
            if route.capability not in known
        ]


@dataclass(frozen=True)
class OnlyShared:
    sampling: SamplingParams


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def faults_of(path: Path) -> list[str]:
    with pytest.raises(UserErrors) as caught:
        load_params(Train, "train", path)
    assert str(path) in str(caught.value)
    return caught.value.faults


def test_every_kind_of_value_is_filled(write: Any) -> None:
    params = load_params(Train, "train", write(VALID))
    assert params == Train(
        steps=2,
        rate=0.001,
        routes=[Route("t2i", "base", 1.0), Route("edit", "joint", 0.5)],
        betas=(5.0, 2.0),
        optimizer="muon",
        limit=None,
        ema=True,
        floors={"geneval/overall": 0.7},
        world=World(("circle", "square"), ("red", "green"), ("white", "gray"), ("plain", "night"), 3, 8),
    )
    assert isinstance(params.routes[0].weight, float) and isinstance(params.betas[0], float)
    assert params.world.size == 24


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("steps: 2", "stepz: 2", "train.stepz = 2: unknown key; did you mean 'steps'?"),
        ("  steps: 2\n", "", "train.steps: missing; expected a whole number"),
        ("steps: 2", "steps: 2.0", "train.steps = 2.0: expected a whole number"),
        ("steps: 2", "steps: true", "train.steps = true: expected a whole number"),
        ("steps: 2", "steps: two", "train.steps = 'two': expected a whole number"),
        ("steps: 2", "steps:", "train.steps = null: expected a whole number"),
        ("rate: 1e-3", "rate: .nan", "train.rate = nan: expected a finite number"),
        ("rate: 1e-3", "rate: .inf", "train.rate = inf: expected a finite number"),
        ("rate: 1e-3", "rate: false", "train.rate = false: expected a finite number"),
        ("weight: 0.5", "weight: heavy", "train.routes[1].weight = 'heavy': expected a finite number"),
        ("teacher: joint, ", "", "train.routes[1].teacher: missing; expected text"),
        ("capability: edit", "capability: video", "train.routes[1].capability = 'video': unknown"),
        ("[5, 2]", "[5]", "train.betas = [5]: expected a list of 2 values (a finite number, a finite number)"),
        ("[5, 2]", "5", "train.betas = 5: expected a list of 2 values (a finite number, a finite number)"),
        ("muon", "muno", "train.optimizer = 'muno': expected one of adamw, muon; did you mean 'muon'?"),
        ("limit: null", "limit: many", "train.limit = 'many': expected a whole number"),
        ("ema: true", "ema: yes", "train.ema = 'yes': expected true or false"),
        ("overall: .7", "overall: high", "train.floors.geneval/overall = 'high': expected a finite number"),
        (
            "  ema: true",
            "  ema: true\n  world: {}",
            "train.world = {}: this is the shared top-level section 'world'; remove it here",
        ),
        ("grid: 3", "grid: 1", "world.grid = 1: expected 2 or more"),
        ("cell: 8", "cell: 7", "world.cell = 7: expected one of 8"),
        ("[circle, square]", "[circle, 3]", "world.shapes[1] = 3: expected text"),
        (
            "[circle, square]",
            "[circle, squar]",
            "world.shapes[1] = 'squar': expected one of circle, square, triangle, c",
        ),
        ("[red, green]", "[red]", "world.colors = ['red']: expected two or more"),
        ("[plain, night]", "[outline, night]", "world.styles = ['outline', 'night']: expected \"plain\" among them"),
    ],
)
def test_each_fault_is_named(write: Any, old: str, new: str, fault: str) -> None:
    assert old in VALID
    assert any(text.startswith(fault) for text in faults_of(write(VALID.replace(old, new))))


def test_all_faults_come_at_once(write: Any) -> None:
    text = VALID.replace("steps: 2", "stepz: 2").replace("muon", "muno").replace("cell: 8", "cel: 8")
    assert len(faults_of(write(text))) == 5  # two unknown keys, the two keys that are missing for them, a wrong choice


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: [", "not valid YAML"),
        ("- 1", "expected sections"),
        ("", "expected sections"),
        (VALID + "\ntrain: {}", "'train' is given twice"),
        ("train: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_parameter_file(write: Any, text: str, words: str) -> None:
    path = write(text)
    with pytest.raises(UserError, match=words) as caught:
        load_params(Train, "train", path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_missing_section(write: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(Train, "train", tmp_path / "none.yaml")
    with pytest.raises(UserErrors, match="other: the section is missing; it needs the keys steps, rate"):
        load_params(Train, "other", write(VALID))


def test_the_whole_file_is_checked(write: Any) -> None:
    check_sections({"train": Train, "draw": OnlyShared}, write(VALID))
    broken = (
        VALID.replace("heads: 2", "heads: 3")
        .replace("guidance: 1", "guidance: 0.5")
        .replace("weight: 0.5", "weight: x")
        + "\ntrian: {}\n"
    )
    with pytest.raises(UserErrors) as caught:
        check_sections({"train": Train, "draw": OnlyShared}, write(broken))
    assert caught.value.faults == [
        "trian: unknown section; did you mean 'train'?",
        "backbone.micro.width = 8: expected a multiple of micro.heads = 3",
        "sampling.guidance = 0.5: expected 1 (unguided) or more",
        "train.routes[1].weight = 'x': expected a finite number",
    ]


def test_a_stage_of_shared_sections_needs_none_of_its_own(write: Any) -> None:
    assert load_params(OnlyShared, "draw", write(VALID)).sampling.steps == 4
    assert shared_fields(OnlyShared) == {"sampling": SHARED["sampling"]}
