"""What a run would do, without loading a model: flags, paths and data checked, steps, negatives, the first batches."""

import math
from dataclasses import dataclass

from gritlm.cli import quieten
from gritlm.data.records import load_records
from gritlm.models.backbone import load_config
from gritlm.training.arguments import build, check, flag, make_parser
from gritlm.training.run_folder import find_checkpoint, run_settings_of
from gritlm.training.setup import build_text_tokenizer, describe, make_plan, show_examples

EXAMPLES = """examples:
  gritlm plan --model_name_or_path Qwen/Qwen3-0.6B --train_data data/ --output_dir out --ranks 8 --batches 10"""


@dataclass
class PlanArguments:
    """What to plan for."""

    ranks: int = flag(1, "Processes (GPUs) that the run will have, on all nodes together.")
    batches: int = flag(3, "How many of the first batches to print.")


def main(argv: list[str]) -> int:
    quieten()
    parser = make_parser(PlanArguments)
    parser.prog, parser.epilog = "gritlm plan", EXAMPLES
    # Nothing is started: engines, GPUs and loggers stay out of it.
    here = {"deepspeed": None, "fsdp": None, "fsdp_config": None, "use_cpu": True, "report_to": "none"}
    model_args, data_args, args, wanted = build(vars(parser.parse_args(argv)), PlanArguments, here=here)
    check(model_args, data_args, args, wanted.ranks, real=False)
    load_config(model_args.model_name_or_path, model_args.attn, model_args.trust_remote_code)
    records = load_records(data_args.train_data, data_args.data_cache)
    plan = make_plan(data_args, args, records, wanted.ranks)
    print("\n".join(describe(plan, data_args, args, records, wanted.ranks)))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    print(f"  {steps} steps in all")
    text_tokenizer = build_text_tokenizer(model_args, data_args, records)
    print("\n".join(show_examples(text_tokenizer, records)))
    for step in range(min(wanted.batches, plan.steps_per_epoch)):
        batch = plan.batch(0, step)
        rows = [f"{records[dataset].name}:{row}" for dataset, row in batch.rows]
        more = f", ... ({len(rows)} in all)" if len(rows) > 6 else ""
        print(f"batch {step + 1}, {batch.dataset}: rows {', '.join(rows[:6])}{more}")
    find_checkpoint(args, run_settings_of(model_args, data_args, args, records, wanted.ranks), engine=None)
    return 0
