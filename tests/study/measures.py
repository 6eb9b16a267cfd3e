"""How much a row of pretrained_study.py learned, forgot and completes: losses, KL from the base, identifiers."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engram.corpus import batch_at
from study.pretrained import BATCH, LENGTH, SEPARATOR, products

OLD = 24  # blocks of each old text: 6,144 tokens
SHORT, LONG = 60, 240  # steps of 1,024 tokens
WORD = re.compile(r"[^\W\d]\w*")


@torch.no_grad()
def own_texts(model, folder: Path) -> torch.Tensor:
    """Blocks [OLD, LENGTH] that the base wrote by itself, from nothing, at temperature 1; kept beside it."""
    file = folder / "propio.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        with products():
            ids = model.generate(
                torch.full((OLD, 1), SEPARATOR, device=model.device),
                attention_mask=torch.ones(OLD, 1, device=model.device), do_sample=True, top_k=0,
                temperature=1.0, max_length=LENGTH, min_length=LENGTH, eos_token_id=SEPARATOR, pad_token_id=SEPARATOR,
            )  # fmt: skip
        save_file({"ids": ids.cpu()}, file)
    return load_file(file)["ids"]


@torch.no_grad()
def predictions(model, blocks: torch.Tensor):
    """Yield (ids that follow [B, T-1], log-probabilities of all tokens there [B, T-1, V])."""
    model.eval()
    for ids in blocks.to(model.device).split(BATCH):
        with products():
            logits = model(ids, use_cache=False).logits
        yield ids[:, 1:], logits[:, :-1].float().log_softmax(-1)


def loss_and_hits(model, blocks) -> tuple[float, torch.Tensor]:
    """Nats per token, and whether each token was the likeliest: bool [n, LENGTH], the first of a block never."""
    losses, hits = [], []
    for following, log_p in predictions(model, blocks):
        losses.append(-log_p.gather(-1, following[..., None]).mean().item() * len(following))
        hits.append(F.pad(log_p.argmax(-1) == following, (1, 0)).cpu())
    return sum(losses) / len(blocks), torch.cat(hits)


def forgetting(model, texts: dict, said: dict) -> dict:
    """{text: loss, mean KL from the base in nats, share of likeliest tokens that are others now}, of `texts`
    {text: blocks}, of which the base `said` {text: log-probabilities of each BATCH}."""
    found = {}
    for name, blocks in texts.items():
        loss = kl = changed = 0.0
        for (following, log_p), base in zip(predictions(model, blocks), said[name]):
            base = base.float()
            loss -= log_p.gather(-1, following[..., None]).sum().item()
            kl += F.kl_div(log_p, base, log_target=True, reduction="sum").item()
            changed += (log_p.argmax(-1) != base.argmax(-1)).sum().item()
        count = len(blocks) * (LENGTH - 1)
        found[name] = dict(loss=loss / count, kl=kl / count, changed=changed / count)
    return found


def completed(hits, names, known: set[str]) -> dict[str, list[int]]:
    """{class: [right, all, right, all]} of identifiers, the last two of those whose name stands not yet in the block.

    "punto": after a dot, in text that was trained on. "vistos": other names of that text. "nuevos": names not in it.
    """
    found = {kind: [0, 0, 0, 0] for kind in ("punto", "vistos", "nuevos")}
    for block, first, last, name, dot, before in names:
        kind = found["nuevos" if name not in known else "punto" if dot else "vistos"]
        right = bool(hits[block, first:last].all())
        for place in (0,) if before else (0, 2):
            kind[place] += right
            kind[place + 1] += 1
    return found


def names_read(tokenizer, ids, steps: int, recipe) -> set[str]:
    read = torch.cat([batch_at(ids, number, recipe) for number in range(steps)])
    return set(WORD.findall(" ".join(tokenizer.batch_decode(read))))


@torch.no_grad()
def strength(engram, model, blocks) -> dict:
    """{"aporta": of each layer, the mean of ‖Y‖/‖h‖ over one batch; "puerta": of its gate}."""
    found = dict(aporta=[], puerta=[])
    hooks = []
    for layer in engram.layers.values():
        def ratio(_, args, output):
            found["aporta"].append((output.norm(dim=-1) / args[0].norm(dim=-1)).mean().item())

        hooks += [
            layer.register_forward_hook(ratio),
            layer.gate.register_forward_hook(lambda _, args, output: found["puerta"].append(output.mean().item())),
        ]
    next(predictions(model, blocks))
    for hook in hooks:
        hook.remove()
    return found
