"""Defaults of the environment: everything is written inside the project, nothing is reported home. What the user has
set stays. Prefect, MLflow, DVC and the Hugging Face libraries read these variables once, when they are imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TEACHERS = Path("data/teachers")  # inside a project: a folder a teacher, the base among them

# Everything else about the servers is in their standard settings: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and
# _PASSWORD, PREFECT_API_URL, AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID, ...
LEDGER = "DANCEOPD_LEDGER"  # s3://BUCKET/PREFIX of the machines' shared ledger; unset: a folder inside the project
PUBLISH = "DANCEOPD_PUBLISH"  # s3://BUCKET/PREFIX where promoted versions are published; unset: nothing is published
REVIEWERS = "DANCEOPD_REVIEWERS"  # names that may decide, separated by commas; unset: whoever may write to the registry

# MLflow 3.17 tells its clients to fetch artifacts from the store behind it, by a name that only the servers' network
# knows: elsewhere a file costs three minutes of vain tries. These switches lead through the server.
PROXIED = {"MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false"}


def setting(name: str) -> str | None:
    """The variable's value without surrounding space; None when it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def defaults(project: Path = PROJECT) -> dict[str, str]:
    """Variable -> value."""
    return {
        "DO_NOT_TRACK": "true",  # Prefect takes 1, true or yes; MLflow takes only "true"
        "PREFECT_HOME": str(project / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # its 20 s are too few on a busy machine
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # the default is pickle
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_MODEL_CATALOG_URI": "",  # else a catalogue is downloaded
        **PROXIED,
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(project / ".dvc" / "tmp" / "site"),
        "ITERATIVE_DO_NOT_TRACK": "1",
        "HF_HOME": str(project / ".cache" / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLCONFIGDIR": str(project / ".cache" / "matplotlib"),
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
    }


def prepare(project: Path = PROJECT) -> None:
    for name, value in defaults(project).items():
        os.environ.setdefault(name, value)


def for_children(executable: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a stage: its lines come unbuffered, and `python` is this interpreter."""
    made = {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}
    made["PATH"] = os.pathsep.join([str(Path(executable).parent), made.get("PATH", os.defpath)])
    return made
