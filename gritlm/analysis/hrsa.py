"""Compare the states of two models, layer by layer, on three levels, with controls: `gritlm hrsa A B --texts FILE`."""

import argparse

from gritlm.cli import verb_parser
from gritlm.errors import UserError

EXAMPLES = """examples:
  gritlm hrsa Qwen/Qwen3-0.6B outputs/mine --texts texts.jsonl --output_dir outputs/hrsa"""


def parse(argv: list[str]) -> argparse.Namespace:
    return verb_parser("hrsa", __doc__, EXAMPLES).parse_args(argv)


def main(argv: list[str]) -> int:
    parse(argv)
    raise UserError("gritlm hrsa: not there yet")
