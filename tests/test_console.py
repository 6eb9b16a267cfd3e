"""What scripts say on other ends than a terminal, and folders that cannot be locked."""

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

import engram.folders as folders
from engram.console import Progress, counted, decimal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("notebook", [None, "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"])
def test_a_bar_prints_lines_where_lines_stay(monkeypatch, notebook):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO() if notebook is None else Terminal())
    if notebook:
        monkeypatch.setenv(notebook, "1")
    bar = Progress(range(2000), desc="Midiendo")
    for _ in bar:
        bar.set_postfix_str("pérdida 2,1", refresh=False)
    seen = sys.stderr.getvalue()
    if notebook == "COLAB_RELEASE_TAG":  # its commands have a terminal that redraws
        assert "\r" in seen
    else:
        lines = seen.splitlines()
        assert "\r" not in seen and len(lines) == 2  # at the beginning and at the end
        assert "2000/2000" in lines[-1] and "pérdida 2,1" in lines[-1] and "Midiendo" in lines[0]


@pytest.mark.parametrize("arguments", [["--help"], ["--plan", "t4"]])
def test_a_reader_that_has_had_enough_sees_no_traceback(arguments):
    """`python train_phi_engram.py --help | head`."""
    script = Path(folders.__file__).parents[1] / "train_phi_engram.py"
    process = subprocess.Popen(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert err == "" and process.returncode in (0, 141)


def test_decimals_the_spanish_way():
    assert decimal("0,5") == decimal("0.5") == 0.5
    assert counted(1, "token") == "1 token" and counted(2000, "token") == "2.000 tokens"


def test_a_folder_without_locks_is_held_and_it_is_said_once(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", no_locks)
    with folders.hold(tmp_path) as alone:
        assert alone
    assert capsys.readouterr().out.count("no admite bloqueos") == 1
    monkeypatch.undo()
    with folders.hold(tmp_path) as first, folders.hold(tmp_path) as second:
        assert first and not second


@pytest.mark.parametrize("verb", ["verify", "load", "train", "chat"])
def test_an_interruption_while_libraries_are_imported_is_no_traceback(verb):
    script = Path(__file__).resolve().parents[1] / f"{verb}_phi_engram.py"
    interrupted = (
        "import runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", interrupted], capture_output=True, encoding="utf-8", cwd=script.parent
    )  # fmt: skip
    assert done.returncode == 130 and not done.stdout + done.stderr
