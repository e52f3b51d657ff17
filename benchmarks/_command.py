"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import _common

HERE = pathlib.Path(__file__).resolve().parent


def parser(
    script: str, doc: str, settings: type | None = None, *, small: str, peer: str | None = None
) -> argparse.ArgumentParser:
    """The options of all scripts, and one for each number among the settings.

    Args:
        script: name of the script, and of its report.
        doc: its docstring.
        settings: a dataclass; an option that is not given is None.
        small: what ``--small`` means.
        peer: what the peer's environment must have; None where there is no peer.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--small", action="store_true", help=small)
    made.add_argument("--out", type=pathlib.Path, default=HERE / "out" / f"{script}.json")
    made.add_argument(
        "--force", action="store_true", help="report on a busy machine too, marked as loaded"
    )
    if peer:
        made.add_argument(
            "--peer-python",
            type=pathlib.Path,
            default=HERE.parent / ".venv-peer" / "bin" / "python",
            help=f"interpreter of an environment with {peer}",
        )
    hints = typing.get_type_hints(settings) if settings else {}
    for name, hint in hints.items():
        kind, *_ = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if kind in (int, float):
            made.add_argument(f"--{name.replace('_', '-')}", type=kind)
    return made


def chosen(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """What the command line says of the settings."""
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(settings)}
    return {name: value for name, value in given.items() if value is not None}


def finish(
    measure: Callable[[], dict[str, Any]],
    out: pathlib.Path,
    table: Callable[[dict[str, Any]], str] = _common.table,
) -> dict[str, Any]:
    """Measure, print and write the report; or exit with the reason why there is none."""
    try:
        report = measure()
    except (_common.LoadedError, _common.DisagreementError, FileNotFoundError) as error:
        sys.exit(f"not reporting: {error}")
    print(table(report))
    _common.write(report, out)
    print(f"written to {out}")
    return report
