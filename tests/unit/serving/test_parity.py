"""A planted fault makes an export fail with the fault's name. Without one it passes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import INSTRUCTION, make_model_folder
from safetensors.torch import load_file, save_file

from gritlm.errors import UserError
from gritlm.models.pooling import POOLING
from gritlm.serving.consumers import CONSUMERS
from gritlm.serving.parity import prove
from gritlm.serving.probes import CUT, KINDS, LIMITS, Reference, TrainedModel

LENGTHS = {"query_max_len": 40, "passage_max_len": 48}
# Two backbones, each with a contract that has nothing in common with the other's.
MODELS = {
    "qwen2": LENGTHS | {"prompts": {"query": INSTRUCTION}},
    "qwen3": {
        **{"attn": "cc", "pooling_method": "weightedmean", "append_eos": True, "pool_instruction": True},
        **{"query_max_len": 48, "passage_max_len": 48, "prompts": {"query": INSTRUCTION, "document": "Passage: "}},
    },
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    make_model_folder(request.getfixturevalue(request.param), folder, **MODELS[request.param])
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint) -> Reference:
    return Reference(TrainedModel(str(checkpoint), "cpu"))


def change(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def other_pooling(config: dict) -> None:
    found = next(row.sentence_transformers for row in POOLING.values() if config[row.sentence_transformers])
    config[found] = False
    config["pooling_mode_lasttoken"] = True


def other_causality(config: dict) -> None:
    config["is_causal"] = not config["is_causal"]
    config["use_bidirectional_attention"] = not config["is_causal"]


def other_end(tokenizer: dict) -> None:
    """Remove the end token from the template, or add one."""
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    byte_level, *templates = tokenizer["post_processor"]["processors"]
    with_end = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    tokenizer["post_processor"]["processors"] = [byte_level] if templates else [byte_level, with_end]


def other_rope(config: dict) -> None:
    config["rope_parameters"]["rope_theta"] /= 100


def round_weights(path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def other_weight(path: Path) -> None:
    weights = load_file(path)
    weights["norm.weight"][::2] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})


def edited(name: str, edit: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, edit)


def setting(name: str, **values) -> Callable[[Path], None]:
    return edited(name, lambda config: config.update(values))


def weights(edit: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model.safetensors")


def fewer_merges(tokenizer: dict) -> None:
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]


ST, CONTRACT = "config_sentence_transformers.json", "text_contract.json"
# The start of the message, and the edit of a written folder.
FAULTS = {
    "pooling": ("pooling: found lasttoken", edited("1_Pooling/config.json", other_pooling)),
    "prompt": ("prompt: found {'query': ''", edited(ST, lambda config: config["prompts"].update(query=""))),
    "causality": ("causality: found ", edited("config.json", other_causality)),
    "normalisation": ("normalisation: found no unit norm", edited("modules.json", lambda modules: modules.pop())),
    "dtype": ("dtype: found bfloat16 in config.json and F32 weights", setting("config.json", dtype="bfloat16")),
    "tokenizer": ("tokenizer: the folder's gives other tokens", edited("tokenizer.json", fewer_merges)),
    "end token": ("end token: found ", edited("tokenizer.json", other_end)),
    "rope": ("rope: found {'rope_theta': 100.0", edited("config.json", other_rope)),
}
MORE = {
    "pooling, by the contract": ("pooling: found cls", setting(CONTRACT, pooling_method="cls")),
    "prompt, another one": ("prompt: found {'query': 'Q: '", edited(ST, lambda c: c["prompts"].update(query="Q: "))),
    "prompt, pooled": ("prompt: found it pooled", setting("1_Pooling/config.json", include_prompt=True)),
    "dtype, rounded weights": ("dtype: found float32 in config.json and BF16", weights(round_weights)),
    "length limit": ("length limit: found 20, wanted 48", setting("sentence_bert_config.json", max_seq_length=20)),
    "the weights": ("no single setting explains it: look at the weights", weights(other_weight)),
    "a program that fails": ("JSONDecodeError", lambda folder: (folder / "modules.json").write_text("[{")),
}  # fmt: skip


def message(folder: Path, reference: Reference) -> str:
    with pytest.raises(UserError) as caught:
        prove(folder, reference)
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(checkpoint, reference, tmp_path, fault):
    start, plant = FAULTS[fault]
    plant(shutil.copytree(checkpoint, tmp_path / "out"))
    assert message(tmp_path / "out", reference).startswith(start)


@pytest.mark.parametrize("checkpoint", ["qwen2"], indirect=True)
@pytest.mark.parametrize("fault", MORE)
def test_more_planted_faults(checkpoint, reference, tmp_path, fault):
    start, plant = MORE[fault]
    plant(shutil.copytree(checkpoint, tmp_path / "out"))
    assert message(tmp_path / "out", reference).startswith(start)


def test_control_the_good_folder_passes(checkpoint, reference):
    rows = prove(checkpoint, reference)
    by_program: dict[str, dict] = {}
    for row in rows:
        by_program.setdefault(row.consumer, {})[row.what] = row.result
    assert by_program.pop("ONNX Runtime") == {"all": "not run: the folder has no onnx/model.onnx"}
    assert set(by_program) == {"GritLM", "sentence-transformers", "transformers"}
    for name, results in by_program.items():
        assert set(results) >= {*KINDS, CUT}
        assert all(result > LIMITS["float32"].cosine for result in results.values() if isinstance(result, float))
        reasons = {what: result for what, result in results.items() if isinstance(result, str)}
        if name == "GritLM" or reference.contract.append_eos:
            assert reasons == {}
        else:
            assert reasons == {
                "empty": "no token to pool; GritLM encodes a full stop",
                f"{CUT} (query)": "cuts at 48 tokens, GritLM at 40",
            }


def test_one_message_names_two_faults_and_their_programs(checkpoint, reference, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "out")
    FAULTS["pooling"][1](folder)
    MORE["pooling, by the contract"][1](folder)
    said = message(folder, reference)
    assert re.match(
        r"pooling: found cls, wanted \w+ \(GritLM, transformers; such as .*: cosine -?0\.\d+\); pooling: found last",
        said,
    )
    assert "(sentence-transformers; such as " in said


@pytest.mark.parametrize("checkpoint", ["qwen2"], indirect=True)
def test_a_broken_file_hides_no_other_fault(checkpoint, reference, tmp_path):
    """Two files that cannot be read, beside a fault that the programs which do not read them still show."""
    for name in ("tokenizer_config.json", "sentence_bert_config.json"):
        folder = shutil.copytree(checkpoint, tmp_path / name)
        MORE["the weights"][1](folder)
        (folder / name).write_text("{")
        said = message(folder, reference)
        assert re.search(r"Error: .*\((GritLM, )?sentence-transformers", said), said
        if name != "tokenizer_config.json":  # no program runs without
            assert "no single setting explains it: look at the weights (GritLM, transformers" in said, said


def test_a_program_that_is_not_installed_says_so(tmp_path):
    consumer = CONSUMERS["ONNX Runtime"]._replace(package="no_such_package", file="")
    assert consumer.why_not(tmp_path) == "not run: no_such_package is not installed"
    assert consumer._replace(package="torch").why_not(tmp_path) == ""
