"""What a base says of itself is read from its JSON files, or refused by name."""

import json
import shutil

import pytest
import torch
from helpers import make_model_folder
from safetensors.torch import save_file

from gritlm.errors import UserError
from gritlm.models.base import BaseSettings, read_base

QWEN3_PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, END], "pair": []}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
MODULES = ("Transformer", "Pooling", "Normalize")
DENSE = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}


def edit(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def listing(kinds, package="sentence_transformers.models"):
    """modules.json, in the form of older versions of sentence-transformers."""
    folders = ["" if kind == "Transformer" else f"{index}_{kind}" for index, kind in enumerate(kinds)]
    return json.dumps([{"path": path, "type": f"{package}.{kind}"} for path, kind in zip(folders, kinds, strict=True)])


@pytest.fixture
def base(qwen3, tmp_path):
    return shutil.copytree(qwen3, tmp_path / "base")


@pytest.fixture
def qwen3_embedding(base):
    """The files of Qwen3-Embedding as they are published, with a small model."""
    (base / "modules.json").write_text(listing(MODULES))
    edit(base / "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True)
    edit(base / "1_Pooling/config.json", word_embedding_dimension=32, include_prompt=True)
    served = {"prompts": {"query": QWEN3_PROMPT, "document": ""}, "default_prompt_name": None}
    edit(base / "config_sentence_transformers.json", **served, similarity_fn_name="cosine")
    edit(base / "tokenizer.json", post_processor={"type": "Sequence", "processors": [BYTES, TEMPLATE]})
    edit(base / "tokenizer_config.json", model_max_length=131072)
    return base


def add_dense(base, weights=None, **config):
    (base / "modules.json").write_text(listing(("Transformer", "Pooling", "Dense", "Normalize")))
    edit(base / "2_Dense/config.json", **DENSE | config)
    weights = {"linear.weight": torch.ones(8, 32), "linear.bias": torch.ones(8)} if weights is None else weights
    save_file(weights, base / "2_Dense/model.safetensors")


def test_a_plain_language_model_says_nothing(qwen3):
    assert read_base(str(qwen3)) == read_base("") == read_base("/absent") == BaseSettings()


def test_our_folder_says_everything(qwen3, tmp_path):
    prompts = {"query": "Q: ", "document": "", "nq": "N: "}
    contract = {"pooling_method": "cls", "normalized": False, "pool_instruction": True, "append_eos": True}
    make_model_folder(qwen3, tmp_path, projection=8, query_max_len=24, passage_max_len=48, prompts=prompts, **contract)
    said = read_base(str(tmp_path))
    assert {name: getattr(said, name) for name in contract} == contract
    assert (said.attn, said.projection, said.query_max_len, said.passage_max_len) == ("bb", 8, 24, 48)
    assert (said.projection_folder, said.prompts) == (tmp_path / "2_Dense", {"query": "Q: ", "nq": "N: "})
    (tmp_path / "modules.json").unlink()
    with pytest.raises(UserError, match=r"found text_contract\.json without modules\.json"):
        read_base(str(tmp_path))


def test_qwen3_embedding_says_what_its_loaders_do(qwen3_embedding):
    assert read_base(str(qwen3_embedding)) == BaseSettings(
        attn="cc",
        pooling_method="lasttoken",
        normalized=True,
        pool_instruction=True,
        append_eos=True,
        prompts={"query": QWEN3_PROMPT},
    )


SAYS = {
    "newer form of the pooling": ("1_Pooling/config.json", {"pooling_mode": "mean"}, "pooling_method", "mean"),
    "instruction left out": ("1_Pooling/config.json", {"include_prompt": False}, "pool_instruction", False),
    "bidirectional": ("config.json", {"is_causal": False}, "attn", "bb"),
    "bidirectional by TEI's key": ("config.json", {"use_bidirectional_attention": True}, "attn", "bb"),
    "limit": ("sentence_bert_config.json", {"max_seq_length": 99}, "query_max_len", 99),
    "limit in the tokenizer": ("tokenizer_config.json", {"model_max_length": 77}, "passage_max_len", 77),
    "limit of the model itself": ("sentence_bert_config.json", {"max_seq_length": 1024}, "query_max_len", None),
    "no end token": ("tokenizer.json", {"post_processor": BYTES}, "append_eos", False),
    "end token in the config": ("tokenizer_config.json", {"add_eos_token": True}, "append_eos", True),
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
def test_each_file_is_read(qwen3_embedding, name):
    file, values, field, wanted = SAYS[name]
    if name == "end token in the config":
        edit(qwen3_embedding / "tokenizer.json", post_processor=None)
    before = read_base(str(qwen3_embedding))
    edit(qwen3_embedding / file, **values)
    said = read_base(str(qwen3_embedding))
    assert getattr(said, field) == wanted
    assert said != before or wanted is None, "control: it was so before"


def test_the_similarity_decides_where_no_module_normalises(qwen3_embedding):
    (qwen3_embedding / "modules.json").write_text(listing(MODULES[:2]))
    said = read_base(str(qwen3_embedding))
    assert said.normalized and "no unit norm" in said.notes[0]
    edit(qwen3_embedding / "config_sentence_transformers.json", similarity_fn_name="dot")
    said = read_base(str(qwen3_embedding))
    assert (said.normalized, said.notes) == (False, ())


def test_what_no_flag_covers_is_noted(qwen3_embedding):
    edit(qwen3_embedding / "sentence_bert_config.json", do_lower_case=True, model_args={})
    edit(qwen3_embedding / "config_sentence_transformers.json", default_prompt_name="query")
    assert read_base(str(qwen3_embedding)).notes == (
        "do_lower_case True in sentence_bert_config.json is not used",
        "default_prompt_name 'query' in config_sentence_transformers.json is not used",
    )


@pytest.mark.parametrize("mode", ["max", ["mean", "cls"]])
def test_a_pooling_that_this_project_has_not_is_unusable(qwen3_embedding, mode):
    edit(qwen3_embedding / "1_Pooling/config.json", pooling_mode=mode)
    said = read_base(str(qwen3_embedding))
    assert (said.pooling_method, said.unusable) == (None, {"pooling_method": "max" if mode == "max" else "mean+cls"})


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_a_projection(qwen3_embedding, bias):
    weights = {"linear.weight": torch.ones(8, 32)} | ({"linear.bias": torch.ones(8)} if bias else {})
    add_dense(qwen3_embedding, weights, bias=bias)
    said = read_base(str(qwen3_embedding))
    assert (said.projection, said.projection_bias, said.unusable) == (8, bias, {})


OTHER_DENSE = {
    "another activation": (lambda base: add_dense(base, activation_function="torch.nn.Tanh"), "(Tanh)"),
    "another shape": (lambda base: add_dense(base, out_features=9), "in place of"),
    "a residual connection": (lambda base: add_dense(base, use_residual=True), "not a linear layer alone"),
    "pickled weights": (lambda base: (base / "2_Dense/model.safetensors").unlink(), "without model.safetensors"),
    "after the norm": (
        lambda base: (base / "modules.json").write_text(listing(("Transformer", "Pooling", "Normalize", "Dense"))),
        "the modules Transformer, Pooling, Normalize, Dense",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_DENSE)
def test_another_dense_module_is_unusable(qwen3_embedding, name):
    change, words = OTHER_DENSE[name]
    add_dense(qwen3_embedding)
    change(qwen3_embedding)
    said = read_base(str(qwen3_embedding))
    assert said.projection is None and words in said.unusable["projection"]


DAMAGED = {
    "unknown module": (listing((*MODULES, "LayerNorm")), "found the module sentence_transformers.models.LayerNorm"),
    "own code": (listing(MODULES, package="custom_st"), "found the module custom_st.Transformer, wanted Transformer, "),
    "no list": ('{"type": "Pooling"}', "a list of modules"),
    "no module": ("[]", "a list of modules"),
    "another kind of module": ("[1]", "a list of modules"),
    "cut off": ("[{", "a list of modules"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_modules_that_this_project_has_not_are_refused(qwen3_embedding, name):
    content, message = DAMAGED[name]
    (qwen3_embedding / "modules.json").write_text(content)
    with pytest.raises(UserError, match=r"modules\.json: ") as error:
        read_base(str(qwen3_embedding))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_in_the_cache_that_may_be_an_embedding_model(qwen3, tmp_path, monkeypatch):
    """Without a network nobody can tell, unless the cache remembers that the hub has no such file."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    shutil.copytree(qwen3, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert "modules.json is not in the cache" in read_base("some/model").notes[0]
    (repository / ".no_exist" / "0123").mkdir(parents=True)
    (repository / ".no_exist" / "0123" / "modules.json").touch()
    assert read_base("some/model") == BaseSettings()
