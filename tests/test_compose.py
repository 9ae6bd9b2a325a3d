"""docker-compose.yml is what compose accepts, and keeps its promises: secrets from a file, ports on this machine alone,
health before dependence, limits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError, UserErrors
from tasks import credentials
from tasks.environment import PROJECT, defaults

COMPOSE = Path(sys.executable).with_name("docker-compose")
ONCE = {"volumes", "bootstrap"}  # services that end


def compose(secrets: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = ["--env-file", str(secrets), "--file", str(PROJECT / "docker-compose.yml")]
    command = [str(COMPOSE), *files, "--profile", "gpu", "config", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(secrets.parent)}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return credentials.make_file(tmp_path_factory.mktemp("secrets") / ".env")


@pytest.fixture(scope="module")
def services(secrets: Path) -> dict[str, dict[str, Any]]:
    ended = compose(secrets, "--format", "json")
    assert (ended.returncode, ended.stderr) == (0, "")
    return dict(json.loads(ended.stdout)["services"])


def test_it_is_clean(secrets: Path) -> None:
    ended = compose(secrets, "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_without_secrets_nothing_starts(tmp_path: Path, secrets: Path) -> None:
    """There is no default password: each secret is asked for by name."""
    for name in credentials.MADE:
        lines = [line for line in secrets.read_text(encoding="utf-8").splitlines() if not line.startswith(f"{name}=")]
        (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")
        ended = compose(tmp_path / ".env", "--quiet")
        assert f"{name} is missing a value: run python -m tasks secrets" in ended.stderr, name


def test_every_service_keeps_the_rules(services: dict[str, dict[str, Any]]) -> None:
    servers = {"postgres", "seaweedfs", "mlflow", "prefect", "worker", "worker-gpu"}
    assert set(services) == servers | ONCE
    users = {"postgres": "postgres", "volumes": "root"}
    for name, service in services.items():
        assert service["user"] == users.get(name, "10001:10001"), name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        cpus = float(service["deploy"]["resources"]["limits"]["cpus"])
        assert name == "worker-gpu" or cpus <= 2, name  # an engine refuses more than the machine has
        restarts = {"volumes": "no", "bootstrap": "on-failure:3"}
        assert service["restart"] == restarts.get(name, "unless-stopped"), name
        assert ("healthcheck" in service) == (name not in ONCE), name
        assert re.search(r":[0-9]+\.[0-9.]+[a-z0-9.-]*$", service["image"]), f"{name}: {service['image']} is not pinned"
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name
        for needed, how in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert how["condition"] == condition, (name, needed)


def test_no_text_has_to_be_written_into_a_read_only_container(
    secrets: Path, services: dict[str, dict[str, Any]]
) -> None:
    """Compose copies a config's `content` into the container, and refuses to start where it cannot; a file is
    mounted.
    """
    configs = json.loads(compose(secrets, "--format", "json").stdout)["configs"]
    read_only = [service for service in services.values() if service.get("read_only")]
    mounted = [configs[use["source"]] for service in read_only for use in service.get("configs", [])]
    assert mounted
    assert all("content" not in config and Path(config["file"]).is_file() for config in mounted), mounted


def test_scripts_and_compose_start_the_same_servers(services: dict[str, dict[str, Any]]) -> None:
    """The stack without Docker is what is tested: its settings are those of the composed one."""
    text = (PROJECT / "scripts" / "stack.py").read_text(encoding="utf-8")
    for name in ("mlflow", "prefect"):
        for variable in services[name]["environment"]:
            assert variable in text, (name, variable)
    for flag in services["seaweedfs"]["command"][1:]:
        assert flag.lstrip("-").partition("=")[0] in text, flag
    of_the_machine = {"HOME", "DVC_SITE_CACHE_DIR", "DANCEOPD_MLFLOW_URL", "OPENAI_API_KEY"}
    worker = {variable for variable in services["worker"]["environment"] if variable not in of_the_machine}
    assert worker <= {
        *credentials.client_settings(dict.fromkeys(credentials.MADE, "x" * 32)),
        *re.findall(r"[A-Z][A-Z0-9_]+", text),
        *defaults(),
    }


def test_secrets_are_strong_and_only_their_owners(tmp_path: Path) -> None:
    path = credentials.make_file(tmp_path / "one")
    other = credentials.read_file(credentials.make_file(tmp_path / "two"))
    values = credentials.read_file(path)
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    assert set(values) == set(credentials.MADE) and not set(values.values()) & set(other.values())
    assert all(len(set(value)) > 8 and len(value) >= 20 for value in values.values())
    before = path.read_bytes()
    with pytest.raises(UserError, match="is not overwritten"):
        credentials.make_file(path)
    assert path.read_bytes() == before


def test_faults_of_a_secrets_file_are_told_without_the_secrets(tmp_path: Path) -> None:
    path = credentials.make_file(tmp_path / "one")
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(["MLFLOW_ADMIN_PASSWORD=short", "no line hunter2", *lines[5:]]), encoding="utf-8")
    with pytest.raises(UserErrors) as told:
        credentials.read_file(path)
    assert all(word in str(told.value) for word in ("line 2", "POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD"))
    assert "hunter2" not in str(told.value) and "short\n" not in str(told.value)
    with pytest.raises(UserError, match="python -m tasks secrets"):
        credentials.read_file(tmp_path / "none")
