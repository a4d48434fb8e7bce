"""Dense attention in FP8 by cuDNN (nvidia-cudnn-frontend): the honest baseline of 8-bit kernels on Hopper and later."""

from __future__ import annotations

from typing import Any

import torch
from registry import Declined
from torch import Tensor

E4M3_MAX = 448.0


class Fp8Attention:
    """One graph for the shape of q, k, v ``[B, H, L, D]``; one scale per tensor.

    Raises:
        Declined: when cuDNN does not serve the shape here.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> None:
        import cudnn

        self._inputs = (q, k, v)
        self.out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kinds = cudnn.data_type
        graph: Any = cudnn.pygraph(
            io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
        )
        tensors = [_like(graph, x, kinds.FP8_E4M3) for x in (q, k, v)]
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        scalars = {name: graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=kinds.FLOAT) for name in names}
        try:
            out, _, *largest = graph.sdpa_fp8(
                q=tensors[0], k=tensors[1], v=tensors[2], **scalars, is_inference=True, attn_scale=scale,
                use_causal_mask=is_causal,
            )  # fmt: skip
            out.set_output(True).set_dim(list(q.shape)).set_stride(list(self.out.stride()))
            out.set_data_type(kinds.BFLOAT16)
            for found in largest:
                found.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
            graph.build([cudnn.heur_mode.A])
        except Exception as error:  # the package raises classes of its own
            raise Declined(f"cuDNN refuses: {str(error)[:200]}") from error
        one = {name: torch.ones(1, 1, 1, 1, device=q.device) for name in names}
        # P reaches from 0 to 1: its scale lets it fill e4m3.
        one["scale_s"] *= E4M3_MAX
        one["descale_s"] /= E4M3_MAX
        self._graph, self._keys, self._scalars, self._numbers = graph, tensors, scalars, one
        self._variants = {out: self.out} | {found: torch.empty(1, 1, 1, 1, device=q.device) for found in largest}
        self._workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
        self.quantise()

    def quantise(self) -> None:
        """q, k, v to e4m3 by their largest magnitude."""
        eights = []
        for name, x in zip("qkv", self._inputs, strict=True):
            scale = x.abs().amax().float() / E4M3_MAX
            eights.append((x.float() / scale).to(torch.float8_e4m3fn))
            self._numbers[f"descale_{name}"] = scale.reshape(1, 1, 1, 1)
        self._eights = eights

    def kernel(self) -> Tensor:
        """Attention of what was quantised last."""
        given = dict(zip(self._keys, self._eights, strict=True))
        given |= {self._scalars[name]: number for name, number in self._numbers.items()}
        self._graph.execute(given | self._variants, self._workspace)
        return self.out

    def total(self) -> Tensor:
        """Quantisation, by plain torch, and attention."""
        self.quantise()
        return self.kernel()


def _like(graph: Any, x: Tensor, kind: Any) -> Any:
    return graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=kind)
