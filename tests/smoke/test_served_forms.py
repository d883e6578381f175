"""A saved folder gives the embedder's vectors for every form of tokenizer that base models have, in each loader.

No training: the weights are random, and what is compared is the way from text to vector.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, WORDS
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gritlm import GritLM
from gritlm.models import tokenizer as tokenizer_module
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.models.pooling import POOLING
from gritlm.models.text import Text, TextContract
from gritlm.models.tokenizer import LOADER_OPTIONS, PROBES, TextTokenizer, check_saved_tokenizer, load_tokenizer
from gritlm.report.card import CardFacts, write_card

TEXTS = [*PROBES[:14], *PROBES[16:], *WORDS, *(" ".join(WORDS[i : i + 9]) for i in range(9))]
BEGIN = "<|begin|>"


def template(before: list[str], after: list[str], ids: dict[str, int]) -> dict:
    """A post-processor as tokenizer.json holds it."""
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, *after)}
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (before, after)]
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def with_template(folder: Path, before: list[str], after: list[str], **config) -> Path:
    """The folder's tokenizer with two more special tokens, a template, and other entries in its configuration."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([BEGIN, "<|im_end|>"])
    found = json.loads(backend.to_str())
    ids = {token["content"]: token["id"] for token in found["added_tokens"]}
    found["post_processor"] = template(before, after, ids)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


FORMS = {
    "Qwen2": ("qwen2", lambda folder: folder),
    "Qwen3": ("qwen3", lambda folder: folder),
    "R1-Distill": (
        "qwen2",
        lambda folder: with_template(
            folder, [BEGIN], [], tokenizer_class="LlamaTokenizerFast", bos_token=BEGIN, add_bos_token=True, legacy=True
        ),
    ),
    "Qwen3-Embedding": ("qwen3", lambda folder: with_template(folder, [], ["<|endoftext|>"], eos_token="<|im_end|>")),
}


@pytest.fixture(scope="module", params=FORMS)
def base(request, tmp_path_factory) -> Path:
    model, change = FORMS[request.param]
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path_factory.mktemp("base") / "model")
    return change(folder)


def make_folder(base: Path, folder: Path, **options) -> tuple[Embedder, TextTokenizer]:
    contract = TextContract(query_max_len=48, passage_max_len=48, prompts={"query": INSTRUCTION}, **options)
    config = load_config(str(base), "bb")
    embedder = Embedder(load_backbone(str(base), config), contract).eval()
    text_tokenizer = TextTokenizer(load_tokenizer(str(base), contract), contract)
    save_model_folder(embedder, text_tokenizer, folder)
    return embedder, text_tokenizer


def vectors_of(embedder: Embedder, text_tokenizer: TextTokenizer) -> np.ndarray:
    tokens = text_tokenizer([Text(INSTRUCTION, text) for text in TEXTS], 48)
    chunks, row_of_text = make_chunks(tokens, ChunkConfig(4096), 0)
    with torch.no_grad():
        return torch.cat([embedder(**chunk) for chunk in chunks])[row_of_text].numpy()


def run_card(folder: Path, monkeypatch) -> dict[str, np.ndarray]:
    """The vectors of `TEXTS` as the code blocks of the folder's card make them."""
    write_card(folder, CardFacts())
    blocks = re.findall(r"With ([a-z-]+):\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert [library for library, _ in blocks] == ["sentence-transformers", "transformers", "gritlm"]
    monkeypatch.chdir(folder)
    found = {}
    for library, code in blocks:
        names: dict = {}
        exec(code, names)
        assert names["queries"].shape[0] == 1
        encode = {
            "sentence-transformers": lambda model=names["model"]: model.encode_query(TEXTS),
            "transformers": lambda names=names: names["encode"](TEXTS, INSTRUCTION, 48).numpy(),
            "gritlm": lambda model=names["model"]: model.encode_queries(TEXTS),
        }
        found[f"card, {library}"] = encode[library]()
    return found


@pytest.mark.parametrize("append_eos", [False, True], ids=["", "eos"])
@pytest.mark.parametrize("pooling", POOLING)
def test_the_saved_folder_gives_the_embedders_vectors(base, tmp_path, monkeypatch, pooling, append_eos):
    embedder, text_tokenizer = make_folder(base, tmp_path / "out", pooling_method=pooling, append_eos=append_eos)
    wanted = vectors_of(embedder, text_tokenizer)
    ours = GritLM(tmp_path / "out")
    save_model_folder(ours.model, ours.text_tokenizer, tmp_path / "again")
    found = {
        "GritLM": ours.encode_queries(TEXTS),
        "GritLM, saved again": GritLM(tmp_path / "again").encode_queries(TEXTS),
        "sentence-transformers": SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(TEXTS),
    } | run_card(tmp_path / "again", monkeypatch)
    for name, vectors in found.items():
        worst = (vectors * wanted).sum(1).min()
        assert worst > 0.9999, f"{name}: {TEXTS[int((vectors * wanted).sum(1).argmin())]!r} {worst}"
    assert (wanted * np.roll(wanted, 1, axis=0)).sum(1).min() < 0.99, "control: all texts have one vector"


def test_a_portable_folder_needs_no_option_of_its_loaders(base, tmp_path):
    """No loader loses anything of its tokenizer, Qwen2's own class included, and all pool what the trainer pools."""
    portable = {"pool_instruction": True, "append_eos": True, "rstrip": False}
    embedder, text_tokenizer = make_folder(base, tmp_path / "out", **portable)
    assert check_saved_tokenizer(tmp_path / "out", text_tokenizer) == []
    wanted, plain = vectors_of(embedder, text_tokenizer), AutoTokenizer.from_pretrained(tmp_path / "out")
    found = {
        "GritLM": GritLM(tmp_path / "out").encode_queries(TEXTS),
        "sentence-transformers": SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(TEXTS),
    }
    for name, vectors in found.items():
        assert (vectors * wanted).sum(1).min() > 0.9999, name
    for text, tokens in zip(TEXTS, text_tokenizer([Text(INSTRUCTION, text) for text in TEXTS], 48), strict=True):
        ids = plain(INSTRUCTION + text, truncation=True).input_ids
        assert (ids, tokens.prompt_length) == (tokens.ids, 0), repr(text)
        assert tokens.ids[-1] == text_tokenizer.tokenizer("").input_ids[-1], "the end token survives the cut"


def test_the_special_tokens_around_a_text(base, tmp_path):
    """A first token stays, an end token is there as the contract says, and a text that is cut keeps it."""
    plain = AutoTokenizer.from_pretrained(base)
    before, _ = tokenizer_module.special_tokens_around(plain)
    for append_eos in (False, True):
        _, text_tokenizer = make_folder(base, tmp_path / str(append_eos), append_eos=append_eos)
        for tokenizer in (
            text_tokenizer.tokenizer,
            load_tokenizer(str(tmp_path / str(append_eos)), text_tokenizer.contract),
            AutoTokenizer.from_pretrained(tmp_path / str(append_eos)),
        ):
            found, after = tokenizer_module.special_tokens_around(tokenizer)
            assert found == before
            assert len(after) == append_eos
            ids = tokenizer("river " * 99, truncation=True, max_length=16).input_ids
            assert len(ids) == 16 and ids[-1:] == (after or ids[-1:]) and ids[: len(before)] == before


def test_plain_auto_tokenizer_differs_for_qwen2_alone(base, tmp_path, request):
    """And only in white space at the end of a text, which is what the folder's card says."""
    _, text_tokenizer = make_folder(base, tmp_path / "out")
    notes = check_saved_tokenizer(tmp_path / "out", text_tokenizer)
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    assert bool(notes) == (model_type == "qwen2")
    write_card(tmp_path / "out", CardFacts())
    assert 'tokenizer_type="modernbert"' in (tmp_path / "out" / "README.md").read_text()
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    stripped = [text.rstrip() for text in TEXTS if "<|" not in text and text.strip()]
    assert plain(stripped).input_ids == text_tokenizer.tokenizer(stripped).input_ids


def test_a_saved_tokenizer_that_is_read_differently_is_refused(base, tmp_path):
    _, text_tokenizer = make_folder(base, tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    found = json.loads(path.read_text())
    found["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(found))
    with pytest.raises(Exception, match="reads the saved tokenizer differently, first "):
        check_saved_tokenizer(tmp_path / "out", text_tokenizer)


def test_what_older_loaders_need_is_in_the_folder(base, tmp_path):
    path = base / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(
        json.dumps(json.loads(before) | {"additional_special_tokens": ["<|im_end|>"], "add_eos_token": True})
    )
    make_folder(base, tmp_path / "out")
    path.write_text(before)
    read = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    config = read["config.json"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["use_bidirectional_attention"] is True and config["is_causal"] is False
    tokenizer_config = read["tokenizer_config.json"]
    assert not isinstance(tokenizer_config.get("extra_special_tokens"), list)
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read["sentence_bert_config.json"]["tokenizer_args"] == LOADER_OPTIONS
    assert set(read["config_sentence_transformers.json"]["__version__"]) == {"sentence_transformers", "transformers"}
    assert read["tokenizer.json"]["truncation"] is None and read["tokenizer.json"]["padding"] is None
