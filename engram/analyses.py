"""Look inside a trained model: what the memory does, layer by layer, token by token, row by row.

    python verify_phi_engram.py --profundidad phi1-engram-demo                     # against phi1-engram-demo-control/
    python verify_phi_engram.py --profundidad phi1-engram-trained --contra microsoft/phi-1 --datos mi-codigo/

Five analyses beside a twin without memory, over text held out from training: LogitLens (paper §6.1.1), CKA (§6.1.2),
gates (§6.5), ablation (§6.3) and the health of the tables. They leave pictures, the numbers as JSON and a report in
Spanish. The text streams through in small batches, so that little is needed beyond what the open models take.

Shapes: B blocks of T tokens, d hidden size, V vocabulary, S states: state 0 is the embedding (called "entrada"), state
i + 1 is what layer i gives, counted from 0 as everywhere in this project.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import numpy as np
import torch

from engram.console import Progress, UserError
from engram.hooks import memory_off, run_states, without_order
from engram.probes import KEYWORD, KINDS, Sample

LENGTH, BLOCKS = 256, 256  # tokens per block and most blocks: those on which the demo's training measures its loss
POINTS = 256  # probe points per minibatch of CKA
SEEN_OFTEN = 5  # times that an n-gram has to occur before its mean gate is believed
TIE = 0.01  # of CKA: of two layers so close, which is the more similar one is for chance to say
PROBES = {"nombres": "el final de los nombres de varios tokens", "todos": "todos los tokens"}
SIZES = (1, 4, 16, 64)  # multiples of the present tables for which collisions are foretold


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


def tie_spread(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """How far `alignment` would move if the next column stood in place of the k-th, where the two tie (TIE).

    Args:
        similarity: CKA [S, S'].
    Returns:
        float64 [S], in columns; 0 where there is no tie.
    """
    if similarity.shape[1] <= k:
        return torch.zeros(len(similarity), dtype=torch.float64)
    values, columns = similarity.topk(k + 1)
    other = [*range(k - 1), k]
    weights = values[:, other].clamp_min(1e-12)
    moved = (weights * columns[:, other]).sum(1) / weights.sum(1) - alignment(similarity, k)
    return torch.where(values[:, k - 1] - values[:, k] < TIE, moved.abs(), 0)


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
        """Matrix [S][S'], alignment [S], that of the twin with itself as reference, noise, and how far ties could move
        their difference; None without points."""
        if not self.batches and self.pending and self.pending[0].shape[1] >= 8:
            self._take(self.pending[0].shape[1])
        if not self.batches:
            return None

        def curves(sums):
            ab, aa, bb = sums
            matrix = ab / (aa.diag()[:, None] * bb.diag()).sqrt()
            own = bb / (bb.diag()[:, None] * bb.diag()).sqrt()
            matrix, own = matrix.nan_to_num(0), own.nan_to_num(0)  # a state that is the same everywhere is like none
            return matrix, alignment(matrix, k), alignment(own, k), tie_spread(matrix, k) + tie_spread(own, k)

        matrix, aligned, own, ties = curves(self.sums[0] + self.sums[1])
        (_, a, own_a, _), (_, b, own_b, _) = map(curves, self.sums if self.batches > 1 else self.sums[:1] * 2)
        noise = (a - own_a - b + own_b).abs() / 2
        found = dict(matriz=matrix, alineacion=aligned, propia=own, ruido=noise, empate=ties)
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
            tokens=int(stream.size), de=len(sample.train),
            ngramas={str(order): int(code.max()) + 1 for order, code in trained.items()},
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

    for part in Progress(torch.arange(len(sample.ids)).split(size), desc="Midiendo", unit=" lote"):
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
