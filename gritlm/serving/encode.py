"""Use a trained model: the `GritLM` class, and `gritlm encode IN.jsonl OUT.npy`."""

from pathlib import Path

import numpy as np

from gritlm.cli import verb_parser
from gritlm.data.texts import read_texts
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.gritlm import GritLM

EXAMPLES = """examples:
  gritlm encode corpus.jsonl corpus.npy --model outputs/quickstart
  gritlm encode queries.jsonl queries.npy --model outputs/quickstart --side query
a row of IN (.jsonl, .jsonl.gz, .parquet) is a JSON string, or has "text" (and "title"); row i of OUT is its vector"""


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
