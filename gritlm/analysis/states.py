"""The states of every layer of a model on texts, at the same positions for two models.

A model is analysed with its own attention, pooling and special tokens, and without an instruction. Positions are those
of the texts' own tokens. Layer 0 is the embeddings, the last one is what is pooled. The states of a few texts are in
memory at a time; those of a sample of tokens, and the vectors of the documents, go to a folder on disk.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gritlm.errors import UserError
from gritlm.evaluation.models import fingerprint
from gritlm.models.attention import PACKED
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.base import read_base
from gritlm.models.checks import check_tokenizer
from gritlm.models.chunks import ChunkConfig, make_chunks, to_device
from gritlm.models.embedder import Embedder
from gritlm.models.families import is_causal, is_encoder, longest_text
from gritlm.models.hub import DECODER, model_folder
from gritlm.models.probe import probe_attention
from gritlm.models.text import Text, TextContract
from gritlm.models.tokenizer import TextTokenizer, Tokens, load_tokenizer, special_tokens_around


class StateModel:
    """A model whose states are analysed. Its files are read at once, its weights by `load`.

    Args:
        path: its folder, or its name on the hub.
        random: draw its weights in place of reading them.
    Raises:
        UserError: it is no model, or takes fewer tokens than `max_length`.
    """

    def __init__(self, path: str, max_length: int, output: Path, random: bool = False):
        self.path, self.random = path, random
        base = self._base = read_base(path)
        if base.unusable:
            raise UserError(f"{path}: found {next(iter(base.unusable.values()))}, which is not supported here")
        kind = load_config(path, "bb").model_type
        self.config = load_config(path, base.attn or ("bb" if is_encoder(kind) else "cc"))
        self.causal = is_causal(self.config)
        limit = longest_text(self.config)
        if limit and max_length > limit:
            raise UserError(f"--max_length {max_length}: found a model of at most {limit} tokens ({path})")
        self.contract = TextContract(
            passage_max_len=max_length,
            pooling_method=base.pooling_method or "mean",
            append_eos=bool(base.append_eos),
            rstrip=base.rstrip,
        )
        self.tokenizer = TextTokenizer(load_tokenizer(path, self.contract), self.contract)
        check_tokenizer(path, self.tokenizer.tokenizer, self.config)
        self.before, self.after = map(len, special_tokens_around(self.tokenizer.tokenizer))
        self.layers = int(self.config.num_hidden_layers) + 1
        self.width = int(self.config.hidden_size)
        self.fingerprint = fingerprint(Path(model_folder(path, DECODER)), output)
        self.embedder: Embedder | None = None
        self.device, self._states = torch.device("cpu"), list[tuple[Tensor, ...]]()

    def about(self, alike: bool) -> dict[str, Any]:
        """What the output says of it. `alike`: its tokens are those of model a."""
        said: dict[str, Any] = {"name": Path(self.path).name, "path": self.path, "fingerprint": self.fingerprint}
        said |= {"layers": self.layers - 1, "width": self.width, "pooling": self.contract.pooling_method}
        said |= {"attention": "causal" if self.causal else "bidirectional"}
        said |= {"weights": "random" if self.random else "as saved"}
        return said | {"compared_by": "tokens" if alike else "documents alone: its tokenizer is another one"}

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, special tokens included."""
        tokens = self.tokenizer([Text("", text) for text in texts], self.contract.passage_max_len)
        return [np.array(text.ids, np.int32) for text in tokens]

    def content(self, ids: Any) -> Any:
        """The own tokens of a text, or their states: without special tokens."""
        return ids[self.before : len(ids) - self.after]

    def load(self, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> None:
        """Load the weights. Raises UserError where its attention is not what its config says."""
        backbone = load_backbone(self.path, self.config, PACKED, reset_weight=self.random, seed=seed)
        self.embedder = Embedder(backbone, self.contract, self._base.projection).eval().to(device)
        if (weights := self._base.projection_folder) and not self.random:
            self.embedder.load_projection(weights.parent, weights.name, self._base.projection_bias)
        for weight in self.embedder.backbone.parameters():
            weight.data = weight.data.to(dtype)
        attn = "cc" if self.causal else "bb"
        probe_attention(self.embedder, self.embedder, device, attn, exact=dtype == torch.float32)
        self.device = device
        backbone.config.output_hidden_states = True
        backbone.register_forward_hook(lambda module, inputs, output: self._states.append(output.hidden_states))

    def unload(self) -> None:
        self.embedder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def states(self, texts: Sequence[np.ndarray]) -> tuple[list[list[Tensor]], Tensor]:
        """The states of some texts.

        Args:
            texts: the token ids of each.
        Returns:
            By layer and text the states of its own tokens, float32 (length, D). Vectors of unit norm, float32 (N, P).
        """
        assert self.embedder is not None, "wanted load() before states()"
        everything = sum(map(len, texts)) * max(map(len, texts))
        config = ChunkConfig(everything, self.embedder.packed, deduplicate=False)
        tokens = [Tokens(ids.tolist(), 0) for ids in texts]
        (chunk,), rows = make_chunks(tokens, config, self.tokenizer.tokenizer.pad_token_id or 0)
        vectors = self.embedder(**to_device(chunk, self.device)).float()
        lengths, hidden = chunk["lengths"].tolist(), self._states.pop()
        if len(hidden) != self.layers:
            raise UserError(f"{self.path}: found the states of {len(hidden)} layers, wanted {self.layers}")
        found = []
        for states in hidden:
            parts = states[0].split(lengths) if self.embedder.packed else states
            whole = [parts[row][: len(ids)] for row, ids in zip(rows.tolist(), texts, strict=True)]
            found.append([self.content(states).float() for states in whole])
        return found, vectors[rows.to(vectors.device)]


def batches(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """The numbers of the documents of each batch, of at most `tokens` tokens, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, int(np.searchsorted(np.cumsum(lengths[order[start:]]), tokens, "right")))
        yield order[start : start + size]
        start += size


class Positions:
    """The tokens of the documents that all models with a's tokenizer have, and a sample of at most `most` of them.

    It is drawn from tokens whose prefix no earlier document has: the state of a repeated prefix is repeated too.

    Attributes:
        lengths: tokens of each document.
        documents, places: of each sampled token, the document, ascending, and its number there.
        repeated: tokens that the sample is not drawn from.
    """

    def __init__(self, content: Sequence[np.ndarray], most: int, seed: int):
        self.lengths = np.array(list(map(len, content)))
        new_from = np.zeros(len(content), np.int64)
        order = sorted(range(len(content)), key=lambda number: content[number].tolist())
        for before, number in itertools.pairwise(order):
            length = min(self.lengths[[before, number]])
            differs = np.flatnonzero(content[before][:length] != content[number][:length])
            new_from[number] = differs[0] if len(differs) else length
        ends, self.repeated = np.cumsum(self.lengths - new_from), int(new_from.sum())
        drawn = np.arange(ends[-1])
        if most < len(drawn):
            drawn = np.sort(np.random.default_rng(seed).choice(len(drawn), most, replace=False))
        self.documents = np.searchsorted(ends, drawn, "right")
        self.places = drawn - ends[self.documents] + self.lengths[self.documents]

    def of(self, document: int) -> slice:
        """Where in the sample the tokens of a document are."""
        return slice(*np.searchsorted(self.documents, [document, document + 1]))


class Spool:
    """States of a model on disk, float32: tokens (layers, S, D) of the sample; documents (layers, N, D); pooled (N, P).

    Args:
        positions: of the sample; None for a model with another tokenizer: no tokens.
    """

    def __init__(self, folder: Path, model: StateModel, count: int, positions: Positions | None):
        assert model.embedder is not None, "wanted load() before a spool"
        folder.mkdir(parents=True)
        self.positions = positions
        self.documents = self._file(folder / "documents.npy", model.layers, count, model.width)
        self.pooled = self._file(folder / "pooled.npy", count, model.embedder.embedding_dim)
        self.tokens: np.ndarray | None = None
        if positions is not None:
            self.tokens = self._file(folder / "tokens.npy", model.layers, len(positions.places), model.width)

    def _file(self, path: Path, *size: int) -> np.ndarray:
        return np.lib.format.open_memmap(path, "w+", np.float32, size)

    def add(self, numbers: np.ndarray, states: list[list[Tensor]], vectors: Tensor) -> None:
        """Write the states of some documents, by layer and document, and their vectors."""
        self.pooled[numbers] = vectors.cpu().numpy()
        for layer, texts in enumerate(states):
            self.documents[layer, numbers] = torch.stack([rows.mean(0) for rows in texts]).cpu().numpy()
            for number, rows in zip(numbers, texts, strict=True):
                if self.positions is not None and self.tokens is not None:
                    own = self.positions.of(number)
                    self.tokens[layer, own] = rows[torch.from_numpy(self.positions.places[own])].cpu().numpy()


def stream(
    models: Sequence[StateModel],
    ids: Sequence[list[np.ndarray]],
    spools: Sequence[Spool],
    tokens: int,
    use: Callable[[np.ndarray, list[list[list[Tensor]]]], None],
) -> None:
    """Run models over all documents, the same few at a time.

    Args:
        ids: by model and document its token ids.
        tokens: of a batch.
        use: gets the numbers of the documents, and the states by model, layer and document.
    """
    for numbers in batches(np.array(list(map(len, ids[0]))), tokens):
        found = []
        for model, own, spool in zip(models, ids, spools, strict=True):
            states, vectors = model.states([own[number] for number in numbers])
            spool.add(numbers, states, vectors)
            found.append(states)
        use(numbers, found)
