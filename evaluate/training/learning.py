"""What learn_masks.py, learn_masks_and_weights.py and finetune_with_masks.py share: options, data, and the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import packed
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modify_model import patch
from modify_model.cli.arguments import DTYPES, USER_ERROR, Help
from modify_model.cli.language import DEMO, load_model
from modify_model.mask_arguments import MaskTrainingArguments
from modify_model.mask_trainer import MASKS, MaskTrainer

LAST = "last"  # value of --resume_from_checkpoint


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """The model and the data of a run."""

    model_name: str = _option(str(DEMO), "a folder, a name on the hub, a .gguf file, or tiny:Llama")
    dtype: Literal[DTYPES] = _option(  # type: ignore[valid-type]
        "auto", "of the weights; auto: float32 when they are trained or on a CPU, else the checkpoint's"
    )
    data: str | None = _option(
        None,
        "a text file, a folder of *.txt and *.py files, a .jsonl file of objects with 'text' or 'messages' (chats, of "
        "which the assistant's words are learned), a folder saved by `datasets`, or a dataset of the hub "
        "(name or name:configuration); left out: the demo model's files, elsewhere Python's standard library",
    )
    max_tokens_per_device: int = _option(4096, "length of the rows that the texts are packed into, one per device")
    passkeys: bool = _option(False, "generate passkey contexts with the texts as haystack; usual with distill")
    num_passkeys: int = _option(10, "passkeys in a context")
    passkey_words: int = _option(32, "words of a passkey")
    context_length_min: int = _option(1000, "tokens of the shortest passkey context")
    context_length_max: int = _option(32000, "tokens of the longest passkey context")


def main(doc: str, defaults: dict[str, Any], arguments: Sequence[str] | None = None) -> int:
    """Run one of the scripts.

    Args:
        doc: its description, for --help.
        defaults: of its options, which say what is trained.
        arguments: of the command line.

    Returns:
        The exit code: 2 when an argument, a model or a file cannot be used.
    """
    try:
        train(*arguments_of(doc, defaults, arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def arguments_of(
    doc: str, defaults: dict[str, Any], arguments: Sequence[str] | None = None
) -> tuple[RunArguments, MaskTrainingArguments]:
    """The arguments of a command line; as :func:`main`."""
    parser = HfArgumentParser((RunArguments, MaskTrainingArguments), description=doc, formatter_class=Help)
    parser.set_defaults(**({"report_to": ["tensorboard"]} | defaults))
    return parser.parse_args_into_dataclasses(arguments)


def train(run: RunArguments, args: MaskTrainingArguments) -> None:
    """Load, train, and write masks and weights to ``args.output_dir``."""
    set_seed(args.seed)
    dtype = "float32" if run.dtype == "auto" and not args.freeze_non_mask_parameters else run.dtype
    model, tokenizer = load_model(run.model_name, device=args.device, dtype=dtype)
    data = dataset(run, args, tokenizer)
    trainer = MaskTrainer(
        patch(model), args, train_dataset=data, data_collator=packed.collate, processing_class=tokenizer
    )
    if trainer.is_world_process_zero():
        print(describe(run, args, trainer), flush=True)
    checkpoint = args.resume_from_checkpoint
    if checkpoint == LAST:
        checkpoint = get_last_checkpoint(args.output_dir)
        if checkpoint is None:
            raise ValueError(f"--resume_from_checkpoint {LAST}: there is no checkpoint in {args.output_dir!r}")
    trainer.train(resume_from_checkpoint=checkpoint)
    report = str(trainer.learning.separation())
    trainer.finish()
    if trainer.is_world_process_zero():
        if not args.freeze_mask_parameters:
            print(report)
        if not args.freeze_non_mask_parameters:
            print(f"weights: {args.output_dir}")
        print(f"masks: {Path(args.output_dir, MASKS)}")


def dataset(run: RunArguments, args: MaskTrainingArguments, tokenizer: Any) -> Any:
    """The rows of a run: as many as it needs, or all that the texts give."""
    rows = rows_per_step(args) * args.max_steps if args.max_steps > 0 else None
    if run.passkeys:
        size = packed.Passkeys(run.num_passkeys, run.passkey_words, run.context_length_min, run.context_length_max)
        if rows is None:
            raise ValueError("--passkeys are generated without end: give --max_steps")
        return packed.PasskeyData(tokenizer, packed.texts_as_ids(tokenizer, run.data), size, rows, args.seed)
    samples = map(packed.tokens_of, repeat(tokenizer), packed.read_records(run.data))
    return packed.pack(samples, run.max_tokens_per_device, rows)


def rows_per_step(args: MaskTrainingArguments) -> int:
    """Rows of an update, of all devices."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def describe(run: RunArguments, args: MaskTrainingArguments, trainer: MaskTrainer) -> str:
    """What a run really trains, in plain words."""
    heads = sum(len(gates.log_alpha) for gates in trainer.learning.gates)
    layers = len(trainer.learning.gates)
    count = sum(p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad) - sum(
        p.numel() for p in trainer.mask_parameters
    )
    weights = "frozen" if args.freeze_non_mask_parameters else f"trained ({count:,} numbers, lr {args.learning_rate:g})"
    table = trainer.learning.table()
    masks = (
        f"fixed, {int((table == 0).sum())} streaming"
        if args.freeze_mask_parameters
        else f"learned (lr {args.mask_learning_rate:g}, multipliers {args.reg_learning_rate:g})"
    )
    length = f"up to {run.context_length_max}" if run.passkeys else f"{run.max_tokens_per_device}"
    lines = [
        f"trains {args.mode}: masks of {heads} KV heads in {layers} layers {masks}; weights {weights}",
        f"steps {args.max_steps}, rows of a step {rows_per_step(args)}, tokens of a row {length}, "
        f"objective {args.objective}",
        f"streaming heads see: sink {args.sink_size if args.toggle_type == 'streaming' else 0}, window {args.window}",
    ]
    if not args.freeze_mask_parameters:
        lines.append(
            f"target share of streaming heads: {args.start_head_sparsity:g} to {args.end_head_sparsity:g} over the "
            f"first {args.sparsity_warmup_ratio:.0%} of the steps ({args.warmup_type})"
        )
    return "\n".join(lines)
