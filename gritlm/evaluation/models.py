"""Models by name: a folder of gritlm train, any sentence-transformers model, or bm25. Each measures evaluation sets."""

import fnmatch
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gritlm import __version__
from gritlm.errors import UserError, first_line
from gritlm.evaluation.compressed import Form
from gritlm.evaluation.measure import RANKED, measure, rank
from gritlm.evaluation.sets import EvaluationSet, RetrievalSet, SetResult, Side
from gritlm.files import content_hash
from gritlm.gritlm import GritLM
from gritlm.models.cpu_linear import choose_products, use_products
from gritlm.models.families import FAMILIES, is_encoder
from gritlm.models.hub import ANY_MODEL, model_folder
from gritlm.models.text import CONTRACT_FILE, TextContract
from gritlm.strict_json import read_json_object

BM25 = "bm25"
# What a model folder may hold beside the model: a run's notes, the trainer's state, other formats, results.
NOT_THE_MODEL = (
    *("run.json", "log.jsonl", "README.md", ".*", "checkpoint*", "set-aside-*", "weights", "eval*"),
    "trainer_state.json",
    *("optimizer*", "scheduler*", "rng_state*", "training_args.bin", "global_step*", "latest", "pytorch_model_fsdp*"),
    *("onnx", "openvino", "original", "*.gguf", "*.h5", "*.msgpack", "*.ot"),
)
# A word, or one character of a script without spaces between words. BM25 ranks by them.
SPACELESS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff"
TOKEN = rf"(?u)[{SPACELESS}]|[^\W{SPACELESS}]{{2,}}"

EncodeTexts = Callable[[list[str], Side, str | None], np.ndarray]  # texts, side, instruction or None: the model's own


@dataclass
class Model:
    """A model that measures evaluation sets. Its weights are loaded by `load`.

    Attributes:
        name: as the user gave it.
        folder: its files; None for bm25.
        identity: what its results depend on: its files, the limits that the user gave, the dtype.
        about: what its results say of it: the limits and prompts in use, the width. Complete after `load`.
        notes: what to say about it, one line each.
        show_progress: show a progress bar for each `encode`, on a terminal.
    """

    name: str
    folder: Path | None
    identity: dict[str, Any]
    limits: dict[Side, int | None] = field(default_factory=dict)
    chunk_tokens: int | None = None  # tokens encoded at once; None is GritLM's
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    show_progress: bool = True
    _encode: EncodeTexts | None = None
    _last: tuple[list[str], np.ndarray] | None = None  # the passages of the last set, which the next may have too

    @property
    def kind(self) -> str:
        return self.identity["kind"]

    def load(self) -> None:
        """Load the weights.

        Raises:
            UserError: the folder holds no model that loads.
        """
        if self.folder is not None and self._encode is None:
            self._encode = (_load_sentence_transformer if self.kind == "sentence-transformers" else _load_gritlm)(self)

    def unload(self) -> None:
        self._encode = self._last = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measures(self, data: EvaluationSet) -> bool:
        return self.kind != BM25 or isinstance(data, RetrievalSet)

    def measure(self, data: EvaluationSet, prompts: dict[Side, str], forms: Sequence[Form] = ()) -> SetResult:
        """Measure one set. `prompts` take the place of the model's own, and of the set's.

        Raises:
            UserError: an instruction leaves no room for a text, or the vectors are not finite.
        """
        if self.kind == BM25:
            assert isinstance(data, RetrievalSet)
            return rank(data, rank_by_bm25(data))

        def encode(texts: Sequence[str], side: Side, instructions: Sequence[str] | None) -> np.ndarray:
            own = None if instructions is None else list(instructions)
            given = [prompts[side]] * len(texts) if side in prompts else own
            return self.encode(list(texts), side, given)

        return measure(data, encode, forms=forms)

    def encode(self, texts: list[str], side: Side, instructions: list[str] | None) -> np.ndarray:
        """The vectors of texts, float32 (N, D). Equal texts with one instruction are encoded once."""
        assert self._encode is not None, "wanted load() before encode()"
        corpus = side == "passage" and instructions is None
        if corpus and self._last is not None and self._last[0] == texts:
            return self._last[1]
        given: Sequence[str | None] = instructions or [None] * len(texts)
        keys = list(zip(given, texts, strict=True))
        texts_of: dict[str | None, dict[str, None]] = {}  # of an instruction, each once
        for instruction, text in keys:
            texts_of.setdefault(instruction, {})[text] = None
        parts = [self._encode(list(own), side, instruction) for instruction, own in texts_of.items()]
        found = parts[0]
        if len(parts) > 1 or len(found) < len(texts):  # else they are in order
            distinct = [(instruction, text) for instruction, own in texts_of.items() for text in own]
            number_of = {key: number for number, key in enumerate(distinct)}
            found = np.concatenate(parts)[[number_of[key] for key in keys]]
        if corpus:
            self._last = (texts, found)
        return found


# ---- finding one


def find_model(
    name: str, query_max_len: int | None, passage_max_len: int | None, chunk_tokens: int | None, output_folder: Path
) -> Model:
    """Find the files of a model by its path or its name on the hub, without loading its weights.

    Args:
        query_max_len, passage_max_len: limits in tokens, in place of the model's own.
        chunk_tokens: tokens encoded at once; None is the usual number.
        output_folder: where results go; it may be in the model's folder.
    Raises:
        UserError: there is no model of this name, or it does not take texts of this length.
    """
    limits: dict[Side, int | None] = {"query": query_max_len, "passage": passage_max_len}
    given = {f"{side}_max_len": limit for side, limit in limits.items() if limit}
    if name == BM25:
        notes = [f"{BM25}: --{flag} has no effect on it" for flag in given]
        return Model(name, None, {"kind": BM25, "gritlm": __version__, "bm25s": _bm25().__version__}, notes=notes)
    folder = Path(model_folder(name, ANY_MODEL))
    if not folder.is_dir():
        raise UserError(f"{name}: found no such folder, wanted a model's folder, its name on the hub, or {BM25}")
    if not any((folder / file).is_file() for file in ("config.json", "modules.json", "adapter_config.json")):
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
        raise UserError(f"{name}: found no config.json and no modules.json in it, wanted a model folder{hint}")
    config = read_json_object(str(folder / "config.json")) if (folder / "config.json").is_file() else {}
    longest = config.get("max_position_embeddings")
    for flag, limit in given.items():
        if isinstance(longest, int) and limit > longest:
            raise UserError(f"--{flag} {limit}: found a model of at most {longest} tokens ({name}), wanted no more")
    notes, kind = [], "sentence-transformers"
    if (folder / CONTRACT_FILE).is_file():
        kind = "gritlm"
    elif not (folder / "modules.json").is_file():
        if config.get("model_type") in FAMILIES and not is_encoder(config["model_type"]):
            kind = "backbone"
            notes.append(f"{name}: a backbone, measured as it is before training: bidirectional, mean, no instruction")
        else:
            notes.append(f"{name}: found no modules.json; sentence-transformers takes the mean of its token states")
    dtype = "bfloat16" if torch.cuda.is_available() and kind != "sentence-transformers" else "as saved"
    identity = {"kind": kind, "files": fingerprint(folder, output_folder), "dtype": dtype, "gritlm": __version__}
    about = {key: config[key] for key in ("matryoshka_dimensions",) if config.get(key)}
    return Model(name, folder, identity | given, limits, chunk_tokens, about, notes)


def fingerprint(folder: Path, without: Path) -> str:
    """A hash of a model's files, by name and content, except those in the folder `without`."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        beside = any(fnmatch.fnmatch(name.parts[0], pattern) for pattern in NOT_THE_MODEL)
        if not beside and without.resolve() not in path.absolute().parents:
            files.append([name.as_posix(), content_hash(path)])
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


# ---- loading one


def _load_gritlm(found: Model) -> EncodeTexts:
    contract = TextContract() if found.kind == "backbone" else None
    model = GritLM(str(found.folder), contract)
    own: dict[Side, tuple[str, int]] = {
        "query": (model.contract.prompts.get("query", ""), model.contract.query_max_len),
        "passage": (model.contract.prompts.get("document", ""), model.contract.passage_max_len),
    }
    limits = {side: found.limits[side] or limit for side, (_, limit) in own.items()}
    _describe(found, model.model.embedding_dim, limits, {side: prompt for side, (prompt, _) in own.items()})

    def encode(texts: list[str], side: Side, instruction: str | None) -> np.ndarray:
        instruction = own[side][0] if instruction is None else instruction
        progress = found.show_progress and sys.stderr.isatty()
        vectors = model.encode(texts, instruction, limits[side], found.chunk_tokens, show_progress=progress)
        return np.asarray(vectors)

    return encode


def _load_sentence_transformer(found: Model) -> EncodeTexts:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(found.folder))
    except Exception as error:  # the library, transformers and a model's own code raise anything
        raise UserError(f"{found.name}: cannot be loaded: {first_line(error)}") from error
    use_products(model, choose_products(model, ["forward"])[0])
    chunk_tokens = found.chunk_tokens or (4096 if model.device.type == "cpu" else 16384)
    similarity = model.similarity_fn_name or "cosine"
    if similarity not in ("cosine", "dot"):
        raise UserError(f"{found.name}: found a model that compares by {similarity}, wanted cosine or dot")
    names = {"query": ("query",), "passage": ("document", "passage", "corpus")}  # as encode_document takes them
    prompts = {side: next((model.prompts[n] for n in of if n in model.prompts), "") for side, of in names.items()}
    own = model.max_seq_length  # None or infinite for models without one
    limits = {side: limit or (own if own and own < 1e9 else None) for side, limit in found.limits.items()}
    _describe(found, model.encode(["a"]).shape[1], limits, prompts)

    def encode(texts: list[str], side: Side, instruction: str | None) -> np.ndarray:
        if limits[side]:
            model.max_seq_length = limits[side]
        return (model.encode_query if side == "query" else model.encode_document)(
            texts,
            prompt=instruction,
            batch_size=max(1, chunk_tokens // (limits[side] or 512)),
            normalize_embeddings=similarity == "cosine",
            show_progress_bar=found.show_progress and sys.stderr.isatty(),
        )

    return encode


def _describe(found: Model, width: int, limits: dict[Side, Any], prompts: dict[Any, str]) -> None:
    found.about |= {"width": width, "prompts": prompts} | {f"{side}_max_len": limits[side] for side in limits}


# ---- BM25


def _bm25() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise UserError(f"{BM25}: found no library bm25s, wanted it: pip install 'gritlm[evaluate]'") from error
    return bm25s


def rank_by_bm25(data: RetrievalSet) -> np.ndarray:
    """The numbers of each query's passages, best first, equal scores in passage order, (Q, at most `RANKED`).

    Lucene's BM25 with k1 1.5 and b 0.75; English stop words and stems.
    """
    import Stemmer

    options = {"token_pattern": TOKEN, "stemmer": Stemmer.Stemmer("english"), "stopwords": "en", "show_progress": False}
    index = _bm25().BM25()
    index.index(_bm25().tokenize(data.corpus, **options), show_progress=False)
    count = min(RANKED, len(data.corpus))
    rows = []
    for words in _bm25().tokenize(data.queries, return_ids=False, **options):
        scores = index.get_scores(words) if words else np.zeros(len(data.corpus), np.float32)
        least = np.partition(scores, -count)[-count]
        above = np.flatnonzero(scores > least)
        above = above[np.argsort(-scores[above], kind="stable")]
        rows.append(np.concatenate([above, np.flatnonzero(scores == least)[: count - len(above)]]))
    return np.stack(rows)
