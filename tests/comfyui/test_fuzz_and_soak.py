"""`dev.py fuzz` and `dev.py soak`, a short one of each, on the server that the other tests use."""

import pytest

from comfyui_psa.devtools.fuzz import OUR_WORDS, fuzz
from comfyui_psa.devtools.soak import ALLOWED_MB, soak


@pytest.mark.slow
def test_hostile_inputs_end_in_words(server, client):
    said = []
    assert fuzz(server, client, 250, seed=7, say=said.append) == 0, "\n".join(said)
    assert said[-1] == "250 cases, 0 failures"
    server.check_alive()


def test_what_counts_as_the_packs_own_words():
    assert OUR_WORDS.search("Node 1 (PSAPatch) failed: PSA Patch, input pyramid: 'x' was given; allowed: ...")
    assert OUR_WORDS.search("Node 1 (PSALoraLoader) failed: PSA LoRA Loader, input lora_name: ...")
    assert not OUR_WORDS.search("Node 1 (PSAPatch) failed: 'NoneType' object has no attribute 'model'")
    assert not OUR_WORDS.search("Node 1 (KSampler) failed: PSA")


@pytest.mark.slow
def test_prompts_in_a_row_leave_memory_where_it_was(server, client):
    said = []
    before, after = soak(server, client, 5, said.append)
    assert after - before <= ALLOWED_MB, "\n".join(said)
    assert said[-1].startswith("5 prompts, ")
