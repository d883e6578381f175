"""Does a model folder give the trainer's vectors in every program that loads it? `prove` answers with a table.

Shape suffixes: N probe texts, D width.
"""

from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gritlm.errors import UserError, one_line
from gritlm.serving.consumers import CONSUMERS, Consumer, Encode
from gritlm.serving.diagnosis import describe_fault, describe_worst
from gritlm.serving.probes import LIMITS, Found, Limits, Probe, Reference

ALL = "all"  # in place of a kind of text


class Row(NamedTuple):
    """A row of the parity table: the smallest cosine with the trainer's vectors, or why there is none."""

    consumer: str
    what: str
    result: float | str


def prove(folder: Path, reference: Reference, dtype: str = "float32", stored: Reference | None = None) -> list[Row]:
    """Encode the probe texts with every program that is installed, and compare the vectors with the trainer's.

    Args:
        folder: the model folder to prove.
        reference: the trainer's vectors.
        dtype: of the folder's weights; how much may differ depends on it.
        stored: for half precision: the trainer's vectors with weights that are rounded likewise. All programs compute
            in float32 first and have to give these as exactly as ever, so that no fault hides in the rounding.
    Returns:
        The parity table.
    Raises:
        UserError: a program gives other vectors; it names the program, a text, and the setting that differs.
    """
    limits = LIMITS[dtype]
    if stored:
        _, failed = _compare(folder, stored, LIMITS["float32"], torch.float32)
        if failed:
            raise UserError(describe_fault(folder, stored, failed))
    rows, failed = _compare(folder, reference, limits, None)
    if failed and stored:
        found = next(iter(failed.values()))
        example = describe_worst(reference.probes, found.differ_from(reference.vectors_ND), limits)
        raise UserError(f"dtype: {dtype} moves them too far ({', '.join(failed)}{example})")
    if failed:
        raise UserError(describe_fault(folder, reference, failed))
    return rows


def _compare(
    folder: Path, reference: Reference, limits: Limits, dtype: torch.dtype | None
) -> tuple[list[Row], dict[str, Found]]:
    """The parity table, and what the programs gave whose vectors differ."""
    rows: list[Row] = []
    failed: dict[str, Found] = {}
    for name, consumer in CONSUMERS.items():
        if reason := consumer.why_not(folder):
            rows.append(Row(name, ALL, reason))
            continue
        reasons = [""] * len(reference.probes) if consumer.own_text_rules else reference.reasons
        found = run(consumer, folder, reference, reasons, dtype)
        differences = found.differ_from(reference.vectors_ND)
        if differences.bad(limits).any():
            failed[name] = found
        rows += _summarise(name, reference.probes, reasons, differences.cosine_N)
    return rows, failed


def run(consumer: Consumer, folder: Path, reference: Reference, reasons: list[str], dtype: torch.dtype | None) -> Found:
    """The vectors of the probe texts, NaN where there is a reason for none, or where the program fails."""
    vectors_ND, probes, first_error = torch.full_like(reference.vectors_ND, float("nan")), reference.probes, ""
    asked = [i for i, reason in enumerate(reasons) if not reason]
    encode: Encode | None = None
    for (_, side), group in groupby(asked, lambda i: probes[i][:2]):
        numbers = list(group)
        try:
            encode = encode or consumer.load(folder, reference.device, dtype)
            vectors_ND[numbers] = encode(side, [probes[i].text for i in numbers]).float().cpu()
        except Exception as error:  # any, since it depends on the program and on what is wrong with the folder
            first_error = first_error or f"{type(error).__name__}: {one_line(error)}"
            if encode is None:
                break
    return Found(vectors_ND, torch.tensor([not reason for reason in reasons]), first_error)


def _summarise(name: str, probes: list[Probe], reasons: list[str], cosine_N: Tensor) -> list[Row]:
    """For each kind of text the smallest cosine, and the reasons of sides that are not compared."""
    rows: list[Row] = []
    for kind in dict.fromkeys(probe.kind for probe in probes):
        numbers = [i for i, probe in enumerate(probes) if probe.kind == kind]
        compared = [i for i in numbers if not reasons[i]]
        if compared:
            rows.append(Row(name, kind, cosine_N[compared].min().item()))
        for reason in dict.fromkeys(reasons[i] for i in numbers if reasons[i]):
            sides = dict.fromkeys(probes[i].side or "no prompt" for i in numbers if reasons[i] == reason)
            rows.append(Row(name, f"{kind} ({', '.join(sides)})" if compared else kind, reason))
    return rows
