"""Flags: wrong ones end in one line, and the tables in the documentation are those that the code makes."""

import dataclasses
import json
import re

import pytest
import transformers
from flag_tables import flag_table, inherited_flag_table, old_flag_table
from helpers import ROOT, run

from gritlm.errors import UserError
from gritlm.training import arguments
from gritlm.training.arguments import ObjectiveArguments, fixed_flags, flag, papers_values
from gritlm.training.flag_checks import parse
from gritlm.training.old_flags import OLD_FLAGS

PINNED = re.search(r"^transformers==(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]


@pytest.fixture
def flags(tmp_path) -> dict:
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    return {
        "model_name_or_path": tmp_path / "model",
        "train_data": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "global_batch_size": 64,
    }


def as_list(flags: dict) -> list[str]:
    values = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    return [part for name, several in values.items() for part in (f"--{name}", *map(str, several))]


def test_the_recipe_is_the_default(flags):
    del flags["global_batch_size"]
    run = parse(as_list(flags))
    model, data, training = run.model, run.data, run.training
    assert (model.attn, model.pooling_method, model.normalized) == ("bb", "mean", True)
    assert (data.train_group_size, data.query_max_len, data.passage_max_len) == (4, 512, 512)
    assert (training.global_batch_size, run.objective.temperature) == (2048, 0.02)
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (2e-5, 0.05, 0.03)
    assert (training.lr_scheduler_type, training.num_train_epochs, training.optim) == ("cosine", 1, "adamw_torch_fused")


def test_the_scripts_recipe_is_the_same(flags):
    """The variables of train_embonly.sh repeat the defaults for the reader; they must not drift."""
    script = (ROOT / "scripts/training/train_embonly.sh").read_text()
    values = parse(as_list({k: v for k, v in flags.items() if k != "global_batch_size"})).flags()
    shown = re.findall(r"^([A-Z_]+)=\$\{\1:-([-\d.e]+)\}", script, re.MULTILINE)
    recipe = {name.lower(): value for name, value in shown if name.lower() in values}
    assert len(recipe) == 6
    assert {name: float(value) for name, value in recipe.items()} == {name: values[name] for name in recipe}


WRONG = {
    "no model": ({"model_name_or_path": ""}, "--model_name_or_path is missing"),
    "run in the data": ({"train_data": ".", "output_dir": "out"}, "--output_dir out: found a folder in --train_data ."),
    "cache in the run": ({"output_dir": "out", "data_cache": "out/c"}, "--data_cache out/c: found a folder in"),
    "no such data": ({"train_data": "absent.jsonl"}, "--train_data absent.jsonl: no such file"),
    "accumulation": (
        {"gradient_accumulation_steps": 4},
        "--gradient_accumulation_steps: not supported, with in-batch negatives",
    ),
    "one save to merge": ({"merge_last": 1}, "--merge_last 1: wanted 2 saves or more to merge"),
    "no save to merge": ({"merge_last": 3, "save_strategy": "no"}, "and a --save_strategy other than no"),
    "fewer than none": ({"merge_last": -1}, "--merge_last: found -1, wanted 0 or more"),
    "nothing to go on with": ({"save_only_model": True}, "--save_only_model: not supported"),
    "seed": ({"seed": -1}, "--seed: found -1, wanted 0 to 4294967295"),
    "hang timeout": ({"hang_timeout": -1}, "--hang_timeout: found -1.0, wanted 0 or more"),
    "fp16": ({"fp16": True}, "--fp16: not supported"),
    "blind pooling": ({"attn": "cc", "pooling_method": "cls"}, "--attn cc with --pooling_method cls"),
    "two batch sizes": ({"per_device_train_batch_size": 16}, "contradicts --global_batch_size 64"),
    "temperature": ({"temperature": 0}, "--temperature: found 0.0, wanted a number above 0"),
    "chunk too small": ({"chunk_tokens": 100}, "--chunk_tokens 100 holds not even one text of 512 tokens"),
    "sampling": ({"sampling_temperature": 0}, "--sampling_temperature: found 0.0, wanted a number above 0"),
    "no such engine file": ({"deepspeed": "absent.json"}, "--deepspeed absent.json: No such file"),
    "fsdp on a CPU": ({"fsdp": "full_shard"}, "--fsdp: found no GPUs under torchrun"),
    "fsdp_config alone": ({"fsdp_config": "scripts/parallel/fsdp2.json"}, "--fsdp_config without --fsdp"),
    "a gradient that is not sharded": ({"sync_each_chunk": "yes"}, "found an engine that does not shard the gradient"),
    "both sides constant": ({"emb_q_only": True, "emb_p_only": True}, "--emb_q_only and --emb_p_only: choose one"),
    "a ring of one": ({"negatives_ring": True, "negatives_cross_device": False}, "--negatives_ring True with"),
    "other rows wanted": ({"in_batch_negatives": False, "same_tower": True}, "--in_batch_negatives False: found"),
    "no negatives": ({"in_batch_negatives": False, "train_group_size": 1}, "--train_group_size 1: no negative is left"),
    "no in-batch": ({"in_batch_negatives": False, "hardness_in_batch": 9}, "--hardness_in_batch 9.0 with"),
    "no unit vectors": ({"normalized": False, "debiased": True}, "--normalized False: found one of --debiased"),
    "tau_plus alone": ({"tau_plus": 0.2}, "--tau_plus 0.2 without --debiased"),
    "tau_plus of 1": ({"tau_plus": 1, "debiased": True}, "--tau_plus: found 1.0, wanted a number above 0 and below 1"),
    "all SIGReg": ({"sigreg_weight": 1}, "--sigreg_weight: found 1.0, wanted a number from 0 to below 1"),
    "rising widths": ({"matryoshka_dims": [64, 128]}, "--matryoshka_dims [64, 128]: wanted whole numbers above 0"),
    "width 0": ({"matryoshka_dims": [64, 0]}, "--matryoshka_dims [64, 0]: wanted whole numbers above 0 that fall"),
    "weights of no width": ({"matryoshka_weights": [1.0]}, "--matryoshka_weights [1.0] without --matryoshka_dims"),
    "too many weights": ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 1.0]}, "wanted one for each of"),
    "weight 0": ({"matryoshka_dims": [64], "matryoshka_weights": [0.0]}, "--matryoshka_weights [0.0]: wanted numbers"),
    "negative margin": ({"false_negative_margin": -0.1}, "--false_negative_margin: found -0.1, wanted 0 or more"),
    "own disks": ({"save_on_each_node": True}, "--output_dir must be a folder that all nodes share"),
    "data skip": ({"ignore_data_skip": True}, "--ignore_data_skip: not supported, a resumed run"),
    "other seed": ({"data_seed": 1}, "--data_seed: not supported"),
    "half a batch": ({"dataloader_drop_last": True}, "--dataloader_drop_last: not supported"),
    "other loss": ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: not supported"),
    "noise": ({"neftune_noise_alpha": 5}, "--neftune_noise_alpha: not supported"),
    "cache": ({"torch_empty_cache_steps": 5}, "--torch_empty_cache_steps: not supported"),
    "hub": ({"push_to_hub": True}, "--push_to_hub: not supported"),
    "other seed, though 0": ({"data_seed": 0}, "--data_seed: not supported"),
    "other order": ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy: not supported"),
    "accelerate": ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config: not supported"),
    "liger": ({"use_liger_kernel": True}, "--use_liger_kernel: not supported"),
    "evaluation": ({"eval_strategy": "epoch", "eval_steps": 5}, "--eval_strategy epoch: found nothing to evaluate on"),
    "hugging face's own": ({"lr_scheduler_type": "sine"}, "invalid choice: 'sine'"),
    "not a number": ({"temperature": "nan"}, "--temperature: found nan, wanted a number above 0"),
    "infinite": ({"temperature": "inf"}, "--temperature: found inf"),
    "infinite epochs": ({"num_train_epochs": "inf"}, "--num_train_epochs: found inf"),
    "epochs before the first": ({"num_train_epochs": -1}, "--num_train_epochs: found -1.0"),
    "no steps": ({"max_steps": 0}, "--max_steps: found 0, wanted a number above 0, or -1: --num_train_epochs"),
    "steps as a float": ({"max_steps": "1e3"}, "--max-steps: invalid int value: '1e3'"),
    "no number of steps": ({"warmup_steps": "nan"}, "--warmup_steps: found nan"),
    "half a step": ({"warmup_steps": 2.5}, "--warmup_steps: found 2.5, wanted a whole number of steps, or below 1"),
    "saves at no step": ({"save_steps": 0}, "--save_steps: found 0.0"),
    "logs at half steps": ({"logging_steps": 1.5}, "--logging_steps: found 1.5"),
    "learning rate": ({"learning_rate": "nan"}, "--learning_rate: found nan, wanted 0 or more"),
    "beta": ({"adam_beta2": 1}, "--adam_beta2: found 1.0, wanted a number from 0 to below 1"),
    "epsilon": ({"adam_epsilon": 0}, "--adam_epsilon: found 0.0"),
    "decay": ({"weight_decay": -0.1}, "--weight_decay: found -0.1"),
    "clipping": ({"max_grad_norm": "nan"}, "--max_grad_norm: found nan"),
    "seed of numpy": ({"seed": 2**32}, "--seed: found 4294967296, wanted 0 to 4294967295"),
    "portable, left out": (
        {"contract": "portable", "pool_instruction": False},
        "--contract portable: found --pool_instruction False and --append_eos True, wanted both True",
    ),
    "portable, no end": ({"contract": "portable", "append_eos": False}, "True and --append_eos False, wanted both"),
    "portable, its pooling": (
        {"contract": "portable", "pooling_method": "weightedmean"},
        "found --pooling_method weightedmean, wanted one that every server has: mean, lasttoken, cls",
    ),
    "paper, its pooling": ({"contract": "paper", "pooling_method": "cls"}, "--contract paper: found --pooling_method"),
    "paper, pooled": (
        {"contract": "paper", "pool_instruction": True},
        "--pool_instruction True and --append_eos False",
    ),
    "two kinds of checkpointing": (
        {"selective_checkpointing": True, "gradient_checkpointing": True},
        "--selective_checkpointing and --gradient_checkpointing: choose one",
    ),
    "selective and compiled": (
        {"selective_checkpointing": True, "torch_compile": True},
        "--selective_checkpointing with --torch_compile: not supported",
    ),
    "no contract": ({"contract": "vllm"}, "argument --contract: invalid choice: 'vllm'"),
    "memory without end": ({"activation_memory": "inf"}, "--activation_memory: found 'inf'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_flags_that_cannot_work(flags, name):
    change, message = WRONG[name]
    with pytest.raises(UserError) as error:
        parse(as_list(flags | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


UNKNOWN = {
    "a typing error": (["--temprature", "0.5"], "--temprature: no such flag; the nearest is --temperature"),
    "dashes": (["--train-group-sise=4"], "--train-group-sise: no such flag; the nearest is --train_group_size"),
    "an abbreviation": (["--temp", "0.5"], "--temp: no such flag; the nearest is --temperature"),
    "a flag of the original": (["--gc_chunk_size", "8"], "--gc_chunk_size: no such flag here; use --chunk_tokens"),
    "one that said embedding": (["--mode", "embedding"], "--mode: no such flag here; leave it out"),
    "one that transformers dropped": (["--logging_dir", "x"], "--logging_dir: no such flag here; set the environment"),
    "a stray value": (["--seed", "1", "2"], "found '2' where no value is wanted"),
    "no value": (["--temperature"], "argument --temperature: expected one argument"),
    "a wrong choice": (["--attn", "xx"], "argument --attn: invalid choice: 'xx'"),
    "the letters of GritLM": (
        ["--attn", "bbcc"],
        "argument --attn: invalid choice: 'bbcc' (choose from 'bb', 'cc'); of GritLM's four letters",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_flag_is_one_line(flags, name):
    words, message = UNKNOWN[name]
    with pytest.raises(UserError) as error:
        parse(as_list(flags) + words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_on_the_command_line_it_is_one_line_and_code_2(flags):
    for words, message in (
        (["--temperature", "0"], "--temperature: found 0.0"),
        (["--no_such_flag"], "--no_such_flag: "),
    ):
        done = run("-m", "gritlm", "train", *as_list(flags), *words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"gritlm: error: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(transformers.__version__ != PINNED, reason="an older transformers still has some of these flags")
def test_an_old_flag_is_no_flag_here(flags):
    assert not OLD_FLAGS.keys() & parse(as_list(flags)).flags().keys()


# ---- what a resumed run may change


def test_a_flag_is_fixed_unless_its_declaration_says_otherwise():
    fixed = fixed_flags()
    ours = {"temperature", "same_tower", "pooling_method", "train_group_size", "global_batch_size", "seed", "optim"}
    assert ours <= fixed.keys()
    free = {"chunk_tokens", "activation_memory", "data_cache", "logging_steps", "output_dir", "negatives_ring"}
    assert not free & fixed.keys()

    @dataclasses.dataclass
    class Forgetful(ObjectiveArguments):
        new_loss_weight: float = flag(0.0, "Declared without a word on resume.")
        new_log_style: str = flag("", "Declared free.", changes_learning=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "GROUPS", (Forgetful,))
        assert "new_loss_weight" in fixed_flags() and "new_log_style" not in fixed_flags()


def test_a_flag_that_is_not_given_has_its_default(flags):
    """So a run.json of an older version, which lacks a newer flag, can be compared."""
    values = json.loads(json.dumps(parse(as_list({**flags, "global_batch_size": 2048})).flags(), default=str))
    given = flags.keys() - {"global_batch_size"}
    defaults = json.loads(json.dumps(fixed_flags(), default=str)) | papers_values()
    assert {name: values[name] for name in defaults.keys() - given} == {n: defaults[n] for n in defaults.keys() - given}


# ---- documents


def test_the_flag_tables_are_up_to_date():
    text = (ROOT / "docs/training.md").read_text()
    for table in (flag_table, inherited_flag_table, old_flag_table):
        assert table() in text, f"regenerate: {table.__name__}() of {table.__module__}"


def test_the_readmes_picture_says_what_benchmarks_say():
    picture, measured = ((ROOT / name).read_text() for name in ("assets/step_time.svg", "benchmarks.md"))
    said = re.findall(r">([\d.]+) s(?: \(([\d.]+) GB\))?<", picture)
    assert len(said) == 6
    for seconds, memory in said:
        assert f" {seconds} " in measured and (not memory or f"{memory} GB" in measured)
