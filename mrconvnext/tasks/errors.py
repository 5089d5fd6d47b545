"""The error of data that is not there or not as published."""

from pathlib import Path


class DataError(ValueError):
    """A data set is missing or damaged; the message says in one line where, what was expected and how to get it."""


def missing(path: Path, title: str, remedy: str) -> DataError:
    """Returns the error of a file or folder that isn't there.

    Args:
        path: Where it was looked for.
        title: What data set it is of.
        remedy: How to get that.
    """
    return DataError(f"{path} is missing, a part of {title}; {remedy}")


def damaged(path: Path, problem: object, remedy: str) -> DataError:
    """Returns the error of a file that is not what it should be."""
    said = " ".join(str(problem).split()) or "it ends too soon"  # as an EOFError says by its name alone
    return DataError(f"{path} is damaged ({said}); {remedy}")
