"""Write a model folder for serving, and prove that it gives the trainer's vectors: `gritlm export CHECKPOINT OUT`."""

import importlib.util
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_token
from transformers.trainer_utils import sort_checkpoints

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.devices import chosen_device
from gritlm.errors import UserError, one_line
from gritlm.files import size_text, written_aside
from gritlm.models.base_files import MANIFEST, find_damaged_file, read_json
from gritlm.models.embedder import Embedder
from gritlm.models.hub import is_hub_name
from gritlm.report.card import CardFacts, parity_table, write_card
from gritlm.report.run import find_run, read_results
from gritlm.report.usage import PASSAGES, QUERIES
from gritlm.serving.consumers import CONSUMERS
from gritlm.serving.formats import CONVERTER, ExportOptions, write_gguf, write_model, write_onnx
from gritlm.serving.parity import Row, prove
from gritlm.serving.probes import LIMITS, Reference, TrainedModel

EXAMPLES = """examples:
  gritlm export outputs/mine served/mine
  gritlm export outputs/mine/checkpoint-500 served/mine --dtype bfloat16 --max_shard_size 5GB
  gritlm export outputs/mine served/mine-256 --truncate_dim 256
  gritlm export outputs/mine served/mine --push_to_hub me/mine --dry_run
OUT holds the model folder alone: no checkpoints, no optimizer, no run files. transformers, sentence-transformers and
GritLM load it and encode probe texts; a program that gives other vectors than the trainer is an error, and nothing is
written."""


def main(argv: list[str]) -> int:
    parser = verb_parser("export", __doc__, EXAMPLES)
    parser.add_argument("checkpoint", type=home_expanded, metavar="CHECKPOINT", help="a run's folder, or a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=LIMITS, default="float32", help="of the weights, default float32")
    parser.add_argument("--max_shard_size", default="50GB", help="largest weights file, such as 5GB; default 50GB")
    parser.add_argument("--truncate_dim", type=int, help="keep this many leading dimensions of each vector")
    parser.add_argument("--onnx", action="store_true", help="write the backbone to onnx/model.onnx, too")
    parser.add_argument("--gguf", action="store_true", help="write a GGUF file for llama.cpp, too; needs --llama_cpp")
    parser.add_argument("--llama_cpp", type=Path, metavar="DIR", help=f"a checkout of llama.cpp, with its {CONVERTER}")
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload OUT to this repository of the Hugging Face hub")
    parser.add_argument("--dry_run", action="store_true", help="show what --push_to_hub would upload, and do not")
    what = "for the card:"
    parser.add_argument("--license", help=f"{what} licence of the model, such as mit; default that of the base's card")
    parser.add_argument("--language", nargs="+", default=(), help=f"{what} languages of the texts, such as en de")
    parser.add_argument("--datasets", nargs="+", default=(), help=f"{what} names of the training data on the hub")
    parser.add_argument("--results", nargs="+", type=Path, default=(), help=f"{what} files of gritlm evaluate")
    parser.add_argument("--device", help="where the programs run, default CUDA if there is a GPU")
    arguments = vars(parser.parse_args(argv))
    checkpoint, out, dry_run = (arguments.pop(name) for name in ("checkpoint", "out", "dry_run"))
    check_card_flags(arguments)
    results = read_card_results(checkpoint, arguments.pop("results"))
    card = CardFacts(results=results, **{name: arguments.pop(name) for name in ("license", "language", "datasets")})
    options = ExportOptions(**arguments, card=card)
    check_hub(options.push_to_hub, dry_run)
    quieten()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # it advises against half precision on a CPU
    rows = export(checkpoint, out, options)
    table = "\n".join(parity_table(rows))
    print(f"{parity_note(options.dtype)}\n\n{table}\n")
    files = [path for path in out.rglob("*") if path.is_file()]
    print(f"{out}: {len(files)} files, {size_text(sum(path.stat().st_size for path in files))}")
    if not out.stat().st_mode & 0o001:
        print(f"{out}: not every user of this machine can read it, because of this shell's umask")
    if options.truncate_dim not in (None, *read_json(out / "config.json").get("matryoshka_dimensions", ())):
        print(f"--truncate_dim {options.truncate_dim}: the model was not trained for it; gritlm evaluate measures it")
    if options.push_to_hub:
        push(out, options.push_to_hub, dry_run)
    return 0


def export(
    checkpoint: str, out: Path, options: ExportOptions, written: Callable[[Path], object] = lambda folder: None
) -> list[Row]:
    """Write `out` whole, with its parity table in its card, or not at all.

    Args:
        checkpoint: a run's output folder, a checkpoint, or any model folder of ours.
        out: the folder to write.
        written: called with the folder after it is written and before it is proved.
    Returns:
        The parity table.
    Raises:
        UserError: an option does not fit, the checkpoint is not whole, or a program gives other vectors.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; nothing is overwritten, name another folder")
    check_options(options)
    check_checkpoint(Path(checkpoint))
    run, step = find_run(Path(checkpoint))
    facts = replace(options.card, run=run, step=step)
    device = chosen_device(options.device)
    try:
        trained = TrainedModel(checkpoint, device, options.truncate_dim)
    except UserError as error:  # without the flag under which training is given a model
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    check_model(trained.embedder, options)
    reference, stored = Reference(trained), None
    if options.dtype != "float32":
        trained.round(getattr(torch, options.dtype))
        stored = Reference(trained)
    with written_aside(out) as folder:
        extra: list[Row] = []
        try:
            write_model(trained, folder, options)
            del trained  # the programs load it again, one by one
            if options.onnx:
                write_onnx(folder)
            if options.gguf:
                extra.append(write_gguf(folder, out.name, options))
        except Exception as error:  # safetensors and tokenizers have no OSError for a full disk
            if "os error" not in str(error):
                raise
            free = size_text(shutil.disk_usage(out.parent).free)
            raise UserError(f"{out} could not be written ({one_line(error)}; {free} are free there)") from error
        written(folder)
        try:
            rows = [*prove(folder, reference, options.dtype, stored), *extra]
        except UserError as error:
            raise UserError(f"{out}: other vectors than the trainer's: {error}; nothing was written") from error
        facts = replace(facts, parity=rows, parity_note=parity_note(options.dtype), name=options.push_to_hub or ".")
        if options.truncate_dim:
            facts = replace(facts, changed=f"cut to {options.truncate_dim} dimensions")
        write_card(folder, replace(facts, scores=usage_scores(folder, device)))
    return rows


# ---- what is refused


def check_options(options: ExportOptions) -> None:
    """Refuse options that do not fit, before a model is loaded."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", options.max_shard_size):
        raise UserError(f"--max_shard_size: found {options.max_shard_size!r}, wanted a size such as 5GB or 500MB")
    if options.truncate_dim is not None and options.truncate_dim < 1:
        raise UserError(f"--truncate_dim: found {options.truncate_dim}, wanted a number of dimensions")
    chosen_device(options.device)
    for package in ("onnx", "onnxscript"):
        if options.onnx and importlib.util.find_spec(package) is None:
            raise UserError(f"--onnx: {package} is not installed; pip install 'gritlm[onnx]'")
    if options.gguf != (options.llama_cpp is not None):
        raise UserError("--gguf and --llama_cpp DIR: found one without the other, wanted both or none")
    if options.llama_cpp and not (options.llama_cpp / CONVERTER).is_file():
        raise UserError(f"--llama_cpp {options.llama_cpp}: found no {CONVERTER} there, wanted a checkout of llama.cpp")


def check_card_flags(arguments: dict[str, Any]) -> None:
    """Refuse what the hub would refuse in the card."""
    for language in arguments["language"]:
        if not re.fullmatch(r"[a-z]{2,3}(-\w+)*|multilingual|code", language):
            raise UserError(f"--language: found {language!r}, wanted a code such as en, deu or zh-Hant")
    for name in arguments["datasets"]:
        if not is_hub_name(name):
            raise UserError(f"--datasets: found {name!r}, wanted a name of the hub, such as me/pairs")
    if (license_name := arguments["license"]) and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_name):
        raise UserError(f"--license: found {license_name!r}, wanted the hub's name of a licence, such as apache-2.0")


def read_card_results(checkpoint: str, files: Sequence[Path]) -> list[dict[str, Any]]:
    """The results in files of `gritlm evaluate`.

    Raises:
        UserError: a file holds none, or those of another model.
    """
    found: list[dict[str, Any]] = []
    for path in files:
        content = read_results(path)
        model = ((content.get("about") or {}).get("model") or {}).get("name")
        if model is None or Path(model).resolve() != Path(checkpoint).resolve():
            raise UserError(f"--results {path}: found results of {model or 'a run'}, wanted those of {checkpoint}")
        found += content["sets"]
    return found


def check_checkpoint(folder: Path) -> None:
    """Refuse half a checkpoint, and a run that is not finished.

    Raises:
        UserError: naming the file, or the checkpoint to take.
    """
    damage, manifest = "", folder / MANIFEST
    if not folder.is_dir() and (folder.exists() or not is_hub_name(str(folder))):
        raise UserError(f"{folder}: found no such folder, wanted a model folder")
    if manifest.is_file():
        listed = read_json(manifest)
        try:
            damage = find_damaged_file(folder, {name: listed["files"][name] for name in listed["served"]})
        except (KeyError, TypeError) as error:
            damage = f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    elif (folder / "trainer_state.json").is_file():
        damage = f"found no {MANIFEST} there"
    elif (folder / "run.json").is_file() and not (folder / "modules.json").is_file():
        checkpoints = sort_checkpoints(str(folder))
        hint = f"export {checkpoints[-1]}" if checkpoints else "it has no checkpoint yet"
        raise UserError(f"{folder}: found a run that is not finished, wanted a model; {hint}")
    if damage:
        raise UserError(f"{folder}: {damage}, wanted a whole checkpoint")


def check_model(embedder: Embedder, options: ExportOptions) -> None:
    """Refuse options that this model cannot have."""
    width, found = embedder.embedding_dim, options.truncate_dim
    if found is not None and found >= width:
        raise UserError(f"--truncate_dim: found {found}, wanted less than the {width} dimensions of the model")
    if options.gguf and (embedder.projection is not None or found is not None):
        what = "--truncate_dim, which becomes a projection" if found else "a model with a projection"
        raise UserError(f"--gguf: found {what}, wanted a model without: llama.cpp leaves it out silently")
    dtype = getattr(torch, options.dtype)
    for name, weight in embedder.backbone.named_parameters():
        if weight.abs().max() > torch.finfo(dtype).max:
            raise UserError(f"--dtype {options.dtype}: weight {name!r} holds larger values; bfloat16 has room for them")


# ---- what is said


def usage_scores(folder: Path, device: str) -> list[list[float]]:
    """What the card's code prints."""
    encode = CONSUMERS["sentence-transformers"].load(folder, device, None)
    return (encode("query", QUERIES) @ encode("document", PASSAGES).T).tolist()


def parity_note(dtype: str) -> str:
    weights = "" if dtype == "float32" else f" of {dtype} weights"
    return (
        f"Smallest cosine{weights} with the trainer's float32 vectors, wanted at least {LIMITS[dtype].cosine}: "
        "as queries, as passages and without a prompt."
    )


# ---- the hub


def check_hub(name: str | None, dry_run: bool) -> None:
    """Refuse a name that the hub cannot have, or an upload without a login, before anything is done."""
    if name is None:
        if dry_run:
            raise UserError("--dry_run: found no --push_to_hub NAME, wanted it: a dry run shows what would be uploaded")
        return
    if not is_hub_name(name):
        raise UserError(f"--push_to_hub: found {name!r}, wanted a name of the hub, such as me/mine")
    if not dry_run and not get_token():
        raise UserError("--push_to_hub: found no login, wanted one: hf auth login, or HF_TOKEN")


def push(out: Path, name: str, dry_run: bool) -> None:
    """Upload a folder, or list its files and show its card."""
    if dry_run:
        print(f"would be uploaded to {constants.ENDPOINT}/{name}:")
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            print(f"  {path.relative_to(out)}  {size_text(path.stat().st_size)}")
        print(f"\nREADME.md:\n{(out / 'README.md').read_text(encoding='utf-8')}")
        return
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        api.create_repo(name, exist_ok=True)
        print(f"uploaded: {api.upload_folder(repo_id=name, folder_path=out)}")
    except Exception as error:  # of the library, the hub and the network
        raise UserError(
            f"--push_to_hub {name}: {one_line(error)[:300]}; {out} is whole: hf upload {name} {out}"
        ) from error
