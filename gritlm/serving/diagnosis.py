"""Which setting differs where a program gives other vectors than the trainer: each is changed in turn, and compared."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from gritlm.models.base_files import Base
from gritlm.models.pooling import POOLING
from gritlm.models.text import CONTRACT_FILE, TextContract
from gritlm.models.tokenizer import LOADER_OPTIONS, load_tokenizer
from gritlm.serving.consumers import CONSUMERS
from gritlm.serving.probes import LIMITS, Differences, Found, Limits, Probe, Reference, TrainedModel


def describe_fault(folder: Path, reference: Reference, failed: dict[str, Found]) -> str:
    """The settings that explain the vectors of the programs that failed, each with the programs and a text."""
    limits, trained = LIMITS["float32"], reference.load()
    finite = {name: found.finite for name, found in failed.items()}
    differences = {name: found.differ_from(reference.vectors_ND) for name, found in finite.items()}
    longest = trained.contract.longest
    single_limit = replace(trained.contract, query_max_len=longest, passage_max_len=longest)
    faults: dict[str, str] = {}
    for own_rules, contract in ((True, trained.contract), (False, single_limit)):
        names = [name for name in failed if CONSUMERS[name].own_text_rules == own_rules]
        left = {name for name in names if differences[name].bad(limits).any()}
        for setting, vectors_ND in variants(folder, trained, reference.probes, contract) if left else ():
            explained = {name for name in left if not finite[name].differ_from(vectors_ND).bad(limits).any()}
            faults |= dict.fromkeys(explained, setting)
            left -= explained
            if not left:
                break
    parts: dict[str, list[str]] = {}
    for name, found in failed.items():
        fault = faults.get(name) or found.error
        if not fault and not differences[name].bad(LIMITS["bfloat16"]).any():
            fault = f"dtype: found {_dtypes(folder)}, wanted {str(reference.rounded_to).removeprefix('torch.')}"
        example = describe_worst(reference.probes, differences[name], limits)
        parts.setdefault(fault or "no single setting explains it: look at the weights", [example]).append(name)
    return "; ".join(f"{fault} ({', '.join(names)}{example})" for fault, (example, *names) in parts.items())


def describe_worst(probes: list[Probe], differences: Differences, limits: Limits) -> str:
    """The text whose vector is furthest from the trainer's."""
    bad_N = differences.bad(limits)
    if not bad_N.any():  # texts without any vector
        return ""
    worst = int(torch.where(bad_N, differences.cosine_N, 2.0).argmin())
    cosine, norm = (values_N[worst].item() for values_N in differences[:2])
    what = f"cosine {cosine:.6f}" if cosine < limits.cosine else f"norm off by {norm:.0%}"
    return f"; such as {probes[worst].text[:20]!r}, {probes[worst].side or 'no prompt'}: {what}"


def _dtypes(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder)
    weights = {dtype for dtype, _ in Base(str(folder), config).tensors.values()}
    return f"{str(config.dtype).removeprefix('torch.')} in config.json and {', '.join(sorted(weights))} weights"


def variants(
    folder: Path, trained: TrainedModel, probes: list[Probe], contract: TextContract
) -> Iterator[tuple[str, Tensor]]:
    """The trainer's vectors with one setting changed, in every way in which programs are known to go wrong.

    Each comes with the setting in words. Where a setting has any number of values, its value is what a file of the
    folder says; a file that cannot be read says nothing here, since the program that needs it has failed with its name.
    """

    def read(name: str) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def changed(tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> Tensor:
        return trained.encode(probes, replace(contract, **settings), tokenizer)

    for method in POOLING:
        yield f"pooling: found {method}, wanted {contract.pooling_method}", changed(pooling_method=method)
    pooled, unit, ends = contract.pool_instruction, contract.normalized, contract.append_eos
    yield f"prompt: found it {'not ' if pooled else ''}pooled", changed(pool_instruction=not pooled)
    own = {side: contract.prompts.get(side, "") for side in ("query", "document")}
    for file in ("config_sentence_transformers.json", CONTRACT_FILE, ""):
        said = read(file).get("prompts") or {}
        prompts = {side: said.get(side, "") for side in own}
        yield f"prompt: found {prompts}, wanted {own}", changed(prompts=prompts)
    yield f"normalisation: found {'no ' if unit else ''}unit norm", changed(normalized=not unit)
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limit = read(file).get(key) or contract.longest
        wanted = f"wanted {contract.longest}"
        yield f"length limit: found {limit}, {wanted}", changed(query_max_len=limit, passage_max_len=limit)
    other = load_tokenizer(trained.name, replace(contract, append_eos=not ends))
    yield f"end token: found {'none' if ends else 'one'} after each text", changed(other)
    for options in (LOADER_OPTIONS, {}):
        with suppress(Exception):  # the program that loads it says why it fails
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            yield "tokenizer: the folder's gives other tokens", changed(tokenizer)
    backbone, config = trained.embedder.backbone, trained.embedder.config
    if hasattr(config, "is_causal"):
        causal, kinds = config.is_causal, ("causal", "bidirectional")
        config.is_causal = not causal
        vectors_ND = changed()
        config.is_causal = causal
        yield f"causality: found {kinds[causal]} attention, wanted {kinds[not causal]}", vectors_ND
    with suppress(Exception):
        rotary = backbone.rotary_emb
        served = AutoConfig.from_pretrained(folder)
        backbone.rotary_emb = type(rotary)(served).to(trained.device)
        vectors_ND = changed()
        backbone.rotary_emb = rotary
        yield f"rope: found {served.rope_parameters}, wanted {config.rope_parameters}", vectors_ND
