"""Each recipe of scripts/training/recipes, with a tiny model in place of the one that it names."""

import itertools
import shlex

import pytest
from helpers import ROOT, run
from launcher import TWO_GPUS, Launcher, refused, started

RECIPES = sorted((ROOT / "scripts/training/recipes").rglob("*.sh"))
NAMES = [str(path.relative_to(ROOT / "scripts/training/recipes").with_suffix("")) for path in RECIPES]
EIGHT_GPUS = "; ".join(f"echo '{number}, H100, 80000, 81559'" for number in range(8))
GIVEN = {"MODEL_NAME_OR_PATH": "", "OUTPUT_DIR": "o"}


def flags_of(launcher: Launcher, recipe: str, **given) -> dict[str, str]:
    """The flags of `gritlm train` that the launch script makes of a recipe."""
    words = shlex.split(started(launcher(RECIPE=recipe, **GIVEN | given)))
    words = words[words.index("train") + 1 :]
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.fixture
def launcher(tmp_path) -> Launcher:
    return Launcher(tmp_path / "launcher", "bash")


# quickstart is tested with the launch script; the other models of the paper have the same flags, as a test below shows.
@pytest.mark.parametrize("recipe", sorted({"paper/qwen3-0.6b", *(n for n in NAMES if "/" not in n)} - {"quickstart"}))
def test_a_recipe_plans_with_a_tiny_model(launcher, recipe, qwen3, data, tmp_path):
    launcher.devices(EIGHT_GPUS)
    named = {"MODEL_NAME_OR_PATH": "any/model"} if recipe in ("paper", "lora", "long-text") else {}
    flags = flags_of(launcher, recipe, **named)
    assert "/" in flags["--model_name_or_path"], "the model of the recipe"
    flags |= {"--model_name_or_path": qwen3, "--train_data": data, "--output_dir": tmp_path / "out"}
    flags |= {"--global_batch_size": 16, "--data_cache": tmp_path / "cache"}
    # The tiny model has 64 positions, and a CPU plans for GPUs.
    flags |= {name: 64 for name in ("--query_max_len", "--passage_max_len") if name in flags}
    done = run("-m", "gritlm", "plan", *itertools.chain(*flags.items()), "--ranks", 8)
    assert done.returncode == 0, done.stderr
    assert "steps in all" in done.stdout


def test_the_models_of_the_paper_share_one_recipe(launcher):
    launcher.devices(TWO_GPUS)
    recipes = {name: flags_of(launcher, name) for name in NAMES if name.startswith("paper/")}
    models = {flags.pop("--model_name_or_path") for flags in recipes.values()}
    assert len(models) == len(recipes) == 10
    assert len({tuple(flags.items()) for flags in recipes.values()}) == 1
    assert flags_of(launcher, "long-text", MODEL_NAME_OR_PATH="m") not in recipes.values(), "control"


def test_the_call_wins_over_a_recipe(launcher):
    flags = flags_of(launcher, "paper/qwen3-4b", LEARNING_RATE="1e-6", MODEL_NAME_OR_PATH="mine")
    assert (flags["--learning_rate"], flags["--model_name_or_path"]) == ("1e-6", "mine")
    assert flags_of(launcher, "paper/qwen3-4b")["--learning_rate"] == "2e-5", "control"
    own = launcher.folder / "call/own.sh"
    own.write_text("MODEL_NAME_OR_PATH=own GLOBAL_BATCH_SIZE=8\n")
    assert flags_of(launcher, "own.sh")["--global_batch_size"] == "8"
    assert "RECIPE=absent: no such file" in refused(launcher(RECIPE="absent"))
    assert "MODEL_NAME_OR_PATH is empty" in refused(launcher(RECIPE="paper", MODEL_NAME_OR_PATH=""))
