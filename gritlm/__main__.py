"""`gritlm <verb>`, or `python -m gritlm <verb>`: each verb is a module with `main(argv)`.

Under torchrun, `-m gritlm.train` and `-m gritlm.verify_gradients`.
"""

import importlib
import sys

from gritlm import __version__
from gritlm.errors import run_verb

VERBS = {
    "train": "train an embedding model (under torchrun: -m gritlm.train)",
    "plan": "say what a training run would do; load no model",
    "check-data": "read all training data and say what is wrong with it",
    "mine": "find hard negatives for a data set with any embedding model",
    "prepare": "bring public data of a common shape into the training format",
    "encode": "turn texts into vectors with a trained model",
    "verify-gradients": "prove that many ranks, on any engine, get the gradient of one process",
    "quickstart": "build, and report on, the task made of this machine's own Python",
    "benchmark": "time a training step, alone or beside a peer; count the memory that it needs",
}


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gritlm <verb> [flags]\n\nverbs:")
        print("\n".join(f"  {verb:18}{what}" for verb, what in VERBS.items()))
        print("\n`gritlm <verb> --help` shows a verb's flags and examples.")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in VERBS:
        print(f"gritlm: error: found verb {arguments[0]!r}, wanted one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"gritlm.{arguments[0].replace('-', '_')}")
    return run_verb(module.main, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
