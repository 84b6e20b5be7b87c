"""The rivals: EasyCache by its rule, and what each of them is counted for."""

import dataclasses

import pytest
import torch

from comfyui_psa.workshop.quality.attention import SparseAttention
from comfyui_psa.workshop.quality.demo_model import Clip, DemoModel, Video, simple_schedule
from comfyui_psa.workshop.quality.measure import Measurement
from comfyui_psa.workshop.quality.rivals import EasyCache, rivals
from comfyui_psa.workshop.quality.setting import Setting, resolve
from comfyui_psa.workshop.quality.tries import attention_of

STEPS = 20
SCHEDULE = simple_schedule(STEPS, 2)


def run(cache, clips, guided):
    """Latents after every step of a made-up model, whose clips change at different rates."""
    x = torch.randn(clips, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    rates = torch.linspace(0.2, 2, clips).view(-1, 1, 1, 1, 1)
    found = []
    for now, following in zip(SCHEDULE.sigmas, [*SCHEDULE.sigmas[1:], 0.0], strict=True):
        rows = torch.cat([x, x]) if guided else x

        def compute(rows=rows, sigma=now):
            return torch.sin(rows * rates.repeat(len(rows) // clips, 1, 1, 1, 1) * (2 - sigma)) - 0.1 * rows

        output = cache(rows, now, compute)
        x = x + (following - now) * output[:clips]
        found.append(x)
    return torch.stack(found)


@pytest.mark.parametrize("guided", [False, True])
def test_it_reuses_what_comfyuis_node_reuses(comfyui, guided):
    import comfy_extras.nodes_easycache as node

    cache = EasyCache(SCHEDULE, 3, 0.2)
    found = run(cache.call, 3, guided)

    holders = [node.EasyCacheHolder(0.2, 0.15, 0.95, 8, False, output_channels=4) for _ in range(3)]
    for holder in holders:
        holder.start_t, holder.end_t = cache.start, cache.end

    def theirs(rows, sigma, compute):
        every, outputs = compute(), []
        for clip, holder in enumerate(holders):
            own = slice(clip, None, 3)
            holder.skip_current_step = False
            options = {"easycache": holder, "sigmas": torch.tensor([sigma]), "uuids": ["a", "b"][: len(rows) // 3]}
            outputs.append(
                node.easycache_forward_wrapper(lambda *_, own=own: every[own].clone(), rows[own].clone(), options)
            )
        return torch.stack(outputs, 1).flatten(0, 1)

    expected = run(theirs, 3, guided)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    skipped = [holder.total_steps_skipped for holder in holders]
    assert len(set(skipped)) > 1  # clips decide for themselves
    assert sum(cache.computed) == pytest.approx(STEPS - sum(skipped) / 3)


def test_a_threshold_of_nothing_reuses_nothing():
    cache = EasyCache(SCHEDULE, 3, 0.0)
    torch.testing.assert_close(run(cache.call, 3, False), run(lambda rows, sigma, compute: compute(), 3, False))
    assert cache.computed == [1.0] * STEPS


def test_what_is_computed_is_counted_by_kind():
    q, k, v = torch.randn(3, 2, 2, 1024, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    by = {}
    for correction, prototype in (("off", {}), ("full", {}), ("off", {"sol": 1.0, "extra": 64})):
        node = {"correction": correction, "start_percent": 0.25}
        setting = Setting("", "", node, correction={"renew": 4} if correction == "full" else {}, prototype=prototype)
        settings = resolve(setting, SCHEDULE, "torch", 0.7)
        attention = attention_of(settings, SCHEDULE, (4, 16, 16), prototype)
        assert isinstance(attention, SparseAttention)
        for step in range(STEPS):
            attention.begin_step(step)
            for _ in range(2):
                attention(q, k, v)
        work = sum(attention.step_densities()) / STEPS
        by["sol" if prototype else correction] = calls = attention.calls()
        assert calls.dense + calls.sparse == pytest.approx(1)
        if prototype:
            assert calls.dense < work < 1
        else:
            density = 1 - attention.run.config.sparsity
            assert work == pytest.approx(calls.dense + density * (calls.sparse + calls.learning), abs=0.01)
    assert by["off"].learning == 0
    # Both blocks learn in the last of 5 dense steps; then one block in 4 in each of 15 steps, save the last.
    turns = [(step, block) for step in range(1, 16) for block in range(2) if (step + block) % 4 == 0]
    renewed = len(turns)
    assert by["full"].dense == pytest.approx((5 * 2 + renewed) / 40)
    assert by["full"].learning == pytest.approx((2 + renewed - sum(step == 15 for step, _ in turns)) / 40)


class Kept:
    """A sheet that remembers what it was given."""

    def __init__(self):
        self.shapes = {}

    def add(self, name, videos):
        self.shapes[name] = tuple(videos.shape)

    def write(self, clips, _):
        self.clips = clips


def test_every_rival_runs(tmp_path):
    model = DemoModel(torch.device("cpu"), torch.float32)
    video = Video(5, 128, 128)
    clip = Clip(model.facts.world.scenes[0], 42, "clip")
    schedule = simple_schedule(8, model.blocks)
    measurement = Measurement(model, [clip], video, schedule, "torch", {})
    wanted = ("50% of the steps", "EasyCache, 0.2", "Sol-Attn, tau 1.0", "Sol-Attn with 256 extra tokens, tau 1.0")
    settings = [dataclasses.replace(setting, sheet=True) for setting in rivals() if setting.name in wanted]
    assert len(settings) == len(wanted)
    said, sheet = [], Kept()
    assert measurement.run(settings, tmp_path, float("inf"), said.append, sheet) == len(wanted), said
    assert list(sheet.shapes) == ["dense", *(setting.name for setting in settings)]
    assert set(sheet.shapes.values()) == {(1, 3, 5, 128, 128)}
    assert sheet.clips == [clip]
