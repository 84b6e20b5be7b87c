"""What a run is given: refused before the model is loaded, or named where ComfyUI would replace it in silence."""

import logging

import pytest
import torch

from comfyui_psa.choices.errors import InputError
from comfyui_psa.cogvideox.image import image_to_video, size_error
from comfyui_psa.cogvideox.run_inputs import check_run
from comfyui_psa.cogvideox.variant import find_variant

SIZES = {"num_attention_heads": 48, "text_embed_dim": 4096}
TEXT = find_variant(SIZES | {"in_channels": 16})
IMAGE = find_variant(SIZES | {"in_channels": 32, "use_learned_positional_embeddings": True})
LATENT = torch.zeros(1, 16, 13, 60, 90)


def prompts(width=4096, **more):
    return {"positive": [{"cross_attn": torch.zeros(1, 226, width), **more}], "negative": [{"cross_attn": None}]}


def started(size, with_image=True):
    return prompts(**({"concat_latent_image": torch.zeros(1, 16, 1, *size)} if with_image else {}))


@pytest.mark.parametrize("size", [(60, 90), (59, 90), (60, 89), (59, 89)])
def test_the_size_of_trained_positions_is_met_after_comfyuis_padding(size):
    check_run(IMAGE, SIZES, torch.zeros(1, 16, 13, *size), started(size))


@pytest.mark.parametrize(("size", "given"), [((12, 20), "160x96"), ((58, 90), "720x464"), ((90, 60), "480x720")])
def test_other_sizes_of_a_model_with_trained_positions_are_refused_with_the_size_that_works(size, given):
    with pytest.raises(
        InputError, match=rf"'{given} pixels' was given; allowed: 720x480 pixels, .*\. Set width 720 and"
    ):
        check_run(IMAGE, SIZES, torch.zeros(1, 16, 13, *size), started(size))


@pytest.mark.parametrize("shape", [(1, 4, 13, 60, 90), (1, 16, 60, 90), (1, 48, 5, 30, 44)])
def test_the_latent_of_another_model_is_refused(shape):
    with pytest.raises(
        InputError, match=r"input latent_image: an array of [\dx]+ was given; allowed: a latent with 16 ch"
    ):
        check_run(TEXT, SIZES, torch.zeros(shape), prompts())


def test_the_prompt_of_another_text_encoder_is_refused():
    with pytest.raises(InputError, match=r"'a prompt of width 768' was given; allowed: width 4096\. Encode it with"):
        check_run(TEXT, SIZES, LATENT, prompts(768))


@pytest.mark.parametrize(
    ("variant", "conds", "words"),
    [
        (TEXT, started((60, 90)), "the start image is not used"),
        (IMAGE, started((60, 90), with_image=False), "starts from an image and got none; add PSA CogVideoX Image"),
        (IMAGE, started((96, 170)), "the start image is 1360x768 and the video 720x480"),
        (IMAGE, started((60, 90)), None),
        (TEXT, prompts(), None),
    ],
)
def test_a_start_image_that_does_not_count_as_it_is_is_named_once(variant, conds, words, caplog):
    with caplog.at_level(logging.WARNING):
        check_run(variant, SIZES, LATENT, conds)
    messages = [record.message for record in caplog.records]
    assert len(messages) == (words is not None)
    assert words is None or words in messages[0]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("width", 1366, "to 1360 or 1368, the nearest."),
        ("height", 481, "to 480 or 488, the nearest."),
        ("height", 8, "16 to 16384"),
        ("width", "720", "16 to 16384"),
        ("length", 80, "to 77 or 81, the nearest."),
        ("length", 0, "1 to 16384"),
        ("width", 720, None),
        ("height", 488, None),
        ("length", 1, None),
        ("length", 161, None),
    ],
)
def test_sizes_without_a_latent_are_refused_with_the_nearest(name, value, words):
    found = size_error(name, value)
    assert found is None if words is None else words in str(found)


class Encoder:
    """In place of a VAE: latents of a size's eighth, with `channels`."""

    def __init__(self, channels=16):
        self.channels = channels

    def encode(self, pixels):
        return torch.zeros(1, self.channels, 1, pixels.shape[1] // 8, pixels.shape[2] // 8)


def test_a_rerun_with_another_picture_has_the_size_that_is_asked_for(comfyui):
    conds = [[[torch.zeros(1, 226, 32), {}]] for _ in range(2)]
    for shape in ((1, 64, 48, 3), (2, 333, 777, 4), (1, 8, 8, 3), (1, 64, 48, 3)):
        positive, _, latent = image_to_video(*conds, Encoder(), torch.rand(shape), 160, 104, 17, 1)
        assert positive[0][1]["concat_latent_image"].shape == (1, 16, 1, 13, 20)
        assert latent["samples"].shape == (1, 16, 5, 13, 20)
    assert not conds[0][0][1], "the user's conditioning stays"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae": Encoder(4)}, "input vae: 'a VAE with 4 channels' was given; allowed: the CogVideoX VAE"),
        ({"start_image": torch.rand(1, 8, 8, 1)}, "input start_image: an array of 1x8x8x1 was given"),
        ({"start_image": torch.rand(0, 8, 8, 3)}, "input start_image"),
        ({"width": 150}, "input width: 150 was given; allowed: multiples of 16"),
        ({"length": 16}, "input length: 16 was given; allowed: 4n"),
    ],
)
def test_wrong_inputs_of_the_image_node_are_refused_in_words(comfyui, change, words):
    given = {"vae": Encoder(), "start_image": torch.rand(1, 8, 8, 3), "width": 160, "height": 96, "length": 17}
    conds = [[[torch.zeros(1, 226, 32), {}]] for _ in range(2)]
    with pytest.raises(InputError) as caught:
        image_to_video(*conds, batch=1, **given | change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "computed", "warned"),
    [
        ("5b", torch.float16, True),
        ("1.5", torch.float16, True),
        ("5b", torch.bfloat16, False),
        ("1.5", torch.float32, False),
        ("2b", torch.float16, False),
    ],
)
def test_float16_is_warned_of_where_bf16_was_trained(model_folders, tiny, caplog, monkeypatch, kind, computed, warned):
    """The type that ComfyUI computes in is its choice for a GPU; here it is made to choose it on the CPU."""
    import comfy.model_management

    from comfyui_psa.loading.checkpoint import load_checkpoint

    folder = model_folders / "diffusers" / f"type {kind}"
    if not folder.exists():
        tiny.write_folder(folder, kind)
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **_: computed)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        load_checkpoint(folder.name)
    assert sum("float16" in message and "bf16 file" in message for message in caplog.messages) == warned
