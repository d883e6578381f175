"""A model as mteb takes it: ours with its ModelMeta, any sentence-transformers model in mteb's wrapper, or bm25."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gritlm.errors import UserError, first_line, one_line
from gritlm.evaluation.benchmarks import all_tasks, quiet_mteb
from gritlm.evaluation.models import BM25, Model
from gritlm.evaluation.mteb_encoder import MtebEncoder
from gritlm.evaluation.prompts import Prompts
from gritlm.evaluation.trained_on import known_as
from gritlm.evaluation.vector_cache import VectorCache
from gritlm.gritlm import GritLM
from gritlm.models.hub import is_hub_name
from gritlm.models.text import TextContract

MTEB_BM25 = "mteb/baseline-bm25s"


@dataclass
class Job:
    """The evaluation of one model. Worker processes get it, so it holds no weights.

    Attributes:
        model: as `find_model` found it.
        name, revision: the model's for mteb; the revision stands for all that its scores depend on.
        limits: of a query and of a passage, in tokens. None: the model's own.
        prompts: None: the model's own.
        folder: for results and vectors.
        cache_bytes: of vectors on the disk; 0 for none.
        sets, base: names of its training data sets, and on the hub of the model it was trained from.
    """

    model: Model
    name: str
    revision: str
    limits: tuple[int | None, int | None]
    prompts: Prompts | None
    folder: Path
    overwrite: bool
    cache_bytes: int
    sets: list[str]
    base: str | None

    @property
    def vectors(self) -> Path:
        files = json.dumps(self.model.identity, sort_keys=True)
        return self.folder / "vectors" / hashlib.sha256(files.encode()).hexdigest()[:16]


def name_for_mteb(name: str, folder: Path | None) -> str:
    """ "organization/model": a model's name on the hub, or gritlm/ and its folder's name."""
    if folder is None:
        return MTEB_BM25
    if "/" in name and is_hub_name(name) and not Path(name).exists():
        return name
    folder = Path(name).resolve()
    parts = [folder.parent.name] if folder.name.startswith("checkpoint-") else []
    return "gritlm/" + "-".join([*parts, folder.name])


def load(job: Job, device: str | None) -> Any:
    """Load the model on a device; None is the usual one.

    Raises:
        UserError: it does not load.
    """
    import mteb

    with quiet_mteb():
        if job.model.kind == BM25:
            try:
                model: Any = mteb.get_model(MTEB_BM25)
            except ImportError as error:
                raise UserError(f"{BM25}: {one_line(error)}") from error
            model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"revision": job.revision})
            return model
        if job.model.kind == "sentence-transformers":
            return _load_sentence_transformer(job, device)
        return _load_gritlm(job, device)


def _load_gritlm(job: Job, device: str | None) -> MtebEncoder:
    model = GritLM(str(job.model.folder), TextContract() if job.model.kind == "backbone" else None, device)
    width = model.model.embedding_dim
    cache = VectorCache(job.vectors, width, job.cache_bytes) if job.cache_bytes else None
    prompts = job.prompts
    assert prompts is not None

    def instruct(task: Any, side: Any, subset: str) -> str:
        return prompts.instruction(task.name, task.type, side, subset)

    progress = device is None and sys.stderr.isatty()
    return MtebEncoder(model, describe(job, model), instruct, *job.limits, cache, job.model.chunk_tokens, progress)


def describe(job: Job, model: GritLM) -> Any:
    """The ModelMeta of one of our models."""
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction

    weights = list(model.model.parameters())
    known = {task for tasks in known_as(job.sets).values() for task in tasks}
    return ModelMeta.create_empty(
        {
            "name": job.name,
            "revision": job.revision,
            "n_parameters": sum(weight.numel() for weight in weights),
            "n_embedding_parameters": model.model.backbone.get_input_embeddings().weight.numel(),
            "memory_usage_mb": round(sum(weight.nbytes for weight in weights) / 2**20, 1),
            "embed_dim": model.model.embedding_dim,
            "max_tokens": max(limit or 0 for limit in job.limits),
            "framework": ["GritLM", "Sentence Transformers", "PyTorch", "safetensors"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "training_datasets": {*job.sets, *known} or None,  # with the names that mteb does not know
            "adapted_from": job.base,
        }
    )


def _load_sentence_transformer(job: Job, device: str | None) -> Any:
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    prompts = None
    if job.prompts:
        sides: tuple[tuple[str, Any], ...] = (("query", "query"), ("document", "passage"))
        given = {
            f"{t}-{name}": job.prompts.instruction(t, kind, side) for t, kind in all_tasks() for name, side in sides
        }
        prompts = {key: text for key, text in given.items() if text}
    try:
        model = SentenceTransformer(str(job.model.folder), device=device)
        if any(job.limits):
            model.max_seq_length = max(limit or 0 for limit in job.limits)
        wrapped = SentenceTransformerEncoderWrapper(model, model_prompts=prompts)
    except Exception as error:  # the library, transformers and a model's own code raise anything
        raise UserError(f"{job.model.name}: cannot be loaded: {first_line(error)}") from error
    update = {"name": job.name, "revision": job.revision, "n_parameters": sum(p.numel() for p in model.parameters())}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=update)
    return wrapped
