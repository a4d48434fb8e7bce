"""Check in five steps that a diffusion pipeline can be patched, computes what it did before, and can be restored.

    python evaluate/verify_diffusion_implementation.py --model_name tiny:Wan              # no download, seconds
    python evaluate/verify_diffusion_implementation.py --model_name THUDM/CogVideoX-2b --frames 17
    python evaluate/verify_diffusion_implementation.py --model_name models_dict/demo_wan --model_out_path out/demo.pt

Until thresholds are tuned or loaded, a patched model has to give the bits of the unpatched one, in one call of the
transformer and in a whole generation. Then sparse attention is tried: keeping every block it has to agree with dense
attention, with low thresholds it has to leave blocks out; with --model_out_path, the tuned thresholds are compared with
dense as well. Exit code 0 only if all five steps pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cogvideo_example
import flux_example
import hunyuan_example
import torch
import wan_example
from _diffusion import read_prompts
from _diffusion_compare import Densities
from _diffusion_models import TINY_PREFIX, Example, Sampler, Size, load
from _diffusion_tiny import TINY
from _loading import DTYPES
from _verify import Failure, Step, run_steps, say
from torch import Tensor, nn

from autotune import SparseAttention, load_sparse_attention_state_dict
from autotune import load as load_tuned
from autotune.module import Thresholds, sparse_modules, transformers_of
from modify_model import patch, restore, verify
from modify_model.patching import find_family
from spas_attn import fallback_counts
from spas_attn.metrics import cosine_similarity

SCRIPTS = (cogvideo_example, flux_example, hunyuan_example, wan_example)
ANY = Example(
    patch=patch,
    pipelines={
        **{name: size for script in SCRIPTS for name, size in script.EXAMPLE.pipelines.items()},
        "LTXPipeline": Size(512, 704, 161, 50),
        "QwenImagePipeline": Size(1328, 1328, None, 50),
    },
    model_name="",
    tiny=tuple(TINY),
    float32=("vae",),
)
EQUAL_COSINE = 0.999  # of an output with every block kept and the dense one: rounding of another kernel, through depth
TUNED_COSINE = 0.9
LOW = 0.3  # a cdf threshold that leaves blocks out of any attention that is not quite uniform


@dataclass(frozen=True)
class Recorded:
    """One call of a transformer: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class Check:
    """The five steps, in order, and what later ones need from earlier ones."""

    sampler: Sampler
    prompt: str
    latents: Tensor  # of the unpatched pipeline
    calls: dict[str, Recorded]  # of its transformers, by their prefix in a tuned file: the first call of each
    keys: dict[str, list[str]]  # of their state_dicts
    processors: list[object]  # of their attention layers

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def load(self) -> str:
        """Load the pipeline."""
        began = time.perf_counter()
        names = ("height", "width", "frames", "steps", "device", "dtype", "offload")
        self.sampler = load(ANY, self.args.model_name, **{name: getattr(self.args, name) for name in names})
        prompts = read_prompts(None, self.sampler)
        self.prompt = prompts[0]
        say("pipeline", f"{type(self.sampler.pipe).__name__}, {self.args.model_name}")
        for prefix, part in self.parts():
            parameter = next(part.parameters())
            count = f"{sum(p.numel() for p in part.parameters()):,} parameters"
            where = f"{parameter.dtype}, {parameter.device}".replace("torch.", "")
            say(prefix.rstrip(".") or "transformer", f"{type(part).__name__}, {count}, {where}")
        say("size", f"{self.sampler.size}, {self.sampler.size.steps} steps")
        return f"loaded in {time.perf_counter() - began:.1f} s"

    def inspect(self) -> str:
        """Find the self-attention layers and check that they are as the adapter expects."""
        kinds: set[str] = set()
        for prefix, part in self.parts():
            family = find_family(part)
            patched = [path for path, module in part.named_modules() if isinstance(module, SparseAttention)]
            if patched:
                raise Failure(f"the model is already patched, first at {prefix}{patched[0]}")
            layers = family.layers(part)
            if not layers:
                raise Failure(f"no self-attention layer was found in {type(part).__name__}")
            say("family", family.name)
            groups: dict[str, list[str]] = {}
            for path, layer in layers:
                reason = family.unsupported(layer)
                if reason is not None:
                    raise Failure(f"layer {path!r} cannot be made sparse: {reason}")
                groups.setdefault(describe(layer), []).append(prefix + path)
            for text, paths in groups.items():
                names = f"{paths[0]} … {paths[-1]}" if len(paths) > 1 else paths[0]
                say("layers", f"{len(paths)} of {len(layers)}: {names}")
                print(f"        {text}")
            kinds |= groups.keys()
        count = len(self.layers())
        return f"{count} self-attention layers, {'all alike' if len(kinds) == 1 else f'{len(kinds)} kinds'}"

    def apply(self) -> str:
        """Record what the unpatched pipeline is and computes, then patch it."""
        self.keys = {prefix: list(part.state_dict()) for prefix, part in self.parts()}
        self.processors = [layer.processor for layer in self.layers()]
        self.calls, self.latents = self.record()
        if not bool(torch.isfinite(self.latents).all()):
            raise Failure("the unpatched pipeline gives latents that are not finite")
        patch(self.sampler.pipe)
        result = verify(self.sampler.pipe)
        if not result.ok or result.replaced != len(self.processors):
            raise Failure(f"{result.replaced} layers are replaced, {len(self.processors)} should be")
        self.check_keys("the patch")
        return f"{result.replaced}/{len(self.processors)} layers replaced"

    def compute(self) -> str:
        """One call of each transformer: untuned, with every block kept, with few, and with the tuned file."""
        for prefix, call in self.calls.items():
            say("input", f"{prefix}{shapes(call)}")
            output = self.output(prefix)
            say("output", f"shape {list(output.shape)}, {spread(output)}")
            if not torch.equal(output, call.output):
                worst = float((output.float() - call.output.float()).abs().max())
                raise Failure(f"untuned, the patched model differs from the unpatched one, by up to {worst:.3g}")
        say("untuned", "equal to the unpatched model bit for bit")
        self.set_thresholds(1.0)
        cosine, density = self.sparse()
        say("every block", f"kept: cosine {cosine:.6f}, {density:.1%} of the blocks computed")
        if not cosine >= EQUAL_COSINE:
            raise Failure(f"with every block kept, cosine with dense is {cosine:.5f}, below {EQUAL_COSINE}")
        self.set_thresholds(LOW)
        few, density = self.sparse()
        say("few blocks", f"kept: cosine {few:.6f}, {density:.1%} of the blocks computed")
        if not density < 1:
            raise Failure("with low thresholds no block was left out: sparse attention does not run")
        if few == cosine:
            raise Failure("with low thresholds the output is that with every block kept")
        text = f"equal bit for bit while untuned; {1 - density:.0%} left out with low thresholds"
        return text if self.args.model_out_path is None else f"{text}; {self.tuned()}"

    def tuned(self) -> str:
        """The tuned file against dense."""
        state = load_tuned(self.args.model_out_path)
        load_sparse_attention_state_dict(self.sampler.pipe, state)
        cosine, density = self.sparse()
        heads = [(int(module.is_sparse.sum()), module.heads or 0) for module in self.modules()]  # type: ignore[union-attr]
        say("tuned file", self.args.model_out_path)
        say("sparse heads", f"{sum(on for on, _ in heads)} of {sum(of for _, of in heads)}")
        say("tuned", f"cosine {cosine:.6f}, {density:.1%} of the blocks computed")
        if not cosine >= TUNED_COSINE:
            raise Failure(f"with the tuned file, cosine with dense is {cosine:.4f}, below {TUNED_COSINE}")
        return f"cosine {cosine:.4f} with the tuned file"

    def generate(self) -> str:
        """Whole generations of the patched pipeline, then restore it and check that it is what it was."""
        restore(self.sampler.pipe)
        patch(self.sampler.pipe)
        latents = self.sampler.watch(self.prompt, 0)
        say("prompt", self.prompt)
        if not torch.equal(latents, self.latents):
            raise Failure("untuned, the patched pipeline generates other latents")
        say("untuned", "the latents of the unpatched pipeline, bit for bit")
        if self.args.model_out_path is not None:
            load_sparse_attention_state_dict(self.sampler.pipe, self.args.model_out_path)
            sparse = self.sampler.watch(self.prompt, 0)
            say("tuned", f"cosine of the latents with the dense ones {float(cosine_similarity(sparse, latents)):.4f}")
            if not bool(torch.isfinite(sparse).all()):
                raise Failure("with the tuned file, the latents are not finite")
        restore(self.sampler.pipe)
        if any(now is not was for now, was in zip([x.processor for x in self.layers()], self.processors, strict=True)):
            raise Failure("restore() did not put the original processors back")
        if any(isinstance(module, SparseAttention) for _, part in self.parts() for module in part.modules()):
            raise Failure("restore() left a SparseAttention in the model")
        self.check_keys("restore()")
        if not all(torch.equal(self.output(prefix), call.output) for prefix, call in self.calls.items()):
            raise Failure("the restored model's output is not that of the unpatched one")
        say("restored", "the same processors, state_dict keys and output, bit for bit")
        return "equal latents while untuned; restore() gives the original back"

    def steps(self) -> Iterator[Step]:
        yield "Load the pipeline", self.load
        yield "Inspect its structure", self.inspect
        yield "Apply sparse attention", self.apply
        yield "Forward pass", self.compute
        yield "Generation and restore", self.generate

    def parts(self) -> list[tuple[str, nn.Module]]:
        return transformers_of(self.sampler.pipe)

    def layers(self) -> list[Any]:
        return [layer for _, part in self.parts() for _, layer in find_family(part).layers(part)]

    def modules(self) -> list[SparseAttention]:
        return list(sparse_modules(self.sampler.pipe).values())

    def record(self) -> tuple[dict[str, Recorded], Tensor]:
        """Run the pipeline; returns the first call of each transformer, and the latents."""
        calls: dict[str, Recorded] = {}
        handles = []
        for prefix, part in self.parts():

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, prefix: str = prefix) -> None:
                calls.setdefault(prefix, Recorded(args, dict(kwargs), output[0].detach().clone()))

            handles.append(part.register_forward_hook(hook, with_kwargs=True))
        try:
            latents = self.sampler.watch(self.prompt, 0)
        finally:
            for handle in handles:
                handle.remove()
        return calls, latents

    def output(self, prefix: str) -> Tensor:
        """A transformer's output for the recorded call."""
        call = self.calls[prefix]
        return dict(self.parts())[prefix](*call.args, **call.kwargs)[0]

    def set_thresholds(self, cdf: float) -> None:
        """The same cdf threshold for every head, no similarity filter, no PV skip."""
        for module in self.modules():
            heads = module.heads or 0
            on, full = torch.ones(heads, dtype=torch.bool), torch.full((heads,), cdf)
            module.set_thresholds(Thresholds(on, full, torch.full((heads,), -1.0), torch.full((heads,), 50.0)))
            module.expected_density = 0.0  # the sparse kernels, however short the sequence

    def sparse(self) -> tuple[float, float]:
        """Lowest cosine of the transformers' sparse outputs with the dense ones, and the mean density."""
        before = fallback_counts()
        with Densities(self.sampler.pipe) as densities:
            pairs = [(self.output(prefix), call.output) for prefix, call in self.calls.items()]
        for reason, count in fallback_counts().items():
            if count > before.get(reason, 0):
                raise Failure(f"{count - before.get(reason, 0)} calls ran dense: {reason}")
        if not all(bool(torch.isfinite(output).all()) for output, _ in pairs):
            raise Failure("the sparse output is not finite")
        cosine = min(float(cosine_similarity(output, exact)) for output, exact in pairs)
        return cosine, float(densities.result()[1].nanmean())

    def check_keys(self, what: str) -> None:
        if {prefix: list(part.state_dict()) for prefix, part in self.parts()} != self.keys:
            raise Failure(f"{what} changed the keys of the state_dict")


def describe(layer: Any) -> str:
    """The attributes of an attention layer that matter here, in one line."""
    inner = layer.to_q.out_features if hasattr(layer.to_q, "out_features") else None
    dim = f", head dim {inner // layer.heads}" if inner else ""
    return f"{type(layer).__name__} with {type(layer.processor).__name__}, {layer.heads} heads{dim}"


def shapes(call: Recorded) -> str:
    """The tensors of a call, by name and shape."""
    found = {f"argument {i}": value for i, value in enumerate(call.args)} | call.kwargs
    return ", ".join(f"{name} {list(x.shape)}" for name, x in found.items() if isinstance(x, Tensor) and x.dim() > 1)


def spread(output: Tensor) -> str:
    values = output.float()
    return f"{values.min():.4f} to {values.max():.4f}, mean {values.mean():.4f}, std {values.std():.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    tiny = ", ".join(TINY_PREFIX + name for name in TINY)
    add("--model_name", required=True, help=f"a folder, a name on the hub, or one of {tiny}")
    add("--model_out_path", help="a tuned file: compare its sparse output with the dense one")
    for name in ("height", "width", "frames"):
        add(f"--{name}", type=int, help="default: as usual for the model")
    add("--steps", type=int, default=2, help="denoising steps of the generation (default: 2)")
    add("--device", help="cuda, cpu, … (default: cuda if there is one)")
    add("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16; float32 on a processor")
    add("--offload", action="store_true", help="keep only the component that is running on the GPU")
    args = parser.parse_args(argv)
    for name in ("height", "width", "frames", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    with torch.no_grad():
        return run_steps(list(Check(args).steps()), needed=3)


if __name__ == "__main__":
    sys.exit(main())
