"""Every flag, once: its name, default, help, and whether it changes what is learnt. Checks are in flag_rules.py.

Defaults are the paper's recipe (arXiv 2601.21192, appendix A), except where the base is an embedding model and has its
own settings. Hugging Face's `TrainingArguments` are flags as well.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import SchedulerType, TrainingArguments

from gritlm.models.base import BaseSettings
from gritlm.models.pooling import POOLING
from gritlm.report.servers import PORTABLE_POOLING
from gritlm.training.inherited_flags import INHERITED


def flag(default: Any, help: str, changes_learning: bool = True, **argparse_options: Any) -> Any:
    """Declare a flag. A run and its continuation must agree on each flag that changes what is learnt."""
    return field(default=default, metadata={"help": help, "changes_learning": changes_learning, **argparse_options})


def open_flag(paper: Any, help: str, **argparse_options: Any) -> Any:
    """Declare a flag that is None until `settle`: not given, it is what the base says of itself, else the paper's."""
    return flag(None, help, paper=paper, **argparse_options)


@dataclass
class ModelArguments:
    """The network."""

    model_name_or_path: str = flag("", "Decoder LLM or encoder: a folder or a hub name. Required.")
    attn: Literal["bb", "cc"] = open_flag("bb", "Attention: bb bidirectional, cc causal.")
    attn_implementation: str = flag(
        "packed", "Attention kernel: packed (no padding), or padded: sdpa, eager, flash_attention_2."
    )
    pooling_method: str = open_flag(
        "mean",
        "Token states to one vector: mean, weightedmean (by position), lasttoken, cls (first token).",
        choices=tuple(POOLING),
    )
    normalized: bool = open_flag(True, "Divide each vector by its norm, so that the similarity is the cosine.")
    projection: int | None = open_flag(None, "Width of a linear layer after pooling. 0: no such layer.")
    reset_weight: bool = flag(False, "Start from the model's random initialisation; read no weights.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")


@dataclass
class DataArguments:
    """The data and the text contract."""

    train_data: str = flag(
        "",
        "A .jsonl file (plain, .gz, .bz2, .zst or .xz), a .parquet file, or a folder. In a folder, each file, each "
        "group of shards and each sub-folder is one data set; test splits are left out. Required.",
        changes_learning=False,  # what is compared is the rows
    )
    train_group_size: int = flag(4, "Passages per query: 1 positive, the rest hard negatives where there are any.")
    max_positives: int = flag(
        1, "Positives of a row that a step contrasts with its negatives, each for itself. More than 1 adds passages."
    )
    query_max_len: int = open_flag(512, "Longest query in tokens, instruction included; the end is cut off.")
    passage_max_len: int = open_flag(512, "Longest passage in tokens; the end is cut off.")
    contract: str | None = flag(
        None,
        "Sets pooling, --pool_instruction and --append_eos: paper, or portable, which vLLM, TEI and llama.cpp serve. "
        "None: the base's, else paper.",
        choices=("paper", "portable"),
    )
    pool_instruction: bool = open_flag(False, "Include the instruction's tokens in pooling.")
    append_eos: bool = open_flag(False, "End every text with the tokenizer's end-of-text token.")
    query_prompt: str | None = flag(
        None,
        "Instruction stored as the model's query prompt. None: that of nine rows of ten of the largest data set.",
        changes_learning=False,
    )
    max_example_num_per_dataset: int | None = flag(None, "Use at most this many rows of each data set (seeded draw).")
    num_samples: str | None = flag(
        None,
        "JSON file of data set: rows per epoch. A number may exceed the set's size (rows repeat). Sets not named are "
        "used in full.",
    )
    sampling_temperature: float = flag(
        1.0, "T above 1 samples data sets in proportion to size**(1/T). The epoch keeps its length."
    )
    mined_batches: str | None = flag(
        None,
        "Folder of gritlm encode --rows: fill batches with clusters of rows whose queries are near one another there "
        "(B3).",
    )
    cluster_size: int = flag(32, "Rows of a cluster of --mined_batches. Random clusters of a data set form a batch.")
    eval_data: list[str] | None = flag(
        None,
        "Evaluation sets: BEIR folders, rows as for training, STS or classification files, or folders of them.",
        changes_learning=False,
    )
    eval_held_out: int = flag(0, "Keep this many rows of each data set out of training, and evaluate on them.")
    ignore_columns: list[str] | None = flag(
        None,
        "Keys of rows that are left unread on purpose: a,b. Others that look like a label or a split stop the run.",
        changes_learning=False,
    )
    data_cache: str | None = flag(
        None, "Folder for the memory-mapped form of the data. None: beside the datasets cache.", changes_learning=False
    )


@dataclass
class ObjectiveArguments:
    """The loss."""

    temperature: float = flag(0.02, "Temperature t of the contrastive loss: similarities are divided by it.")
    negatives_cross_device: bool = flag(
        True,
        "Contrast with the passages of all ranks. False: with this rank's only, so the run depends on their number.",
    )
    negatives_ring: bool = flag(
        False,
        "Send the ranks' vectors round a ring in place of gathering them: less memory, slower, the same numbers.",
        changes_learning=False,
    )
    same_tower: bool = flag(
        False, "Add query-query and positive-passage similarities to the loss's denominator (GTE, Qwen3-Embedding)."
    )
    symmetric: bool = flag(
        False, "Half the loss from query to passages, half from each positive to the queries (jina-embeddings-v2)."
    )
    in_batch_negatives: bool = flag(
        True, "Contrast with the passages of other rows. False: with the row's own hard negatives only."
    )
    hardness_hard: float = flag(
        0.0, "Add this times the similarity to the logits of hard negatives, without gradient (LLaVE, about 5)."
    )
    hardness_in_batch: float = flag(0.0, "The same for in-batch negatives (about 9).")
    focal_gamma: float = flag(
        0.0, "Weight each query's loss by (1 - p)**gamma, where p is its positive's softmax share (focal loss)."
    )
    false_negative_margin: float | None = flag(
        None, "Leave out candidates more similar than the positive by more than this (Qwen3-Embedding: 0.1)."
    )
    false_negative_relative_margin: float | None = flag(
        None, "Leave out candidates with s > s+ - r|s+| for this r (NV-Retriever's rule, within the batch; 0.05)."
    )
    guide_margin: float | None = flag(
        None,
        "Leave out candidates that --teacher_vectors rate higher than the positive by more than this (GISTEmbed: 0).",
    )
    debiased: bool = flag(
        False, "Correct the sum over negatives for false ones (debiased contrastive loss), see --tau_plus."
    )
    tau_plus: float = flag(0.1, "Expected share of false negatives, for --debiased.")
    matryoshka_dims: list[int] | None = flag(
        None, "Narrower widths, falling, that are trained too: the first values of a vector, normalised again."
    )
    matryoshka_weights: list[float] | None = flag(
        None, "Weight of the loss at each of --matryoshka_dims; the full width's is 1. None: 1 each."
    )
    sigreg_weight: float = flag(
        0.0, "Share of SIGReg (LeJEPA) in the loss: the batch's vectors as an isotropic Gaussian."
    )
    spread_out_weight: float = flag(
        0.0, "Weight of the spread-out regulariser (GOR): queries, and positives, in all directions."
    )
    contrastive_weight: float = flag(1.0, "Weight of InfoNCE and its kin. 0: only the terms below train.")
    cosent_weight: float = flag(0.0, "Weight of CoSENT, which ranks scored pairs by their score.")
    angle_weight: float = flag(0.0, "Weight of AnglE, which is CoSENT on the angle of complex vectors.")
    cosent_temperature: float = flag(0.05, "Temperature of CoSENT and AnglE.")
    distill_weight: float = flag(
        0.0, "Weight of the KL divergence from a teacher's scores of a row's passages to the model's."
    )
    teacher_temperature: float = flag(0.05, "Temperature of the teacher's scores in --distill_weight; logits: about 1.")
    student_temperature: float = flag(0.05, "Temperature of the model's similarities in --distill_weight.")
    margin_mse_weight: float = flag(
        0.0, "Weight of MarginMSE: the margin of a positive over a negative against the teacher's."
    )
    margin_mse_scale: float = flag(
        1.0, "Factor on the model's margin in MarginMSE. 1 for a teacher's cosines; more for logits."
    )
    teacher_weight: float = flag(0.0, "Weight of the distance to --teacher_vectors.")
    teacher_vectors: str | None = flag(
        None,
        "Folder of gritlm encode --rows: a teacher's vectors of the training data, for --teacher_weight and "
        "--guide_margin.",
    )
    teacher_loss: str = flag(
        "cosine",
        "That distance: cosine or mse of each vector, or scores (the mean squared error of all similarities).",
        choices=("cosine", "mse", "scores"),
    )
    emb_q_only: bool = flag(False, "Let the gradient flow through the queries only; passages are constants.")
    emb_p_only: bool = flag(False, "Let the gradient flow through the passages only; queries are constants.")


@dataclass
class TuningArguments:
    """How the weights are tuned."""

    lora: bool = flag(False, "Train a LoRA adapter and the projection; the model's own weights stay as they are.")
    qlora: bool = flag(False, "The same on weights stored in 4 bits (NF4; bitsandbytes, one process).")
    lora_r: int = flag(16, "Rank of the adapter.")
    lora_alpha: float = flag(32, "Scale of the adapter: its output is multiplied by this / --lora_r.")
    lora_dropout: float = flag(0.1, "Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = flag(
        None, "Linear layers that get an adapter, by the end of their name: q_proj v_proj. None: all of the backbone."
    )
    continue_adapter: bool = flag(
        False, "Where --model_name_or_path is an adapter: train it further. False: it is merged into its base first."
    )
    keep_adapter: bool = flag(
        False, "Publish the adapter, too, in the sub-folder adapter of the merged model.", changes_learning=False
    )
    use_muon: bool = flag(
        False, "Train the hidden matrices with Muon, at the same --learning_rate; AdamW trains the other weights."
    )
    muon_iteration: str = flag(
        "float32",
        "Precision of Muon's iteration. bfloat16 is faster on a GPU, but the run depends on the number of GPUs.",
        choices=("float32", "bfloat16"),
    )
    projection_learning_rate: float | None = flag(
        None, "Peak learning rate of --projection and of the projection on --teacher_vectors. None: --learning_rate."
    )
    bf16_weights: bool = flag(
        False,
        "Hold the backbone's weights in bfloat16, and round each update stochastically. Half the memory of weights; "
        "the published folder is bfloat16, too.",
    )
    ema_decay: float | None = flag(
        None,
        "Evaluate and publish an exponential moving average of the weights, of which a step keeps this share (0.999).",
    )


@dataclass
class EmbeddingTrainingArguments(TrainingArguments):
    """The run. What is declared here is new, or has another default than in Hugging Face's TrainingArguments."""

    global_batch_size: int = flag(2048, "Queries per step over all ranks. Each rank takes an equal slice.")
    chunk_tokens: int = flag(
        16384,
        "GradCache: tokens (padding included) encoded at once. Bounds memory; the gradient is the same for any.",
        changes_learning=False,
    )
    activation_memory: str = flag(
        "auto",
        "GB of activations kept between the two passes; the rest is recomputed. auto: what is free; 0: none.",
        changes_learning=False,
    )
    selective_checkpointing: bool = flag(
        False,
        "Keep of each layer only the outputs of matrix products and of attention, about two fifths of the bytes. The "
        "backward recomputes what lies between; the gradient is the same.",
        changes_learning=False,
    )
    sync_each_chunk: str = flag(
        "auto",
        "With FSDP2, ZeRO-2 and ZeRO-3: sum the gradient over the ranks after each chunk, not once a step, so that no "
        "rank holds the whole one. auto: where that takes more than a quarter of a GPU.",
        choices=("auto", "yes", "no"),
        changes_learning=False,
    )
    hang_timeout: float = flag(
        900.0,
        "Seconds without progress after which the run ends and names the rank, step and batch. A save whose files grow "
        "is progress. 0: torch's 30 minutes.",
        changes_learning=False,
    )

    learning_rate: float = flag(2e-5, "Peak learning rate.")
    lr_scheduler_type: str = flag(
        "cosine", "Learning-rate schedule.", choices=tuple(kind.value for kind in SchedulerType)
    )
    warmup_steps: float = flag(0.03, "Warm-up: a number of steps, or below 1 a share of all steps.")
    weight_decay: float = flag(0.05, "Weight decay of AdamW.")
    num_train_epochs: float = flag(1.0, "Passes over the data. --max_steps overrides it.")
    save_steps: float = flag(0.1, "Steps between checkpoints, or below 1 a share of all steps.", changes_learning=False)
    save_total_limit: int | None = flag(
        2, "How many checkpoints to keep; the oldest goes first. 0: all.", changes_learning=False
    )
    merge_last: int = flag(
        0, "Keep the weights of this many last saves, for gritlm merge RUN OUT --last N.", changes_learning=False
    )
    eval_strategy: str = flag(
        "steps",
        "When to evaluate, where there is --eval_data or --eval_held_out: no (only before the first step and after the "
        "last), steps, epoch.",
        changes_learning=False,
        choices=("no", "steps", "epoch"),
    )
    eval_steps: float = flag(0.1, "Steps between evaluations, or below 1 a share of all steps.", changes_learning=False)
    eval_on_start: bool = flag(
        True, "Evaluate the base before the first step; the verdict compares with it.", changes_learning=False
    )
    early_stopping_patience: int | None = flag(
        None, "End the run after this many evaluations without a better --metric_for_best_model (default eval_mean)."
    )
    early_stopping_threshold: float = flag(0.0, "How much better the metric must be for --early_stopping_patience.")
    logging_steps: float = flag(10, "Steps between log lines, or below 1 a share of all steps.", changes_learning=False)
    dataloader_num_workers: int = flag(2, "Processes per rank that read and tokenise ahead.", changes_learning=False)
    logging_nan_inf_filter: bool = flag(False, "Left off: a NaN must be seen.", changes_learning=False)
    log_on_each_node: bool = flag(False, "Left off: the first rank logs for all.", changes_learning=False)
    remove_unused_columns: bool = flag(False, "Left off: this project builds the batches.", changes_learning=False)
    tf32: bool | None = flag(False, "Left off: the loss and its gradient are exact in float32.")
    ddp_find_unused_parameters: bool | None = flag(
        False, "Left off: every parameter gets a gradient.", changes_learning=False
    )
    ddp_broadcast_buffers: bool | None = flag(
        False, "Left off: the model's buffers are constants.", changes_learning=False
    )

    @property
    def train_batch_size(self) -> int:
        """Queries per step on this rank, in Hugging Face's sense."""
        return self.global_batch_size // self.world_size


GROUPS = (ModelArguments, DataArguments, ObjectiveArguments, TuningArguments, EmbeddingTrainingArguments)


@dataclass
class Command:
    """The command line of a run, as run.json records it.

    Attributes:
        words: the command line, without the program.
        given: the flags on it, or in its FILE.json, with their values.
        parsed: every flag's value, before Hugging Face's TrainingArguments change any.
        repeats: the run.json that the run repeats, or nothing.
    """

    words: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    parsed: dict[str, Any] = field(default_factory=dict)
    repeats: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunArguments:
    """All flags of a run, by group, what its base says of itself, and how it was started."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    tuning: TuningArguments
    training: EmbeddingTrainingArguments
    base: BaseSettings
    command: Command = field(default_factory=Command)

    def flags(self) -> dict[str, Any]:
        """Every flag's value by name."""
        groups = (self.model, self.data, self.objective, self.tuning, self.training)
        return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}


def papers_values(*groups: type) -> dict[str, Any]:
    """The open flags with the paper's values."""
    declared = (f for group in groups or GROUPS for f in dataclasses.fields(group))
    return {f.name: f.metadata["paper"] for f in declared if "paper" in f.metadata}


# What --contract portable sets.
PORTABLE = {"pooling_method": "mean", "pool_instruction": True, "append_eos": True}


def contract_values(contract: str | None, base: BaseSettings) -> dict[str, Any]:
    """The open flags that --contract sets. portable keeps a pooling of the base that every server has."""
    if contract is None:
        return {}
    if contract == "paper":
        return {name: papers_values()[name] for name in PORTABLE}
    kept = {"pooling_method": base.pooling_method} if base.pooling_method in PORTABLE_POOLING else {}
    return PORTABLE | kept


EXAMPLES = """examples:
  gritlm train --model_name_or_path Qwen/Qwen3-0.6B --train_data pairs.jsonl --output_dir out --global_batch_size 256
  torchrun --nproc_per_node 8 -m gritlm train --model_name_or_path Qwen/Qwen3-0.6B --train_data data/ \\
      --output_dir out --bf16 --gradient_checkpointing
  gritlm train flags.json --seed 7     flags from a file of {"name": value}; those behind it win
  gritlm train out/run.json --output_dir again     repeat a run
  gritlm plan ... --ranks 8      check flags and data for 8 ranks, print the plan, load no model"""


def fixed_flags() -> dict[str, Any]:
    """The flags that a run and its continuation must agree on, with their defaults."""

    def changes_learning(f: dataclasses.Field) -> bool:
        inherited = INHERITED.get(f.name)
        return f.metadata.get("changes_learning", inherited is None or inherited.fixed)

    def default(f: dataclasses.Field) -> Any:
        return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()

    return {f.name: default(f) for group in GROUPS for f in dataclasses.fields(group) if changes_learning(f)}
