"""Source `folder`: manifests and images of the user's, taken as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_folder
from data.manifests import manifest_paths, read_manifests
from data.progress import callback
from data.sources.base import Request, Source


def collect(request: Request, out: Path) -> dict[str, Any]:
    """Copies the manifests and every image that they name and that lies inside the folder.

    Rows that curation will reject come along, so that they are listed there with their reasons.
    """
    source = Path(request.folder)
    manifests = read_manifests(source)
    if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{source}: the folder and the output {out} lie inside each other; keep your files elsewhere")
    images = sorted({path for row in manifests.rows for path in (row.source, row.target) if path})
    report, copied = callback(), 0
    with atomic_folder(out) as folder:
        for path in manifest_paths(source):
            shutil.copyfile(path, folder / path.name)
        for done, name in enumerate(images, 1):
            if (source / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
                copied += 1
            report(done, len(images), "copy images")
    rows = {"rows": manifests.count, "bad_rows": len(manifests.rejected)}
    return {"source": str(source), **rows, "images": copied, "missing_images": len(images) - copied}


def faults(request: Request) -> list[str]:
    if request.folder:
        return []
    return ['folder = "": expected the folder with your manifests, as source is "folder"']


SOURCE = Source(collect, faults, reads_folder=True)
