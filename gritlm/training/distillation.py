"""Losses from scores and from a teacher's vectors. Pure maths.

Shape suffixes: B queries, G passages of each, P passages of all ranks, N scored pairs, D and E widths of the model and
of the teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosent(similarity_N: Tensor, score_N: Tensor, temperature: float) -> Tensor:
    """CoSENT (Su, 2022): `log(1 + sum over pairs i, j with y_i > y_j of exp((s_j - s_i)/t))`, a scalar.

    A sort and a cumulative log-sum take the place of the matrix of pairs.

    Args:
        similarity_N, score_N: s and y, float32.
    """
    score_N, order_N = score_N.sort()
    logits_N = similarity_N[order_N] / temperature
    higher_N = torch.searchsorted(score_N, score_N, right=True)  # the first pair with a higher score
    above_N = torch.logcumsumexp(-logits_N.flip(0), dim=0).flip(0)
    above_N = torch.cat([above_N, above_N.new_full((1,), float("-inf"))])
    return torch.logsumexp(torch.cat([logits_N.new_zeros(1), logits_N + above_N[higher_N]]), dim=0)


def angle_similarity(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """AnglE (Li & Li, arXiv 2309.12871), (N,): the halves of a vector are the parts of a complex vector.

    `|<a, b> + <a2, b1> - <a1, b2>|`, where 1 and 2 are the halves of unit vectors.
    """
    (a1, a2), (b1, b2) = a_ND.chunk(2, dim=1), b_ND.chunk(2, dim=1)
    return ((a_ND * b_ND).sum(1) + (a2 * b1).sum(1) - (a1 * b2).sum(1)).abs()


def score_divergence(
    similarity_BG: Tensor, teacher_BG: Tensor, known_BG: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """(B,): `T_s^2 KL(softmax(teacher/T_t) || softmax(s/T_s))` over the passages of a row that have a score."""
    left_out_BG = ~known_BG
    teacher_BG = teacher_BG.masked_fill(left_out_BG, 0.0) / teacher_temperature
    teacher_BG = teacher_BG.masked_fill(left_out_BG, float("-inf")).log_softmax(1).masked_fill(left_out_BG, -1e30)
    student_BG = (similarity_BG / student_temperature).masked_fill(left_out_BG, -1e30).log_softmax(1)
    divergence_B = (teacher_BG.exp() * (teacher_BG - student_BG)).masked_fill(left_out_BG, 0.0).sum(1)
    return torch.where(known_BG.any(1), student_temperature**2 * divergence_B, 0.0)


def margin_error(similarity_BG: Tensor, teacher_BG: Tensor, known_BG: Tensor, scale: float) -> Tensor:
    """(B,): the mean of `(scale (s+ - s-) - (t+ - t-))^2` over the scored negatives; slot 0 is the positive."""
    error_BG = scale * (similarity_BG[:, :1] - similarity_BG) - (teacher_BG[:, :1] - teacher_BG)
    counted_BG = known_BG & known_BG[:, :1]
    error_BG = torch.where(counted_BG, error_BG, 0.0)[:, 1:]
    return error_BG.square().sum(1) / counted_BG[:, 1:].sum(1).clamp(min=1)


def vector_distance(student_BGE: Tensor, teacher_BGE: Tensor, used_BG: Tensor, kind: str) -> Tensor:
    """(B,): the mean over a row's texts of `1 - cosine`, or with `mse` of the mean squared difference."""
    if kind == "mse":
        distance_BG = (student_BGE - teacher_BGE).square().mean(2)
    else:
        distance_BG = 1 - F.cosine_similarity(student_BGE, teacher_BGE, dim=2)
    return (distance_BG * used_BG).sum(1) / used_BG.sum(1)


def score_matrix_error(
    queries_BD: Tensor, passages_PD: Tensor, teacher_BE: Tensor, teacher_PE: Tensor, pairs: Tensor
) -> Tensor:
    """(B,): the mean over all passages of `(s - t)^2`, where `pairs` is their number.

    From D x D matrices, in float64 since they nearly cancel: `|q P'|^2 = q (P'P) q'`.
    """
    q, p, tq, tp = (x.double() for x in (queries_BD, passages_PD, teacher_BE, teacher_PE))
    own_B = (q @ (p.T @ p) * q).sum(1) + (tq @ (tp.T @ tp) * tq).sum(1)
    return ((own_B - 2 * (q @ (p.T @ tp) * tq).sum(1)) / pairs).float()
