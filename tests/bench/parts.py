"""Parts of a long check, each in a process of its own, and what they found, in one JSON file: see card.py.

A part is a function of a `Part`, with which it measures and checks. One that dies (an exception, no memory left, a
signal) has failed, keeps what it had found, and costs no other part its results.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
import transformers

from engram.console import UserError, out_of_memory, spanish
from engram.machines import allowed_ram

PATIENCE = 20 * 60  # seconds after which a part is taken for hung
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "triton", "bitsandbytes")


class Part:
    """What a part has found so far, in its file after every line."""

    def __init__(self, path, small: bool, work: Path):
        self.path, self.small, self.work, self.card = path, small, work, torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.card else torch.device("cpu")
        self.places = ("gpu", "ram", "disco") if self.card else ("ram", "disco")
        self.found = dict(maquina=machine(), medidas={}, comprobaciones=[])
        self.at_end = ExitStack()  # what is to be stopped, however the part ends
        write(path, self.found)

    def measure(self, name: str, value, text: str = ""):
        self.found["medidas"][name] = value
        if text:
            print(f"   {name}: {text}", flush=True)
        write(self.path, self.found)

    def check(self, text: str, good):
        self.found["comprobaciones"].append([text, bool(good)])
        print(f"   {'✅' if good else '❌'} {text}", flush=True)
        write(self.path, self.found)

    def allocated(self) -> int:
        """Bytes of the card that tensors have; 0 without a card."""
        return torch.cuda.memory_allocated() if self.card else 0


def write(path, found: dict):
    """Whole or as it was before."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    os.replace(temporary, path)


def machine() -> dict:
    """Card, driver, versions, memory and disk (bytes), as they are now."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts = dict(
        tarjeta=None, python=platform.python_version(), sistema=platform.platform(), nucleos=os.cpu_count(),
        versiones=versions, cuda=torch.version.cuda, ram=psutil.virtual_memory().total, ram_disponible=allowed_ram(),
        disco_libre=shutil.disk_usage(tempfile.gettempdir()).free,
    )  # fmt: skip
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        facts |= dict(tarjeta=card.name, capacidad=f"{card.major}.{card.minor}", gpu=total, gpu_libre=free)
        try:
            words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["controlador"] = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            facts["controlador"] = None
    return facts


def launcher() -> list[str]:
    """The words before the script's name with which this process was started: Python, and its own options."""
    return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv)]


def inside(function, path, small: bool):
    """Run one part in this process. Whatever stops it is a failed check, and the traceback is kept."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="phi1-engram-", ignore_cleanup_errors=True) as work:
        part = Part(path, small, Path(work))
        try:
            with part.at_end:
                function(part)
        except Exception as error:
            part.found["traza"] = traceback.format_exc()
            first = (str(error).strip().splitlines() or ["sin explicación"])[0]
            if out_of_memory(error):
                first = f"se agotó la memoria ({first})"
            elif not isinstance(error, UserError):
                first = f"error inesperado ({type(error).__name__}: {first})"
            part.check(first, False)


def run(script: str, name: str, small: bool) -> dict:
    """Run one part in a process of its own, `SCRIPT --dentro NAME --salida FILE`, and return what it found."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="phi1-engram-") as folder:
        path = Path(folder, "parte.json")
        words = [*launcher(), script, "--dentro", name, "--salida", str(path), *["--chico"] * small]
        # Of tiny models threads only wait for each other.
        process = subprocess.Popen(words, env={**os.environ, **({"OMP_NUM_THREADS": "1"} if small else {})})
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(medidas={}, comprobaciones=[])
    if code != 0:
        why = f"no acabó en {PATIENCE // 60} minutos" if code is None else f"murió con estado {code}"
        if code == -signal.SIGKILL:
            why = "la mató el sistema: casi siempre, porque se acabó la RAM"
        found["comprobaciones"].append([why, False])
        print(f"   ❌ {why}", flush=True)
    found["segundos"] = time.perf_counter() - start
    return found


def earlier(path: Path, small: bool) -> dict:
    """{part: what it found} of the earlier runs that are in the file; the small form's count for nothing.

    Raises:
        UserError: the file is something else, or worth more than what is to be written.
    """
    if not path.exists():
        return {}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        found, of_small = old["partes"], old["chico"]
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"--salida {path}: ahí hay otra cosa, y no la voy a pisar. Elige otro nombre.") from None
    if small and not of_small:
        raise UserError(f"--salida {path}: ahí está lo que midió una tarjeta. Con --chico, elige otro nombre.")
    return found if small == of_small else {}


def conclude(parts: dict, expected, small: bool) -> bool:
    """Print the table and the last line; whether everything holds."""
    print("\n| parte | | segundos | se cumplen | lo primero que falla |\n| --- | --- | --- | --- | --- |")
    broken = []
    for name, found in parts.items():
        checks, failed = found["comprobaciones"], [text for text, good in found["comprobaciones"] if not good]
        broken += [f"{name}: {text}" for text in failed]
        cells = ["❌" if failed else "✅", spanish(found["segundos"]), f"{len(checks) - len(failed)} de {len(checks)}"]
        print(f"| {name} | {' | '.join(cells)} | {failed[0] if failed else ''} |")
    cards = [found["maquina"]["tarjeta"] for found in parts.values() if "maquina" in found]
    where = f"en {cards[0]}" if any(cards) else "en la CPU, que de una tarjeta no dice nada"
    where += ", en pequeño" if small else ""
    if missing := [name for name in expected if name not in parts]:
        print(f"\nFaltan partes: python tests/bench/card.py --parte {' '.join(missing)}")
    print(f"\n❌ Falla {where}: {broken[0]}" if broken else f"\n✅ Se cumple todo lo comprobado {where}.")
    return not broken
