"""Use a trained model: the `GritLM` class, and `gritlm encode IN.jsonl OUT.npy`."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gritlm.data.collator import Chunking, TextContract, make_chunks, to_device
from gritlm.data.rows import Text, decode, read_blocks
from gritlm.errors import UserError, run_verb, verb_parser
from gritlm.files import written_aside
from gritlm.model_folder import load_model_folder
from gritlm.models.attention import PACKED
from gritlm.models.backbone import probe_attention

EXAMPLES = """examples:
  gritlm encode corpus.jsonl corpus.npy --model outputs/quickstart
  gritlm encode queries.jsonl queries.npy --model outputs/quickstart --side query
a row of IN (.jsonl, .jsonl.gz, .parquet) is a JSON string, or has "text" (and "title"); row i of OUT is its vector"""


class GritLM:
    """A trained model folder as a text encoder.

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
        self.model, self.text_encoder = load_model_folder(str(folder), contract, attn_implementation)
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model.to(self.device)
        for weight in self.model.backbone.parameters():  # not the buffers: rotary frequencies stay in float32
            weight.data = weight.data.to(dtype)
        attn = "cc" if self.model.config.is_causal else "bb"
        probe_attention(self.model, self.model, self.device, attn, exact=dtype == torch.float32)

    @property
    def contract(self) -> TextContract:
        return self.text_encoder.contract

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
        self.text_encoder.check_instruction(instruction, limit, "max_length")
        chunking = Chunking(chunk_tokens, self.model.packed)
        vectors = torch.empty(len(items), self.model.embedding_dim)
        with tqdm(total=len(items), desc="encoding", unit=" texts", disable=not show_progress) as progress:
            # A stretch at a time, so that a large corpus is not held in tokens all at once.
            for start in range(0, len(items), 16384):
                stretch = items[start : start + 16384]
                tokens = self.text_encoder(stretch, limit)
                chunks, row_of_text = make_chunks(tokens, chunking, self.text_encoder.tokenizer.pad_token_id)
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


def titled(passage: Mapping[str, str]) -> str:
    """Title and text as one, as in BEIR."""
    return f"{passage.get('title') or ''} {passage['text']}".strip()


def read_texts(path: Path, may_be_empty: bool = True) -> list[str]:
    """Texts of a .jsonl, .jsonl.gz or .parquet file, one a row; blank lines are no rows.

    Raises:
        UserError: naming file and line.
    """
    texts = []
    for number, raw in itertools.chain.from_iterable(read_blocks(path, columns=("title", "text"))):
        row = decode(path, number, raw)
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            row = titled(row)
        if not isinstance(row, str):
            raise UserError(f'{path}:{number}: found no text, wanted a JSON string or an object with "text"')
        if row != row.encode(errors="replace").decode():
            raise UserError(f"{path}:{number}: found half of a surrogate pair, wanted valid Unicode")
        if not (may_be_empty or row.strip()):
            raise UserError(f"{path}:{number}: found an empty text, wanted a passage")
        texts.append(row)
    return texts


def main(argv: list[str]) -> int:
    parser = verb_parser("encode", __doc__, EXAMPLES)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT.npy", help="float32 (rows, width), numpy's format")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--side", choices=("query", "passage"), default="passage", help="default: passage")
    parser.add_argument("--instruction", help="in place of the model's own")
    parser.add_argument("--chunk_tokens", type=int, default=16384, help="tokens encoded at once, default 16384")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists; nothing is overwritten, name another file")
    texts = read_texts(arguments.input)
    model = GritLM(arguments.model)
    encode = model.encode_queries if arguments.side == "query" else model.encode_corpus
    options = {} if arguments.instruction is None else {"instruction": arguments.instruction}
    with written_aside(arguments.output) as aside, open(aside, "wb") as stream:  # while there is nothing to lose
        vectors = encode(texts, chunk_tokens=arguments.chunk_tokens, show_progress=True, **options)
        np.save(stream, vectors)
    print(f"{len(vectors)} vectors of width {vectors.shape[1]} in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main))
