"""Errors that the user can put right."""


class UserError(ValueError):
    """Something the user can put right: a flag, a path, a row of data. The message says what was found and wanted."""


class RankError(UserError):
    """A `UserError` that only this rank meets, so this rank prints it."""
