"""`dev.py fuzz` and `dev.py soak`, a short one of each, on the server that the other tests use."""

import pytest

from comfyui_psa.workshop.tools.fuzz import OUR_ERROR, fuzz, verdict
from comfyui_psa.workshop.tools.fuzz_files import corpus
from comfyui_psa.workshop.tools.soak import ALLOWED_MB, soak


@pytest.mark.slow
def test_hostile_inputs_end_in_words(server, client):
    said = []
    assert fuzz(server, client, 250, seed=7, say=said.append) == 0, "\n".join(said)
    assert said[-1] == "250 cases, 0 failures"
    server.check_alive()


def test_what_counts_as_the_packs_own_words():
    assert OUR_ERROR.search("Node 1 (PSAPatch) failed: PSA Patch, input pyramid: 'x' was given; allowed: ...")
    assert OUR_ERROR.search("Node 1 (PSALoraLoader) failed: PSA LoRA Loader, input lora_name: ...")
    assert not OUR_ERROR.search("Node 1 (PSAPatch) failed: 'NoneType' object has no attribute 'model'")
    assert not OUR_ERROR.search("Node 1 (KSampler) failed: PSA")


@pytest.mark.parametrize(
    ("message", "counts"),
    [
        ("Node 1 (PSAPatch) failed: PSA Patch, input pyramid: 'x' was given; allowed: ...", "ours"),
        ("Node 1 (PSACogVideoXLoader) failed: Error while deserializing header", "failure"),
        ("ComfyUI refused the prompt: no reason given", "failure"),
        ("ComfyUI refused the prompt: node 1 (PSAPatch): Value not in list (preset: 'x' not in [])", "refused"),
        (
            "ComfyUI refused the prompt: node 1 (PSACogVideoXLoader): Custom validation failed for node "
            "(checkpoint - PSA CogVideoX Loader, input checkpoint: 'x' was given; allowed: ...)",
            "refused",
        ),
        (
            "ComfyUI refused the prompt: node 1 (X): Custom validation failed for node (checkpoint - KeyError)",
            "failure",
        ),
        ("ComfyUI refused the prompt: node 1 (X): Exception when validating node (maximum recursion)", "failure"),
    ],
)
def test_what_an_error_counts_as(message, counts):
    assert verdict(message) == counts


def test_the_files_are_the_same_for_a_seed_and_gone_afterwards(tmp_path):
    def everything():
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with corpus(tmp_path, 1):
        first = everything()
    assert not everything()
    with corpus(tmp_path, 1):
        assert everything() == first
    assert len(first) > 500


@pytest.mark.slow
def test_prompts_in_a_row_leave_memory_where_it_was(server, client):
    said = []
    before, after = soak(server, client, 5, said.append)
    assert after - before <= ALLOWED_MB, "\n".join(said)
    assert said[-1].startswith("5 prompts, ")
