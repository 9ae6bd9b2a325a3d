"""Where a judge is, as a value: every process and machine that asks receives it and opens the judge itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.judge.protocol import Ask, JudgeSettings, fake_judge, replay_judge
from benchmarks.parallel import device_of
from benchmarks.store import read_results
from data.errors import UserError
from data.files import weights_digest

if TYPE_CHECKING:
    from benchmarks.judge.endpoint import Endpoint

_digest_of = lru_cache(weights_digest)  # a large checkpoint takes minutes to read


def name_of_local(folder: str | Path) -> str:
    """How results name a checkpoint on this machine: its folder's name and the first half of its weights' SHA-256, so
    that answers of two checkpoints in folders of one name are never mixed. Raises UserError for a missing folder."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; the local judge needs a Qwen2.5-VL checkpoint there")
    return f"{path.name}@{_digest_of(path)[:32]}"


@dataclass(frozen=True)
class Access:
    """The judge of `settings`: `endpoint` is the server of kind "endpoint"; `folder` holds the checkpoint of kind
    "local" (loaded in `dtype` to `device`), or the recorded judgements of kind "replay". Nothing but `settings` changes
    a score."""

    settings: JudgeSettings
    endpoint: Endpoint | None = None
    folder: str = ""
    device: str = "cpu"
    dtype: str = "bfloat16"

    def check(self) -> None:
        """Raises UserError, before anything expensive runs, for a server that does not answer or refuses the key, or a
        checkpoint that is not there."""
        if self.settings.kind == "local":
            name_of_local(self.folder)
        if self.settings.kind == "endpoint":
            from benchmarks.judge.endpoint import check_reachable

            check_reachable(self.settings, self._server())

    def _server(self) -> Endpoint:
        if self.endpoint is None:
            raise UserError("judge: kind = endpoint needs a server; give its base URL")
        return self.endpoint

    def __call__(self, halt: threading.Event, processes: int) -> Ask:
        """Opens the judge. `halt` ends its waits; `processes` ask at the same time and share the requests a minute.
        Raises UserError."""
        if self.settings.kind == "fake":
            return fake_judge()
        if self.settings.kind == "replay":
            return replay_judge(read_results(self.folder))
        if self.settings.kind == "local":
            from benchmarks.judge.local import load_local, local_judge

            return local_judge(self.settings, load_local(self.folder, device_of(self.device), self.dtype))
        from benchmarks.judge.endpoint import endpoint_judge

        server = self._server()
        share = max(1, server.per_minute // processes) if server.per_minute else 0
        return endpoint_judge(self.settings, replace(server, per_minute=share), halt)
