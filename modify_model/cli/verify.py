"""Check in five steps that a model can be patched, computes what it did before, and can be restored.

Until thresholds are tuned or loaded, a patched model has to give the bits of the unpatched one, in one call of each
transformer and in a whole generation. Then sparse attention is tried: keeping every block it has to agree with dense
attention, with low thresholds it has to leave blocks out; a tuned file is compared with dense as well.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import autotune
from autotune import Tuned, record_density
from autotune.module import sparse_modules, transformers_of
from autotune.tuned import PV_OFF
from modify_model import patch, restore
from modify_model import verify as find_layers
from modify_model.families import find_family
from spas_attn import fallback_counts
from spas_attn.metrics import cosine_similarity

from .driver import Subject, apply

EQUAL_COSINE = 0.999  # of an output with every block kept and the dense one: rounding of another kernel, through depth
TUNED_COSINE = 0.9
LOW = 0.3  # a threshold that leaves blocks out of any attention that is not quite uniform


class Failure(Exception):
    """A step failed for the reason given."""


def say(what: str, value: object) -> None:
    """Print one fact of the step in progress."""
    print(f"    {what + ':':15} {value}", flush=True)


class Verification:
    """The five steps, in order, and what later ones need from earlier ones; each returns a sentence or raises."""

    subject: Subject
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]  # of each transformer
    outputs: dict[str, Tensor]  # of the unpatched transformers for these calls
    generated: Tensor  # by the unpatched model
    modules: dict[str, tuple[nn.Module, Any]]  # of the unpatched model, and their processors
    keys: list[str]  # of its state_dicts

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def load(self) -> str:
        began = time.perf_counter()
        self.subject = self.args.kind(self.args)
        say("model", f"{self.args.model_name}, {self.subject}")
        for prefix, part in self.parts():
            parameter = next(part.parameters())
            count = f"{sum(p.numel() for p in part.parameters()):,} parameters"
            where = f"{parameter.dtype}, {parameter.device}".replace("torch.", "")
            say(prefix.rstrip(".") or "transformer", f"{type(part).__name__}, {count}, {where}")
        return f"loaded in {time.perf_counter() - began:.1f} s"

    def inspect(self) -> str:
        kinds: dict[str, list[str]] = {}
        for prefix, part in self.parts():
            family = find_family(part)
            say("family", family.name)
            for layer in family.layers(part):
                reason = family.unsupported(layer.attention)
                if reason is not None:
                    raise Failure(f"layer {layer.path!r} cannot be made sparse: {reason}")
                kinds.setdefault(describe(family, layer.attention), []).append(prefix + layer.path)
        for text, paths in kinds.items():
            say("layers", f"{len(paths)}: {paths[0]}" + (f" … {paths[-1]}" if len(paths) > 1 else ""))
            print(f"        {text}")
        count = sum(map(len, kinds.values()))
        return f"{count} attention layers, {'all alike' if len(kinds) == 1 else f'{len(kinds)} kinds'}"

    def install(self) -> str:
        self.calls = self.subject.calls()
        self.outputs = self.run()
        self.generated, _ = self.subject.sample()
        self.modules, self.keys = self.structure()
        if not all(bool(torch.isfinite(x).all()) for x in (*self.outputs.values(), self.generated)):
            raise Failure("the unpatched model computes values that are not finite")
        patch(self.subject.model, layer_range=self.args.layer_range)
        found = find_layers(self.subject.model)
        if not found.ok:
            raise Failure("not every attention layer is replaced")
        if self.structure()[1] != self.keys:
            raise Failure("the patch changed the keys of the state_dict")
        left = len(found.layers) - found.replaced
        return f"{found.replaced} layers replaced" + (f", {left} left on purpose" if left else "")

    def compute(self) -> str:
        for prefix, output in self.run().items():
            say("output", f"{prefix}{list(output.shape)}, {spread(output)}")
            if not torch.equal(output, self.outputs[prefix]):
                worst = float((output.float() - self.outputs[prefix].float()).abs().max())
                raise Failure(f"untuned, the patched model differs from the unpatched one, by up to {worst:.3g}")
        say("untuned", "equal to the unpatched model bit for bit")
        self.set_thresholds(1.0)
        cosine, _ = self.sparse("every block", EQUAL_COSINE)
        self.set_thresholds(LOW)
        few, density = self.sparse("few blocks", -1.0)
        if not density < 1:
            raise Failure("with low thresholds no block was left out: sparse attention does not run")
        if few == cosine:
            raise Failure("with low thresholds the output is that with every block kept")
        text = f"equal bit for bit while untuned; {1 - density:.0%} left out with low thresholds"
        if self.args.model_out_path is None:
            return text
        restore(self.subject.model)
        apply(self.subject, self.args, autotune.load(self.args.model_out_path))
        tuned = [module.tuned for module in sparse_modules(self.subject.model).values()]
        heads = [int(layer.is_sparse.sum()) for layer in tuned if layer is not None]
        say("sparse heads", f"{sum(heads)} in {len(tuned)} layers of {self.args.model_out_path}")
        return f"{text}; cosine {self.sparse('tuned', TUNED_COSINE)[0]:.4f} with the tuned file"

    def generate(self) -> str:
        restore(self.subject.model)
        patch(self.subject.model, layer_range=self.args.layer_range)
        generated, text = self.subject.sample()
        say("generated", text)
        if not torch.equal(generated, self.generated):
            raise Failure("untuned, the patched model generates something else")
        say("untuned", "what the unpatched model generates, bit for bit")
        if self.args.model_out_path is not None:
            apply(self.subject, self.args, autotune.load(self.args.model_out_path))
            sparse, text = self.subject.sample()
            say("tuned", text)
            if not bool(torch.isfinite(sparse).all()):
                raise Failure("with the tuned file, what is generated is not finite")
        restore(self.subject.model)
        modules, keys = self.structure()
        if modules.keys() != self.modules.keys() or any(
            now is not was for path in modules for now, was in zip(modules[path], self.modules[path], strict=True)
        ):
            raise Failure("restore() did not put the original modules and processors back")
        if keys != self.keys:
            raise Failure("restore() left other keys in the state_dict")
        if not all(torch.equal(output, self.outputs[prefix]) for prefix, output in self.run().items()):
            raise Failure("the restored model's output is not that of the unpatched one")
        say("restored", "the same modules, state_dict keys and output, bit for bit")
        return "the same generation while untuned; restore() gives the original back"

    def parts(self) -> list[tuple[str, nn.Module]]:
        return transformers_of(self.subject.model)

    def run(self) -> dict[str, Tensor]:
        parts = dict(self.parts())
        return {prefix: parts[prefix](*args, **kwargs)[0].clone() for prefix, (args, kwargs) in self.calls.items()}

    def structure(self) -> tuple[dict[str, tuple[nn.Module, Any]], list[str]]:
        modules = {
            prefix + path: (module, getattr(module, "processor", None))
            for prefix, part in self.parts()
            for path, module in part.named_modules()
        }
        return modules, [prefix + key for prefix, part in self.parts() for key in part.state_dict()]

    def set_thresholds(self, threshold: float) -> None:
        """The same threshold for every head, no similarity filter, no PV skip; density 0: the sparse kernels always."""
        for module in sparse_modules(self.subject.model).values():
            heads = module.heads or 0
            full = torch.ones(heads)
            module.set_thresholds(Tuned(full.bool(), full * threshold, full * -1.0, full * PV_OFF, 0.0))

    def sparse(self, what: str, least: float) -> tuple[float, float]:
        """Lowest cosine of the sparse outputs with the dense ones, and the mean density."""
        before = fallback_counts()
        with record_density(self.subject.model) as density:
            outputs = self.run()
        fallbacks = {reason: n for reason, n in fallback_counts().items() if n > before.get(reason, 0)}
        if fallbacks:
            raise Failure(f"calls fell back to dense attention: {'; '.join(fallbacks)}")
        cosine = min(float(cosine_similarity(output, self.outputs[prefix])) for prefix, output in outputs.items())
        say(what, f"cosine {cosine:.6f} with dense, {density.mean:.1%} of the blocks computed")
        if not cosine >= least:  # also nan
            raise Failure(f"{what}: cosine with dense is {cosine:.5f}, below {least}")
        return cosine, density.mean


def describe(family: Any, attention: Any) -> str:
    """What matters of an attention layer, in one line."""
    heads, dim = family.heads(attention)
    groups = getattr(getattr(attention, "config", None), "num_key_value_heads", heads)
    processor = f" with {type(attention.processor).__name__}" if hasattr(attention, "processor") else ""
    shared = f", {groups} key/value heads" if groups != heads else ""
    return f"{type(attention).__name__}{processor}, {heads} heads{shared}, head dim {dim}"


def spread(output: Tensor) -> str:
    """The range of a tensor's values."""
    x = output.float()
    return f"{x.min():.4f} to {x.max():.4f}, mean {x.mean():.4f}, std {x.std():.4f}"


@torch.no_grad()
def verify(args: argparse.Namespace) -> int:
    """Run the steps and print how they went; returns the exit code: 0 only if all pass."""
    check = Verification(args)
    steps = (
        ("Load the model", check.load),
        ("Inspect its structure", check.inspect),
        ("Apply sparse attention", check.install),
        ("Forward pass", check.compute),
        ("Generation and restore", check.generate),
    )
    passed, stopped = 0, False
    for number, (title, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {title}", flush=True)
        if stopped:
            print("    not run")
            continue
        try:
            print(f"    PASS: {step()}", flush=True)
            passed += 1
        except (Failure, ValueError, OSError, torch.OutOfMemoryError) as error:
            print(f"    FAIL: {error}", flush=True)
            stopped = number <= 3  # the others need what these make
    print(f"{passed}/{len(steps)} steps passed")
    return int(passed < len(steps))
