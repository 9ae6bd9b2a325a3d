"""`python -m tasks secrets`: the passwords of the servers, strong and random, made once into a file that only its owner
reads.

Nothing in the project has a default password: docker-compose.yml and scripts/stack.py take all of them from this file.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.errors import UserError, UserErrors
from data.files import explain
from tasks.environment import PROXIED

FILE = Path(".env")
LENGTH = 32  # bytes of randomness a password
PREFECT, MLFLOW, S3 = "http://localhost:4200", "http://localhost:5000", "http://localhost:8333"


def _password() -> str:
    return secrets.token_hex(LENGTH)  # letters and digits alone: safe in a URL, a shell and an ini file


def _access_key() -> str:
    return secrets.token_hex(10).upper()


# Name -> how its value is made.
MADE: dict[str, Callable[[], str]] = {
    "POSTGRES_PASSWORD": _password,  # the database's superuser
    "MLFLOW_DATABASE_PASSWORD": _password,
    "PREFECT_DATABASE_PASSWORD": _password,
    "MLFLOW_ADMIN_PASSWORD": _password,  # user admin: makes accounts
    "MLFLOW_PIPELINE_PASSWORD": _password,  # user pipeline: the workers
    "MLFLOW_SECRET_KEY": _password,  # signs the pages' forms
    "PREFECT_AUTH_STRING": lambda: f"danceopd:{_password()}",  # shared by the server, the workers and the people
    "S3_PIPELINE_KEY": _access_key,  # bucket danceopd: data, ledger, published versions
    "S3_PIPELINE_SECRET": _password,
    "S3_MLFLOW_KEY": _access_key,  # bucket mlflow: the server's artifacts
    "S3_MLFLOW_SECRET": _password,
}


def make_file(path: Path = FILE) -> Path:
    """Writes `path` with mode 600. Raises UserError where a file is: servers that run know its values."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # the mode from the first byte on
    except FileExistsError as error:
        remedy = "to change secrets of running servers see docs/operations.md"
        raise UserError(f"{path}: exists already and is not overwritten; {remedy}") from error
    except OSError as error:
        raise explain(error, path) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{name}={make()}\n" for name, make in MADE.items())
        file.flush()
        os.fsync(file.fileno())
    return path


def read_file(path: Path = FILE) -> dict[str, str]:
    """Name -> value. Raises UserErrors naming each line of another form and each secret missing or short."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; make it with: python -m tasks secrets --out {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    values, faults = {}, []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", line)
            if match is None:
                faults.append(f"line {number}: expected NAME=VALUE")  # without the line: it may hold a secret
            else:
                values[match[1]] = match[2]
    faults += [f"{name}: missing or shorter than 16 characters" for name in MADE if len(values.get(name, "")) < 16]
    if faults:
        raise UserErrors(f"{path}: not usable", faults)
    return values


def client_settings(
    secret: Mapping[str, str], *, prefect: str = PREFECT, mlflow: str = MLFLOW, s3: str = S3
) -> dict[str, str]:
    """The variables that lead each tool to the servers (default: those of docker-compose.yml)."""
    return {
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_API_AUTH_STRING": secret["PREFECT_AUTH_STRING"],
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_TRACKING_USERNAME": "pipeline",
        "MLFLOW_TRACKING_PASSWORD": secret["MLFLOW_PIPELINE_PASSWORD"],
        **PROXIED,
        "AWS_ENDPOINT_URL_S3": s3,
        "AWS_ACCESS_KEY_ID": secret["S3_PIPELINE_KEY"],
        "AWS_SECRET_ACCESS_KEY": secret["S3_PIPELINE_SECRET"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",  # aiobotocore, below DVC, reads this name
        "DANCEOPD_LEDGER": "s3://danceopd/ledger",
        "DANCEOPD_PUBLISH": "s3://danceopd/published",
    }


def exports(variables: Mapping[str, str]) -> str:
    """The shell's lines that set these variables."""
    return "".join(f"export {name}='{value}'\n" for name, value in variables.items())


def cli(argv: Sequence[str]) -> int:
    about = "Make the servers' passwords into a file that only you can read."
    parser = argparse.ArgumentParser("python -m tasks secrets", description=about)
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="what to make (default: %(default)s)")
    shell = 'print what this shell needs to reach the servers: eval "$(python -m tasks secrets --exports)"'
    parser.add_argument("--exports", action="store_true", help=shell)
    parsed = parser.parse_args(list(argv))
    if parsed.exports:
        print(exports(client_settings(read_file(parsed.out))), end="")
        return 0
    path = make_file(parsed.out)
    print(f"{path}: {len(MADE)} secrets, mode 600. It is in .gitignore; keep a copy where you keep passwords")
    return 0
