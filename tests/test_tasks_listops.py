"""The generator of ListOps: its distribution, its values by another method, and that it is repeatable."""

import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mrconvnext.tasks import __main__ as command
from mrconvnext.tasks import listops

SIZES = {"train": 600, "validation": 30, "test": 20}


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, int]]:
    return [example for block in range(3) for example in listops.examples(7, block)]


def tokens(text: str) -> list[str]:
    """Returns the tokens that count for the length."""
    return [token for token in text.split() if token not in "()"]


def evaluate(text: str) -> int:
    """Returns the value of an expression by a stack of its open operations, without looking at round brackets."""
    stack: list[list] = [[]]
    for token in tokens(text):
        if token.startswith("["):
            stack.append([token[1:]])
        elif token == "]":
            operator, *values = stack.pop()
            stack[-1].append(
                {
                    "MIN": min,
                    "MAX": max,
                    "MED": lambda values: int(statistics.median(values)),
                    "SM": lambda values: sum(values) % 10,
                }[operator](values)
            )
        else:
            stack[-1].append(int(token))
    (result,) = stack.pop()
    assert not stack and isinstance(result, int)
    return result


def nodes(text: str) -> list[tuple[str, int, int]]:
    """Returns the operator, the number of arguments and the depth of each operation."""
    open_nodes: list[list] = []
    found = []
    for token in tokens(text):
        if token == "]":
            operator, count = open_nodes.pop()
            found.append((operator, count, len(open_nodes) + 1))
        if token.startswith("["):
            open_nodes.append([token[1:], 0])
        if open_nodes and not token.startswith("["):
            open_nodes[-1][1] += 1
    return [(operator, count, depth) for operator, count, depth in found]


def test_values_are_those_of_the_text(examples):
    for text, value in examples:
        assert evaluate(text) == value, text


def test_median_is_truncated_and_sum_modulo_10():
    assert evaluate("( ( ( [MED 3 ) 4 ) ] )") == 3
    assert evaluate("( ( ( [SM 7 ) 5 ) ] )") == 2


def test_round_brackets_pair_operator_and_arguments(examples):
    """The published form: an operation of n arguments is n + 1 nested pairs, the last one closed after "]"."""

    def paired(words: list[str], start: int) -> tuple[int, list[int]]:
        """Returns where the part that begins at `start` ends, and the arguments of each operation in it."""
        if words[start] != "(":
            return start + 1, []
        middle, left = paired(words, start + 1)
        end, right = paired(words, middle)
        assert words[end] == ")"
        return end + 1, left + right

    text = "( ( ( [MAX 3 ) ( ( ( [SM 4 ) 5 ) ] ) ) ] )"
    assert paired(text.split(), 0)[0] == len(text.split())
    for text, _ in examples[:50]:
        words = text.split()
        assert paired(words, 0)[0] == len(words)
        arguments = sum(count for _, count, _ in nodes(text))
        operations = sum(word == "]" for word in words)
        assert words.count("(") == words.count(")") == arguments + operations


def test_lengths_are_between_500_and_2000(examples):
    lengths = [len(tokens(text)) for text, _ in examples]
    assert 500 < min(lengths) < 520 and 1900 < max(lengths) < 2000
    assert 980 < statistics.mean(lengths) < 1090


def test_nodes_follow_the_distribution(examples):
    found = [node for text, _ in examples for node in nodes(text)]
    operators = Counter(operator for operator, _, _ in found)
    counts = Counter(count for _, count, _ in found)
    for operator in listops.OPERATORS:
        assert operators[operator] / len(found) == pytest.approx(1 / 4, abs=0.01)
    # Expressions that are long enough have a few more arguments than those that are drawn: not quite 1 / 9 each.
    assert set(counts) == set(range(2, 11))
    assert all(0.08 < count / len(found) < 0.14 for count in counts.values())
    assert max(depth for _, _, depth in found) == listops.DEPTH - 1
    inner = [(count, depth) for _, count, depth in found if depth < listops.DEPTH - 1]
    children = sum(count for count, _ in inner)
    operations = sum(depth > 1 for _, _, depth in found)
    assert operations / children == pytest.approx(1 - listops.LEAF_PROBABILITY, abs=0.02)


def test_all_values_are_there(examples):
    shares = Counter(value for _, value in examples)
    assert set(shares) == set(range(10)) and min(shares.values()) > 0.02 * len(examples)


def test_expressions_that_were_there_are_left_out():
    assert list(listops._distinct([("a", 1), ("b", 2), ("a", 1), ("c", 3)])) == [("a", 1), ("b", 2), ("c", 3)]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_processes(tmp_path):
    listops.generate(tmp_path / "a", SIZES, seed=1, processes=1)
    listops.generate(tmp_path / "b", SIZES, seed=1, processes=3)
    listops.generate(tmp_path / "c", SIZES, seed=2, processes=1)
    files = written(tmp_path / "a")
    assert list(files) == ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
    assert files == written(tmp_path / "b")
    assert all(files[name] != other for name, other in written(tmp_path / "c").items())
    lines = [content.decode().splitlines() for content in files.values()]
    assert [len(own) for own in lines] == [21, 601, 31] and {own[0] for own in lines} == {"Source\tTarget"}
    assert len({line for own in lines for line in own}) == 651


def test_files_are_whole_or_not_there(tmp_path):
    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        raise Stop

    (tmp_path / "basic_val.tsv").write_text("before")
    with pytest.raises(Stop):
        listops.generate(tmp_path, SIZES, progress=stop)
    assert written(tmp_path) == {"basic_val.tsv": b"before"}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sizes={"train": 1}), "there must be at least 1 for each of train"),
        (dict(sizes={**SIZES, "test": 0}), "there must be at least 1 for each of train"),
        (dict(sizes=SIZES, seed=-1), "seed must be at least 0, got -1"),
        (dict(sizes=SIZES, processes=0), "processes must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        listops.generate(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_command_writes_files(tmp_path, caplog):
    sizes = ["--train", "20", "--validation", "5", "--test", "5", "--processes", "1"]
    assert command.main(["listops", str(tmp_path / "data"), *sizes]) == 0
    listops.generate(tmp_path / "same", {"train": 20, "validation": 5, "test": 5})
    assert written(tmp_path / "data") == written(tmp_path / "same")


def test_command_tells_errors_in_one_line(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert command.main(["listops", str(tmp_path / "file"), "--processes", "1"]) == 2
    assert command.main(["listops", str(tmp_path / "data"), "--train", "0"]) == 2
    assert [record.getMessage().count("\n") for record in caplog.records] == [0, 0]


@pytest.mark.slow
def test_a_generator_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mrconvnext.tasks", "listops", str(tmp_path / "data"), "--processes", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("data/.writing-*")):
            time.sleep(0.05)
        time.sleep(3)  # its processes are at work
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
        assert "interrupted, nothing was written" in process.stderr.read()
    assert not list((tmp_path / "data").iterdir())
