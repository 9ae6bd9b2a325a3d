"""From a version to everything it came from and back: each digest is looked for where it should be, and what is gone or
altered is named.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import candidates
import pytest
from safetensors.numpy import save_file

from data.errors import UserError
from data.files import sha256_file, write_json
from tasks.checks import lineage
from tasks.release import submission
from tasks.release.provenance import DVC_PATHS, md5_of
from tasks.running import workspace
from tasks.s3 import objects as store
from tasks.s3 import transfer


def git(project: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=project, capture_output=True, text=True, check=True
    ).stdout.strip()


def object_path(store_folder: Path, md5: str) -> Path:
    return store_folder / "files" / "md5" / md5[:2] / md5[2:]


def keep(store_folder: Path, path: Path) -> None:
    """As `dvc commit` does: every file by its MD5, the folder as a list of them."""
    listing = []
    for file in sorted(path.rglob("*")):
        if file.is_file():
            md5 = str(md5_of(file))
            object_path(store_folder, md5).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, object_path(store_folder, md5))
            listing.append({"md5": md5, "relpath": file.relative_to(path).as_posix()})
    listing.sort(key=lambda one: one["relpath"])
    target = object_path(store_folder, str(md5_of(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(listing))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """A project under git and DVC with one champion. Data and weights are in DVC's cache; the teachers only in a
    remote.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DANCEOPD_LEDGER"):
            patch.delenv(name, raising=False)
        project = tmp_path_factory.mktemp("lineage") / "project"
        card = candidates.scorecard()
        for name in ("base", "local", "global"):
            folder = project / "data/teachers" / name
            folder.mkdir(parents=True)
            save_file(
                {"weight": candidates.np.full(3, len(name), candidates.np.float32)}, folder / "weights.safetensors"
            )
            card["identities"]["teachers"][name] = sha256_file(folder / "weights.safetensors")
        candidates.new_project(project, mlflow_database)
        candidates.write_candidate(project, card=card)
        for name in ("curated", "encoded"):
            (project / "data" / name).mkdir()
            write_json(project / "data" / name / "examples.json", [name])
        remote = project.parent / "remote"
        (project / ".dvc").mkdir()
        (project / ".dvc/config").write_text(
            "[core]\n    analytics = false\n['remote \"shared\"']\n    url = ../../remote\n"
        )
        for name, path in DVC_PATHS.items():
            keep(remote if name == "teachers" else project / ".dvc/cache", project / path)
        outs = [
            {"path": path, "md5": md5_of(project / path)}
            for path in (*DVC_PATHS.values(), "reports/scorecard.json", "reports/validate.json")
        ]
        write_json(project / "dvc.lock", {"stages": {"all": {"outs": outs}}})
        (project / "requirements.lock").write_text("torch==2.13.0\n")
        (project / ".gitignore").write_text("/mlflow/\n/data/\n/checkpoints/\n/reports/\n/.dvc/cache/\n/runs/\n")
        git(project, "init", "-q", "-b", "main")
        git(project, "add", ".")
        git(project, "commit", "-q", "-m", "first")
        candidates.judged(project)
        assert submission.submit_files(project, candidates.PARAMS, "auto", "ann", "nightly")["status"] == "champion"
        for name in ("data", "checkpoints"):  # another machine, or another run since: only DVC has them
            (project / name).rename(project.parent / name)
    return project


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "DANCEOPD_LEDGER"):
        monkeypatch.delenv(name, raising=False)
    return made


def places(project: Path, reference: str = "models:/danceopd@champion") -> dict[str, str | None]:
    version, lines = lineage.lineage(project, reference)
    assert version == "1"
    return {line.key: line.where for line in lines}


def test_everything_is_found_and_the_command_says_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = places(project)
    assert None not in found.values(), found
    names = {f"dvc.{name}.md5" for name in DVC_PATHS} | {
        f"teacher.{name}.sha256" for name in ("base", "local", "global")
    }
    names |= {
        "git.sha",
        "params.sha256",
        "env.lock.sha256",
        "dvc.lock.sha256",
        "gate.verdict.sha256",
        "weights.student.safetensors.sha256",
        "ledger 000001",
    }
    assert names <= set(found)
    assert (
        found["git.sha"] == "git, in main"
        and "remote (3 files)" in str(found["dvc.teachers.md5"])
        and "cache (1 files)" in str(found["dvc.curated.md5"])
    )
    monkeypatch.chdir(project)
    assert lineage.cli(["models:/danceopd@champion"]) == 0
    told = capsys.readouterr().out
    assert git(project, "rev-parse", "HEAD")[:40] in told and "promote by ann: automatic promotion: nightly" in told


def test_and_back(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    for part, key in (
        (git(project, "rev-parse", "HEAD")[:12], "git.sha"),
        (str(md5_of(project.parent / "data/curated")), "dvc.curated.md5"),
        (sha256_file(project.parent / "data/teachers/local/weights.safetensors")[:10], "teacher.local.sha256"),
        (sha256_file(project / "params.yaml"), "params.sha256"),
    ):
        assert lineage.cli([part]) == 0
        assert f"models:/danceopd/1  {key} = {part}" in capsys.readouterr().out
    assert lineage.cli(["0123456789"]) == 1
    for nonsense in ("abc", "models:/other@champion", "models:/danceopd@champion; ls"):
        with pytest.raises(UserError, match="not a version"):
            lineage.cli([nonsense])
    with pytest.raises(UserError, match="no such alias; have champion"):
        lineage.cli(["@previous"])
    with pytest.raises(UserError, match="no version 7"):
        lineage.cli(["7"])


@pytest.mark.parametrize(
    ("fault", "missing"),
    [
        ("object removed", {"dvc.curated.md5"}),
        ("object altered", {"dvc.curated.md5"}),
        ("teacher altered", {"dvc.teachers.md5", "teacher.local.sha256"}),
        ("params altered", {"params.sha256"}),
        ("weights altered", {"weights.student.safetensors.sha256"}),
    ],
)
def test_what_is_gone_or_altered_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, missing: set[str]
) -> None:
    if fault.startswith("object"):
        path = object_path(project / ".dvc/cache", str(md5_of(project.parent / "data/curated/examples.json")))
    elif fault == "teacher altered":
        path = object_path(
            project.parent / "remote", str(md5_of(project.parent / "data/teachers/local/weights.safetensors"))
        )
    else:
        path = next(
            (project / "mlflow/artifacts").rglob("params.yaml" if fault == "params altered" else "student.safetensors")
        )
    before = path.read_bytes()
    try:
        if fault == "object removed":
            path.unlink()
        else:
            path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert {key for key, where in places(project).items() if where is None} == missing
        monkeypatch.chdir(project)
        assert lineage.cli(["1"]) == 1
        assert f"missing: {', '.join(sorted(missing))}" in capsys.readouterr().out
    finally:
        path.write_bytes(before)


def test_what_was_never_cached_is_found_where_its_stage_left_it(project: Path) -> None:
    cached = object_path(project / ".dvc/cache", str(md5_of(project.parent / "checkpoints/absorbed")))
    before = cached.read_bytes()
    cached.unlink()
    try:
        assert places(project)["dvc.absorbed.md5"] is None
        (project / "checkpoints").symlink_to(project.parent / "checkpoints")
        assert places(project)["dvc.absorbed.md5"] == "checkpoints/absorbed (not cached)"
    finally:
        (project / "checkpoints").unlink()
        cached.write_bytes(before)


def test_a_revision_that_only_the_workers_repository_has_is_looked_up_there(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker commits on a branch of its own: whoever asks has never fetched it."""
    sha = git(project, "rev-parse", "HEAD")
    git(tmp_path, "clone", "-q", "--bare", str(project), "repository.git")
    git(tmp_path / "repository.git", "branch", "-q", "--move", "main", "runs/quick-run")
    (project / ".git").rename(tmp_path / "fetched")
    try:
        git(project, "init", "-q", "-b", "main")
        git(project, "commit", "-q", "--allow-empty", "-m", "somewhere else")
        monkeypatch.setenv(workspace.REPOSITORY, str(tmp_path / "repository.git"))
        monkeypatch.setenv(workspace.WORKSPACES, str(tmp_path / "workspaces"))
        found = places(project)
        assert (found["git.sha"], found["env.lock.sha256"]) == (
            "git, in runs/quick-run",
            f"requirements.lock at {sha[:12]}",
        ) and None not in found.values()
        git(tmp_path / "repository.git", "symbolic-ref", "HEAD", "refs/heads/main")
        git(tmp_path / "repository.git", "fetch", "-q", str(project), "main:main")
        git(tmp_path / "repository.git", "branch", "-q", "-D", "runs/quick-run")
        assert {key for key, where in places(project).items() if where is None} == {"git.sha", "env.lock.sha256"}
        monkeypatch.setenv(workspace.REPOSITORY, "http://ada:hunter2@127.0.0.1:9/repository.git")
        with pytest.raises(UserError, match="does not answer") as told:
            places(project)
        assert "hunter2" not in str(told.value)
    finally:
        shutil.rmtree(project / ".git")
        (tmp_path / "fetched").rename(project / ".git")


def test_a_remote_on_s3_is_looked_into(project: Path, s3: str, tmp_path: Path) -> None:
    """The same layout, below the remote's address."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(f"['remote \"s3\"']\n    url = {s3}/dvc\n")
    contents, md5 = lineage.Contents(tmp_path), str(md5_of(project.parent / "data/teachers"))
    assert contents.whole(md5) is None
    remote = project.parent / "remote"
    for path in (remote / "files").rglob("*"):
        if path.is_file():
            transfer.upload(path, f"{s3}/dvc/{path.relative_to(remote).as_posix()}")
    contents = lineage.Contents(tmp_path)
    assert contents.whole(md5) == f"{s3}/dvc (3 files)" and set(contents.listing(md5)) == {
        f"{name}/weights.safetensors" for name in ("base", "local", "global")
    }
    store.delete(f"{s3}/dvc/files/md5/{(one := next(iter(contents.listing(md5).values())))[:2]}/{one[2:]}")
    assert lineage.Contents(tmp_path).whole(md5) is None
