"""The errors that a user can cause, each with the exit code that it ends a process with.

All are ``ValueError``s whose message is one line: what was expected, what came, what to do.  The command
line prints that line without a traceback; anything else is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """A user's mistake.  ``exit_code`` follows sysexits.h, so that a scheduler can tell what not to requeue.

    topic: what several ranks say each in other words, of which a user needs only the first, as of unreadable images or
    of data that does not come.
    """

    exit_code = 64

    def __init__(self, message: str, topic: str = "") -> None:
        super().__init__(message)
        self.topic = topic


class ConfigError(UserError):
    """A flag, a recipe or a combination of them that cannot work."""

    exit_code = 64


class DataError(UserError):
    """Input that is there but cannot be used: damaged, untrusted, too small, of the wrong kind."""

    exit_code = 65


class MissingInput(UserError):
    """A file or folder that is not there."""

    exit_code = 66


class RanksError(UserError):
    """A rank that did not come, does not answer or left the others waiting, or whose weights are no longer theirs.

    A new start may go better.
    """

    exit_code = 70


class DeviceError(UserError):
    """A GPU that failed or was lost; too little of its memory is no failure but a ConfigError's code.

    A new start, maybe on another node, may go better.
    """

    exit_code = 71


class StorageError(UserError):
    """A checkpoint, log or result that could not be written, or data that a disk or mount did not bring in time."""

    exit_code = 74


class NonFiniteError(UserError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = 76


class CollapseError(UserError):
    """The features or the embeddings of all images have become alike, and the run was to stop then."""

    exit_code = 77
