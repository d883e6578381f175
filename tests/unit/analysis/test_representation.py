"""Correlation, Procrustes and CKA from streamed sums, against dense float64, scipy and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from gritlm.analysis import sums
from gritlm.analysis.controls import jackknife
from gritlm.analysis.geometry import all_layers, cka_p_value
from gritlm.analysis.representation import Rotation, cka, correlations, floors, h_inv, measure, sparsity
from gritlm.analysis.sums import Sums

CPU = torch.device("cpu")


def draw(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(count: int) -> torch.Tensor:
    return torch.arange(count) % 2 == 1


def related(count: int = 250, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Layers with means, unlike spreads, and something in common."""
    x = draw(count, width) * torch.logspace(-1, 1, width) + 50
    return x, x @ draw(width, width, 1) * 0.1 + draw(count, width, 2) - 7


def dense_cka(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    """From the kernels, as in Kornblith et al. and in Song et al. (eq. 5)."""
    count = len(x)

    def estimate(k: np.ndarray, m: np.ndarray) -> float:
        if not unbiased:
            k = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
            return float((k * m).sum())
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = k.sum() * m.sum() / ((count - 1) * (count - 2))
        return float((k * m).sum() + total - 2 / (count - 2) * k.sum(0) @ m.sum(1)) / (count * (count - 3))

    x, y = x - x.mean(0), y - y.mean(0)  # neither estimate changes, and rounding takes less
    k, m = x @ x.T, y @ y.T
    return estimate(k, m) / math.sqrt(estimate(k, k) * estimate(m, m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_sums_are_those_of_all_rows(dtype):
    x, y = related()
    streamed = Sums(dtype)
    for part in torch.arange(len(x)).split(90):
        streamed.add(x[part].to(dtype), y[part].to(dtype), halves(len(x))[part])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    for unbiased in (True, False):
        wanted = dense_cka(x.numpy(), y.numpy(), unbiased)
        assert cka(streamed, unbiased) == pytest.approx(wanted, abs=tolerance)
    rho = np.array([np.corrcoef(x[:, j], y[:, j])[0, 1] for j in range(16)])
    assert np.allclose(correlations(streamed), rho, atol=tolerance)
    assert abs(dense_cka(x.numpy(), y.numpy(), True) - dense_cka(x.numpy(), y.numpy(), False)) > 1e-3, "control"


def test_sums_without_some_rows_are_those_of_the_others():
    x, y = related()
    rows, kept = (x, y, halves(len(x))), torch.arange(len(x)) % 10 > 1
    others = [side[kept] for side in rows]
    found, wanted = Sums().add(*rows).without(*(side[~kept] for side in rows)), Sums().add(*others)
    for metric in (cka, lambda sums: h_inv(Rotation(sums).matrix), lambda sums: float(correlations(sums).mean())):
        assert metric(found) == pytest.approx(metric(wanted), rel=1e-9)
        assert metric(Sums().add(*rows)) != pytest.approx(metric(wanted), rel=1e-9), "control"


@pytest.mark.parametrize("onednn", [False, True])
def test_products_over_rows_are_those_of_float64(onednn, monkeypatch):
    monkeypatch.setattr(sums, "_onednn_is_faster", lambda *widths: onednn)
    used = []
    product = sums.product_over_tokens
    monkeypatch.setattr(sums, "product_over_tokens", lambda *pair: (used.append(pair), product(*pair))[1])
    x, y = draw(3000, 64), draw(3000, 96, 1)
    found = sums.over_rows(x.float(), y.float())
    assert bool(used) == onednn
    assert (found - x.T @ y).norm() < 1e-6 * (x.T @ y).norm()
    assert torch.equal(sums.over_rows(x, y), x.T @ y), "float64 stays torch's"


def test_a_large_mean_takes_nothing_from_float32():
    x, y = related()
    y = y * 1e-3 + 1e3  # a thousandth of its size varies
    x32, y32 = x.float(), y.float()
    wanted = dense_cka(x32.double().numpy(), y32.double().numpy(), True)
    assert cka(Sums(torch.float32).add(x32, y32, halves(len(x)))) == pytest.approx(wanted, abs=1e-4)
    unshifted = Sums(torch.float32)
    unshifted.shifts = [torch.zeros(16), torch.zeros(16)]
    found = cka(unshifted.add(x32, y32, halves(len(x))))
    assert found is None or abs(found - wanted) > 1e-3, "control: without the shift it is lost"


@pytest.mark.parametrize("count", [50, 5000])
def test_unbiased_cka_of_independent_layers_is_zero(count):
    blocks = torch.arange(count) % 10
    found = {True: [], False: []}
    for seed in range(2):
        x, y = draw(count, 40, 2 * seed), draw(count, 40, 2 * seed + 1)
        for unbiased, values in found.items():
            kept = [
                cka(Sums().add(x[blocks != b], y[blocks != b], halves(count)[blocks != b]), unbiased) for b in range(10)
            ]
            values.append(jackknife(cka(Sums().add(x, y, halves(count)), unbiased), kept))
    assert sum(low <= 0 <= high for low, high in found[True]) == 2
    assert not any(low <= 0 <= high for low, high in found[False]), "control: the biased estimate is above 0"


def test_a_constant_dimension_is_named_and_left_out():
    x, y = related()
    x[:, 3], y[:, 5] = 50.1, 0.0
    rows = x.float(), y.float(), halves(len(x))
    found = measure(Sums(torch.float32).add(*rows), rows)["correlation"]
    assert found["constant"] == [3, 5]
    rho = [np.corrcoef(x[:, j], y[:, j])[0, 1] for j in range(16) if j not in (3, 5)]
    assert found["value"] == pytest.approx(np.mean(rho), abs=1e-5) and sum(found["histogram"]) == 14


# ---- Procrustes


def test_the_map_is_scipys_and_is_judged_on_the_other_half():
    x, y = related(600)
    second = halves(600)
    rows = x, y, second
    found, rotation = measure(Sums().add(*rows), rows), Rotation(Sums().add(*rows))
    means = x[~second].mean(0), y[~second].mean(0)
    fit, judged = [(side[~second] - mean).numpy() for side, mean in zip((x, y), means, strict=True)], second
    wanted, norm = scipy.linalg.orthogonal_procrustes(*fit)
    assert np.allclose(rotation.matrix, wanted, atol=1e-9)
    scale = norm / (fit[0] ** 2).sum()
    x_judged, y_judged = ((side[judged] - mean).numpy() for side, mean in zip((x, y), means, strict=True))
    for factor, value in ((scale, "value"), (1.0, "without_scale")):
        residual = ((factor * x_judged @ wanted - y_judged) ** 2).sum() / (y_judged**2).sum()
        assert found["residual"][value] == pytest.approx(residual, rel=1e-9)
    mapped = x_judged @ wanted
    cosines = (mapped * y_judged).sum(1) / np.linalg.norm(mapped, axis=1) / np.linalg.norm(y_judged, axis=1)
    assert found["mapped_cosine"]["value"] == pytest.approx(cosines.mean(), rel=1e-9)


def test_noise_is_no_map_on_held_out_documents():
    rows = draw(120, 40), draw(120, 40, 1), halves(120)
    on_the_fit = measure(
        Sums().add(
            torch.cat([rows[0][~rows[2]]] * 2),
            torch.cat([rows[1][~rows[2]]] * 2),
            halves(120) ^ (torch.arange(120) >= 60),
        ),
        rows,
    )
    assert measure(Sums().add(*rows), rows)["residual"]["value"] > 0.95
    assert on_the_fit["residual"]["value"] < 0.75, "control: on the documents that it was fitted on it looks like one"


@pytest.mark.parametrize("phi", [0.3, math.pi / 4])
def test_known_maps_have_their_closed_forms(phi):
    width, x = 64, draw(3000, 64)
    turn = torch.tensor([[math.cos(phi), math.sin(phi)], [-math.sin(phi), math.cos(phi)]], dtype=torch.float64)
    c, s = math.cos(phi) ** 2, math.sin(phi) ** 2
    maps = {
        "permutation": (torch.eye(width, dtype=torch.float64)[torch.randperm(width)], 1.0),
        "pairs turned": (
            torch.block_diag(*[turn] * (width // 2)),
            1 + (c * math.log(c) + s * math.log(s)) / math.log(width),
        ),
    }
    for matrix, wanted in maps.values():
        rows = x, x @ matrix * 3 + 1, halves(3000)
        found = measure(Sums().add(*rows), rows)
        assert found["h_inv"]["value"] == pytest.approx(wanted, abs=1e-6)
        assert found["residual"]["value"] == pytest.approx(0, abs=1e-9) and found["residual"]["without_scale"] > 0.3
        assert found["cka"]["value"] == pytest.approx(1, abs=1e-9)
    found = measure(Sums().add(x, x * torch.logspace(-1, 1, width), halves(3000)), (x, x, halves(3000)))
    assert found["correlation"]["value"] == pytest.approx(1) and found["cka"]["value"] < 0.5, "a scaling by dimension"


def test_a_random_rotation_has_the_floor():
    matrix = torch.from_numpy(scipy.stats.ortho_group.rvs(256, random_state=0))
    assert h_inv(matrix) == pytest.approx(floors(256)["h_inv"], abs=0.002)
    assert sparsity(matrix) == pytest.approx(floors(256)["sparsity"], abs=0.005)
    assert floors(1024)["h_inv"] == pytest.approx(0.105, abs=5e-4)


def test_a_map_that_the_rows_do_not_determine_says_why():
    x = draw(60, 40)
    few = measure(Sums().add(x, x, halves(60)), (x, x, halves(60)))["h_inv"]
    assert few["value"] is None and "found 30 rows in the fitted half, wanted more than the 40" in few["why"]
    repeated = x[:20].repeat(10, 1).float()
    rank = measure(Sums(torch.float32).add(repeated, repeated, halves(200)), (repeated, repeated, halves(200)))["h_inv"]
    assert rank["value"] is None and "found states of rank 19" in rank["why"]


def test_unlike_widths_have_what_is_not_tied_to_coordinates():
    x = draw(500, 12) * torch.logspace(0, 1, 12)
    y = x @ torch.linalg.qr(draw(20, 12, 1))[0].T
    rows = x, y, halves(500)
    found = measure(Sums().add(*rows), rows)
    for name in ("correlation", "h_inv", "sparsity"):
        assert found[name]["value"] is None and "widths 12 and 20" in found[name]["why"]
    assert found["residual"]["value"] == pytest.approx(0, abs=1e-9) and found["residual"]["dimensions"] == 12
    assert found["cka"]["value"] == pytest.approx(1, abs=1e-9)
    noise = draw(500, 20, 3)
    assert measure(Sums().add(x, noise, halves(500)), (x, noise, halves(500)))["residual"]["value"] > 0.9, "control"


# ---- all layers against all, and the test


def test_all_layers_agree_with_single_pairs():
    a = np.stack([draw(200, 8, seed).numpy() + 3 for seed in range(3)]).astype(np.float32)
    b = np.stack([a[1] @ draw(8, 8, 9).numpy().astype(np.float32), a[0]])
    found = all_layers(a, b, CPU, torch.float64)
    for row in range(3):
        for column in range(2):
            sums = Sums().add(torch.from_numpy(a[row]), torch.from_numpy(b[column]), halves(200))
            assert found["cka"]["values"][row][column] == pytest.approx(cka(sums), abs=1e-9)
            assert found["cka_biased"]["values"][row][column] == pytest.approx(cka(sums, unbiased=False), abs=1e-9)
            assert found["correlation"]["values"][row][column] == pytest.approx(
                float(correlations(sums).mean()), abs=1e-9
            )
    assert "why" in all_layers(a, b[:, :, :5], CPU, torch.float64)["correlation"]


def test_the_permutation_test_of_cka():
    x, y = related(60)
    assert cka_p_value(x, y, 0) == 1 / 200
    assert cka_p_value(x, draw(60, 16, 5), 0) > 0.05, "control"
