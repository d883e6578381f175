"""The `GritLM` class: encodes texts with a trained model folder."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gritlm.errors import UserError
from gritlm.models.attention import PACKED
from gritlm.models.chunks import ChunkConfig, make_chunks, to_device
from gritlm.models.cpu_linear import choose_products, use_products
from gritlm.models.families import is_causal
from gritlm.models.folder import load_model_folder
from gritlm.models.hub import model_folder
from gritlm.models.probe import probe_attention
from gritlm.models.text import CONTRACT_FILE, Text, TextContract, list_passages, list_texts

CHUNK_TOKENS = 16384  # on a GPU
# On a CPU a chunk's widest activations then stay in the cache: a quarter faster.
CPU_CHUNK_TOKENS, CPU_CHUNK_VALUES = 1024, 1 << 20
TEXTS_AT_ONCE = 16384  # bounds the memory for the tokens of a large corpus


class GritLM:
    """Encodes texts with a trained model folder.

    Args:
        folder: a model folder that `gritlm train` wrote: its output folder or a checkpoint. Or its name on the hub.
        contract: only for a bare backbone. A model folder has a text contract, with which its model was trained.
        device: None is CUDA where there is one, else the CPU. Several, such as ["cuda:0", "cuda:1"], share the texts of
            each call: a thread for each. `gritlm encode` has a process for each, which scales further.
        dtype: of the weights. None is float32 on the CPU and bfloat16 on CUDA.
        attn_implementation: the attention kernel, "packed" or one of transformers' names.
    Raises:
        UserError: the folder is not a model, has a contract beside the one given, or its attention differs from what
            its config.json says.
    """

    def __init__(
        self,
        folder: str | Path,
        contract: TextContract | None = None,
        device: str | list[str] | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = PACKED,
    ):
        if contract is not None and (Path(model_folder(str(folder))) / CONTRACT_FILE).is_file():
            raise UserError(f"{folder}: found {CONTRACT_FILE} and the argument contract, wanted no such argument")
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        first, *others = [device] if isinstance(device, str) else device or [usual]
        self.device = torch.device(first)
        self.model, self.text_tokenizer = load_model_folder(str(folder), contract, attn_implementation)
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model.to(self.device)
        for weight in self.model.backbone.parameters():  # not the buffers: rotary frequencies stay in float32
            weight.data = weight.data.to(dtype)
        if self.device.type == "cpu" and dtype == torch.float32:
            use_products(self.model, choose_products(self.model, ["forward"])[0])
        attn = "cc" if is_causal(self.model.config) else "bb"
        probe_attention(self.model, self.model, self.device, attn, exact=dtype == torch.float32)
        self._replicas = [self.model, *(copy.deepcopy(self.model).to(other) for other in others)]

    @property
    def contract(self) -> TextContract:
        return self.text_tokenizer.contract

    def encode(
        self,
        texts: str | Iterable[str],
        instruction: str = "",
        max_length: int | None = None,
        chunk_tokens: int | None = None,
        convert_to_tensor: bool = False,
        show_progress: bool | tqdm = False,
        *,
        batch_size: int | None = None,
        embed_instruction: bool | None = None,
        recast: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Encode texts, each with the instruction directly before it.

        `batch_size`, `embed_instruction` and `recast` are those of the original GritLM class
        (https://github.com/ContextualAI/gritlm).

        Args:
            texts: one text, or many in a list, tuple, array, Series or generator.
            instruction: put before each text without a separator.
            max_length: limit in tokens, instruction included. None is the contract's limit for passages.
            chunk_tokens: tokens encoded at once, padding included. None is 16384 on a GPU, and 1024 on a CPU for all
                but tiny models, or follows from `batch_size`.
            convert_to_tensor: return a tensor in place of an array.
            show_progress: show a progress bar on stderr; or a bar to advance, one for several calls.
            batch_size: used if `chunk_tokens` is None, which is then `batch_size * max_length`.
            embed_instruction: pool the instruction's tokens, too. None is the contract's choice.
            recast: accepted without effect. The original casts vectors to the model's dtype; these are always float32.
        Raises:
            UserError: a text is not a string; the message names its index. Or the instruction can share a token with
                the text after it, or leaves no room for one.
        Returns:
            float32 (D,) for one text, (N, D) for many; a numpy array, or a CPU tensor with `convert_to_tensor`.
        """
        items = [Text(instruction, text) for text in list_texts([texts] if isinstance(texts, str) else texts)]
        limit = max_length or self.contract.passage_max_len
        self.text_tokenizer.check_instruction(instruction, limit, "max_length")
        usual = CHUNK_TOKENS
        if self.device.type == "cpu":
            usual = max(CPU_CHUNK_TOKENS, CPU_CHUNK_VALUES // self.model.config.intermediate_size)
        chunk_tokens = chunk_tokens or (batch_size * limit if batch_size else usual)
        chunking, pad_id = ChunkConfig(chunk_tokens, self.model.packed), self.text_tokenizer.tokenizer.pad_token_id
        vectors = torch.empty(len(items), self.model.embedding_dim)
        own = tqdm(total=len(items), desc="encoding", unit=" texts", disable=show_progress is not True)
        with own as bar:
            progress = show_progress if isinstance(show_progress, tqdm) else bar
            for start in range(0, len(items), TEXTS_AT_ONCE):
                tokens = self.text_tokenizer(items[start : start + TEXTS_AT_ONCE], limit, embed_instruction)
                chunks, row_of_text = make_chunks(tokens, chunking, pad_id)
                rows = []
                for vectors_of_chunk in self._run(chunks):
                    rows.append(vectors_of_chunk)
                    progress.update(len(vectors_of_chunk))
                progress.update(len(tokens) - sum(map(len, rows)))  # equal texts are encoded once
                vectors[start : start + len(tokens)] = torch.cat(rows)[row_of_text]
        result = vectors[0] if isinstance(texts, str) else vectors
        return result if convert_to_tensor else result.numpy()

    def _run(self, chunks: list[dict[str, Any]]) -> Iterator[torch.Tensor]:
        """The vectors of each chunk, in order, float32 on the CPU. The devices take the chunks in turn."""

        @torch.no_grad()
        def run(model: torch.nn.Module, chunk: dict[str, Any]) -> torch.Tensor:
            return model(**to_device(chunk, next(model.parameters()).device)).float().cpu()

        count = len(self._replicas)
        if count == 1:
            yield from (run(self.model, chunk) for chunk in chunks)
            return
        with ExitStack() as stack:
            threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in self._replicas]
            calls = [threads[n % count].submit(run, self._replicas[n % count], c) for n, c in enumerate(chunks)]
            yield from (call.result() for call in calls)

    def encode_queries(self, queries: str | Iterable[str], **options: Any) -> np.ndarray | torch.Tensor:
        """`encode` with the contract's query instruction and limit, unless `options` give others."""
        options.setdefault("instruction", self.contract.prompts.get("query", ""))
        options.setdefault("max_length", self.contract.query_max_len)
        return self.encode(queries, **options)

    def encode_corpus(
        self, corpus: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]], **options: Any
    ) -> np.ndarray | torch.Tensor:
        """`encode` of passages with the contract's passage instruction, unless `options` give another.

        Args:
            corpus: one text or many, with or without titles, in the forms that `list_passages` lists.
        Raises:
            UserError: as `encode`; or the corpus has another form.
        """
        options.setdefault("instruction", self.contract.prompts.get("document", ""))
        return self.encode(corpus if isinstance(corpus, str) else list_passages(corpus), **options)
