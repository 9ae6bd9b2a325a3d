"""Property: every row of every manifest is read with its provenance, or rejected alone with a reason; broken manifests
stop the reading, all named at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import UserError, UserErrors
from data.manifests import RawRow, read_manifests, write_manifest

ROW = {"capability": "t2i", "category": "colors", "prompt": "a red circle", "split": "train"}


def write_lines(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl", "set.parquet"])
def test_all_formats_hold_the_same(tmp_path: Path, name: str) -> None:
    record = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    awkward = 'say "two, three"\nand é 日本 |'
    rows = [{**ROW, "id": "one", "target": "images/a.png", "record": record}, {**ROW, "prompt": awkward, "record": {}}]
    if name == "set.jsonl":
        write_manifest(tmp_path, name, rows)
    else:
        table = pd.DataFrame([{**row, "record": json.dumps(row["record"])} for row in rows])
        table.to_csv(tmp_path / name, index=False) if name == "set.csv" else table.to_parquet(tmp_path / name)
    found = read_manifests(tmp_path)
    assert found.rejected == [] and found.ignored_columns == {} and found.count == 2
    assert found.rows == [
        RawRow(name, 1, "one", "train", "t2i", "colors", "a red circle", None, "images/a.png", record),
        RawRow(name, 2, f"{name}-000002", "train", "t2i", "colors", awkward, None, None, {}),
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]


def test_provenance_counts_lines_and_data_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "\ufeffcapability,category,prompt,split\nt2i,colors,one,train\n\nt2i,colors,two,train\n", encoding="utf-8"
    )
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    assert [(row.origin, row.row) for row in read_manifests(tmp_path).rows] == [
        ("a.csv", 1),
        ("a.csv", 2),
        ("b.jsonl", 2),
        ("b.jsonl", 4),
    ]


def test_parquet_structs_lose_their_nulls(tmp_path: Path) -> None:
    records = [
        {"tag": "colors", "exclude": None, "include": [{"class": "circle", "color": None}]},
        {"tag": "counting", "exclude": [{"class": "x"}], "include": []},
    ]
    pq.write_table(
        pa.table({**{key: [value] * 2 for key, value in ROW.items()}, "record": records}), tmp_path / "a.parquet"
    )
    assert [row.record for row in read_manifests(tmp_path).rows] == [
        {"tag": "colors", "include": [{"class": "circle"}]},
        {"tag": "counting", "exclude": [{"class": "x"}], "include": []},
    ]


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_manifests(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="no manifest"):
        read_manifests(tmp_path)


def test_broken_manifests_are_all_named_at_once(tmp_path: Path) -> None:
    write_manifest(tmp_path, "good.jsonl", [ROW])
    (tmp_path / "columns.csv").write_text("capability,prompt\nt2i,hello\n")
    (tmp_path / "typo.csv").write_text("capability,category,prompt,split,souce\nt2i,colors,hello,train,a.png\n")
    (tmp_path / "twice.csv").write_text("capability,category,prompt,split,split\nt2i,colors,hello,train,eval\n")
    (tmp_path / "empty.csv").write_text("capability,category,prompt,split\n")
    (tmp_path / "binary.csv").write_bytes(b"capability,category,prompt,split\n\xff\xfe,,,\n")
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:-7])
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserErrors) as caught:
        read_manifests(tmp_path)
    faults = {Path(fault.split(": ")[0]).name: fault for fault in caught.value.faults}
    assert set(faults) == {
        "columns.csv",
        "typo.csv",
        "twice.csv",
        "empty.csv",
        "binary.csv",
        "cut.jsonl",
        "list.jsonl",
        "cut.parquet",
    }
    assert "['category', 'split'] are missing" in faults["columns.csv"]
    assert "did you mean 'source'" in faults["typo.csv"]
    assert "line 2: not valid JSON" in faults["cut.jsonl"]
    assert "no rows" in faults["empty.csv"]


def test_unused_columns_are_reported(tmp_path: Path) -> None:
    write_lines(tmp_path, "a.jsonl", {**ROW, "licence": "CC0"})
    found = read_manifests(tmp_path)
    assert len(found.rows) == 1 and found.ignored_columns == {"a.jsonl": ["licence"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": "../secret.png"}, "path outside the folder"),
        ({"source": "images/../../secret.png"}, "path outside the folder"),
        ({"target": "/etc/passwd"}, "path outside the folder"),
        ({"target": "C:\\pictures\\a.png"}, "path outside the folder"),
        ({"source": "link.png"}, "path outside the folder"),
        ({"source": "linked/secret.png"}, "path outside the folder"),
        ({"source": "a" * 300}, "unreadable image"),
        ({"source": "loop/a.png"}, "unreadable image"),
        ({"record": '{"tag": '}, "bad record"),
        ({"record": "[1, 2]"}, "bad record"),
        ({"record": '{"x": NaN}'}, "bad record"),
        ({"prompt": 5}, "not text"),
        ({"prompt": "a\0b"}, "not text"),
        ({"prompt": "half \ud83d"}, "not text"),
        ({"id": "../x"}, "bad id"),
        ({"id": True}, "bad id"),
        ({"id": "x" * 129}, "bad id"),
    ],
)
def test_a_broken_row_is_rejected_alone(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "raw"
    outside.mkdir()
    folder.mkdir()
    (outside / "secret.png").write_bytes(b"")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    write_lines(folder, "a.jsonl", ROW, {**ROW, **change}, ROW)
    found = read_manifests(folder)
    assert [row.row for row in found.rows] == [1, 3]
    assert [(rejection.origin, rejection.row, rejection.reason) for rejection in found.rejected] == [
        ("a.jsonl", 2, reason)
    ]
    assert found.rejected[0].detail


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    write_lines(tmp_path, "a.jsonl", {**ROW, "target": "b.png"})
    assert [row.target for row in read_manifests(tmp_path).rows] == ["b.png"]


def test_a_ragged_csv_row_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "capability,category,prompt,split\nt2i,colors,a red, round circle,train\nt2i,colors,fine,train\n"
    )
    found = read_manifests(tmp_path)
    assert [row.prompt for row in found.rows] == ["fine"]
    assert [(rejection.row, rejection.reason) for rejection in found.rejected] == [(1, "wrong number of fields")]


def test_writing_refuses_what_cannot_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown keys"):
        write_manifest(tmp_path, "a.jsonl", [{**ROW, "promt": "x"}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(tmp_path, "a.jsonl", [{**ROW, "record": {"x": float("nan")}}])
    assert list(tmp_path.iterdir()) == []
