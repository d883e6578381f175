"""Parse the flags of a run, and refuse wrong ones before data or weights are read, by the rules of flag_rules.py."""

from types import SimpleNamespace
from typing import Any

from gritlm.data.folders import find_files
from gritlm.errors import UserError, one_line
from gritlm.models.base import BaseSettings, read_base
from gritlm.models.pooling import POOLING
from gritlm.strict_json import parse_json
from gritlm.training.arguments import EXAMPLES, GROUPS, ModelArguments, RunArguments
from gritlm.training.engine_files import check_engine_file, engine_asked_for
from gritlm.training.environment import refuse_environment
from gritlm.training.flag_parser import FlagParser, make_parser
from gritlm.training.flag_rules import MACHINE_RULES, OBJECTS, OF_AN_ADAPTER, OF_LORA, RULES, changed, check_ranges
from gritlm.training.inherited_flags import check_inherited, normalised
from gritlm.training.objective_rules import check_objective
from gritlm.training.rehearsal import check_compiler, rehearse
from gritlm.training.setup import settle

REQUIRED = ("model_name_or_path", "train_data", "output_dir")


def parse(argv: list[str]) -> RunArguments:
    """The flags of `gritlm train`, checked.

    Raises:
        UserError: for a flag that is unknown, wrong, missing, or contradicts another.
    """
    run, _ = build(make_parser("train", GROUPS, EXAMPLES), argv)
    check(run, run.training.world_size)
    return run


def build(
    parser: FlagParser, argv: list[str], replaced: dict[str, Any] | None = None
) -> tuple[RunArguments, list[Any]]:
    """The flags of a command line, those that the base decides settled; and the parser's further groups.

    Args:
        replaced: flags that are checked as they were given, and then have these values.
    Raises:
        UserError: what a group's __post_init__ raises; the base's own settings are damaged, or cannot be taken up.
    """
    unset = vars(parser.parse_args([]))
    flags = vars(parser.parse_args(argv))
    for name in ("deepspeed", "fsdp_config"):
        check_engine_file(name, flags[name], flags)
    refuse_environment(flags)
    for name in OBJECTS:
        check_object(name, flags.get(name))
    check_ranges(flags)
    check_inherited(flags, unset)
    check_compiler(flags["torch_compile_backend"], flags["torch_compile_mode"])
    flags = normalised(flags) | (replaced or {})
    try:
        groups = parser.parse_dict(flags)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(one_line(error)) from error
    model, data, objective, tuning, training, *more = groups
    rehearse(training, tuning)
    base = read_base(model.model_name_or_path)
    check_base_settings(model, base)
    model, data = settle(model, base, data.contract), settle(data, base, data.contract)
    return RunArguments(model, data, objective, tuning, training, base, parser.command), more


def check_base_settings(model: ModelArguments, base: BaseSettings) -> None:
    """Refuse a base with a pooling or a projection that the run cannot take up, unless a flag decides otherwise."""
    name, pooling, projection = f"--model_name_or_path {model.model_name_or_path}", "pooling_method", "projection"
    if pooling in base.unusable and model.pooling_method is None:
        raise UserError(
            f"{name}: found {base.unusable[pooling]} pooling, wanted {', '.join(POOLING)}; --{pooling} names another"
        )
    if model.projection == 0 or model.reset_weight:
        return
    if projection in base.unusable:
        raise UserError(
            f"{name}: found {base.unusable[projection]}, wanted one linear layer after pooling; "
            f"--{projection} 0 drops it"
        )
    if base.projection and model.projection not in (None, base.projection):
        raise UserError(
            f"{name}: found a projection of width {base.projection}, wanted --{projection} {model.projection}; "
            f"--{projection} {base.projection} takes it up, --{projection} 0 drops it"
        )


def check(run: RunArguments, ranks: int, here: bool = True) -> None:
    """Refuse flags that cannot work on this many ranks.

    Args:
        ranks: processes that the run has, or will have.
        here: False where a run is only planned, on a machine that need not be the one that runs it.
    """
    flags = run.flags()
    for name in REQUIRED:
        if not flags[name]:
            raise UserError(f"--{name} is missing")
    check_ranges(flags)
    engine = engine_asked_for(run.command.parsed)
    facts = SimpleNamespace(**flags, ranks=ranks, training=run.training, engine_asked_for=engine)
    for is_wrong, message in (*RULES, *(MACHINE_RULES if here else ())):
        if is_wrong(facts):
            engine = "--deepspeed" if run.training.deepspeed else "--fsdp"
            longest = max(run.data.query_max_len, run.data.passage_max_len)
            known = vars(facts) | {"engine": engine, "gpus": run.training.n_gpu, "longest": longest}
            known |= {"lora": "--qlora" if facts.qlora else "--lora", "lora_flags": changed(facts, OF_LORA)}
            known["adapter_flags"] = changed(facts, OF_AN_ADAPTER)
            known["ranks_or_engine"] = engine if run.training.deepspeed or run.training.fsdp else f"{ranks} ranks"
            raise UserError(message.format_map(known))
    check_objective(run, list(find_files(run.data.train_data)))


def check_object(name: str, text: str | None) -> None:
    """Refuse options of a schedule or of checkpointing that are no JSON object."""
    if not text:
        return
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"--{name}: found {text!r}, wanted a JSON object such as {OBJECTS[name]}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--{name}: found {text!r}, wanted a JSON object such as {OBJECTS[name]}")
