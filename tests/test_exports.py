"""Property: an exported student, loaded by the library concerned, answers as the student does; a form that would not be
the student is refused; and it can be drawn from wherever it lies. Teachers that are brought along are checked against
the base they are put on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

from data.errors import UserError, UserErrors
from data.files import read_json
from model.backbones import load_backbone, parts
from model.fields.base import Condition, condition_of
from model.networks.adapters import Adapter, linear_modules, write_comfyui, write_peft
from model.networks.network import NetworkField, own_layers
from model.networks.student import RECORD as STUDENT_RECORD
from model.networks.student import save_student, start_student
from model.networks.teachers import ADAPTER_WEIGHTS, BASE, RECORD, load_base, load_teachers, read_records
from model.randomness import noise_for, torch_generator
from model.rollout import euler_grid
from model.rollout import sample as sample_latents
from tasks.__main__ import main
from tasks.params.sections import BackboneParams, PretrainedParams
from tasks.student import sample, sample_set
from tasks.student.export import cli, export
from tasks.student.exports import FORMS, comfyui
from tasks.student.exports.form import Form
from tasks.student.opening import Drawing, Model, draw, open_model
from tasks.weights.assembly import SourceParams, assemble
from tests.tiny import disturb, save_teachers
from tests.tiny_families import CHANNELS, save_family

RANK, ALPHA = 3, 6
SIZE = (CHANNELS, 6, 4)  # of latents: no square
PROMPTS = ["a red circle", "make it night and a blue cross on the background"]
FAMILIES = {
    "sd3": ("sd3", False),
    "sd3-edit": ("sd3", True),
    "zimage": ("zimage", True),
}  # name -> family, whether it edits
STEPS = 4


@dataclass(frozen=True)
class Project:
    """A project folder: weights/ as a user would bring them, data/teachers, and the students adapter/ (from an adapter)
    and whole/ (all parameters).
    """

    root: Path
    family: str
    edits: bool
    conditions: list[Condition]  # T2I and, where the family edits, an edit, of two prompts of different length
    base: list[torch.Tensor]  # the base's answers to them

    def model(self, name: str, **options: Any) -> Model:
        return open_model(name, self.root, **{"parts": (), **options})

    def answers(self, field: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        return answers(self.conditions, field)


def some_adapter(network: Any, layers: set[str], seed: int) -> Adapter:
    shapes, tensors = linear_modules(network), {}
    for slot, name in enumerate(sorted(layers)):
        out, into = shapes[name]
        tensors[f"{name}.lora_A.weight"] = (
            torch.randn(RANK, into, generator=torch_generator(seed, 0, slot, "A")) / into**0.5
        )
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, RANK, generator=torch_generator(seed, 0, slot, "B"))
    return Adapter(tensors, tuple(sorted(layers)), RANK, ALPHA)


def sources(**changes: Any) -> dict[str, SourceParams]:
    named = {
        BASE: SourceParams("t2i", "base", "weights/base", ""),
        "local": SourceParams("local_edit", "adapter", "weights/local", ""),
        "global": SourceParams("global_edit", "adapter", "weights/global/lora.safetensors", ""),
        "whole": SourceParams("edit", "full", "weights/whole", ""),
    }
    return {**named, **changes}


def bring(root: Path, family: str, edits: bool = True) -> None:
    """weights/: a pipeline, a PEFT folder, a ComfyUI file, a full checkpoint."""
    save_family(root / "weights" / "base", family, **({"wide": edits} if family == "sd3" else {}))
    backbone = load_backbone(root / "weights" / "base", need=("transformer",))
    write_peft(root / "weights" / "local", some_adapter(backbone.network, own_layers(backbone), seed=1))
    (root / "weights" / "global").mkdir()
    write_comfyui(
        root / "weights" / "global" / "lora.safetensors",
        some_adapter(backbone.network, own_layers(backbone), seed=2),
        family,
    )
    tensors = parts.plain_state(backbone.network)
    disturb(tensors, 0.02, seed=3)
    parts.save_pipeline(root / "weights" / "whole", root / "weights" / "base", backbone.network, tensors)


def make_students(root: Path) -> None:
    teachers = root / "data" / "teachers"
    for name, start, trainable in (("adapter", "local", "adapter"), ("whole", BASE, "all")):
        backbone, fields = load_teachers(teachers, [BASE, "local"], need=("transformer",))
        student = start_student(backbone, fields, start, trainable, RANK + 1, ALPHA, seed=4)
        disturb({key: value.detach() for key, value in student.parameters.items()}, 0.02, seed=5)
        save_student(
            root / name,
            student,
            {"base_sha256": read_records(teachers)[BASE].sha256, "rank": RANK + 1, "alpha": ALPHA, "teachers": {}},
        )


@torch.no_grad()
def answers(conditions: list[Condition], field: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    shape = SIZE if conditions[-1].source is None else tuple(conditions[-1].source.shape[1:])
    return [field(noise_for(8, 0, [0, 1], shape), torch.tensor([0.9, 0.2]), condition) for condition in conditions]


def made(root: Path, family: str) -> Project:
    backbone = load_base(root / "data" / "teachers", need=("transformer", "text"))
    shape = backbone.latent_shape if family == "micro" else SIZE
    conditions = []
    for edits in (False, True)[: 1 + backbone.supports_edits]:
        source = noise_for(7, 0, [0, 1], shape, "source") if edits else None
        conditions.append(
            condition_of(backbone.encode_prompts(PROMPTS, edits), backbone.encode_prompts([""], edits), source)
        )
    return Project(
        root, family, backbone.supports_edits, conditions, answers(conditions, NetworkField(backbone, backbone.network))
    )


@pytest.fixture(scope="module", params=FAMILIES)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp(request.param)
    bring(root, *FAMILIES[request.param])
    assemble(sources(), root / "data" / "teachers", root)
    make_students(root)
    return made(root, FAMILIES[request.param][0])


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("micro")
    save_teachers(root / "data" / "teachers")
    make_students(root)
    return made(root, "micro")


def assert_same(project: Project, model: Model, network: Any) -> None:
    """The library's network answers as the student does, and not as the base does."""
    expected = project.answers(model.student.field)
    for found, wanted in zip(
        project.answers(lambda *state: model.backbone.velocity(network.eval(), *state)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert max(float((one - other).abs().max()) for one, other in zip(project.base, expected, strict=True)) > 1e-3


@torch.no_grad()
def assert_same_pictures(model: Model, pipeline: Any) -> None:
    """The library's own pipeline, called as its users call it, draws the student's latents."""
    _, height, width = SIZE
    per, noise = model.backbone.pixels_per_latent, noise_for(9, 0, [0, 1], SIZE)
    pipeline.set_progress_bar_config(disable=True)
    unguided = {"sd3": 1.0, "zimage": 0.0}[model.backbone.name]
    levels = torch.linspace(1.0, 1.0 / STEPS, STEPS).tolist()
    found = pipeline(
        prompt=list(PROMPTS),
        num_inference_steps=STEPS,
        sigmas=levels,
        guidance_scale=unguided,
        height=per * height,
        width=per * width,
        latents=noise.clone(),
        output_type="latent",
        max_sequence_length=model.backbone.max_tokens,
    ).images
    condition = condition_of(model.backbone.encode_prompts(PROMPTS), model.backbone.encode_prompts([""]))
    expected = sample_latents(
        model.student.field, noise, condition, euler_grid(STEPS, float(model.backbone.scheduler["shift"]))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - noise).abs().max()) > 0.1


def is_refused(project: Project, model: Model, kind: str, out: Path) -> bool:
    """An SD3 that reads a source has no pipeline that runs it: said in one message, and nothing is written."""
    if (project.family, project.edits) != ("sd3", True):
        return False
    with pytest.raises(UserError, match=f"--format {kind}: this SD3 reads a source image .*export it as merged"):
        export(model, kind, out)
    assert not out.exists()
    return True


@pytest.mark.parametrize("student", ["adapter", "whole"])
def test_diffusers_loads_the_pipeline(project: Project, student: str, tmp_path: Path) -> None:
    model = project.model(student, parts=("text",))
    if is_refused(project, model, "diffusers", tmp_path / "out"):
        return
    made = export(model, "diffusers", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert_same(project, model, pipeline.transformer)
    assert_same_pictures(model, pipeline)
    files = read_json(tmp_path / "out" / "export.json")["files"]
    assert (
        len(files) == made["files"]
        and "model_index.json" in files
        and files.keys()
        == {
            path.relative_to(tmp_path / "out").as_posix()
            for path in (tmp_path / "out").rglob("*")
            if path.is_file() and path.name != "export.json"
        }
    )


@pytest.mark.parametrize("student", ["adapter", "whole"])
def test_diffusers_loads_the_merged_network(project: Project, student: str, tmp_path: Path) -> None:
    model = project.model(student)
    export(model, "merged", tmp_path / "out")
    assert_same(project, model, type(model.student.network).from_pretrained(str(tmp_path / "out")))


def test_peft_loads_the_adapter(project: Project, tmp_path: Path) -> None:
    model = project.model("adapter")
    export(model, "peft", tmp_path / "out")
    assert_same(
        project,
        model,
        PeftModel.from_pretrained(load_backbone(model.origin, need=("transformer",)).network, str(tmp_path / "out")),
    )


def test_the_familys_pipeline_loads_the_single_file(project: Project, tmp_path: Path) -> None:
    model = project.model("adapter", parts=("text",))
    if is_refused(project, model, "comfyui", tmp_path / "out"):
        return
    export(model, "comfyui", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(str(model.origin))
    pipeline.load_lora_weights(str(tmp_path / "out"), weight_name=comfyui.FILE)
    assert_same(project, model, pipeline.transformer)
    assert_same_pictures(model, pipeline)


@pytest.mark.parametrize("kind", ["peft", "comfyui"])
def test_a_student_that_is_no_adapter_is_not_exported_as_one(project: Project, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained all its parameters.*merged|reads a source image.*merged"):
        export(project.model("whole"), kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("student", ["adapter", "whole"])
def test_the_micro_student_is_exported_as_what_the_libraries_open(micro: Project, student: str, tmp_path: Path) -> None:
    """Diffusers' own class does not open its folder; so such an export is refused, with the forms that work."""
    model = micro.model(student)
    with pytest.raises((AttributeError, ValueError, OSError), match="MicroPipeline"):
        DiffusionPipeline.from_pretrained(str(model.origin))
    forms = r"export it as merged \(the network\)" + (r" or peft \(the adapter\);" if student == "adapter" else ";")
    for kind in ("diffusers", "comfyui"):
        with pytest.raises(UserError, match=f"--format {kind}: the micro world's .* {forms}"):
            export(model, kind, tmp_path / kind)
        assert not (tmp_path / kind).exists()
    export(model, "merged", tmp_path / "merged")
    assert_same(micro, model, SD3Transformer2DModel.from_pretrained(str(tmp_path / "merged")))
    if student == "adapter":
        export(model, "peft", tmp_path / "peft")
        base = load_base(micro.root / "data" / "teachers").network
        assert_same(micro, model, PeftModel.from_pretrained(base, str(tmp_path / "peft")))


def test_a_new_form_is_one_entry(
    micro: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path, model: Model, dtype: torch.dtype) -> None:
        shapes = {name: list(value.shape) for name, value in model.student.parameters.items()}
        (folder / "shapes.json").write_text(json.dumps(shapes))

    def refusal(model: Model) -> str:
        return "" if model.student.adapter else "shapes are those of an adapter"

    monkeypatch.setitem(FORMS, "shapes", Form("the shapes", "json.load", refusal, write))
    monkeypatch.chdir(micro.root)
    assert cli(["--model", "adapter", "--format", "shapes", "--out", str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "export.json")["files"].keys() == {"shapes.json"}
    with pytest.raises(UserError, match=r"--format shapes: shapes are .*: export it as merged \(the network\);"):
        cli(["--model", "whole", "--format", "shapes", "--out", str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"or shapes \(the shapes\);"):
        cli(["--model", "adapter", "--format", "diffusers", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        cli(["--help"])
    assert "shapes      the shapes" in capsys.readouterr().out


def test_images_are_drawn_and_depend_on_seed_and_row_alone(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = project.model("adapter", parts=("text", "vae"))
    if not project.edits:
        with pytest.raises(UserError, match="reads no source image"):
            draw(model, ["make it night"], [np.zeros((16, 16, 3), np.uint8)], Drawing(steps=1), batch=1)
        return
    picture = np.random.default_rng(0).integers(0, 255, (30, 44, 3), dtype=np.uint8)
    how = Drawing(steps=2, seed=3, resolution=16)
    prompts, given = ["a red circle", "make it night", "a blue cross"], [None, picture, None]
    together = draw(model, prompts, given, how, batch=4)
    assert [one.shape for one in together][::2] == [(16, 16, 3)] * 2 and together[1].shape[0] < together[1].shape[1]
    alone = draw(model, prompts, given, how, batch=1)
    assert all(
        int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1 for one, other in zip(together, alone, strict=True)
    )
    assert not np.array_equal(together[0], draw(model, prompts[:1], given[:1], replace(how, seed=4), batch=1)[0])
    monkeypatch.chdir(project.root)
    Image.fromarray(picture).save(tmp_path / "source.png")
    line = [
        "--model",
        "adapter",
        "--prompt",
        "make it night",
        "--source",
        str(tmp_path / "source.png"),
        "--count",
        "2",
        "--steps",
        "2",
        "--resolution",
        "16",
    ]
    assert sample.cli([*line, "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000.png",
        "001.png",
        "grid.png",
        "samples.json",
    ]
    with Image.open(tmp_path / "out" / "grid.png") as grid, Image.open(tmp_path / "out" / "000.png") as first:
        assert grid.width > 3 * first.width and grid.height > first.height  # source and two answers, with their titles


def test_a_student_with_all_its_weights_is_sampled_without_its_base(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the base is not loaded, noise goes to the student's device, not to the base's."""
    monkeypatch.chdir(project.root)
    loading = PretrainedParams("float32", "cpu", resolution=16, max_tokens=40, offload=False)
    backbone = BackboneParams(project.family, None, loading)  # type: ignore[arg-type]
    sampler = sample_set.Sampler("whole", "", backbone, 2)
    jobs = [sample_set.Job(f"{seed}", "a red circle", seed, f"{seed}.png") for seed in range(3)]
    counts = sample_set.sample_set(sampler, jobs, {}, out=tmp_path / "out", batch=2, workers=1, scheduler="")
    assert counts == {"images": 3, "made": 3} == {"images": 3, "made": len(list((tmp_path / "out").glob("*.png")))}


def test_a_student_is_drawn_from_as_it_was_trained(project: Project, tmp_path: Path) -> None:
    """At its own resolution and prompt length, whatever the family's usual ones are; a size without positions is one
    message.
    """
    backbone, fields = load_teachers(
        project.root / "data" / "teachers", [BASE], need=("transformer",), resolution=16, max_tokens=40
    )
    student = start_student(backbone, fields, BASE, "adapter", RANK, ALPHA, seed=0)
    save_student(
        tmp_path / "small",
        student,
        {"base_sha256": read_records(project.root / "data" / "teachers")[BASE].sha256, "rank": RANK, "alpha": ALPHA},
    )
    model = open_model(str(tmp_path / "small"), project.root)
    assert model.backbone.max_tokens == 40
    (picture,) = draw(model, ["a red circle"], [None], Drawing(steps=1), batch=1)
    assert picture.shape == (16, 16, 3)
    for resolution, words in ((256, "positions for edges of up to"), (18, "expected multiples of 4 px")):
        with pytest.raises(UserError, match=words):
            draw(model, ["a red circle"], [None], Drawing(steps=1, resolution=resolution), batch=1)


def test_the_command_line_exports_and_samples_the_micro_student(
    micro: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(micro.root)
    assert cli(["--model", "adapter", "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    prompts = ["--prompt", "a red circle", "--prompt", "a blue square"]
    assert sample.cli(["--model", "whole", *prompts, "--out", str(tmp_path / "out"), "--steps", "2"]) == 0
    assert len(read_json(tmp_path / "out" / "samples.json")["images"]) == 2
    unknown = ["--prompt", "a red zebra", "--prompt", "a wolf"]
    assert main(["sample", "--model", "whole", *unknown, "--out", str(tmp_path / "grey")]) == 2
    said = capsys.readouterr().err
    assert "'zebra' (prompt 'a red zebra')" in said and "'wolf'" in said and "nearest known words" in said
    assert not (tmp_path / "grey").exists()
    with pytest.raises(UserError, match=r"--count = 0.*--source is given 3 times"):
        sample.cli(["--model", "whole", "--prompt", "a", "--out", "x", "--count", "0", *["--source", "s.png"] * 3])
    with pytest.raises(UserError, match="expected a student"):
        cli(["--model", "data/teachers/base", "--format", "merged", "--out", str(tmp_path / "no")])
    shutil.copytree(micro.root / "adapter", tmp_path / "elsewhere" / "adapter")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="this student lies on the base .* which is not here"):
        cli(["--model", "adapter", "--format", "peft", "--out", str(tmp_path / "no")])
    line = ["--model", "adapter", "--format", "peft", "--out", str(tmp_path / "peft")]
    assert cli([*line, "--base", str(micro.root / "data/teachers/base")]) == 0


# --- teachers that are brought along ----------------------------------------------------------------------------------


def test_teachers_brought_along_are_loaded_on_one_base(project: Project) -> None:
    folder = project.root / "data" / "teachers"
    backbone, fields = load_teachers(folder, ["local", "global", "whole"], need=("transformer",))
    assert fields["local"].network is fields["global"].network is backbone.network is not fields["whole"].network
    records = read_records(folder)
    assert {name: (record.kind, record.rank, record.alpha) for name, record in records.items()} == {
        BASE: ("base", 0, 0),
        "local": ("adapter", RANK, ALPHA),
        "global": ("adapter", RANK, RANK),
        "whole": ("full", 0, 0),
    }
    assert all(
        record.base_id == "weights/base" and record.scheduler["shift"] == 3.0 and record.precision == "float32"
        for record in records.values()
    )
    assert "vae/config.json" in records[BASE].files and not any(
        name.startswith("transformer/diffusion") for name in records[BASE].files
    )


def refusal(project: Project, tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(UserErrors) as caught:
        assemble(sources(**changes), tmp_path / "teachers", project.root)
    assert not (tmp_path / "teachers").exists()
    return "\n".join(caught.value.faults)


def test_weights_of_another_model_are_refused_with_every_fault(project: Project, tmp_path: Path) -> None:
    """Another family's adapter, another scheduler, another base by record and by name, a lost key, a pickle, a bad
    hash: each one message, all at once.
    """
    other = "zimage" if project.family == "sd3" else "sd3"
    save_family(tmp_path / "other", other)
    foreign = load_backbone(tmp_path / "other", need=("transformer",))
    write_peft(tmp_path / "foreign", some_adapter(foreign.network, own_layers(foreign), seed=1))
    shutil.copytree(project.root / "weights" / "whole", tmp_path / "shifted")
    config = tmp_path / "shifted" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**read_json(config), "shift": 5.0}))
    shutil.copytree(project.root / "weights" / "whole", tmp_path / "short")
    weights = tmp_path / "short" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights)
    shutil.copytree(project.root / "data" / "teachers" / "local", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / RECORD).write_text(
        json.dumps({**read_json(tmp_path / "elsewhere" / RECORD), "base_sha256": "0" * 64})
    )
    kinds = {"foreign": "adapter", "short": "full", "elsewhere": "adapter", "shifted": "full"}
    wrong = {name: SourceParams("edit", kind, str(tmp_path / name), "") for name, kind in kinds.items()}
    told = refusal(project, tmp_path, **{name: wrong[name] for name in ("foreign", "short", "elsewhere")})
    assert "foreign: " in told and "keys of layers that the base does not have" in told
    assert "short: " in told and "missing key" in told
    assert "elsewhere: " in told and "it was trained on another base" in told
    shifted = refusal(project, tmp_path, shifted=wrong["shifted"])
    assert "shifted: scheduler" in shifted and "5.0" in shifted
    (tmp_path / "short" / "transformer" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    told = refusal(
        project, tmp_path, short=wrong["short"], local=SourceParams("local_edit", "adapter", "weights/local", "0" * 64)
    )
    assert "a pickle file" in told and "the params say 0000" in told


def test_what_is_missing_is_listed_before_anything_loads(project: Project, tmp_path: Path) -> None:
    gone = {name: SourceParams("edit", "adapter", f"weights/{name}", "") for name in ("one", "two")}
    told = refusal(project, tmp_path, **gone)
    assert told.count("no such file or folder; put the weights there") == 2 and "teachers.sources.one.uri" in told


def test_a_student_can_teach_the_next_one(project: Project, tmp_path: Path) -> None:
    """An adapter student is an adapter with its rank and alpha from student.json; one that trained all its parameters
    is a full checkpoint.
    """
    again = {
        BASE: sources()[BASE],
        "first": SourceParams("edit", "adapter", "adapter", ""),
        "second": SourceParams("edit", "full", "whole", ""),
    }
    assemble(again, tmp_path / "teachers", project.root)
    record = read_records(tmp_path / "teachers")["first"]
    assert (record.rank, record.alpha) == (RANK + 1, ALPHA)
    _, fields = load_teachers(tmp_path / "teachers", ["first", "second"], need=("transformer",))
    for name, student in (("first", "adapter"), ("second", "whole")):
        model = project.model(student)
        for found, wanted in zip(project.answers(fields[name]), project.answers(model.student.field), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    damaged = load_file(project.root / "adapter" / ADAPTER_WEIGHTS)
    shutil.copytree(project.root / "adapter", tmp_path / "damaged")
    save_file({name: value + 1 for name, value in damaged.items()}, tmp_path / "damaged" / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=f"not the file that {STUDENT_RECORD} names"):
        open_model(str(tmp_path / "damaged"), project.root)
