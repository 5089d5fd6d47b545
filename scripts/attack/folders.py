"""Folders of finished runs that are damaged before these are resumed."""

import contextlib
import io
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from runs import main

from .kills import difference, prepare


def changed(content: bytes, choose: random.Random) -> bytes:
    """Returns bytes with one bit changed."""
    if not content:
        return content
    own = bytearray(content)
    own[choose.randrange(len(own))] ^= 1 << choose.randrange(8)
    return bytes(own)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, choose: b"",
    "cut": lambda content, choose: content[: choose.randrange(len(content))] if content else b"",
    "a bit changed": changed,
    "zeros at the end": lambda content, choose: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "of another kind": lambda content, choose: choose.choice([b"{}", b"[]", b"null", b"\xff\xfe\x00", b"a: [", b"1\n"]),
    "longer": lambda content, choose: content + b"\x00garbage",
}


def damaged(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Damages so many folders and resumes their runs; returns what ends otherwise than it may."""
    setting = prepare(folder)
    findings, outcomes = [], Counter[str]()
    for _ in range(count):
        run = folder / "damaged"
        shutil.copytree(setting.whole, run)
        file = choose.choice(sorted(path for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name))
        kind = choose.choice(sorted(DAMAGES))
        file.write_bytes(DAMAGES[kind](file.read_bytes(), choose))
        outcome = resumed(setting.arguments(run))
        if outcome == "ended" and (found := difference(setting.whole, run)):
            outcome = f"ended with a difference: {found}"
        outcomes[outcome.partition(":")[0]] += 1
        if outcome not in ("ended", "refused in one line"):
            findings.append(f"{file.relative_to(run)} {kind}: {outcome}")
        shutil.rmtree(run)
    print(f"{count} damaged folders: {dict(outcomes)}", flush=True)
    return findings


def resumed(arguments: list) -> str:
    """Returns how a run ends in this process."""
    out, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = main(*arguments)
    except (Exception, SystemExit) as found:
        return f"a traceback: {type(found).__name__}: {found}"
    finally:
        logging.getLogger().handlers.clear()
    if status == 0:
        return "ended"
    lines = error.getvalue().splitlines()
    return "refused in one line" if len(lines) == 1 else f"refused in {len(lines)} lines: {lines[:1]}"
