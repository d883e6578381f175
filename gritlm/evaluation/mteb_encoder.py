"""Our encoder behind mteb's EncoderProtocol and SearchProtocol: sorted, packed, equal texts once, vectors kept on disk.

mteb is imported inside functions: it is an extra, and slow to import.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gritlm.errors import UserError
from gritlm.evaluation.search import nearest
from gritlm.evaluation.vector_cache import KEY, VectorCache
from gritlm.gritlm import TEXTS_AT_ONCE, GritLM

CORPUS_BLOCK = 50_000  # passages whose vectors are in memory at once, as in mteb

# (metadata of the task, "query" or "passage", its subset) -> what is put before each text; "" is the model's own.
Instruct = Callable[[Any, str, str], str]


class MtebEncoder:
    """A model that mteb evaluates.

    A text without a side (STS, classification, clustering, pair classification, bitext mining) gets the instruction of
    a query, and the larger of the two limits.

    Args:
        model: the encoder.
        meta: its mteb.ModelMeta.
        instruct: the instruction of each task.
        query_max_len, passage_max_len: limits in tokens; None is the contract's.
        cache: where vectors are kept, or None.
        chunk_tokens, show_progress: as in `GritLM.encode`.
    """

    def __init__(
        self,
        model: GritLM,
        meta: Any,
        instruct: Instruct,
        query_max_len: int | None = None,
        passage_max_len: int | None = None,
        cache: VectorCache | None = None,
        chunk_tokens: int | None = None,
        show_progress: bool = False,
    ):
        self.model, self.mteb_model_meta, self.instruct, self.cache = model, meta, instruct, cache
        self.options: dict[str, Any] = {"chunk_tokens": chunk_tokens, "show_progress": show_progress}
        query = query_max_len or model.contract.query_max_len
        passage = passage_max_len or model.contract.passage_max_len
        self.limits = {"query": query, "document": passage, "": max(query, passage)}
        self._corpus: Any = None

    # ---- EncoderProtocol

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """The vectors of the texts of a DataLoader, float32 (N, D)."""
        columns = inputs.dataset
        if "text" not in columns.column_names:
            raise UserError(f"{task_metadata.name}: found {columns.column_names} and no text, wanted a task of texts")
        # By column: the loader would collate row by row.
        return self._encode(columns["text"][:], task_metadata, hf_subset, prompt_type.value if prompt_type else "")

    def _encode(self, texts: Sequence[str], task: Any, subset: str, side: str) -> np.ndarray:
        instruction = self.instruct(task, "passage" if side == "document" else "query", subset)
        if not instruction and side == "document":
            instruction = self.model.contract.prompts.get("document", "")
        return self.vectors(texts, instruction, self.limits[side])

    def vectors(self, texts: Sequence[str], instruction: str, limit: int) -> np.ndarray:
        """Encode the distinct texts that the cache lacks; the vectors of all, float32 (N, D)."""
        number_of: dict[str, int] = {}
        numbers = [number_of.setdefault(text, len(number_of)) for text in texts]
        distinct = list(number_of)
        vectors_ND = np.empty((len(distinct), self.model.model.embedding_dim), np.float32)
        keys = [_key(f"{limit}\0{instruction}\0{text}") for text in distinct] if self.cache else []
        missing = self.cache.find(keys, vectors_ND) if self.cache else range(len(distinct))
        for start in range(0, len(missing), TEXTS_AT_ONCE):  # so that a killed run has kept most of a task
            rows = missing[start : start + TEXTS_AT_ONCE]
            part_ND = self.model.encode([distinct[row] for row in rows], instruction, limit, **self.options)
            if not np.isfinite(part_ND).all():
                raise UserError("found a vector that is not finite, the model is damaged")
            vectors_ND[rows] = part_ND
            if self.cache:
                self.cache.add([keys[row] for row in rows], np.asarray(part_ND))
        return vectors_ND if len(distinct) == len(texts) else vectors_ND[numbers]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine similarities of all pairs, (N, M)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine similarity of each pair, (N,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)

    # ---- SearchProtocol: mteb's own wrapper sorts in Python, and copies the candidates' vectors for each query

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Note the corpus. It is encoded in blocks by `search`, so that its vectors need not fit into memory."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: Any,
        top_ranked: dict[str, list[str]] | None = None,
        num_proc: int | None = None,
    ) -> dict[str, dict[str, float]]:
        """Query id -> passage id -> cosine similarity, of the `top_k` most similar passages or candidates."""
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        loader = create_dataloader(queries, task_metadata=task_metadata, prompt_type=PromptType.query)
        place = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
        queries_QD = _unit(self.encode(loader, prompt_type=PromptType.query, **place))
        corpus, self._corpus = self._corpus, None
        ids, texts = corpus["id"][:], passage_texts(corpus)
        query_ids = queries["id"][:]
        if top_ranked is not None:
            corpus_ND = _unit(self._encode(texts, task_metadata, hf_subset, PromptType.document.value))
            return _rank_candidates(queries_QD, query_ids, corpus_ND, ids, top_ranked, top_k, self.model.device)
        scores_QK: np.ndarray = np.empty((len(queries_QD), 0), np.float32)
        numbers_QK: np.ndarray = np.empty((len(queries_QD), 0), np.int64)
        for start in range(0, len(texts), CORPUS_BLOCK):
            block = texts[start : start + CORPUS_BLOCK]
            block_ND = _unit(self._encode(block, task_metadata, hf_subset, PromptType.document.value))
            found, numbers = nearest(queries_QD, block_ND, top_k, self.model.device)
            scores_QK, numbers_QK = np.hstack([scores_QK, found]), np.hstack([numbers_QK, numbers + start])
            order = np.argsort(-scores_QK, axis=1, kind="stable")[:, :top_k]
            scores_QK, numbers_QK = (np.take_along_axis(x, order, 1) for x in (scores_QK, numbers_QK))
        return {
            key: {ids[number]: score for number, score in zip(numbers.tolist(), scores.tolist(), strict=True)}
            for key, numbers, scores in zip(query_ids, numbers_QK, scores_QK, strict=True)
        }


def passage_texts(corpus: Any) -> list[str]:
    """The passages of a corpus as mteb gives them to a model: the title, a space, the text."""
    texts = corpus["text"][:]
    if "title" not in corpus.column_names:
        return [text.strip() for text in texts]
    titles = corpus["title"][:]
    return [f"{title} {text}".strip() if title else text.strip() for title, text in zip(titles, texts, strict=True)]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=KEY).digest()


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)


def _rank_candidates(
    queries_QD: np.ndarray,
    query_ids: Sequence[str],
    corpus_ND: np.ndarray,
    ids: Sequence[str],
    candidates: dict[str, list[str]],
    top_k: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    number_of = {key: number for number, key in enumerate(ids)}
    corpus = torch.from_numpy(corpus_ND).to(device)
    ranked: dict[str, dict[str, float]] = {}
    for key, query_D in zip(query_ids, torch.from_numpy(queries_QD).to(device), strict=True):
        own = candidates.get(key, [])
        numbers = torch.tensor([number_of[candidate] for candidate in own], dtype=torch.int64, device=device)
        # Where nearly all passages are candidates, as in BRIGHT, a copy of their vectors costs more than the products.
        few = 4 * len(own) < len(ids)
        scores = corpus[numbers] @ query_D if few else (corpus @ query_D)[numbers]
        best, places = scores.topk(min(top_k, len(own)))
        ranked[key] = {own[place]: score for place, score in zip(places.tolist(), best.tolist(), strict=True)}
    return ranked
