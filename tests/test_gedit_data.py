"""Defends: GEdit-Bench's rows are the same whichever file they come from, and a set that is not what it claims to be is
refused with all that is wrong.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow
import pytest

from benchmarks.gedit.rows import (
    EditTask,
    check_folder,
    check_official,
    edited_path,
    load_tasks,
    set_digest,
    source_path,
)
from benchmarks.gedit.rules import PAPER_CATEGORIES
from data.errors import UserError, UserErrors
from data.files import sha256_bytes
from data.records import GEDIT_CATEGORIES, GLOBAL_EDITS, LOCAL_EDITS, OFFICIAL_COUNTS
from tests.gedit_sets import png, row, write_edited, write_manifest, write_parquet

ROWS = [
    row("b", "remove the hat", "subject-remove"),
    row("a", "add a hat", intersection=False),
    row("a", "加一顶帽子", language="cn", intersection=False),
    row("c", "make it gold", "material_alter"),
]


def meaning(tasks):
    return [
        (
            task.language,
            task.key,
            task.category,
            task.instruction,
            task.intersection,
            task.source_sha256,
            task.source.read_bytes(),
        )
        for task in tasks
    ]


def test_the_official_set_is_counted_as_published() -> None:
    assert sum(OFFICIAL_COUNTS.values()) == 606 and len(GEDIT_CATEGORIES) == 11
    assert (
        set(PAPER_CATEGORIES) == {*LOCAL_EDITS, *GLOBAL_EDITS}
        and sum(OFFICIAL_COUNTS[name] for name in PAPER_CATEGORIES) == 317
    )


def test_rows_are_equal_whatever_file_they_come_from(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    hub = tmp_path / "hub"
    write_parquet(hub / "data" / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(hub / "data" / "train-00001-of-00002.parquet", ROWS[2:])
    stream, file = tmp_path / "stream.arrow", tmp_path / "file.arrow"
    with pyarrow.OSFile(str(stream), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    local = write_manifest(tmp_path / "local", ROWS)
    with (tmp_path / "local.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(
            ["key", "Task_Type", "instruction", "instruction_language", "input_image", "Intersection_exist"]
        )
        for entry in ROWS:
            values = [entry[name] for name in ("key", "task_type", "instruction", "instruction_language")]
            writer.writerow([*values, f"local/{entry['key']}.png", entry["Intersection_exist"]])
    tasks = load_tasks(hub, tmp_path / "unpacked")
    assert [task.id for task in tasks] == ["en-a", "en-b", "en-c", "cn-a"]
    assert tasks[0].source.read_bytes() == png("source a") and tasks[0].source_sha256 == sha256_bytes(png("source a"))
    assert tasks[0].source == tasks[3].source and len(list((tmp_path / "unpacked").iterdir())) == 3  # one file an image
    for other in (stream, file, local, local / "manifest.jsonl", tmp_path / "local.csv"):
        assert meaning(load_tasks(other, tmp_path / "unpacked")) == meaning(tasks), other
        assert set_digest(load_tasks(other, tmp_path / "elsewhere")) == set_digest(tasks)


def test_all_faulty_rows_are_named_at_once(tmp_path: Path) -> None:
    bad = [
        {**ROWS[0], "task_type": "subject_remove"},
        {**ROWS[1], "instruction_language": "zh"},
        {**ROWS[1], "instruction": " "},
        {**ROWS[1], "input_image": {"bytes": None, "path": None}},
        {**ROWS[1], "key": "../a"},
        ROWS[3],
        ROWS[3],
    ]
    with pytest.raises(UserErrors) as caught:
        load_tasks(write_parquet(tmp_path / "bad.parquet", bad), tmp_path / "s")
    text = str(caught.value)
    for part in (
        "row 1: task_type = 'subject_remove'",
        "row 2: instruction_language = 'zh'",
        "row 3: instruction is empty",
        "row 4: input_image is empty",
        "row 5: key = '../a'",
        "en c: 2 rows of one key",
    ):
        assert part in text
    with pytest.raises(UserError, match=r"columns \['task_type'\] are missing"):
        load_tasks(
            write_parquet(
                tmp_path / "less.parquet", [{name: value for name, value in ROWS[0].items() if name != "task_type"}]
            ),
            tmp_path / "s",
        )
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "bad.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"torn\.parquet: not a readable parquet file"):
        load_tasks(tmp_path / "torn.parquet", tmp_path / "s")
    with pytest.raises(UserError, match="no such file or folder"):
        load_tasks(tmp_path / "nowhere", tmp_path / "s")


def official(counts: dict[str, int], language: str) -> list[EditTask]:
    return [
        EditTask(f"{category}{index}", language, category, "do it", True, Path("a.png"), "a")
        for category, count in counts.items()
        for index in range(count)
    ]


def test_a_set_that_is_not_the_official_one_does_not_pass_for_it() -> None:
    english = official(OFFICIAL_COUNTS, "en")
    check_official(english)
    chinese = official(OFFICIAL_COUNTS, "cn")
    check_official([*english, *chinese])
    with pytest.raises(UserErrors, match=r"en subject-add: 59 rows, the official set has 60"):
        check_official([task for task in english if task.key != "subject-add7"])
    with pytest.raises(UserErrors, match="1 keys stand in one language only"):
        check_official([*english, *chinese[1:]])
    with pytest.raises(UserErrors, match="cn: no row of"):
        check_official([task for task in chinese if task.category != "ps_human"])


def test_images_lie_where_the_official_layout_has_them(tmp_path: Path) -> None:
    tasks = load_tasks(write_parquet(tmp_path / "a.parquet", ROWS), tmp_path / "s")
    assert edited_path(Path("root"), tasks[3]) == Path("root/fullset/subject-add/cn/a.png")
    assert source_path(Path("root"), tasks[3]) == Path("root/fullset/subject-add/cn/a_SRCIMG.png")
    write_edited(tmp_path / "images" / "student", tasks[:1])
    check_folder(tmp_path / "images" / "student", tasks)
    with pytest.raises(UserError, match=r"did you mean .*images/student"):
        check_folder(tmp_path / "images", tasks)
