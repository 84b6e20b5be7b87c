"""ComfyUI's own Wan nodes make the conditioning, so that what PSA reads from it is what those nodes put there."""

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from .patched import FULL, SPARSE, distance, layouts, reports_nothing

SIZE = {"width": 256, "height": 256, "length": 9, "batch_size": 1}


class Encoder:
    """Instead of a Wan VAE: random latents of the right size."""

    temporal_compression_decode = staticmethod(lambda: 4)
    spacial_compression_encode = staticmethod(lambda: 8)

    def encode(self, pixels):
        frames, height, width = pixels.shape[0], pixels.shape[1], pixels.shape[2]
        generator = torch.Generator().manual_seed(frames)
        return torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)


def check_sampling(tiny_wan, kind, positive, negative, latent, model=None, cfg=3.0):
    """Sparse, and with everything in full like dense; returns dense."""
    model = tiny_wan.load(kind) if model is None else model
    inputs = {"size": tuple(latent["samples"].shape), "cfg": cfg, "positive": positive, "negative": negative}
    stock = tiny_wan.sample(model, **inputs)
    for settings in (SPARSE, FULL):
        psa = patch_model(model, **settings)
        out = tiny_wan.sample(psa, **inputs)
        assert torch.isfinite(out).all()
        assert (distance(out, stock) < 1e-5) == (settings is FULL)
        assert reports_nothing(psa)
    return stock


def image(frames=1, seed=0):
    return torch.rand(frames, 256, 256, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_vace(tiny_wan, kernel_calls, reference, masked):
    from comfy_extras.nodes_wan import WanVaceToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    # A mask of zeros keeps the whole control video: its frames have no mask, and are no references.
    mask = torch.zeros(9, 256, 256) if masked else None
    positive, negative, latent, trim = WanVaceToVideo.execute(
        *conds, Encoder(), **SIZE, strength=1.0, control_video=image(9), control_masks=mask,
        reference_image=image(seed=1) if reference else None,
    ).result  # fmt: skip
    assert trim == int(reference)
    check_sampling(tiny_wan, "vace", positive, negative, latent)
    assert layouts(kernel_calls) == {(256 * trim, (3, 16, 16), 0)}


def test_phantom(tiny_wan, kernel_calls):
    from comfy_extras.nodes_wan import WanPhantomSubjectToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    positive, negative, _, latent = WanPhantomSubjectToVideo.execute(*conds, Encoder(), **SIZE, images=image(2)).result
    check_sampling(tiny_wan, "t2v", positive, negative, latent)
    assert layouts(kernel_calls) == {(0, (3, 16, 16), 512)}


def test_animate(tiny_wan, kernel_calls):
    from comfy_extras.nodes_wan import WanAnimateToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    positive, negative, latent, trim, *_ = WanAnimateToVideo.execute(
        *conds, Encoder(), **SIZE, continue_motion_max_frames=5, video_frame_offset=0, reference_image=image(),
        pose_video=image(9),
    ).result  # fmt: skip
    assert trim == 1
    check_sampling(tiny_wan, "animate", positive, negative, latent)
    assert layouts(kernel_calls) == {(256, (3, 16, 16), 0)}


def test_s2v(tiny_wan, kernel_calls):
    from comfy_extras.nodes_wan import WanSoundImageToVideo

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    s2v = WanSoundImageToVideo.execute(*conds, Encoder(), **SIZE, ref_image=image(), ref_motion=image(73)).result
    check_sampling(tiny_wan, "s2v", *s2v)
    assert layouts(kernel_calls) == {(0, (3, 16, 16), 256 + 256 + 64 + 64)}


@pytest.mark.parametrize("references", [0, 2])
def test_bernini(tiny_wan, kernel_calls, references):
    from comfy_extras.nodes_bernini import BerniniConditioning

    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    images = {f"reference_image_{n}": image(seed=n) for n in range(references)}
    positive, negative, latent = BerniniConditioning.execute(
        *conds, Encoder(), **SIZE, source_video=image(9), reference_images=images
    ).result
    check_sampling(tiny_wan, "t2v", positive, negative, latent)
    assert layouts(kernel_calls) == {(0, (3, 16, 16), (3 + references) * 256)}


def as_model_patch(network):
    """A model patch as its loader makes it, with random weights."""
    import comfy.model_management
    import comfy.model_patcher

    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(network, device, comfy.model_management.unet_offload_device())


def talk(tiny_wan, mode, audio_scale=1.0):
    """InfiniteTalk's own node on a Wan I2V: (model, positive, negative, latent)."""
    import comfy.ops
    from comfy.ldm.wan.model_multitalk import MultiTalkAudioProjModel, SingleStreamMultiAttention
    from comfy_extras.nodes_wan import WanInfiniteTalkToVideo

    layers = {"operations": comfy.ops.disable_weight_init}
    network = torch.nn.Module()
    sizes = {"blocks": 2, "channels": 8, "intermediate_dim": 16, "out_dim": 64, "context_tokens": 4}
    network.audio_proj = MultiTalkAudioProjModel(seq_len_vf=8, **sizes, **layers)
    network.blocks = torch.nn.ModuleList()
    for _ in range(2):
        block = torch.nn.Module()
        block.norm_x = torch.nn.LayerNorm(256)
        block.audio_cross_attn = SingleStreamMultiAttention(256, 64, num_heads=2, qkv_bias=True, **layers)
        network.blocks.append(block)
    sound = {"encoded_audio_all_layers": [tiny_wan.normal(1, 40, 8, seed=n) for n in range(3)]}
    masks = [torch.zeros(1, 256, 256) for _ in range(2)]
    masks[0][:, :, :128], masks[1][:, :, 128:] = 1.0, 1.0
    speakers = {"mode": mode, "audio_encoder_output_2": sound, "mask_1": masks[0], "mask_2": masks[1]}
    model, positive, negative, latent, _ = WanInfiniteTalkToVideo.execute(
        speakers, tiny_wan.load("i2v 2.2"), as_model_patch(network), tiny_wan.conditioning(),
        tiny_wan.conditioning(seed=4), Encoder(), width=256, height=256, length=9, audio_encoder_output_1=sound,
        motion_frame_count=9, start_image=image(), audio_scale=audio_scale,
    ).result  # fmt: skip
    return model, positive, negative, latent


@pytest.mark.parametrize("mode", ["single_speaker", "two_speakers"])
def test_infinite_talk(tiny_wan, kernel_calls, mode):
    """Attention over the sound stays as it is: it does not pass through the override. Core's code for it takes no batch
    of prompts, so there is no guidance."""
    model, *inputs = talk(tiny_wan, mode)
    stock = check_sampling(tiny_wan, "", *inputs, model=model, cfg=1.0)
    assert layouts(kernel_calls) == {(0, (3, 16, 16), 0)}
    silent, *inputs = talk(tiny_wan, mode, audio_scale=0.0)
    assert not torch.equal(check_sampling(tiny_wan, "", *inputs, model=silent, cfg=1.0), stock), "the sound counts"


def test_uni3c(tiny_wan, kernel_calls):
    """Its controlnet is a network of its own, as long as the video, and stays dense."""
    import comfy.ops
    from comfy.ldm.wan.uni3c import WanUni3CControlnet
    from comfy_extras.nodes_model_patch import WanUni3CControlnetApply
    from comfy_extras.nodes_wan import WanImageToVideo

    controlnet = WanUni3CControlnet(
        conv_out_dim=256, dim=256, ffn_dim=256, num_heads=2, num_layers=2, time_embed_dim=256, out_proj_dim=256,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    wan = tiny_wan.load("i2v 2.2")
    conds = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
    inputs = WanImageToVideo.execute(*conds, Encoder(), **SIZE, start_image=image()).result
    (model,) = WanUni3CControlnetApply().apply_patch(
        wan, as_model_patch(controlnet), Encoder(), image(9), strength=1.0, start_percent=0.0, end_percent=1.0
    )
    stock = check_sampling(tiny_wan, "", *inputs, model=model)
    assert layouts(kernel_calls) == {(0, (3, 16, 16), 0)}
    assert not torch.equal(check_sampling(tiny_wan, "", *inputs, model=wan), stock), "the controlnet counts"
