"""The probe texts of an export, the trainer's vectors of them, and how those of a program differ.

Shape suffixes: N probe texts, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gritlm.models.chunks import ChunkConfig, make_chunks, to_device
from gritlm.models.folder import load_model_folder
from gritlm.models.text import Text, TextContract
from gritlm.models.tokenizer import TextTokenizer

SIDES = ("query", "document", "")  # "": without a prompt
CUT = "cut at the limit"
KINDS: dict[str, tuple[str, ...]] = {
    "one word": ("river", "w", "7", "é"),
    "sentences": ("The quiet engine walks.", "def f(x):\n    return x", "a <|endoftext|> b", "x  y"),
    "other scripts": ("中文", "日本語 テキスト", "привет мир", "مرحبا", "🙂"),
    "at the prompt's end": ("(", ".", "\nnext", " lead", "\tx", "Query: again", "trail "),
    "empty": ("", " \n"),
}


class Probe(NamedTuple):
    kind: str
    side: str
    text: str


def make_probes(contract: TextContract) -> list[Probe]:
    """Every kind of text on every side, and a text beyond every limit as a query and as a passage."""
    probes = [Probe(kind, side, text) for kind, texts in KINDS.items() for side in SIDES for text in texts]
    too_long = "quiet engine under snow " * (contract.longest // 4 + 2)
    return [*probes, *(Probe(CUT, side, too_long) for side in SIDES[:2])]


class TrainedModel:
    """A model as the trainer runs it: in float32, with the project's own tokenizer and pooling.

    Args:
        name: a model folder.
        device: where it runs.
        width: keep that many leading dimensions; None is all.
    Raises:
        UserError: it is not a model folder.
    """

    def __init__(self, name: str, device: str, width: int | None = None):
        self.name, self.device, self.width = name, device, width
        self.rounded_to = torch.float32
        self.embedder, self.text_tokenizer = load_model_folder(name)
        self.embedder.to(device)

    def round(self, dtype: torch.dtype) -> None:
        """Round the backbone's weights to what a folder of that dtype holds. They stay float32."""
        self.rounded_to = dtype
        for weight in self.embedder.backbone.parameters():
            weight.data = weight.data.to(dtype).float()

    @property
    def contract(self) -> TextContract:
        return self.text_tokenizer.contract

    @torch.no_grad()
    def encode(
        self,
        probes: list[Probe],
        contract: TextContract | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Tensor:
        """The vectors of probe texts, float32 (N, D). Another contract or tokenizer stands in for the model's own."""
        contract = contract or self.contract
        text_tokenizer = TextTokenizer(tokenizer or self.text_tokenizer.tokenizer, contract)
        tokens = []
        for _, side, text in probes:
            limit = contract.query_max_len if side == "query" else contract.passage_max_len
            tokens += text_tokenizer([Text(contract.prompts.get(side, ""), text)], limit)
        chunks, row_of_text = make_chunks(tokens, ChunkConfig(4096), 0)
        self.embedder.contract = contract
        rows = torch.cat([self.embedder(**to_device(chunk, self.device)).cpu() for chunk in chunks])[row_of_text]
        self.embedder.contract = self.contract
        rows = rows[:, : self.width]
        return F.normalize(rows, dim=1) if contract.normalized else rows

    def why_no_vector(self, probe: Probe) -> str:
        """Why a program with one limit for both sides, and no rule for empty texts, differs by design; "" if not."""
        contract = self.contract
        prompt = contract.prompts.get(probe.side, "")
        count = len(self.text_tokenizer.tokenizer(prompt + probe.text).input_ids)
        limit = contract.query_max_len if probe.side == "query" else contract.passage_max_len
        if count > limit != contract.longest:
            return f"cuts at {contract.longest} tokens, GritLM at {limit}"
        if count <= (0 if contract.pool_instruction else self.text_tokenizer.prompt_length(prompt)):
            return "no token to pool; GritLM encodes a full stop"
        return ""


class Reference:
    """The trainer's vectors of the probe texts, without the model that gave them.

    Attributes:
        reasons: for each probe why other programs than GritLM have no such vector; "" where they have.
        vectors_ND: float32.
    """

    def __init__(self, trained: TrainedModel):
        self.model, self.rounded_to = (trained.name, trained.device, trained.width), trained.rounded_to
        self.device, self.contract = trained.device, trained.contract
        self.probes = make_probes(trained.contract)
        self.reasons = [trained.why_no_vector(probe) for probe in self.probes]
        self.vectors_ND = trained.encode(self.probes)

    def load(self) -> TrainedModel:
        trained = TrainedModel(*self.model)
        trained.round(self.rounded_to)
        return trained


# ---- how vectors differ


class Limits(NamedTuple):
    """The smallest cosine with the trainer's vector, and the largest relative difference in norm."""

    cosine: float
    norm: float


# Half precision rounds each weight and each state. Smallest cosines of tiny models: 0.999995 and 0.9985.
LIMITS = {"float32": Limits(0.999999, 1e-3), "float16": Limits(0.999, 1e-2), "bfloat16": Limits(0.99, 5e-2)}


class Differences(NamedTuple):
    """How vectors differ from others: cosine, and relative difference in norm. NaN where a text is not compared."""

    cosine_N: Tensor
    norm_N: Tensor
    compared_N: Tensor

    def bad(self, limits: Limits) -> Tensor:
        """bool (N,): the texts that are compared and differ, or have no finite vector."""
        return self.compared_N & ~((self.cosine_N >= limits.cosine) & (self.norm_N <= limits.norm))


class Found(NamedTuple):
    """The vectors that a program gives, which of them are compared with the trainer's, and its first error."""

    vectors_ND: Tensor
    compared_N: Tensor
    error: str

    @property
    def finite(self) -> "Found":
        return self._replace(compared_N=self.compared_N & self.vectors_ND.isfinite().all(1))

    def differ_from(self, wanted_ND: Tensor) -> Differences:
        found_ND, wanted_ND = self.vectors_ND.double(), wanted_ND.double()
        found_N, wanted_N = found_ND.norm(dim=1), wanted_ND.norm(dim=1)
        cosine_N = (found_ND * wanted_ND).sum(1) / (found_N * wanted_N).clamp(min=1e-30)
        return Differences(cosine_N, (found_N / wanted_N - 1).abs(), self.compared_N)
