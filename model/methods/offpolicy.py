"""The ablation off the student's path: the paper's step at forward-noised target images."""

from __future__ import annotations

from model.methods import danceopd
from model.methods.base import Method

METHOD = Method(danceopd.compute, danceopd.cost, states="off_policy", lockstep=True)
