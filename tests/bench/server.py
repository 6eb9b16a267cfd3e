"""Clients at once on `chat_phi_engram.py --servir`: every answer whole and what it is alone, and memory that stays.

    python tests/bench/server.py --segundos 120
    python tests/bench/server.py --modelo phi1-engram-demo --clientes 8

Half of the requests are streams; each client asks for the next as soon as it has one.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engram.console import spanish

PROMPTS = ("def __init__(self", "import os\n\ndef main():\n    ", "for i in range(", "class Node:\n    def", "x = [")


@contextmanager
def serving(folder, *flags, **environment):
    """A server on a free port. Yields its process, its address and the file of what it says; ended by Ctrl-C."""
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / "chat_phi_engram.py"), "--modelo", str(folder), "--servir", "0"]
        env = {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **os.environ, **environment}
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        try:
            yield process, address_in(Path(log.name), process), Path(log.name)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def address_in(log: Path, process) -> str:
    while process.poll() is None:
        if found := re.search(r"en (http://\S+)", log.read_text(encoding="utf-8")):
            return found[1]
        time.sleep(0.2)
    raise SystemExit(log.read_text(encoding="utf-8"))


def ask(address: str, path: str, key=None, **body):
    """OpenAI's answer; of a stream, the list of its pieces, [DONE] and all."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{address}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        if not body.get("stream"):
            return json.load(answer)
        lines = answer.read().decode().split("\n\n")
    pieces = [line.removeprefix("data: ") for line in lines if line]
    return [piece if piece == "[DONE]" else json.loads(piece) for piece in pieces]


def text_of(answer) -> str:
    """A completion's text. Raises AssertionError where its stream is not whole."""
    if isinstance(answer, dict):
        return answer["choices"][0]["text"]
    assert answer[-1] == "[DONE]" and answer[-2]["choices"][0]["finish_reason"] in ("stop", "length"), answer[-2:]
    return "".join(piece["choices"][0]["text"] for piece in answer[:-1])


def resident(pid: int) -> int:
    """Bytes of RAM that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def crowd(address: str, pid: int, seconds: float, clients: int = 8, max_tokens: int = 24):
    """Ask with so many clients for so long, at temperature 0.

    Returns:
        seconds of each answer, answers that are not those of a client alone, errors, bytes of RAM once a second.
    """

    def completion(number):
        body = dict(prompt=PROMPTS[number % len(PROMPTS)], max_tokens=max_tokens, temperature=0)
        return text_of(ask(address, "completions", stream=number % 2 == 0, **body))

    alone = [completion(number) for number in range(2 * len(PROMPTS))]
    times, wrong, errors, end = [], [], [], time.monotonic() + seconds

    def client(number):
        while time.monotonic() < end:
            started = time.monotonic()
            try:
                text = completion(number)
            except Exception as error:
                errors.append(repr(error))
                return
            times.append(time.monotonic() - started)
            if text != alone[number % len(alone)]:
                wrong.append((number, text))
            number += clients + 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append(resident(pid))
        time.sleep(1)
    return times, wrong, errors, memory


def small_folder(folder: Path) -> Path:
    """A model in miniature with random weights, that never ends an answer by itself."""
    import torch

    from engram.trial import small_model, tokenizer_on_the_spot

    tokenizer = tokenizer_on_the_spot()
    model = small_model(tokenizer, len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] = -100
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Clientes a la vez sobre chat_phi_engram.py --servir.")
    parser.add_argument("--modelo", help="por defecto, uno pequeño con pesos al azar")
    parser.add_argument("--clientes", type=int, default=8)
    parser.add_argument("--segundos", type=float, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.modelo or small_folder(Path(place) / "modelo")
        with serving(folder) as (process, address, _):
            times, wrong, errors, memory = crowd(address, process.pid, options.segundos, options.clientes)
    kept = [value / 1e6 for value in memory]
    print(f"{options.clientes} clientes, {spanish(options.segundos)} s: {len(times)} respuestas, de ellas {len(wrong)} "
          f"distintas de las de uno solo; {len(errors)} errores")  # fmt: skip
    print(f"segundos por respuesta: mediana {spanish(statistics.median(times), 2)}, peor {spanish(max(times), 2)}")
    print(f"RAM: {spanish(kept[0], 1)} MB al empezar, {spanish(kept[len(kept) // 2], 1)} a la mitad, "
          f"{spanish(kept[-1], 1)} al final")  # fmt: skip
    print(*errors[:3], sep="\n", end="")
    return 1 if wrong or errors else 0


if __name__ == "__main__":
    sys.exit(main())
