"""docs/troubleshooting.md lists what the product can say: no more, no less, and in the words that users see."""

import re
import shutil

import pytest

from comfyui_psa.workshop.tools.explanations import EXPLANATIONS, SECTIONS
from comfyui_psa.workshop.tools.messages import ERRORS, FOLDERS, NOT_SHOWN, PASSED_ON, Product
from comfyui_psa.workshop.tools.paths import ROOT
from comfyui_psa.workshop.tools.troubleshooting import PAGE, explanation_of, page


@pytest.fixture(scope="module")
def product():
    return Product(ROOT)


@pytest.fixture
def copy(tmp_path):
    """The product's code and the page, to change them."""
    for folder in (*FOLDERS, "docs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.jpg", "*.png", "__pycache__")
        )
    return tmp_path


def change(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_page_is_what_the_code_says():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(ROOT), "run `python dev.py docs`"


def test_a_new_log_line_needs_an_explanation(copy):
    change(
        copy / "patching" / "patch.py",
        'log.debug("PSA: %s", settings.config)',
        'log.info("PSA: the moon is %s today", sparsity)',
    )
    with pytest.raises(LookupError, match=r"patching/patch\.py has the message 'the moon is … today'"):
        page(copy)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (
            "sampling/findings.py",
            'return f"block {numbers} is',
            'return f"the part {numbers} is not',
        ),
        ("sampling/findings.py", "a cache answered all {", "the memory of a node answered {"),
        ("for_diffusers/state.py", "no scheduler is known,", "there is no scheduler,"),
        ("kernels/backends.py", "the package triton is not installed", "please install a recent triton first"),
    ],
)
def test_a_reason_in_other_words_needs_an_explanation(copy, file, old, new):
    change(copy / file, old, new)
    with pytest.raises(LookupError, match="explanation"):
        page(copy)


def test_an_explanation_without_a_message_is_refused(copy):
    change(copy / "kernels" / "gpu" / "autotune.py", 'log.info("PSA could not tune', 'log.debug("PSA could not tune')
    with pytest.raises(LookupError, match="no message of the code contains 'PSA could not tune'"):
        page(copy)


def test_a_line_that_passes_on_a_sentence_must_name_its_source(copy):
    change(
        copy / "patching" / "patch.py", 'log.debug("PSA: %s", settings.config)', 'log.info("PSA: %s", settings.config)'
    )
    with pytest.raises(LookupError, match=r"the entry 'patching/patch\.py: settings\.config'"):
        page(copy)


def test_an_error_with_another_input_changes_the_page(copy):
    change(copy / "choices" / "settings.py", 'InputError("start_percent"', 'InputError("begin"')
    assert "| `begin` |" in page(copy)
    assert "| `begin` |" not in page(ROOT)


def test_every_source_is_known(product):
    assert product.passed_on() == set(PASSED_ON)
    assert product.error_classes() <= {*ERRORS, *NOT_SHOWN}


def test_no_log_line_is_overlooked(product):
    """Counted without a parser: a call to the log at a level that users see."""
    lines = [
        line
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "examples" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(?:if .*: )?log\.(?:info|warning|error|exception|critical|log)\(", line)
    ]
    found = [message for message in product.messages() if message.kind == "log"]
    assert len(lines) == len(found) + len(PASSED_ON)


def pattern(text):
    """What a listed message looks like when it is shown."""
    parts = re.split(r"(…|\[[^\]]*\]|\([^()]* / [^()]*\))", text)
    words = (".*" if part == "…" or part[:1] == "[" or " / " in part else re.escape(part) for part in parts)
    return re.compile("".join(words), re.DOTALL)


def said():
    """Sentences as the product makes them, not as the page lists them."""
    import torch

    from comfyui_psa.choices.correction import reason_against
    from comfyui_psa.choices.settings import make_settings
    from comfyui_psa.kernels.backends import triton_reason
    from comfyui_psa.sampling.figures import summary
    from comfyui_psa.sampling.findings import find, unranked_note
    from comfyui_psa.sampling.record import Record

    step = {"kind": "sparse", "seconds": 1.0, "sparse_calls": 3}
    report = {
        "steps": [step],
        "correction": {"corrected_calls": 3, "size": "half"},
        "mean_sparsity": 0.8,
        "backend": "torch",
    }
    yield from find(Record(-1))
    yield from unranked_note(7)
    yield reason_against("semantic")
    yield triton_reason(torch.zeros(1, 1, 8, 512))
    yield triton_reason(torch.zeros(1, 1, 8, 64, dtype=torch.float64))
    yield str(make_settings(sparsity=0.85))
    yield summary(report)


def test_what_the_product_says_is_listed(product, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    texts = [message.text for message in product.messages() if message.kind != "error"]
    for sentence in said():
        assert any(pattern(text).fullmatch(sentence) for text in texts if re.search("[a-z]", text)), sentence


def test_what_an_error_says_is_listed(product):
    from comfyui_psa.choices.errors import InputError
    from comfyui_psa.choices.settings import make_settings

    errors = [message for message in product.messages() if message.field]
    for wrong in (
        {"pyramid": "1"},
        {"dense_blocks": "x"},
        {"start_percent": 0.9, "end_percent": 0.5},
        {"backend": "cuda"},
    ):
        with pytest.raises(InputError) as caught:
            make_settings(**wrong)
        field = caught.value.field
        listed = [one for one in errors if one.field == field and one.node == "PSA Patch"]
        choices = "an entry of its menu"
        assert any(one.allowed == choices or pattern(one.allowed).search(str(caught.value)) for one in listed), field


def test_explanations_are_complete(product):
    for one in EXPLANATIONS:
        assert one.section in SECTIONS
        assert one.means.endswith(".")
        assert one.do.endswith(".")
    for message in product.messages():
        if message.kind != "error":
            explanation_of(message)
