"""How strong several models are, from which of two was preferred: Bradley and Terry's model with ties (R. R. Davidson
1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments").

A model of strength t wins against one of strength u with odds exp(t) : exp(u) : v exp((t + u) / 2) for win, loss and
tie; v is the same for all pairs. Half a win, a loss and a tie are added to every pair, so that a model that never lost
has a finite strength, and no model's name or place matters. Two models: t - u = ln((W + 1/2) / (L + 1/2))."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import UserError
from data.randomness import numpy_generator

ADDED = 0.5  # to every pair's wins, ties and losses
ELO = 400.0 / math.log(10.0)  # points of a strength of 1
NEWTON_STEPS = 60


@dataclass(frozen=True)
class Strength:
    """A model's strength in Elo points, the models' mean being 0, with its interval."""

    elo: float
    low: float
    high: float


def fit(counts: np.ndarray, pairs: Sequence[tuple[int, int]], models: int) -> np.ndarray:
    """Maximum likelihood strengths with mean 0 and ln(v), (..., models + 1), from counts (..., pairs, 3): wins of the
    pair's first model, ties, wins of its second. Raises UserError unless the pairs connect all models."""
    reach = np.eye(models, dtype=int)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = 1
    if not np.linalg.matrix_power(reach, models).all():
        raise UserError("strengths: some models were never compared, not even through others; judge more pairs")
    design = np.zeros((len(pairs), 3, models + 1))  # of the three logits, in strengths and ln(v)
    for row, (a, b) in zip(design, pairs, strict=True):
        row[0, a], row[2, b], row[1, [a, b]], row[1, -1] = 1.0, 1.0, 0.5, 1.0
    design = design[:, :, 1:]  # the first model stays at 0
    observed = np.asarray(counts, dtype=np.float64) + ADDED
    total = observed.sum(-1, keepdims=True)
    found = np.zeros((*observed.shape[:-2], models))
    for _ in range(NEWTON_STEPS):
        logits = np.einsum("pok,...k->...po", design, found)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        gradient = np.einsum("...po,pok->...k", observed - total * share, design)
        centred = design - np.einsum("...po,pok->...pk", share, design)[..., None, :]
        curvature = np.einsum("...po,...pok,...pol->...kl", total * share, centred, centred)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        found += np.clip(step, -1.0, 1.0)  # far away Newton's step overshoots
        if np.abs(step).max() < 1e-12:
            break
    strengths = np.concatenate([np.zeros_like(found[..., :1]), found[..., :-1]], axis=-1)
    return np.concatenate([strengths - strengths.mean(-1, keepdims=True), found[..., -1:]], axis=-1)


def strengths(
    counts: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[int, int]],
    models: Sequence[str],
    *,
    seed: int,
    resamples: int,
    confidence: float,
) -> dict[str, Strength]:
    """Every model's strength from its contests: category -> (prompts, pairs, 3), in the order of `fit`. Intervals from
    a bootstrap over prompts, stratified by category; a prompt's pairs are drawn together."""
    whole = np.sum([table.sum(0) for table in counts.values()], axis=0)
    drawn = np.zeros((resamples, *whole.shape))
    for category, table in counts.items():
        places = numpy_generator(seed, 0, 0, f"strengths/{category}").multinomial(
            len(table), np.full(len(table), 1.0 / len(table)), size=resamples
        )
        drawn += np.einsum("bn,npo->bpo", places, table)
    points = ELO * fit(whole, pairs, len(models))[:-1]
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(ELO * fit(drawn, pairs, len(models))[:, :-1], [tail, 1.0 - tail], axis=0)
    return {name: Strength(*map(float, row)) for name, *row in zip(models, points, low, high, strict=True)}
