"""Errors that a user can cause, each with the exit code of the process that it ends.

All are ``ValueError``s with a message of one line: what was expected, what came, and what to do.  The command line
prints that line without a traceback.  Any other exception is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """A user's mistake.  ``exit_code`` follows sysexits.h, so that a scheduler knows what not to requeue.

    topic: identifies an error that several ranks report in different words and a user needs only once, such as
    unreadable images or data that does not arrive.
    """

    exit_code = 64

    def __init__(self, message: str, topic: str = "") -> None:
        super().__init__(message)
        self.topic = topic


class ConfigError(UserError):
    """A flag, a recipe, or a combination of them that cannot work."""

    exit_code = 64


class DataError(UserError):
    """Input that exists but cannot be used: damaged, not trusted, too small, or of the wrong kind."""

    exit_code = 65


class MissingInput(UserError):
    """A file or folder that does not exist."""

    exit_code = 66


class RanksError(UserError):
    """A rank that did not come, does not answer, left the others waiting, or has different weights.

    A new start may succeed.
    """

    exit_code = 70


class DeviceError(UserError):
    """A GPU that failed or was lost.  Too little GPU memory is a ConfigError instead.

    A new start, perhaps on another node, may succeed.
    """

    exit_code = 71


class StorageError(UserError):
    """A checkpoint, log or result that cannot be written, or data that a disk or mount did not deliver in time."""

    exit_code = 74


class NonFiniteError(UserError):
    """The loss or a gradient is not a finite number."""

    exit_code = 76


class CollapseError(UserError):
    """Features or embeddings collapsed and --health.on-collapse is stop."""

    exit_code = 77
