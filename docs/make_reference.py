"""Write docs/reference.md: every public name, its signature and what it does.

python docs/make_reference.py
"""

from __future__ import annotations

import importlib
import inspect
import pathlib

ROOMS = (
    "jrobust", "jrobust.threat", "jrobust.losses", "jrobust.keys", "jrobust.attacks",
    "jrobust.training", "jrobust.smoothing", "jrobust.statistics", "jrobust.zeroth_order",
    "jrobust.weights", "jrobust.ensembles", "jrobust.models", "jrobust.data",
    "jrobust.data.corruptions", "jrobust.loops", "jrobust.parallel", "jrobust.drive",
    "jrobust.checkpoint", "jrobust.debug", "jrobust.report",
)  # fmt: skip


def public(room) -> list[str]:
    """What a room offers: its ``__all__``, else its own functions and classes."""
    if hasattr(room, "__all__"):
        names = [name for name in room.__all__ if not inspect.ismodule(getattr(room, name))]
    else:
        names = [
            name
            for name, value in vars(room).items()
            if not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == room.__name__
        ]
    return sorted(names)


def reference() -> str:
    """The page as Markdown."""
    lines = ["# Reference", "", "Made by `python docs/make_reference.py`; see also `help(name)`."]
    lines.append("")
    for room_name in ROOMS:
        room = importlib.import_module(room_name)
        lines += [f"## {room_name}", "", (room.__doc__ or "").strip().splitlines()[0], ""]
        for name in public(room):
            value = getattr(room, name)
            first = (inspect.getdoc(value) or "").strip().split("\n\n")[0].replace("\n", " ")
            lines.append(f"* `{name}`: {first}" if callable(value) else f"* `{name} = {value!r}`")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "reference.md"
    path.write_text(reference())
    print(path)
