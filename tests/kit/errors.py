"""Errors for users: one line that says what was expected and what came."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_one_line(kind: type[BaseException], *words: str) -> Generator[pytest.ExceptionInfo[BaseException]]:
    """``with raises_one_line(ConfigError, "--flag", "8"):`` expects this error, in one line that holds these words."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for word in words:
        assert word in message, message
