"""Vectors of many texts, on disk as they come, and the nearest of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.gritlm import GritLM
from gritlm.models.text import CONTRACT_FILE, Text

STRETCH = 4096  # texts embedded before they are put on disk

Encode = Callable[[list[Text]], np.ndarray]  # texts -> float32 (N, D), unit vectors


def load_encoder(model: str, keep_instruction: bool) -> Encode:
    """A model folder of ours, or anything that sentence-transformers loads."""
    if (Path(model) / CONTRACT_FILE).is_file():
        ours = GritLM(model)

        def encode(texts: list[Text]) -> np.ndarray:
            vectors = np.empty((len(texts), ours.model.embedding_dim), dtype=np.float32)
            instructions = [text.instruction if keep_instruction else "" for text in texts]
            for instruction in set(instructions):
                rows = [i for i, other in enumerate(instructions) if other == instruction]
                vectors[rows] = ours.encode([texts[i].text for i in rows], instruction=instruction)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        return encode
    from sentence_transformers import SentenceTransformer

    try:
        theirs = SentenceTransformer(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error

    def encode(texts: list[Text]) -> np.ndarray:
        joined = [(text.instruction if keep_instruction else "") + text.text for text in texts]
        # A prompt of the model's own would be a second instruction.
        return theirs.encode(joined, prompt="", normalize_embeddings=True, show_progress_bar=False)

    return encode


def embed(encode: Encode, texts: Sequence[Text], path: Path, what: str) -> np.ndarray:
    """The texts' vectors, memory-mapped (N, D); those that are in `path` already are not made again."""
    counter = path.with_suffix(".done")
    done = int(counter.read_text()) if counter.exists() else 0
    vectors = np.load(path, mmap_mode="r+") if done else None
    with tqdm(total=len(texts), initial=done, desc=f"embedding {what}", unit=" texts", delay=2) as progress:
        for start in range(done, len(texts), STRETCH):
            part = encode(texts[start : start + STRETCH])
            if not (finite := np.isfinite(part).all(axis=1)).all():
                text = texts[start + int(np.flatnonzero(~finite)[0])].text
                raise UserError(f"{what}: found a vector that is not finite, of {text[:60]!r}; the model is damaged")
            if vectors is None:
                vectors = np.lib.format.open_memmap(path, "w+", np.float32, (len(texts), part.shape[1]))
            vectors[start : start + len(part)] = part
            vectors.flush()
            with written_aside(counter) as aside:
                aside.write_text(str(start + len(part)))
            progress.update(len(part))
    return vectors
