"""Is block-sparse attention worth anything in a Hunyuan3D denoiser, whose latents are an unordered set?

    python evaluate/studies/hunyuan3d_sparsity.py                          # a CPU, about a minute

One joint attention of 2.0's shape: 3072 latents and 1370 image tokens (a few heads of 64), at random or with structure:
latents are points of a surface and attend by nearness, image tokens lie in a raster. The latents come shuffled, as the
model has them; or in an order that puts similar ones together. Errors are relative L1 of the output, against dense, of
the blocks that TopK chooses from pooled scores, of the best blocks there are (by true mass), and of random ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from modify_model.hunyuan3d.embeddings import fourier
from modify_model.hunyuan3d.volume import similar_together
from spas_attn import BlockMask, metrics
from spas_attn.selectors import TopK

BLOCK, DIM, SIDE = 128, 64, 37
KEEPS = (0.5, 0.25)
OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "hunyuan3d_sparsity.json"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v [1, H, N, D], and what latents are ordered by [L, C]


def random_inputs(latents: int, heads: int, peak: float) -> Inputs:
    """Queries and keys without any relation, normed as the model does; ``peak`` is the norm's learnt scale."""
    total = latents + SIDE**2 + 1
    q, k, v = (torch.randn(1, heads, total, DIM) for _ in range(3))
    return normed(q, peak), normed(k, 1.0), v, torch.randn(latents, DIM)


def structured_inputs(latents: int, heads: int, peak: float) -> Inputs:
    """Latents are points of an uneven surface, shuffled; image tokens see that surface from the front."""
    points = torch.nn.functional.normalize(torch.randn(latents, 3), dim=-1)
    points = points * (0.6 + 0.3 * (3 * points).sin().prod(-1, keepdim=True))
    u, v = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    image = torch.stack([u, v, (1 - u**2 - v**2).clamp(min=0).sqrt()], dim=-1).reshape(-1, 3) * 0.7
    places = torch.cat([torch.zeros(1, 3), image, points])  # the first image token stands for all
    features = fourier(places, 3)
    mixed = torch.randn(heads, features.shape[-1], DIM) / features.shape[-1] ** 0.5
    base = features @ mixed + 0.3 * torch.randn(heads, len(places), DIM)
    q, k = (normed((base + 0.3 * torch.randn_like(base))[None], scale) for scale in (peak, 1.0))
    values = (features @ torch.randn(heads, features.shape[-1], DIM))[None]
    order_by = fourier(points, 3) @ torch.randn(features.shape[-1], DIM)
    return q, k, values, order_by + 0.3 * torch.randn_like(order_by)


def normed(x: Tensor, scale: float) -> Tensor:
    """RMS norm over the head dim, times a scale."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:]) * scale


def errors(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Relative L1 by way of choosing and share of blocks kept."""
    probabilities = (q @ k.mT * DIM**-0.5).softmax(-1)
    exact, n = probabilities @ v, q.shape[2]
    blocks = -(-n // BLOCK)
    padded = torch.nn.functional.pad(probabilities, (0, blocks * BLOCK - n, 0, blocks * BLOCK - n))
    mass = padded.unflatten(-1, (blocks, BLOCK)).sum(-1).unflatten(-2, (blocks, BLOCK)).sum(-2)
    found = {}
    for keep in KEEPS:
        count = round(keep * blocks)
        chosen = {"topk": TopK(keep=keep, sink=False, local=0).select(q, k, is_causal=False)}
        for name, score in (("best", mass), ("random", torch.rand_like(mass))):
            best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, score.topk(count, -1).indices, True)
            chosen[name] = BlockMask.from_dense(best, n, n, BLOCK, BLOCK)
        for name, mask in chosen.items():
            kept = probabilities * mask.token_mask(slice(0, n))
            found[f"{name} {keep}"] = float(metrics.relative_l1(kept @ v / kept.sum(-1, keepdim=True), exact))
    return found


def run(latents: int, heads: int) -> list[dict[str, object]]:
    """All inputs and orders; a row for each."""
    rows = []
    for name, make in (("random", random_inputs), ("structured", structured_inputs)):
        for peak in (1.0, 3.0):
            torch.manual_seed(0)
            q, k, v, order_by = make(latents, heads, peak)
            first = q.shape[2] - latents
            sorted_latents = similar_together(order_by, BLOCK) + first
            orders = {"as they come": None, "sorted": torch.cat([torch.arange(first), sorted_latents])}
            for order, index in orders.items():
                tensors = (q, k, v) if index is None else tuple(x[:, :, index] for x in (q, k, v))
                row = {"inputs": name, "peak": peak, "order": order, **errors(*tensors)}
                rows.append(row)
                numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
                print(f"{name:11}{order:13}{numbers}", flush=True)
    return rows


def main() -> None:
    """Run the study, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=3072, help="512 is 2mini")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    facts = {"latents": args.latents, "image_tokens": SIDE**2 + 1, "heads": args.heads, "torch": torch.__version__}
    args.out.write_text(json.dumps({**facts, "rows": run(args.latents, args.heads)}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
