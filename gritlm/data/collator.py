"""The text contract, and rows made into tensors.

The contract is what training, encoding and the served folder must agree on: how a text becomes tokens and which tokens
are pooled. It lives in the tokenizer itself wherever it can, so that every loader of the folder obeys it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tokenizers import normalizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gritlm.data.plan import Plan
from gritlm.data.records import RecordSet
from gritlm.data.rows import Text, text_id
from gritlm.errors import UserError

CONTRACT_FILE = "text_contract.json"
STRETCH = 512  # texts tokenised at once
BOUNDARY_PROBES = ("a", "A", "1", "(", ".", "é", "中", '"')


@dataclass
class TextContract:
    """How a text becomes tokens, and which of them are pooled. Saved with the model as text_contract.json.

    An instruction is put before its text as it stands. Trailing white space of the whole is dropped by the tokenizer:
    an instruction that ends in a space then has as many tokens alone as before a text, so what stands behind it is
    pooled from its first token on, by any loader that measures the instruction alone.
    """

    query_max_len: int = 512
    passage_max_len: int = 512
    pooling_method: str = "mean"
    normalized: bool = True
    pool_instruction: bool = False
    append_eos: bool = False
    prompts: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / CONTRACT_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "TextContract":
        return cls(**json.loads((Path(folder) / CONTRACT_FILE).read_text()))


def load_tokenizer(name_or_path: str, contract: TextContract, trust_remote_code: bool = False):
    """The model's fast tokenizer with the contract put into it: right padding, trailing space dropped, end token.

    Raises:
        UserError: there is no fast tokenizer, or no end-of-text token where one is needed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name_or_path}: no tokenizer there: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name_or_path}: found a slow tokenizer, wanted a fast one (tokenizer.json)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{name_or_path}: found a tokenizer without pad and end-of-text tokens, wanted one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    backend = tokenizer.backend_tokenizer
    if "strip_right=True" not in repr(backend.normalizer):
        steps = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Strip(left=False, right=True)])
    if contract.append_eos and tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
        if tokenizer.eos_token is None:
            raise UserError(f"--append_eos: {name_or_path} has no end-of-text token")
        end = processors.TemplateProcessing(
            single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
        )
        backend.post_processor = (
            processors.Sequence([backend.post_processor, end]) if backend.post_processor is not None else end
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save under the generic class: a model's own class would rebuild its normalizer and lose the contract."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@dataclass
class Tokens:
    """One text: its token ids, and how many of the first ones belong to the instruction."""

    ids: list[int]
    instruction: int


class TextEncoder:
    """Texts to token ids under a contract. Holds no model.

    Every text gets at least one token, and at least one that is pooled: an empty one stands as a full stop, one that is
    nothing but its instruction pools the instruction.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, contract: TextContract):
        self.tokenizer, self.contract = tokenizer, contract
        self._instruction_lengths: dict[str, int] = {}

    def __call__(self, texts: Sequence[Text], max_length: int) -> list[Tokens]:
        # A stretch at a time: the tokenizer keeps what it cut off until it has done all that it was given.
        starts = range(0, len(texts), STRETCH)
        return [tokens for start in starts for tokens in self._encode(texts[start : start + STRETCH], max_length)]

    def _encode(self, texts: Sequence[Text], max_length: int) -> list[Tokens]:
        joined = [self._cut(text.instruction + text.text, max_length) for text in texts]
        encoded = self.tokenizer(joined, truncation=True, max_length=max_length, return_attention_mask=False)
        tokens = []
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            instruction = 0 if self.contract.pool_instruction else self.instruction_length(text.instruction)
            ids = ids or self.tokenizer(".").input_ids
            tokens.append(Tokens(ids, instruction if instruction < len(ids) else 0))
        return tokens

    def _cut(self, text: str, max_length: int) -> str:
        """Spare the tokenizer most of a very long text. Keeps it whole unless what is kept is surely enough."""
        kept = 16 * max_length
        if len(text) <= 4 * kept:
            return text
        enough = len(self.tokenizer(text[:kept], add_special_tokens=False).input_ids) > 2 * max_length
        return text[:kept] if enough else text

    def instruction_length(self, instruction: str) -> int:
        """Tokens of the instruction alone, as sentence-transformers counts them (a closing special token is none)."""
        if instruction not in self._instruction_lengths:
            ids = self.tokenizer(instruction).input_ids if instruction else []
            special = bool(ids) and ids[-1] in self.tokenizer.all_special_ids
            self._instruction_lengths[instruction] = len(ids) - special
        return self._instruction_lengths[instruction]

    def check_instruction(self, instruction: str, max_length: int, flag: str) -> None:
        """Refuse an instruction that leaves no room, or whose last token can swallow a text's first character.

        Raises:
            UserError: naming the instruction.
        """
        length = self.instruction_length(instruction)
        if length + 1 + self.contract.append_eos > max_length:
            raise UserError(f"{flag} {max_length} leaves no room behind the {length} tokens of {instruction!r}")
        melts = instruction != "" and not instruction[-1].isspace()
        for probe in BOUNDARY_PROBES if instruction else ():
            encoded = self.tokenizer(instruction + probe, return_offsets_mapping=True)
            melts = melts or any(end > len(instruction) for _, end in encoded["offset_mapping"][:length])
        if melts:
            raise UserError(
                f"the instruction {instruction!r} can share a token with the text behind it: "
                "end it with a space or a line break"
            )


@dataclass(frozen=True)
class Chunking:
    """How texts are cut into what the model takes at once.

    tokens: at most so many a chunk (padding included), but at least one text.
    packed: texts one after the other, without padding; else right-padded to the chunk's longest.
    merge: texts that are equal as tokens are encoded once; right as long as nothing random (dropout) is in the model.
    """

    tokens: int
    packed: bool = True
    merge: bool = True


def make_chunks(texts: Sequence[Tokens], chunking: Chunking, pad_id: int) -> tuple[list[dict], Tensor]:
    """All texts, longest first, cut into chunks.

    Returns:
        the chunks (keyword arguments of `Embedder`), and int64 (T,): the chunks' row that holds each text.
    """
    first_of: dict[tuple, int] = {}
    if chunking.merge:
        same = [first_of.setdefault((tuple(text.ids), text.instruction), i) for i, text in enumerate(texts)]
    else:
        same = list(range(len(texts)))
    order = sorted(set(same), key=lambda i: (-len(texts[i].ids), i))
    chunks, start = [], 0
    while start < len(order):
        size, total = 0, 0
        longest = len(texts[order[start]].ids)
        for i in order[start:]:
            total += len(texts[i].ids) if chunking.packed else longest
            if size and total > chunking.tokens:
                break
            size += 1
        chunks.append(_chunk([texts[i] for i in order[start : start + size]], chunking.packed, pad_id))
        start += size
    row_of = {i: row for row, i in enumerate(order)}
    return chunks, torch.tensor([row_of[i] for i in same])


def _chunk(texts: list[Tokens], packed: bool, pad_id: int) -> dict:
    lengths = [len(text.ids) for text in texts]
    if packed:
        runs = tuple((len(list(run)), length) for length, run in groupby(lengths))
        ids = {"input_ids": torch.tensor([i for text in texts for i in text.ids]), "runs": runs}
    else:
        padded = np.full((len(texts), lengths[0]), pad_id, dtype=np.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text.ids)] = text.ids
        ids = {"input_ids": torch.from_numpy(padded)}
    return ids | {"lengths": torch.tensor(lengths), "skipped": torch.tensor([text.instruction for text in texts])}


def to_device(chunk: dict, device: torch.device | str) -> dict:
    """Its tensors on the device; from pinned memory, without waiting for it."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in chunk.items()
    }


def assemble(
    tokens: Sequence[Tokens],
    slots: Sequence[int],
    ids: Sequence[int],
    known: Sequence[Sequence[int]],
    chunking: Chunking,
    pad_id: int,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The chunks of one rank's texts, and the fields of objective.ContrastiveBatch that say what is what.

    Args:
        tokens: the queries, then the passages.
        slots: per query as many as there are passages in the largest group: the passage's number, or -1.
        ids: hash of each passage's text.
        known: per query, the hashes of its known positives, the drawn one included.
    """
    chunks, row_of_text = make_chunks(tokens, chunking, pad_id)
    slot_S, id_of_passage = torch.tensor(slots), torch.tensor(ids)
    used_S, passage_S = slot_S >= 0, slot_S.clamp(min=0)
    width = max(map(len, known))
    return chunks, {
        "text_of_query_B": row_of_text[: len(known)],
        "text_of_slot_S": torch.where(used_S, row_of_text[len(known) + passage_S], -1),
        "id_of_slot_S": torch.where(used_S, id_of_passage[passage_S], 0),
        "known_BK": torch.tensor([[*row, *row[:1] * (width - len(row))] for row in known]),
    }


class BatchBuilder(torch.utils.data.Dataset):
    """(epoch, step) -> this rank's slice of that global batch, as tensors. Pure, so any worker may build any batch."""

    def __init__(
        self,
        plan: Plan,
        records: Sequence[RecordSet],
        encoder: TextEncoder,
        group_size: int,
        chunking: Chunking,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.plan, self.records, self.encoder = plan, records, encoder
        self.group_size, self.chunking = group_size, chunking
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """`chunks`, `layout` (the fields of objective.ContrastiveBatch), token counts, and the rows' names."""
        epoch, step = key
        planned = self.plan.batch(epoch, step)
        share = len(planned.rows) // self.ranks
        rows = planned.rows[self.rank * share : (self.rank + 1) * share]

        queries, passages, slots, known = [], [], [], []
        for dataset, row in rows:
            record = self.records[dataset][row]
            positive, negatives = self.plan.draw(
                epoch, step, dataset, row, len(record.positives), len(record.negatives), self.group_size - 1
            )
            group = [record.positives[positive], *(record.negatives[i] for i in negatives)]
            queries.append(record.query)
            slots += [len(passages) + i for i in range(len(group))] + [-1] * (self.group_size - len(group))
            passages += group
            known.append(record.known)

        contract = self.encoder.contract
        tokens = self.encoder(queries, contract.query_max_len) + self.encoder(passages, contract.passage_max_len)
        ids = [text_id(passage.text) for passage in passages]
        chunks, layout = assemble(tokens, slots, ids, known, self.chunking, self.encoder.tokenizer.pad_token_id)
        return {
            "chunks": chunks,
            "layout": layout,
            "real_tokens": sum(len(text.ids) for text in tokens),
            "encoded_tokens": sum(int(chunk["lengths"].sum()) for chunk in chunks),
            "padded_tokens": sum(chunk["input_ids"].numel() for chunk in chunks),
            "dataset": planned.dataset,
            "rows": [f"{self.records[dataset].name}:{row}" for dataset, row in rows],
        }
