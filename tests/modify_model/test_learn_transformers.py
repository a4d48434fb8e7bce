"""Gates in models of transformers: training mode, packed rows, checkpointing, what cannot be learnt from."""

from __future__ import annotations

import pytest
import tiny_transformers
import torch

from autotune import calibrate
from autotune.learn import learn
from autotune.module import sparse_modules
from modify_model import patch, restore, stream_heads
from spas_attn.selectors import TopK

pytestmark = pytest.mark.filterwarnings("ignore:spas_attn. running exact dense:RuntimeWarning")
SIZES = dict(sink_size=64, window=64)
DOCUMENTS = [290, 60, 50]


def ids_of(length, rows=1):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(1))


def gated(name="Llama", attention="sdpa", log_alpha=(-0.3, 0.4), **changes):
    """A patched model with gates that are neither open nor closed."""
    model = patch(tiny_transformers.make(name, attention), **changes)
    learning = learn(model, **SIZES)
    with torch.no_grad():
        for gates in learning.gates:
            gates.log_alpha.copy_(torch.tensor(log_alpha)[: len(gates.log_alpha)])
    return model, learning


def gradients(model, learning, loss):
    model.zero_grad()
    loss.backward()
    weights = [p.grad for n, p in model.named_parameters() if "gates" not in n and p.grad is not None]
    return [gates.log_alpha.grad.clone() for gates in learning.gates], weights


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "GPT-OSS", "DeepSeek-V3"])
def test_open_gates_are_the_model(name, assert_close):
    """And closed ones are not; one gate per KV head."""
    model, ids = tiny_transformers.make(name, "eager"), ids_of(400)
    with torch.no_grad():
        expected = model(ids).logits
        patch(model)
        with learn(model, **SIZES) as learning:
            heads = model.config.num_attention_heads if name == "DeepSeek-V3" else model.config.num_key_value_heads
            assert [len(gates.log_alpha) for gates in learning.gates] == [heads] * 2
            assert torch.equal(model(ids).logits, expected), "P(z = 1) is 1 without noise"
            learning.start_from(torch.zeros(2, heads))
            closed = model(ids).logits
            assert not torch.allclose(closed, expected, rtol=0.1)
            learning.freeze(torch.zeros(2, heads))
            assert_close(model(ids).logits, closed)
            learning.active = False
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(restore(model)(ids).logits, expected)


def test_gates_act_whatever_the_mode_and_training(fallbacks):
    """A tuned layer in training mode runs dense, but not with gates; a calibration sees the model's own attention."""
    model, ids = tiny_transformers.make("Llama", "sdpa"), ids_of(400)
    dense = model(ids).logits
    patch(model, selector=TopK(0.2), calibrated=False).train()
    assert torch.equal(model(ids).logits, dense)
    learning = learn(model, **SIZES)
    learning.freeze(torch.zeros(2, 2))
    frozen = model(ids).logits
    assert not torch.allclose(frozen, dense, rtol=0.1) and torch.equal(model.eval()(ids).logits, frozen)
    with torch.no_grad(), calibrate(model, l1=0.3, pv_l1=0.4) as calibration:
        for prompt in calibration.prompts([ids, ids]):
            assert torch.equal(model(prompt).logits, dense)
    learning.remove()
    assert all(module.gates is None for module in sparse_modules(model).values())


@pytest.mark.parametrize(("name", "attention"), [("Llama", "sdpa"), ("Llama", "eager"), ("GPT-OSS", "eager")])
@pytest.mark.parametrize("given", [False, True], ids=["position_ids", "cu_seq_lens"])
def test_documents_of_a_packed_row(given, name, attention, assert_close, fallbacks):
    """The row gives what its documents give alone, in the output, the gradients (also of sinks) and the teacher."""
    model, learning = gated(name, attention)
    ids = ids_of(sum(DOCUMENTS))
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=290, max_length_k=290) if given else {}
    model.eval()  # no noise
    for active in (True, False):
        learning.active = active
        alone = torch.cat([model(part).logits for part in ids.split(DOCUMENTS, 1)], 1)
        row = model(ids, position_ids=positions, use_cache=False, **lengths).logits
        assert_close(row, alone, 3e-5)
        if active:
            weights = torch.randn_like(row)
            mine, of_weights = gradients(model, learning, (row * weights).sum())
            theirs, expected = gradients(model, learning, (alone * weights).sum())
            for a, b in zip(mine + of_weights, theirs + expected, strict=True):
                assert_close(a, b, 1e-3)
    assert not fallbacks()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_gates_again(reentrant, assert_close):
    model, learning = gated()
    ids = ids_of(200, rows=2)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(2)
        found.append(gradients(model, learning, model(ids, labels=ids, use_cache=False).loss))
    (gates, weights), (gates_again, weights_again) = found
    assert min(float(x.abs().max()) for x in gates) > 0
    for a, b in zip([*gates, *weights], [*gates_again, *weights_again], strict=True):
        assert_close(b, a, 1e-5)


@pytest.mark.parametrize("sizes", [(64, 64), (10, 100), (0, 64)])
def test_what_is_trained_is_what_is_served(sizes, assert_close):
    """A fixed table gives what stream_heads gives, in blocks of 64 and of 128."""
    for block in (64, 128):
        model = patch(tiny_transformers.make("Llama", "sdpa"), selector=TopK(1.0, block_q=block, block_k=block))
        ids, table = ids_of(500), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        with torch.no_grad(), learn(model, sink_size=sizes[0], window=sizes[1]) as learning:
            learning.freeze(table)
            trained = model(ids).logits
        with torch.no_grad():
            served = stream_heads(model, table, sink_tokens=sizes[0], local_tokens=sizes[1])(ids).logits
        assert_close(served, trained)


def test_left_padding(left_padded, assert_close):
    model, learning = gated()
    ids, mask = left_padded(ids_of(400, rows=2))
    model.eval()
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits[1, 150:]
        assert_close(together, model(ids[1:, 150:]).logits[0], 0.5)  # blocks begin elsewhere
        learning.freeze(torch.ones(2, 2))
        full = model(ids, attention_mask=mask).logits[1, 150:]
        assert_close(full, model(ids[1:, 150:]).logits[0])


def test_autocast_and_half_precision(assert_close):
    model, learning = gated()
    ids = ids_of(400)
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(ids).logits, expected, 0.05)
        half = model.bfloat16()(ids).logits
        assert half.dtype == torch.bfloat16 and learning.gates[0].log_alpha.dtype == torch.float32
        assert_close(half, expected, 0.1)


def test_what_cannot_be_learnt_from(fallbacks):
    """Training raises, since the gates would not be seen; in eval mode the call runs dense, and is counted."""
    model, _ = gated("Gemma 2", "eager")
    model.train()
    with pytest.raises(ValueError, match="gates of heads cannot be learnt from this call: .*softcap"):
        model(ids_of(200))
    before = fallbacks()
    model.eval()(ids_of(200))
    assert fallbacks() != before


def test_short_calls_and_decoding_are_the_models_own():
    model, learning = gated()
    learning.freeze(torch.zeros(2, 2))
    model.eval()
    ids = ids_of(40)
    with torch.no_grad():
        gates_off = learning.active = False
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        learning.active = not gates_off
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.slow
def test_one_graph_under_torch_compile(assert_close):
    """With an attention_mask, which shows that nothing is packed; draws come from the same generator."""
    model, learning = gated()
    ids = ids_of(300)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.train()
    found = []
    for one in (model, compiled):
        torch.manual_seed(2)
        loss = one(ids, labels=ids, use_cache=False, attention_mask=torch.ones_like(ids)).loss
        found.append(gradients(model, learning, loss)[0])
    for a, b in zip(*found, strict=True):
        assert_close(b, a, 1e-4)
