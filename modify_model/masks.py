"""What transformers' masks say: causal, sliding window, key padding, packed sequences.

transformers builds the mask once per forward, with the mask function registered under the name of the attention
implementation; under a name without one, the mask is silently None even for padded batches. :func:`prepare_mask` is
registered in place of that function and hands every layer a :class:`PreparedMask`: the very mask that the original
attention would have received, made when a dense call asks for it, and beside it what sparse attention needs to know.
Recognising that in a 4-D mask afterwards would need a host synchronisation, and the mask O(L²) memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from spas_attn.block_mask import BLOCK_SIZES

# With fewer queries than the smallest block a call is a decoding step: dense, as it should be, and not counted.
SHORTEST = min(BLOCK_SIZES)
# Without a cache and a mask, transformers cannot tell packed sequences from one sequence inside a graph.
COMPILED_PATTERN = (
    "a mask pattern that torch.compile hides; without a cache, pass an attention_mask to show that nothing is packed"
)


class PreparedMask(NamedTuple):
    """What the layers of a patched model receive as ``attention_mask``.

    A tuple, because every carrier of layer arguments knows tuples: accelerate moves the tensors inside to the layer's
    device, torch.compile traces them, gradient checkpointing passes them on. An attribute on the mask tensor would
    get lost on the way (and the mask may be None).

    Attributes:
        make: the mask function of the original attention, None where it has none.
        arguments: what transformers passes to it.
        made: the mask that it made, if it did already: a tensor, a flex BlockMask or None.
        key_mask: key padding, bool ``[B, k_end]``, True = attend; None when no key is hidden.
        k_len: number of keys, with the unused slots of a static cache.
        k_end: number of keys in use; queries are aligned to the last of them.
        window: sliding window in tokens, or None.
        dense_reason: why the pattern is not causal + window + key padding, or None.
    """

    make: Callable[..., Any] | None
    arguments: dict[str, Any]
    made: list[Any]
    key_mask: Tensor | None
    k_len: int
    k_end: int
    window: int | None
    dense_reason: str | None

    @property
    def original(self) -> Any:
        """The mask that the original attention receives, made once for all layers of a forward."""
        if not self.made:
            self.made.append(None if self.make is None else self.make(**self.arguments))
        return self.made[0]

    # With a static cache, generate() prepares the mask before it calls the model. It and the model take whatever is
    # not a 2-D tensor for a finished mask; these two are what they ask of it.
    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> PreparedMask:
        return self


def prepare_mask(original: str, **arguments: Any) -> Any:
    """The mask function of a patched model, as transformers calls it.

    Args:
        original: name of the implementation that the model had; its mask function makes the mask.
        arguments: what the installed version passes to mask functions, handed on as it came.

    Returns:
        A PreparedMask, or for a decoding step the original mask itself.
    """
    padding = arguments.get("attention_mask")
    if isinstance(padding, PreparedMask):  # prepared by generate(), and now the model asks again
        return padding
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
    q_length, q_offset = _queries(arguments)
    if q_length < SHORTEST:
        return None if make is None else make(**arguments)
    # A static cache counts its tokens in place, before its layers ask for the mask.
    later = {name: x.clone() if isinstance(x, Tensor) and x.dim() < 2 else x for name, x in arguments.items()}
    k_len, k_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    k_end = _last_key(q_length, q_offset, k_len, k_offset)
    window, reason = _pattern(arguments)
    if k_end is None:
        k_end, reason = k_len, reason or "a static cache inside torch.compile hides how many keys are in use"
    return PreparedMask(make, later, [], _key_mask(padding, k_offset, k_end), k_len, k_end, window, reason)


def _key_mask(padding: Tensor | None, k_offset: int, k_end: int) -> Tensor | None:
    """The keys in use of a padding mask ``[B, tokens]``, None when all of them are attended to (read once a forward,
    as transformers does).
    """
    if padding is None:
        return None
    padding = padding[:, k_offset : k_offset + k_end]
    if not torch.compiler.is_compiling() and padding.shape[1] == k_end and bool(padding.all()):
        return None
    return nn.functional.pad(padding, (0, k_end - padding.shape[1]))


def _queries(arguments: dict[str, Any]) -> tuple[int, int | Tensor]:
    """Number of queries and position of the first one; the one thing that versions of transformers name differently
    (``cache_position`` up to 5.0, ``q_length`` and ``q_offset`` later).
    """
    if "cache_position" in arguments:
        return arguments["cache_position"].shape[0], arguments["cache_position"][0]
    return arguments["q_length"], arguments.get("q_offset", 0)


def _last_key(q_length: int, q_offset: int | Tensor, k_len: int, k_offset: int) -> int | None:
    """Number of keys up to the last query, None if that cannot be known.

    A tensor as ``q_offset`` is read once per forward, and only for a chunk of a longer prompt or a static cache.
    """
    if k_len == q_length:
        return k_len
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            return None
        q_offset = int(q_offset)
    return min(q_offset + q_length - k_offset, k_len)


def _pattern(arguments: dict[str, Any]) -> tuple[int | None, str | None]:
    """The sliding window of a mask, or why it is something else than causal + window + key padding."""
    function = arguments.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return None, None
    if torch.compiler.is_compiling():
        return None, COMPILED_PATTERN
    parts = _joined(function)
    if set(parts) == {"causal_mask_function", "sliding_window_overlay.<locals>.inner_mask"}:
        return arguments["local_size"], None
    # 4.56 to 4.57 give this to single sequences too; later versions do the same check before (without a cache only).
    packed = parts.get("packed_sequence_mask_function.<locals>.inner_mask")
    if packed is not None and len(parts) == 2 and "causal_mask_function" in parts:
        sequences = packed.__closure__[0].cell_contents
        if bool((sequences[:, -1] == 0).all()):
            return None, None
    return None, "packed position_ids or another mask pattern that is not causal + window + key padding"


def _joined(function: Any) -> dict[str, Any]:
    """The parts, by qualified name, of a mask function made by transformers' ``and_masks``; else empty."""
    if function.__qualname__ != "and_masks.<locals>.and_mask":
        return {}
    parts = next(cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, tuple))
    return {part.__qualname__: part for part in parts}
