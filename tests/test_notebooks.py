"""cuadernos/: their cells run in order on a small model, offline; what only Colab and Kaggle have is replaced."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import helpers
from engram.plan import from_args, plan
from engram.trial import tokenizer_on_the_spot
from train_phi_engram import parse

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "cuadernos").glob("*.ipynb"))
ACCOUNT = "tu-usuario/Phi-1_engram"
# What a cell with this tag becomes here.
REPLACED = {
    "clonar": "%cd Phi-1_engram",
    "drive": "# aquí no hay Drive",
    "secretos": "# aquí no hay secretos",
}
# What a piece of any cell becomes.
CHANGED = {
    "load_phi_engram.py": "load_phi_engram.py --modelo phi --filas 500",  # Phi-1 in miniature, not the Hub's
    "/tmp/phi1-engram": "../phi1-engram",
    'datos = "engram"': 'datos = "phi1_engram.py"',  # less text
}
# What is typed in the cells tagged «escribir», one after the other; none: as where a notebook is run whole.
TYPED = {
    "colab": [["def area(radius):", "", "salir"], ["aprende La capital de Zubrowka es => Lutz", "recuerdos", "salir"]],
    "kaggle": [None, ["aprende La capital de Zubrowka es => Lutz", "recuerdos", "salir"]],
}
BEFORE = """
import builtins

shell = get_ipython()
run_command = shell.system


def checked(command):
    run_command(command)
    assert not shell.user_ns["_exit_code"], command


shell.system = checked
"""


def cells(path: Path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell) -> str:
    return "".join(cell["source"])


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["colab", "kaggle"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path):
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell["metadata"].get("tags", [])) <= {*REPLACED, "escribir"}


def test_one_command_puts_the_account_everywhere(tmp_path):
    """The README's; after it the placeholder of this repository stands nowhere."""
    texts = (".py", ".md", ".ipynb", ".txt")
    copies = [name for name in tracked() if name.suffix in texts and name.parts[0] != "tests"]
    for name in copies:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    command = re.search(r"`(sed -i .*?)`", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    changed = {str(name) for name in copies if (tmp_path / name).read_bytes() != (ROOT / name).read_bytes()}
    assert changed == {"README.md", "cuadernos/colab.ipynb", "cuadernos/kaggle.ipynb"}
    for name in copies:
        assert ACCOUNT not in (tmp_path / name).read_text(encoding="utf-8"), name
    badges = re.findall(r"\((https://\S+ipynb)\)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    assert len(badges) == 2 and all("/MI_CUENTA/Phi-1_engram/blob/main/cuadernos/" in badge for badge in badges)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_train_with_what_the_plan_proposes(path):
    commands = [line.removeprefix("!") for cell in cells(path) for line in source(cell).splitlines()]
    (training,) = [line for line in commands if re.search(r"train_phi_engram\.py --(lote|modelo)", line)]
    assert training.removesuffix(' --datos "{datos}"') in plan(*from_args(parse(["--plan", path.stem])))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path, monkeypatch, capsys):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    for name in tracked():
        if name.parts[0] == "engram" or name.name.endswith("phi_engram.py") or name.name == "phi1_engram.py":
            (tmp_path / "Phi-1_engram" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "Phi-1_engram" / name)
    tokenizer = tokenizer_on_the_spot()
    shape = dict(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512)  # wide enough to be told a fact
    helpers.save_phi(tmp_path / "Phi-1_engram" / "phi", tokenizer, **shape)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(*(("COLAB_RELEASE_TAG", "1") if path.stem == "colab" else ("KAGGLE_KERNEL_RUN_TYPE", "Batch")))
    notebook = nbformat.read(path, 4)
    typed, replaced = list(TYPED[path.stem]), []
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            replaced.append(f"{tag}: {cell.source.splitlines()[0]}")
            if tag in REPLACED:
                cell.source = REPLACED[tag]
            elif lines := typed.pop(0):
                cell.source = f"builtins.input = lambda prompt, lines=iter({lines!r}): next(lines)\n{cell.source}"
        for piece, other in CHANGED.items():
            if piece in cell.source and cell.cell_type == "code":
                replaced.append(f"{piece} -> {other}")
                cell.source = cell.source.replace(piece, other)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    with capsys.disabled():
        print(f"\n{path.name}, sustituido: " + "; ".join(dict.fromkeys(replaced)))
    said = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    said = [(cell.source, text) for cell, text in zip(notebook.cells, said)]

    def of(words):
        return next(text for cell, text in said if words in cell)

    assert "✅" in of("verify_phi_engram.py") and "❌" not in of("verify_phi_engram.py")
    assert "✅ Injerto exacto" in of("load_phi_engram.py")
    assert "¡Hasta luego!" in of("open_for_chat") and "1  La capital de Zubrowka es => Lutz" in of("kept_in")
    assert "✅ Guardado en phi1-engram-trained/" in of("--acumular")
    assert "phi1-engram-trained:" in [text for cell, text in said if "--pregunta" in cell][1]
    looked = next(cell for cell in notebook.cells if "display(Markdown" in cell.source).outputs
    kinds = [kind for output in looked for kind in output["data"] if kind in ("text/markdown", "image/png")]
    assert kinds == ["text/markdown"] + ["image/png"] * 5
    assert "En pocas palabras" in looked[0]["data"]["text/markdown"]
