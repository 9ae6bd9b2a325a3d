"""A worker's run is a clean checkout of a known revision with its params committed; what it makes is pushed to its own
branch and can be fetched anywhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import Outage, UserError, UserErrors
from data.files import write_json, write_text
from data.yaml_files import read_yaml
from tasks.release import provenance
from tasks.running import workspace
from tasks.running.repro import StageFailed, reproduce

COMMAND = (sys.executable, "-m", "dvc")
DVC = """stages:
  double:
    cmd: python -c "print(2 * int(open('number').read()), file=open('doubled', 'w'))"
    deps: [number]
    params: [seed]
    outs: [doubled]
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


PRESET = "seed: 5 # why\n\ndistill: {steps: 9} # how long\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small project in a bare repository; a worker that is built from it, its DVC remote a folder."""
    project = tmp_path / "project"
    (project / "presets").mkdir(parents=True)
    (project / ".dvc").mkdir()
    remote = f"['remote \"s3\"']\n    url = {tmp_path / 'remote'}\n"
    write_text(project / ".dvc" / "config", f"[core]\n    analytics = false\n    remote = s3\n{remote}")
    write_text(project / ".dvc" / ".gitignore", "/config.local\n/tmp\n/cache\n")
    files = {
        "params.yaml": "seed: 0\ndistill: {steps: 3}\n",
        "presets/other.yaml": PRESET,
        "number": "21",
        "dvc.yaml": DVC,
    }
    for name, text in {**files, "requirements.lock": "torch==2\n", ".gitignore": "/doubled\n"}.items():
        write_text(project / name, text)
    git(project, "init", "--quiet", "--initial-branch=main")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "-m", "project")
    bare = tmp_path / "repository.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(project), str(bare))
    monkeypatch.setenv(workspace.REPOSITORY, str(bare))
    monkeypatch.setenv(workspace.WORKSPACES, str(tmp_path / "workspaces"))
    monkeypatch.setattr(workspace, "PROJECT", project)
    yield bare
    for file in workspace._held.values():
        file.close()
    workspace._held.clear()


def opened(
    name: str = "quick-run", revision: str | None = None, preset: str | None = None, **overrides: object
) -> workspace.Workspace:
    return workspace.open_workspace(
        revision, preset, {key.replace("__", "."): value for key, value in overrides.items()}, name, lambda text: None
    )


def test_a_run_is_a_clean_commit_with_its_params(repository: Path) -> None:
    work = opened("Quick run: 7!", preset="other", distill__steps=4)
    assert (work.path / "params.yaml").read_text(encoding="utf-8") == PRESET.replace("9", "4")
    state = provenance.git_state(work.path)
    assert (state["git.known"], state["git.dirty"], state["git.sha"]) == (True, False, work.sha)
    assert work.branch == "runs/Quick-run-7" and git(work.path, "rev-parse", "HEAD~1") == git(
        repository, "rev-parse", "main"
    )
    assert (
        git(repository, "branch", "--format=%(refname:short)") == "main"
    )  # nothing is pushed before there is a result


def test_results_are_pushed_data_first_and_pulled_anywhere(repository: Path, tmp_path: Path) -> None:
    work = opened()
    subprocess.run([*COMMAND, "repro", "--quiet"], cwd=work.path, check=True)
    write_json(work.path / "reports" / "scorecard.json", {"metrics": {}})
    pushed = workspace.push(work, lambda text: None)
    assert pushed == {
        "branch": "runs/quick-run",
        "git.sha": git(repository, "rev-parse", "runs/quick-run"),
        "repository": str(repository),
    }
    workspace.close(work)
    assert not work.path.exists()
    git(tmp_path, "clone", "--quiet", "--branch", "runs/quick-run", str(repository), "elsewhere")
    subprocess.run([*COMMAND, "pull", "--quiet"], cwd=tmp_path / "elsewhere", check=True)
    assert (tmp_path / "elsewhere" / "doubled").read_text(encoding="utf-8") == "42\n"
    shutil.rmtree(tmp_path / "workspaces")  # another machine: nothing is done again
    again = opened("next", revision="runs/quick-run")
    told = subprocess.run([*COMMAND, "repro"], cwd=again.path, capture_output=True, text=True, check=True).stdout
    assert "didn't change, skipping" in told


def test_the_same_run_goes_on_where_it_stopped_and_others_have_their_own_folder(repository: Path) -> None:
    first = opened("one", seed=3)
    write_text(first.path / "runs" / "distill" / "state", "half")
    write_text(first.path / "number", "torn")  # a tracked file that was being written
    second = opened("two", seed=3)
    assert second.path == first.path and (second.path / "runs" / "distill" / "state").exists()
    assert (second.path / "number").read_text(encoding="utf-8") == "21" and second.branch == "runs/two"
    assert opened("three", seed=4).path != first.path
    git(first.path.parent.parent / "project", "push", "--quiet", str(repository), "HEAD:refs/heads/extra")
    assert opened("four", seed=3, revision="extra").path == first.path  # the commit counts, not its name


@pytest.mark.parametrize("revision", ["nowhere", "0" * 40, "--upload-pack=touch", "main..extra", "refs/../x"])
def test_unknown_code_is_not_run(repository: Path, revision: str) -> None:
    with pytest.raises(UserError, match="revision = "):
        opened(revision=revision)


def test_mistakes_are_told_before_anything_is_left(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserErrors) as told:
        opened(sede=1, distill__step=2, distill__steps__x=3)
    assert len(told.value.faults) == 3
    with pytest.raises(UserError, match="choose of other"):
        opened(preset="none")
    assert not [path for path in (tmp_path / "workspaces").iterdir() if path.is_dir() and path.name != "mirror.git"]
    write_text(workspace.PROJECT / "requirements.lock", "torch==3\n")
    with pytest.raises(UserError, match="build the worker's image"):
        opened()
    monkeypatch.delenv(workspace.REPOSITORY)
    with pytest.raises(UserError, match="revision = 'main'"):
        opened(revision="main")
    work = opened(distill__steps=8)
    assert (work.path, work.is_checkout) == (workspace.PROJECT, False) and workspace.push(work, lambda text: None) == {}
    workspace.close(work)
    assert read_yaml(workspace.PROJECT / "params.yaml")["distill"] == {"steps": 8}


def test_a_folder_has_one_run_at_a_time(repository: Path) -> None:
    work = opened()
    held = workspace._held.pop(work.path)  # as another process holds it
    with pytest.raises(Outage):
        opened()
    held.close()
    assert opened().path == work.path


def test_a_repository_that_does_not_answer_is_worth_another_try(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(workspace.REPOSITORY, "http://ada:hunter2@127.0.0.1:9/repository.git")
    with pytest.raises(Outage) as told:
        opened()
    assert "hunter2" not in str(told.value)


def test_a_store_that_does_not_answer_loses_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The push is worth another try, no branch names data that is not in the store, and the same call finishes
    later.
    """
    work = opened()
    subprocess.run([*COMMAND, "repro", "--quiet"], cwd=work.path, check=True)
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    settings = work.path / ".dvc" / "config.local"
    right = settings.read_text(encoding="utf-8")
    write_text(settings, right + "['remote \"s3\"']\n    url = s3://danceopd/dvc\n")
    with pytest.raises(Outage):
        workspace.push(work, lambda text: None)
    assert git(repository, "branch", "--format=%(refname:short)") == "main"
    write_text(settings, right)
    assert workspace.push(work, lambda text: None)["branch"] == "runs/quick-run"


def test_a_record_of_the_run_cache_that_was_not_transferred_is_worth_another_try(
    repository: Path, tmp_path: Path
) -> None:
    """DVC itself would end well: the data is in the store, and another machine would do the stage again."""
    work = opened()
    subprocess.run([*COMMAND, "repro", "--quiet"], cwd=work.path, check=True)
    in_the_way = tmp_path / "remote" / "runs"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    with pytest.raises(Outage):
        workspace.push(work, lambda text: None)
    assert git(repository, "branch", "--format=%(refname:short)") == "main"
    in_the_way.unlink()
    assert workspace.push(work, lambda text: None)["branch"] == "runs/quick-run"
    (record,) = (path for path in in_the_way.rglob("*") if path.is_file())
    shutil.rmtree(tmp_path / "workspaces")
    text = record.read_bytes()
    record.unlink()
    record.symlink_to("nowhere")
    with pytest.raises(Outage):
        opened("next", revision="runs/quick-run")
    record.unlink()
    record.write_bytes(text)
    assert opened("next", revision="runs/quick-run").path.exists()


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_the_store_has_not_is_made_by_the_run(repository: Path, tmp_path: Path, folder: bool) -> None:
    """A branch may name data that nobody pushed, or that is gone from the store: nothing there is worth another try."""
    work = opened()
    if folder:
        text = (work.path / "dvc.yaml").read_text(encoding="utf-8")
        made = "__import__('pathlib').Path('doubled').mkdir(exist_ok=True); print(1, file=open('doubled/file', 'w'))"
        code = "print(2 * int(open('number').read()), file=open('doubled', 'w'))"
        write_text(work.path / "dvc.yaml", text.replace(code, made))
        assert made in (work.path / "dvc.yaml").read_text(encoding="utf-8")
    subprocess.run([*COMMAND, "repro", "--quiet"], cwd=work.path, check=True)
    git(work.path, "add", "--all")
    git(work.path, "commit", "--quiet", "-m", "never pushed")
    git(work.path, "push", "--quiet", str(repository), "HEAD:refs/heads/unpushed")
    shutil.rmtree(tmp_path / "workspaces")
    again = opened("next", revision="unpushed")
    assert not (again.path / "doubled").exists()


def test_a_wrong_key_is_not_tried_again(
    repository: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = opened()
    subprocess.run([*COMMAND, "repro", "--quiet"], cwd=work.path, check=True)
    write_text(tmp_path / "aws", "")
    for name, value in {"SECRET_ACCESS_KEY": "wrong", "CONFIG_FILE": str(tmp_path / "aws")}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    settings = work.path / ".dvc" / "config.local"
    write_text(settings, settings.read_text(encoding="utf-8") + f"['remote \"s3\"']\n    url = {s3}/dvc\n")
    with pytest.raises(StageFailed, match="signature"):
        workspace.push(work, lambda text: None)


def test_a_lock_that_another_process_holds_is_worth_another_try(repository: Path) -> None:
    work = opened()
    code = f"from dvc.repo import Repo\nwith Repo({str(work.path)!r}).lock:\n    print('held', flush=True)\n    input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(Outage, match="another run is at work"):
            reproduce("double", work.path, lambda text: None)
        other.communicate("\n")
    assert reproduce("double", work.path, lambda text: None)["stage"] == "double"


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        ("echo error: no answer >&2; exit 75", Outage, "double: no answer"),
        ("echo error: row 3: Connection refused is no prompt >&2; exit 2", StageFailed, "refused is no prompt"),
        ("kill -9 $$", StageFailed, "out of memory"),
        ("exit 3", StageFailed, "exited with 3"),
    ],
)
def test_a_stage_tells_by_its_exit_status_what_its_failure_was(
    repository: Path, command: str, kind: type[Exception], words: str
) -> None:
    work = opened()
    write_text(work.path / "dvc.yaml", json.dumps({"stages": {"double": {"cmd": command, "outs": ["doubled"]}}}))
    with pytest.raises(kind, match=words) as told:
        reproduce("double", work.path, lambda text: None)
    assert type(told.value) is kind
