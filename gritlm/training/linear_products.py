"""Which products of the linear layers a run takes from oneDNN: measured at its start, then the same on every resume."""

from pathlib import Path

from gritlm.distributed import gather_objects
from gritlm.models.cpu_linear import choose_products, measure_products, use_products
from gritlm.models.embedder import Embedder
from gritlm.training.arguments import RunArguments
from gritlm.training.checkpoints import read_manifest
from gritlm.training.run_folder import update_run_file
from gritlm.training.run_log import log

ONEDNN = "onednn"  # of run.json and of a checkpoint's manifest: the directions, a list


def set_products(run: RunArguments, embedder: Embedder, checkpoint: str | None) -> None:
    """Replace the linear layers on a CPU in float32, without FSDP or DeepSpeed. All ranks call it, and agree.

    A checkpoint's directions are taken as they are. One that records none was trained with torch.mm.
    """
    args = run.training
    able = args.device.type == "cpu" and not args.bf16 and args.engine == "ddp"
    recorded = read_manifest(checkpoint).get(ONEDNN, []) if checkpoint else None
    chosen: list[str] = []
    if not able:
        line = "they are only used on a CPU, in float32, without FSDP and DeepSpeed"
    elif recorded is None:
        chosen, line = choose_products(embedder)
    else:
        gains, line = measure_products(embedder, recorded)
        chosen = list(gains)
    every = gather_objects(chosen)
    agreed = [name for name in chosen if all(name in other for other in every)]
    use_products(embedder, agreed)
    if args.process_index:
        return
    if lost := [name for name in recorded or [] if name not in agreed]:
        log.warning(
            "linear layers: the checkpoint's run took %s from oneDNN, this one takes it from torch.mm and will not be "
            "bit-identical: %s",
            ", ".join(lost),
            line or "not every rank can use oneDNN",
        )
    elif able and recorded is None and line:
        log.info("linear layers: %s", line)
        if agreed != chosen:
            log.info("linear layers: oneDNN only for %s, where all ranks gain", ", ".join(agreed) or "nothing")
    update_run_file(Path(args.output_dir or ""), **{ONEDNN: agreed})
