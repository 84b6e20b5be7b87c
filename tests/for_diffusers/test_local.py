"""LocalAttention against our own call and dense attention, alone and in yunchang's layers with two processes."""

import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.for_diffusers import LocalAttention
from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.order import TokenLayout

GRID = (3, 12, 16)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "several-gpus.md"


def tensors(text=0, heads=2, length=None):
    shape = (3, 1, (length or 576) + text, heads, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def dense(q, k, v, **given):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **given).transpose(1, 2)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (9, 0), (0, 7)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_it_is_our_own_call(before, after, scale):
    q, k, v = tensors(before + after)
    attention = LocalAttention(GRID, 0.6, text_before=before, text_after=after)
    output, _ = attention(q, k, v, softmax_scale=scale, window_size=(-1, -1), deterministic=False)
    config = load_presets()["module-default"].config(0.6)
    ours = pyramid_sparse_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), config, layout=TokenLayout(GRID, before, after), scale=scale
    )
    assert torch.equal(output, ours.output.transpose(1, 2))
    assert attention.sparse_calls == 1
    assert not torch.allclose(output, dense(q, k, v, scale=scale), atol=1e-3)


def test_inside_autocast_types_are_those_of_torchs_attention():
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        attention = LocalAttention(GRID, 0.6)
        output, _ = attention(q, k, v.bfloat16())
        assert attention.sparse_calls == 1
        attention.sparse = False
        assert attention(q, k, v.bfloat16())[0].dtype == output.dtype == torch.bfloat16


@pytest.mark.parametrize("why", ["warm-up", "cross-attention", "causal", "gradients"])
def test_what_it_leaves_dense(why):
    attention = LocalAttention(GRID, 0.6)
    q, k, v = tensors()
    attention.sparse = why != "warm-up"
    if why == "cross-attention":
        k, v = k[:, :50], v[:, :50]
    q.requires_grad_(why == "gradients")
    output, _ = attention(q, k, v, causal=why == "causal")
    assert torch.equal(output, dense(q, k, v, is_causal=why == "causal"))
    assert attention.sparse_calls == 0
    assert output.requires_grad == (why == "gradients")


def test_a_compiled_model_leaves_it_alone():
    """Engines compile their models; what is traced would be the kernels, and a step of the script's."""
    q, k, v = tensors()
    attention, alone = (LocalAttention(GRID, 0.6) for _ in range(2))
    traced = []

    def backend(graph, _):
        traced.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(q, k, v):
        return attention(q * 2, k, v)[0] + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend)
    for sparse in (True, False, True):
        attention.sparse = alone.sparse = sparse
        assert torch.equal(compiled(q, k, v), alone(q * 2, k, v)[0] + 1)
    assert attention.sparse_calls == 2
    assert len(traced) == 2, "what the layer itself computes"
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model with fullgraph=False"):
        whole(q, k, v)
    assert torch.equal(pickle.loads(pickle.dumps(attention))(q, k, v)[0], alone(q, k, v)[0])


def test_wrong_inputs_say_what_is_allowed():
    wrong = (
        {"preset": "moon"}, {"sparsity": 0.99}, {"sparsity": "0.6"}, {"block_kv": 17}, {"moon": 1}, {"text_before": -5},
        {"text_after": 1.5}, {"backend": "moon"}, {"grid": (3, 16)}, {"grid": 768}, {"grid": (0, 12, 16)},
    )  # fmt: skip
    for given in wrong:
        with pytest.raises(ValueError, match=f"LocalAttention, {next(iter(given))}: .* was given; allowed: .*; "):
            LocalAttention(**{"grid": GRID} | given)
    with pytest.raises(ValueError, match=r"grid: .*576 tokens.* was given; allowed: that of the 288 tokens"):
        LocalAttention(GRID, 0.6)(*tensors(length=288))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("window_size", (128, 0), r"\(128, 0\)"),
        ("softcap", 30.0, "30.0"),
        ("alibi_slopes", torch.ones(2), "an array of 2"),
    ],
)
@pytest.mark.parametrize("sparse", [True, False])
def test_what_would_change_the_output_is_refused(name, value, said, sparse):
    attention = LocalAttention(GRID, 0.6)
    attention.sparse = sparse
    with pytest.raises(ValueError, match=f"^LocalAttention, {name}: {said} was given; allowed: none, "):
        attention(*tensors(), **{name: value})


def test_a_mask_is_kept_to_and_said_once(caplog):
    attention = LocalAttention(GRID, 0.6)
    q, k, v = tensors()
    mask = torch.ones(576, 576, dtype=torch.bool).tril(100)
    text = torch.ones(576, 50, dtype=torch.bool)
    text[:, 30:] = False
    found = attention(q, k[:, :50], v[:, :50], attn_mask=text)[0]
    assert torch.equal(found, dense(q, k[:, :50], v[:, :50], attn_mask=text))
    assert not caplog.records, "a mask of the text alone is no matter"
    for _ in range(2):
        assert torch.equal(attention(q, k, v, attn_mask=mask)[0], dense(q, k, v, attn_mask=mask))
    assert attention.sparse_calls == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the self-attention has a mask" in line


def test_a_failure_is_logged_once_and_stays_dense(caplog):
    attention = LocalAttention(GRID, 0.6, backend="triton")
    q, k, v = tensors()
    for _ in range(2):
        assert torch.equal(attention(q, k, v)[0], dense(q, k, v))
    if not torch.cuda.is_available():
        (line,) = [record.getMessage() for record in caplog.records]
        assert "stays dense from here on: the Triton kernel" in line


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("layer", ["UlyssesAttention", "LongContextAttention"])
def test_two_processes_of_yunchang(start_ranks, work, layer):
    """The layers of yunchang, which xDiT's are made of, on halves of the tokens."""
    if importlib.util.find_spec("yunchang") is None:
        pytest.skip("yunchang is not installed")
    attention = LocalAttention(GRID, 0.6, text_before=4)
    expected, _ = attention(*tensors(4, heads=4))
    for rank, half in enumerate(start_ranks(2).run(work.__file__, "yunchang", layer=layer, grid=GRID, text=4)):
        assert torch.equal(half["output"], expected[:, 290 * rank : 290 * (rank + 1)])
        assert half["sparse_calls"] == 1


@pytest.mark.slow(seconds=30)
def test_two_processes_of_xdit(start_ranks, work):
    """xDiT's own attention with the page's snippet, on halves of the tokens."""
    if importlib.util.find_spec("xfuser") is None:
        pytest.skip("xDiT (xfuser) is not installed")
    (block,) = re.findall(
        r"((?:^    .*\n|^\n)*^    @register_attention_function.*\n(?:^    .*\n)*)", PAGE.read_text(), re.M
    )
    given = "(18, 45, 80), 0.85"
    assert given in block
    snippet = "\n".join(line[4:] for line in block.splitlines()).replace(given, f"{GRID}, 0.6, text_after=4")
    whole = tensors(4, heads=4)
    expected, _ = LocalAttention(GRID, 0.6, text_after=4)(*whole)
    for rank, half in enumerate(start_ranks(2).run(work.__file__, "xdit", snippet=snippet, grid=GRID, text=4)):
        q, k, v = whole.chunk(2, 2)[rank]
        assert torch.equal(half["output"], expected[:, 290 * rank : 290 * (rank + 1)])
        assert torch.equal(half["cross"], dense(q, k[:, :50], v[:, :50]))
        assert half["sparse_calls"] == 1
