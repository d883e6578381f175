"""How a verb ends when the user has to act: one clear line on stderr, exit code 2, no traceback."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right: a flag, a path, a row of data. The message says what and how."""


def run_verb(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)`; a `UserError` becomes one line (on the first rank only) and exit code 2."""
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"gritlm: error: {error}", file=sys.stderr, flush=True)
        return 2
