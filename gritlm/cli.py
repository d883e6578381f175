"""How a verb runs: its parser, its exit code, and one line on stderr where the user has to act. Imports no torch."""

import argparse
import atexit
import difflib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gritlm.errors import RankError, UserError
from gritlm.files import check_name


class _Screen(io.FileIO):
    """A standard stream. When its reader has gone (`| head`, a closed terminal), what is written is thrown away."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(content)


def guard_screen() -> None:
    """Keep a run going whatever becomes of its screen: a closed pipe, a closed stream, a locale without a character.

    The encoding stays the locale's. A character that it lacks is written as an escape, such as \\u67e5.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):  # no test's, no notebook's
            stream.flush()
            screen = _Screen(stream.fileno(), "w", closefd=False)
            unbuffered = stream.write_through  # python -u
            buffer: Any = screen if unbuffered else io.BufferedWriter(screen)
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", None, lines, unbuffered))


def run_verb(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code. A `UserError` becomes one line on stderr and exit code 2, Ctrl-C 130.

    So does an `OSError` that names a file: a missing folder, no permission, a full disk. Where all ranks meet the same
    error, the first rank prints it.
    """
    guard_screen()
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except KeyboardInterrupt:
        print("gritlm: interrupted", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except UserError as error:
        message = str(error)
        first, first_here = (os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
        if not first and not first_here and not isinstance(error, RankError):
            return 2
        if not first and not isinstance(error, RankError):  # the cause may be on this machine alone: a path, a disk
            message = f"rank {os.environ['RANK']}: {message}"
    print(f"gritlm: error: {message}", file=sys.stderr, flush=True)
    return 2


def exit_rank(code: int) -> NoReturn:
    """End this process with an exit code. A rank of a distributed job skips the interpreter's shutdown.

    DTensor's and DeepSpeed's caches keep gloo's threads alive after the process group is destroyed. Such a thread can
    abort an interpreter that shuts down, and a run that has written everything would end as a failed one.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()  # loggers flush here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_at_once(message: str, code: int = 1) -> NoReturn:
    """End this process from any of its threads, with one line on stderr."""
    print(f"gritlm: error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are one line, raised as `UserError`. An unknown flag gets a hint, or the nearest flag.

    Attributes:
        hints: unknown flag without dashes -> what to use in its place.
    """

    hints: dict[str, str] = {}  # noqa: RUF012

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return found

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            try:
                word.encode()
            except UnicodeEncodeError:
                encoding = sys.getfilesystemencoding()
                self.error(f"found {os.fsencode(word)!r}, wanted text in the locale's encoding, {encoding}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"found {word!r} where no value is wanted"
        name = word.split("=")[0]
        if hint := self.hints.get(name.lstrip("-").replace("-", "_")):
            return f"{name}: no such flag here; {hint}"
        flags = [option for action in self._actions for option in action.option_strings if "-" not in option[2:]]
        wanted = "--" + name.lstrip("-").replace("-", "_")
        longer = [flag for flag in flags if flag.startswith(wanted)]
        nearest = longer or difflib.get_close_matches(wanted, flags, 1, 0.0)
        return f"{name}: no such flag; the nearest is {nearest[0]} ({self.prog} --help lists all)"


def verb_parser(verb: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """The parser of `gritlm VERB`. Its help shows the description, the flags, then the examples.

    A flag of the type Path, or of the type `home_expanded`, takes ~ for the home folder.
    """
    parser = OneLineErrors(
        prog=f"gritlm {verb}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("type", Path, lambda text: Path(home_expanded(text)))
    return parser


def home_expanded(path: str) -> str:
    """A path, or the name of a model, as the user gave it, with the home folder for ~.

    Raises:
        OSError: see `check_name`.
    """
    expanded = os.path.expanduser(path)
    check_name(expanded)
    return expanded


def quieten(deepspeed: bool = False) -> None:
    """Keep the libraries' progress bars and known harmless warnings off the screen.

    `deepspeed` says that DeepSpeed is in use. Elsewhere accelerate imports it all the same, and it logs its start.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # New values of --save_steps and --logging_steps do take effect here.
    outdated = "Warning: The following arguments do not match the ones in the `trainer_state.json`"
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: not record.msg.startswith(outdated))
    if not deepspeed:
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message="Can't initialize NVML")
    # accelerate warns of a DDP option that is set on purpose. Buffers are constants here, and a broadcast for each
    # chunk would hang where ranks have different numbers of chunks.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    warnings.filterwarnings("ignore", message=".gradient_checkpointing(_kwargs)?. is deprecated.*")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated.*")
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.* is deprecated.*")
