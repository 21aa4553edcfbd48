"""Regular expressions from files, matched within a limit of time.

They run in the ``regex`` library, which transformers needs too. Unlike ``re`` it can give up, so nested quantifiers do
not hang a process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from jaxdeploy.errors import CheckpointError

SECONDS = 2.0
"""For all matches of a field together; a thousand modules with usual patterns take milliseconds."""

_LONGEST = 1000
_MOST = 10_000


class StoredPatterns:
    """The regular expressions of one ``field`` of a file.

    Raises:
        CheckpointError: there are too many, or one is too long or not a regular expression.
    """

    def __init__(self, patterns: Sequence[str], field: str) -> None:
        import regex

        self._field = field
        self._left = SECONDS
        if len(patterns) > _MOST or any(len(pattern) > _LONGEST for pattern in patterns):
            raise CheckpointError(
                f"{field} may have {_MOST} regular expressions of {_LONGEST} characters at most; shorten it"
            )
        try:
            self._compiled = [regex.compile(pattern) for pattern in patterns]
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{field} holds what is not a regular expression ({error}); correct it") from error

    def first(self, text: str) -> int | None:
        """Return the index of the first expression that matches the beginning of ``text``.

        Raises:
            CheckpointError: matching takes too long.
        """
        start = time.monotonic()
        try:
            for index, compiled in enumerate(self._compiled):
                if compiled.match(text, timeout=self._left):
                    return index
                if time.monotonic() - start > self._left:
                    raise TimeoutError
            return None
        except TimeoutError as error:
            raise CheckpointError(
                f"{self._field} takes more than {SECONDS:g} s to match; simplify its regular expressions"
            ) from error
        finally:
            self._left = max(self._left - (time.monotonic() - start), 1e-3)
