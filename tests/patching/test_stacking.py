"""PSA together with other nodes: the table in docs/compatibility.md. Every row names the tests of the files beside this
one that prove it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STACKING = {
    ("attention override set before (Sage and others)", "it computes what PSA leaves dense"): (
        "test_an_earlier_override_gets_what_psa_declines",
        "test_no_growth_over_100_steps",
    ),
    ("later override that asks the earlier one", "both act"): ("test_a_later_override_that_chains_keeps_psa",),
    ("later override that replaces the earlier one", "it acts, PSA logs it"): (
        "test_a_later_override_that_replaces_is_named",
    ),
    ("core's Model Attention Backend before PSA Patch (stand-in)", "it computes what PSA leaves dense"): (
        "test_the_backend_of_the_core",
    ),
    ("core's Model Attention Backend after PSA Patch (stand-in)", "it acts, PSA logs it"): (
        "test_the_backend_of_the_core",
    ),
    (
        "core's Model Sparse Attention, before or after (stand-in)",
        "it acts in its part of the schedule, PSA in the rest; if nothing is left, PSA logs it",
    ): ("test_the_sparse_node_of_the_core", "test_a_sparse_node_that_does_not_move_to_the_front"),
    ("EasyCache, LazyCache", "both act, in either order"): ("test_easy_cache",),
    ("context windows", "sparse in every window"): ("test_context_windows",),
    ("TorchCompileModel, before or after", "in the graph; on, bypassed, on again are right"): (
        "test_compile_on_bypassed_on",
    ),
    ("packs that compile block by block", "in the graph of every block"): ("test_single_blocks_compiled",),
    ("LoRA stacks", "before or after, the same"): ("test_loras",),
    ("LoRA hooks, masked prompts", "sparse"): ("test_hooks_and_masks",),
    ("CFG, batched or split", "sparse"): ("test_guidance_batched_and_split",),
    ("several videos in one batch", "sparse"): ("test_batches",),
    ("fp8 weights", "sparse"): ("test_fp8_weights",),
    ("weights in main memory (low VRAM), LoRAs too", "sparse"): ("test_weights_that_stay_in_main_memory",),
    ("GGUF weights (stand-in)", "sparse"): ("test_packed_weights_and_a_patcher_of_their_own",),
    ("several PSA Patches in one graph", "each with its own settings; on one model the last"): (
        "test_several_patches_in_one_graph",
        "test_a_patch_before_another_node_leaves_the_calls_to_the_latest",
    ),
    ("two models at once", "kept apart"): ("test_two_models_at_once", "test_two_clones_in_two_threads"),
    ("MultiGPU CFG Split (the CPU as two devices)", "sparse on every GPU, before or after"): (
        "test_two_gpus",
        "test_a_failure_on_one_of_two_gpus_is_its_own",
    ),
    (
        "Dual Model CFG Guider",
        "PSA Patch on `model` acts on both models; on `model_negative` alone it is never asked",
    ): ("test_two_models_of_one_guider",),
}


def test_the_page_has_this_table():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    section = re.search(r"^## Together with other nodes\n(.*?)^## ", text, re.M | re.S)[1]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "|" in line]
    assert rows[2:] == list(STACKING)
    files = [file for file in Path(__file__).parent.glob("test_stacking*.py") if not file.stem.endswith("_gpu")]
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M)}
    assert {name for names in STACKING.values() for name in names} <= written
