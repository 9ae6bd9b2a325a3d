"""Defends: the regenerated prompt set is the published one, byte for byte, and a damaged or doubled set is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.geneval.prompts import (
    CLASSES,
    COLORS,
    METADATA_SHA256,
    as_jsonl,
    official_records,
    read_prompts,
    set_name,
)
from data.errors import UserErrors
from data.records import GENEVAL_TAGS

RECORDS = official_records()
PROMPTS_SHA256 = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
SIZES = dict(zip(GENEVAL_TAGS, (80, 99, 80, 94, 100, 100), strict=True))  # records a tag


def test_the_records_have_the_published_digests(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    assert main(["geneval", "prompts"]) == 0
    content = capsys.readouterr().out.encode()
    assert hashlib.md5(content).hexdigest() == "9a0ed515640279a48ed3380d90aec0ed"
    assert hashlib.sha256(content).hexdigest() == METADATA_SHA256
    assert main(["geneval", "prompts", "--text"]) == 0
    assert hashlib.sha256(capsys.readouterr().out.encode()).hexdigest() == PROMPTS_SHA256
    assert main(["geneval", "prompts", "--text", "--manifest"]) == 2 and "give one of" in capsys.readouterr().err


def test_the_set_is_a_manifest_that_the_collect_stage_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main
    from data.manifests import read_manifests

    assert main(["geneval", "prompts", "--manifest"]) == 0
    (tmp_path / "geneval.jsonl").write_text(capsys.readouterr().out)
    rows = read_manifests(tmp_path).rows
    assert [row.record for row in rows] == RECORDS and rows[552].id == "00552"
    assert {(row.split, row.capability) for row in rows} == {("eval", "t2i")} and [row.category for row in rows] == [
        record["tag"] for record in RECORDS
    ]


def test_sizes_relations_and_counts_are_the_published_ones() -> None:
    assert len(RECORDS) == len({record["prompt"] for record in RECORDS}) == 553
    assert Counter(record["tag"] for record in RECORDS) == SIZES
    relations = Counter(
        clause["position"][0] for record in RECORDS for clause in record["include"] if "position" in clause
    )
    assert relations == {"left of": 19, "right of": 27, "above": 26, "below": 28}
    assert Counter(record["include"][0]["count"] for record in RECORDS if record["tag"] == "counting") == {
        2: 26,
        3: 28,
        4: 26,
    }
    assert len(set(CLASSES)) == 80 and len(set(COLORS)) == 10


def test_a_set_of_one_s_own_is_read_and_is_not_official(tmp_path: Path) -> None:
    path = tmp_path / "rewritten.jsonl"
    path.write_text(as_jsonl(RECORDS))
    assert read_prompts(path) == RECORDS and set_name(RECORDS) == "official"
    rewritten = [{**RECORDS[0], "prompt": "a bench in a park at noon"}, *RECORDS[1:]]
    path.write_text(as_jsonl(rewritten))
    assert read_prompts(path) == rewritten and set_name(rewritten) == "custom"


def test_every_fault_of_a_set_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(
        as_jsonl([RECORDS[0], RECORDS[0]]) + "{half\n[1]\n" + json.dumps({"tag": "size", "include": []}) + "\n"
    )
    with pytest.raises(UserErrors) as caught:
        read_prompts(path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["line 3", "line 4", "line 5", "record 1"]
    path.write_text("")
    with pytest.raises(UserErrors, match="no record"):
        read_prompts(path)
