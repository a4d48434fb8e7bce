"""Train the demo LLaMA: a byte-level model of Python source, from code that is installed on every machine.

    python evaluate/training/train_llama.py --out out/demo_first --minutes 8.1    # one GPU
    python evaluate/training/train_llama.py --finish out/demo_first --out out/demo --minutes 0.85 --lr 5e-4 --seed 1
    python evaluate/training/train_llama.py --out /tmp/demo --tiny                # a smoke test, CPU, seconds

The data are the standard library (three times) and installed packages, without tests, without the 60 held-out modules
and without files that share many lines with them. Weights, tokenizer, held-out texts and `training.json` go to `--out`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import _demos  # noqa: F401
import loop
import numpy as np
import torch
from texts import BYTE_OFFSET, EOS, byte_windows, copy_tests, plant_names
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from modify_model.cli.language import DEMO

LENGTH = 4096
STDLIB_TIMES = 3
COPY_SHARE = 1 / 8  # of the training windows
BANDS = [(1, 256), (256, 1024), (1024, 2048), (2048, LENGTH)]  # positions of the predicted bytes
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "_vendor", "externals"}
SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "__pycache__"}  # tables and help texts
# Import name: licence. All permissive; vendored parts under other terms are left out by SKIPPED_FOLDERS.
PACKAGES = {
    "torch": "BSD-3-Clause", "transformers": "Apache-2.0", "numpy": "BSD-3-Clause", "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause", "pandas": "BSD-3-Clause", "matplotlib": "PSF-based", "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause", "jax": "Apache-2.0", "statsmodels": "BSD-3-Clause", "setuptools": "MIT",
    "pygments": "BSD-2-Clause", "aiohttp": "Apache-2.0", "werkzeug": "BSD-3-Clause", "requests": "Apache-2.0",
    "urllib3": "MIT", "click": "BSD-3-Clause", "rich": "MIT", "jinja2": "BSD-3-Clause", "_pytest": "MIT", "attr": "MIT",
    "joblib": "BSD-3-Clause", "numba": "BSD-2-Clause", "seaborn": "BSD-3-Clause", "skimage": "BSD-3-Clause",
    "Cython": "Apache-2.0", "fsspec": "BSD-3-Clause", "huggingface_hub": "Apache-2.0", "mpmath": "BSD-3-Clause",
}  # fmt: skip
# Application code most like the standard library: with it, the data of the second stage.
CLOSE = ("numpy", "matplotlib", "setuptools", "aiohttp", "werkzeug", "requests", "urllib3", "click", "rich", "jinja2")
CLOSE += ("_pytest", "attr", "joblib", "Cython", "fsspec", "huggingface_hub")


def stdlib_path(module: str) -> Path:
    """The file of a standard library module on this machine."""
    path = Path(sysconfig.get_path("stdlib"), *module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def heldout_groups() -> dict[str, str]:
    """Group ("calibration" or "unseen") of every held-out module, from `heldout_files.txt`."""
    lines = (DEMO / "heldout_files.txt").read_text("utf-8").splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return {module: group for group, module in pairs}


def heldout_texts() -> dict[str, str]:
    """The held-out texts as shipped (Python 3.12's), by module."""
    return {path.stem: path.read_text("utf-8") for path in sorted((DEMO / "heldout").glob("*.txt"))}


def long_lines(text: str) -> set[str]:
    """Distinct stripped lines of 40 characters and more, without comments (licence headers): they betray a copy."""
    lines = {line.strip() for line in text.splitlines()}
    return {line for line in lines if len(line) >= 40 and not line.startswith("#")}


def training_files(
    heldout: dict[str, str], packages: Iterable[str], tiny: bool
) -> tuple[dict[str, list[bytes]], dict[str, Any]]:
    """Source files by package, in a fixed order, and a report of how many were dropped and why."""
    excluded = {stdlib_path(name) for name in heldout}
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name in () if tiny else packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots[name] = Path(next(iter(spec.submodule_search_locations)))
    held = [long_lines(text) for text in heldout.values()]
    owners: dict[str, list[int]] = {}
    for index, lines in enumerate(held):
        for line in lines:
            owners.setdefault(line, []).append(index)
    files: dict[str, list[bytes]] = {}
    seen, near_copies = set(), []
    dropped: Counter[str] = Counter()
    for name, root in roots.items():
        files[name] = []
        for path in tqdm(sorted(root.rglob("*.py")), desc=f"reading {name}", leave=False, mininterval=5):
            if path in excluded or SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                continue
            data = path.read_bytes().replace(b"\r\n", b"\n")
            digest = hashlib.sha1(data).digest()
            text = data.decode("utf-8", errors="ignore")
            if not 200 <= len(data) <= 400_000 or digest in seen:
                dropped["tiny, huge or duplicate"] += 1
                continue
            seen.add(digest)
            lines = long_lines(text)
            shared = Counter(index for line in lines for index in owners.get(line, ()))
            most = max(shared.values(), default=0)
            if most >= 15 or (most >= 5 and most >= 0.2 * len(lines)):
                near_copies.append(f"{name}/{path.relative_to(root)}")
                continue
            files[name].append(data)
            if tiny and len(files[name]) >= 200:
                break
    dropped["shares many lines with a held-out file"] = len(near_copies)
    report = {
        "megabytes": {name: round(sum(map(len, group)) / 1e6, 2) for name, group in files.items()},
        "files": {name: len(group) for name, group in files.items()},
        "licences": {"stdlib": "PSF-2.0"} | {name: PACKAGES[name] for name in files if name in PACKAGES},
        "dropped_files": dict(dropped),
        "near_copies": near_copies,
    }
    return files, report


class Batches:
    """Training windows: every byte once per epoch in a new cut, an eighth of them with planted names.

    `ids` is the whole corpus as int16 ids on the device, files separated by the end-of-file id.
    """

    def __init__(self, files: dict[str, list[bytes]], batch: int, device: torch.device, seed: int) -> None:
        """Shuffle the files (the standard library three times) and put them on the device."""
        self.rng = random.Random(f"training {seed}")
        self.batch, self.device, self.epochs = batch, device, 0
        self.long = [data for group in files.values() for data in group if len(data) >= LENGTH]
        ordered = [data for name, group in files.items() for data in group * (STDLIB_TIMES if name == "stdlib" else 1)]
        self.rng.shuffle(ordered)
        parts = []
        for data in ordered:
            parts += [np.frombuffer(data, np.uint8).astype(np.int16) + BYTE_OFFSET, np.array([EOS], np.int16)]
        self.ids = torch.from_numpy(np.concatenate(parts)).to(device)
        self.starts: list[int] = []
        self.window = torch.arange(LENGTH + 1, device=device)

    def next(self) -> torch.Tensor:
        """Ids `[batch, LENGTH + 1]`."""
        planted = round(self.batch * COPY_SHARE)
        while len(self.starts) < self.batch - planted:
            self.epochs += 1
            self.starts = list(range(self.rng.randrange(LENGTH), len(self.ids) - LENGTH - 1, LENGTH))
            self.rng.shuffle(self.starts)
        starts = torch.tensor([self.starts.pop() for _ in range(self.batch - planted)])
        rows = self.ids[starts.to(self.device)[:, None] + self.window].long()
        copies = b"".join(self._planted() for _ in range(planted))
        copied = torch.frombuffer(bytearray(copies), dtype=torch.uint8).to(self.device).long() + BYTE_OFFSET
        return torch.cat([rows, copied.view(planted, LENGTH + 1)])

    def _planted(self) -> bytes:
        data = self.rng.choice(self.long)
        start = data.rfind(b"\n", 0, self.rng.randint(0, len(data) - LENGTH)) + 1
        made = plant_names(data[start : start + LENGTH + 1], LENGTH + 1, self.rng)
        return made if len(made) == LENGTH + 1 else self._planted()


def make_model(tiny: bool) -> LlamaForCausalLM:
    """The demo's architecture; 264 ids are 259 rounded up to a multiple of 8, which bf16 matrix units want."""
    hidden, layers = (64, 2) if tiny else (512, 6)
    config = LlamaConfig(
        vocab_size=264, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64 if not tiny else 4, num_key_value_heads=2, head_dim=64 if not tiny else 16,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0}, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS, pad_token_id=0, use_cache=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Trainer:
    """A model in training: AdamW with a cosine that ends with the time."""

    def __init__(self, model: LlamaForCausalLM, batches: Batches, lr: float) -> None:
        self.model, self.batches, self.lr = model.train(), batches, lr
        decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        gpu = batches.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=lr, betas=(0.9, 0.95), fused=gpu,
        )  # fmt: skip
        self.compute = torch.compile(self.loss) if gpu else self.loss
        self.compute(batches.next()).backward()  # compiles, outside the time limit
        self.optimizer.zero_grad()

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of ids `[batch, LENGTH + 1]`, in nats."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def step(self, share: float) -> torch.Tensor:
        """One update at a `share` of the time: 2% warm-up, then the cosine."""
        warm = min(1.0, share / 0.02 + 0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warm * (0.5 + 0.5 * math.cos(math.pi * share))
        loss = self.compute(self.batches.next())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, heldout: dict[str, str], count: int, device: torch.device) -> dict[str, Any]:
    """Bits per byte on held-out windows, by position and group of files, and the share of names copied in full."""
    groups = heldout_groups()
    bits: dict[str, torch.Tensor] = {}
    size = 8 if device.type == "cuda" else 2
    for group in ("calibration", "unseen"):
        texts = [text for name, text in heldout.items() if groups[name] == group]
        found, rows = byte_windows(texts, LENGTH, count, seed=1), []
        for begin in range(0, count, size):
            ids = to_ids(found[begin : begin + size], device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            rows.append(torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").cpu())
        bits[group] = torch.cat(rows) / math.log(2)
    tests, right = copy_tests([*heldout.values()], count, distance=3000, length=LENGTH, seed=1), 0
    for begin in range(0, count, size):
        some = tests[begin : begin + size]
        ids = to_ids([test.prompt + test.answer for test in some], device)
        guesses = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right += sum(
            torch.equal(guess[-len(test.answer) :], row[-len(test.answer) :])
            for guess, row, test in zip(guesses, ids, some, strict=True)
        )
    both = torch.cat(list(bits.values()))
    by_position = {f"{low}-{high}": both[:, low - 1 : high - 1] for low, high in BANDS}
    return {
        "windows": len(both),
        "length": LENGTH,
        "bits_per_byte": round(both.mean().item(), 4),
        "bits_per_byte_by_group": {group: round(values.mean().item(), 4) for group, values in bits.items()},
        "bits_per_byte_by_position": {band: round(values.mean().item(), 4) for band, values in by_position.items()},
        "copy_tests": count,
        "copy_accuracy_at_3000_bytes": right / count,
    }


def to_ids(texts: list[bytes], device: torch.device) -> torch.Tensor:
    """Ids `[len(texts), bytes]` of texts of one length."""
    return torch.tensor([list(text) for text in texts], device=device) + BYTE_OFFSET


def sample(out: Path, device: torch.device, new_tokens: int) -> str:
    """Code drawn at temperature 0.6 after a short beginning, loaded as a user would load it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device)
    prompt = 'import json\nimport os\n\n\ndef read_config(path, encoding="utf-8"):\n    """'
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.6)[0])


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Weights in bf16, config, greedy generation settings, and a tokenizer that needs no vocabulary file."""
    model.to(torch.bfloat16).save_pretrained(out)
    GenerationConfig(eos_token_id=EOS, pad_token_id=0, do_sample=False, max_new_tokens=256).save_pretrained(out)
    ByT5Tokenizer(extra_ids=0, model_max_length=LENGTH).save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    """Train, save, reload what was saved, evaluate it, and write `training.json`."""
    batch = 16, f"windows of {LENGTH} bytes per step"
    parser = loop.parser(__doc__, batch=batch, lr=1.5e-3, tiny="200 files, 4 steps, 8 windows")
    parser.add_argument("--finish", type=Path, help="second stage: go on from this folder, on the closest packages")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.steps, args.batch = args.steps or 4, 8
    device = loop.begin(args)
    heldout = heldout_texts()
    files, data = training_files(heldout, CLOSE if args.finish else PACKAGES, args.tiny)
    batches = Batches(files, args.batch, device, args.seed)
    data["million_tokens_per_epoch"] = round(len(batches.ids) / 1e6, 1)
    print(f"{data['million_tokens_per_epoch']} MB of training data; files dropped: {data['dropped_files']}")
    first = LlamaForCausalLM.from_pretrained(args.finish, dtype=torch.float32) if args.finish else make_model(args.tiny)
    model = first.to(device)
    trainer = Trainer(model, batches, args.lr)

    def note(loss: float) -> dict[str, float]:
        return {"bits_per_byte": round(loss / math.log(2), 4)}

    training = loop.train(trainer.step, note, args, unit="tokens", per_step=args.batch * LENGTH)
    training["epochs_begun"] = batches.epochs
    save(model, args.out)

    shipped = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(device).eval()
    results = {
        "heldout": {"files": len(heldout), "bytes": sum(len(text.encode()) for text in heldout.values())},
        "evaluation": evaluate(shipped, heldout, 8 if args.tiny else 200, device),
        "sample": sample(args.out, device, 16 if args.tiny else 400),
        "stages": [*loop.read_stages(args.finish), {"data": data, "training": training}],
    }
    loop.write(shipped, args, ("torch", "transformers", "numpy"), results)
    print(json.dumps(results["evaluation"], indent=2))
    print(f"{training['tokens_per_second']:,} tokens/s, {training['steps']} steps\n{results['sample']}")


if __name__ == "__main__":
    main()
