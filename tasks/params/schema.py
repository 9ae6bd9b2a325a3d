"""`python -m tasks schema`: params.yaml's JSON Schema, with which editors complete keys and mark faults.

Made from the dataclasses that read the file. What spans several fields is checked by `python -m tasks check` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.bounds import OPTIONAL
from data.files import write_json
from tasks.params.reading import shared_fields
from tasks.params.sections import SHARED
from tasks.stages.contract import sections

FILE = Path("params.schema.json")


def schema() -> dict[str, Any]:
    """The JSON Schema of a whole params.yaml."""
    from pydantic import ConfigDict, TypeAdapter

    fields = [(name, _without_shared(name, cls)) for name, cls in {**SHARED, **sections()}.items()]
    document: Any = dataclasses.make_dataclass("Params", fields)
    document.__doc__, document.__pydantic_config__ = "The numbers of a run.", ConfigDict(extra="forbid")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(document).json_schema()}


def _without_shared(name: str, cls: type) -> type:
    """The dataclass without the fields that are filled from shared sections, and without defaults."""
    hints, shared = typing.get_type_hints(cls, include_extras=True), shared_fields(cls)
    fields = [
        (
            of.name,
            hints[of.name],
            dataclasses.field(default=of.default) if of.metadata == OPTIONAL else dataclasses.field(),
        )
        for of in dataclasses.fields(cls)
        if of.name not in shared
    ]
    made = dataclasses.make_dataclass(name, fields, kw_only=True)
    made.__doc__ = cls.__doc__
    return made


def cli(arguments: Sequence[str]) -> int:
    text = "Write the JSON Schema of params.yaml, for editors."
    parser = argparse.ArgumentParser("python -m tasks schema", description=text)
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: %(default)s)")
    path = parser.parse_args(arguments).out
    write_json(path, schema())
    print(f"{path}: written; an editor with a YAML language server reads it for params.yaml and the presets")
    return 0
