"""Checkpoints in a second place, which outlives the machine: another folder, or a private repository of the Hub."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import re
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

from engram.checkpoints import all_checkpoints, fault, position
from engram.console import UserError
from engram.folders import discard, sweep, whole_folder
from engram.sharing import on_hub

ON_HUB = "hub:"  # before a repository's name


def copies(place: str, checkpoints: Path):
    """Raises UserError: no such repository, and none can be made."""
    if place.startswith(ON_HUB):
        return HubCopies(place.removeprefix(ON_HUB), checkpoints)
    return Copies(place, checkpoints)


class Copies:
    """A second place for checkpoints, on a drive that outlives the machine: filled in the background, the newest stays.

    A copy that fails is said, and stops no training.
    """

    other = "otra --salida"

    def __init__(self, folder, checkpoints: Path):
        self.place, self.checkpoints = Path(folder).expanduser() / checkpoints.name, checkpoints
        self.going = None

    def send(self, checkpoint: Path):
        """Begin to copy a whole checkpoint. The program can end without it: whoever wants it there waits."""
        self.going = Future()
        threading.Thread(target=self._tell, args=(self.going, checkpoint), daemon=True).start()

    def _tell(self, going: Future, checkpoint: Path):
        try:
            going.set_result(self._copy(checkpoint))
        except BaseException as error:
            going.set_exception(error)

    def _copy(self, checkpoint: Path):
        copy_folder(checkpoint, self.place / checkpoint.name)
        for older in all_checkpoints(self.place):
            if older.name != checkpoint.name:
                discard(older)

    def wait(self):
        """Until the last copy is there."""
        going, self.going = self.going, None
        try:
            if going:
                going.result()
        except (OSError, UserError, shutil.Error) as error:
            print(f"⚠️  No se ha podido copiar el punto de control a {self.place}: {error} El entrenamiento sigue.")

    def begin(self, output: Path, resume: bool):
        """Bring what is to be resumed, and refuse to write over what was trained before.

        Raises UserError: the result is there already; or checkpoints are, and they are not to be resumed.
        """
        if self.finished(output):
            raise UserError(
                f"En {self.result(output)} ya hay un modelo terminado, y no lo voy a pisar: tráelo de ahí o, para "
                f"entrenar otro, elige {self.other}."
            )
        if resume:
            self.bring(output)
        elif self.begun():
            raise UserError(
                f"En {self.place} hay un entrenamiento a medias. Para seguirlo añade --reanudar; para empezar de nuevo "
                f"bórralo, o elige {self.other}."
            )

    def begun(self) -> list[Path]:
        """Checkpoints there, oldest first; what killed processes left beside them goes."""
        sweep(self.place.parent, re.escape(self.place.name.removesuffix("-checkpoints")) + "(?:-checkpoints)?")
        sweep(self.place, "fase-.*")
        return all_checkpoints(self.place)

    def finished(self, output: Path) -> bool:
        return self.result(output).exists()

    def result(self, output: Path) -> Path | str:
        return self.place.parent / output.name

    def bring(self, output: Path):
        """The newest whole copy, where this machine has none as new, nor the result."""
        if all_checkpoints(self.checkpoints) or not output.exists():
            self._bring()

    def _bring(self):
        there = [path for path in self.begun() if not fault(path)]
        here = [path for path in all_checkpoints(self.checkpoints) if not fault(path)]
        if there and (not here or position(here[-1]) < position(there[-1])):
            print(f"Traigo {there[-1].name} de {self.place} …")
            copy_folder(there[-1], self.checkpoints / there[-1].name)

    def finish(self, output: Path):
        """The result beside the copies, which nobody needs any more."""
        self.wait()
        try:
            copy_folder(output, self.result(output))
            discard(self.place)
            print(f"✅ Copiado en {self.result(output)}/")
        except (OSError, UserError, shutil.Error) as error:
            print(f"⚠️  El resultado está entero en {output}/, pero no se ha podido copiar: {error}")


def copy_folder(source: Path, target: Path):
    with whole_folder(target) as temporary:
        for file in filter(Path.is_file, source.rglob("*")):  # their bytes: some drives refuse to set modes
            copy = temporary / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


class HubCopies(Copies):
    """In a private repository of its own, of which only the newest checkpoint is kept, and no history.

    Raises:
        UserError: it cannot be made, others can read it, or it holds something else, whose history would be lost.
    """

    other = "otro nombre en --copia"

    def __init__(self, repo: str, checkpoints: Path):
        super().__init__(repo, checkpoints)
        self.repo, self.place = repo, f"{ON_HUB}{repo}"
        self.ask(self._make)  # now, and not after hours

    def _make(self, api):
        api.create_repo(self.repo, private=True, exist_ok=True)
        if not api.repo_info(self.repo).private:
            raise UserError(f"--copia {ON_HUB}{self.repo}: ese repositorio es público. Elige otro nombre.")
        names = {name.split("/")[0] for name in api.list_repo_files(self.repo)}
        own = {self.checkpoints.name, self.checkpoints.name.removesuffix("-checkpoints"), ".gitattributes"}
        if others := sorted(names - own):
            raise UserError(
                f"--copia {ON_HUB}{self.repo}: ahí hay otras cosas ({others[0]}), y de ese repositorio solo se guarda "
                "lo último. Elige otro nombre."
            )

    def ask(self, action):
        return on_hub(action, self.repo, "Mira la conexión y que la llave deje escribir ahí.")

    def _copy(self, checkpoint: Path):
        def upload(api):
            inside = f"{self.checkpoints.name}/{checkpoint.name}"
            api.upload_folder(folder_path=checkpoint, path_in_repo=inside, repo_id=self.repo, commit_message=inside)
            for older in {path.name for path in self.there(api)} - {checkpoint.name}:
                api.delete_folder(f"{self.checkpoints.name}/{older}", repo_id=self.repo)
            api.super_squash_history(repo_id=self.repo)  # or what was deleted would go on taking its room

        self.ask(upload)

    def begun(self) -> list[Path]:
        return self.ask(self.there)

    def finished(self, output: Path) -> bool:
        return self.ask(lambda api: any(name.startswith(f"{output.name}/") for name in api.list_repo_files(self.repo)))

    def result(self, output: Path) -> Path | str:
        return f"{self.place}, carpeta {output.name}"

    def there(self, api) -> list[Path]:
        """Checkpoints in the repository, oldest first: each came whole, in one commit."""
        prefix = f"{self.checkpoints.name}/"
        names = {name.split("/")[1] for name in api.list_repo_files(self.repo) if name.startswith(prefix)}
        return sorted(filter(position, map(Path, names)), key=position)

    def _bring(self):
        def download(api):
            there = self.there(api)
            here = [path for path in all_checkpoints(self.checkpoints) if not fault(path)]
            if not there or (here and position(here[-1]) >= position(there[-1])):
                return
            print(f"Traigo {there[-1].name} de {self.place} …")
            inside = f"{self.checkpoints.name}/{there[-1].name}"
            with whole_folder(self.checkpoints / there[-1].name) as temporary:
                api.snapshot_download(self.repo, allow_patterns=f"{inside}/*", local_dir=temporary)
                for file in (temporary / inside).iterdir():
                    shutil.move(file, temporary)
                for rest in (self.checkpoints.name, ".cache"):  # the latter is huggingface_hub's own
                    shutil.rmtree(temporary / rest, ignore_errors=True)

        self.ask(download)

    def finish(self, output: Path):
        self.wait()

        def upload(api):
            api.upload_folder(folder_path=output, path_in_repo=output.name, repo_id=self.repo)
            if self.there(api):
                api.delete_folder(self.checkpoints.name, repo_id=self.repo)
            api.super_squash_history(repo_id=self.repo)

        try:
            self.ask(upload)
            print(f"✅ Copiado en {self.result(output)}/")
        except UserError as error:
            print(f"⚠️  El resultado está entero en {output}/, pero no se ha podido copiar: {error}")
