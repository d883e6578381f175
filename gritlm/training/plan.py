"""What a run would do, without loading a model: flags, paths and data checked, steps, negatives, the first batches."""

from dataclasses import dataclass

from gritlm.cli import quieten
from gritlm.data.records import load_records
from gritlm.models.backbone import load_config
from gritlm.models.checks import check_base, check_tokenizer
from gritlm.training.arguments import GROUPS, flag
from gritlm.training.disk_space import check_disk_space
from gritlm.training.flag_checks import build, check
from gritlm.training.flag_parser import make_parser
from gritlm.training.negatives import describe_negatives
from gritlm.training.rehearsal import describe_schedule, steps_in_all
from gritlm.training.run_folder import find_checkpoint, run_settings_of
from gritlm.training.setup import (
    build_text_tokenizer,
    describe,
    describe_base,
    make_plan,
    show_examples,
    used_sets,
)
from gritlm.training.text_report import report_on_texts

EXAMPLES = """examples:
  gritlm plan --model_name_or_path Qwen/Qwen3-0.6B --train_data data/ --output_dir out --ranks 8 --batches 10"""

# A plan starts nothing: no engine, no GPU.
WITHOUT = {"deepspeed": None, "fsdp": None, "fsdp_config": None, "use_cpu": True}


@dataclass
class PlanArguments:
    """What to plan for."""

    ranks: int = flag(1, "Processes (GPUs) that the run will have, on all nodes together.")
    batches: int = flag(3, "Print this many batches, from the first on.")


def main(argv: list[str]) -> int:
    quieten()
    parser = make_parser("plan", (*GROUPS, PlanArguments), EXAMPLES)
    run, wanted = build(parser, argv, PlanArguments, replaced=WITHOUT)
    check(run, wanted.ranks, here=False)
    name, remote = run.model.model_name_or_path, run.model.trust_remote_code
    config = load_config(name, run.model.attn, remote)
    for line in check_base(name, config, remote, run.model.reset_weight):
        print(line)
    records = load_records(run.data.train_data, run.data.data_cache)
    plan = make_plan(run, records)
    used = used_sets(plan, records)
    text_tokenizer = build_text_tokenizer(run, used)
    check_tokenizer(name, text_tokenizer.tokenizer, config)
    lines, warnings = report_on_texts(used, text_tokenizer, run.data.query_prompt)
    base, planned = describe_base(run, text_tokenizer.contract), describe(plan, run, records, wanted.ranks)
    negatives, doubts = describe_negatives(plan, run, records, wanted.ranks, text_tokenizer)
    warnings += doubts
    disk = check_disk_space(run, config, plan.steps_per_epoch)
    print("\n".join([*base, *planned, *negatives, *disk]))
    args = run.training
    warnings += describe_schedule(args, steps_in_all(args, plan.steps_per_epoch))
    print("\n".join([*lines, *show_examples(text_tokenizer, used), *(f"warning: {line}" for line in warnings)]))
    for step in range(min(wanted.batches, plan.steps_per_epoch)):
        batch = plan.batch(0, step)
        rows = [f"{records[dataset].name}:{row}" for dataset, row in batch.rows]
        more = f", ... ({len(rows)} in all)" if len(rows) > 6 else ""
        print(f"batch {step + 1}, {batch.dataset}: rows {', '.join(rows[:6])}{more}")
    find_checkpoint(args, run_settings_of(run, records, wanted.ranks), engine=None)
    return 0
