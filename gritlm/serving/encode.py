"""Encode a file of texts with a trained model: `gritlm encode IN.jsonl OUT.npy --model FOLDER`."""

from pathlib import Path

import numpy as np

from gritlm.cli import home_expanded, verb_parser
from gritlm.data.texts import read_texts
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.gritlm import GritLM

EXAMPLES = """examples:
  gritlm encode corpus.jsonl corpus.npy --model outputs/quickstart
  gritlm encode queries.jsonl queries.npy --model outputs/quickstart --side query
A row of IN (.jsonl, .jsonl.gz, .parquet) is a JSON string, or has "text" and perhaps "title".
Row i of OUT is the vector of row i of IN."""


def main(argv: list[str]) -> int:
    parser = verb_parser("encode", __doc__, EXAMPLES)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT.npy", help="float32 (rows, width), in numpy's format")
    parser.add_argument("--model", type=home_expanded, required=True, help="model folder that gritlm train wrote")
    parser.add_argument("--side", choices=("query", "passage"), default="passage", help="default passage")
    parser.add_argument("--instruction", help="in place of the model's own for that side")
    chunk = "tokens encoded at once, default 16384, and 1024 or more on a CPU"
    parser.add_argument("--chunk_tokens", type=int, help=chunk)
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists; nothing is overwritten, name another file")
    texts = read_texts(arguments.input)
    model = GritLM(arguments.model)
    encode = model.encode_queries if arguments.side == "query" else model.encode_corpus
    options = {} if arguments.instruction is None else {"instruction": arguments.instruction}
    # The file is opened before encoding, so that a path without room or permission fails at once.
    with written_aside(arguments.output) as aside, open(aside, "wb") as stream:
        vectors = encode(texts, chunk_tokens=arguments.chunk_tokens, show_progress=True, **options)
        np.save(stream, vectors)
    print(f"{len(vectors)} vectors of width {vectors.shape[1]} in {arguments.output}")
    return 0
