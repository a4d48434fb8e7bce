"""What transformers' masks say: causal, sliding window, key padding, packed sequences, chunks.

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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, packed_sequence_mask_function

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
        dense_reason: why the pattern is not causal + window + key padding + separate documents, or None.
        documents: int32 ``[n + 1]``, where the packed sequences that the mask keeps apart begin, and the number of
            tokens; None for one sequence.
        chunk: of chunked attention, tokens of a chunk, counted from the beginning of a document; or None.
        found: what :meth:`documents_at` found, once it did; None where there may be no documents (a batch, padding).
    """

    make: Callable[..., Any] | None
    arguments: dict[str, Any]
    made: list[Any]
    key_mask: Tensor | None
    k_len: int
    k_end: int
    window: int | None
    dense_reason: str | None
    documents: Tensor | None = None
    chunk: int | None = None
    found: list[Tensor | None] | None = None

    def documents_at(self, cu_seqlens: Any, position_ids: Any) -> Tensor | None:
        """The documents of this forward, also those that the caller alone knows of: int32 ``[n + 1]`` or None.

        With a fresh cache, transformers does not look for packed sequences, and lets them see each other.

        Args:
            cu_seqlens: the caller's ``cu_seq_lens_q``, None if not given; nothing of it is read on the host.
            position_ids: ``[1, L]``, which start again at 0 where a sequence begins; read once per forward, and only
                where neither cu_seq_lens_q nor an attention_mask is given. None if the model has none.
        """
        if self.found is None:
            return self.documents
        if not self.found:
            documents = self.documents
            if documents is None and isinstance(cu_seqlens, Tensor):
                documents = cu_seqlens.to(torch.int32)
            elif documents is None and self._may_show_documents(position_ids):
                documents = _documents(position_ids[0, 1:] == 0)
            self.found.append(documents)
        return self.found[0]

    def _may_show_documents(self, position_ids: Any) -> bool:
        """Whether positions are looked at; beside an attention_mask transformers takes a row for one sequence."""
        is_row = isinstance(position_ids, Tensor) and tuple(position_ids.shape) == (1, self.k_len)
        return is_row and self.arguments.get("attention_mask") is None and not torch.compiler.is_compiling()

    def kept_apart(self, documents: Tensor) -> Any:
        """The mask that the original attention would receive if it knew these documents."""
        index = torch.zeros(1, self.k_len + 1, dtype=torch.long, device=documents.device)
        index = index.index_fill(1, documents.long(), 1)[:, : self.k_len].cumsum(1)
        start = documents.long()[index[0] - 1]
        position = torch.arange(self.k_len, device=documents.device) - start
        function = self.arguments.get("mask_function", causal_mask_function)
        apart = packed_sequence_mask_function(index)

        def joined(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return apart(batch, head, query, key) & function(batch, head, position[query], position[key])

        changes = {"mask_function": joined, "allow_is_causal_skip": False}
        return None if self.make is None else self.make(**(self.arguments | changes))

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
        A PreparedMask, or for a decoding step and for encoders the original mask itself.
    """
    padding = arguments.get("attention_mask")
    if isinstance(padding, PreparedMask):  # prepared by generate(), and now the model asks again
        return padding
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
    q_length, q_offset = _queries(arguments)
    if q_length < SHORTEST or "allow_is_bidirectional_skip" in arguments:  # an encoder's, which is left alone
        return None if make is None else make(**arguments)
    # A static cache counts its tokens in place, before its layers ask for the mask.
    later = {name: x.clone() if isinstance(x, Tensor) and x.dim() < 2 else x for name, x in arguments.items()}
    k_len, k_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    k_end = _last_key(q_length, q_offset, k_len, k_offset)
    key_mask = _key_mask(padding, k_offset, k_len if k_end is None else k_end)
    whole = arguments["batch_size"] == 1 and k_len == q_length and key_mask is None
    pattern = _pattern(arguments, k_len + k_offset if k_end is None else k_end + k_offset, whole)
    reason = pattern.dense_reason
    if k_end is None:
        k_end, reason = k_len, reason or "a static cache inside torch.compile hides how many keys are in use"
    found: list[Tensor | None] | None = [] if whole else None
    return PreparedMask(
        make, later, [], key_mask, k_len, k_end, pattern.window, reason, pattern.documents, pattern.chunk, found
    )


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


class _Pattern(NamedTuple):
    """What a mask function means, in the words of PreparedMask."""

    window: int | None = None
    documents: Tensor | None = None
    dense_reason: str | None = None
    chunk: int | None = None


def _pattern(arguments: dict[str, Any], tokens: int, whole: bool) -> _Pattern:
    """What a mask function means, or why it is something else than PreparedMask can say.

    Args:
        arguments: of the mask function.
        tokens: up to the last key in use.
        whole: one row of tokens, none hidden and none before them, which may hold several documents.
    """
    function = arguments.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return _Pattern()
    if torch.compiler.is_compiling():
        return _hidden_pattern(arguments, tokens, whole)
    parts, documents = _joined(function), None
    packed = parts.pop(_inner("packed_sequence_mask_function"), None)
    remapped = parts.pop(_inner("remap_positions_for_packed_sequence"), None)
    if remapped is not None:
        inside = _captured(remapped, "mask_function")
        parts = _joined(inside) or {inside.__qualname__: inside}
    if packed is not None:
        sequences = _captured(packed, "packed_sequence_mask")
        # 4.56 to 4.57 give this to single sequences too; later versions check for that before.
        if not whole and bool((sequences[:, -1] != 0).any()):
            return _Pattern(dense_reason="a batch of rows with packed sequences, which is no padding-free row")
        documents = _documents(sequences[0, 1:] != sequences[0, :-1]) if whole else None
    names = parts.keys() - {"causal_mask_function"}
    if "causal_mask_function" in parts and not names:
        return _Pattern(documents=documents)
    if "causal_mask_function" in parts and names == {_inner("sliding_window_overlay")}:
        return _Pattern(arguments["local_size"], documents)
    if "causal_mask_function" in parts and names == {_inner("chunked_overlay")}:
        return _chunks(arguments, tokens, whole)._replace(documents=documents)
    return _Pattern(dense_reason="a mask pattern that is not causal + window + key padding + separate documents")


def _hidden_pattern(arguments: dict[str, Any], tokens: int, whole: bool) -> _Pattern:
    """What a mask function means that torch.compile hides, told from the arguments beside it."""
    size, config = arguments.get("local_size"), arguments.get("config")
    chunked = size is not None and getattr(config, "attention_chunk_size", None) == size
    if chunked and getattr(config, "sliding_window", None) == size:
        return _Pattern(dense_reason=COMPILED_PATTERN)
    # transformers allows this for the plain pattern of a layer only: nothing packed, no overlay of the model's own.
    plain = arguments.get("allow_is_causal_skip", False) and not arguments.get("use_vmap", False) and size is not None
    if plain and chunked:
        return _chunks(arguments, tokens, whole)
    return _Pattern(None if chunked else size, dense_reason=None if plain else COMPILED_PATTERN)


def _chunks(arguments: dict[str, Any], tokens: int, whole: bool) -> _Pattern:
    """Chunked attention (Llama 4): the chunks of a sequence do not see each other."""
    size = arguments["local_size"]
    if tokens <= size:
        return _Pattern()
    if not whole:
        return _Pattern(dense_reason="chunked attention of padded, batched or cached tokens")
    return _Pattern(chunk=size)


def _documents(begins: Tensor) -> Tensor | None:
    """Documents of one row as int32 ``[n + 1]``, None for a single one.

    Args:
        begins: bool ``[L - 1]``, whether a document begins at tokens 1 to L - 1.
    """
    starts = begins.nonzero().flatten() + 1
    if not len(starts):
        return None
    return nn.functional.pad(nn.functional.pad(starts, (1, 0)), (0, 1), value=len(begins) + 1).to(torch.int32)


def chunks_of(documents: Tensor | None, chunk: int, tokens: int, device: torch.device) -> Tensor:
    """The chunks of documents, as int32 ``[n + 1]`` like these; how many a document has is read on the host."""
    ends = [0, tokens] if documents is None else documents.tolist()
    starts = [x for start, stop in zip(ends[:-1], ends[1:], strict=True) for x in range(start, stop, chunk)]
    return torch.tensor([*starts, tokens], dtype=torch.int32, device=device)


def _inner(maker: str) -> str:
    """Qualified name of the mask function that a function of transformers makes."""
    return f"{maker}.<locals>.inner_mask"


def _captured(function: Any, name: str) -> Any:
    """What a function that another one made holds under a name of its maker."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _joined(function: Any) -> dict[str, Any]:
    """The parts, by qualified name, of a mask function made by transformers' ``and_masks``; else empty."""
    if function.__qualname__ != "and_masks.<locals>.and_mask":
        return {}
    parts: dict[str, Any] = {}
    for part in _captured(function, "mask_functions"):
        parts |= _joined(part) or {part.__qualname__: part}
    return parts
