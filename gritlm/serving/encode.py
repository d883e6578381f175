"""Encode a file of texts with a trained model: `gritlm encode IN.jsonl OUT.npy --model FOLDER`."""

import os
from pathlib import Path

from gritlm.cli import home_expanded, verb_parser
from gritlm.errors import UserError

EXAMPLES = """examples:
  gritlm encode corpus.jsonl corpus.npy --model outputs/quickstart
  gritlm encode queries.jsonl queries.npy --model outputs/quickstart --side query
  gritlm encode corpus.jsonl corpus.parquet --model outputs/quickstart --precision int8 --width 256
  gritlm encode train.jsonl teacher/ --rows --model Qwen/Qwen3-Embedding-0.6B
A row of IN (.jsonl, .jsonl.gz, .parquet) is a JSON string, or has "text" and perhaps "title".
Row i of OUT is the vector of row i of IN. Every GPU is used; under torchrun every rank. The same command continues a
call that was interrupted, from the blocks in OUT.partial.
With --rows, IN is training data, and the folder OUT holds one vector for each distinct text: see --teacher_vectors of
gritlm train."""


def main(argv: list[str]) -> int:
    parser = verb_parser("encode", __doc__, EXAMPLES)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT", help="(rows, width), .npy; or .parquet with id and vector")
    wanted = "model folder that gritlm train wrote; with --rows any model that sentence-transformers loads"
    parser.add_argument("--model", type=home_expanded, required=True, help=wanted)
    parser.add_argument("--rows", action="store_true", help="encode the distinct texts of training data, once each")
    keep = "with --rows: encode texts with their rows' instructions, in place of the model's own prompts"
    parser.add_argument("--keep_instruction", action="store_true", help=keep)
    parser.add_argument("--side", choices=("query", "passage"), default="passage", help="default passage")
    parser.add_argument("--instruction", help="in place of the model's own for that side")
    stored = "how a dimension is stored, default float32; int8 and binary as sentence-transformers does"
    parser.add_argument("--precision", choices=("float32", "float16", "int8", "binary"), default="float32", help=stored)
    parser.add_argument("--width", type=int, help="leading dimensions to keep of a Matryoshka model, default all")
    chunk = "tokens encoded at once, default 16384, and 1024 or more on a CPU"
    parser.add_argument("--chunk_tokens", type=int, help=chunk)
    parser.add_argument("--processes", type=int, help="how many processes encode, default one for each GPU")
    arguments = parser.parse_args(argv)
    for flag in ("width", "chunk_tokens", "processes"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UserError(f"--{flag} {value}: wanted 1 or more")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and arguments.processes:
        raise UserError(f"--processes: found {ranks} ranks of torchrun, which need no such flag")
    if arguments.output.exists():
        if rank > 0:  # the first rank says so, or has found all blocks in OUT.partial
            return 0
        raise UserError(f"{arguments.output} exists; nothing is overwritten, name another file")
    if arguments.rows:
        for flag in ("precision", "width", "processes", "side", "instruction"):
            if getattr(arguments, flag) != parser.get_default(flag):
                raise UserError(f"--{flag} has no effect with --rows")
        from gritlm.serving.encode_rows import encode_rows  # loads any model: slow to import

        paths = arguments.input, arguments.output
        print(encode_rows(*paths, arguments.model, arguments.keep_instruction, arguments.chunk_tokens))
        return 0
    if arguments.keep_instruction:
        raise UserError("--keep_instruction has no effect without --rows")
    if arguments.output.suffix.lower() not in (".npy", ".parquet"):
        raise UserError(f"{arguments.output}: found the ending {arguments.output.suffix!r}, wanted .npy or .parquet")
    from gritlm.serving.encode_texts import encode_texts

    encode_texts(arguments, rank, ranks)
    return 0
