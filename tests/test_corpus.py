"""Corpora: what is text and what is not, long documents, which side a text falls on, blocks, leftovers."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import engram.corpus as corpora
import engram.texts as texts
from engram.console import UserError
from engram.steps import Recipe

RECIPE = Recipe(1e-3, memory_rates=(1e-3, 1e-3), table_rates=(1e-3, 1e-3), batch=2, length=32)

pytestmark = pytest.mark.usefixtures("corpus_cache")


def test_corpus_takes_what_is_text_and_counts_and_names_the_rest(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "datos"
    (folder / "sub.py").mkdir(parents=True)
    (folder / "uno.py").write_text("x = 1\n" * 200)
    (folder / "enlace.txt").symlink_to("uno.py")  # read, as a copy would be
    (folder / "sub.py" / "dos.md").write_text("# Título\n" * 200, encoding="utf-8")
    rows = [json.dumps({"text": "hola " * 100}), "", json.dumps({"content": "adiós\u2028" * 100}, ensure_ascii=False)]
    rows += [json.dumps({"otro": 1}), "esto no es JSON", json.dumps({"text": "medio \ud800" * 9})]
    rows += ["[1]", '{"text": ""}']
    latin1 = "camión".encode("latin-1")
    (folder / "tres.jsonl").write_bytes("\n".join(rows).encode() + b"\n" + latin1 + b"\n" + b"[" * 10**5)
    (folder / "vacio.txt").write_text("")
    (folder / "blanco.txt").write_text(" \n" * texts.PIECE)
    (folder / "binario.txt").write_bytes(b"abc\0def")
    (folder / "tarde.txt").write_bytes(b"parece texto\n" * 30000 + b"\0")
    (folder / "latin1.txt").write_bytes(latin1)
    (folder / "mordido.txt").write_bytes("ñ".encode()[:1])
    (folder / "foto.png").write_bytes(b"no se mira")
    (folder / "bucle").symlink_to(folder)
    (folder / "roto.py").symlink_to("no-existe")
    (folder / "circulo.py").symlink_to("circulo.py")
    (folder / "prohibido.py").write_text("secreto = 1")
    os.mkfifo(folder / "tubo.py")
    real = open

    def forbidding(path, *args, **kwargs):
        if str(path).endswith("prohibido.py"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(texts, "open", forbidding, raising=False)
    try:
        with open(os.fsencode(folder) + b"/a\xf1o.pdf", "w"):  # of a disk whose names are in Latin-1
            pass
    except OSError:  # of one that takes no other names than UTF-8
        (folder / "a?o.pdf").touch()
    corpus = corpora.prepare_corpus(tokenizer, folder, length=8)
    assert corpus.documents == 6
    ids = [*corpus.train, *corpus.held_out]
    assert ids.count(tokenizer.eos_token_id) == 6  # documents are separated by one <|endoftext|>
    named = {
        "vacio.txt": "vacío", "blanco.txt": "vacío", "binario.txt": "binario", "tarde.txt": "binario",
        "latin1.txt": "no es UTF-8; si es antiguo, prueba --codificacion latin-1", "foto.png": "tipo .png",
        "mordido.txt": "no es UTF-8; si es antiguo, prueba --codificacion latin-1", "bucle": "enlace a una carpeta",
        "roto.py": "enlace a algo que no existe", "circulo.py": "enlace en bucle",
        "tubo.py": "no es un archivo corriente", "prohibido.py": "sin permiso de lectura", "tres.jsonl:8": "vacío",
        "tres.jsonl:5": "no es un objeto JSON", "a?o.pdf": "tipo .pdf",
        "tres.jsonl:4": "sin un campo de texto 'text', 'content' o 'code'",
        "tres.jsonl:7": "no es un objeto JSON", "tres.jsonl:10": "no es un objeto JSON",
        "tres.jsonl:9": "no es UTF-8; si es antiguo, prueba --codificacion latin-1",
    }  # fmt: skip
    assert set(corpus.skipped.examples) == {f"{folder / name} ({reason})" for name, reason in named.items()}
    assert len(corpus.skipped) == len(named) and corpus.skipped.reasons["vacío"] == 3
    assert "Se saltaron 19 archivos o líneas (" in corpus.skipped.describe()
    assert "guárdalo como .txt" in corpus.skipped.describe()
    again = corpora.prepare_corpus(tokenizer, folder, length=8)  # the names too are kept
    assert again.skipped == corpus.skipped


def test_many_skipped_files_are_all_counted_and_few_named(tmp_path, tokenizer):
    for i in range(100):
        (tmp_path / f"v{i:03d}.txt").write_text("")
    (tmp_path / "x.txt").write_text("hola " * 1000)
    skipped = corpora.prepare_corpus(tokenizer, tmp_path, length=8).skipped
    assert len(skipped) == skipped.reasons["vacío"] == 100 and len(skipped.examples) == texts.NAMED


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def unlisted(path, onerror):
        onerror(PermissionError(13, "Permission denied", str(path)))
        return iter(())

    monkeypatch.setattr(corpora.os, "walk", unlisted)
    with pytest.raises(UserError, match=r"no hay archivos.*sin permiso de lectura: 1"):
        corpora.prepare_corpus(None, tmp_path)


@pytest.mark.parametrize("line_end", ["\n", ""])
def test_long_documents_are_read_in_pieces_that_add_up_and_give_their_tail(tmp_path, line_end):
    """Also one without a single line end, with characters of two bytes across the cuts."""
    text = "".join(f"número {i}: ñandú{line_end}" for i in range(60000))
    path = tmp_path / "largo.txt"
    path.write_text(text, encoding="utf-8")
    size = path.stat().st_size
    assert size > 4 * texts.PIECE
    skipped = texts.Skipped()
    pieces = list(texts.documents([path], skipped))
    assert "".join(piece.text for piece in pieces) == text and not skipped
    assert max(len(piece.text) for piece in pieces) <= 2 * texts.PIECE
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith(line_end) for piece in pieces)
    sides = [piece.held_out for piece in pieces]
    assert sides == sorted(sides)
    held = sum(len(piece.text.encode()) for piece in pieces if piece.held_out)
    assert size // 20 <= held <= size // 20 + 30
    row = tmp_path / "fila.jsonl"
    row.write_text(json.dumps({"text": text}), encoding="utf-8")
    assert list(texts.documents([row], skipped)) == pieces


def test_long_documents_are_tokenised_piece_by_piece_once_separated(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 2**12)
    monkeypatch.setattr(corpora, "GROUP", (64, 2**13))
    (tmp_path / "largo.txt").write_text("".join(f"línea {i}\n" for i in range(3000)), encoding="utf-8")
    (tmp_path / "corto.txt").write_text("adiós\n")
    corpus = corpora.prepare_corpus(tokenizer, tmp_path, length=8)
    train, held_out = (tokenizer.decode(np.array(part)) for part in (corpus.train, corpus.held_out))
    end = tokenizer.eos_token
    assert train == "adiós\n" + end + "".join(f"línea {i}\n" for i in range(train.count("línea"))) + end
    assert held_out == "".join(f"línea {i}\n" for i in range(train.count("línea"), 3000)) + end
    assert held_out.startswith("línea 28") and corpus.documents == 2
    assert corpus.bytes_per_token == pytest.approx(len(held_out[: -len(end)].encode()) / len(corpus.held_out))


def test_a_line_without_end_in_jsonl_is_left_out_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_LINE", 2**20)
    path = tmp_path / "filas.jsonl"
    path.write_text(json.dumps({"text": "a" * 3 * 2**20}) + "\n" + json.dumps({"text": "hola"}) + "\n")
    skipped = texts.Skipped()
    assert [piece.text for piece in texts.documents([path], skipped)] == ["hola"]
    assert skipped.examples == [f"{path}:1 (línea de más de 1 MB)"]


def test_a_corpus_whose_only_text_is_drawn_to_be_held_out_is_trained_on(tmp_path, tokenizer):
    path = tmp_path / "uno.txt"
    path.write_text("hola y adiós " * 300, encoding="utf-8")

    def drawn(seed):
        return int.from_bytes(hashlib.sha256(b"%d\n%b" % (seed, path.read_bytes())).digest()[:8], "big") % 20 == 0

    corpus = corpora.prepare_corpus(tokenizer, path, length=8, seed=next(filter(drawn, range(1000))))
    assert 18 * len(corpus.held_out) < len(corpus.train) < 20 * len(corpus.held_out)


def test_tokens_and_digest_depend_on_the_text_alone(code, tmp_path, tokenizer, monkeypatch):
    first = corpora.prepare_corpus(tokenizer, code, length=32)
    there = tmp_path / "copia" / "otro nombre"
    there.mkdir(parents=True)
    for path in sorted(code.iterdir(), reverse=True):
        (there / path.name).write_bytes(path.read_bytes())
        os.utime(there / path.name, (1, 1))
    walk = os.walk
    monkeypatch.setattr(corpora.os, "walk", lambda *a, **kw: ((f, d, n[::-1]) for f, d, n in walk(*a, **kw)))
    second = corpora.prepare_corpus(tokenizer, there, length=32)
    assert second.digest == first.digest and np.array_equal(second.train, first.train)


def test_tokenising_that_was_killed_leaves_nothing_once_another_is_done(code, tokenizer, corpus_cache):
    half = corpus_cache / ".corpus-0123456789abcdef-01234567"
    half.mkdir(parents=True)
    (half / "train.bin").write_bytes(b"x" * 100)
    corpora.prepare_corpus(tokenizer, code, length=32)
    assert not half.exists() and len(list(corpus_cache.iterdir())) == 1


def test_corpus_is_tokenised_once_and_again_when_a_file_changes(code, tokenizer, monkeypatch):
    first = corpora.prepare_corpus(tokenizer, code, length=32)
    tokenise = corpora._tokenise
    monkeypatch.setattr(corpora, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    again = corpora.prepare_corpus(tokenizer, code, length=32)
    assert again.digest == first.digest and np.array_equal(again.train, first.train)
    monkeypatch.setattr(corpora, "_tokenise", tokenise)
    (code / "m00.py").write_text("y = 2\n" * 50)
    assert corpora.prepare_corpus(tokenizer, code, length=32).digest != first.digest


def test_held_out_documents_are_never_trained_on(code, tokenizer):
    for i in range(60):
        (code / f"copia{i:02d}.py").write_text((code / f"m{i:02d}.py").read_text())
    corpus = corpora.prepare_corpus(tokenizer, code, length=32)
    separate = [
        [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)]
        for ids in (np.array(corpus.train), np.array(corpus.held_out))
    ]
    held_out = [text for text in separate[1] if text]
    assert held_out and not set(held_out) & set(separate[0])
    assert len(held_out) == 2 * len(set(held_out))  # both copies fell on this side


def test_a_single_file_gives_its_tail_to_measure(tmp_path, tokenizer):
    path = tmp_path / "todo.txt"
    path.write_text("\n".join(f"línea número {i}" for i in range(2000)), encoding="utf-8")
    corpus = corpora.prepare_corpus(tokenizer, path, length=32)
    assert len(corpus.held_out) == (len(corpus.train) + len(corpus.held_out)) // texts.HELD_OUT_SHARE
    assert "1999" in tokenizer.decode(corpus.held_out) and "1999" not in tokenizer.decode(corpus.train)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No existe"), ({"a.bin": "x"}, "no hay archivos"), ({"a.txt": ""}, "ningún texto"),
                             ({"a.txt": "hola"}, "demasiado pequeño")],
)  # fmt: skip
def test_corpora_that_cannot_be_trained_on(tmp_path, tokenizer, content, message):
    folder = tmp_path / "corpus"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        corpora.prepare_corpus(tokenizer, folder, length=32)


def test_batches_cover_the_corpus_once_per_epoch_in_a_seeded_order():
    tokens = np.arange(10 * 32 + 5, dtype=np.uint16)
    epochs = [torch.cat([corpora.batch_at(tokens, i, RECIPE) for i in range(5 * e, 5 * e + 5)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 320, 32))
        assert torch.equal(epoch - epoch[:, :1], torch.arange(32).expand(10, -1))
    assert not torch.equal(*epochs)
    assert torch.equal(corpora.batch_at(tokens, 3, RECIPE), corpora.batch_at(tokens, 3, replace(RECIPE)))
    assert not torch.equal(corpora.batch_at(tokens, 0, RECIPE), corpora.batch_at(tokens, 0, replace(RECIPE, seed=1)))


def test_dataset_rows_become_documents(tokenizer, monkeypatch):
    """Through a stand-in for `datasets`, an optional package: what is asked of it, and what is taken from its rows."""
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        rows = [{"code": f"x = {i}\n" * 40, "licence": "MIT"} for i in range(80)]
        return rows if name == "ana/codigo" else [{"a": 1}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = corpora.prepare_corpus(tokenizer, dataset="ana/codigo", length=16)
    assert corpus.documents == 80 and asked == [("ana/codigo", "train", True)]
    fewer = corpora.prepare_corpus(tokenizer, dataset="ana/codigo", length=16, max_tokens=3000)
    assert len(fewer.train) + len(fewer.held_out) == 3000 and fewer.documents < 30
    with pytest.raises(UserError, match="columna de texto"):
        corpora.prepare_corpus(tokenizer, dataset="ana/otro")


def test_dataset_without_its_package_names_the_install_line(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        corpora.prepare_corpus(tokenizer, dataset="ana/codigo")


# --- texts as they are


def read(path, content, fallback=None):
    """(texts, reasons) of one file; bytes as they are, anything else as JSON."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    skipped = texts.Skipped()
    return [piece.text for piece in texts.documents([path], skipped, fallback)], list(skipped.reasons)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_are_no_text(tmp_path, encoding):
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    assert read(tmp_path / "a.txt", mark + "año 1\n".encode(encoding)) == (["año 1\n"], [])


def test_encodings_that_a_file_or_the_user_names(tmp_path):
    old = "# -*- coding: latin-1 -*-\nniño = 1\n"
    assert read(tmp_path / "a.py", old.encode("latin-1")) == ([old], [])
    for name in ("klingon", "rot13"):  # the latter is known, and no text's
        unknown, reasons = read(tmp_path / "b.py", f"# coding: {name}\nx = 'año'\n".encode("latin-1"))
        assert unknown == [] and reasons[0].startswith("no es UTF-8")
    letter = "El señor y el año\n" * 3
    assert read(tmp_path / "c.txt", letter.encode("latin-1"))[0] == []
    assert read(tmp_path / "c.txt", letter.encode("latin-1"), "latin-1") == ([letter], [])
    assert read(tmp_path / "d.txt", letter.encode(), "latin-1") == ([letter], [])  # this one is UTF-8, and says so
    assert read(tmp_path / "E.TXT", letter.encode()) == ([letter], [])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ipynb"])
def test_json_in_old_encodings(tmp_path, suffix):
    text = "El señor\u2028y el año\n"
    whole = {"cells": [{"cell_type": "code", "source": text}]} if suffix == ".ipynb" else {"text": text}
    raw = json.dumps(whole, ensure_ascii=False)
    for encoding in ("utf-16", "utf-8-sig"):
        assert read(tmp_path / f"a{suffix}", raw.encode(encoding)) == ([text], [])
    raw = raw.replace("\u2028", " ").encode("latin-1")
    hint = "no es UTF-8; si es antiguo, prueba --codificacion latin-1"
    assert read(tmp_path / f"b{suffix}", raw) == ([], [hint])
    assert read(tmp_path / f"b{suffix}", raw, "latin-1") == ([text.replace("\u2028", " ")], [])


def test_notebooks_give_their_cells_and_json_its_texts(tmp_path):
    image = {"output_type": "display_data", "data": {"image/png": "iVBOR" * 50000}}
    cells = [
        {"cell_type": "markdown", "source": ["# Título\n", "y más"]},
        {"cell_type": "code", "source": "x = 1\nx\n", "outputs": [image]},
        {"cell_type": "raw", "source": "nada"}, {"cell_type": "code", "source": []},
    ]  # fmt: skip
    assert read(tmp_path / "a.ipynb", {"cells": cells}) == (["# Título\ny más\n\nx = 1\nx\n"], [])
    old = {"worksheets": [{"cells": [{"cell_type": "code", "input": ["y = 2"]}]}]}
    assert read(tmp_path / "b.ipynb", old) == (["y = 2\n"], [])
    assert read(tmp_path / "c.ipynb", [1, 2]) == ([], ["no es un cuaderno"])
    several = ["uno", {"text": "dos"}, {"code": "tres"}, 4]
    assert read(tmp_path / "d.json", several) == (["uno", "dos", "tres"], ["sin texto"])
    assert read(tmp_path / "e.json", {"content": "cuatro"}) == (["cuatro"], [])
    assert read(tmp_path / "f.json", {"otra": 1})[1] == ["sin un campo de texto 'text', 'content' o 'code'"]
    assert read(tmp_path / "g.json", b"{")[1] == ["no es JSON"]


def test_files_of_other_kinds_are_refused_alone_and_counted_in_folders(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("uno;dos\n")
    with pytest.raises(UserError, match=r"«a.csv»: los archivos .csv no se leen. Se leen .py, .*guárdalo como .txt"):
        corpora.prepare_corpus(tokenizer, tmp_path / "a.csv")
    (tmp_path / "B.PY").write_text("x = 1\n" * 200)
    (tmp_path / "LICENSE").write_text("nada")
    corpus = corpora.prepare_corpus(tokenizer, tmp_path, length=8)
    assert corpus.documents == 1 and corpus.skipped.reasons == {"tipo .csv": 1, "sin extensión": 1}


def test_a_special_token_in_a_text_is_text(tmp_path, tokenizer):
    before = tokenizer("<|endoftext|>").input_ids
    (tmp_path / "a.txt").write_text("fin <|endoftext|> y más\n" * 100)
    corpus = corpora.prepare_corpus(tokenizer, tmp_path, length=8)
    ids = [*corpus.train, *corpus.held_out]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "fin <|endoftext|> y más\n" * 100
    assert tokenizer("<|endoftext|>").input_ids == before == [tokenizer.eos_token_id]


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path, tokenizer, corpus_cache, monkeypatch, capsys):
    folders = {}
    for name in "abac":
        (tmp_path / f"{name}.txt").write_text(f"{name} uno dos\n" * 1000)
        os.utime(tmp_path / f"{name}.txt", (1, 1))
        known = {path.name for path in corpus_cache.glob("corpus-*")}
        corpora.prepare_corpus(tokenizer, tmp_path / f"{name}.txt", length=8)
        new = {path.name for path in corpus_cache.glob("corpus-*")} - known
        assert len(new) == (name not in folders)
        folders.setdefault(name, *new)
        size = sum(file.stat().st_size for file in (corpus_cache / folders[name]).iterdir())
        monkeypatch.setattr(corpora, "CACHED", 2.5 * size)
    assert {path.name for path in corpus_cache.glob("corpus-*")} == {folders["a"], folders["c"]}
    assert "se han borrado 1 textos ya tokenizados" in capsys.readouterr().out


def test_a_dataset_read_before_serves_without_network(tmp_path, tokenizer, monkeypatch, capsys):
    pytest.importorskip("datasets", reason="pip install datasets")
    rows = [json.dumps({"text": f"número {i} " * 30}) + "\n" for i in range(60)]
    (tmp_path / "mio").mkdir()
    (tmp_path / "mio" / "train.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    first = corpora.prepare_corpus(tokenizer, dataset="mio", length=8)
    assert first.documents == 60 and not first.skipped
    (tmp_path / "mio").rename(tmp_path / "lejos")
    again = corpora.prepare_corpus(tokenizer, dataset="mio", length=8)
    assert again.digest == first.digest and "Sigo con lo que se leyó la última vez" in capsys.readouterr().out


def test_max_tokens_is_kept_to_the_token(tmp_path, tokenizer):
    """Of a group of texts that the tokenizer gets at once, too, and within a text."""
    for i in range(40):
        (tmp_path / f"{i:02}.py").write_text(f"name_{i} = {i}\n" * 60)
    whole = corpora.prepare_corpus(tokenizer, tmp_path, length=16)
    everything = len(whole.train) + len(whole.held_out)
    for limit in (1000, 4321, everything, 10 * everything):
        corpus = corpora.prepare_corpus(tokenizer, tmp_path, length=16, max_tokens=limit)
        assert len(corpus.train) + len(corpus.held_out) == min(limit, everything)
        # Bytes of the cut text are those of its tokens: a little more or less per token than of the whole
        assert corpus.bytes_per_token == pytest.approx(whole.bytes_per_token, rel=0.2)


def test_a_corpus_that_is_too_small_says_how_much_is_needed(tmp_path, tokenizer):
    (tmp_path / "uno.py").write_text("name = 1\n" * 100)
    with pytest.raises(UserError) as told:
        corpora.prepare_corpus(tokenizer, tmp_path, length=64)
    there = len(tokenizer("name = 1\n" * 100).input_ids) + 1
    size = round(20 * 64 * 900 / there / 1000)
    assert f"hay {there} tokens y con bloques de 64 hacen falta unos 1.280 ({size} kB" in str(told.value)
    assert f"baja --longitud a {there // 20} o menos" in str(told.value) and "--max-tokens" not in str(told.value)
    corpora.prepare_corpus(tokenizer, tmp_path, length=there // 20 - 1)
    with pytest.raises(UserError, match=r"medir\. Sube --max-tokens a 1280 o baja --longitud a 5 o menos\."):
        corpora.prepare_corpus(tokenizer, tmp_path, length=64, max_tokens=100)
