"""Kill a training at random moments with SIGKILL, resume it, and compare its weights with the uninterrupted run's.

    python tests/bench/kills.py --veces 20

A small model goes through tokenising, both phases and saving as `train_phi_engram.py` does it, every time in a process
of its own, forked from this one so that nothing has to be imported again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.pyplot  # noqa: F401
import torch
from accelerate.utils import set_seed
from safetensors.torch import load, load_file

import engram.corpus as corpora
import engram.demo as demo
import engram.steps as stepping
import engram.texts as texts
import engram.training as training
import train_phi_engram as train

# Where a kill may fall: what is being done, and the function that does it.
PLACES = {
    "tokenizar": (corpora, "_tokenise"),
    "un paso": (stepping, "batch_at"),
    "evaluar": (training, "evaluate"),
    "guardar un punto de control": (training, "write_checkpoint"),
    "empezar una fase": (training, "make_optimizer"),
    "comparar Phi entre fases": (training, "fingerprint"),
    "guardar el resultado": (training, "save_trained"),
    "borrar los puntos de control": (training, "discard"),
}
OUTPUT, DENSE_FILE = "entrenado", "model-00001-of-00001.safetensors"
OPTIONS = ["--modelo", "modelo", "--datos", "texto", "--salida", OUTPUT, "--longitud", "64", "--lote", "2"]
OPTIONS += ["--acumular", "2", "--pasos-fase1", "12", "--pasos-fase2", "12", "--guardar-cada", "4"]


def make_model(folder):
    """A Phi of two layers with memory and its tokenizer in `folder`/modelo, and a text of many files beside it."""
    from transformers import PhiConfig, PhiForCausalLM

    from engram.graft import load_phi_1_with_engram

    set_seed(0)
    files = [path for path in texts.text_files(texts.standard_library()) if path.stat().st_size < 8000][:150]
    (folder / "texto").mkdir()
    for number, path in enumerate(files):
        shutil.copyfile(path, folder / "texto" / f"m{number:03d}.py")
    tokenizer = demo.demo_tokenizer(files, 600)
    shape = dict(demo.DEMO_SHAPE, vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    end = tokenizer.eos_token_id
    PhiForCausalLM(PhiConfig(**shape, bos_token_id=end, eos_token_id=end)).save_pretrained(folder / "phi")
    tokenizer.save_pretrained(folder / "phi")
    memory = dict(layer_ids=[1], engram_vocab_size=[1000, 1000], n_embed_per_ngram=32, n_head_per_ngram=4)
    model, tokenizer = load_phi_1_with_engram(folder / "phi", **memory)
    model.save_pretrained(folder / "modelo")
    tokenizer.save_pretrained(folder / "modelo")


def in_child(folder, log, action) -> int:
    """Run `action()` in a fork of this process, in `folder`. Returns its exit status, or minus the signal's number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            torch.set_num_threads(1)  # the model is so small that threads only wait for each other
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
            action()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tensors_of(data: bytes) -> dict[str, bytes]:
    """Of a safetensors file, whose own words (its metadata) stand in no fixed order."""
    return {name: tensor.numpy().tobytes() for name, tensor in load(data).items()}


def train_here(*options, kill=None, trace=None):
    """The script in this process.

    Args:
        kill: (place, n, seconds): SIGKILL so long after the n-th time that the place is entered; at once for 0.
        trace: file to keep what is being done in, and at the end how often and how long each thing was done.
    """
    doing, counts, spent = ["empezar"], dict.fromkeys(PLACES, 0), dict.fromkeys(PLACES, 0.0)

    log = os.open(trace, os.O_WRONLY | os.O_CREAT) if trace else None

    def note():
        if trace:
            os.pwrite(log, doing[-1].ljust(60).encode(), 0)  # at once, so that a kill finds it written

    def watched(place, function):
        def inner(*args, **kwargs):
            counts[place] += 1
            started = time.perf_counter()
            if place == "un paso":
                doing[1:] = [place]  # what follows, until something else is done
            else:
                doing.append(place)
            note()
            if kill and (place, counts[place]) == tuple(kill[:2]):
                blow = threading.Timer(kill[2], os.kill, (os.getpid(), signal.SIGKILL))
                blow.start() if kill[2] else blow.function(*blow.args)
            try:
                return function(*args, **kwargs)
            finally:
                spent[place] += time.perf_counter() - started
                if place != "un paso":
                    doing.pop()
                    note()

        return inner

    for place, (module, name) in PLACES.items():
        setattr(module, name, watched(place, getattr(module, name)))
    train.main([*OPTIONS, *options])
    if trace:
        os.ftruncate(log, 0)
        os.pwrite(log, json.dumps(dict(counts=counts, spent=spent)).encode(), 0)


def leftovers(folder) -> list[str]:
    """Hidden folders that a killed run left, and checkpoints of a finished one."""
    found = [path for place in (folder, folder / "cache" / "phi-engram") for path in place.glob(".*")]
    return [str(path) for path in (*found, *folder.glob("*-checkpoints"))]


def apart(one: Path, other: Path) -> float:
    """Mean absolute difference of all weights of two trained models."""
    total = count = 0
    for file in one.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(other / file.name)
        for name, tensor in ours.items():
            total += (tensor.double() - theirs[name].double()).abs().sum().item()
            count += tensor.numel()
    return total / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--veces", type=int, default=20, help="cuántas veces matarlo (%(default)s)")
    parser.add_argument("--semilla", type=int, default=0, help="de los momentos (%(default)s)")
    args = parser.parse_args()
    draw, survived, done = random.Random(args.semilla), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        origin = scratch / "origen"
        origin.mkdir()
        assert in_child(origin, "registro.txt", lambda: make_model(origin)) == 0, (origin / "registro.txt").read_text()

        def fresh(name):
            folder = scratch / name
            folder.mkdir()
            for part in ("modelo", "texto"):
                shutil.copytree(origin / part, folder / part)
            return folder

        whole = fresh("entero")
        started = time.perf_counter()
        code = in_child(whole, "registro.txt", lambda: train_here(trace="medidas.json"))
        assert code == 0, (whole / "registro.txt").read_text()
        print(f"Entrenamiento sin interrumpir: {time.perf_counter() - started:.1f} s")
        measured = json.loads((whole / "medidas.json").read_text())
        expected = tensors_of((whole / OUTPUT / DENSE_FILE).read_bytes())
        places = list(PLACES)
        while done < args.veces:
            place = places[done % len(places)]
            times = measured["counts"][place]
            number = draw.randint(1, times)
            # A batch is read in no time; the step with it is what takes long.
            length = 0.3 if place == "un paso" else measured["spent"][place] / times
            kill = (place, number, draw.uniform(0, length))
            folder = fresh(f"caso-{done}")
            code = in_child(folder, "registro.txt", lambda kill=kill: train_here(kill=kill, trace="haciendo.txt"))
            where = (folder / "haciendo.txt").read_text(encoding="utf-8").strip()
            if code == 0 or where.startswith("{"):  # all was done before the blow; draw again
                shutil.rmtree(folder)
                continue
            saved = [path.name for path in (folder / f"{OUTPUT}-checkpoints").glob("fase-*")]
            weights = folder / OUTPUT / DENSE_FILE
            ready = weights.exists()
            resumed = in_child(folder, "registro-2.txt", lambda: train.main([*OPTIONS, "--reanudar"]))
            log = (folder / "registro-2.txt").read_text(encoding="utf-8", errors="replace")
            finished = resumed == 0 or (ready and "ya está terminado" in log)
            same = weights.exists() and tensors_of(weights.read_bytes()) == expected
            good = code == -signal.SIGKILL and finished and same and not leftovers(folder)
            survived, done = survived + good, done + 1
            print(
                f"{done:3d}. {'✅' if good else '❌'} muerto al {where} (vez {number} de {times}, "
                f"{kill[2] * 1000:.0f} ms después de «{place}»); guardado: {', '.join(saved) or 'nada'}", flush=True,
            )  # fmt: skip
            if not good:
                print(f"     estados {code} y {resumed}, mismos pesos: {same}, restos: {leftovers(folder)}")
                print(log[-1500:])
            shutil.rmtree(folder)
    print(f"{survived} de {done} reanudados con los mismos pesos, bit a bit, que sin interrumpir.")
    return survived != done


if __name__ == "__main__":
    sys.exit(main())
