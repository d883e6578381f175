"""Train text-embedding models from decoder LLMs, and use them."""

import logging
import os
import re
import sys

# It says at each import that it takes a slower way to the same numbers.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
if not os.path.isdir(os.path.join(__path__[0], "models")):  # a checkout that is not installed: models/ is beside us
    __path__.append(os.path.dirname(os.path.abspath(__path__[0])))

__version__ = "0.2.0"
__all__ = ["GritLM"]

# Verb -> the module whose `main(argv)` runs it.
VERBS = {
    "train": "gritlm.training.train",
    "plan": "gritlm.training.plan",
    "check-data": "gritlm.curation.check_data",
    "mine": "gritlm.curation.mine",
    "filter": "gritlm.curation.filter",
    "prepare": "gritlm.curation.prepare",
    "encode": "gritlm.serving.encode",
    "evaluate": "gritlm.evaluation.evaluate",
    "export": "gritlm.serving.export",
    "merge": "gritlm.serving.merge",
    "import": "gritlm.serving.import_checkpoint",
    "report": "gritlm.report.report",
    "hrsa": "gritlm.analysis.hrsa",
    "study-table": "gritlm.analysis.study",
    "verify-gradients": "gritlm.training.verify_gradients",
    "devices": "gritlm.devices",
    "quickstart": "gritlm.quickstart",
    "benchmark": "gritlm.benchmark.benchmark",
}


def __getattr__(name: str):
    # Imported on demand: `gritlm --help` and the verbs that load no model do not wait for transformers.
    if name == "GritLM":
        from gritlm.gritlm import GritLM

        return GritLM
    raise AttributeError(name)


def _refuse_to_run_a_module() -> None:
    """Answer `python -m gritlm.X` in one line. Without this Python would import X, run nothing and exit with 0."""
    if sys.argv[:1] != ["-m"]:  # what argv[0] is while Python looks up the module that -m names, and never later
        return
    module = next((word for word in sys.orig_argv if re.match(r"(-\w*m)?gritlm\.", word)), "")
    module = module[module.find("gritlm.") :]
    if module in ("", "gritlm.__main__"):
        return
    verb = module.rsplit(".", 1)[1].replace("_", "-")
    wanted = f"-m gritlm {verb}" if verb in VERBS else f"-m gritlm VERB (one of {', '.join(VERBS)})"
    print(f"gritlm: error: found -m {module}, wanted {wanted}", file=sys.stderr)
    sys.exit(2)


_refuse_to_run_a_module()
