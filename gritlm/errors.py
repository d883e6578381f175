"""What a verb says: its own lines, and when the user has to act one clear line on stderr, exit code 2."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right: a flag, a path, a row of data. The message says what and how."""


class RankError(UserError):
    """One that the other ranks do not meet; the rank that does says it."""


def run_verb(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)`; a `UserError` becomes exit code 2 and one line, of the first rank or the one it is of.

    So does what the system says of a file: a folder that is missing, no permission, a full disk.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except UserError as error:
        message = str(error)
        first, first_here = (os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
        if not first and not first_here and not isinstance(error, RankError):
            return 2
        if not first and not isinstance(error, RankError):  # it may be this machine's own: a path, a full disk
            message = f"rank {os.environ['RANK']}: {message}"
    print(f"gritlm: error: {message}", file=sys.stderr, flush=True)
    return 2


def verb_parser(verb: str, what: str, examples: str) -> argparse.ArgumentParser:
    """Of `gritlm VERB`, its help with the module's docstring before the flags and examples after them."""
    return argparse.ArgumentParser(
        prog=f"gritlm {verb}",
        description=what,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def quieten() -> None:
    """Our own lines and one progress bar are enough."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # accelerate on a DDP option that is set on purpose: buffers are constants, and a broadcast a chunk would hang
    # where ranks have different numbers of chunks.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    warnings.filterwarnings("ignore", message=".gradient_checkpointing. is deprecated.*")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated.*")
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.* is deprecated.*")
