"""The rooms of the house stand one above the other: no file imports from a floor above its own, none imports itself by way of others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import sbtiny

ROOT = Path(sbtiny.__file__).parent
FLOORS = (  # from the person down to the idea; a room, or a file of the root
    {"cli"},
    {"bench"},
    {"serving"},
    {"pipeline"},
    {"export"},
    {"evaluation"},
    {"coldstart", "grpo"},
    {"planning"},
    {"training"},
    {"rollout"},
    {"models"},
    {"tasks"},
    {"distributed"},
    {"runs"},
    {"load_settings"},
    {"config", "locks"},
    {"budget"},
    {"progress"},
    {"errors", "disk"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def name_of(file: Path) -> str:
    return ".".join(("sbtiny", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


FILES = {name_of(file): file for file in ROOT.rglob("*.py")}


def imports_of(name: str) -> Iterator[str]:
    """The files of the package that a file imports, lazily and for types too."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sbtiny":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in FILES else node.module


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_arrows_go_down() -> None:
    known = {name for name in FILES if room_of(name) not in ("", "__main__")}
    assert {room_of(name) for name in known} == LEVEL.keys()
    up = [
        f"{name} -> {other}" for name in sorted(known) for other in imports_of(name) if LEVEL.get(room_of(other), 99) < LEVEL[room_of(name)]
    ]
    assert up == []


def test_rooms_of_a_floor_do_not_touch() -> None:
    across = [
        f"{name} -> {other}"
        for name in sorted(FILES)
        for other in imports_of(name)
        if room_of(other) != room_of(name) and room_of(name) in LEVEL and LEVEL.get(room_of(other)) == LEVEL[room_of(name)]
    ]
    assert across == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    front_door = {"", "sbtiny"}  # it imports what it loads when it is called
    arrows = {name: {name.rpartition(".")[0], *imports_of(name)} - {name} - front_door for name in FILES}  # its package comes with a file
    open_, done = [], set()

    def walk(name: str) -> None:
        if name in open_:
            raise AssertionError(" -> ".join([*open_[open_.index(name) :], name]))
        if name in done:
            return
        open_.append(name)
        for other in sorted(arrows.get(name, ())):
            walk(other)
        done.add(open_.pop())

    for name in sorted(arrows):
        walk(name)


def test_files_and_functions_are_of_a_size_to_read() -> None:
    lines = {name: file.read_text(encoding="utf-8").count("\n") for name, file in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 300} == {}
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1}"
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []
