"""The `GritLM` class: a trained model folder as a text text_tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gritlm.models.attention import PACKED
from gritlm.models.chunks import ChunkConfig, make_chunks, to_device
from gritlm.models.folder import load_model_folder
from gritlm.models.probe import probe_attention
from gritlm.models.text import Text, TextContract, titled


class GritLM:
    """A trained model folder as a text text_tokenizer.

    Args:
        folder: what training wrote (its output folder or a checkpoint in it).
        contract: only for a bare backbone without a text contract of its own.
        device: None takes CUDA where there is one.
        dtype: of the weights; None keeps float32 on the CPU and takes bfloat16 on CUDA.
        attn_implementation: the attention kernel.
    Raises:
        UserError: the folder is no model, or its attention is not what its config says.
    """

    def __init__(
        self,
        folder: str | Path,
        contract: TextContract | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = PACKED,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.text_tokenizer = load_model_folder(str(folder), contract, attn_implementation)
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model.to(self.device)
        for weight in self.model.backbone.parameters():  # not the buffers: rotary frequencies stay in float32
            weight.data = weight.data.to(dtype)
        attn = "cc" if self.model.config.is_causal else "bb"
        probe_attention(self.model, self.model, self.device, attn, exact=dtype == torch.float32)

    @property
    def contract(self) -> TextContract:
        return self.text_tokenizer.contract

    @torch.no_grad()
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = "",
        max_length: int | None = None,
        chunk_tokens: int = 16384,
        convert_to_tensor: bool = False,
        show_progress: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Encode texts, each with the instruction right before it.

        Args:
            texts: one text or many.
            instruction: put before each text as it stands, not pooled unless the contract says so.
            max_length: in tokens, instruction included; None is the contract's passage limit.
            chunk_tokens: tokens (padding included) encoded at once.
        Raises:
            UserError: the instruction can share a token with the text behind it, or fills the limit.
        Returns:
            float32 (D,) for one text, (N, D) for many; numpy, or a CPU tensor with `convert_to_tensor`.
        """
        one = isinstance(texts, str)
        items = [Text(instruction, text) for text in ([texts] if one else texts)]
        limit = max_length or self.contract.passage_max_len
        self.text_tokenizer.check_instruction(instruction, limit, "max_length")
        chunking = ChunkConfig(chunk_tokens, self.model.packed)
        vectors = torch.empty(len(items), self.model.embedding_dim)
        with tqdm(total=len(items), desc="encoding", unit=" texts", disable=not show_progress) as progress:
            # A stretch at a time, so that a large corpus is not held in tokens all at once.
            for start in range(0, len(items), 16384):
                stretch = items[start : start + 16384]
                tokens = self.text_tokenizer(stretch, limit)
                chunks, row_of_text = make_chunks(tokens, chunking, self.text_tokenizer.tokenizer.pad_token_id)
                rows = []
                for chunk in chunks:
                    rows.append(self.model(**to_device(chunk, self.device)).float().cpu())
                    progress.update(len(rows[-1]))
                vectors[start : start + len(stretch)] = torch.cat(rows)[row_of_text]
        result = vectors[0] if one else vectors
        return result if convert_to_tensor else result.numpy()

    def encode_queries(self, queries: str | Sequence[str], **options) -> np.ndarray | torch.Tensor:
        """`encode` with the model's own query instruction and query limit, unless others are given."""
        options.setdefault("instruction", self.contract.prompts.get("query", ""))
        options.setdefault("max_length", self.contract.query_max_len)
        return self.encode(queries, **options)

    def encode_corpus(
        self, corpus: str | Sequence[str] | Sequence[Mapping[str, str]], **options
    ) -> np.ndarray | torch.Tensor:
        """`encode` of passages; a mapping's title and text are joined by a space, as in BEIR."""
        if not isinstance(corpus, str):
            corpus = [p if isinstance(p, str) else titled(p) for p in corpus]
        options.setdefault("instruction", self.contract.prompts.get("document", ""))
        return self.encode(corpus, **options)
