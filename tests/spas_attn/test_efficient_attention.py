"""EfficientAttention: every backend against float64, masks of one meaning, memory, and what it says about itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spas_attn.efficient import choice, tiled
from spas_attn.efficient.problem import Problem, make_problem
from spas_attn.efficient.ways import WAYS, dense_bytes
from spas_attn.efficient_attention import EfficientAttention, mask_from_multihead_attention
from spas_attn.selectors import Dense

EXACT = ("sdpa", "chunked_queries", "chunked_keys", "standard")
# Largest difference from float64, relative to the largest number of the result (at least 1); forward and backward.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BACKWARD = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None) -> Tensor:
    """The definition in float64: exp(score) over the seen keys, over their sum; 0 where none is seen."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand(scores.shape)
    top = torch.where(seen, scores.detach(), -1e9).amax(-1, keepdim=True)
    weights = torch.where(seen, scores - top, -1e9).exp() * seen
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1)) @ v


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1)).item()


def random_case(seed: int) -> dict[str, object]:
    """Inputs of one random call: (batch, heads, lengths, kind of mask and bias), and `seen`, the mask written out."""
    g = torch.Generator().manual_seed(seed)

    def pick(*items: object) -> object:
        return items[int(torch.randint(len(items), (), generator=g))]

    batch, heads, q_len, k_len = (int(torch.randint(1, n, (), generator=g)) for n in (4, 4, 10, 12))
    dim, dtype = pick(4, 16), pick(*[torch.float32] * 6, torch.bfloat16, torch.float16)
    q, k, v = (torch.randn(batch, heads, n, dim, generator=g).to(dtype) for n in (q_len, k_len, k_len))
    shapes = {
        "[B, Lk]": (batch, 1, 1, k_len),
        "[Lq, Lk]": (1, 1, q_len, k_len),
        "[B, Lq, Lk]": (batch, 1, q_len, k_len),
        "4-D": tuple(pick(1, n) for n in (batch, heads, q_len)) + (k_len,),
    }
    kind = pick(None, *shapes)
    if kind in ("[B, Lk]", "[Lq, Lk]") and batch == q_len:
        kind = "[B, Lq, Lk]"
    mask = seen = added = None
    if kind is not None:
        seen = torch.rand(shapes[kind], generator=g) < float(pick(0.2, 0.7))
        short = {"[B, Lk]": (batch, k_len), "[Lq, Lk]": (q_len, k_len), "[B, Lq, Lk]": (batch, q_len, k_len)}
        form = pick("bool", "int", "float")
        mask = seen if form == "bool" else seen.long()
        if form == "float":
            added = torch.randn(seen.shape, generator=g).to(dtype) - 0.5
            mask = added.masked_fill(~seen, -math.inf)
        mask = mask.reshape(short.get(kind, seen.shape))
    bias = None
    if pick(True, False):
        bias = torch.randn([int(pick(1, n)) for n in (batch, heads, q_len, k_len)], generator=g).to(dtype)
    return dict(q=q, k=k, v=v, mask=mask, seen=seen, added=added, bias=bias, chunk=pick(1, 2, 3, 5, 64))


@pytest.mark.parametrize("block", range(6))
def test_every_backend_equals_float64(block: int) -> None:
    """600 random cases (100 a block), forward and backward."""
    ran = dict.fromkeys((*EXACT, "block_sparse"), 0)
    for seed in range(100 * block, 100 * block + 100):
        case = random_case(seed)
        inputs = [case[name] for name in ("q", "k", "v", "bias") if case[name] is not None]
        exact = [x.double().requires_grad_() for x in inputs]
        added, bias = case["added"], exact[3] if len(exact) == 4 else None
        total = bias if added is None else added.double() if bias is None else bias + added.double()
        want = reference(*exact[:3], case["seen"], total)
        direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        grads = torch.autograd.grad(want, exact, direction)
        dtype, scale = case["q"].dtype, case["q"].shape[-1] ** -0.5
        for name in EXACT:
            leaves = [x.clone().requires_grad_() for x in inputs]
            problem = make_problem(*leaves[:3], case["mask"], leaves[3] if bias is not None else None, scale, 0.0)
            out = WAYS[name].run(problem, case["chunk"], None)
            assert out.dtype == dtype and out.shape == want.shape
            assert error(out, want) <= BOUNDS[dtype], (seed, name)
            got = torch.autograd.grad(out, leaves, direction.to(dtype))
            for grad, right, leaf in zip(got, grads, leaves, strict=True):
                assert grad.shape == leaf.shape
                assert error(grad, right) <= BACKWARD[dtype], (seed, name)
            ran[name] += 1
        plain = make_problem(*inputs[:3], case["mask"], case["bias"], scale, 0.0)
        if WAYS["block_sparse"].refuses(plain, Dense()) is None:
            assert error(WAYS["block_sparse"].run(plain, 0, Dense()), want) <= BOUNDS[dtype], seed
            ran["block_sparse"] += 1
    assert all(ran[name] == 100 for name in EXACT) and ran["block_sparse"] > 3, ran


@pytest.mark.parametrize("padded", [False, True])
def test_flash_equals_float64(padded: bool) -> None:
    """This library's kernel; on a CPU Triton's interpreter runs it."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (33, 70, 70))
    seen = torch.arange(70) < torch.tensor([[70], [41]]) if padded else None
    problem = make_problem(q, k, v, seen, None, 0.25, 0.0)
    if (why := WAYS["flash"].refuses(problem, None)) is not None:
        assert "CUDA" in why or "Triton" in why
        pytest.skip(why)
    want = reference(q.double(), k.double(), v.double(), None if seen is None else seen[:, None, None], None)
    assert error(WAYS["flash"].run(problem, 0, None), want) <= BOUNDS[torch.float32]


def module(backend: str = "auto", seed: int = 0, **options: object) -> EfficientAttention:
    torch.manual_seed(seed)
    return EfficientAttention(24, 2, 16, backend=backend, **options).eval()


def plain(attention: EfficientAttention, x: Tensor, seen: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The module by hand in float64, one query of one head at a time."""
    weights = {name: p.double() for name, p in attention.state_dict().items()}
    batch, length, heads = x.shape[0], x.shape[1], attention.num_heads
    q, k, v = (
        (x.double() @ weights[f"to_{n}.weight"].T).unflatten(-1, (heads, attention.d_head)) for n in ("q", "k", "v")
    )
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        scores = [float(q[b, i, h] @ k[b, j, h]) * attention.scale for j in range(length)]
        if bias is not None:
            scores = [s + float(bias.expand(batch, heads, length, length)[b, h, i, j]) for j, s in enumerate(scores)]
        keys = [j for j in range(length) if seen is None or bool(seen.expand(batch, heads, length, length)[b, h, i, j])]
        total = sum(math.exp(scores[j]) for j in keys)
        for j in keys:
            out[b, i, h] += math.exp(scores[j]) / total * v[b, j, h]
    return out.flatten(2) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_module_equals_plain_loops(backend: str) -> None:
    attention = module(backend, chunk_size=3)
    x, bias = torch.randn(2, 5, 24), torch.randn(1, 2, 5, 5)
    seen = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        assert error(attention(x), plain(attention, x, None)) < 1e-6
        assert error(attention(x, mask=seen), plain(attention, x, seen[:, None, None])) < 1e-6
        got = attention(x, mask=seen[:, None, None], attention_bias=bias)
    assert error(got, plain(attention, x, seen[:, None, None], bias)) < 1e-6
    assert attention.last_backend == ("sdpa" if backend == "auto" else backend)


def test_state_dict_and_cross_attention() -> None:
    attention = module()
    shapes = {name: tuple(x.shape) for name, x in attention.state_dict().items()}
    inner = dict.fromkeys(("to_q.weight", "to_k.weight", "to_v.weight"), (32, 24))
    assert shapes == inner | {"to_out.0.weight": (24, 32), "to_out.0.bias": (24,)}
    x, y = torch.randn(2, 3, 24), torch.randn(2, 7, 24)
    torch.testing.assert_close(attention(x, y), attention(x, y, y))
    torch.testing.assert_close(attention(x), attention(x, x, x))


# --- defects of the module that this one stands for, each measured there ----------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
def test_a_mask_is_not_inverted(backend: str) -> None:
    """There: SDPA attended to the padding only. Hidden keys do not matter here, seen ones do."""
    attention, x = module(backend), torch.randn(2, 6, 24)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    hidden, seen = x.clone(), x.clone()
    hidden[:, 4:], seen[:, 0] = 9.0, 9.0
    before = attention(x, mask=mask)
    torch.testing.assert_close(attention(hidden, mask=mask)[:, :4], before[:, :4])
    assert (attention(seen, mask=mask)[:, 1:4] - before[:, 1:4]).abs().max() > 1e-2


@pytest.mark.parametrize("backend", EXACT)
def test_a_row_with_nothing_to_see_gives_0_and_gradient_0(backend: str) -> None:
    """There: NaN. Boolean and floating masks, whole samples and single rows."""
    for mask in (torch.tensor([[False] * 4, [True] * 4]), torch.tensor([[-math.inf] * 4, [0.5] * 4])):
        q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (5, 4, 4))
        bias = torch.randn(1, 3, 5, 4, requires_grad=True)
        out = WAYS[backend].run(make_problem(q, k, v, mask, bias, 0.25, 0.0), 2, None)
        assert (out[0] == 0).all() and (out[1] != 0).all()
        grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
        assert all(grad.isfinite().all() for grad in grads)
        assert all((grad[0] == 0).all() and (grad[1] != 0).any() for grad in grads[:3])
    attention, x = module(backend), torch.randn(1, 4, 24)
    torch.testing.assert_close(attention(x, mask=torch.zeros(1, 4, dtype=torch.bool))[0, 0], attention.to_out[0].bias)


@pytest.mark.parametrize("backend", EXACT)
def test_the_smallest_number_does_not_hide(backend: str) -> None:
    """A row of finfo.min is an average, whatever the dtype it came in; only -inf and False hide."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 1, 4, 16).to(dtype) for _ in range(3))
        mask = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min)
        out = WAYS[backend].run(make_problem(q, k, v, mask, None, 0.25, 0.0), 2, None)
        assert error(out, v.double().mean(2, keepdim=True).expand(v.shape)) <= BOUNDS[dtype]


def test_chunk_size_and_flash_are_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(tiled, "_bounds", lambda n, size, real=tiled._bounds: sizes.append(size) or real(n, size))
    for chunk in (3, 4):
        attention = module("chunked_queries", chunk_size=chunk)
        attention(torch.randn(1, 9, 24))
        assert sizes[-2:] == [chunk, 9] and attention.explain().chunk == chunk
    attention = module(use_flash_attention=True)
    attention(torch.randn(1, 9, 24))  # gradients: this library's kernels decline, and it says so
    assert attention.last_backend == "sdpa" and "backward" in attention.explain().declined["flash"]


class Largest(TorchDispatchMode):
    """The largest storage that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("backend", "backward"), [("auto", False), ("chunked_queries", True), ("chunked_keys", True)])
def test_a_bias_does_not_force_all_scores(backend: str, backward: bool) -> None:
    """There: a bias built the score matrix. Nothing near its size is made, and the bias is never expanded."""
    q, k, v = (torch.randn(2, 4, 512, 16, requires_grad=backward) for _ in range(3))
    bias = torch.randn(1, 4, 1, 512, requires_grad=backward)
    problem = make_problem(q, k, v, torch.rand(2, 512) < 0.9 if backward else None, bias, 0.25, 0.0)
    assert problem.biases[0].shape == bias.shape
    with Largest() as largest:
        out, report = choice.Chooser(backend, 32, False, None).run(problem)
        if backward:
            out.sum().backward()
            assert bias.grad is not None and bias.grad.shape == bias.shape
    assert report.backend == ("sdpa" if backend == "auto" else backend)
    assert largest.bytes <= dense_bytes(problem) // 8


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(3, 3, dtype=torch.bool), r"ambiguous.*B = Lq = 3.*mask\[:, None\]"),
        (torch.ones(3, 3), "ambiguous|zeros|0 and 1"),
        (torch.full((3, 1, 1, 3), 2), "0 .hidden. and 1 .seen. only, got 2 to 2"),
        (torch.ones(3, 1, 3), "floating and holds only 0 and 1"),
        (torch.ones(2, 3, 3, dtype=torch.bool), r"for one mask a head pass mask\[None\]"),
        (torch.ones(6, 3, 3, dtype=torch.bool), "unflatten"),
        (torch.ones(3, 1, 1, 1, dtype=torch.bool), "mask must be"),
        (torch.ones(3, dtype=torch.bool), "mask must be"),
        (torch.ones(5, 3, dtype=torch.bool), "mask must be"),
    ],
)
def test_ambiguous_masks_are_refused(mask: Tensor, text: str) -> None:
    attention, x = module(), torch.randn(3, 3, 24)
    with pytest.raises(ValueError, match=text):
        attention(x, mask=mask)


def test_other_bad_arguments_are_refused() -> None:
    attention, x, y = module(), torch.randn(2, 4, 24), torch.randn(2, 6, 24)
    with pytest.raises(ValueError, match="looks like a mask of queries"):
        attention(x, y, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bias\[None\] for one bias a head"):
        attention(x, attention_bias=torch.zeros(2, 4, 4))
    with pytest.raises(TypeError, match="attention_bias must be floating"):
        attention(x, attention_bias=torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="one length, got 4 and 6"):
        attention(x, x, y)
    with pytest.raises(ValueError, match=r"query must be \[B, L, 24\]"):
        attention(x[0])
    for wrong in ({"dropout": 1.0}, {"chunk_size": 0}, {"backend": "fast"}, {"attention_dropout": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            EfficientAttention(24, 2, 16, **wrong)
    with pytest.raises(ValueError, match="there was none"):
        attention.explain()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kinds", [*itertools.product((None, "bool", "float"), (None, "bool", "heads", "float"))])
def test_masks_of_multihead_attention_are_converted(kinds: tuple[str | None, str | None]) -> None:
    theirs = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    ours = EfficientAttention(32, 2, 16).eval()
    with torch.no_grad():
        theirs.in_proj_bias.zero_()
        for linear, weight in zip((ours.to_q, ours.to_k, ours.to_v), theirs.in_proj_weight.chunk(3), strict=True):
            linear.weight.copy_(weight)
        ours.to_out[0].load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(3, 5, 32)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    above = torch.ones(5, 5).triu(1).bool()
    shapes = {"bool": above, "heads": above.expand(6, 5, 5), "float": torch.randn(6, 5, 5), None: None}
    first = {"bool": padding, "float": torch.zeros(3, 5).masked_fill(padding, -math.inf), None: None}[kinds[0]]
    mask = mask_from_multihead_attention(first, shapes[kinds[1]], num_heads=2)
    want, _ = theirs(x, x, x, key_padding_mask=first, attn_mask=shapes[kinds[1]], need_weights=False)
    torch.testing.assert_close(ours(x, mask=mask), want, atol=1e-5, rtol=1e-5)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
def test_dropout_of_weights_in_training_only(backend: str) -> None:
    attention = module(backend, chunk_size=5, attention_dropout=0.4, dropout=0.0)
    x = torch.randn(1, 12, 24)
    want = attention(x)
    torch.testing.assert_close(attention(x), want)
    attention.train()
    torch.manual_seed(1)
    first = attention(x)
    torch.manual_seed(1)
    torch.testing.assert_close(attention(x), first)
    assert (attention(x) - first).abs().max() > 1e-3, "every call drops others"
    q, k, v = (torch.randn(1, 1, 24, 16) for _ in range(3))
    problem = Problem(q, k, v, scale=0.25, dropout=0.4)
    mean = torch.stack([WAYS[backend].run(problem, 7, None) for _ in range(400)]).mean(0)
    assert (mean - reference(q.double(), k.double(), v.double(), None, None)).abs().max() < 0.15


@pytest.mark.parametrize(("rows", "columns"), [(2, 7), (5, 3), (2, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_tiles_by_differences(rows: int, columns: int, dropout: float) -> None:
    """The backward pass drops what the forward pass dropped, and reduces a bias's gradient to its shape."""
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    bias = torch.randn(1, 2, 1, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 5, 7) < 0.7

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return tiled.tiled_attention(Problem(q, k, v, mask, (bias,), 0.5, dropout), rows, columns)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))
