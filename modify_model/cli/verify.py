"""Check in five steps that a model can be patched, computes what it did before, and can be restored.

Until thresholds are tuned or loaded, a patched model has to give the bits of the unpatched one, in one call of each
transformer and in a whole generation. Then sparse attention is tried: keeping every block it has to agree with dense
attention, with low thresholds it has to leave blocks out; a tuned file is compared with dense as well.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import autotune
from autotune import Tuned, record_density
from autotune.module import sparse_modules
from autotune.paths import transformers_of
from autotune.tuned import PV_OFF
from modify_model import patch, restore
from modify_model import verify as find_layers
from modify_model.families import find_family
from spas_attn import fallback_counts
from spas_attn.metrics import cosine_similarity

from .driver import apply

EQUAL_COSINE = 0.999  # of an output with every block kept and the dense one: rounding of another kernel, through depth
TUNED_COSINE = 0.9
LOW = 0.3  # a threshold that leaves blocks out of any attention that is not quite uniform


class Failure(Exception):
    """A step failed for the reason given."""


def say(what: str, value: object) -> None:
    """Print one fact of the step in progress."""
    print(f"    {what + ':':15} {value}", flush=True)


def require(holds: bool, otherwise: str) -> None:
    """Fail the step in progress unless something holds."""
    if not holds:
        raise Failure(otherwise)


class Verification:
    """The five steps, in order, each with what later ones need; a step returns a sentence or raises."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def load(self) -> str:
        self.subject = self.args.kind(self.args)
        self.model = self.subject.model
        self.parts: dict[str, nn.Module] = dict(transformers_of(self.model))
        for prefix, part in self.parts.items():
            parameter, count = next(part.parameters()), sum(p.numel() for p in part.parameters())
            where = f"{parameter.dtype}, {parameter.device}".replace("torch.", "")
            say(prefix.rstrip(".") or "model", f"{type(part).__name__}, {count:,} parameters, {where}")
        return f"{self.args.model_name}, {self.subject}"

    def inspect(self) -> str:
        kinds: dict[str, list[str]] = {}
        for prefix, part in self.parts.items():
            family = find_family(part)
            for layer in family.layers(part):
                reason = family.unsupported(layer.attention)
                require(reason is None, f"layer {layer.path!r} cannot be made sparse: {reason}")
                heads, dim = family.heads(layer.attention)
                groups = getattr(getattr(layer.attention, "config", None), "num_key_value_heads", heads)
                text = f"{type(layer.attention).__name__}, {heads} heads, {groups} key/value heads, head dim {dim}"
                kinds.setdefault(text, []).append(prefix + layer.path)
        for text, paths in kinds.items():
            say(f"{len(paths)} layers", f"{text}: {paths[0]} … {paths[-1]}")
        return f"{find_family(self.parts['']).name}, {sum(map(len, kinds.values()))} attention layers"

    def install(self) -> str:
        self.calls, (self.generated, _) = self.subject.calls(), self.subject.sample()
        self.outputs, self.structure = self.run(), self.look()
        finite = [bool(torch.isfinite(x).all()) for x in (*self.outputs.values(), self.generated)]
        require(all(finite), "the unpatched model computes values that are not finite")
        patch(self.model, layer_range=self.args.layer_range)
        found = find_layers(self.model)
        require(found.ok, "not every attention layer is replaced")
        require(self.look()[1] == self.structure[1], "the patch changed the keys of the state_dict")
        return f"{found.replaced} layers replaced, {len(found.layers) - found.replaced} left on purpose"

    def compute(self) -> str:
        for prefix, output in self.run().items():
            worst = float((output.float() - self.outputs[prefix].float()).abs().max())
            require(worst == 0, f"untuned, the patched model differs from the unpatched one, by up to {worst:.3g}")
            say("untuned", f"{prefix}output {list(output.shape)} equal to the unpatched model's bit for bit")
        for module in sparse_modules(self.model).values():
            self.set_threshold(module, 1.0)
        cosine, _ = self.sparse("every block", EQUAL_COSINE)
        for module in sparse_modules(self.model).values():
            self.set_threshold(module, LOW)
        few, density = self.sparse("few blocks", -1.0)
        require(density < 1, "with low thresholds no block was left out: no sparse attention, or too short an input")
        require(few != cosine, "with low thresholds the output is that with every block kept")
        text = f"equal bit for bit while untuned; {1 - density:.0%} left out with low thresholds"
        if self.args.model_out_path is None:
            return text
        self.load_tuned()
        return f"{text}; cosine {self.sparse('tuned', TUNED_COSINE)[0]:.4f} with the tuned file"

    def generate(self) -> str:
        restore(self.model)
        patch(self.model, layer_range=self.args.layer_range)
        generated, text = self.subject.sample()
        say("untuned", text)
        require(torch.equal(generated, self.generated), "untuned, the patched model generates something else")
        if self.args.model_out_path is not None:
            self.load_tuned()
            sparse, text = self.subject.sample()
            say("tuned", text)
            require(bool(torch.isfinite(sparse).all()), "with the tuned file, what is generated is not finite")
        restore(self.model)
        require(self.look() == self.structure, "restore() did not put the original modules and processors back")
        equal = [torch.equal(output, self.outputs[prefix]) for prefix, output in self.run().items()]
        require(all(equal), "the restored model's output is not that of the unpatched one")
        say("restored", "the same modules, state_dict keys and output, bit for bit")
        return "the same generation while untuned; restore() gives the original back"

    def run(self) -> dict[str, Tensor]:
        """The output of each transformer for its call."""
        calls = self.calls.items()
        return {prefix: self.parts[prefix](*args, **kwargs)[0].clone() for prefix, (args, kwargs) in calls}

    def look(self) -> tuple[list[Any], list[str]]:
        """What the transformers consist of, and the keys of their state_dicts."""
        parts = self.parts.items()
        modules = [(p + path, id(x), id(getattr(x, "processor", 0))) for p, m in parts for path, x in m.named_modules()]
        return modules, [prefix + key for prefix, part in parts for key in part.state_dict()]

    def load_tuned(self) -> None:
        restore(self.model)
        apply(self.subject, self.args, autotune.load(self.args.model_out_path))

    @staticmethod
    def set_threshold(module: autotune.SparseAttention, threshold: float) -> None:
        """The same for every head, no similarity filter, no PV skip; density 0, so that the sparse kernels run."""
        full = torch.ones(module.heads or 0)
        module.set_thresholds(Tuned(full.bool(), full * threshold, -full, full * PV_OFF, 0.0))

    def sparse(self, what: str, least: float) -> tuple[float, float]:
        """Lowest cosine of the sparse outputs with the dense ones, and the mean density."""
        before = fallback_counts()
        with record_density(self.model) as density:
            outputs = self.run()
        fallbacks = [reason for reason, count in fallback_counts().items() if count > before.get(reason, 0)]
        require(not fallbacks, f"calls fell back to dense attention: {'; '.join(fallbacks)}")
        cosine = min(float(cosine_similarity(output, self.outputs[prefix])) for prefix, output in outputs.items())
        say(what, f"cosine {cosine:.6f} with dense, {density.mean:.1%} of the blocks computed")
        require(cosine >= least, f"{what}: cosine with dense is {cosine:.5f}, below {least}")
        return cosine, density.mean


@torch.no_grad()
def verify(args: argparse.Namespace) -> int:
    """Run the steps and print how they went; returns the exit code: 0 only if all pass."""
    check, passed, stopped = Verification(args), 0, False
    steps = {
        "Load the model": check.load,
        "Inspect its structure": check.inspect,
        "Apply sparse attention": check.install,
        "Forward pass": check.compute,
        "Generation and restore": check.generate,
    }
    for number, (title, step) in enumerate(steps.items(), 1):
        print(f"[{number}/{len(steps)}] {title}" + "\n    not run" * stopped, flush=True)
        if stopped:
            continue
        try:
            print(f"    PASS: {step()}", flush=True)
            passed += 1
        except (Failure, ValueError, OSError, torch.OutOfMemoryError) as error:
            print(f"    FAIL: {error}", flush=True)
            stopped = number <= 3  # the others need what these make
    print(f"{passed}/{len(steps)} steps passed")
    return int(passed < len(steps))
