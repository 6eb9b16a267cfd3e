"""The house: scripts stand on the rooms of engram/, rooms on each other without circles, the model on none of them."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL, SCRIPTS = "phi1_engram", {f"{verb}_phi_engram" for verb in ("verify", "load", "train", "chat")}
ROOMS = {f"engram.{path.stem}": path for path in (ROOT / "engram").glob("[!_]*.py")}


def imports(path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_top_is_the_card_and_nothing_more():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    papers = {"README.md", "DOCUMENTACION_TECNICA.md", "LICENSE", "requirements.txt"}
    allowed = papers | {f"{name}.py" for name in (MODEL, *SCRIPTS)} | {"engram", "tests", "cuadernos"}
    assert {name for name in top if name[0] != "."} <= allowed


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_that_is_run_says_that_it_is_none_to_run(room):
    done = subprocess.run([sys.executable, ROOMS[room]], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("Esta pieza no se ejecuta.") and not done.stdout


def test_the_model_that_is_run_says_so_too():
    done = subprocess.run([sys.executable, ROOT / f"{MODEL}.py"], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 1 and "Este archivo es el modelo y no se ejecuta." in done.stderr


def test_arrows_go_one_way():
    assert len(ROOMS) > 10
    assert not imports(ROOT / f"{MODEL}.py") & {"engram", *ROOMS, *SCRIPTS}
    for path in (*ROOMS.values(), *(ROOT / f"{name}.py" for name in SCRIPTS)):
        assert not imports(path) & SCRIPTS, f"{path.name} imports a script"
    graph = {room: imports(path) & ROOMS.keys() for room, path in ROOMS.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError
