"""How far a stage is: data/progress.py, which the benchmarks' own commands show too."""

from __future__ import annotations

from data.progress import Advance as Advance
from data.progress import callback as callback
from data.progress import progress as progress
