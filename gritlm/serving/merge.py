"""Merge models of one architecture into one model folder: `gritlm merge A B OUT`.

What can be refused is refused before a weight is read. Weights are merged in float64, one at a time.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.backbone import load_config
from gritlm.models.base import read_base
from gritlm.models.base_files import WEIGHTS, Base, find_file, read_header
from gritlm.models.checks import check_base, check_tokenizer
from gritlm.models.text import CONTRACT_FILE, TextContract
from gritlm.models.tokenizer import PROBES, TextTokenizer, load_tokenizer
from gritlm.report.card import CardFacts, write_card
from gritlm.report.origin import Part
from gritlm.report.run import CHECKPOINT, WEIGHT_COPIES, find_run
from gritlm.serving.export import check_checkpoint
from gritlm.serving.streamed_folder import DTYPES, write_model_folder

EXAMPLES = """examples:
  gritlm merge outputs/seed-1 outputs/seed-2 merged                    the average
  gritlm merge outputs/seed-1 outputs/seed-2 merged --method slerp
  gritlm merge outputs/mine Qwen/Qwen3-0.6B merged --weights 0.7 0.3   with its base
  gritlm merge outputs/mine merged --last 5                            the last saves of a run with --merge_last 5
OUT is a model folder with the models' text contract; a model without one, such as a base, takes that of the others.
`gritlm export OUT NEW` proves its vectors in every program, `gritlm evaluate` measures them."""

LINEAR = 1e-3  # radians: weights at a smaller angle, or as near to opposite ones, are merged on a straight line
# Fields of config.json that do not change what the layers compute, or that are compared elsewhere.
NOT_COMPARED = {
    *("architectures", "dtype", "transformers_version", "_name_or_path", "vocab_size", "use_cache", "is_causal"),
    *("use_bidirectional_attention", "tie_word_embeddings", "max_position_embeddings", "matryoshka_dimensions"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "initializer_range"),
    "max_window_layers",
}


def main(argv: list[str]) -> int:
    parser = verb_parser("merge", __doc__, EXAMPLES)
    parser.add_argument("models", nargs="+", type=home_expanded, metavar="MODEL", help="a model; with --last, one run")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--method", choices=METHODS, default="average", help="default average")
    parser.add_argument("--weights", nargs="+", type=float, help="of each model, with a sum of 1; default: equal ones")
    parser.add_argument("--last", type=int, metavar="N", help="merge the last N saves of a run, the oldest first")
    args = parser.parse_intermixed_args(argv)  # flags may stand between the models and OUT
    quieten()
    names = args.models if args.last is None else last_saves(args.models, args.last)
    try:
        lines = merge(names, args.out, args.method, args.weights)
    except UserError as error:  # without the flag under which training is given a model
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    print("\n".join(lines))
    return 0


def merge(names: list[str], out: Path, method: str = "average", weights: Sequence[float] | None = None) -> list[str]:
    """Write the merged model folder `out` whole, or not at all.

    Args:
        names: model folders, or names on the hub.
        weights: of each model; None is equal ones.
    Returns:
        What to say about it, one line each.
    Raises:
        UserError: the models differ in more than their weights, one is not whole, or `weights` do not fit.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; nothing is overwritten, name another folder")
    shares = check_weights(names, weights)
    models = [Model(name) for name in names]
    giver, contract = agreed_contract(models)
    lines = [f"{m.name}: no {CONTRACT_FILE}; that of {giver.name} holds" for m in models if not m.contract]
    text_tokenizer = check_tokenizers(models, giver, contract)
    config, rows = copy.deepcopy(giver.config), [model.config.vocab_size for model in models]
    config.vocab_size = min(rows)
    if min(rows) < max(rows):
        lines.append(f"embeddings of {', '.join(map(str, rows))} rows: the first {min(rows)} are kept, all tokens' too")
    for model in models:
        lines += [f"{model.name}: {line}" for line in check_base(model.name, model.config, download=True)]
        model.find_weights()

    def read(name: str) -> Tensor:
        shape = min(model.weights[name].shape for model in models)  # embeddings may differ in their rows
        found = (model.load(name) for model in models)
        return METHODS[method]((weight[: shape[0]] if shape else weight for weight in found), shares)

    def widest_dtype(name: str) -> torch.dtype:
        return reduce(torch.promote_types, (model.weights[name].dtype for model in models))

    with written_aside(out) as folder:
        write_model_folder(folder, config, text_tokenizer, giver.settings.projection, widest_dtype, read)
        pairs = zip(models, shares, strict=True)
        parts = [Part(m.name, share, m.fingerprint, *m.origin) for m, share in pairs]
        prints = [part.fingerprint for part in parts]
        if same := [part.name for part in parts if prints.count(part.fingerprint) > 1]:
            raise UserError(f"{' and '.join(same)} hold the same weights, wanted different models")
        write_card(folder, CardFacts(changed=f"merged ({method})", parts=parts))
    return [*lines, f"{out}: {method} of {', '.join(f'{part.weight:.4g} {part.name}' for part in parts)}"]


# ---- the weights


def average(weights: Iterator[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean, in float64."""
    mean = next(weights).double() * shares[0]
    for weight, share in zip(weights, shares[1:], strict=True):
        mean.add_(weight, alpha=share)
    return mean


def slerp(weights: Iterator[Tensor], shares: Sequence[float]) -> Tensor:
    """Spherical interpolation (Shoemake, 1985) in float64: of the first two, then of the result and the third, ...

    With angle t of the flattened weights a and b, and b's share w: (sin((1 - w) t) a + sin(w t) b) / sin(t).
    """
    a, total = next(weights).double(), shares[0]
    for weight, share in zip(weights, shares[1:], strict=True):
        b, total = weight.double(), total + share
        w, scale = share / total, (a.norm() * b.norm()).item()
        t = math.acos(max(-1.0, min(1.0, torch.dot(a.flatten(), b.flatten()).item() / scale))) if scale else 0.0
        if LINEAR <= t <= math.pi - LINEAR:
            a = math.sin((1 - w) * t) / math.sin(t) * a + math.sin(w * t) / math.sin(t) * b
        else:
            a = (1 - w) * a + w * b
    return a


METHODS = {"average": average, "slerp": slerp}


class Stored(NamedTuple):  # a weight in a file
    path: Path
    key: str
    dtype: torch.dtype
    shape: list[int]


class Model:
    """One of the models; its contract is None if it was not made by this project."""

    def __init__(self, name: str):
        check_checkpoint(Path(name))
        if find_file(name, "adapter_config.json"):
            raise UserError(f"{name}: found an adapter, wanted whole weights: those that its run has published")
        path = find_file(name, CONTRACT_FILE)
        self.name, self.contract = name, TextContract.load(path.parent) if path else None
        self.origin = find_run(Path(name))
        self.config, self.settings = load_config(name, None if path else "bb"), read_base(name)
        self.weights: dict[str, Stored] = {}  # by their names in the embedder
        self.digests: dict[str, str] = {}  # of the weights that were loaded

    def facts(self) -> dict[str, Any]:
        """What all models that have it must have in common."""
        found = {"model_type": self.config.model_type} | self.config.to_dict()
        found = {key: value for key, value in found.items() if key not in NOT_COMPARED}
        base = self.settings
        found |= {"projection": (base.projection, base.projection_bias, base.unusable.get("projection"))}
        if self.contract:
            texts = asdict(self.contract)
            found |= {f"prompt {name!r}": prompt for name, prompt in texts.pop("prompts").items()}
            widths = getattr(self.config, "matryoshka_dimensions", None)
            found |= texts | {"attn": base.attn, "matryoshka_dimensions": widths}
        return found

    def find_weights(self) -> None:
        names = dict.fromkeys(Base(self.name, self.config, download=True).weight_files, ("model.", "backbone."))
        names |= {folder / WEIGHTS: ("linear.", "projection.")} if (folder := self.settings.projection_folder) else {}
        for path, (before, here) in names.items():
            for key, (dtype, shape) in read_header(path).items():
                self.weights[here + key.removeprefix(before)] = Stored(path, key, DTYPES[dtype], shape)

    def load(self, name: str) -> Tensor:
        stored = self.weights[name]
        with safe_open(stored.path, "pt") as file:
            weight = file.get_tensor(stored.key)
        if not weight.isfinite().all():
            raise UserError(f"{self.name}: found weight {stored.key!r} with a value that is not finite")
        self.digests[name] = hashlib.sha256(weight.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return weight

    @property
    def fingerprint(self) -> str:
        """The same for one file and for shards."""
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()[:16]


# ---- what is refused


def last_saves(runs: Sequence[str], count: int) -> list[str]:
    """The folders of a run's last saves, the oldest first: its weight-only copies, or else its checkpoints."""
    if len(runs) != 1 or count < 2:
        raise UserError(f"--last {count}: found {len(runs)} models, wanted one run, and 2 saves or more")
    run = Path(runs[0])
    for pattern in (f"{WEIGHT_COPIES}/step-*", f"{CHECKPOINT}*"):
        steps = {path.name.rpartition("-")[2]: path for path in run.glob(pattern)}
        saves = [str(steps[step]) for step in sorted(filter(str.isdigit, steps), key=int)]
        if len(saves) >= count:
            return saves[-count:]
    raise UserError(f"--last {count}: found {len(saves)} saves in {run}; gritlm train --merge_last {count} keeps them")


def check_weights(names: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The weight of each model. Refuses one model alone, and a model twice."""
    if len(names) < 2:
        raise UserError(f"found one model, {names[0]}, wanted two or more, and OUT behind them")
    places = [Path(name).resolve() for name in names]
    if again := [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"found {again[-1]} twice, wanted different models; --weights gives one more weight")
    if weights is None:
        return [1 / len(names)] * len(names)
    found = f"--weights: found {' '.join(f'{weight:g}' for weight in weights)}"
    if len(weights) != len(names):
        raise UserError(f"{found}, wanted {len(names)} numbers: one for each model")
    if not all(0 < weight < 1 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"{found} (sum {sum(weights):g}), wanted numbers above 0 with a sum of 1")
    return list(weights)


def agreed_contract(models: Sequence[Model]) -> tuple[Model, TextContract]:
    """The first model with a text contract, and its contract with the prompts of all. Refuses models that differ."""
    agreed: dict[str, tuple[Any, str]] = {}
    for model in models:
        for key, value in model.facts().items():
            wanted, other = agreed.setdefault(key, (value, model.name))
            if value != wanted:
                raise UserError(f"{model.name}: found {key} {value!r}, wanted {wanted!r} as in {other}")
    givers = [(model, model.contract) for model in models if model.contract]
    if not givers:
        raise UserError(f"found no {CONTRACT_FILE} in {', '.join(m.name for m in models)}; one must be of gritlm train")
    prompts = {name: prompt for _, contract in givers for name, prompt in contract.prompts.items()}
    return givers[0][0], replace(givers[0][1], prompts=prompts)


def check_tokenizers(models: Sequence[Model], giver: Model, contract: TextContract) -> TextTokenizer:
    """The tokenizer of the model that gives the contract. Refuses a model with other tokens or ids."""
    chosen = load_tokenizer(giver.name, contract)
    for model in models:
        tokenizer = load_tokenizer(model.name, contract)
        check_tokenizer(model.name, tokenizer, model.config)
        different = sorted(token for token, _ in chosen.get_vocab().items() ^ tokenizer.get_vocab().items())
        different += [text for text in PROBES if chosen(text).input_ids != tokenizer(text).input_ids]
        if different:
            raise UserError(f"{model.name}: found another tokenizer than in {giver.name}, first for {different[0]!r}")
    return TextTokenizer(chosen, contract)
