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
  gritlm encode train.jsonl teacher/ --rows --model Qwen/Qwen3-Embedding-0.6B
A row of IN (.jsonl, .jsonl.gz, .parquet) is a JSON string, or has "text" and perhaps "title".
Row i of OUT is the vector of row i of IN.
With --rows, IN is training data, and the folder OUT holds one vector for each distinct text: see --teacher_vectors of
gritlm train."""


def main(argv: list[str]) -> int:
    parser = verb_parser("encode", __doc__, EXAMPLES)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT", help="float32 (rows, width) in numpy's format, .npy")
    wanted = "model folder that gritlm train wrote; with --rows any model that sentence-transformers loads"
    parser.add_argument("--model", type=home_expanded, required=True, help=wanted)
    parser.add_argument("--rows", action="store_true", help="encode the distinct texts of training data, once each")
    keep = "with --rows: encode texts with their rows' instructions, in place of the model's own prompts"
    parser.add_argument("--keep_instruction", action="store_true", help=keep)
    parser.add_argument("--side", choices=("query", "passage"), default="passage", help="default passage")
    parser.add_argument("--instruction", help="in place of the model's own for that side")
    chunk = "tokens encoded at once, default 16384, and 1024 or more on a CPU"
    parser.add_argument("--chunk_tokens", type=int, help=chunk)
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists; nothing is overwritten, name another file")
    if arguments.rows:
        from gritlm.serving.encode_rows import encode_rows  # loads any model: slow to import

        paths = arguments.input, arguments.output
        print(encode_rows(*paths, arguments.model, arguments.keep_instruction, arguments.chunk_tokens))
        return 0
    if arguments.keep_instruction:
        raise UserError("--keep_instruction has no effect without --rows")
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
