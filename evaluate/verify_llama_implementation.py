"""Check in five steps that a LLaMA model can be patched, computes what it did before, and can be restored.

    python evaluate/verify_llama_implementation.py
    python evaluate/verify_llama_implementation.py --model_name meta-llama/Llama-3.1-8B --layer_range 16,32
    python evaluate/verify_llama_implementation.py --model_out_path models_dict/demo_llama_tuned.pt

Until thresholds are tuned or loaded, a patched model has to give the bits of the unpatched one: logits and generated
tokens. With --model_out_path, the sparse logits are compared with the dense ones as well. Exit code 0 only if all
five steps pass.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from _llama import (
    DEMO,
    encode,
    greedy,
    layer_range,
    load_model,
    patch_and_load,
    record_density,
    take_density,
    token_windows,
)
from _loading import DTYPES
from _verify import Failure, Step, run_steps, say
from torch import Tensor, nn

from autotune import SparseAttention
from autotune.module import sparse_modules
from modify_model.modify_llama import set_spas_sage_attn_llama
from modify_model.patching import find_family, find_modules, restore, verify
from spas_attn import fallback_counts
from spas_attn.metrics import cosine_similarity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_COSINE = 0.95
SHOWN_LINES = 8  # of the input text of the generation
HEAD_DIMS = range(16, 257)  # what spas_attn supports
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Check:
    """The five steps, in order, and what later ones need from earlier ones."""

    model: PreTrainedModel
    tokenizer: Any
    ids: Tensor  # of the forward pass, [1, L]
    logits: Tensor  # of the unpatched model, [1, L, vocabulary]
    modules: dict[str, nn.Module]  # of the unpatched model
    keys: list[str]  # of its state_dict
    tuned = False  # whether the tuned file, if one is given, could be loaded

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def load(self) -> str:
        """Load model and tokenizer."""
        began = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of transformers
            self.model, self.tokenizer = load_model(
                self.args.model_name, device=self.args.device, dtype=self.args.dtype
            )
        parameter = next(self.model.parameters())
        say("model", self.args.model_name)
        say("class", type(self.model).__name__)
        say("parameters", f"{sum(p.numel() for p in self.model.parameters()):,}")
        say("dtype, device", f"{parameter.dtype}, {parameter.device}".replace("torch.", ""))
        return f"loaded in {time.perf_counter() - began:.1f} s"

    def inspect(self) -> str:
        """Find the attention layers and check that they are as the adapter expects."""
        family = find_family(self.model)
        layers = find_modules(self.model, "LlamaAttention")
        if not layers:
            raise Failure(f"{type(self.model).__name__} has no LlamaAttention layers; this script checks LLaMA models")
        sparse = [path for path, module in self.model.named_modules() if isinstance(module, SparseAttention)]
        if sparse:
            raise Failure(f"the model is already patched, first at {sparse[0]}")
        say("family", family.name)
        say("attention", f"implementation {self.model.config._attn_implementation!r}")
        groups: dict[str, list[str]] = {}
        for path, layer in layers:
            groups.setdefault(describe(path, layer), []).append(path)
        for text, paths in groups.items():
            say("layers", f"{len(paths)} of {len(layers)}: {paths[0]} … {paths[-1]}" if len(paths) > 1 else paths[0])
            for line in text.splitlines():
                print(f"        {line}")
        return f"{len(layers)} attention layers, {'all alike' if len(groups) == 1 else f'{len(groups)} kinds'}"

    def apply(self) -> str:
        """Record what the unpatched model is and computes, then patch it."""
        longest = getattr(self.model.config, "max_position_embeddings", self.args.max_length)
        length = min(self.args.max_length, longest)
        (window,) = token_windows(self.tokenizer, None, length, 1, seed=0, group="unseen")
        self.ids = window.to(self.model.device)
        self.logits = self.forward()
        self.modules, self.keys = dict(self.model.named_modules()), list(self.model.state_dict())
        layers = find_modules(self.model, "LlamaAttention")
        start, stop = self.args.layer_range or (0, len(layers))
        set_spas_sage_attn_llama(self.model, layer_range=self.args.layer_range)
        with contextlib.redirect_stdout(io.StringIO()) as table:
            result = verify(self.model)
        print("\n".join(f"    {line}" for line in table.getvalue().splitlines()))
        if not result.ok or result.replaced != stop - start:
            raise Failure(f"{result.replaced} layers are replaced, {stop - start} should be")
        if list(self.model.state_dict()) != self.keys:
            raise Failure("the patch changed the keys of the state_dict")
        left = len(layers) - (stop - start)
        return f"{result.replaced}/{stop - start} layers replaced" + (f", {left} left on purpose" if left else "")

    def compute(self) -> str:
        """Logits of the patched model, untuned and, if there is a tuned file, sparse."""
        logits = self.forward()
        say("input", f"{self.ids.shape[1]} tokens of Python source")
        say("logits", f"shape {list(logits.shape)}, {spread(logits)}")
        if not bool(torch.isfinite(logits).all()):
            raise Failure("the logits are not finite")
        if not torch.equal(logits, self.logits):
            worst = float((logits.float() - self.logits.float()).abs().max())
            raise Failure(f"untuned, the patched model differs from the unpatched one, by up to {worst:.3g}")
        say("untuned", "equal to the unpatched model bit for bit")
        if self.args.model_out_path is None:
            return "equal bit for bit while untuned"
        patch_and_load(self.model, self.args.model_out_path, self.args.layer_range)
        self.tuned = True
        record_density(self.model)
        before = fallback_counts()
        sparse, density = self.forward(), take_density(self.model)
        cosine = float(cosine_similarity(sparse, self.logits))
        heads = [(int(module.is_sparse.sum()), module.heads or 0) for module in sparse_modules(self.model).values()]  # type: ignore[union-attr]
        say("tuned file", self.args.model_out_path)
        say("sparse heads", f"{sum(on for on, _ in heads)} of {sum(of for _, of in heads)}")
        say("sparse logits", spread(sparse))
        say("density", "no layer ran sparse" if density is None else f"{density:.1%} of the blocks kept")
        say("cosine", f"{cosine:.6f} between sparse and dense logits")
        for reason, count in fallback_counts().items():
            if count > before.get(reason, 0):
                say("fallback", f"{count - before.get(reason, 0)} calls: {reason}")
        if not cosine >= LEAST_COSINE:
            raise Failure(f"cosine of sparse and dense logits is {cosine:.4f}, below {LEAST_COSINE}")
        if density is None and any(on for on, _ in heads):
            raise Failure("the file has sparse heads, but no layer ran sparse (is the input shorter than a block?)")
        return f"equal bit for bit while untuned; cosine {cosine:.4f} with the tuned file"

    def generate(self) -> str:
        """Generated tokens of the patched model, then restore it and check that it is what it was."""
        restore(self.model)
        prompt = self.ids
        if self.args.prompt is not None:
            prompt = encode(self.tokenizer, self.args.prompt, self.ids.device)
        if not prompt.shape[1]:
            raise Failure("the prompt is empty")
        expected = self.continued(prompt)
        set_spas_sage_attn_llama(self.model, layer_range=self.args.layer_range)
        got = self.continued(prompt)
        lines = self.tokenizer.decode(prompt[0]).splitlines()
        say("input", f"{prompt.shape[1]} tokens" + (", which end in:" if len(lines) > SHOWN_LINES else ":"))
        quote("\n".join(lines[-SHOWN_LINES:]))
        say("output", f"{len(got)} tokens:")
        quote(self.tokenizer.decode(got))
        if not got:
            raise Failure("the model generated nothing")
        if got != expected:
            same = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), len(got))
            raise Failure(f"untuned, the patched model generates other tokens from token {same} on")
        say("untuned", f"the {len(got)} tokens of the unpatched model")
        if self.tuned:
            patch_and_load(self.model, self.args.model_out_path, self.args.layer_range)
            sparse = self.continued(prompt)
            ratio = difflib.SequenceMatcher(None, got, sparse, autojunk=False).ratio()
            say("sparse output", f"{len(sparse)} tokens, similarity {ratio:.2f}" + (":" if sparse != got else ""))
            if sparse != got:
                quote(self.tokenizer.decode(sparse))
        restore(self.model)
        modules = dict(self.model.named_modules())
        if modules.keys() != self.modules.keys() or any(modules[path] is not self.modules[path] for path in modules):
            raise Failure("restore() did not put the original modules back")
        if list(self.model.state_dict()) != self.keys:
            raise Failure("restore() left other keys in the state_dict")
        if not torch.equal(self.forward(), self.logits):
            raise Failure("the restored model's logits are not those of the unpatched one")
        say("restored", "the same modules, state_dict keys and logits, bit for bit")
        return "equal tokens while untuned; restore() gives the original back"

    def forward(self) -> Tensor:
        with torch.inference_mode():
            return self.model(input_ids=self.ids, use_cache=False).logits

    def continued(self, prompt: Tensor) -> list[int]:
        return greedy(self.model, self.tokenizer, prompt, self.args.max_new_tokens)

    def steps(self) -> Iterator[Step]:
        yield "Load the model", self.load
        yield "Inspect its structure", self.inspect
        yield "Apply sparse attention", self.apply
        yield "Forward pass", self.compute
        yield "Generation and restore", self.generate


def describe(path: str, layer: nn.Module) -> str:
    """The attributes of an attention layer that matter here, one line each; a Failure when they do not fit."""
    config: Any = getattr(layer, "config", None)
    missing = [name for name in (*PROJECTIONS, "head_dim", "scaling") if not hasattr(layer, name)]
    if config is None or missing:
        raise Failure(f"{path} ({type(layer).__name__}) lacks {', '.join(missing) or 'config'}")
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, layer.head_dim
    if heads % kv_heads:
        raise Failure(f"{path}: {heads} heads are no multiple of {kv_heads} key/value heads")
    if head_dim not in HEAD_DIMS:
        raise Failure(f"{path}: head dim {head_dim} is not in {HEAD_DIMS[0]} … {HEAD_DIMS[-1]}")
    wanted = dict(zip(PROJECTIONS, (heads, kv_heads, kv_heads), strict=False))
    rows = []
    for name in PROJECTIONS:
        projection: Any = getattr(layer, name)
        if name in wanted and projection.out_features != wanted[name] * head_dim:
            raise Failure(f"{path}.{name} gives {projection.out_features} features, not {wanted[name]} × {head_dim}")
        kind = type(projection).__name__
        rows.append(f"{name}: {kind} {projection.in_features} → {projection.out_features}")
    return "\n".join(
        [
            f"class {type(layer).__name__} ({type(layer).__module__})",
            f"{heads} heads, {kv_heads} key/value heads (groups of {heads // kv_heads}), head dim {head_dim}, "
            f"scaling {layer.scaling:.6g}",
            *rows,
        ]
    )


def spread(logits: Tensor) -> str:
    values = logits.float()
    return f"{values.min():.4f} to {values.max():.4f}, mean {values.mean():.4f}, std {values.std():.4f}"


def quote(text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"        | {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(DEMO), help="a folder or a name on the hub (default: the demo model)")
    add("--model_out_path", help="a tuned file: compare its sparse logits with the dense ones")
    add("--layer_range", type=layer_range, help="start,stop: only these layers (default: all)")
    add("--device", help="cuda, cpu, … (default: cuda if there is one)")
    add("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's; float32 on a processor")
    add("--max_length", type=int, default=1024, help="tokens of the forward pass (default: 1024)")
    add("--prompt", help="text to continue (default: the text of the forward pass)")
    add("--max_new_tokens", type=int, default=48, help="tokens to generate (default: 48)")
    args = parser.parse_args(argv)
    for name in ("max_length", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")

    return run_steps(list(Check(args).steps()), needed=3)


if __name__ == "__main__":
    sys.exit(main())
