"""Property: a tiny real checkpoint of either family goes through encode, validate, distill, absorb and sampling, T2I
and edits, on one base in memory.

And the student learns what its teacher does on the student's own states.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.micro import MicroScorer
from benchmarks.params import BenchmarkParams
from data.errors import UserError, UserErrors
from data.files import read_json
from data.microworld import World
from data.records import Example, read_examples, write_examples
from model.backbones import TRANSFORMER, load_backbone
from model.checkpoint import Ema
from model.compute.execution import prepare_networks
from model.compute.optimizer import build_optimizer
from model.compute.settings import ExecutionParams
from model.distill import distill
from model.examples import load_buckets
from model.fields.base import velocity_mse
from model.fields.guided import Guided
from model.fields.mean import Mean
from model.networks.network import NetworkField, add_adapter, visiting
from model.networks.student import load_student, merged_weights, sampled, start_student
from model.networks.teachers import BASE, load_base, load_teachers, read_records, save_teacher
from model.randomness import noise_for
from model.rollout import euler_grid, roll_out_to_query
from model.route import Route, Router
from model.setup import Setup
from tasks.checks.plan import Size, memory, waiting_memory
from tasks.params.sections import BackboneParams, PretrainedParams, RoutingParams, SamplingParams
from tasks.scoring.sampling import Scoring, draw_field, evaluation_set
from tasks.stages import absorb as absorbing
from tasks.stages import distill as distilling
from tasks.stages import encode as encoding
from tasks.stages import validate as validating
from tests.tiny import EXECUTION, NOBODY, disturb, loop_params
from tests.tiny_families import CHANNELS, MAX_TOKENS, PIXELS, edit_config, save_family

FAMILIES = ("sd3", "zimage")
EDGE = 16  # px: 8 x 8 latents
RANK, ALPHA = 4, 8
WORLD = World(("circle", "square"), ("red", "green"), ("white", "gray"), ("plain", "night"), 3, 8)
MICRO_DETECTOR = BenchmarkParams("micro", "", "cpu", batch=4, workers=1, scheduler="")
CATEGORIES = {"t2i": "single_object", "local_edit": "subject-add"}
LONG = (
    "a red circle and a blue square and a green triangle and a yellow cross on a white background and two black "
    "circles over it at night"
)


@dataclass(frozen=True)
class Home:
    family: str
    curated: Path
    teachers: Path
    encoded: Path

    @property
    def backbone(self) -> BackboneParams:
        return BackboneParams(self.family, None, PretrainedParams("float32", "cpu", EDGE, MAX_TOKENS, offload=False))


SIZES = [(32, 32), (48, 24), (24, 48)]


def picture(name: str, width: int, height: int) -> Image.Image:
    """Noise on coarse squares: what a resize blurs, a cut moves."""
    coarse = np.random.default_rng(list(name.encode())).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def save_curated(folder: Path) -> None:
    """Three sizes: a square, a landscape twice as wide, and one that EXIF turns upright."""
    (folder / "images").mkdir(parents=True)
    examples = []
    for capability, category in CATEGORIES.items():
        for row in range(8):
            split, name = ("train", "eval", "dev")[max(0, row // 2 - 1)], f"{capability}-{row}"
            size = SIZES[row % 3]
            paths = {}
            for part in ("source", "target") if capability != "t2i" else ("target",):
                image, exif = picture(f"{name}-{part}", *size), Image.Exif()
                if row % 3 == 2:
                    image, exif[0x0112] = image.rotate(90, expand=True), 6  # stored on its side
                paths[part] = f"images/{name}-{part}.png"
                image.save(folder / paths[part], exif=exif)
            prompt = (
                LONG
                if row == 0
                else f"a {['red', 'green', 'blue'][row % 3]} circle" + " on a white background" * (row % 2)
            )
            examples.append(
                Example(name, split, capability, category, prompt, **paths, record={}, origin="tiny", row=row + 1)
            )
    write_examples(folder, examples)


def save_teachers(folder: Path, family: str, pipeline: Path) -> None:
    backbone = load_backbone(pipeline, max_tokens=MAX_TOKENS)
    save_teacher(folder / BASE, backbone, backbone.network, name=BASE, capability="t2i", kind="base", base_sha256=None)
    base = read_records(folder)[BASE].sha256
    network = backbone.network
    for name, capability, seed in (("realism", "t2i", 3), ("local", "local_edit", 4)):
        adapter = add_adapter(backbone, network, name, RANK, ALPHA, seed=seed)
        disturb({key: value for key, value in adapter.items() if "lora_B" in key}, 0.3, seed=seed)
        taught = {"name": name, "capability": capability, "kind": "adapter", "base_sha256": base}
        save_teacher(folder / name, backbone, network, **taught)
    whole = load_backbone(pipeline).network
    disturb(dict(whole.named_parameters()), 0.02, seed=5)
    save_teacher(folder / "whole", backbone, whole, name="whole", capability="t2i", kind="full", base_sha256=base)


@pytest.fixture(scope="module", params=FAMILIES)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp(request.param)
    made = Home(request.param, root / "curated", root / "teachers", root / "encoded")
    save_teachers(made.teachers, made.family, save_family(root / "pipeline", made.family))
    save_curated(made.curated)
    return made


@pytest.fixture(scope="module")
def encoded(home: Home) -> dict[str, Any]:
    return encoding.encode(
        encoding.Params(home.backbone, batch=3, cache=False),
        curated=home.curated,
        teachers=home.teachers,
        out=home.encoded,
    )


ROUTES = RoutingParams((Route("t2i", "realism", 1.0), Route("local_edit", "local", 1.0)))
LOOP: dict[str, Any] = {
    "execution": ExecutionParams(**EXECUTION),
    "seed": 0,
    "save_every": 1000,
    "batch": 4,
    "optimizer": "adamw",
    "schedule": "linear",
    "warmup": 0,
    "decay_from": 0.5,
    "ema": 0.0,
    "clip": 1.0,
    "query": "low",
    "resume_from": "",
    "accept_changed": (),
    "keep_every": 0,
    "validate_every": 0,
    "patience": 0,
    "cosine_every": 0,
    "held_out": 0,
    "max_gradient_norm": 0.0,
}


def distil_params(home: Home, **changes: Any) -> distilling.Params:
    numbers = {
        **LOOP,
        "start": BASE,
        "trainable": "adapter",
        "rank": RANK,
        "alpha": ALPHA,
        "steps": 2,
        "learning_rate": 1e-3,
        "rollout_steps": 4,
        "states": "on_policy",
        "routes_taken": "hard",
        "routing": ROUTES,
        "method": "danceopd",
        "query_states": 1,
    }
    return distilling.Params(backbone=home.backbone, **{**numbers, **changes})


# --- encoded once -----------------------------------------------------------------------------------------------------


def test_examples_keep_their_aspect_and_stand_upright(home: Home, encoded: dict[str, Any]) -> None:
    buckets = load_buckets(home.encoded, ["t2i", "local_edit"], read_records(home.teachers)[BASE].sha256)
    for bucket in buckets.values():
        shapes = [bucket.shape_of(row) for row in range(len(bucket))]
        assert [height / width for _, height, width in shapes] == [1.0, 0.5, 2.0, 1.0] and all(
            channels == CHANNELS for channels, _, _ in shapes
        )
        assert all(height * width <= (EDGE // PIXELS) ** 2 for _, height, width in shapes)
    bucket, backbone = buckets["local_edit"], load_base(home.teachers, need=("vae",), resolution=EDGE)
    for row in (0, 2):
        upright = picture(f"local_edit-{row}-source", *SIZES[row % 3]).resize(
            (bucket.shape_of(row)[2] * PIXELS, bucket.shape_of(row)[1] * PIXELS), Image.Resampling.LANCZOS
        )
        images = torch.from_numpy(np.array(upright)).permute(2, 0, 1)[None].float() / 255.0
        latents = backbone.encode_image(images)
        condition = bucket.at([row])
        assert condition.source is not None
        torch.testing.assert_close(condition.source, latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="one batch"):
        bucket.at([0, 1])


def test_prompts_are_what_the_backbone_reads_and_the_cut_ones_are_counted(home: Home, encoded: dict[str, Any]) -> None:
    backbone = load_base(home.teachers, need=("text",), max_tokens=MAX_TOKENS)
    buckets = load_buckets(home.encoded, ["t2i", "local_edit"], read_records(home.teachers)[BASE].sha256)
    for capability, edits in (("t2i", False), ("local_edit", True)):
        condition = buckets[capability].at([0, 3] if not edits else [0])
        fresh = backbone.encode_prompts([LONG, "a red circle on a white background"][: len(condition)], edits)
        torch.testing.assert_close(condition.embeds[:, : fresh.embeds.shape[1]], fresh.embeds, rtol=1e-5, atol=1e-5)
        assert (fresh.lengths is None) == (condition.lengths is None) == (home.family == "sd3")
        if fresh.lengths is not None and fresh.segments is not None:
            assert condition.lengths is not None and condition.lengths.tolist() == fresh.lengths.tolist()
            assert fresh.segments.shape[1] == (3 if edits else 1) and int(fresh.segments.sum()) == int(
                fresh.lengths.sum()
            )
    table = encoded["truncated prompts"]
    assert table["text_encoder_3" if home.family == "sd3" else "text_encoder"] >= 1
    assert encoded["aspect buckets"] == 3


def test_changed_data_encodes_only_what_is_new(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CACHE", tmp_path / "cache")
    params, curated = encoding.Params(home.backbone, batch=3, cache=True), tmp_path / "curated"
    save_curated(curated)
    first = encoding.encode(params, curated=curated, teachers=home.teachers, out=tmp_path / "one")
    again = encoding.encode(params, curated=curated, teachers=home.teachers, out=tmp_path / "two")
    assert first["encoded anew"]["images"] == 12 + 2 and again["encoded anew"] == {"prompts": 0, "images": 0}
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.safetensors")]
    assert {file.parts[0] for file in files} == {"train", "dev"}
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    picture("another", 32, 32).save(curated / "images" / "t2i-0-target.png")
    assert encoding.encode(params, curated=curated, teachers=home.teachers, out=tmp_path / "three")["encoded anew"] == {
        "prompts": 0,
        "images": 1,
    }


# --- one base in memory -----------------------------------------------------------------------------------------------


def storages(network: torch.nn.Module) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in network.state_dict().values()}


def test_adapter_teachers_student_and_frozen_student_share_one_base(home: Home, encoded: dict[str, Any]) -> None:
    alone = load_base(home.teachers, need=TRANSFORMER).network
    size = sum(parameter.numel() for parameter in alone.parameters())
    backbone, fields = load_teachers(home.teachers, [BASE, "realism", "local", "whole"], need=TRANSFORMER)
    student = start_student(backbone, fields, BASE, "adapter", RANK, ALPHA, seed=0)
    frozen = student.frozen_copy()
    shared = [fields[BASE], fields["realism"], fields["local"], student.field, frozen]
    assert len({id(field.network) for field in shared}) == 1
    per_adapter = sum(parameter.numel() for parameter in student.parameters.values())
    assert (
        sum(parameter.numel() for parameter in backbone.network.parameters()) == size + 4 * per_adapter
    )  # two teachers, the student, its frozen copy
    assert sum(parameter.numel() for parameter in fields["whole"].network.parameters()) == size and not storages(
        fields["whole"].network
    ) & storages(backbone.network)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters.values())
    # Switching leaves nothing of one in the other.
    bucket = load_buckets(home.encoded, ["t2i"], read_records(home.teachers)[BASE].sha256)["t2i"]
    x, t, condition = noise_for(1, 0, [0], bucket.shape_of(0)), torch.tensor([0.5]), bucket.at([0])
    with torch.no_grad():
        plain = NetworkField(load_base(home.teachers, need=TRANSFORMER), alone)(x, t, condition)
        for _ in range(2):
            assert not torch.allclose(fields["realism"](x, t, condition), plain, atol=1e-4)
            assert torch.equal(fields[BASE](x, t, condition), student.field(x, t, condition)) and torch.equal(
                frozen(x, t, condition), plain
            )


def test_training_never_loads_text_encoders_or_vae(home: Home) -> None:
    before = {id(value) for value in gc.get_objects() if isinstance(value, torch.nn.Module)}
    backbone, _ = load_teachers(home.teachers, [BASE, "local"], need=TRANSFORMER)
    made = {
        type(value).__module__.split(".")[0]
        for value in gc.get_objects()
        if isinstance(value, torch.nn.Module) and id(value) not in before
    }
    assert "transformers" not in made and backbone.vae is None
    with pytest.raises(RuntimeError, match="not loaded"):
        backbone.encode_prompts(["a red circle"])
    texts = load_base(home.teachers, need=("text", "vae"))
    assert all(parameter.is_meta for parameter in texts.network.parameters())  # encoding never loads the transformer


def test_an_offloaded_teacher_is_elsewhere_only_while_it_answers(home: Home, encoded: dict[str, Any]) -> None:
    """On a CPU the visit is a copy: it exists during the evaluation alone, and the weights at home are never
    written.
    """
    _, plain = load_teachers(home.teachers, ["whole"], need=TRANSFORMER)
    _, fields = load_teachers(home.teachers, ["whole"], offload=True, need=TRANSFORMER)
    field = fields["whole"]
    assert field.offload == torch.device("cpu") and plain["whole"].offload is None
    at_home, seen = storages(field.network), list[set[int]]()
    field.network.register_forward_hook(lambda module, *_: seen.append(storages(module)))
    bucket = load_buckets(home.encoded, ["t2i"], read_records(home.teachers)[BASE].sha256)["t2i"]
    x, t, condition = noise_for(1, 0, [0], bucket.shape_of(0)), torch.tensor([0.5]), bucket.at([0])
    with torch.no_grad():
        assert torch.equal(field(x, t, condition), plain["whole"](x, t, condition))
    assert len(seen) == 1 and not seen[0] & at_home and storages(field.network) == at_home
    with pytest.raises(ZeroDivisionError), visiting(field.network, torch.device("cpu")):
        raise ZeroDivisionError
    assert storages(field.network) == at_home


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_teachers_wait_on_the_host_and_the_plan_says_so(home: Home, offload: bool) -> None:
    """The meta device stands for a GPU: what training moves there is counted, and the plan tells these bytes."""
    backbone, fields = load_teachers(home.teachers, [BASE, "whole"], offload=offload, need=TRANSFORMER)
    student = start_student(backbone, fields, BASE, "adapter", RANK, ALPHA, seed=0)
    execution = ExecutionParams(**EXECUTION)
    assert execution.precision == "fp32"
    soft = Mean(tuple(fields.values()))
    teachers = [Guided(fields["whole"], 3.0), soft]
    prepare_networks(execution, torch.device("meta"), student.network, student.parameters.values(), teachers)
    networks = [backbone.network, fields["whole"].network]
    frozen = [value for network in networks for key, value in network.named_parameters() if "lora_" not in key]
    there = sum(value.nbytes for value in frozen if value.is_meta) / 1e9
    here = sum(value.nbytes for value in frozen if not value.is_meta) / 1e9
    size = Size(sum(value.numel() for value in fields["whole"].network.parameters()), 0, 0, 0, 0)
    pretrained = PretrainedParams("float32", "auto", EDGE, MAX_TOKENS, offload=offload)
    stage = SimpleNamespace(
        backbone=BackboneParams(home.family, None, pretrained),
        rank=RANK,
        trainable="adapter",  # type: ignore[arg-type]
    )
    kinds = {BASE: "base", "whole": "full"}
    told = memory({"distill": stage}, size, kinds)
    visit = here if offload else 0.0
    assert (here > 0) is offload and waiting_memory({"distill": stage}, size, kinds) == pytest.approx(here)
    assert told["base"] + told["full-checkpoint teachers"] == pytest.approx(there + visit)
    two = memory({"distill": stage}, size, {**kinds, "other": "full"})["full-checkpoint teachers"]
    assert two == pytest.approx((1 if offload else 2) * told["full-checkpoint teachers"])  # they visit in turn


def test_a_student_starts_from_the_mean_of_teachers_that_wait_elsewhere(home: Home) -> None:
    backbone, fields = load_teachers(home.teachers, [BASE, "whole"], offload=True, need=TRANSFORMER)
    backbone.network.to("meta")
    merged = merged_weights(fields[BASE], {"whole": fields["whole"]})
    assert merged.keys() == fields["whole"].network.state_dict().keys()
    assert all(value.is_meta for value in merged.values())


# --- the stages -------------------------------------------------------------------------------------------------------


def test_encode_validate_distill_absorb_sample(
    home: Home, encoded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampling = SamplingParams("eval", steps=2, guidance=2.0, images_per_prompt=1, seed=0, batch=4)
    validation = validating.Params(
        WORLD, home.backbone, sampling, ROUTES, MICRO_DETECTOR, NOBODY, seed=0, resamples=10, confidence=0.9, floors={}
    )
    validating.validate(
        validation,
        curated=home.curated,
        teachers=home.teachers,
        out=tmp_path / "validated",
        report=tmp_path / "validate.json",
    )
    report = read_json(tmp_path / "validate.json")
    assert report["passed"] and set(report["teachers"]) == {BASE, "realism", "local"}
    assert len(list((tmp_path / "validated" / "images" / "local").glob("*.png"))) == 2  # the eval split's edits
    folders = {"encoded": home.encoded, "teachers": home.teachers}
    looked = {"validate_every": 2, "held_out": 1}  # whose pictures need the VAE, which training itself does without
    summary = distilling.distill(distil_params(home, **looked), **folders, out=tmp_path / "student")
    assert summary["steps"] == 2
    routes = (  # guidance and steps of a teacher in one pass, and steps of the student itself
        Route("t2i", "realism", 1.0, {"guidance": 2.0, "steps": {"steps": 2, "substeps": 2}}),
        Route("local_edit", "student", 1.0, {"steps": {"steps": 2, "substeps": 2}}),
    )
    numbers = {**LOOP, **looked, "steps": 2, "learning_rate": 1e-3, "rollout_steps": 2}
    absorption = absorbing.Params(backbone=home.backbone, routes=routes, **numbers)
    absorbing.absorb(absorption, **folders, student=tmp_path / "student", out=tmp_path / "absorbed")
    for out in ("student", "absorbed"):
        pictures = sorted(path.name for path in (tmp_path / out / "validation").iterdir())
        assert pictures == ["local_edit-00000002.png", "t2i-00000002.png"]
    backbone = load_base(home.teachers, **home.backbone.loading())
    student = load_student(tmp_path / "absorbed", backbone, read_records(home.teachers)[BASE].sha256)
    evaluation = evaluation_set(read_examples(home.curated), home.curated, "eval")
    record = read_json(tmp_path / "absorbed" / "student.json")
    assert (record["steps"], record["guidance"]) == (2, 1.0)
    assert read_json(tmp_path / "student" / "student.json")["steps"] is None
    scoring = Scoring(backbone, sampling, MicroScorer(WORLD), tmp_path, lambda n=1, **_: None)
    drawn = list(draw_field(student.field, evaluation, scoring, model="absorbed", how=sampled(record, 16)))
    sizes = {
        example.id: Image.open(tmp_path / path).size
        for batch in drawn
        for example, path in zip(batch.examples, batch.paths, strict=True)
    }
    assert sizes["t2i-4"] == sizes["t2i-5"] == (EDGE, EDGE)
    assert (
        sizes["local_edit-4"][0] == 2 * sizes["local_edit-4"][1]
        and 2 * sizes["local_edit-5"][0] == sizes["local_edit-5"][1]
    )


LEARNING = {"sd3": (40, 1e-3), "zimage": (100, 4e-4)}  # steps, learning rate: the tiny Z-Image bends more


@pytest.mark.parametrize("capability", ["t2i", "local_edit"])
def test_a_student_overfits_its_teacher_on_its_own_states(home: Home, encoded: dict[str, Any], capability: str) -> None:
    """The velocity gap to a perturbed copy of the base, on states of the student's own rollouts from noise it never
    saw, falls by nine tenths and more.
    """
    backbone, fields = load_teachers(home.teachers, [BASE, "whole"], need=TRANSFORMER)
    whole = load_buckets(home.encoded, [capability], read_records(home.teachers)[BASE].sha256)[capability]
    bucket = replace(
        whole,
        prompts=whole.prompts[:1],
        source=whole.source and [whole.source[0]],
        target=whole.target and [whole.target[0]],
    )
    student, grid = (
        start_student(backbone, fields, BASE, "all", RANK, ALPHA, seed=0),
        euler_grid(4, backbone.scheduler["shift"]),
    )

    def gap(field: NetworkField) -> float:
        total = 0.0
        for step in range(3):
            query = roll_out_to_query(
                field, noise_for(77, step, range(4), bucket.shape_of(0)), bucket.at([0] * 4), grid, torch.arange(4)
            )
            with torch.no_grad():
                total += float(
                    velocity_mse(
                        field(query.x_t, query.t, bucket.at([0] * 4)),
                        fields["whole"](query.x_t, query.t, bucket.at([0] * 4)),
                    )
                )
        return total

    before, (steps, rate) = gap(student.field), LEARNING[home.family]
    params = loop_params(steps=steps, batch=8, learning_rate=rate, decay_from=0.5, rollout_steps=4, query="uniform")
    optimizers, ema = (
        build_optimizer("adamw", student.parameters.items(), rate, student.backbone),
        Ema(dict(student.parameters), 0.0),
    )
    router = Router((Route(capability, "whole", 1.0),))
    setup = Setup(student, {"whole": fields["whole"]}, {capability: bucket}, router, params, grid, seed=0)
    losses = [step.loss for step in distill(setup, optimizers, ema)]
    after = gap(student.field)
    assert before > 1e-4 and after <= 0.1 * before, (
        f"gap {before:.5f} -> {after:.5f}, loss {losses[0]:.5f} -> {losses[-1]:.5f}"
    )


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_base_that_reads_no_source_refuses_edits(tmp_path: Path) -> None:
    narrow = Home("sd3", tmp_path / "curated", tmp_path / "teachers", tmp_path / "encoded")
    save_teachers(narrow.teachers, "sd3", save_family(tmp_path / "pipeline", "sd3", wide=False))
    save_curated(narrow.curated)
    with pytest.raises(UserError, match="reads no source image"):
        encoding.encode(
            encoding.Params(narrow.backbone, batch=3, cache=False),
            curated=narrow.curated,
            teachers=narrow.teachers,
            out=narrow.encoded,
        )
    sampling = SamplingParams("eval", steps=2, guidance=2.0, images_per_prompt=1, seed=0, batch=4)
    numbers: dict[str, Any] = {"seed": 0, "resamples": 10, "confidence": 0.9}
    validation = validating.Params(
        WORLD, narrow.backbone, sampling, ROUTES, MICRO_DETECTOR, NOBODY, **numbers, floors={"local": 1.0}
    )
    with pytest.raises(UserErrors) as caught:
        validating.validate(
            validation,
            curated=narrow.curated,
            teachers=narrow.teachers,
            out=tmp_path / "out",
            report=tmp_path / "report.json",
        )
    assert (
        sum("'local_edit' edits" in fault for fault in caught.value.faults) == 1
        and sum("floors.local" in fault for fault in caught.value.faults) == 1
    )
    edit_config(tmp_path / "teachers" / "local" / "teacher.json", latent_shape=[CHANNELS + 1, 12, 12])
    with pytest.raises(UserErrors, match="latent_shape"):
        load_teachers(narrow.teachers, ["local"])
