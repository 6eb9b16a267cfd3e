"""Corpora: what is text and what is not, long documents, which side a text falls on, blocks, leftovers."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corpus_phi_engram as corpora
from load_phi_engram import UserError
from train_phi_engram import Recipe

RECIPE = Recipe(1e-3, memory_rates=(1e-3, 1e-3), table_rates=(1e-3, 1e-3), batch=2, length=32)

pytestmark = pytest.mark.usefixtures("corpus_cache")


def test_corpus_takes_what_is_text_and_names_the_rest(tmp_path, tokenizer):
    folder = tmp_path / "datos"
    (folder / "sub").mkdir(parents=True)
    (folder / "uno.py").write_text("x = 1\n" * 200)
    (folder / "sub" / "dos.md").write_text("# Título\n" * 200, encoding="utf-8")
    rows = [json.dumps({"text": "hola " * 100}), "", json.dumps({"content": "adiós\u2028" * 100}, ensure_ascii=False)]
    rows += [json.dumps({"otro": 1}), "esto no es JSON"]
    (folder / "tres.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "vacio.txt").write_text("")
    (folder / "binario.txt").write_bytes(b"abc\0def")
    (folder / "latin1.txt").write_bytes("camión".encode("latin-1"))
    (folder / "foto.png").write_bytes(b"no se mira")
    (folder / "bucle").symlink_to(folder)
    corpus = corpora.prepare_corpus(tokenizer, folder, length=8)
    assert corpus.documents == 4
    assert len(corpus.skipped) == 6
    named = ["vacio.txt (vacío)", "binario.txt (binario)", "latin1.txt (no es UTF-8)", "bucle (enlace a una carpeta)"]
    named += ["tres.jsonl:4 (sin un campo", "tres.jsonl:5 (no es un objeto JSON)"]
    for name in named:
        assert any(name in line for line in corpus.skipped.examples), name
    ids = [*corpus.train, *corpus.held_out]
    assert ids.count(tokenizer.eos_token_id) == 4  # documents are separated by one <|endoftext|>


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
    assert len(corpus.held_out) == (len(corpus.train) + len(corpus.held_out)) // corpora.HELD_OUT_SHARE
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
    fewer = corpora.prepare_corpus(tokenizer, dataset="ana/codigo", length=16, max_tokens=1)
    assert fewer.documents == 64  # read in groups; no further group is asked for
    with pytest.raises(UserError, match="columna de texto"):
        corpora.prepare_corpus(tokenizer, dataset="ana/otro")


def test_dataset_without_its_package_names_the_install_line(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        corpora.prepare_corpus(tokenizer, dataset="ana/codigo")
