"""`python -m tasks`: flags come from the function, a user's mistake is one message and status 2, and nothing
half-written stays behind.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks_cli
from data import commands
from data.errors import Outage, UserError, UserErrors
from data.files import read_json
from data.progress import callback, progress
from tasks import __main__ as cli
from tasks.environment import PROJECT

STAGE = '''"""Copies a number."""
from dataclasses import dataclass
from pathlib import Path
from data import commands
from data.errors import UserError, UserErrors
from data.files import write_json

@dataclass(frozen=True)
class Params:
    number: int

def copy(params: Params, *, source: Path, made_file: Path) -> dict:
    """Copies a number.

    More about numbers.
    """
    action(params)
    write_json(made_file, params.number)
    return {"number": params.number, "nested": {"path": made_file, "share": float("nan")}}
'''


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a small stage as the command line would: stage(action=..., number="3") -> exit status."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("tasks.stages.copy")
    monkeypatch.setitem(sys.modules, "tasks.stages.copy", module)
    exec(compile(STAGE, "copy.py", "exec"), module.__dict__)
    monkeypatch.setattr(cli, "STAGES", ("copy",))

    def run(*extra: str, number: str = "3", action: Callable[[Any], None] = lambda params: None) -> int:
        Path("params.yaml").write_text(f"copy: {{number: {number}}}\n", encoding="utf-8")
        module.__dict__["action"] = action
        return cli.main(["copy", "--source", "a", "--made-file", "out/b.json", *extra])

    return run


def raising(error: BaseException) -> Callable[[Any], None]:
    def action(params: Any) -> None:
        raise error

    return action


def test_a_stage_runs_and_its_summary_is_kept(stage: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert stage() == 0
    assert read_json("out/b.json") == 3
    assert read_json("runs/summaries/copy.json") == {"number": 3, "nested": {"path": "out/b.json", "share": None}}
    assert "copy: nested.path = out/b.json" in capsys.readouterr().out.splitlines()


def test_an_outage_has_an_exit_status_of_its_own(
    stage: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever started the command decides by it whether to try again."""
    assert stage(action=raising(Outage("the store does not answer"))) == 75
    assert capsys.readouterr().err == "error: the store does not answer\n"
    monkeypatch.setattr(benchmarks_cli, "_dispatch", raising(Outage("no answer")))
    assert benchmarks_cli.main([]) == 75
    monkeypatch.setattr(benchmarks_cli, "_dispatch", raising(UserError("no answer")))
    assert benchmarks_cli.main([]) == 2


def test_another_parameter_file(stage: Callable[..., int]) -> None:
    Path("other.yaml").write_text("copy: {number: 5}", encoding="utf-8")
    assert stage("--params", "other.yaml") == 0
    assert read_json("out/b.json") == 5


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 2, "x/y: no space left"),
        (OSError(errno.EACCES, "Permission denied", "x/y"), 2, "x/y: no permission"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x/y"), 2, "x/y: No such file"),
    ],
)
def test_each_ending_has_one_message_and_a_status(
    stage: Callable[..., int], capsys: pytest.CaptureFixture[str], error: BaseException, status: int, words: str
) -> None:
    assert stage(action=raising(error)) == status
    told = capsys.readouterr().err
    assert (
        told.startswith("error: ") and words in told and "Traceback" not in told and len(told.strip().splitlines()) == 1
    )
    assert not Path("out").exists() and not Path("runs").exists()


def test_a_defect_keeps_its_traceback(stage: Callable[..., int]) -> None:
    with pytest.raises(ZeroDivisionError):
        stage(action=raising(ZeroDivisionError()))


def test_a_typo_in_params_names_the_nearest_key(stage: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert stage(number="3, nubmer: 4") == 2
    assert "copy.nubmer = 4: unknown key; did you mean 'number'?" in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_is_told(
    stage: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").write_text("a file where the folder should be", encoding="utf-8")
    assert stage() == 2
    told = capsys.readouterr().err
    assert told.startswith("error: runs/summaries/") and len(told.splitlines()) == 1


def test_help_comes_from_the_function(stage: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        stage("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(
        part in text
        for part in ("Copies a number.", "More about numbers.", "--source PATH", "--made-file PATH", "--params FILE")
    )


def test_a_stage_that_breaks_the_convention_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.stages.contract import load_stage

    module = types.ModuleType("tasks.stages.copy")
    monkeypatch.setitem(sys.modules, "tasks.stages.copy", module)
    exec(compile(STAGE.replace("*, source: Path", "*, source: str"), "copy.py", "exec"), module.__dict__)
    with pytest.raises(TypeError, match="expected .params, ., path: Path"):
        load_stage("copy")


def test_unknown_commands_and_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distil"]) == 2
    assert "unknown command 'distil'; did you mean 'distill'?" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("collect", "score", "preset", "promote"))
    Path("presets").mkdir()
    Path("presets/small.yaml").write_text("a: 1", encoding="utf-8")
    assert cli.main(["preset", "smal"]) == 2
    assert capsys.readouterr().err == "error: unknown preset 'smal'; choose of small\n"


def test_a_preset_is_put_in_force_only_if_it_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tasks.checks import preflight

    monkeypatch.chdir(tmp_path)
    Path("presets").mkdir()
    Path("presets/small.yaml").write_text("# small\ndistill: {steps: 2, rate: 1}\n", encoding="utf-8")
    Path("params.yaml").write_text("distill: {steps: 9, rate: 1}\n", encoding="utf-8")

    def refuse(path: Path) -> None:
        raise UserErrors(f"{path}: 1 fault", ["distill.rate = 1: no"])

    monkeypatch.setattr(preflight, "check_all", refuse)
    assert cli.main(["preset", "small"]) == 2
    assert Path("params.yaml").read_text(encoding="utf-8") == "distill: {steps: 9, rate: 1}\n"
    monkeypatch.setattr(preflight, "check_all", lambda path: None)
    assert cli.main(["preset", "small"]) == 0
    assert Path("params.yaml").read_text(encoding="utf-8") == "# small\ndistill: {steps: 2, rate: 1}\n"
    assert "distill.steps: 9 -> 2\n" in capsys.readouterr().out


def test_termination_removes_temporary_files(tmp_path: Path) -> None:
    """A real SIGTERM in the middle of an atomic write, as a cancelled flow sends it."""
    program = (
        "import os, signal, sys; from pathlib import Path; from data.files import atomic_folder\n"
        "from tasks import __main__ as cli\n"
        "def work(arguments):\n"
        "    with atomic_folder(Path(sys.argv[1]) / 'out') as folder:\n"
        "        (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "cli._dispatch = work\n"
        "sys.exit(cli.main([]))\n"
    )
    command, environment = [sys.executable, "-c", program, str(tmp_path)], {**os.environ, "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (
        ended.returncode == 143 and ended.stderr.startswith("error: terminated") and len(ended.stderr.splitlines()) == 1
    )
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_is_no_defect_and_no_success() -> None:
    for program in ("tasks", "benchmarks"):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", program, "--help"]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False, cwd=PROJECT)
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (141, b"")


def test_another_pipe_that_breaks_keeps_its_traceback() -> None:
    def send() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            return pipe.write(b"x")

    with pytest.raises(BrokenPipeError):
        commands.run(send)


def test_the_overview_loads_nothing_heavy(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    heavy = ["torch", "mlflow", "prefect", "pandas", "diffusers", "pydantic", "boto3"]
    for program in ("tasks", "benchmarks"):
        text = f"import sys; from {program}.__main__ import main; main(['--help']); "
        ended = python("-c", f"{text}print([name for name in {heavy} if name in sys.modules])")
        assert ended.returncode == 0 and ended.stdout.strip().splitlines()[-1] == "[]", ended.stderr


def test_every_command_has_its_module() -> None:
    from benchmarks.__main__ import COMMANDS as STEPS

    files = {f"tasks/{module.replace('.', '/')}.py" for module, _ in cli.COMMANDS.values()}
    files |= {f"{module.replace('.', '/')}.py" for module, _ in STEPS.values()}
    assert [file for file in files if "\ndef cli(" not in (PROJECT / file).read_text(encoding="utf-8")] == []


# --- routes and teachers, before anything runs ------------------------------------------------------------------------


def test_routes_name_teachers_that_are_made_and_there(tmp_path: Path) -> None:
    from tasks.checks.preflight import require_teachers, teacher_faults

    params, folder = tmp_path / "params.yaml", tmp_path / "teachers"
    routes = [
        {"capability": "t2i", "teacher": "base"},
        {"capability": "local_edit", "teacher": "local"},
        {"capability": "global_edit", "teacher": "gobal"},
    ]
    document = {"routing": {"routes": routes}, "teachers": {"teachers": {"base": {}, "local": {}, "global": {}}}}
    params.write_text(json.dumps(document), encoding="utf-8")
    unknown = "routing.routes[2].teacher = 'gobal': no such teacher in section teachers; choose of base, local, global"
    assert teacher_faults(document, folder) == [unknown]  # not fetched yet: only the names can be judged
    with pytest.raises(UserError, match="dvc pull"):
        require_teachers(params, folder)
    (folder / "base" / "transformer").mkdir(parents=True)
    (folder / "base" / "transformer" / "weights.safetensors").touch()
    (folder / "local").mkdir()
    faults = teacher_faults(document, folder)
    assert len(faults) == 2 and faults[1] == unknown
    assert faults[0].startswith("routing.routes[1].teacher = 'local': no weights in ")
    with pytest.raises(UserErrors, match="not every routed teacher"):
        require_teachers(params, folder)
    assert teacher_faults({"routing": "nonsense"}, folder) == []


# --- progress ---------------------------------------------------------------------------------------------------------


def test_plain_progress_is_rare_but_always_ends_with_the_total(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("data.progress.time.monotonic", lambda: now[0])
    with progress("distill", 40) as advance:
        for _ in range(40):
            now[0] += 0.5
            advance(loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "distill: 10/40, 2/s, 0:15 left, loss 0.25",
        "distill: 20/40, 2/s, 0:10 left, loss 0.25",
        "distill: 30/40, 2/s, 0:05 left, loss 0.25",
        "distill: 40/40, 2/s, took 0:20, loss 0.25",
    ]


def test_the_adaptor_takes_counts_from_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("data.progress.time.monotonic", lambda: now[0])
    report = callback("curate")
    for done in (1, 2, 3, 4):
        report(done, 4, "images")
        now[0] += 4.0
    report(1, 1, "rows")
    assert capsys.readouterr().out.splitlines() == [
        "curate: images: 3/4, 2.67 s each, 0:03 left",
        "curate: images: 4/4, 3 s each, took 0:12",
        "curate: rows: 1/1, took 0:00",
    ]


def test_files_of_one_name_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """As the weights of several parts of a pipeline are, one after the other; two of them are equally large."""
    report = callback("publish")
    for done, total in ((5, 5), (7, 9), (9, 9), (4, 9), (9, 9)):
        report(done, total, "weights")
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"publish: weights: {total}/{total}" for total in (5, 9, 9)
    ]
