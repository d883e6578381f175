"""Convert a checkpoint of gritlm-re to a model folder: `gritlm import OLD OUT`.

Such a checkpoint is config.json, a tokenizer, and a pickle of weights under `model.`. Only tensors are read from it.
"""

import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.backbone import ATTENTION, load_config
from gritlm.models.base_files import Base, read_json, refuse_lfs_pointer, unreadable
from gritlm.models.checks import check_base, check_tokenizer
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.report.card import CardFacts, write_card
from gritlm.serving.streamed_folder import DTYPES, write_model_folder

EXAMPLES = """examples:
  gritlm import old/checkpoint imported --query_prompt $'Instruct: Find the answer\\nQuery: '
An old checkpoint does not say how it was trained: give the flags of its training, where they were not the defaults.
Its training_args.bin is not read, since it is a pickle with code. `gritlm export OUT NEW` proves the vectors."""
POOLINGS = ("mean", "weightedmean", "cls")  # lasttoken was trained with a token of its own, </e>
WEIGHT_FILES = ("pytorch_model.bin", "model.safetensors")
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
UNUSED = re.compile(r"backbone\.(sigreg\.|lm_head\.|.*rotary_emb\.inv_freq$)")  # buffers, and a head without a use


def main(argv: list[str]) -> int:
    parser = verb_parser("import", __doc__, EXAMPLES)
    parser.add_argument("old", type=home_expanded, metavar="OLD", help="the folder of the old checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--attn", choices=ATTENTION, default="bb", help="default bb")
    parser.add_argument("--pooling_method", choices=POOLINGS, default="mean", help="default mean")
    parser.add_argument("--not_normalized", action="store_true", help="it was trained with --normalized False")
    for side in ("query", "passage"):
        parser.add_argument(f"--{side}_max_len", type=int, default=512, help="default 512")
    parser.add_argument("--query_prompt", default="", help="the instruction before a query; default none")
    args = parser.parse_args(argv)
    quieten()
    prompts = {"query": args.query_prompt} if args.query_prompt else {}
    limits = args.query_max_len, args.passage_max_len
    if min(limits) < 1:
        raise UserError(f"--query_max_len and --passage_max_len: found {limits}, wanted numbers above 0")
    contract = TextContract(*limits, args.pooling_method, not args.not_normalized, prompts=prompts)
    try:
        import_checkpoint(args.old, args.out, contract, args.attn)
    except UserError as error:  # without the flag under which training is given a model
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    if args.query_prompt:
        print("gritlm-re left the token behind a prompt that ends in white space out of the vector; here it is pooled")
    unit = "not normalised" if args.not_normalized else "normalised"
    said = f"{contract.pooling_method} pooling, {unit}, at most {limits} tokens, query prompt {args.query_prompt!r}"
    print(f"{args.out}: taken as trained with attn {args.attn}, {said}")
    return 0


def import_checkpoint(old: str, out: Path, contract: TextContract, attn: str) -> None:
    """Write the model folder `out` whole, or not at all. The backbone's weights keep their dtypes. Raises UserError."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; nothing is overwritten, name another folder")
    config = load_config(old, attn)
    check_base(old, config, reset_weight=True)  # all but its weights
    text_tokenizer = TextTokenizer(load_tokenizer(old, contract), contract)
    check_tokenizer(old, text_tokenizer.tokenizer, config)
    text_tokenizer.check_instruction(contract.prompts.get("query", ""), contract.query_max_len, "--query_max_len")
    weights = read_weights(Path(old))
    width = weights["projection.bias"].shape[0] if "projection.bias" in weights else None
    wanted = {f"backbone.{name}": shape for name, shape in Base(old, config).expected.items()}
    wanted |= {"projection.weight": [width, config.hidden_size], "projection.bias": [width]} if width else {}
    for name in sorted({*wanted, *weights}):
        found = list(weights[name].shape) if name in weights else "none"
        if found != (shape := wanted.get(name, "none")) or weights[name].dtype not in DTYPES.values():
            dtype = f" in {weights[name].dtype}" if name in weights else ""
            raise UserError(f"{old}: found weight {name!r} of shape {found}{dtype}, wanted {shape} (config.json)")
    with written_aside(out) as folder:
        dtypes = {name: value.dtype if "backbone." in name else torch.float32 for name, value in weights.items()}
        write_model_folder(folder, config, text_tokenizer, width, dtypes.__getitem__, weights.__getitem__)
        write_card(folder, CardFacts(changed=f"imported from the checkpoint {Path(old).name} of gritlm-re"))


def read_weights(old: Path) -> dict[str, Tensor]:
    """The weights of an old checkpoint by their names in the embedder, mapped into memory where that is possible."""
    for folder in (old, old / "full_state_dict"):  # where gritlm-re saves under FSDP
        for name in WEIGHT_FILES:
            files = [folder / name] if (folder / name).is_file() else []
            if (index := folder / f"{name}.index.json").is_file() and not files:
                files = [folder / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if missing := [path.name for path in files if not path.is_file()]:
                raise UserError(f"{index}: found no {', '.join(missing)} beside it, wanted every shard that it names")
            if found := {_here(key): value for path in files for key, value in read_tensors(path).items()}:
                if adapter := next((key for key in found if "lora_" in key), ""):
                    raise UserError(f"{folder}: found the adapter {adapter!r}, wanted it merged: utils/save_model.py")
                return {key: value for key, value in found.items() if not UNUSED.match(key)}
    raise UserError(f"{old}: found no {' or '.join(WEIGHT_FILES)}, nor their shards, wanted the weights")


def _here(key: str) -> str:
    name = re.sub(r"^(model\.)+", "", WRAPPERS.sub("", key))
    return name if name.startswith("projection.") else f"backbone.{name}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle, of which nothing is run. Raises UserError."""
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # of an unusual protocol
            found = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of torch, pickle or safetensors, by what is wrong with the file
        if code := re.search(r"GLOBAL (\S+)|Blocked|Unsupported \w+ (\S+)", str(error)):
            what = code[1] or "an object"
            raise UserError(f"{path}: found {what} in it, wanted tensors alone; nothing in it was run") from error
        raise unreadable(path, "a whole file of weights", error) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: found something else than tensors by name, wanted a state dict")
    return found
