"""The guides: every Python block runs as it stands, in order; every command, link and file that they name exists."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helpers
from engram.opening import add_memory_options

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("README.md", "DOCUMENTACION_TECNICA.md")


def blocks(guide, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", (ROOT / guide).read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture(scope="module")
def published(tokenizer):
    """What a user would have on the Hub as tu-usuario/phi1-engram: a small model, in the Hub's cache."""
    model = helpers.make_model(vocab_size=51200, tokenizer=tokenizer)
    store = Path(os.environ["HF_HUB_CACHE"]) / "models--tu-usuario--phi1-engram"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0" * 40)
    model.save_pretrained(store / "snapshots" / ("0" * 40))
    tokenizer.save_pretrained(store / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("guide", GUIDES)
def test_python_blocks_run_in_order(guide, published, tmp_path):
    code = "\n".join(blocks(guide, "python"))
    assert code.count("\n") > 20
    script = tmp_path / "guia.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    if guide == "README.md":
        assert re.search(r"¡Éxito! .*torch\.Size\(\[1, \d+, 51200\]\)", done.stdout)
        assert re.search(r"\{1: \(1, \d+, 16\)\}", done.stdout)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_flag_named_in_a_guide_exists(guide):
    text = (ROOT / guide).read_text(encoding="utf-8")
    for script in ("verify", "load", "train", "chat"):
        named = set()
        for line in re.findall(rf"python {script}_phi_engram\.py([^`\n]*)", text):
            named |= set(re.findall(r"--[\w-]+", line))
        source = (ROOT / f"{script}_phi_engram.py").read_text(encoding="utf-8")
        if "add_memory_options(parser)" in source:
            source += inspect.getsource(add_memory_options)
        for flag in named - {"--help"}:
            assert f'"{flag}"' in source, (script, flag)


def test_links_and_files_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    technical = (ROOT / "DOCUMENTACION_TECNICA.md").read_text(encoding="utf-8")

    def anchors(document):
        titles = re.findall(r"^#+ (.*)$", document, re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        if anchor:
            assert anchor in anchors(technical if path else text), target
    for name in re.findall(r"`(\w+\.(?:py|md|txt))`", text):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    # The roadmap's address is linked from elsewhere, too.
    assert "7-próximos-pasos-técnicos-y-hoja-de-ruta" in anchors(technical)
