"""`gritlm VERB`, or `python -m gritlm VERB` (also under torchrun): each verb is a module with `main(argv)`."""

import importlib
import sys

from gritlm import VERBS, __version__
from gritlm.cli import exit_rank, guard_screen, run_verb

HELP = {
    "train": "train an embedding model (many GPUs: torchrun ... -m gritlm train)",
    "plan": "show what a training run would do, without loading a model",
    "check-data": "read all training data and report what is wrong with it",
    "mine": "find hard negatives for a data set with any embedding model",
    "filter": "keep the rows of a data set whose positives and negatives are right by a model's scores",
    "prepare": "convert public data of a common shape to the training format",
    "encode": "turn texts into vectors with a trained model",
    "evaluate": "measure a model on sets of your own or benchmarks of mteb, and compare it with another",
    "export": "write a model for serving, and prove that it gives the trainer's vectors in every program",
    "merge": "average or interpolate the weights of models, or of a run's last saves",
    "import": "convert a checkpoint of gritlm-re to a model folder, running nothing in it",
    "report": "draw a training run, or several side by side, on one HTML page",
    "hrsa": "compare the states of two models, layer by layer: what did training change inside",
    "study-table": "print the table of a study: differences over seeds, tested for difference and equivalence",
    "verify-gradients": "compare the gradient of many ranks, on any engine, with that of one process",
    "devices": "list the GPUs that a run would use, and their free memory",
    "quickstart": "build the task made of this machine's own Python, and report on it",
    "benchmark": "measure a training step, the loss or encoding, also beside sentence-transformers; count GPU memory",
}


def main() -> int:
    guard_screen()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gritlm VERB [flags]\n\nverbs:")
        print("\n".join(f"  {verb:18}{text}" for verb, text in HELP.items()))
        print("\n`gritlm VERB --help` shows a verb's flags and examples.")
        return 0
    verb = arguments[0]
    if verb == "--version":
        print(__version__)
        return 0
    if verb not in VERBS:
        print(f"gritlm: error: found verb {verb!r}, wanted one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return run_verb(lambda argv: importlib.import_module(VERBS[verb]).main(argv), arguments[1:])


if __name__ == "__main__":
    exit_rank(main())
