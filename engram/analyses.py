"""Look inside a trained model: what the memory does, layer by layer, token by token, row by row.

    python verify_phi_engram.py --profundidad phi1-engram-demo                     # against phi1-engram-demo-control/
    python verify_phi_engram.py --profundidad phi1-engram-trained --contra microsoft/phi-1 --datos mi-codigo/

Five analyses beside a twin without memory, over text held out from training: LogitLens (paper §6.1.1), CKA (§6.1.2),
gates (§6.5), ablation (§6.3) and the health of the tables. They leave pictures, the numbers as JSON and a report in
Spanish. The text streams through in small batches, so that little is needed beyond what the open models take.

Shapes: B blocks of T tokens, d hidden size, V vocabulary, S states: state 0 is the embedding (called "entrada"), state
i + 1 is what layer i gives, counted from 0 as everywhere in this project.
"""

import ast
import io
import json
import keyword
import sys
import time
import tokenize
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

try:
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import PhiForCausalLM

    from engram.console import UserError, gigabytes, peak_memory, spanish
    from engram.folders import whole_folder
    from engram.opening import explained, find_model, open_model, open_tokenizer, read_config, where_from
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )

OUTPUT = "profundidad"
LENGTH, BLOCKS = 256, 256  # tokens per block and most blocks: those on which the demo's training measures its loss
POINTS = 256  # probe points per minibatch of CKA
SEEN_OFTEN = 5  # times that an n-gram has to occur before its mean gate is believed
KINDS = (
    "palabra clave", "nombre", "número", "cadena", "comentario", "operador", "sangría y saltos de línea",
    "sin clasificar",
)  # fmt: skip
KEYWORD, NAME, NUMBER, STRING, COMMENT, OPERATOR, WHITE, OTHER = range(len(KINDS))
PROBES = {"nombres": "el final de los nombres de varios tokens", "todos": "todos los tokens"}
SIZES = (1, 4, 16, 64)  # multiples of the present tables for which collisions are foretold


# ----------------------------------------------------------------------------------------------------------------------
# Text: held-out blocks, and what each token is in Python's own eyes
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Blocks of text and what each token is."""

    ids: torch.LongTensor  # [B, T]
    kinds: torch.Tensor  # uint8 [B, T], index into KINDS
    names: torch.Tensor  # bool [B, T]: last token of a Python name that takes several tokens
    train: np.ndarray  # the tokens of the same corpus that a training run would read
    origin: str  # Spanish, for the report


def label_text(text: str) -> tuple[np.ndarray, np.ndarray]:
    """What each character is, by Python's own tokenizer.

    Returns:
        kind uint8 [characters], and which name it belongs to, int32 [characters], 0 for none.
    Raises:
        SyntaxError, tokenize.TokenError, ValueError: it is no Python that this interpreter understands.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        ast.parse(text)  # the tokenizer alone takes prose for a row of names
    kinds, names = np.full(len(text), WHITE, np.uint8), np.zeros(len(text), np.int32)
    line_starts = np.cumsum([0, *(len(line) for line in text.split("\n"))]) + np.arange(text.count("\n") + 2)
    for number, token in enumerate(tokenize.generate_tokens(io.StringIO(text).readline), 1):
        start, end = (line_starts[row - 1] + column for row, column in (token.start, token.end))
        label = tokenize.tok_name[token.type]
        if label == "NAME":
            if text[start:end] != token.string:
                raise ValueError("line ends that Python counts otherwise")
            kinds[start:end] = KEYWORD if keyword.iskeyword(token.string) else NAME
            names[start:end] = number
        elif label == "STRING" or "STRING_" in label:  # pieces of f-strings since Python 3.12
            kinds[start:end] = STRING
        elif label in ("NUMBER", "COMMENT", "OP"):
            kinds[start:end] = {"NUMBER": NUMBER, "COMMENT": COMMENT, "OP": OPERATOR}[label]
    return kinds, names


def label_tokens(ids: list[int], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Kind of each model token of one document, by its first character that is not white, and the last tokens of names.

    Args:
        ids: tokens of a byte-level BPE, as Phi's is: one character of a token's string per byte.
    Returns:
        uint8 [n], bool [n]; all OTHER and False for a document that is no Python.
    """
    unknown = np.full(len(ids), OTHER, np.uint8), np.zeros(len(ids), bool)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ends = np.cumsum([len(piece) for piece in tokenizer.convert_ids_to_tokens(ids)])
    if not len(ids) or ends[-1] != len(text.encode("utf-8", "replace")):
        return unknown
    try:
        kinds, names = label_text(text)
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError):
        return unknown
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)  # bytes of each character
    kinds, names = np.repeat(kinds, width), np.append(np.repeat(names, width), 0)
    starts = np.append(0, ends[:-1])
    # Next byte, from each on, that is not white.
    places = np.where(kinds != WHITE, np.arange(len(kinds)), len(kinds))
    visible = np.minimum.accumulate(places[::-1])[::-1][starts]
    token_kinds = np.where(visible < ends, kinds[np.minimum(visible, len(kinds) - 1)], WHITE)
    goes_on = (names[starts] > 0) & (names[starts] == names[starts - 1])  # before the first: the 0 appended above
    return token_kinds.astype(np.uint8), goes_on & (names[ends] != names[starts])


def held_out_blocks(tokenizer, source, n_blocks: int, length: int) -> Sample:
    """Blocks spread evenly over the part of a corpus that `train_phi_engram.py` never trains on (seed 0).

    A corpus whose part is too small for that is taken whole, and the report says so.

    Raises:
        UserError: not even two blocks of text.
    """
    from engram.corpus import prepare_corpus

    corpus = prepare_corpus(tokenizer, source, length=0)
    tokens, origin = corpus.held_out, f"{corpus.name}, la parte que el entrenamiento aparta con la semilla 0"
    if len(tokens) < 8 * length:
        tokens = np.concatenate((corpus.train, corpus.held_out))
        origin = f"{corpus.name}, entero por ser corto: si el modelo se entrenó con él, no es texto apartado"
    if len(tokens) < 2 * length:
        raise UserError(
            f"El texto de «{corpus.name}» es demasiado corto: {spanish(len(tokens))} tokens, y hacen falta al menos "
            f"{2 * length}. Añade archivos a --datos, o quítalo para usar la biblioteca estándar de Python."
        )
    ends = np.append(np.flatnonzero(tokens == tokenizer.eos_token_id), len(tokens))

    @lru_cache(maxsize=4)
    def labels(document):
        start, stop = ends[document - 1] + 1 if document else 0, ends[document]
        return label_tokens(tokens[start:stop].tolist(), tokenizer)

    count = len(tokens) // length
    chosen = np.unique(np.linspace(0, count - 1, min(count, n_blocks)).astype(int))
    kinds, names = np.full((len(chosen), length), OTHER, np.uint8), np.zeros((len(chosen), length), bool)
    for row, start in enumerate(tqdm(chosen * length, desc="Clasificando el texto", unit=" bloque")):
        for document in range(np.searchsorted(ends, start), np.searchsorted(ends, start + length) + 1):
            first = ends[document - 1] + 1 if document else 0
            a, b = max(first, start), min(ends[min(document, len(ends) - 1)], start + length)
            if a < b:
                piece = slice(a - start, b - start)
                kinds[row, piece], names[row, piece] = (part[a - first : b - first] for part in labels(document))
    ids = np.stack([tokens[start : start + length] for start in chosen * length]).astype(np.int64)
    return Sample(*map(torch.from_numpy, (ids, kinds, names)), corpus.train, origin)


# ----------------------------------------------------------------------------------------------------------------------
# Reading a model from outside: hooks that go away again
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def outputs_of(modules: dict):
    """{key: module} -> a dict that each forward pass fills with {key: the module's output, the first if it is many}."""
    found = {}

    def keep(key):
        def hook(module, args, output):
            found[key] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gates(model) -> dict:
    return {i: model.model.layers[i].engram.gate for i in getattr(model.config, "engram_layer_ids", ())}


@torch.no_grad()
def gate_values(model, input_ids: torch.LongTensor, attention_mask=None) -> dict[int, torch.Tensor]:
    """How far each token opens the memory's gates, alpha of eq. 4.

    Args:
        input_ids: int64 [B, T]; attention_mask: [B, T], 0 for padding.
    Returns:
        {layer: float32 [B, T] in 0..1}; 0.5 where all rows read are zero; {} with the memory off.
    """
    with outputs_of(gates(model)) as found:
        model.model(input_ids, attention_mask=attention_mask, use_cache=False)
    return {layer: alpha.squeeze(-1) for layer, alpha in found.items()}


def run_states(model, ids) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """The S states [B, T, d] of one forward pass, before the final norm, and the gates as `gate_values` gives them.

    Works for transformers' Phi too, which has no gates.
    """
    watched = {-1: model.model.embed_tokens, **dict(enumerate(model.model.layers))}
    with outputs_of(watched) as states, outputs_of(gates(model)) as alphas:
        model.model(ids, use_cache=False)
    return [states[key] for key in watched], {layer: alpha.squeeze(-1) for layer, alpha in alphas.items()}


@contextmanager
def memory_off(model):
    before, model.model.use_memory = model.model.use_memory, False
    try:
        yield
    finally:
        model.model.use_memory = before


@contextmanager
def without_order(model, order: int):
    """Meanwhile the heads of one n-gram order answer zero, as rows never trained do."""
    heads = model.config.n_head_per_ngram

    def hook(module, args, rows):
        rows = rows.clone()
        rows[..., (order - 2) * heads : (order - 1) * heads, :] = 0
        return rows

    hooks = [table.register_forward_hook(hook) for table in model.model.engram_tables.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------------------------------------
# LogitLens and loss
# ----------------------------------------------------------------------------------------------------------------------


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats over the last dimension: log-probabilities [..., V] -> [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def read_out(model, hidden: torch.Tensor) -> torch.Tensor:
    """A state read as if it were the last, through final norm and head: [n, d] -> log-probabilities float32 [n, V]."""
    return model.lm_head(model.model.final_layernorm(hidden)).float().log_softmax(-1)


def lens(model, states: list[torch.Tensor], ids: torch.LongTensor):
    """LogitLens (paper §6.1.1) and loss of a batch. Logits exist for a few tokens of two states at a time.

    Args:
        states: each [B, T, d], the last one last; a single one gives the loss alone.
    Returns:
        KL(final ‖ state) in nats, float64 [S, B], mean over the block; share of tokens whose likeliest next token is
        already the final one, float64 [S, B]; loss in nats of the tokens from the second on, float32 [B, T-1].
    """
    n_blocks, length = ids.shape
    kl, agree = torch.zeros(2, len(states), n_blocks, dtype=torch.float64)
    loss = torch.zeros(n_blocks, length)
    targets = ids.roll(-1, dims=1)  # the last column is dropped below
    step = max(16, 2**22 // model.config.vocab_size)  # 16 MB of logits
    for block in range(n_blocks):
        for start in range(0, length, step):
            part = slice(start, start + step)
            final = read_out(model, states[-1][block, part])
            loss[block, part] = -final.gather(-1, targets[block, part, None])[:, 0].cpu()
            for s, state in enumerate(states[:-1]):
                early = read_out(model, state[block, part])
                kl[s, block] += kl_divergence(final, early).double().sum().cpu() / length
                agree[s, block] += (early.argmax(-1) == final.argmax(-1)).sum().cpu() / length
    agree[-1] = 1
    return kl, agree, loss[:, :-1]


def mean_and_error(values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Mean of the chosen tokens, and its standard error with blocks, not tokens, as what was drawn.

    Args:
        values: float [B, T]; mask: bool [B, T].
    Returns:
        mean and error. From a single block nothing is known of the error: then it is as large as the mean.
    """
    used = mask.any(1)
    values, mask = values[used], mask[used]
    count = mask.sum(1).double()
    total = (values.double() * mask).sum(1)
    mean = total.sum() / count.sum()
    spread = (total - mean * count).square().sum() * len(count) / max(1, len(count) - 1)
    return mean.item(), (spread.sqrt() / count.sum() if len(count) > 1 else mean.abs()).item()


# ----------------------------------------------------------------------------------------------------------------------
# CKA
# ----------------------------------------------------------------------------------------------------------------------


def gram(features: torch.Tensor) -> torch.Tensor:
    """Linear kernel of S states at n points without its diagonal: [S, n, d] -> float64 [S, n, n]."""
    kernels = []
    for x in features:
        x = x.double() - x.double().mean(0)  # changes nothing in the estimate and keeps it from rounding
        kernels.append((x @ x.T).fill_diagonal_(0))
    return torch.stack(kernels)


def unbiased_hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC (Song et al., 2012; paper eq. 8) of every pair of kernels with zero diagonals.

    Args:
        a: [S, n, n]; b: [S', n, n]; n at least 4.
    Returns:
        float64 [S, S'].
    """
    n = a.shape[-1]
    trace = a.flatten(1) @ b.flatten(1).T  # both are symmetric
    sums = a.sum((1, 2))[:, None] * b.sum((1, 2)) / ((n - 1) * (n - 2))
    cross = a.sum(2) @ b.sum(2).T * 2 / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def alignment(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """Soft alignment (paper eq. 9): centre of the k columns most similar to each row, weighted by the similarity.

    Args:
        similarity: CKA [S, S'].
    Returns:
        float64 [S], in columns from 0.
    """
    values, columns = similarity.topk(k)
    weights = values.clamp_min(1e-12)
    return (weights * columns).sum(1) / weights.sum(1)


class RunningCKA:
    """CKA of the states of two models from HSIC summed over minibatches (Nguyen et al., 2021).

    What it keeps does not grow with the text: one minibatch of states, and the sums of the even and of the odd ones,
    whose disagreement shows the noise.
    """

    def __init__(self, points: int = POINTS):
        self.points, self.pending, self.batches, self.sums = points, [], 0, [0, 0]

    def add(self, a: torch.Tensor, b: torch.Tensor):
        """[S, n, d] and [S', n, d']: states of both models at the same n points, any n."""
        self.pending = [torch.cat(pair, dim=1) for pair in zip(self.pending, (a, b))] if self.pending else [a, b]
        while self.pending[0].shape[1] >= self.points:
            self._take(self.points)

    def _take(self, points):
        a, b = (gram(states[:, :points]) for states in self.pending)
        self.pending = [states[:, points:].clone() for states in self.pending]
        new = torch.stack([unbiased_hsic(*pair).cpu() for pair in ((a, b), (a, a), (b, b))])
        self.sums[self.batches % 2] = self.sums[self.batches % 2] + new
        self.batches += 1

    def result(self, k: int) -> dict | None:
        """Matrix [S][S'], alignment [S], that of the twin with itself as reference, and noise; None without points."""
        if not self.batches and self.pending and self.pending[0].shape[1] >= 8:
            self._take(self.pending[0].shape[1])
        if not self.batches:
            return None

        def curves(sums):
            ab, aa, bb = sums
            matrix = ab / (aa.diag()[:, None] * bb.diag()).sqrt()
            own = bb / (bb.diag()[:, None] * bb.diag()).sqrt()
            matrix, own = matrix.nan_to_num(0), own.nan_to_num(0)  # a state that is the same everywhere is like none
            return matrix, alignment(matrix, k), alignment(own, k)

        matrix, aligned, own = curves(self.sums[0] + self.sums[1])
        (_, a, own_a), (_, b, own_b) = map(curves, self.sums if self.batches > 1 else self.sums[:1] * 2)
        noise = (a - own_a - b + own_b).abs() / 2
        found = dict(matriz=matrix, alineacion=aligned, propia=own, ruido=noise)
        return dict(minilotes=self.batches, **{key: values.tolist() for key, values in found.items()})


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def ngram_codes(canonical: np.ndarray, pad: int, max_order: int) -> dict[int, np.ndarray]:
    """Number the true n-grams that end at each token, without any hash: {order: int64 [B, T], from 0 on}.

    Args:
        canonical: projected tokens, int64 [B, T], as the hash sees them.
        pad: projected token that stands before the start.
    """
    codes, current = {}, canonical
    size = int(max(canonical.max(), pad)) + 1
    for back in range(1, max_order):
        before = np.pad(canonical, ((0, 0), (back, 0)), constant_values=pad)[:, : canonical.shape[1]]
        current = np.unique(current * size + before, return_inverse=True)[1].reshape(canonical.shape)
        codes[back + 1] = current
    return codes


def foretold_sharing(n_ngrams: int, rows: int) -> float:
    """Share of n-grams that share their row, were they thrown at random: 1 - (1 - 1/rows)^(n-1)."""
    return 1 - (1 - 1 / rows) ** max(0, n_ngrams - 1)


@torch.no_grad()
def row_norms(table, n_rows: int, device) -> np.ndarray:
    """Euclidean norm of every row, float32 [n_rows]; read through the table, wherever its rows live."""
    return np.concatenate(
        [
            table(torch.arange(start, min(start + 2**14, n_rows), device=device)[None, :, None]).float().norm(dim=-1)
            .flatten().cpu().numpy()
            for start in range(0, n_rows, 2**14)
        ]
    )  # fmt: skip


def table_health(model, sample: Sample) -> dict:
    """Use, collisions and training of the rows, by layer, order and head, over the sample's look-ups."""
    config, module = model.config, model.model.engram_hash
    token_map, primes = module.token_map.cpu().numpy(), module.primes.cpu().numpy()
    pad, orders, heads = token_map[config.engram_pad_id], range(2, config.max_ngram_size + 1), config.n_head_per_ngram
    codes = ngram_codes(token_map[sample.ids.numpy()], pad, config.max_ngram_size)
    counts = {order: int(code.max()) + 1 for order, code in codes.items()}
    firsts = {order: np.unique(code, return_index=True)[1] for order, code in codes.items()}
    read = [model.model.ngram_indices(part.to(model.device)) for part in sample.ids.split(16)]
    layers = {}
    for i, layer in enumerate(config.engram_layer_ids):
        indices = torch.cat([part[layer].cpu() for part in read]).flatten(0, 1).numpy()  # [B*T, H]
        norms = row_norms(model.model.engram_tables[str(layer)], int(primes[i].sum()), model.device)
        offsets, found = module.offsets[i].tolist(), []
        for head in range(len(orders) * heads):
            order, n_rows, index = 2 + head // heads, int(primes[i].flat[head]), indices[:, head]
            rows, own = index[firsts[order]], norms[offsets[head] :][:n_rows]
            sharing = np.bincount(rows, minlength=n_rows) > 1
            found.append(
                dict(
                    orden=order, cabeza=head % heads, filas=n_rows, filas_leidas=int(len(np.unique(rows))),
                    filas_entrenadas=float((own > 0).mean()), norma=float(own[own > 0].mean()) if own.any() else 0.0,
                    ngramas_que_chocan=float(sharing[rows].mean()), consultas_que_chocan=float(sharing[index].mean()),
                    previsto=foretold_sharing(counts[order], n_rows), sin_entrenar=float((own[index] == 0).mean()),
                )  # fmt: skip
            )
        layers[str(layer)] = found
    stream = token_map[np.asarray(sample.train[: 2**22], np.int64)][None]
    trained = {} if not stream.size else ngram_codes(stream, pad, config.max_ngram_size)
    return dict(
        ngramas={str(order): count for order, count in counts.items()}, capas=layers,
        entrenamiento=dict(
            tokens=int(stream.size), ngramas={str(order): int(code.max()) + 1 for order, code in trained.items()}
        ),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Everything in one pass
# ----------------------------------------------------------------------------------------------------------------------


def gate_numbers(alpha: dict[int, torch.Tensor], model, tokenizer, sample: Sample) -> dict:
    """Statistics of the gates [B, T] of each layer, the n-grams at both ends, and one block of text token by token."""
    config = model.config
    token_map, order = model.model.engram_hash.token_map.cpu().numpy(), config.max_ngram_size
    canonical, pad = token_map[sample.ids.numpy()], token_map[config.engram_pad_id]
    code = ngram_codes(canonical, pad, order)[order][:, order - 1 :]  # those that begin within the block
    _, first, inverse, times = np.unique(code, return_index=True, return_inverse=True, return_counts=True)

    def words(ngram):
        block, end = divmod(int(first[ngram]), code.shape[1])
        return tokenizer.decode(sample.ids[block, end : end + order], clean_up_tokenization_spaces=False)

    layers = {}
    for layer, values in alpha.items():
        inner = values[:, order - 1 :].double().numpy().ravel()
        mean = np.bincount(inverse.ravel(), inner) / times
        highest = np.zeros(len(times))
        np.maximum.at(highest, inverse.ravel(), inner)
        often = np.flatnonzero(times >= SEEN_OFTEN)
        often = often[np.argsort(mean[often])]
        never = often[highest[often] < 0.5]
        listed = {"abren": often[::-1][:12], "nunca_abren": never[:12]}
        layers[str(layer)] = dict(
            media=values.mean().item(), desviacion=values.std().item(), minima=values.min().item(),
            maxima=values.max().item(), abierta=(values > 0.5).double().mean().item(),
            extrema=((values - 0.5).abs() > 0.25).double().mean().item(), ngramas=len(often),
            ngramas_que_nunca_abren=len(never),
            por_clase={KINDS[k]: values[sample.kinds == k].mean().item() for k in sample.kinds.unique().tolist()},
            **{
                key: [dict(ngrama=words(n), veces=int(times[n]), media=mean[n], maxima=highest[n]) for n in chosen]
                for key, chosen in listed.items()
            },
        )  # fmt: skip
    keywords = sample.ids.masked_fill(sample.kinds != KEYWORD, -1)
    block = max(range(len(keywords)), key=lambda row: len(keywords[row].unique()))  # the one most like code
    pieces, shown = [], 0
    for end in range(1, sample.ids.shape[1] + 1):
        text = tokenizer.decode(sample.ids[block, :end], clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd")  # else a character cut between tokens, shown with the last of them
        pieces.append(text[shown:] if whole else "")
        shown = len(text) if whole else shown
    return dict(
        capas=layers, trozos=pieces,
        alfa={str(layer): values[block].tolist() for layer, values in alpha.items()},
    )  # fmt: skip


@torch.no_grad()
def analyse(model, twin, tokenizer, sample: Sample) -> dict:
    """All five analyses as plain numbers, ready for JSON.

    Args:
        model: PhiEngramForCausalLM; twin: a plain Phi of the same depth and vocabulary on the same device, or None for
            the same model with its memory off.
    """
    config, length = model.config, sample.ids.shape[1]
    tables = table_health(model, sample)  # before any state is held
    orders = range(2, config.max_ngram_size + 1)
    n_states, generator = config.num_hidden_layers + 1, torch.Generator().manual_seed(0)
    ckas = {key: RunningCKA() for key in PROBES}
    lenses = {"modelo": [], "gemelo": []}
    losses = {key: [] for key in ("con memoria", "sin memoria", *(f"sin orden {n}" for n in orders), "gemelo")}
    alphas = []
    size = max(1, min(8, 2**19 // (length * config.hidden_size)))  # all states of a batch are held at once

    def last_state(ids):
        return run_states(model, ids)[0][-1:]

    for part in tqdm(torch.arange(len(sample.ids)).split(size), desc="Midiendo", unit=" lote"):
        ids = sample.ids[part].to(model.device)
        states, alpha = run_states(model, ids)
        alphas.append({layer: values.cpu() for layer, values in alpha.items()})
        *measured, loss = lens(model, states, ids)
        lenses["modelo"].append(torch.stack(measured))
        losses["con memoria"].append(loss)
        with memory_off(model):
            others, _ = run_states(twin or model, ids)
            if twin is not None:
                losses["sin memoria"].append(lens(model, last_state(ids), ids)[-1])
        *measured, loss = lens(twin or model, others, ids)
        lenses["gemelo"].append(torch.stack(measured))
        losses["gemelo" if twin is not None else "sin memoria"].append(loss)
        probes = sample.names[part].flatten().nonzero()[:, 0], torch.randperm(ids.numel(), generator=generator)
        for cka, places in zip(ckas.values(), probes):
            places = places.to(model.device)
            cka.add(*(torch.stack([state.flatten(0, 1)[places] for state in both]) for both in (states, others)))
        for order in orders:
            with without_order(model, order):
                losses[f"sin orden {order}"].append(lens(model, last_state(ids), ids)[-1])
        del states, others  # or the next batch's would stand beside them

    lenses = {key: torch.cat(parts, dim=-1) for key, parts in lenses.items()}  # [2, S, B]
    everywhere = torch.ones(len(sample.ids), 1, dtype=torch.bool)
    gaps = [mean_and_error(gap[:, None], everywhere) for gap in (lenses["modelo"] - lenses["gemelo"])[0]]
    logitlens = {key: dict(zip(("kl", "acuerdo"), both.mean(-1).tolist())) for key, both in lenses.items()}
    losses = {key: torch.cat(parts) for key, parts in losses.items() if parts}
    masks = {kind: sample.kinds[:, 1:] == k for k, kind in enumerate(KINDS)}
    masks = {"todos": torch.ones_like(masks[KINDS[0]])} | {kind: mask for kind, mask in masks.items() if mask.any()}
    if not all(loss.isfinite().all() for loss in losses.values()):
        raise UserError("El modelo da pérdidas que no son números: sus pesos están dañados. Vuelve a copiarlo entero.")
    base, k = losses.pop("con memoria"), min(5, max(2, n_states // 5))  # the paper's 5 are a sixth of its layers
    ablation = {
        kind: dict(
            tokens=int(mask.sum()), perdida=mean_and_error(base, mask)[0],
            cambios={key: mean_and_error(loss - base, mask) for key, loss in losses.items()},
        )
        for kind, mask in masks.items()
    }  # fmt: skip
    alpha = {layer: torch.cat([part[layer] for part in alphas]) for layer in alphas[0]}
    return dict(
        logitlens=dict(**logitlens, diferencia=gaps),
        cka=dict(k=k, **{key: cka.result(k) for key, cka in ckas.items()}),
        puertas=gate_numbers(alpha, model, tokenizer, sample), ablacion=ablation, tablas=tables,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("Los dibujos necesitan un paquete más. Instálalo con: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def commas(axis, digits: int):
    axis.set_major_formatter(lambda value, place: spanish(value, digits))


def layer_names(states) -> list[str]:
    return ["entrada", *map(str, range(len(states) - 1))]


def draw_lens(numbers, plt):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for key, label, style in (("modelo", "con memoria", "o-"), ("gemelo", numbers["gemelo"], "s--")):
        found = numbers["logitlens"][key]
        left.plot(found["kl"], style, label=label)
        right.plot([100 * share for share in found["acuerdo"]], style, label=label)
    left.set(title="Distancia a la predicción final", ylabel="KL (nats)", ylim=(0, None))
    right.set(title="El token más probable ya es el final", ylabel="% de los tokens", ylim=(0, 103))
    commas(left.yaxis, 1)
    for axis in (left, right):
        axis.set_xticks(range(len(found["kl"])), layer_names(found["kl"]), rotation=90 * (len(found["kl"]) > 10))
        axis.set_xlabel("tras la capa")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def draw_cka(numbers, plt):
    found = {PROBES[key]: numbers["cka"][key] for key in PROBES if numbers["cka"][key]}
    figure, axes = plt.subplots(1, len(found), figsize=(5.4 * len(found), 5), layout="constrained", squeeze=False)
    for axis, (title, one) in zip(axes[0], found.items()):
        names = layer_names(one["matriz"])
        image = axis.imshow(one["matriz"], vmin=0, vmax=1, origin="lower", cmap="viridis")
        for row, values in enumerate(one["matriz"] if len(names) <= 10 else []):
            for column, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                axis.text(column, row + 0.25, spanish(value, 2), ha="center", color=colour, fontsize=8)
        axis.plot(one["alineacion"], range(len(names)), "o-", color="red", label="alineación")
        axis.plot(one["propia"], range(len(names)), "x:", color="white", label=f"{numbers['gemelo']} consigo mismo")
        axis.set_xticks(range(len(names)), names, rotation=90 * (len(names) > 10))
        axis.set_yticks(range(len(names)), names)
        axis.set(title=title, xlabel=f"capa, {numbers['gemelo']}", ylabel="capa, con memoria")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, facecolor="lightgrey")
    commas(figure.colorbar(image, ax=axes[0].tolist(), label="CKA (1: iguales)").ax.yaxis, 1)
    return figure


def draw_gates(numbers, plt, columns: int = 88, lines: int = 24):
    """The text token by token on a grid of characters, one panel per layer, each token shaded by its gate."""
    found = numbers["puertas"]
    span = max(0.05, max(abs(value - 0.5) for values in found["alfa"].values() for value in values))
    shades = plt.matplotlib.cm.ScalarMappable(plt.Normalize(0.5 - span, 0.5 + span), "coolwarm")
    cells, x, y = [], 0, 0  # (column, line, character, token)
    for token, piece in enumerate(found["trozos"]):
        for character in piece.replace("\t", "    "):
            if x == columns:
                x, y = 0, y + 1
            known = character.isprintable() and ord(character) < 0x250  # what every font has
            cells.append((x, y, "↵" if character == "\n" else character if known else "□", token))
            x, y = (0, y + 1) if character == "\n" else (x + 1, y)
    cells = [cell for cell in cells if cell[1] < lines]
    height, size = cells[-1][1] + 1, len(found["alfa"])
    figure, axes = plt.subplots(
        size, 1, figsize=(columns * 0.1 + 1.2, size * (height * 0.19 + 0.5)), layout="constrained", squeeze=False
    )
    for axis, (layer, alpha) in zip(axes[:, 0], found["alfa"].items()):
        for x, y, character, token in cells:
            shade = shades.to_rgba(alpha[token])
            axis.add_patch(plt.Rectangle((x, y), 1, 1, color=shade, linewidth=0))
            style = dict(ha="center", va="center", family="monospace", fontsize=9, parse_math=False)
            dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
            axis.text(x + 0.5, y + 0.55, character, color="white" if dark else "black", **style)
        axis.set(xlim=(0, columns), ylim=(height, 0), title=f"Puerta α de la capa {layer}", xticks=[], yticks=[])
    label = "α: rojo, la abre; azul, la cierra; gris, a medias"
    commas(figure.colorbar(shades, ax=axes[:, 0].tolist(), label=label, shrink=0.6).ax.yaxis, 2)
    return figure


def draw_ablation(numbers, plt):
    kinds = {kind: one["cambios"] for kind, one in numbers["ablacion"].items() if one["tokens"] >= 100}
    keys = list(next(iter(kinds.values()), {}))
    figure, axis = plt.subplots(figsize=(10, 4.6), layout="constrained")
    for i, key in enumerate(keys):
        means, errors = zip(*(changes[key] for changes in kinds.values()))
        places = [place + (i + 0.5) * 0.8 / len(keys) - 0.4 for place in range(len(kinds))]
        label = numbers["gemelo"] if key == "gemelo" else key
        axis.bar(places, means, 0.8 / len(keys), yerr=[2 * error for error in errors], label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(kinds)), [kind.replace(" y ", " y\n").replace(" clave", "\nclave") for kind in kinds])
    axis.set(title="Pérdida de más que con la memoria entera (rayas: ±2 errores estándar)", ylabel="nats por token")
    commas(axis.yaxis, 2)
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    return figure


def draw_tables(numbers, plt):
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    titles = {
        "ngramas_que_chocan": "N-gramas del texto que chocan", "sin_entrenar": "Consultas a filas sin entrenar",
        "filas_entrenadas": "Filas entrenadas de la tabla",
    }  # fmt: skip
    for axis, (key, title) in zip(axes, titles.items()):
        for (layer, heads), marker in zip(numbers["tablas"]["capas"].items(), "osv^Dx" * 8):
            axis.plot([100 * head[key] for head in heads], marker, fillstyle="none", label=f"capa {layer}")
        if key == "ngramas_que_chocan":
            axis.plot([100 * head["previsto"] for head in heads], "k:", label="previsto al azar")
        names = [f"{head['orden']}·{head['cabeza']}" for head in heads]
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set(title=title, ylabel="%", ylim=(-3, 103), xlabel="orden · cabeza")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Report: every sentence follows from the numbers
# ----------------------------------------------------------------------------------------------------------------------


def signed(value: float, digits: int = 3) -> str:
    value = round(value, digits)
    return ("+" if value > 0 else "−" if value < 0 else "") + spanish(abs(value), digits)


def with_error(pair, digits: int = 3) -> str:
    return f"{signed(pair[0], digits)} ± {spanish(pair[1], digits)}"


def side(pair) -> int:
    """-1 or 1 where a mean is below or above zero by more than two standard errors, else 0."""
    mean, error = pair
    return (mean > 2 * error) - (mean < -2 * error)


def listed(names) -> str:
    return ", ".join(map(str, names)) or "ninguna"


def markdown_table(head, rows) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def visible(text: str) -> str:
    """White space made visible, fit for a Markdown code span within a line."""
    return "`" + text.translate(str.maketrans("\n\t `|", "↵⇥·ˋ¦")) + "`"


def report_lens(numbers):
    yield "## 1. LogitLens: ¿sabe antes lo que va a decir?"
    yield (
        "Cada capa se lee como si fuera la última. KL: cuánto dista esa lectura de la predicción final del mismo "
        "modelo (nats; 0 es igual). Acuerdo: en qué % de los tokens el más probable ya es el definitivo."
    )
    found, twin = numbers["logitlens"], numbers["gemelo"]
    gaps, names = found["diferencia"], layer_names(found["diferencia"])
    columns = [[spanish(v, 3) for v in found[key]["kl"]] for key in ("modelo", "gemelo")]
    columns += [map(with_error, gaps)]
    columns += [[spanish(100 * v, 1) for v in found[key]["acuerdo"]] for key in ("modelo", "gemelo")]
    head = ["tras la capa", "KL con memoria", f"KL {twin}", "diferencia ± error", "acuerdo con memoria"]
    yield markdown_table([*head, f"acuerdo {twin}"], zip(names, *columns))
    early = range(1 + (len(names) - 1) // 2)  # the input and the first half of the layers
    lower, higher = ([names[s] for s in early if side(gaps[s]) == sign] for sign in (-1, 1))
    yield (
        f"La memoria entra al empezar las capas {listed(numbers['puertas']['capas'])}; antes de ellas no está, y la KL "
        "solo puede cambiar por el entrenamiento o porque cambia la predicción final."
    )
    if not any(gap for gap, _ in gaps):
        yield "No hay ninguna diferencia en ninguna capa: la memoria no cambia nada."
    elif len(lower) == len(early):
        yield "Se ve lo que dice el artículo: en todas las capas tempranas la lectura está ya más cerca de la final."
    else:
        yield (
            f"**No se ve lo que dice el artículo**, KL más baja en todas las capas tempranas (aquí, hasta la "
            f"{names[early[-1]]}). Más baja en: {listed(lower)}. Más alta en: {listed(higher)}. En las demás de ellas, "
            "si las hay, la diferencia cabe en dos errores."
        )


def report_cka(numbers):
    yield "## 2. CKA: ¿a qué capa del otro se parece cada capa?"
    yield (
        "CKA compara lo que representan dos capas, giros y escalas aparte (1, lo mismo; 0, nada que ver; estimador sin "
        f"sesgo). Alineación: centro de las {numbers['cka']['k']} capas más parecidas del otro, pesadas por su CKA; la "
        "entrada cuenta como −1. Se resta la alineación del otro consigo mismo: queda la profundidad ganada, en capas."
    )
    for key, title in PROBES.items():
        found = numbers["cka"][key]
        if not found:
            yield f"Con {title} no hay puntos suficientes en este texto."
            continue
        names = layer_names(found["matriz"])
        gained = [(a - b, noise) for a, b, noise in zip(found["alineacion"], found["propia"], found["ruido"])]
        own, other = ([signed(place - 1, 2) for place in found[curve]] for curve in ("alineacion", "propia"))
        same = [spanish(row[s], 3) for s, row in enumerate(found["matriz"])]
        yield f"Con {title} (minilotes: {spanish(found['minilotes'])}):"
        head = ["capa", "CKA con la misma capa", "alineación", "del otro consigo mismo", "ganancia ± ruido"]
        yield markdown_table(head, zip(names, same, own, other, (with_error(pair, 2) for pair in gained)))
        # Under a twentieth of a layer is nothing, however sure.
        moved = [side(pair) * (abs(pair[0]) >= 0.05 and found["minilotes"] > 1) for pair in gained]
        deeper, shallower = ([name for name, m in zip(names, moved) if m == sign] for sign in (1, -1))
        yield f"Se parecen a capas más profundas del otro: {listed(deeper)}. A menos profundas: {listed(shallower)}."


def report_gates(numbers):
    yield "## 3. Puertas: ¿cuándo escucha a la memoria?"
    yield "α va de 0 (cerrada) a 1 (abierta). Donde no hay nada aprendido vale 0,5, y lo que deja pasar es cero."
    keys = ("media", "desviacion", "minima", "maxima", "abierta", "extrema")
    layers = numbers["puertas"]["capas"]
    rows = [[layer, *(spanish(found[key], 3) for key in keys)] for layer, found in layers.items()]
    head = ["capa", "media", "desviación", "mínima", "máxima", "parte con α > 0,5", "parte con α < 0,25 o > 0,75"]
    yield markdown_table(head, rows)
    for layer, found in layers.items():
        kinds = sorted(found["por_clase"].items(), key=lambda pair: -pair[1])
        yield f"Capa {layer}, α media por clase: " + "; ".join(f"{kind} {spanish(v, 3)}" for kind, v in kinds) + "."
        for key, title in (("abren", "N-gramas que más la abren"), ("nunca_abren", "N-gramas que nunca pasan de 0,5")):
            items = "; ".join(f"{visible(one['ngrama'])} {spanish(one['media'], 3)}" for one in found[key])
            yield f"{title}: {items or 'ninguno'}."
        yield (
            f"De {spanish(found['ngramas'])} n-gramas que salen {SEEN_OFTEN} veces o más, "
            f"{spanish(found['ngramas_que_nunca_abren'])} nunca pasan de 0,5."
        )


def report_ablation(numbers):
    yield "## 4. Ablación: ¿qué se pierde sin ella?"
    yield (
        "Pérdida (nats por token) con la memoria, y cuánto cambia al quitarla entera o por órdenes (2, pares de "
        "tokens; 3, tríos). Clases según el propio Python. ± un error estándar entre bloques."
    )
    found, twin = numbers["ablacion"], numbers["gemelo"]
    total = found["todos"]["cambios"]
    head = ["clase", "tokens", "pérdida", *(twin if key == "gemelo" else key for key in total)]
    yield markdown_table(
        head,
        [
            [kind, spanish(one["tokens"]), spanish(one["perdida"], 3), *map(with_error, one["cambios"].values())]
            for kind, one in found.items()
        ],
    )
    if not any(mean for mean, _ in total.values()):
        yield "Apagar la memoria no cambia nada: está vacía."
        return
    effects = {kind: one["cambios"]["sin memoria"] for kind, one in found.items() if kind != "todos"}
    worse, better = ([kind for kind in effects if side(effects[kind]) == sign] for sign in (1, -1))
    orders = {key: mean for key, (mean, _) in total.items() if key.startswith("sin orden")}
    yield (
        f"Al apagarla la pérdida cambia en {signed(total['sin memoria'][0])}. Empeora, de más a menos: "
        f"{listed(sorted(worse, key=lambda kind: -effects[kind][0]))}. Mejora: {listed(better)}. El que más falta "
        f"hace: el {max(orders, key=orders.get).removeprefix('sin ')}."
    )
    if "gemelo" in total:
        yield (
            f"El control pierde {signed(total['gemelo'][0])} respecto al modelo entero. Apagar la memoria de quien "
            "aprendió a contar con ella no es lo mismo que no haberla tenido nunca."
        )


def report_tables(numbers):
    yield "## 5. Tablas: ¿son del tamaño que hace falta?"
    found, rows, sizes = numbers["tablas"], [], {}
    yield (
        "N-gramas distintos en este texto: "
        f"{'; '.join(f'{spanish(count)} de orden {order}' for order, count in found['ngramas'].items())}. Chocar: "
        "compartir la fila de una cabeza con otro n-grama del mismo texto. Medias de las cabezas; las partes, en %."
    )
    shares = ("filas_entrenadas", "ngramas_que_chocan", "previsto", "consultas_que_chocan", "sin_entrenar")
    for layer, heads in found["capas"].items():
        for order in found["ngramas"]:
            own = [head for head in heads if str(head["orden"]) == order]
            mean = {key: sum(head[key] for head in own) / len(own) for key in own[0]}
            sizes[order] = mean["filas"]
            cells = [spanish(mean["filas"]), spanish(mean["filas_leidas"])]
            cells += [spanish(100 * mean[key], 1) for key in shares]
            rows.append([layer, order, *cells, spanish(mean["norma"], 3)])
    head = ["capa", "orden", "filas por cabeza", "leídas aquí", "entrenadas", "n-gramas que chocan", "previsto al azar"]
    yield markdown_table([*head, "consultas que chocan", "consultas sin entrenar", "norma media"], rows)
    train = found["entrenamiento"]
    if train["tokens"]:
        yield (
            "Para elegir `engram_vocab_size` cuenta el texto con que se entrena. En la parte de entrenar de este "
            f"corpus ({spanish(train['tokens'])} tokens), % de n-gramas que compartirían fila en una cabeza, con "
            "tablas como estas y mayores (calculado, no medido):"
        )
        rows = [
            [order, spanish(count), *(spanish(100 * foretold_sharing(count, m * sizes[order]), 1) for m in SIZES)]
            for order, count in train["ngramas"].items()
        ]
        yield markdown_table(["orden", "n-gramas distintos", *(f"tablas × {m}" for m in SIZES)], rows)


def write_report(numbers) -> str:
    parts = [
        f"# Por dentro de {numbers['modelo']}",
        f"Comparado con {numbers['contra']}. Texto: {numbers['texto']}; {spanish(numbers['tokens'])} tokens en "
        f"{spanish(numbers['bloques'])} bloques. Las capas se cuentan desde 0; «entrada» es el token antes de la "
        "primera. Es un modelo y un texto: los errores dicen cuánto cambiaría con otros bloques de texto, no con otro "
        "entrenamiento.",
    ]
    sections = report_lens, report_cka, report_gates, report_ablation, report_tables
    for (picture, _), section in zip(PICTURES, sections):
        parts += [*section(numbers), f"![{picture.removesuffix('.png')}]({picture})"]
    return "\n\n".join(parts) + "\n"


PICTURES = (
    ("logitlens.png", draw_lens), ("cka.png", draw_cka), ("puertas.png", draw_gates), ("ablacion.png", draw_ablation),
    ("tablas.png", draw_tables),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def open_twin(name, model, tokenizer):
    """A plain Phi of the same tokenizer, vocabulary and depth as `model`, in eval mode on its device.

    Raises:
        UserError: it is no plain Phi, or no fit.
    """
    name = find_model(name)
    kind = read_config(name)["model_type"]
    if kind != "phi":
        raise UserError(
            f"--contra {name}: hace falta un Phi sin memoria (model_type phi) y este es {kind}. Indica su Phi de "
            "partida, por ejemplo: --contra microsoft/phi-1"
        )
    with explained(name):
        source = where_from(name)
        other = open_tokenizer(name, **source)
        twin, info = PhiForCausalLM.from_pretrained(
            name, dtype="auto", use_safetensors=True, output_loading_info=True, **source
        )
    own, its = ([one.vocab_size, one.num_hidden_layers] for one in (model.config, twin.config))
    if info["missing_keys"] or own != its or other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--contra {name} no es comparable: tiene {its[0]} tokens y {its[1]} capas, el modelo {own[0]} y {own[1]}, "
            "y el tokenizer y los tensores tienen que ser los mismos. Indica el Phi del que partió el modelo."
        )
    return twin.eval().to(model.device)


def check_place(output):
    """Refuse a folder with anything in it that an earlier run did not leave there."""
    path = Path(output)
    own = {*dict(PICTURES), "numeros.json", "informe.md", ".DS_Store", ".ipynb_checkpoints"}
    foreign = [entry.name for entry in path.iterdir() if entry.name not in own] if path.is_dir() else []
    if foreign or path.exists() and not path.is_dir():
        what = f"contiene «{min(foreign)}», que no es de este análisis" if foreign else "es un archivo"
        raise UserError(f"Los resultados van a {path}/, que ya existe y {what}. Cámbiale el nombre: mv {path} otra")


def depth(
    name, contra=None, source=None, n_blocks: int = BLOCKS, output=OUTPUT, storage="auto", memory=None
) -> dict:
    """Analyse the model `name` and leave pictures, `numeros.json` and `informe.md` in the folder `output`.

    Args:
        name: folder or user/name of a Phi with memory.
        contra: the same of a plain Phi; by default the folder `<name>-control` if there is one, else the same model
            with its memory off. Only another Phi takes memory of its own.
        source: folder or file of text; the Python standard library by default.
        storage, memory: as in `open_model`.
    Returns:
        the numbers, as in the JSON.
    Raises:
        UserError: a model, the text or the place won't do.
    """
    started, plt = time.perf_counter(), pyplot()
    check_place(output)
    with whole_folder(output) as folder:  # first of all: a place that can't be written is known at once
        model, tokenizer = open_model(
            name, device="cuda" if torch.cuda.is_available() else "cpu", storage=storage, memory=memory
        )
        control = Path(f"{Path(name).expanduser().resolve()}-control")
        if contra is None and (control / "config.json").is_file():
            contra = str(control)
        twin = None if contra is None else open_twin(contra, model, tokenizer)
        against = "él mismo con la memoria apagada" if twin is None else f"{Path(contra).name}, un Phi sin memoria"
        sample = held_out_blocks(tokenizer, source, n_blocks, min(LENGTH, model.config.max_position_embeddings))
        print(f"   Texto: {sample.origin}.\n   Comparado con {against}.", flush=True)
        numbers = dict(
            modelo=Path(name).name, contra=against, gemelo="sin memoria" if twin is None else "control",
            texto=sample.origin, tokens=sample.ids.numel(), bloques=len(sample.ids),
            **analyse(model, twin, tokenizer, sample), segundos=round(time.perf_counter() - started),
        )  # fmt: skip
        for picture, draw in PICTURES:
            figure = draw(numbers, plt)
            figure.savefig(folder / picture, dpi=130)
            plt.close(figure)
        (folder / "informe.md").write_text(write_report(numbers), encoding="utf-8")
        text = json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False)
        (folder / "numeros.json").write_text(text, encoding="utf-8")
    peak = f", con {gigabytes(peak_memory())} de RAM como mucho" if peak_memory() else ""
    print(f"✅ Hecho en {spanish(time.perf_counter() - started)} s{peak}.")
    print(f"   Lee {output}/informe.md; las figuras están a su lado, y los números en {output}/numeros.json.")
    return numbers
