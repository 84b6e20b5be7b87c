"""Put on, interrupted, taken off, in any order, with other hooks: nothing is left over and nothing else is lost."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from comfyui_psa.for_diffusers import apply_psa, remove_psa


class Stopped(BaseException):
    """As KeyboardInterrupt and SystemExit: no Exception."""


class OthersMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def is_stock(model):
    """No trace in a module's attributes."""
    return not model._forward_pre_hooks and not model._forward_hooks and not any(
        "forward" in block.attn1.__dict__ or block.attn1._forward_hooks for block in model.blocks
    )  # fmt: skip


@contextlib.contextmanager
def raising(module, error, number=0):
    """The module's `number`th call from now on raises."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == number + 1:
            raise error

    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), Stopped(), GeneratorExit(), RuntimeError("no")])
@pytest.mark.parametrize("place", ["to_q", "to_out.0"])
def test_whatever_is_raised_inside_a_self_attention(pipes, error, place):
    model = pipes.wan()
    stock = pipes.velocity(model)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    expected = pipes.velocity(model)
    with OthersMode() as others:
        with raising(model.blocks[1].attn1.get_submodule(place), error), pytest.raises(type(error)):
            pipes.velocity(model)
        assert _get_current_function_mode_stack() == [others]
    assert torch.equal(pipes.velocity(model), expected)
    applied.remove()
    assert is_stock(model)
    assert torch.equal(pipes.velocity(model), stock)


def test_an_interrupt_inside_the_kernel(pipes, monkeypatch):
    from comfyui_psa.sampling import self_attention

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    model = pipes.wan()
    stock = pipes.velocity(model)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(self_attention, "pyramid_sparse_attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipes.velocity(model)
    assert not _get_current_function_mode_stack()
    assert not applied.fallbacks
    applied.remove()
    assert torch.equal(pipes.velocity(model), stock)


def test_an_interrupt_between_two_self_attentions(pipes):
    model = pipes.wan()
    stock = pipes.velocity(model)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    expected = pipes.velocity(model)
    with raising(model.blocks[0].ffn, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        pipes.velocity(model)
    assert not _get_current_function_mode_stack()
    assert torch.equal(pipes.velocity(model), expected)
    applied.remove()
    assert torch.equal(pipes.velocity(model), stock)


@pytest.mark.parametrize("event", ["puts a mode on", "takes ours off"])
def test_modes_of_others_stay_where_they_are(pipes, event):
    """A hook inside the self-attention that leaves the stack of modes otherwise than it found it."""
    model = pipes.wan(layers=1)
    apply_psa(model, 0.6, **pipes.SETTINGS)
    below, put_on = OthersMode(), OthersMode()

    def change(*_):
        if event == "puts a mode on":
            put_on.__enter__()
        else:
            torch.overrides._pop_mode()

    handle = model.blocks[0].attn1.to_out[0].register_forward_pre_hook(change)
    with below:
        pipes.velocity(model)
        handle.remove()
        expected = [below, put_on] if event == "puts a mode on" else [below]
        left = _get_current_function_mode_stack()
        if put_on in left:
            put_on.__exit__(None, None, None)
    assert left == expected
    assert not _get_current_function_mode_stack()


def test_a_default_device_of_torch_s_stays(pipes):
    model = pipes.wan(layers=1)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    with torch.device("cpu"):
        pipes.velocity(model)
        assert len(_get_current_function_mode_stack()) == 1
    assert applied.sparse_calls == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1, 1), (1, 1, 0, 0)])
def test_applied_twice_and_removed_in_any_order(pipes, order):
    model = pipes.wan()
    stock = pipes.velocity(model)
    applied = [apply_psa(model, 0.6, **pipes.SETTINGS), apply_psa(model, 0.9, **pipes.SETTINGS)]
    pipes.velocity(model)
    assert [one.sparse_calls for one in applied] == [0, 2]
    for number in order:
        applied[number].remove()
    assert is_stock(model)
    assert torch.equal(pipes.velocity(model), stock)
    assert not remove_psa(model)


def test_the_older_one_s_removal_leaves_the_newer_one(pipes):
    model = pipes.wan()
    older = apply_psa(model, 0.6, **pipes.SETTINGS)
    newer = apply_psa(model, 0.6, **pipes.SETTINGS)
    older.remove()
    pipes.velocity(model)
    assert (older.sparse_calls, newer.sparse_calls) == (0, 2)


def test_one_expert_set_again_leaves_the_other(pipes):
    pipe = pipes.pipeline(pipes.wan(), pipes.wan(seed=1))
    both = apply_psa(pipe, 0.6, **pipes.SETTINGS)
    alone = apply_psa(pipe.transformer_2, 0.9, **pipes.SETTINGS)
    pipes.run(pipe)
    assert [state.sparse_calls for state in both.states][1] == 0
    assert both.sparse_calls
    assert alone.sparse_calls
    assert remove_psa(pipe.transformer_2)
    assert is_stock(pipe.transformer_2)
    assert not is_stock(pipe.transformer)


def test_one_transformer_under_both_names(pipes):
    model = pipes.wan(layers=1)
    pipe = pipes.pipeline(model, model)
    applied = apply_psa(pipe, 0.6, **pipes.SETTINGS, correction="off")
    pipes.run(pipe)
    assert (applied.sparse_calls, applied.dense_calls) == (4, 0)
    applied.remove()
    assert is_stock(model)


def caching(model):
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: 500,
    )  # fmt: skip


@pytest.mark.parametrize("first", ["cache", "psa"])
@pytest.mark.parametrize("off_first", ["cache", "psa"])
def test_with_a_cache_of_diffusers(pipes, first, off_first):
    """It wraps the self-attention's forward too, and answers some calls itself."""
    model = pipes.wan()
    stock = pipes.velocity(model)

    def cached():
        with model.cache_context("cond"):
            return pipes.velocity(model)

    if first == "cache":
        model.enable_cache(caching(model))
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    if first == "psa":
        model.enable_cache(caching(model))
    cached()
    assert (applied.sparse_calls, applied.dense_calls) == (2, 0)
    cached()
    assert applied.sparse_calls == 2, "the cache has answered"
    if off_first == "cache":
        model.disable_cache()
        pipes.velocity(model)
        # What was around PSA when it came has put the forward of before back.
        assert applied.sparse_calls == (4 if first == "psa" else 2)
        assert any("call apply_psa again" in reason for reason in applied.fallbacks)
        applied.remove()
    else:
        applied.remove()
        model.disable_cache()
    assert torch.equal(pipes.velocity(model), stock)
    again = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.velocity(model)
    assert again.sparse_calls == 2
    again.remove()
    assert torch.equal(pipes.velocity(model), stock)


def group_offload(model):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def block_offload(model):
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )  # fmt: skip


def casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def sequential(model):
    import accelerate

    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def lora(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def fused(model):
    model.fuse_qkv_projections()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("change", [group_offload, block_offload, casting, sequential, lora, fused])
def test_with_what_else_users_do_to_a_transformer(pipes, change, first):
    model, expected = pipes.wan(), pipes.wan()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        change(expected)
    stock = pipes.velocity(expected)
    apply_psa(expected, 0.6, **pipes.SETTINGS)
    sparse = pipes.velocity(expected)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS) if first else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        change(model)
    applied = applied or apply_psa(model, 0.6, **pipes.SETTINGS)
    assert torch.equal(pipes.velocity(model), sparse)
    assert not torch.equal(sparse, stock)
    assert (applied.sparse_calls, applied.dense_calls) == (2, 0)
    applied.remove()
    assert torch.equal(pipes.velocity(model), stock)
