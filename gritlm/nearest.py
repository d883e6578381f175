"""Vectors of many texts, on disk as they come, and the nearest of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gritlm.data.collator import CONTRACT_FILE
from gritlm.data.rows import Text
from gritlm.encode import GritLM
from gritlm.errors import UserError
from gritlm.files import written_aside

STRETCH = 4096  # texts embedded before they are put on disk
COLUMNS = 65536  # passages scored at once

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


def nearest(queries_BD: np.ndarray, corpus_ND: np.ndarray, count: int, device: torch.device):
    """The `count` best scores of each query and their numbers, (B, count) each; by tiles of the corpus."""
    queries = torch.from_numpy(queries_BD).to(device)
    scores = torch.empty(len(queries), 0, device=device)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    room = torch.empty(len(queries), min(COLUMNS, len(corpus_ND)), device=device)  # once: fresh pages take time
    for start in range(0, len(corpus_ND), COLUMNS):
        tile = torch.from_numpy(corpus_ND[start : start + COLUMNS]).to(device)
        products = torch.matmul(queries, tile.T, out=room[:, : len(tile)])
        found, places = products.topk(min(count, len(tile)), dim=1)
        scores, numbers = torch.cat([scores, found], 1), torch.cat([numbers, places + start], 1)
        scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
        numbers = numbers.gather(1, order)
    return scores.cpu().numpy(), numbers.cpu().numpy()
