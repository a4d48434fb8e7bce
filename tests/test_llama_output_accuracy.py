r"""What sparse attention changes in a LLaMA's output: a pytest on the demo model, and a script that records outputs.

    python tests/test_llama_output_accuracy.py --model models_dict/demo_llama --output before.json
    python tests/test_llama_output_accuracy.py --model models_dict/demo_llama \
        --model_out_path models_dict/demo_llama_tuned.pt --output after.json
    python evaluate/compare_results.py before.json after.json

Without --model_out_path the model is recorded as it is, unpatched. Texts and prompts are held-out Python source, the
same in every run.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autotune import (
    SparseAttention,
    Tuned,
    extract_sparse_attention_state_dict,
    load,
    load_sparse_attention_state_dict,
    record_density,
    save,
)
from autotune.module import sparse_modules
from autotune.tuned import PV_OFF
from modify_model import restore
from modify_model.cli.arguments import DTYPES, check_output, layer_range, whole
from modify_model.cli.driver import tuned_layers
from modify_model.cli.language import DEMO, encode, greedy, load_model, negative_log_likelihood, token_windows
from modify_model.cli.main import Parser
from modify_model.cli.parallel import guarded
from modify_model.modify_llama import set_spas_sage_attn_llama
from spas_attn import fallback_counts
from spas_attn.metrics import cosine_similarity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
STRIDE = 16  # logits are stored at every 16th position, so 4 windows of 2,048 demo tokens take 0.7 MB
FULL_VOCABULARY = 1024  # up to this size logits are stored whole, else the highest LARGEST of a position
LARGEST = 256
SEED = 0
SHORT_PROMPTS = (
    "import json\nimport os\n\n\ndef read_config(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
)
LONG_PROMPTS = 2  # windows of half the length: long enough for sparse prefill


def pack(values: Tensor) -> str:
    """A tensor of float32 or int32 in little-endian base64."""
    kind = "<f4" if values.is_floating_point() else "<i4"
    return base64.b64encode(values.cpu().numpy().astype(kind).tobytes()).decode()


def patch_and_load(model: PreTrainedModel, path: str | Path, layers: tuple[int, int] | None = None) -> None:
    """Patch the layers that a tuned file is for (or those given) and load it."""
    state = load(path)
    set_spas_sage_attn_llama(model, layer_range=layers or tuned_layers(model, state))
    load_sparse_attention_state_dict(model, state)


@torch.inference_mode()
def record_window(model: PreTrainedModel, window: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What is stored of a window ``[1, L]``, and sum, sum of squares, minimum, maximum and count of its logits."""
    ids = window.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    nll = F.cross_entropy(logits[:-1], ids[0, 1:].to(logits.device))
    stored = logits[STRIDE - 1 :: STRIDE] if len(logits) >= STRIDE else logits[-1:]
    entry = {
        "nll": float(nll),
        "top1": pack(logits.argmax(-1).int()),  # of every position
        "rows": len(stored),
        "logsumexp": pack(stored.logsumexp(-1)),
        "ids": None,
    }
    if logits.shape[1] > FULL_VOCABULARY:
        stored, indices = stored.topk(LARGEST)
        entry["ids"] = pack(indices.int())
    entry["logits"] = pack(stored)
    sums = torch.stack([logits.double().sum(), logits.double().square().sum(), logits.min(), logits.max()])
    return entry, torch.cat([sums.cpu(), torch.tensor([logits.numel()], dtype=torch.float64)])


def record(
    model: PreTrainedModel, tokenizer: Any, *, max_length: int, num_samples: int, max_new_tokens: int
) -> dict[str, Any]:
    """Logits statistics, perplexity and generated texts of a model, patched or not, as a JSON object."""
    longest = getattr(model.config, "max_position_embeddings", max_length)
    length = min(max_length, longest)
    windows = token_windows(tokenizer, None, length, num_samples, SEED, "unseen")
    patched = any(isinstance(module, SparseAttention) for module in model.modules())
    entries, sums, densities = [], [], []
    before = fallback_counts()
    for window in windows:
        with record_density(model) if patched else contextlib.nullcontext() as density:
            entry, window_sums = record_window(model, window)
        entries.append(entry)
        sums.append(window_sums)
        densities.append(1.0 if density is None else density.mean)
    fallbacks = {reason: n - before.get(reason, 0) for reason, n in fallback_counts().items()}
    total, squares, lowest, highest, count = torch.stack(sums).unbind(1)
    mean = float(total.sum() / count.sum())
    nll = sum(entry["nll"] for entry in entries) / len(entries)
    half = max(1, min(length // 2, longest - max_new_tokens))
    prompts = [window[:, :half] for window in windows[:LONG_PROMPTS]]
    prompts += [encode(tokenizer, text) for text in SHORT_PROMPTS]
    generations = []
    for prompt in prompts:
        tokens = greedy(model, tokenizer, prompt.to(next(model.parameters()).device), max_new_tokens)
        text = tokenizer.decode(prompt[0])
        generations.append(
            {
                "prompt_tokens": prompt.shape[1],
                "prompt_end": text[-200:],
                "tokens": tokens,
                "text": tokenizer.decode(tokens),
            }
        )
    all_ids = np.concatenate([window[0].numpy() for window in windows])
    return {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "vocabulary": int(model.config.vocab_size),
        "length": length,
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "text_sha256": hashlib.sha256(all_ids.astype("<i4").tobytes()).hexdigest(),
        "patched": patched,
        "mean_density": sum(densities) / len(densities),
        "fallbacks": {reason: n for reason, n in fallbacks.items() if n},
        "logits": {
            "mean": mean,
            "std": max(0.0, float(squares.sum() / count.sum()) - mean**2) ** 0.5,
            "min": float(lowest.min()),
            "max": float(highest.max()),
        },
        "nll": nll,
        "perplexity": float(np.exp(nll)),
        "stride": STRIDE,
        "windows": entries,
        "generations": generations,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Record one model; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(DEMO), help="a folder or a name on the hub (default: the demo model)")
    add("--model_out_path", help="a tuned file: patch the model and load it")
    add("--output", help="where the JSON goes (default: only a summary is printed)")
    add("--max_length", type=whole(2), default=2048, help="tokens of a text (default: 2048)")
    add("--num_samples", type=whole(1), default=4, help="number of texts (default: 4)")
    add("--max_new_tokens", type=whole(1), default=64, help="tokens to generate after each prompt (default: 64)")
    add("--layer_range", type=layer_range, help="start,stop of the patched layers (default: those of the tuned file)")
    add("--device", help="cuda, cpu, … (default: cuda if there is one)")
    add("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's; float32 on a CPU")
    args = parser.parse_args(argv)
    if args.layer_range and not args.model_out_path:
        parser.error("--layer_range needs --model_out_path: without it the model is recorded unpatched")
    return guarded(Path(__file__).name, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    if args.output:
        check_output("output", args.output)
    if args.model_out_path:
        load(args.model_out_path)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    if args.model_out_path:
        patch_and_load(model, args.model_out_path, args.layer_range)
    counts = {name: getattr(args, name) for name in ("max_length", "num_samples", "max_new_tokens")}
    result = {"model": args.model, "tuned_file": args.model_out_path, **record(model, tokenizer, **counts)}
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result) + "\n", encoding="utf-8")
    numbers = result["logits"]
    print("logits      {min:.4f} to {max:.4f}, mean {mean:.4f}, std {std:.4f}".format(**numbers))
    print(f"density     {result['mean_density']:.4f}")
    print(f"perplexity  {result['perplexity']:.4f} on {result['num_samples']} texts of {result['length']} tokens")
    for reason, count in result["fallbacks"].items():
        print(f"fallback    {count} calls: {reason}")
    if args.output:
        print(f"written to  {args.output}")
    return 0


LENGTH = 1024
CDF = 0.9


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, Any]:
    return load_model(DEMO, device="cpu")


@pytest.fixture
def model(demo: tuple[PreTrainedModel, Any]) -> Iterator[PreTrainedModel]:
    """The demo model, unpatched before and after each test."""
    yield demo[0]
    restore(demo[0])


@pytest.fixture(scope="module")
def windows(demo: tuple[PreTrainedModel, Any]) -> list[Tensor]:
    return list(token_windows(demo[1], None, LENGTH, 2, seed=1, group="unseen"))


@torch.inference_mode()
def logits_of(model: PreTrainedModel, window: Tensor) -> Tensor:
    return model(input_ids=window, use_cache=False).logits


@pytest.fixture(scope="module")
def dense(demo: tuple[PreTrainedModel, Any], windows: list[Tensor]) -> list[Tensor]:
    """Logits of the unpatched model for every window."""
    return [logits_of(demo[0], window) for window in windows]


@pytest.fixture(scope="module")
def tuned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned file of the demo model with hand-set thresholds; the last head of each layer stays dense."""
    model = set_spas_sage_attn_llama(load_model(DEMO, device="cpu")[0])
    for module in sparse_modules(model).values():
        heads = module.heads or 0
        full = torch.ones(heads)
        sparse = torch.arange(heads) < heads - 1
        module.set_thresholds(Tuned(sparse, full * CDF, -full, full * PV_OFF, 0.7, (LENGTH, LENGTH)))
    path = tmp_path_factory.mktemp("tuned") / "demo.pt"
    save(extract_sparse_attention_state_dict(model), path)
    return path


def test_untuned_is_the_unpatched_model(
    demo: tuple[PreTrainedModel, Any], model: PreTrainedModel, windows: list[Tensor], dense: list[Tensor]
) -> None:
    prompt = windows[0][:, :200]
    expected = greedy(model, demo[1], prompt, 8)
    set_spas_sage_attn_llama(model)
    assert torch.equal(logits_of(model, windows[0]), dense[0])
    assert greedy(model, demo[1], prompt, 8) == expected


def test_tuned_stays_close(
    model: PreTrainedModel, tuned_file: Path, windows: list[Tensor], dense: list[Tensor]
) -> None:
    patch_and_load(model, tuned_file)
    fallbacks = fallback_counts()
    with record_density(model) as density:
        sparse = [logits_of(model, window) for window in windows]
    assert fallback_counts() == fallbacks
    assert 0.2 < density.mean < 0.95
    losses = [0.0, 0.0]
    for got, reference, window in zip(sparse, dense, windows, strict=True):
        assert torch.isfinite(got).all()
        assert not torch.equal(got, reference)
        assert cosine_similarity(got, reference) > 0.95
        assert torch.allclose(got[:, :128], reference[:, :128], atol=1e-3), "the first block has nothing to drop"
        for i, logits in enumerate((reference, got)):
            losses[i] += float(F.cross_entropy(logits[0, :-1], window[0, 1:])) / len(windows)
    assert 0.3 < losses[0] < 0.9, "a trained model: 0.80 bits per byte are 0.55 nats"
    change = np.exp(losses[1] - losses[0]) - 1
    assert np.isfinite(change) and abs(change) < 0.03


def test_restore_gives_the_original_bits(
    model: PreTrainedModel, tuned_file: Path, windows: list[Tensor], dense: list[Tensor]
) -> None:
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    patch_and_load(model, tuned_file)
    restore(model)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert list(model.state_dict()) == keys
    assert torch.equal(logits_of(model, windows[0]), dense[0])


def test_loss_is_the_mean_over_predicted_tokens(
    model: PreTrainedModel, windows: list[Tensor], dense: list[Tensor]
) -> None:
    short = windows[0][:, :60]
    expected = F.cross_entropy(dense[0][0, :59], short[0, 1:])
    assert negative_log_likelihood(model, [short, short]) == pytest.approx(float(expected), rel=1e-4)


if __name__ == "__main__":
    sys.exit(main())
