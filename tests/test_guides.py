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
from engram.plan import from_args, plan
from train_phi_engram import parse

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("README.md", "DOCUMENTACION_TECNICA.md")
RESULTS = "tests/study/RESULTADOS.md"


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


@pytest.mark.parametrize("guide", [*GUIDES, RESULTS])
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


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(document: Path) -> list[str]:
    """The addresses that GitHub gives to a document's headings (a second one of the same name would get another)."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("guide", [*GUIDES, RESULTS])
def test_links_lead_somewhere(guide):
    document = ROOT / guide
    assert len(set(anchors(document))) == len(anchors(document)), "two headings with the same address"
    links = re.findall(r"\]\((?!http)([^)]+)\)", prose(document))
    assert links
    for target in links:
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("guide", [*GUIDES, RESULTS])
def test_files_named_in_a_guide_exist(guide):
    text = (ROOT / guide).read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+\.(?:py|md|txt))`", text):
        if name not in ("engram_demo_v1.py", "bench_training.py"):  # DeepSeek's, and one that has moved
            assert any((ROOT / place / name).exists() for place in ("", "tests", "tests/study")), name
    for name in re.findall(r"\b(?:engram|tests)/[\w/]+\.(?:py|jsonl)\b", text):
        assert (ROOT / name).exists() or name == "tests/bench_engram.py", name


def test_the_roadmap_stays_where_others_link_to():
    assert "7-próximos-pasos-técnicos-y-hoja-de-ruta" in anchors(ROOT / "DOCUMENTACION_TECNICA.md")


def test_every_room_is_on_the_map():
    """Section 1 of the technical guide names the rooms of engram/, all of them and no other."""
    text = (ROOT / "DOCUMENTACION_TECNICA.md").read_text(encoding="utf-8")
    table = re.search(r"^\| piso \|.*?\n\n", text, re.S | re.M)[0]
    rooms = {path.stem for path in (ROOT / "engram").glob("[!_]*.py")}
    assert set(re.findall(r"`(\w+)`", table)) == rooms


def test_the_command_for_kaggle_is_what_the_plan_proposes():
    command = re.search(r"^ *!(accelerate launch .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[1]
    assert command in plan(*from_args(parse(["--plan", "kaggle"])))
