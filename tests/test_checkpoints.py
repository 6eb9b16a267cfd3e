"""Nothing lost: kills, full disks, copied and half copied checkpoints, other trainings, leftovers, trackers."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import engram.checkpoints as checkpoints
import engram.copies as copies
import engram.folders as folders
import helpers
import train_phi_engram as train
from bench import kills
from engram.console import UserError
from engram.folders import discard, sweep, whole_folder
from engram.steps import EARLIER_RECIPES, PHI_1_RECIPE, phi_1_recipe, scaled
from hub import Hub

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SHORT = ["--pasos-fase1", "4", "--pasos-fase2", "4", "--guardar-cada", "2", "--longitud", "256", "--lote", "1"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origen")
    code = kills.in_child(folder, "registro.txt", lambda: kills.make_model(folder))
    assert code == 0, (folder / "registro.txt").read_text()
    return folder


@pytest.fixture
def place(origin, tmp_path, monkeypatch):
    """A folder with modelo/ and texto/, and the one to be in."""
    for part in ("modelo", "texto"):
        shutil.copytree(origin / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def whole(origin):
    """Weights of the run that nothing interrupts."""
    assert kills.in_child(origin, "registro.txt", lambda: kills.train_here(*SHORT)) == 0
    return weights(origin)


def run(folder, *options, action=kills.train_here):
    """Status and output of a run in a process of its own."""
    log = f"registro-{len(list(folder.glob('registro-*')))}.txt"
    code = kills.in_child(folder, log, lambda: action(*SHORT, *options))
    return code, (folder / log).read_text(encoding="utf-8")


def killed(folder, *kill, options=()):
    code, _ = run(folder, *options, action=lambda *every: kills.train_here(*every, kill=kill))
    assert code == -signal.SIGKILL


def weights(folder, output=kills.OUTPUT):
    return kills.tensors_of((folder / output / helpers.DENSE_FILE).read_bytes())


# --- kills


@pytest.mark.parametrize("kill", [("tokenizar", 1), ("un paso", 7), ("comparar Phi entre fases", 2)])
def test_killed_and_resumed_gives_the_bits_of_the_uninterrupted_run(place, whole, kill):
    killed(place, *kill, 0)
    code, out = run(place, "--reanudar")
    assert code == 0, out
    assert ("empiezo desde el principio" if kill[0] == "tokenizar" else "Sigo desde la fase 1, paso 2") in out
    assert weights(place) == whole and not kills.leftovers(place)


@pytest.mark.parametrize("optimizer", helpers.installed(["adamw8bit"]))
def test_another_package_s_optimizer_resumes_to_the_same_bits(place, optimizer):
    kind = ["--optimizador", optimizer]
    killed(place, "un paso", 7, 0, options=kind)
    code, out = run(place, "--reanudar", *kind)
    assert code == 0, out
    resumed = weights(place)
    assert run(place, *kind, "--salida", "entero")[0] == 0
    assert weights(place, "entero") == resumed


def test_killed_while_saving_leaves_the_older_checkpoint_and_nothing_when_all_is_done(place, whole):
    def half_saved(*options):
        save, times = Accelerator.save_state, []

        def then_kill(accelerator, folder):
            save(accelerator, folder)
            times.append(folder)
            if len(times) == 3:
                Path(folder, "model.safetensors").write_bytes(b"")
                os.kill(os.getpid(), signal.SIGKILL)

        Accelerator.save_state = then_kill
        kills.train_here(*options)

    assert run(place, action=half_saved)[0] == -signal.SIGKILL
    folder = place / f"{kills.OUTPUT}-checkpoints"
    assert [path.name for path in folder.glob("fase*")] == ["fase-2-paso-0000000"]
    assert len(list(folder.glob(".fase-2-paso-0000002-*"))) == 1
    code, out = run(place, "--reanudar")
    assert code == 0 and "Sigo desde la fase 2, paso 0" in out
    assert weights(place) == whole and not kills.leftovers(place)
    code, out = run(place, "--reanudar")
    assert code == 1 and "ya está terminado" in out


def test_what_a_live_process_writes_is_not_swept_and_the_rest_is(tmp_path):
    pytest.importorskip("fcntl")
    for name in (".algo-0123abcd", ".otro-0123abcd", ".algo-mio", ".algo-89abcdef-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dentro").write_text(name)
    with whole_folder(tmp_path / "algo") as live:
        assert {path.name for path in tmp_path.iterdir()} == {".otro-0123abcd", ".algo-mio", "algo", live.name}
        assert (tmp_path / "algo" / "dentro").read_text() == ".algo-89abcdef-old"  # killed between two renames
        assert kills.in_child(tmp_path, os.devnull, lambda: sweep(tmp_path, "algo")) == 0
        assert live.is_dir()
    discard(tmp_path / "algo")
    discard(tmp_path / "no existe")
    sweep(tmp_path / "tampoco", ".*")
    assert {path.name for path in tmp_path.iterdir()} == {".otro-0123abcd", ".algo-mio"}


def test_stopped_between_two_renames_the_old_folder_is_still_there(tmp_path, monkeypatch):
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "dentro").write_text("viejo")
    rename = os.rename

    def stopped(source, target):
        rename(source, target)
        if str(target).endswith("-old"):
            raise KeyboardInterrupt  # as Python does once the system is done

    monkeypatch.setattr(os, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "algo") as folder:
        (folder / "dentro").write_text("nuevo")
    assert [path.name for path in tmp_path.iterdir()] == ["algo"]
    assert (tmp_path / "algo" / "dentro").read_text() == "viejo"


def test_a_folder_that_is_a_link_goes_with_what_it_leads_to(tmp_path):
    (tmp_path / "disco grande" / "puntos").mkdir(parents=True)
    (tmp_path / "puntos").symlink_to(tmp_path / "disco grande" / "puntos")
    discard(tmp_path / "puntos")
    assert [*tmp_path.iterdir()] == [tmp_path / "disco grande"] and not [*(tmp_path / "disco grande").iterdir()]


def test_where_files_cannot_be_locked_none_is_left_open_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "fcntl", None)
    with folders.hold(tmp_path) as alone:
        assert alone and not [*tmp_path.iterdir()]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_known_by_what_torch_says_of_it():
    with pytest.raises(RuntimeError) as error:
        torch.save({"a": torch.zeros(10**6)}, "/dev/full")
    assert folders.no_space(error.value)
    assert not folders.no_space(RuntimeError("CUDA error: unknown"))


# --- pruning, copies, other trainings


def write(folder, phase, step, keep=1):
    state = dict(phase=phase, step=step, identity={}, data="")
    new = checkpoints.write_checkpoint(folder, state, lambda to: (to / "pesos").write_bytes(b"1234"))
    checkpoints.prune(new, keep)


def test_the_newest_checkpoints_stay_by_phase_and_number_not_by_name(tmp_path):
    for phase, step in ((1, 8), (1, 9_999_999), (1, 10_000_000), (2, 0)):
        write(tmp_path, phase, step, keep=3)
    names = ["fase-1-paso-9999999", "fase-1-paso-10000000", "fase-2-paso-0000000"]
    assert [path.name for path in checkpoints.all_checkpoints(tmp_path)] == names
    (tmp_path / names[2] / "pesos").write_bytes(b"12")
    write(tmp_path, 1, 10_000_001, keep=2)  # resumed before the one that was half copied
    assert [path.name for path in checkpoints.all_checkpoints(tmp_path)] == [names[1], "fase-1-paso-10000001"]


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tmp_path):
    write(tmp_path, 1, 2)

    def full(folder):
        (folder / "pesos").write_bytes(b"12")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No queda espacio.*último punto de control entero es .*fase-1-paso-0000002"):
        checkpoints.write_checkpoint(tmp_path, dict(phase=1, step=4), full)
    assert [path.name for path in tmp_path.iterdir()] == ["fase-1-paso-0000002"]


def test_a_run_goes_on_elsewhere_from_copies_whole_or_not_and_refuses_to_be_another(place, whole, tmp_path, capfd):
    killed(place, "un paso", 11, 0, options=["--conservar", "2"])
    saved = place / f"{kills.OUTPUT}-checkpoints"
    names = [path.name for path in checkpoints.all_checkpoints(saved)]
    assert names == ["fase-1-paso-0000002", "fase-2-paso-0000000"]
    there = tmp_path / "otra máquina"
    shutil.copytree(saved, there / "mio-checkpoints")
    shutil.copytree(place / "modelo", there / "phi")
    (there / "datos").mkdir()
    for path in sorted((place / "texto").iterdir(), reverse=True):  # other place, other times, other order
        shutil.copyfile(path, there / "datos" / path.name)
    elsewhere = ["--modelo", "phi", "--datos", "datos", "--salida", "mio", "--reanudar"]
    cut = there / "mio-checkpoints" / names[1] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    code, out = run(there, *elsewhere)
    assert code == 0, out
    assert "fase-2-paso-0000000 está incompleto (model.safetensors tiene 0,00 MB de" in out
    assert "Sigo desde la fase 1, paso 2" in out and weights(there, "mio") == whole

    os.chdir(place)

    def refused(*options):
        with pytest.raises(UserError) as error:
            train.main([*kills.OPTIONS, *SHORT, *options, "--reanudar"])
        capfd.readouterr()
        return str(error.value)

    assert "--longitud 256 entonces, 128 ahora" in refused("--longitud", "128")
    assert "--pasos-fase2 4 entonces, 5 ahora" in refused("--pasos-fase2", "5")
    assert "no existe" in refused("--salida", "otra") and "quita --reanudar" in refused("--salida", "otra")
    (place / "texto" / "m000.py").write_text("x = 1\n" * 100)
    message = refused()
    assert "el texto de --datos no es el mismo («texto: " in message and "--pasos" not in message
    for name in names:
        (saved / name / "optimizer.bin").unlink()
    shutil.rmtree(place / "texto")
    shutil.copytree(there / "datos", place / "texto")
    assert "fase-1-paso-0000002 está incompleto (falta optimizer.bin)" in refused()


@pytest.mark.parametrize("factor", [1, 0.3])
def test_a_training_goes_on_at_the_rates_that_it_began_with(factor):
    now = phi_1_recipe(factor)
    assert now == scaled(PHI_1_RECIPE, factor) and len({PHI_1_RECIPE, *EARLIER_RECIPES}) == 4
    for recipe in (now, *(scaled(earlier, factor) for earlier in EARLIER_RECIPES)):
        then = json.loads(json.dumps(asdict(recipe)))
        assert phi_1_recipe(factor, then) == recipe
        assert phi_1_recipe(factor, dict(then, backbone_rate=1.0)) == now


def test_the_rates_of_earlier_versions_are_known():
    rates = [(r.backbone_rate, *r.memory_rates, *r.table_rates) for r in EARLIER_RECIPES]
    assert rates == [  # as they were published
        (2e-5, 3e-3, 3e-3, 3e-2, 3e-2), (2e-5, 3e-3, 1e-4, 3e-2, 1e-3), (1e-5, 1e-4, 5e-5, 1e-4, 5e-5)
    ]  # fmt: skip


def test_differences_are_told_in_words():
    then = dict(corpus="a", hidden_size=64, steps=[1, 2], memory_rates=[1e-3, 5e-5], recompute=False, raro=1)
    now = dict(corpus="a", hidden_size=2048, steps=[1, 3], memory_rates=[1e-3, 1e-4], recompute=True, raro=2)
    found = checkpoints._differences(dict(identity=then, data="x"), now | {"optimizer": "adafactor"}, "y")
    assert found == [
        "--pasos-fase2 2 entonces, 3 ahora", "--optimizador nada entonces, adafactor ahora",
        "tasa de Engram en la fase 2 5e-05 entonces, 0,0001 ahora",
        "ancho del modelo 64 entonces, 2.048 ahora", "raro 1 entonces, 2 ahora",
    ]  # fmt: skip
    assert checkpoints._differences(dict(identity=then, data="x"), then, "y") == []


def test_how_a_step_is_computed_may_change_and_what_is_learned_may_not():
    then = dict(corpus="a", batch=2, accumulate=8, processes=2, recompute=False, shard_rows=False, shard_model=False)

    def differences(**now):
        return checkpoints._differences(dict(identity=then, data="x"), then | now, "x")

    for same in (
        dict(recompute=True), dict(batch=1, accumulate=16), dict(batch=4, accumulate=4), dict(nuevo_en_transformers=1),
        dict(processes=1, accumulate=16), dict(processes=1, batch=32, accumulate=1),
    ):  # fmt: skip
        assert differences(**same) == [], same
    (found,) = differences(processes=1)
    assert found.startswith("32 bloques por paso entonces, 16 ahora") and "2 × 8 × 2" in found
    (found,) = differences(shard_rows=True)
    assert found.startswith("se guardó sin repartir, y ahora es con --repartir-filas entre 2 procesos")
    then["shard_model"] = True
    (found,) = differences(processes=4, accumulate=4)
    assert "con --repartir-modelo entre 2 procesos" in found and "entre 4 procesos" in found


def test_damage_is_told_from_what_keeps_a_good_checkpoint_from_being_read(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    loads = {"whole.bin": lambda path: torch.load(path, weights_only=True), "whole.safetensors": load_file}
    for name, load in loads.items():
        data = (tmp_path / name).read_bytes()
        for cut in (0, 3, 100, 2000, len(data) - 10):
            (tmp_path / "cut").write_bytes(data[:cut])
            with pytest.raises(Exception) as error:
                load(tmp_path / "cut")
            assert checkpoints.is_damage(error.value), (name, cut, error.value)
    for other in (
        torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), PermissionError(13, "Permission denied"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA error: launch failure"),
        OSError(5, "Input/output error"),
    ):  # fmt: skip
        assert not checkpoints.is_damage(other), other


# --- ends that are not tidy


def begun_in_a_terminal(*options):
    """(process, terminal, what it printed) of a long training, some steps after its beginning."""
    words = [sys.executable, train.__file__, *kills.OPTIONS, *SHORT, "--guardar-cada", "1000", "--pasos-fase1", "400"]
    child, terminal = pty.fork()
    if child == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # as a shell leaves them, even if the tests run behind nohup
        os.execv(words[0], [*words, *options])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    seen = b""
    while b"aporta" not in seen:
        more = read_or_end(terminal)
        assert more, seen.decode(errors="replace")[-2000:]
        seen += more
    return child, terminal, seen


def test_a_closed_terminal_and_a_stop_button_save(place):
    """A terminal that goes away sends SIGHUP; a notebook's stop button SIGHUP and SIGINT, 0.2 s apart."""
    folder = place / f"{kills.OUTPUT}-checkpoints"
    child, terminal, _ = begun_in_a_terminal()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    (closed,) = checkpoints.all_checkpoints(folder)
    assert checkpoints.fault(closed) is None and checkpoints.position(closed) > (1, 0)

    child, terminal, seen = begun_in_a_terminal("--reanudar")
    for number in (signal.SIGHUP, signal.SIGINT):
        os.kill(child, number)
        time.sleep(0.2)
    while more := read_or_end(terminal):
        seen += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130, seen.decode(errors="replace")[-2000:]
    (stopped,) = checkpoints.all_checkpoints(folder)
    assert checkpoints.fault(stopped) is None and checkpoints.position(stopped) > checkpoints.position(closed)


def read_or_end(terminal) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is gone
        return b""


def test_copies_outlive_the_machine_and_a_copy_that_fails_stops_nothing(place, whole, tmp_path):
    drive = tmp_path / "Drive"
    drive.mkdir()
    killed(place, "un paso", 13, 0, options=["--copia", str(drive)])  # the second save waited for the first copy
    copies = drive / f"{kills.OUTPUT}-checkpoints"
    assert [path.name for path in checkpoints.all_checkpoints(copies)] in (
        ["fase-1-paso-0000002"], ["fase-2-paso-0000000"], ["fase-1-paso-0000002", "fase-2-paso-0000000"],
    )  # fmt: skip
    shutil.rmtree(place / f"{kills.OUTPUT}-checkpoints")  # another machine
    code, out = run(place, "--copia", str(drive), "--reanudar")
    assert code == 0 and "Traigo fase-" in out and "Sigo desde la fase" in out, out
    assert weights(place) == whole and weights(drive) == whole and not copies.exists()
    shutil.rmtree(place / kills.OUTPUT)
    shutil.rmtree(drive / kills.OUTPUT)
    (drive / f"{kills.OUTPUT}-checkpoints").write_text("en medio")
    code, out = run(place, "--copia", str(drive))
    assert code == 0 and "No se ha podido copiar el punto de control" in out and weights(place) == whole, out


def test_a_checkpoint_does_not_wait_for_the_copy_of_the_one_before(place, tmp_path, monkeypatch):
    """Which may take minutes that whoever was asked to stop has not; and the one that is being copied stays."""
    drive, seen = tmp_path / "Drive", []
    drive.mkdir()

    def until_the_next_is_there(self, checkpoint):
        limit = time.monotonic() + 30
        later = []
        while not later and time.monotonic() < limit and not (place / kills.OUTPUT).exists():
            later = [one for one in checkpoints.all_checkpoints(self.checkpoints) if one.name > checkpoint.name]
            time.sleep(0.01)
        seen.append((bool(later), checkpoint.exists()))

    monkeypatch.setattr(copies.Copies, "_copy", until_the_next_is_there)
    monkeypatch.setattr(copies.Copies, "finish", lambda self, output: None)
    monkeypatch.chdir(place)
    train.main([*kills.OPTIONS, *SHORT, "--copia", str(drive)])
    assert seen[:3] == [(True, True)] * 3  # of four, the last of which has no next


def test_what_a_second_place_holds_is_never_replaced_by_another_training(place, whole, tmp_path):
    drive = tmp_path / "Drive"
    drive.mkdir()
    copy, copies = ["--copia", str(drive)], drive / f"{kills.OUTPUT}-checkpoints"
    killed(place, "un paso", 15, 0, options=copy)
    names = [path.name for path in checkpoints.all_checkpoints(copies)]
    shutil.rmtree(place / f"{kills.OUTPUT}-checkpoints")  # another machine
    code, out = run(place, *copy)  # and --reanudar forgotten
    assert code == 1 and f"En {copies} hay un entrenamiento a medias" in out and "añade --reanudar" in out, out
    assert names and [path.name for path in checkpoints.all_checkpoints(copies)] == names
    half = copies / ".fase-2-paso-0000000-0123abcd"  # of a process that died while it copied
    half.mkdir()
    (half / "model.safetensors").write_bytes(bytes(1000))
    assert run(place, *copy, "--reanudar", "--pasos-fase2", "5")[0] == 1 and not half.exists()
    code, out = run(place, *copy, "--reanudar")
    assert code == 0 and weights(drive) == whole, out
    (drive / kills.OUTPUT / "notas.txt").write_text("mías")
    for options, words in (
        (["--reanudar"], "ya hay un modelo terminado"), (["--semilla", "1"], f"{kills.OUTPUT}/ ya existe"),
    ):
        code, out = run(place, *copy, *options)
        assert code == 1 and words in out, out
    shutil.rmtree(place / kills.OUTPUT)  # yet another machine
    for options in ([], ["--reanudar"], ["--semilla", "1"]):
        code, out = run(place, *copy, *options)
        assert code == 1 and f"En {drive / kills.OUTPUT} ya hay un modelo terminado" in out, out
    assert (drive / kills.OUTPUT / "notas.txt").exists() and weights(drive) == whole and not copies.exists()


def test_a_training_brought_from_a_second_place_goes_on_at_the_rates_that_it_began_with(place, tmp_path):
    drive = tmp_path / "Drive"
    drive.mkdir()

    def begun_before(*options):
        train.phi_1_recipe = lambda factor, then, lora: scaled(EARLIER_RECIPES[0], factor)
        kills.train_here(*options, kill=("un paso", 15, 0))

    assert run(place, "--copia", str(drive), action=begun_before)[0] == -signal.SIGKILL
    shutil.rmtree(place / f"{kills.OUTPUT}-checkpoints")  # another machine
    code, out = run(place, "--copia", str(drive), "--reanudar")
    assert code == 0 and "Traigo fase-" in out and "Sigo desde la fase" in out, out


def test_a_finished_training_is_not_trained_again(place, whole):
    assert run(place)[0] == 0
    (place / f"{kills.OUTPUT}-checkpoints").mkdir()  # as a command that was refused leaves it
    code, out = run(place, "--reanudar")
    assert code == 1 and f"{kills.OUTPUT}/ ya está terminado" in out and weights(place) == whole, out


def test_nor_from_a_copy_that_was_left_behind(place, whole, tmp_path):
    drive = tmp_path / "Drive"
    drive.mkdir()
    killed(place, "un paso", 15, 0, options=["--copia", str(drive)])
    assert run(place, "--reanudar")[0] == 0  # without the copy
    (place / kills.OUTPUT / "notas.txt").write_text("mías")
    code, out = run(place, "--copia", str(drive), "--reanudar")
    assert code == 1 and f"{kills.OUTPUT}/ ya está terminado" in out and "Traigo" not in out, out
    assert (place / kills.OUTPUT / "notas.txt").exists() and weights(place) == whole


def test_salida_is_the_same_with_a_slash_behind_and_names_a_folder(place, whole):
    killed(place, "un paso", 7, 0)
    assert train.from_args(train.parse([*kills.OPTIONS, "--salida", f"{kills.OUTPUT}/", "--reanudar"]))[1].resume > 1e5
    code, out = run(place, "--salida", f"{kills.OUTPUT}/", "--reanudar")
    assert code == 0 and "Sigo desde la fase 1" in out and weights(place) == whole, out
    for name in (".", "..", "a/.."):
        with pytest.raises(UserError, match="escribe el nombre de una carpeta nueva"):
            train.parse(["--salida", name, "--reanudar"])


@pytest.mark.parametrize("measured", [1, 3, 4, 5])
def test_asked_to_stop_while_held_out_text_is_measured_it_stops_there(place, whole, measured):
    """1: before the first step; 3: after the last; 4 and 5: with the memory off, and shuffled."""

    def stopped(*options):
        from engram import training

        evaluate, calls = training.evaluate, []

        def interrupted(*args, **kwargs):
            calls.append(0)
            if len(calls) == measured:
                os.kill(os.getpid(), signal.SIGINT)
            assert len(calls) <= measured
            return evaluate(*args, **kwargs)

        training.evaluate = interrupted
        kills.train_here(*options)

    code, out = run(place, action=stopped)
    assert code == 1 and "KeyboardInterrupt" in out and "repite la misma orden con --reanudar" in out, out
    assert not (place / kills.OUTPUT).exists()
    code, out = run(place, "--reanudar")
    assert code == 0 and weights(place) == whole, out


def test_copies_on_the_hub_outlive_the_machine(place, whole, monkeypatch):
    """The newest alone, private, without history; at the end the result in its place."""
    with Hub() as hub:
        url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        names = dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=url, HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False)
        for name, value in names.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        code, out = run(place, "--copia", "hub:usuario/copias")
        assert code == 1 and "hace falta tu llave de Hugging Face" in out and not hub.repos, out
        monkeypatch.setenv("HF_TOKEN", hub.token)
        killed(place, "un paso", 13, 0, options=["--copia", "hub:usuario/copias"])
        folder = place / f"{kills.OUTPUT}-checkpoints"
        kept = {path.split("/")[1] for path in hub.repos["usuario/copias"] if path.startswith(f"{folder.name}/")}
        assert len(kept) in (1, 2) and kept <= {"fase-1-paso-0000002", "fase-2-paso-0000000"} and hub.squashed
        assert hub.private["usuario/copias"]
        for name, files, private, why in (
            ("mio", {"model.safetensors": b"x"}, True, "ahí hay otras cosas (model.safetensors)"),
            ("abierto", {}, False, "ese repositorio es público"),
        ):
            hub.add(f"usuario/{name}", files, private)
            squashed = hub.squashed
            code, out = run(place, "--copia", f"hub:usuario/{name}", "--salida", name)
            assert code == 1 and why in out and hub.repos[f"usuario/{name}"] == files and hub.squashed == squashed, out
        shutil.rmtree(folder)  # another machine
        code, out = run(place, "--copia", "hub:usuario/copias", "--reanudar")
        assert code == 0 and "Traigo fase-" in out and "Sigo desde la fase" in out, out
        assert not (place / ".cache").exists()
        there = hub.repos["usuario/copias"]
        assert weights(place) == whole == kills.tensors_of(there[f"{kills.OUTPUT}/{helpers.DENSE_FILE}"])
        assert {path.split("/")[0] for path in there} <= {kills.OUTPUT, ".gitattributes"}
        shutil.rmtree(place / kills.OUTPUT)  # yet another machine
        code, out = run(place, "--copia", "hub:usuario/copias", "--reanudar")
        assert code == 1 and f"En hub:usuario/copias, carpeta {kills.OUTPUT} ya hay un modelo terminado" in out, out
        state = json.dumps(dict(identity={}, files={})).encode()
        half = {f"{folder.name}/fase-1-paso-0000002/estado.json": state}
        hub.add("usuario/copias", half, private=True)
        code, out = run(place, "--copia", "hub:usuario/copias")
        assert code == 1 and "En hub:usuario/copias hay un entrenamiento a medias" in out, out
        assert hub.repos["usuario/copias"] == half
        hub.add("usuario/copias", {}, private=True)
        hub.closed.add("usuario/copias")  # that stops no training
        code, out = run(place, "--copia", "hub:usuario/copias")
        assert code == 0 and "No se ha podido copiar" in out and "El Hub no aceptó 'usuario/copias'" in out, out
    assert run(place, "--copia", "hub:copias")[0] == 1


# --- full disk


@pytest.fixture
def small_disk(tmp_path):
    """disk(bytes): a disk of that size, or the same one resized."""
    folder = tmp_path / "disco"
    folder.mkdir()

    def resize(size):
        again = os.path.ismount(folder)
        options = f"size={size}" + ",remount" * again
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if done.returncode and not again:
            pytest.skip("mounting is not permitted here")
        done.check_returncode()
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_good_and_says_so(place, whole, small_disk):
    disk = small_disk(2**26)
    killed(place, "un paso", 7, 0, options=["--salida", str(disk / "mio")])
    (only,) = checkpoints.all_checkpoints(disk / "mio-checkpoints")
    size = sum(path.stat().st_size for path in only.iterdir())
    small_disk(size * 3 // 2)

    def fills_later(*options):  # the plan, which finds this out before it begins, sees a disk that others fill later
        train.check = lambda *_: None
        kills.train_here(*options)

    code, out = run(place, "--salida", str(disk / "mio"), "--reanudar")
    assert code == 1 and "No he abierto nada" in out, out
    code, out = run(place, "--salida", str(disk / "mio"), "--reanudar", action=fills_later)
    assert code == 1, out
    assert "No queda espacio en el disco" in out and f"punto de control entero es {only}" in out
    assert checkpoints.all_checkpoints(disk / "mio-checkpoints") == [only] and checkpoints.fault(only) is None
    assert not list((disk / "mio-checkpoints").glob(".*"))
    small_disk(2**26)
    code, out = run(place, "--salida", str(disk / "mio"), "--reanudar")
    assert code == 0 and "Sigo desde la fase 1, paso 2" in out
    assert weights(disk, "mio") == whole


# --- trackers


def test_tensorboard_gets_losses_rates_speed_and_results_once_each(place):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed(place, "un paso", 8, 0, options=["--registro", "tensorboard"])
    code, out = run(place, "--registro", "tensorboard", "--reanudar")
    assert code == 0, out
    events = EventAccumulator(str(place / f"{kills.OUTPUT}-registro")).Reload()
    rows = [json.loads(line) for line in (place / kills.OUTPUT / "entrenamiento.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "step" in row]
    logged = events.Scalars("entrenamiento/pérdida")
    assert [event.step for event in logged] == list(range(1, 9))
    assert [event.value for event in logged] == pytest.approx(losses, abs=1e-5)
    assert [event.step for event in events.Scalars("texto apartado/bits por byte")] == [0, 4, 8]
    assert [event.step for event in events.Scalars("tasa/Phi")] == [5, 6, 7, 8]
    assert len(events.Scalars("entrenamiento/tokens por segundo")) == 8


def test_a_tracker_that_is_not_installed_is_found_out_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        train.main(["--registro", "trackio", "--modelo", "no-existe"])
