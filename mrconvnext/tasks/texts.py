"""The data sets of tokens, in their published form: ListOps, IMDb's reviews, and pairs of articles of the AAN.

Tokens are numbered as by S4's readers (Gu et al., 2022, arXiv 2111.00396): padding 0, unknown 1, the end of a sequence
2, then the rest.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import listops
from .errors import damaged, missing

PADDING, UNKNOWN, END = range(3)

LISTOPS_TOKENS = (*"0123456789", *(f"[{operator}" for operator in listops.OPERATORS), "]")
LISTOPS_LENGTH = 2048
_LISTOPS_REMEDY = "generate it: python -m mrconvnext.tasks listops FOLDER"

# S4's reader takes characters that are there at least so often; the rest are unknown.
TEXT_FREQUENCY = 15
TEXT_LENGTH = 4096
_TEXT_REMEDY = "get aclImdb_v1.tar.gz from https://ai.stanford.edu/~amaas/data/sentiment and unpack it there"

RETRIEVAL_LENGTH = 4000
RETRIEVAL_FILES = ("new_aan_pairs.train.tsv", "new_aan_pairs.eval.tsv", "new_aan_pairs.test.tsv")
_RETRIEVAL_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_RETRIEVAL_REMEDY = (
    "get lra_release.gz from https://github.com/google-research/long-range-arena, unpack it and name its tsv_data"
)


@dataclass(frozen=True)
class Tokens:
    """Sequences of tokens, one after the other in one array.

    Attributes:
        values: The tokens of all, below 256.
        ends: Where each sequence ends.
    """

    values: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def joined(cls, sequences: Iterable[NDArray[np.uint8]]) -> "Tokens":
        """Joins sequences without holding each as an object of its own."""
        values, ends = bytearray(), []
        for sequence in sequences:
            values += sequence.tobytes()
            ends.append(len(values))
        return cls(np.frombuffer(values, dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        start = self.ends[index - 1] if index else 0
        return self.values[start : self.ends[index]]


class Vocabulary:
    """Numbers of characters: the most frequent first, those of one frequency by their code.

    Args:
        counts: How often each character is there.
        size: The largest number of tokens, with the three that are no characters; rarer characters are unknown.
        frequency: Characters that are there less often are unknown.
    """

    def __init__(self, counts: Counter[str], size: int, frequency: int = 1) -> None:
        ordered = sorted(counts, key=lambda character: (-counts[character], character))
        self.characters = [c for c in ordered if counts[c] >= frequency][: size - END - 1]
        self._numbers = np.full(0x110000, UNKNOWN, dtype=np.uint8)
        self._numbers[[ord(c) for c in self.characters]] = np.arange(END + 1, END + 1 + len(self.characters))

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Returns the tokens of a text and the end."""
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        return np.append(self._numbers[codes], np.uint8(END))


def read_listops(folder: Path) -> list[tuple[Tokens, NDArray[np.int64]]]:
    """Returns the expressions and values of ListOps: training, validation, test.

    Round brackets are left out, "]" is a token; what is longer than 2,048 tokens with the end is cut.

    Raises:
        DataError: If a file is missing or damaged.
    """
    return [_read_listops_file(folder / name) for name in listops.FILES.values()]


def _read_listops_file(path: Path) -> tuple[Tokens, NDArray[np.int64]]:
    if not path.is_file():
        raise missing(path, "ListOps", _LISTOPS_REMEDY)
    labels: list[int] = []

    def sequences() -> Iterator[NDArray[np.uint8]]:
        with open(path, "rb") as file:
            if file.readline().split() != listops.HEADER.encode().split():
                raise damaged(path, "line 1 is not Source and Target", _LISTOPS_REMEDY)
            for number, line in enumerate(file, start=2):
                try:
                    tokens, label = _parse_listops(line)
                except (KeyError, ValueError):
                    raise damaged(path, f"line {number} is no expression and digit", _LISTOPS_REMEDY) from None
                labels.append(label)
                yield tokens

    tokens = Tokens.joined(sequences())
    if not labels:
        raise damaged(path, "it has no expressions", _LISTOPS_REMEDY)
    return tokens, np.array(labels)


_LISTOPS_NUMBERS = {token.encode(): number for number, token in enumerate(LISTOPS_TOKENS, start=END + 1)}


def _parse_listops(line: bytes) -> tuple[NDArray[np.uint8], int]:
    """Returns the tokens and the value of one line. Raises a KeyError or ValueError if it is no such line."""
    source, target = line.split(b"\t")
    numbers = [_LISTOPS_NUMBERS[token] for token in source.translate(None, b"()").split()]
    label = int(target)
    if not numbers or not 0 <= label <= 9:
        raise ValueError
    return np.array([*numbers[: LISTOPS_LENGTH - 1], END], dtype=np.uint8), label


def read_text(folder: Path, vocabulary: int) -> list[tuple[Tokens, NDArray[np.int64]]]:
    """Returns IMDb's reviews, by characters, and whether they praise (1) or not (0): training and test.

    Args:
        folder: aclImdb, or the folder that it is in.
        vocabulary: The largest number of tokens.

    Raises:
        DataError: If a folder is missing or empty, or a file is no text.
    """
    root = folder / "aclImdb" if (folder / "aclImdb").is_dir() else folder
    parts = [_review_files(root / part) for part in ("train", "test")]
    counts: Counter[str] = Counter()
    for path, _ in parts[0]:
        counts.update(_review(path))
    numbers = Vocabulary(counts, vocabulary, TEXT_FREQUENCY)
    return [
        (Tokens.joined(numbers.encode(_review(path)) for path, _ in part), np.array([label for _, label in part]))
        for part in parts
    ]


def _review_files(folder: Path) -> list[tuple[Path, int]]:
    """Returns the files of a part and their labels, in a fixed order."""
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(("neg", "pos")):
        found = sorted((folder / name).glob("*.txt"))
        if not found:
            raise missing(folder / name / "*.txt", "IMDb", _TEXT_REMEDY)
        files += [(path, label) for path in found]
    return files


def _review(path: Path) -> str:
    """Returns what the end token leaves room for of a review."""
    try:
        return path.read_text(encoding="utf-8")[: TEXT_LENGTH - 1]
    except UnicodeDecodeError as error:
        raise damaged(path, error, _TEXT_REMEDY) from error


def read_retrieval(folder: Path, vocabulary: int) -> list[tuple[Tokens, NDArray[np.int64]]]:
    """Returns pairs of articles, by characters, and whether one cites the other: training, validation, test.

    The texts of pair i are sequences 2·i and 2·i + 1.

    Args:
        folder: That of the three files `new_aan_pairs.*.tsv`.
        vocabulary: The largest number of tokens.

    Raises:
        DataError: If a file is missing or damaged.
    """
    paths = [folder / name for name in RETRIEVAL_FILES]
    for path in paths:
        if not path.is_file():
            raise missing(path, "the AAN's pairs", _RETRIEVAL_REMEDY)
    counts: Counter[str] = Counter()
    for _, *texts in _pairs(paths[0]):  # read twice rather than kept: as text they take gigabytes
        counts.update("".join(texts))
    numbers = Vocabulary(counts, vocabulary)
    return [_encode_pairs(path, numbers) for path in paths]


def _encode_pairs(path: Path, numbers: Vocabulary) -> tuple[Tokens, NDArray[np.int64]]:
    """Returns the tokens of both texts of a file's pairs, in turn, and the pairs' labels."""
    labels: list[int] = []

    def sequences() -> Iterator[NDArray[np.uint8]]:
        for label, first, second in _pairs(path):
            labels.append(label)
            yield numbers.encode(first)
            yield numbers.encode(second)

    tokens = Tokens.joined(sequences())
    if not labels:
        raise damaged(path, "it has no pairs", _RETRIEVAL_REMEDY)
    return tokens, np.array(labels)


def _pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """Gives the label and both texts of each line, cut to what the end token leaves room for."""
    limit = csv.field_size_limit(2**31 - 1)  # an article is longer than the module allows by default
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, fields in enumerate(csv.reader(file, delimiter="\t"), start=1):
                if len(fields) != 5 or fields[0] not in _RETRIEVAL_LABELS:
                    raise damaged(path, f"row {number} is not label, two numbers, two texts", _RETRIEVAL_REMEDY)
                first, second = (text[: RETRIEVAL_LENGTH - 1] for text in fields[3:])
                yield _RETRIEVAL_LABELS[fields[0]], first, second
    except (csv.Error, UnicodeDecodeError) as error:
        raise damaged(path, error, _RETRIEVAL_REMEDY) from error
    finally:
        csv.field_size_limit(limit)
