#!/usr/bin/env python
"""Compare block scores and bounds on the demo LLaMA: sparsity against perplexity for every variant.

Research script behind the choice of the default selector: for each way of scoring blocks it accumulates curves on
calibration windows (as autotune does), picks per-head thresholds for several bounds, and measures the perplexity of
the sparse model on windows of files that were never seen. Meant for a GPU (about five minutes on an H200).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _demo_text import load_texts, windows
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM

from autotune.curves import PromptTally, Tally, query_blocks
from autotune.search import mean_error, tail_error
from spas_attn.backends import Call
from spas_attn.selectors import Inputs, MeanSimilarity
from spas_attn.selectors.base import blockwise
from spas_attn.selectors.mean_similarity import within
from spas_attn.selectors.pooled import Pooled, _fine_visible, _means

CDFS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.74, 0.78, 0.81, 0.84, 0.87, 0.89, 0.91, 0.925, 0.94, 0.95,
        0.96, 0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9995, 0.9999]  # fmt: skip
BOUNDS = {
    "mean": [0.01, 0.03, 0.06, 0.1],
    "tail": [0.3, 0.6, 0.8, 1.0],
    "tail99": [0.3, 0.5, 0.7],
    "tail999": [0.8, 1.2],
}
QUANTILES = {"tail": 0.995, "tail99": 0.99, "tail999": 0.999}


def fine_scores(selector: MeanSimilarity, x: Inputs, pool: int, kind: str) -> Tensor:
    """Log-mass of every key sub-block for every query sub-block, float32 [B, H, fine nq, fine nk]."""
    q, k = x.q.float(), x.k.float().repeat_interleave(x.q.shape[1] // x.k.shape[1], 1)
    fq, _ = _means(q, pool, None)
    fk, _ = _means(k, pool, None)
    scores = fq @ fk.transpose(-1, -2) * x.scale
    if "kvar" in kind:  # second cumulant over the keys: log E exp(q·k) = q·mean + ½ Var(q·k)
        variance = (_means(k * k, pool, None)[0] - fk * fk).clamp(min=0)
        scores = scores + 0.5 * x.scale**2 * (fq * fq) @ variance.transpose(-1, -2)
    if "qvar" in kind:
        variance = (_means(q * q, pool, None)[0] - fq * fq).clamp(min=0)
        scores = scores + 0.5 * x.scale**2 * variance @ (fk * fk).transpose(-1, -2)
    if "quest" in kind:  # upper bound over the box of the keys
        low = -F.max_pool1d(-k.flatten(0, 1).transpose(1, 2), pool).transpose(1, 2).unflatten(0, k.shape[:2])
        high = F.max_pool1d(k.flatten(0, 1).transpose(1, 2), pool).transpose(1, 2).unflatten(0, k.shape[:2])
        box = fq.clamp(min=0) @ high.transpose(-1, -2) + fq.clamp(max=0) @ low.transpose(-1, -2)
        weight = float(kind.split("quest")[1].split("+")[0] or 1)
        scores = (1 - weight) * scores + weight * box * x.scale
    if "anti" in kind:  # antidiagonals of stride `pool` (XAttention)
        qs = q.unflatten(2, (-1, pool)).flip(3).flatten(3)
        ks = k.unflatten(2, (-1, pool)).flatten(3)
        scores = qs @ ks.transpose(-1, -2) * x.scale / pool
    seen = _fine_visible(selector, x, pool, pool, 0, scores.shape[2])
    return scores.masked_fill(~seen, -torch.inf)


def levels(selector: MeanSimilarity, x: Inputs, pool: int, kind: str) -> Tensor:
    """Levels [B, H, nq, nk] of a variant; kept where level < threshold."""
    visible = selector.visible(x)
    forced = selector.forced(x, visible)
    if "window" in kind:  # a wider diagonal
        nk = visible.shape[-1]
        i = torch.arange(nk, device=visible.device)
        forced = forced | ((i[None] >= i[:, None] - int(kind.split("window")[1][0])) & visible)
    if "oracle" in kind:
        scores = x.q.float() @ x.k.float().repeat_interleave(x.q.shape[1] // x.k.shape[1], 1).transpose(-1, -2)
        scores = scores * x.scale
        i = torch.arange(x.q.shape[2], device=x.q.device)
        scores = scores.masked_fill(i[None] > i[:, None], -torch.inf)
        pool = 1
    else:
        scores = fine_scores(selector, x, pool, kind)
    probs = torch.softmax(scores, -1)
    rows = blockwise(probs, selector.block_k // pool).sum(-1).unflatten(2, (-1, selector.block_q // pool))
    ones = torch.full((x.q.shape[1],), -1.0, device=x.q.device)
    sims = torch.ones(1, 1, 1, device=x.q.device)
    if "union" in kind or "max" in kind:
        if "max" in kind:  # best row of the block, as a threshold on a probability
            level = 1 - rows.amax(3)
        else:  # every row keeps its own mass: the block's level is the least over its rows
            key, order = rows.sort(-1, descending=True)
            level = torch.empty_like(key).scatter_(-1, order, key.cumsum(-1) - key).amin(3)
        if "mix" in kind:
            pooled = Pooled(rows.clamp(min=1e-38).log(), sims, sims, visible, forced, visible[0, 0])
            level = 0.5 * (level + pooled.levels(ones).clamp(0, 1))
        return level.masked_fill(forced, -1.0).masked_fill(~visible, torch.inf)
    if "power" in kind:  # sharpen towards the rows that need a block most
        p = float(kind.split("power")[1].split("+")[0])
        rows = rows.pow(p).sum(3, keepdim=True).pow(1 / p)
        rows = rows / rows.sum(-1, keepdim=True)
    pooled = Pooled(rows.clamp(min=1e-38).log(), sims, sims, visible, forced, visible[0, 0])
    return pooled.levels(ones)


class Attention:
    """The attention function that the model calls: watches, or runs sparse."""

    def __init__(self) -> None:
        self.watch: Callable[[int, Inputs, Call], None] | None = None
        self.keep: Callable[[int, Inputs], Tensor] | None = None
        self.density: list[Tensor] = []
        self.blocks = (128, 128)
        self.represent = False

    def __call__(self, module, q, k, v, mask, **kw):
        scale = kw.get("scaling") or q.shape[-1] ** -0.5
        x = Inputs(q, k, True, scale, None, None)
        if self.watch is not None:
            self.watch(module.layer_idx, x, Call(q, k, v, is_causal=True, scale=scale))
        if self.keep is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            out = self.sparse(self.keep(module.layer_idx, x), q, k, v, scale)
        return out.transpose(1, 2), None

    def sparse(self, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        nq, nk = kept.shape[-2:]
        self.density.append(kept.sum((0, 2, 3)) / (nq * (nq + 1) / 2 * kept.shape[0]))
        token = kept.repeat_interleave(self.blocks[0], 2).repeat_interleave(self.blocks[1], 3)
        i = torch.arange(q.shape[2], device=q.device)
        token = token & (i[None] <= i[:, None])
        if not self.represent:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=token, scale=scale, enable_gqa=True)
        mk, mv = (t.unflatten(2, (-1, self.blocks[1])).mean(3) for t in (k, v))
        block = torch.arange(nk, device=q.device)
        future = (block[None] + 1) * self.blocks[1] > (torch.arange(nq, device=q.device)[:, None]) * self.blocks[0]
        stand_in = (~kept & ~future).repeat_interleave(self.blocks[0], 2)
        bias = torch.where(token, 0.0, -torch.inf)
        bias = torch.cat([bias, torch.where(stand_in, math.log(self.blocks[1]), -torch.inf)], -1)
        return F.scaled_dot_product_attention(
            q, torch.cat([k, mk], 2), torch.cat([v, mv], 2), attn_mask=bias, scale=scale, enable_gqa=True
        )


@torch.no_grad()
def perplexity(model, batches: list[Tensor]) -> tuple[float, float]:
    """Mean negative log-likelihood per byte and its perplexity."""
    losses = [F.cross_entropy(model(x).logits[0, :-1].float(), x[0, 1:]).item() for x in batches]
    nll = sum(losses) / len(losses)
    return nll, math.exp(nll)


@torch.no_grad()
def curves(model, attention: Attention, batches: list[Tensor], level: Callable, block: tuple[int, int]):
    """One Tally per layer over the batches."""
    tallies: dict[int, Tally] = {}
    cdf = torch.tensor(CDFS, device=batches[0].device)

    for number, batch in enumerate(batches):

        def watch(layer: int, x: Inputs, call: Call, number: int = number) -> None:
            lev = level(x)
            tally = PromptTally(x.q.shape[1], len(CDFS), x.q.device)
            kept = torch.stack([within(lev, c).sum((0, 2, 3)) for c in cdf], 1)
            tally.add_blocks(kept, lev.isfinite().sum((0, 2, 3)))
            for i, chosen, partials in query_blocks(call, *block, list(range(lev.shape[2]))):
                difference, norm = partials.errors(within(lev[:, chosen, i, None], cdf[:, None]))
                tally.add_errors(chosen, difference, norm, partials.valid)
            done = tally.close(number)
            tallies[layer].merge(done) if layer in tallies else tallies.__setitem__(layer, done)

        attention.watch = watch
        model(batch)
        attention.watch = None
    return tallies


def pick(tallies: dict[int, Tally], kind: str, bound: float, device: str) -> dict[int, Tensor]:
    """Per layer, every head's threshold of least density whose error (a point estimate) is within the bound."""
    thresholds = {}
    for layer, tally in tallies.items():
        error = mean_error(tally) if kind == "mean" else tail_error(tally, QUANTILES[kind])
        best, index = tally.density().masked_fill(error > bound, 9.0).min(1)
        thresholds[layer] = torch.where(best < 9, torch.tensor(CDFS)[index], 1.0).to(device)
    return thresholds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent / "models_dict" / "demo_llama"
    parser.add_argument("--model_name", default=str(here))
    parser.add_argument("--out_path", default="explore_scores.json")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--calibration", type=int, default=6)
    parser.add_argument("--evaluation", type=int, default=24)
    parser.add_argument("--variants", default="", help="comma separated pool:kind:block_q:block_k[:represent]")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = Attention()
    AttentionInterface.register("explore", attention)
    model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32).to(device).eval()
    model.set_attn_implementation("explore")

    def batches(group: str, count: int, seed: int) -> list[Tensor]:
        texts = load_texts(here / "heldout", group)
        return [torch.tensor(list(w), device=device)[None] + 3 for w in windows(texts, args.length, count, seed)]

    calibration, unseen = batches("calibration", args.calibration, 1), batches("unseen", args.evaluation, 2)
    dense_nll, _ = perplexity(model, unseen)
    print(f"dense: {dense_nll / math.log(2):.4f} bits per byte")
    default = [f"{p}:{kind}:{b}:{b}" for b in (128, 64) for p, kind in (
        (b, "mean"), (16, "mean"), (8, "mean"), (8, "anti"), (16, "kvar"), (8, "kvar"), (16, "kvar+qvar"), (8, "max"),
        (8, "union"), (16, "union"), (8, "kvar+union"), (16, "kvar+union"), (8, "kvar+max"), (8, "union+mix"),
        (16, "quest0.3"), (16, "quest0.3+union"), (8, "power2"), (8, "power4"), (8, "kvar+power4"),
        (8, "mean+window1"), (8, "union+window1"), (1, "oracle"), (1, "oracle+max"), (1, "oracle+union"))]  # fmt: skip
    results = []
    for spec in tqdm(args.variants.split(",") if args.variants else default):
        pool, kind, bq, bk, *rest = spec.split(":")
        block = (int(bq), int(bk))
        attention.blocks, attention.represent = block, bool(rest)
        started = time.time()
        selector = MeanSimilarity(
            block_q=block[0], block_k=block[1], pool=min(int(pool), *block) if int(pool) > 1 else 1
        )

        def level(x: Inputs, selector=selector, pool=int(pool), kind=kind) -> Tensor:
            return levels(selector, x, pool, kind)

        tallies = curves(model, attention, calibration, level, block)
        row = {"variant": spec}
        for bound_kind, bounds in BOUNDS.items():
            for bound in bounds:
                thresholds = pick(tallies, bound_kind, bound, device)
                attention.density = []
                attention.keep = lambda layer, x, t=thresholds: within(level(x), t[layer][:, None, None])
                nll, _ = perplexity(model, unseen)
                attention.keep = None
                sparsity = 1 - torch.stack(attention.density).mean().item()
                row[f"{bound_kind}{bound}"] = (round(sparsity, 4), round(100 * (math.exp(nll - dense_nll) - 1), 3))
        row["seconds"] = round(time.time() - started, 1)
        results.append(row)
        Path(args.out_path).write_text(json.dumps(results, indent=1))
        print(spec, {key: value for key, value in row.items() if key != "variant"}, flush=True)


if __name__ == "__main__":
    main()
