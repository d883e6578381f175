"""The function level: a linear probe that is fitted on one model's vectors and, frozen, read from the other's."""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gritlm.analysis.controls import jackknife, mean_interval
from gritlm.analysis.representation import Rotation, reduced
from gritlm.analysis.sums import Sums

ALPHAS = np.logspace(-2, 4, 7)  # of ridge regression, chosen by leave-one-out on the fitted half


def probe(
    x_ND: np.ndarray, y_NE: np.ndarray, labels_N: np.ndarray, second_N: np.ndarray, blocks_N: np.ndarray, seed: int
) -> dict[str, Any]:
    """The score of x's probe on y, on the second half of the documents: accuracy, or R^2 of labels that are floats.

    Returns:
        value: x's probe on y. Layers of unlike width are mapped first: both on their principal components, y by
            Procrustes on x, all fitted on the first half.
        on_a: x's probe on x. on_b: y's own probe on y. mapped: x's probe on y after Procrustes, where it can be had.
        floor: the share of the label that is the most frequent in the first half, or 0.
    """
    second, fit, classify = torch.from_numpy(second_N), ~second_N, labels_N.dtype.kind != "f"
    note: dict[str, Any] = {}
    x, y = torch.from_numpy(np.array(x_ND)).double(), torch.from_numpy(np.array(y_NE)).double()
    if x.shape[1] != y.shape[1]:
        x, y, note = reduced(x, y, second)
    sums = Sums().add(y, x, second)
    back = Rotation(sums)
    sides = {"on_a": x.numpy(), "on_b": y.numpy()}
    if not back.why:
        mapped = x[fit].mean(0).repeat(len(x), 1)
        mapped[:, back.live] += back.scale * back.mapped(y, sums.shifts[0])
        sides["mapped"] = mapped.numpy()
    why = back.why if note else ""
    if len(np.unique(labels_N[fit])) < 2 or len(np.unique(labels_N[second_N])) < 2:
        why = "found one label in a half of the documents, wanted at least two"
    if why:
        return note | {"value": None, "why": why}

    def fitted(side: str) -> Any:
        model = LogisticRegression(max_iter=200, tol=1e-3) if classify else RidgeCV(ALPHAS)
        return make_pipeline(StandardScaler(), model).fit(sides[side][fit], labels_N[fit]).predict

    labels, of_a = labels_N[second_N], fitted("on_a")
    guesses = {name: of_a(rows[second_N]) for name, rows in sides.items()}
    shown = guesses["mapped" if note else "on_b"]
    guesses["on_b"] = fitted("on_b")(sides["on_b"][second_N])
    if classify:
        values, counts = np.unique(labels_N[fit], return_counts=True)
        found = {name: float((guess == labels).mean()) for name, guess in guesses.items()}
        interval = mean_interval((shown == labels).astype(float), np.arange(len(labels)), seed)
        return (
            note
            | found
            | _row(float((shown == labels).mean()), interval, float((labels == values[counts.argmax()]).mean()))
        )
    score = _r_squared(shown, labels)
    blocks = [blocks_N[second_N] != block for block in np.unique(blocks_N)]
    interval = jackknife(score, [_r_squared(shown[kept], labels[kept]) for kept in blocks])
    return note | {name: _r_squared(guess, labels) for name, guess in guesses.items()} | _row(score, interval, 0.0)


def _row(value: float, interval: Any, floor: float) -> dict[str, Any]:
    return {"value": value, "low": interval[0], "high": interval[1], "floor": floor}


def _r_squared(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(1 - ((labels - guesses) ** 2).sum() / ((labels - labels.mean()) ** 2).sum())
