"""Errors that the user can put right, and the messages of other errors in one line."""


class UserError(ValueError):
    """Something the user can put right: a flag, a path, a row of data. The message says what was found and wanted."""


class RankError(UserError):
    """A `UserError` that only this rank meets, so this rank prints it."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
