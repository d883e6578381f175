"""Served is trained: trainer, GritLM, sentence-transformers and plain transformers give one vector."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import INSTRUCTION, WORDS, make_builder, make_embedder, run, train, train_flags
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from gritlm import GritLM
from gritlm.data.texts import read_texts
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.probe import AttentionError
from gritlm.models.text import CONTRACT_FILE, Text, TextContract

# One-word queries, other scripts, odd white space, code, longer than the limit: 64 in all.
PROBES = [
    *WORDS[:24],
    *(
        "w",
        "7",
        "(",
        ".",
        "é",
        "中文",
        "日本語 テキスト",
        "привет мир",
        "مرحبا",
        "🙂",
        "a\nb",
        "\tx",
        " lead",
        "trail ",
        "x  y",
        "()",
    ),
    *(" ".join(WORDS[i : i + 2 * i + 2]) for i in range(12)),
    *(" ".join(WORDS * n) for n in (1, 2, 5, 20)),
    *(
        "def f(x):\n    return x",
        "SELECT * FROM t;",
        "<|im_start|>user",
        "a <|endoftext|> b",
        "http://x.y/z?q=1",
        "50 % \u2028 off",
    ),
    *("A" * 300, "-" * 90),
]
OPTIONS = [
    {},
    {"pooling_method": "lasttoken", "append_eos": True, "attn": "cc"},
    {"pooling_method": "weightedmean", "projection": 16},
    {"pooling_method": "cls", "normalized": False, "pool_instruction": True},
]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def by_hand(folder, texts: list[str], instruction: str) -> np.ndarray:
    """What a user of transformers would write for mean pooling without the instruction."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    skipped = len(tokenizer(instruction).input_ids)
    batch = tokenizer(
        [instruction + t for t in texts], padding=True, truncation=True, max_length=48, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch.attention_mask.clone()
    mask[:, :skipped] = 0
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


@pytest.fixture(scope="module", params=OPTIONS, ids=lambda o: o.get("pooling_method", "recipe"))
def trained(request, qwen3, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    flags = request.param | {"max_steps": 3, "query_max_len": 48}
    train(*train_flags(qwen3, data, folder / "out", folder / "cache", **flags))
    return folder / "out", request.param


def test_served_is_trained(trained, qwen3, data, tmp_path):
    folder, options = trained
    assert len(PROBES) == 64
    ours = GritLM(folder).encode(PROBES, instruction=INSTRUCTION)
    assert np.isfinite(ours).all()
    assert (np.linalg.norm(ours, axis=1) > 1e-3).all()

    # The trainer's own model and text path, with the weights of the checkpoint.
    text = {k: options[k] for k in ("pooling_method", "normalized", "pool_instruction", "append_eos") if k in options}
    model = make_embedder(
        qwen3, **{k: options[k] for k in ("pooling_method", "normalized", "projection") if k in options}
    ).eval()
    model.config.is_causal = options.get("attn") == "cc"
    model.load_weights(folder / "checkpoint-3")
    text_tokenizer = make_builder(qwen3, data, tmp_path, **text).text_tokenizer
    chunks, row_of_text = make_chunks(text_tokenizer([Text(INSTRUCTION, t) for t in PROBES], 48), ChunkConfig(512), 0)
    with torch.no_grad():
        trainers = torch.cat([model(**chunk) for chunk in chunks])[row_of_text].numpy()

    served = SentenceTransformer(str(folder), device="cpu")
    assert served.prompts["query"] == served.prompts["plain"] == INSTRUCTION
    ways = {"trainer": trainers, "sentence-transformers": served.encode(PROBES, prompt_name="query")}
    if not options:
        ways["transformers by hand"] = by_hand(folder, PROBES, INSTRUCTION)
        assert np.abs(served.encode_query(PROBES) - ours).max() < 1e-5
        assert np.abs(GritLM(folder).encode_queries(PROBES) - ours).max() < 1e-5
        assert np.abs(served.encode_document(PROBES) - GritLM(folder).encode_corpus(PROBES)).max() < 1e-5
    for way, theirs in ways.items():
        assert cosine(ours, theirs).min() >= 0.9999, (way, PROBES[cosine(ours, theirs).argmin()])
        assert np.abs(np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1) - 1).max() < 1e-3
    assert cosine(ours, np.roll(ours, 1, axis=0)).min() < 0.99, "control: all texts have one vector"


def test_control_the_stock_tokenizer_serves_other_vectors(trained, qwen3, tmp_path):
    """Control: with the base model's tokenizer in the folder, one-word queries get another (a zero) vector."""
    import shutil

    folder, options = trained
    if options:
        pytest.skip("once is enough")
    stock = shutil.copytree(folder, tmp_path / "stock", ignore=shutil.ignore_patterns("checkpoint-*"))
    AutoTokenizer.from_pretrained(qwen3).save_pretrained(stock)
    theirs = SentenceTransformer(str(stock), device="cpu").encode(["river"], prompt_name="query")
    ours = GritLM(folder).encode(["river"], instruction=INSTRUCTION)
    assert abs((theirs * ours).sum()) < 0.9


def test_an_empty_text_has_a_vector(trained):
    """Ours never gives a zero. With an end token sentence-transformers agrees; without one it has nothing to pool."""
    folder, options = trained
    model = GritLM(folder)
    for instruction in ("", INSTRUCTION):
        vectors = model.encode(["", " \n", "river"], instruction=instruction)
        assert np.isfinite(vectors).all()
        assert (np.linalg.norm(vectors, axis=1) > 1e-3).all()
        if options.get("append_eos"):
            theirs = SentenceTransformer(str(folder), device="cpu").encode(["", " \n", "river"], prompt=instruction)
            assert cosine(vectors, theirs).min() > 0.9999


def test_the_folder_holds_what_a_loader_needs(trained):
    folder, options = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["is_causal"] == (options.get("attn") == "cc")
    assert config["architectures"] == ["Qwen3Model"]
    for place in (folder, folder / "checkpoint-3"):
        assert {"model.safetensors", "modules.json", "tokenizer.json", CONTRACT_FILE} <= {
            p.name for p in place.iterdir()
        }
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.py"))


def test_gritlm_takes_what_gritlm_took(trained):
    folder, _ = trained
    model = GritLM(folder)
    one = model.encode("river stone")
    assert one.shape == (model.model.embedding_dim,)
    both = model.encode_corpus([{"title": "river", "text": "stone"}, {"text": "stone"}])
    assert np.allclose(both[0], one, atol=1e-5)
    assert isinstance(model.encode(["river"], convert_to_tensor=True), torch.Tensor)
    assert model.encode([]).shape == (0, model.model.embedding_dim)
    with pytest.raises(UserError, match="'Query:' can share a token"):
        model.encode("river stone", instruction="Query:")
    small = model.encode(PROBES, chunk_tokens=64)
    assert cosine(small, model.encode(PROBES)).min() > 0.9999


def test_the_probe_runs_on_load(trained, monkeypatch):
    """A kernel that looks at what stands under the padding is an error, not a wrong vector."""
    from gritlm import gritlm

    folder, options = trained
    if options:
        pytest.skip("once is enough")
    load = gritlm.load_model_folder

    def blind_to_padding(*args):
        embedder, text_tokenizer = load(*args)
        forward = embedder.backbone.forward

        def blind(attention_mask=None, packing=None, **inputs):
            return forward(**inputs, packing=packing, attention_mask=attention_mask if packing else None)

        embedder.backbone.forward = blind
        return embedder, text_tokenizer

    monkeypatch.setattr(gritlm, "load_model_folder", blind_to_padding)
    with pytest.raises(AttentionError):
        GritLM(folder)


def test_encode_from_the_command_line(trained, tmp_path):
    folder, options = trained
    if options:
        pytest.skip("once is enough")
    texts = [json.dumps("river"), json.dumps({"text": "stone", "title": "a"}), json.dumps({"text": "snow"})]
    (tmp_path / "in.jsonl").write_text("\n".join(texts) + "\n")
    command = ("-m", "gritlm", "encode", tmp_path / "in.jsonl", tmp_path / "new" / "out.npy", "--model", folder)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "3 vectors of width" in done.stdout
    assert "encoding: 100%" in done.stderr
    found = np.load(tmp_path / "new" / "out.npy")
    assert np.allclose(found, GritLM(folder).encode_corpus(["river", "a stone", "snow"]), atol=1e-5)
    again = run(*command)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr


def test_texts_of_every_kind_of_file(tmp_path):
    rows = [{"_id": 1, "title": "a", "text": "stone"}, {"_id": 2, "title": None, "text": ""}]
    lines = "\n\n".join(map(json.dumps, rows)).encode()
    plain, zipped, parquet = (tmp_path / f"texts.{suffix}" for suffix in ("jsonl", "jsonl.gz", "parquet"))
    plain.write_bytes(lines)
    zipped.write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert read_texts(plain) == read_texts(zipped) == read_texts(parquet) == ["a stone", ""]
    with pytest.raises(UserError, match=r"texts\.jsonl:3: found an empty text"):
        read_texts(plain, may_be_empty=False)
    for content, message in (
        (b"", "found no row"),
        (b'"fine"\n{"txt": "x"}', ":2: found no text"),
        (b'"fine"\n"\\ud800"', ":2: found half of a surrogate pair"),
        (b'"fine"\n"\xff"', ":2: found byte 0xFF"),
    ):
        plain.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_texts(plain)


def test_in_half_precision_positions_are_whole(qwen3):
    """Rotary frequencies stay in float32, as in every loader; rounded, they would turn distant tokens the wrong way."""
    ours = GritLM(qwen3, TextContract(), dtype=torch.bfloat16).model.backbone
    theirs = AutoModel.from_pretrained(qwen3, dtype=torch.bfloat16)
    for found, wanted in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert found.dtype == wanted.dtype == torch.bfloat16
    buffers = dict(theirs.named_buffers())
    assert buffers and all(torch.equal(buffers[name], value) for name, value in ours.named_buffers())
    assert {value.dtype for value in buffers.values()} == {torch.float32}


def test_a_bare_backbone_needs_a_contract(qwen3):
    with pytest.raises(UserError, match=f"found no {CONTRACT_FILE}"):
        GritLM(qwen3)
    assert GritLM(qwen3, TextContract()).encode(["river"]).shape == (1, 32)
