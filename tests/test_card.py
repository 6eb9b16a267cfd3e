"""The command for whoever has a card: its small form holds here, and each thing that breaks is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import phi1_engram
from bench import card, parts

SCRIPT = Path(card.__file__)


def checks(path) -> dict[str, bool]:
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))["comprobaciones"])


@pytest.fixture
def broken(tmp_path):
    """broken(function): what does not hold when that part runs here, in small."""

    def run(function):
        parts.inside(function, tmp_path / "parte.json", True)
        return [text for text, good in checks(tmp_path / "parte.json").items() if not good]

    return run


def test_the_small_form_of_everything(tmp_path):
    output = tmp_path / "resultado.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--chico", "--salida", str(output)], cwd=tmp_path, capture_output=True,
        encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✅ Se cumple todo lo comprobado en la CPU" in done.stdout
    found = json.loads(output.read_text(encoding="utf-8"))["partes"]
    assert list(found) == list(card.PARTS)
    for part in found.values():
        assert part["comprobaciones"] and all(good for _, good in part["comprobaciones"])
        assert part["maquina"]["versiones"]["torch"] == torch.__version__ and part["segundos"] > 0
    assert found["velocidad"]["medidas"]["sin compilar"]["decodificar, lote 1"]["ram"]["ratio"] > 0
    assert found["entrenar"]["medidas"]["fase 2"]["orden"].startswith("python train_phi_engram.py --lote")
    assert list(tmp_path.iterdir()) == [output]


def test_rows_that_come_from_disk_otherwise_are_noticed(broken, monkeypatch):
    monkeypatch.setattr(card.verify_phi_engram, "main", lambda _: 0)
    read = phi1_engram.TableFile.read
    monkeypatch.setattr(phi1_engram.TableFile, "read", lambda self, row_ids: read(self, row_ids // 2))
    told = broken(card.places)
    assert len(told) == 8 and all("en disco" in text and "otros logits" in text for text in told)


def test_a_big_table_that_gives_other_rows_is_noticed(broken, monkeypatch):
    forward = phi1_engram.EngramTable.forward
    monkeypatch.setattr(phi1_engram.EngramTable, "forward", lambda self, row_ids: forward(self, row_ids % 2**16))
    told = broken(card.big_table)
    assert len(told) == 2 and all("se leen las filas que son" in text for text in told)


def test_a_backbone_that_is_not_phi_is_noticed(broken, monkeypatch):
    monkeypatch.setattr(phi1_engram, "gelu_new", lambda x: torch.nn.functional.gelu(x))
    assert broken(card.speeds) == ["con la memoria apagada, los logits de Phi bit a bit"]


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "se agotó la memoria (CUDA out of memory. Tried)"),
        (ValueError("no\nway"), "error inesperado (ValueError: no)"),
        (card.UserError("No cabe."), "No cabe."),
    ],
)
def test_a_part_that_dies_says_why_and_keeps_what_it_had(tmp_path, error, told):
    def function(part):
        part.measure("algo", 7)
        raise error

    parts.inside(function, tmp_path / "parte.json", True)
    found = json.loads((tmp_path / "parte.json").read_text(encoding="utf-8"))
    assert found["medidas"] == {"algo": 7} and found["comprobaciones"] == [[told, False]]
    assert "Traceback" in found["traza"]


def test_a_part_that_is_killed_has_failed(tmp_path, monkeypatch, capsys):
    script = tmp_path / "muere.py"
    script.write_text(
        "import json, os, sys\n"
        "json.dump(dict(medidas=dict(antes=1), comprobaciones=[]), open(sys.argv[4], 'w'))\n"
        "os.kill(os.getpid(), 9) if sys.argv[2] == 'una' else sys.exit(3)\n"
    )
    monkeypatch.setattr(parts, "launcher", lambda: [sys.executable])
    one, other = (parts.run(str(script), name, True) for name in ("una", "otra"))
    assert one["medidas"] == {"antes": 1} and "se acabó la RAM" in one["comprobaciones"][0][0]
    assert other["comprobaciones"] == [["murió con estado 3", False]]
    fine = dict(comprobaciones=[["todo", True]], segundos=1)
    assert not parts.conclude({"una": fine, "otra": other}, ("una", "otra", "tercera"), True)
    assert parts.conclude({"una": fine}, ("una",), True)
    out = capsys.readouterr().out
    assert "❌ Falla en la CPU, que de una tarjeta no dice nada, en pequeño: otra: murió con estado 3" in out
    assert "--parte tercera" in out


def test_what_it_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(card.UserError, match="no hay ninguna tarjeta.*card.py --chico"):
            card.main([])
    for text in ("hola", "[1]", json.dumps(dict(chico=False, partes={}))):
        Path("otro.json").write_text(text)
        with pytest.raises(card.UserError, match="--salida otro.json: ahí"):
            card.main(["--chico", "--salida", "otro.json"])
        assert Path("otro.json").read_text() == text
