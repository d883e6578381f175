"""Draw a training run, or several side by side, on one HTML page: `gritlm report RUN [RUN...]`."""

import argparse
from collections import Counter
from pathlib import Path

from gritlm.cli import verb_parser
from gritlm.errors import UserError
from gritlm.files import write_text
from gritlm.report.page import make_page
from gritlm.report.run import Run, read_run

PAGE = "report.html"
EXAMPLES = """examples:
  gritlm report outputs/mine
  gritlm report outputs/mine outputs/other --output compared.html
The page holds curves, evaluations, data, settings, versions and commands. It needs no network. A run that still trains
may be drawn at any time. Without --output the page is report.html in the first RUN, in the place of an earlier one."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; `output` has its default, and may be written."""
    parser = verb_parser("report", __doc__, EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the output folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=f"the page; default {PAGE} in the first RUN")
    args = parser.parse_args(argv)
    output = args.output = args.output or args.runs[0] / PAGE
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output: found {output}, wanted a name that ends in .html")
    replaced = output.resolve() == (args.runs[0] / PAGE).resolve() and output.is_file()
    if not replaced and (output.exists() or output.is_symlink()):
        raise UserError(f"--output: {output} exists; nothing is overwritten, name another file")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    write_text(args.output, make_page(named(args.runs)), errors="replace")
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")
    return 0


def named(folders: list[Path]) -> dict[str, Run]:
    """The runs, each under the name of its folder, or under its path where two folders have one name.

    Raises:
        UserError: a folder is given twice, or is no run.
    """
    places = Counter(folder.resolve() for folder in folders)
    for folder in folders:
        if places[folder.resolve()] > 1:
            raise UserError(f"{folder}: found this run twice, wanted different runs")
    runs = list(map(read_run, folders))
    names = Counter(run.name for run in runs)
    return {run.name if names[run.name] == 1 else str(run.folder.resolve()): run for run in runs}
