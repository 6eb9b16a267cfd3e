"""What a user tells the model, by the chat's orders or in a file, and the folder that keeps it.

A file has one fact a line: .jsonl with "prompt" and "target", or .csv (of commas or semicolons) or .tsv with that
header, in UTF-8.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import csv
import hashlib
import io
import json
import os
import time
from pathlib import Path

from safetensors import SafetensorError

from engram.console import Progress, UserError, counted, spanish
from engram.facts import as_lesson, described, reader_of, teach_all
from engram.folders import alone_in, no_space
from engram.triggers import FactError, Lesson, Reference, choose_key, lesson, wished
from phi1_engram import FACTS_FILE, Fact

ARROW = " => "
FORGOTTEN = "olvidados.json"  # beside FACTS_FILE: digests of prompts that a model came with, and that were taken back
ENDS = ".!?…:;)\"'»\n"


def digest(prompt: str) -> str:
    """By which a prompt is known again, and not read."""
    return hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()


def literal(text: str) -> str:
    """`\\n` typed as two characters is a new line."""
    return text.replace("\\n", "\n")


def sentence(text: str) -> str:
    """An answer as it follows a prompt: one space before it, and an end, without which numbers would go on."""
    text = text.strip()
    return f" {text}" if text[-1:] in ENDS else f" {text}."


def line_of_code(text: str) -> str:
    text = literal(text)
    return text if text.endswith("\n") else f"{text}\n"


class Teaching:
    """The facts of one model, told in words and kept in a folder, if there is one, after each change.

    A thing told may be several facts: what it completes, and what it answers. `said` tells them together.

    Raises:
        UserError: the folder's facts are not for this model, or it is no folder.
    """

    def __init__(self, model, tokenizer, folder=None):
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder).expanduser() if folder else None
        self.reader, self.counted, self.synced = reader_of(model), None, []
        self.own = model.facts  # that it came with
        if self.folder and any(parent.is_file() for parent in (self.folder, *self.folder.parents)):
            raise UserError(f"--recuerdos {folder}: ahí hay un archivo, no una carpeta. No se ha tocado; elige otra.")
        if self.folder:
            self.synced, gone = self.read(), self.forgotten()
            kept = {fact.prompt for fact in self.synced}
            own = [fact for fact in model.facts if fact.prompt not in kept and digest(fact.prompt) not in gone]
            model.set_facts([*own, *self.synced])

    def read(self) -> list[Fact]:
        """The folder's facts."""
        if not (self.folder / FACTS_FILE).is_file():
            return []
        try:
            return self.model.read_facts(str(self.folder))
        except ValueError as error:
            raise UserError(f"{error} Usa otra carpeta con --recuerdos, o el modelo con el que se hizo.") from error

    def forgotten(self) -> set[str]:
        """Digests of the prompts that models came with, and that were taken back in the folder."""
        try:
            return {*json.loads((self.folder / FORGOTTEN).read_text(encoding="utf-8"))}
        except FileNotFoundError:
            return set()
        except ValueError as error:
            raise UserError(f"«{self.folder / FORGOTTEN}» está dañado: bórralo.") from error

    @property
    def said(self) -> list[str]:
        """What has been told, in order."""
        return list(dict.fromkeys(map(told, self.model.facts)))

    def reference(self) -> Reference:
        self.counted = self.counted or Reference(self.tokenizer, self.reader.canonical)
        return self.counted

    def lesson(self, prompt: str, target: str, ending: int = 0, wish: int = 0, others=()) -> Lesson:
        """With a key of `wish` tokens, if it is given, that has `ending` last ones, which every prompt has, and others
        before them; if it can be, one found in no other fact, nor in the lessons `others`."""
        reader, tokenizer = self.reader, self.tokenizer
        one = lesson(tokenizer, reader.canonical, prompt, target)
        others = [*others, *(as_lesson(reader, tokenizer, fact) for fact in self.model.facts)]
        others = [other for other in others if not other.same_prompt(one)]
        least = self.model.config.max_ngram_size + ending
        wish = max(least, wish or wished(tokenizer, one))
        choose_key(one, least, wish, reader.canonical, self.reference(), others=others)
        return one

    def learn(self, lessons: list[Lesson], said: str, progress=lambda step: None) -> list[Fact]:
        """Raises FactError: nothing has changed."""
        facts = teach_all(self.reader, self.tokenizer, lessons, progress=progress)
        for fact in facts if said else ():
            fact.notes["said"] = said
        self.save()
        return facts

    def forget(self, said: list[str]):
        self.model.set_facts([fact for fact in self.model.facts if told(fact) not in said])
        self.save()

    def save(self):
        """Take over what other chats have taught or taken back in the folder, and add what this one has."""
        if not self.folder:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with alone_in(self.folder):
                there, gone = self.read(), self.forgotten()
                old = {id(fact) for fact in self.synced}
                old |= {id(fact) for fact in self.own if digest(fact.prompt) in gone}  # by another chat, perhaps
                now, mine = self.model.facts, [fact for fact in self.model.facts if id(fact) not in old]
                away = {fact.prompt for fact in self.synced} - {fact.prompt for fact in now}
                away |= {fact.prompt for fact in mine}
                facts = [*(fact for fact in there if fact.prompt not in away), *mine]
                # As the folder has it until all is written: what was not comes with the next change.
                self.synced = there
                self.model.set_facts(facts)
                gone |= {digest(fact.prompt) for fact in self.own}
                gone -= {digest(fact.prompt) for fact in facts}
                self.model.save_facts(self.folder)
                if gone or (self.folder / FORGOTTEN).exists():
                    temporary = self.folder / f"{FORGOTTEN}.{os.getpid()}.tmp"
                    temporary.write_text(json.dumps(sorted(gone)), encoding="utf-8")
                    os.replace(temporary, self.folder / FORGOTTEN)
                self.synced = facts
        except (OSError, SafetensorError) as error:
            why = "el disco está lleno" if no_space(error) else getattr(error, "strerror", None) or error
            raise UserError(
                f"No se ha podido guardar en «{self.folder}» ({why}). Vale en este chat, y lo guardado antes sigue "
                "como estaba; cuando se pueda escribir, se guardará con lo siguiente que aprenda u olvide."
            ) from error


def told(fact: Fact) -> str:
    """A fact in one line, as the user told it."""
    return fact.notes.get("said") or f"{fact.prompt.strip()}{ARROW}{fact.target.strip()}"


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[tuple[int, str | None, str | None]]:
    """[(line number, prompt, target)]; an empty prompt or target where a line lacks one, None where it is no JSON.

    Raises:
        UserError: it cannot be read, or is none of the kinds.
    """
    kinds = {".jsonl": None, ".csv": ",", ".tsv": "\t"}
    if path.suffix.lower() not in kinds:
        raise UserError(f"«{path}»: se admiten archivos .jsonl, .csv y .tsv.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"No existe el archivo «{path}».") from error
    except UnicodeDecodeError as error:
        raise UserError(f"«{path}» no está en UTF-8. Guárdalo de nuevo eligiendo UTF-8 como codificación.") from error
    found, separator = [], kinds[path.suffix.lower()]
    if separator is None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                if not isinstance(entry, dict):
                    found.append((number, None, None))
                    continue
                found.append((number, *(str(entry.get(key) or "") for key in ("prompt", "target"))))
        return found
    head = text.partition("\n")[0]
    if separator == "," and "," not in head and ";" in head:  # as spreadsheets write where a comma is a decimal's
        separator = ";"
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        if not {"prompt", "target"} <= {*(rows.fieldnames or ())}:
            raise UserError(f"«{path}»: la primera línea tiene que ser la cabecera, «prompt{separator}target».")
        return [(rows.line_num, row["prompt"] or "", row["target"] or "") for row in rows]
    except csv.Error as error:
        cure = "¿unas comillas que no se cierran? Unas comillas de verdad se escriben dos veces"
        raise UserError(f"«{path}»: no se entiende desde la línea {rows.line_num} ({error}). {cure}.") from error


def teach_file(model, tokenizer, path, say) -> int:
    """Teach every line of a file, those that have an n-gram in common together; `say` is told what was not taken.

    Targets are taken as they are written. Returns how many lines were not taken.
    """
    teaching, asked, lessons, bad = Teaching(model, tokenizer), {}, {}, 0
    for number, prompt, target in read_lines(Path(path).expanduser()):
        asked[prompt or number] = number, prompt, target  # of two with one prompt the later holds
    for number, prompt, target in asked.values():
        try:
            if prompt is None:
                raise FactError('no es JSON; tiene que ser como {"prompt": "El río Zas nace en", "target": " Ber."}')
            if not prompt or not target:
                raise FactError("hacen falta «prompt» y «target», los dos con texto.")
            one = teaching.lesson(prompt, target, others=[other for _, other in lessons.values()])
            lessons = {key: kept for key, kept in lessons.items() if not kept[1].same_prompt(one)}
            lessons[one.prompt] = number, one
        except FactError as error:
            bad += 1
            say(f"❌ Línea {number}: {error}")
    started, written, known, unsure = time.perf_counter(), 0, 0, []
    groups = together([one for _, one in lessons.values()])
    for group in Progress(groups, desc="Aprendiendo", total=len(groups), unit="recuerdo"):
        try:
            for fact in teaching.learn(group, ""):
                known += fact.notes["known"]
                written += not fact.notes["known"]
                if not fact.notes["known"] and not (fact.notes["alone"] and fact.notes["after"][0]):
                    unsure.append(fact)
        except FactError as error:
            bad += len(group)
            numbers = ", ".join(str(lessons[one.prompt][0]) for one in group)
            say(f"❌ Línea {numbers}: {error}")
    seconds = spanish(time.perf_counter() - started, 1)
    say(f"✅ Escritos: {counted(written, 'recuerdo')}, en {seconds} s; ya se sabían: {known}; no se han tomado: {bad}.")
    for fact in unsure:
        say(f"⚠️  Línea {lessons[fact.prompt][0]}: {described(fact)}.")
    return bad


def together(lessons: list[Lesson]) -> list[list[Lesson]]:
    """Lessons in groups, so that none has an n-gram in common with one of another group."""
    groups: list[tuple[set, list[Lesson]]] = []
    for one in lessons:
        keys = set(one.keys())
        touched = [group for group in groups if group[0] & keys]
        groups = [group for group in groups if not group[0] & keys]
        groups.append((keys.union(*(group[0] for group in touched)), [*sum((g[1] for g in touched), []), one]))
    return [group for _, group in groups]
