"""A user of the Chinese page reads no English sentence of ours: problems before a run, reasons after it, and errors."""

import json
import re
from types import SimpleNamespace

import pytest

MODULE = "/extensions/ComfyUI-PSA/translate.js"
TRANSLATE = """async ([module, texts]) => {
    const { learn, told } = await import(module);
    await learn("zh");
    return texts.map((text) => [told("zh", text), told("en", text)]);
}"""
ENGLISH = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}){2,}")
"""Three English words in a row."""


def refusals():
    """Errors for wrong settings and inputs, as their own code makes them."""
    from comfyui_psa.choices.errors import InputError
    from comfyui_psa.choices.settings import make_settings

    for wrong in (
        {"start_percent": 0.9, "end_percent": 0.5},
        {"pyramid": "1"},
        {"pyramid": "1: 0.7, 2: 0.7"},
        {"dense_blocks": "x", "blocks": 30},
        {"backend": "cuda"},
        {"preset": "none"},
        {"falling": 2.0},
        {"reuse_steps": 4, "order": "semantic"},
        {"block_q": -1},
    ):
        try:
            make_settings(**wrong)
        except InputError as error:
            yield str(error)
        else:
            raise AssertionError(f"nothing is wrong with {wrong}")


def sentences(folder):
    """Other sentences of the product, as its own code makes them."""
    import torch

    from comfyui_psa.choices.correction import reason_against
    from comfyui_psa.choices.errors import InputError
    from comfyui_psa.choices.user_presets import find_preset
    from comfyui_psa.kernels.backends import triton_reason
    from comfyui_psa.loading.download import DownloadError, check_names
    from comfyui_psa.loading.files import FileError
    from comfyui_psa.loading.safetensors_header import read_header
    from comfyui_psa.reports.calibrate import Measuring
    from comfyui_psa.sampling.findings import find, unranked_note
    from comfyui_psa.sampling.record import Record

    yield from find(Record(-1))
    short = "9 video tokens (5 frames of 48x16) are fewer than two query blocks of 128; sample a longer or larger video"
    for reason in (*find(Record(-1)), short):
        with pytest.raises(InputError) as caught:
            Measuring([], SimpleNamespace(read=lambda *_, reason=reason: reason)).before_call(*[None] * 5)
        yield str(caught.value)
    yield from unranked_note(7)
    yield reason_against("semantic")
    yield triton_reason(torch.zeros(1, 1, 8, 512))
    yield triton_reason(torch.zeros(1, 1, 8, 64, dtype=torch.float64))
    yield str(InputError.of_choice("lora_name", "x", [f"file{n}.safetensors" for n in range(40)], "PSA LoRA Loader"))
    for name, content in (("a", b""), ("b", b"GGUF123456789"), ("c", b"<html>"), ("d", b"\x10"), ("e", b"\xff" * 20)):
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(FileError) as caught:
            read_header(path)
        reason = f"a file that can be used; {caught.value}"
        yield str(InputError("lora_name", path.name, reason, "PSA LoRA Loader", do=caught.value.do))
    for name, content in (
        ("f", "{"),
        ("g", "[]"),
        ("h", '{"colour": 1}'),
        ("i", '{"tail": 1}'),
        ("j", '{"dense_steps": 1.5}'),
        ("k", '{"shares": {"3": 1}}'),
    ):
        (folder / f"{name}.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            find_preset(f"user/{name}", folder)
        yield str(caught.value)
    with pytest.raises(DownloadError) as caught:
        check_names("nobody", "x.safetensors")
    yield str(caught.value)


def test_what_the_product_says_is_chinese_on_a_chinese_page(pages, tmp_path):
    texts = [*refusals(), *sentences(tmp_path)]
    pairs = pages().page.evaluate(TRANSLATE, [MODULE, texts])
    for text, (chinese, english) in zip(texts, pairs, strict=True):
        assert english == text, "it is English on an English page"
        assert not ENGLISH.search(chinese), (text, chinese)
        assert re.search("[\u4e00-\u9fff]", chinese), text
        assert sorted(re.findall(r"\d+", chinese)) == sorted(re.findall(r"\d+", text)), (text, chinese)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2 GB: close a, b to c, 1 to 2.",
        "a node of somebody else: wants to be, or not to be",
        "x" * 20000,
        "a: b to c, " * 40,
    ],
)
def test_what_others_say_is_left_alone(pages, text):
    ((shown, _),) = pages().page.evaluate(TRANSLATE, [MODULE, [text]])
    assert shown == text


@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_a_problem_before_a_run_is_told_in_chinese(pages, renderer):
    frontend = pages(renderer, "zh")
    patch = frontend.add("PSAPatch", 600)
    frontend.choose(patch, "start_percent", 0.6)
    frontend.choose(patch, "end_percent", 0.5)
    seen = frontend.picture(patch)
    assert seen["problem"]
    assert seen["headline"] == (
        "PSA 补丁，输入“开始百分比”：当前为 0.6；应为：小于“结束百分比”的值，后者为 0.5。"
        "请调低“开始百分比”，或调高“结束百分比”。"
    )
    pyramid = frontend.add("PSAPyramid", 60)
    frontend.choose(patch, "end_percent", 1.0)
    frontend.connect(pyramid, 0, patch, "psa_pyramid")
    for name in ("full", "half"):
        frontend.choose(pyramid, name, 0.9)
    for node in (pyramid, patch):
        problem = frontend.picture(node)["headline"]
        assert problem.startswith("PSA 金字塔，输入“")
        assert not ENGLISH.search(problem)
    assert frontend.errors == []


@pytest.mark.slow
def test_what_stays_dense_is_told_in_chinese(pages, demo_workflow):
    frontend = pages("classic", "zh")
    demo = demo_workflow.small_demo()
    for node in demo["nodes"]:
        if node["type"] == "PSAPatch":
            node["widgets_values"][node["widgets_values"].index(0)] = 100000
    frontend.load(demo)
    assert frontend.run()[0] == "execution_success"
    (patch,) = (node["id"] for node in demo["nodes"] if node["type"] == "PSAPatch")
    seen = frontend.picture(patch)
    assert re.match(r"保持了稠密：\d+ 个词元（9 帧，256x256）少于“最少词元” 100000，此时", seen["headline"])
    assert not ENGLISH.search(seen["text"])
    assert frontend.errors == []


def test_an_error_of_a_run_is_told_in_chinese(pages):
    frontend = pages("classic", "zh")
    small, large = frontend.add("EmptyImage", 60), frontend.add("EmptyImage", 60, 400)
    compare, preview = frontend.add("PSACompare", 500), frontend.add("PreviewImage", 900)
    frontend.choose(large, "width", 256)
    frontend.connect(small, 0, compare, "images_a")
    frontend.connect(large, 0, compare, "images_b")
    frontend.connect(compare, 0, preview, "images")
    kind, detail = frontend.run(timeout=60)
    assert kind == "execution_error", json.dumps(detail)
    message = detail["exception_message"].rstrip()
    assert message.startswith("PSA 对比，输入“图像 B”：当前为")
    assert message.endswith("，即“图像 A”的形状。请让两个视频的尺寸和帧数相同。")
    assert not ENGLISH.search(message)
    shown = frontend.page.evaluate("() => app.extensionManager.lastExecutionError.exception_message")
    assert shown.rstrip() == message, "what ComfyUI shows of it"
