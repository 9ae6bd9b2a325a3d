"""Every random draw has an address: (seed, step, slot, purpose). Nothing depends on what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(*address: int | str) -> int:
    """A 63-bit integer that depends on the address and on nothing else (SHA-256, so equal on every machine)."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, address)).encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, step: int, slot: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_of(seed, step, slot, purpose)))
