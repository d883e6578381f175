"""What a run would do, without loading a model: flags, paths and data checked, steps, negatives, the first batches."""

from dataclasses import dataclass

from gritlm.cli import quieten
from gritlm.data.records import load_records
from gritlm.models.backbone import load_config
from gritlm.models.base_files import Base
from gritlm.models.checks import check_base
from gritlm.models.lora import adapter_shapes
from gritlm.training.adapters import adapter_config
from gritlm.training.arguments import GROUPS, flag
from gritlm.training.evaluation_data import gather_evaluation_data, given_sets
from gritlm.training.flag_checks import build, check
from gritlm.training.flag_parser import make_parser
from gritlm.training.optimizers import describe_split
from gritlm.training.run_folder import find_checkpoint, run_settings_of
from gritlm.training.setup import make_plan
from gritlm.training.start_report import describe_run

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
    run, (wanted,) = build(parser, argv, replaced=WITHOUT)
    check(run, wanted.ranks, here=False)
    name, remote = run.model.model_name_or_path, run.model.trust_remote_code
    config = load_config(name, run.model.attn, remote)
    for line in check_base(name, config, remote, run.model.reset_weight):
        print(line)
    records = load_records(run.data.train_data, run.data.data_cache)
    plan = make_plan(run, records)
    given = given_sets(run)
    evaluation_data = gather_evaluation_data(run, plan, records, given)
    _, lines, warnings = describe_run(run, plan, records, config, wanted.ranks, evaluation_data)
    if run.tuning.use_muon:  # now, since transformers knows a base with its own code once it was probed
        adapter = adapter_config(run, config)
        shapes = adapter_shapes(config, adapter) if adapter else Base(name, config, remote).expected
        print(describe_split(shapes) if shapes else "Muon: its matrices are listed at the start of the run")
    print("\n".join([*lines, *(f"warning: {line}" for line in warnings)]))
    for step in range(min(wanted.batches, plan.steps_per_epoch)):
        batch = plan.batch(0, step)
        rows = [f"{records[dataset].name}:{row}" for dataset, row in batch.rows]
        more = f", ... ({len(rows)} in all)" if len(rows) > 6 else ""
        print(f"batch {step + 1}, {batch.dataset}: rows {', '.join(rows[:6])}{more}")
    find_checkpoint(run.training, run_settings_of(run, records, wanted.ranks, given), engine=None)
    return 0
