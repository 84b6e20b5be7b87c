"""Every kernel compiles for the GPUs that users have, within their shared memory; none of them is needed here."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# Bytes of shared memory that one program may take (CUDA programming guide, table of compute capabilities; CDNA and RDNA
# have 64 KB).
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm86": (GPUTarget("cuda", 86, 32), 101_376),
    "sm89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm100": (GPUTarget("cuda", 100, 32), 232_448),
    "sm120": (GPUTarget("cuda", 120, 32), 101_376),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 65_536),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 65_536),
    "gfx1201": (GPUTarget("hip", "gfx1201", 32), 65_536),
}
# One each of Ampere, Hopper, Blackwell, CDNA and RDNA, for further kinds of a kernel; one kind is for every target.
ONE_OF_EACH = ("sm86", "sm90", "sm100", "gfx942", "gfx1201")
INTEGERS = {"heads", "length_q", "length_k", "length", "length_index", "length_order", "n_q", "n_k", "blocks"}
INTEGERS |= {"coarse_rows", "length_extra", "n_listed"}


def every_gpu(kind, *further):
    """A kind of a kernel for every target, and further ones for one of each architecture."""
    return [*itertools.product(TARGETS, [kind]), *itertools.product(ONE_OF_EACH, further)]


def check_compiles(gpu, kernel, arguments, constants, floats=("scale",), **options):
    """Compile a jitted function: types of some arguments by name, the others by what their names say.

    A type is that of a pointer or a number, None for an argument that is not there, or a tuple of such.
    """
    signature, constexprs, attributes = {}, {}, {}

    def type_of(path, kind, aligned):
        if isinstance(kind, tuple):
            return tuple(type_of((*path, i), part, aligned) for i, part in enumerate(kind))
        if kind is None:
            constexprs[path] = None
            return "constexpr"
        if aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name] = "constexpr"
            constexprs[(place,)] = constants[name]
        elif name in arguments:
            kind = arguments[name]
            aligned = name != "delta" and (name.startswith("stride") or "*" in str(kind))
            signature[name] = type_of((place,), kind, aligned)
        elif name.startswith("stride") or name in INTEGERS:
            signature[name] = type_of((place,), "i32", name.startswith("stride"))
        else:
            assert name in floats, name
            signature[name] = "fp32"
    target, most = TARGETS[gpu]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= most
    return compiled


def check_attention_compiles(gpu, dim, kind, *, careful=False, extra=False, uneven=False, kept=False):
    """The attention kernel for a GPU; kind: the type of the tensors, or int8 for bfloat16 with int8 keys; kept: with a
    correction and packed lists."""
    from comfyui_psa.kernels.gpu.attend import _attend
    from comfyui_psa.kernels.gpu.tiles import attend_tile

    tile = attend_tile("hip" if gpu.startswith("gfx") else gpu, dim)
    half, keys = ("bf16", "i8") if kind == "int8" else (kind, kind)
    bulk = tile.bulk and not careful
    arguments = {
        "q_ptr": f"*{half}", "out_ptr": f"*{half}", "again_ptr": "*i32",
        "q8": ("*i8", "*fp32") if kind == "int8" else None,
        "fine": (f"*{keys}", f"*{half}", "*fp32" if kind == "int8" else None),
        "k_desc": f"tensordesc<{keys}[1,1,{tile.rows},{dim}]>" if bulk else None,
        "v_desc": f"tensordesc<{half}[1,1,{tile.rows},{dim}]>" if bulk else None,
        "coarse": (f"*{half}", f"*{half}"),
        "extra": (f"*{half}", f"*{half}") if extra else None,
        "lists": ("*i16" if kept else "*i32", "*i32", "*i32", "*i32" if uneven else None),
        "delta": ("*u8", "*fp32", "i32") if kept else None,
        "order": ("*i64", "*i64") if dim == 64 else None,
        "stride_extra": ("i32", "i32", "i32") if extra else None,
    }  # fmt: skip
    arguments |= {f"stride_{name}": ("i32", "i32", "i32") for name in ("q", "k", "v", "coarse", "out")}
    constants = {
        "FACTORS": (1, 8, 64), "BLOCK_Q": 128, "BLOCK_KV": 64, "TILE": tile.rows, "HEAD_DIM": dim, "DIM": dim,
        "CAREFUL": careful, "STAGES": tile.stages, "WAIT": tile.wait, "HALVES": tile.halves,
    }  # fmt: skip
    return check_compiles(gpu, _attend, arguments, constants, num_warps=tile.warps, num_stages=tile.stages)


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize(
    ("gpu", "dim", "kind"),
    [
        *itertools.product(TARGETS, [128], ["bf16"]),
        *itertools.product(ONE_OF_EACH, [64], ["bf16"]),
        # Shared memory is that of bfloat16 or less; what may fail is how an architecture multiplies these types.
        *itertools.product(ONE_OF_EACH, [128], ["int8"]),
        *itertools.product(("sm86", "sm90"), [64], ["fp16", "int8"]),
        *itertools.product(("sm86", "sm90"), [128], ["fp16"]),
    ],
)
def test_attend(gpu, dim, kind, tmp_path):
    compiled = check_attention_compiles(gpu, dim, kind)
    if gpu == "sm90":
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
        # Two programs at a time need less than half of it each.
        assert compiled.metadata.shared <= TARGETS[gpu][1] // 2
        # Queries of eight bits are read from shared memory; from registers, the loops would spill.
        assert not re.search(r"warp_group_dot .* : tensor<\d+x\d+xi8, ", compiled.asm["ttgir"])
        assert "wgmma.mma_async instructions are serialized" not in assembler_notes(compiled.asm["ptx"], tmp_path)


@pytest.mark.parametrize("more", [{"careful": True}, {"extra": True}, {"uneven": True}, {"kept": True}], ids=str)
def test_attend_with(more):
    check_attention_compiles("sm86", 64, "fp16", **more)


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("gpu", ONE_OF_EACH)
def test_attend_with_a_correction(gpu, dim):
    check_attention_compiles(gpu, dim, "bf16", kept=True)


def test_the_attention_kernel_has_no_more_than_35_parameters():
    from comfyui_psa.kernels.gpu.attend import _attend

    assert len(_attend.params) <= 35


def assembler_notes(ptx, folder):
    """What ptxas reports about a kernel, for example that products run in sequence (notes C7514, C7515 and more)."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", path, "-o", folder / "kernel.cubin"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def check_pooling_compiles(gpu, kind):
    """The pooling kernel for a GPU; kind: keys and values at once, or keys in eight bits alone."""
    from comfyui_psa.kernels.gpu.pyramid import _pool

    strides, int8 = ("i32", "i32", "i32"), kind == "int8 keys"
    arguments = {
        "x_ptr": "*fp16", "y_ptr": None if int8 else "*fp16", "index_ptr": "*i64", "coarse_ptr": "*fp16",
        "mean_ptr": "*fp32" if int8 else None, "scales_ptr": "*fp32" if int8 else None,
        "fine_ptr": "*i8" if int8 else "*fp16", "stride_x": strides, "stride_y": None if int8 else strides,
    }  # fmt: skip
    constants = {"FACTORS": (1, 2, 8, 64), "LEVELS": 4, "BLOCK": 64, "BLOCKS": 2, "HEAD_DIM": 128, "DIM": 128}
    return check_compiles(gpu, _pool, arguments, constants, num_warps=4)


@pytest.mark.parametrize(("gpu", "kind"), every_gpu("keys and values", "int8 keys"))
def test_pool(gpu, kind):
    compiled = check_pooling_compiles(gpu, kind)
    if gpu == "sm90":
        # Which tensor a program reads is known late; its rows must still be read 16 bytes at a time.
        reads = re.findall(r"ld\.global\S*\.(v4\.b32|b16) ", compiled.asm["ptx"])
        assert "v4.b32" in reads
        assert "b16" not in reads


@pytest.mark.parametrize("gpu", TARGETS)
def test_queries_of_eight_bits(gpu):
    from comfyui_psa.kernels.gpu.int8 import _quantise

    pointers = {"x_ptr": "*bf16", "index_ptr": "*i64", "out_ptr": "*i8", "scales_ptr": "*fp32"}
    check_compiles(gpu, _quantise, pointers, {"BLOCK": 128, "HEAD_DIM": 128, "DIM": 128, "ORDERED": True}, num_warps=4)


@pytest.mark.parametrize(("gpu", "kind"), every_gpu("plain", "with a correction"))
def test_order(gpu, kind):
    from comfyui_psa.kernels.gpu.order import _move

    pointers = {"x_ptr": "*bf16", "index_ptr": "*i64", "out_ptr": "*bf16"}
    pointers["delta"] = ("*u8", "*fp32", "i32") if kind == "with a correction" else None
    check_compiles(gpu, _move, pointers, {"UNDO": True, "ROWS": 64, "HEAD_DIM": 128, "DIM": 128}, num_warps=4)


@pytest.mark.parametrize(("gpu", "kind"), every_gpu((128, True), (128, False), (256, True)))
def test_importance(gpu, kind):
    from comfyui_psa.kernels.gpu.importance import _reduce
    from comfyui_psa.kernels.gpu.tiles import importance_stages

    dim, mean = kind
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "norm_ptr": "*bf16", "scores_ptr": "*fp32"}
    constants = {
        "GROUP_Q": 8, "BLOCK_Q": 128, "COUNT_Q": 16, "PADDED_Q": 16, "GROUP_K": 8, "BLOCK_K": 64, "COUNT_K": 8,
        "PADDED_K": 8, "GROUP_N": 32, "COUNT_N": 2, "PADDED_N": 2, "ROWS": 128, "TILE": 64, "HEAD_DIM": dim, "DIM": dim,
        "MEAN": mean, "WEIGHTS": triton.language.bfloat16,
    }  # fmt: skip
    stages = importance_stages("hip" if gpu.startswith("gfx") else gpu, dim)
    if dim == 256 and gpu.startswith("gfx"):
        pytest.skip("heads of 256 do not fit the shared memory there; such models stay dense")
    check_compiles(gpu, _reduce, pointers, constants, num_warps=8, num_stages=stages)


@pytest.mark.parametrize(("gpu", "mode"), every_gpu("topk", "budget"))
def test_levels(gpu, mode):
    from comfyui_psa.kernels.gpu.levels import _choose

    rule = 1 if mode == "budget" else 0
    pointers = {"scores_ptr": "*fp32", "cap_ptr": "*i16", "scale_ptr": "*fp32", "blocks_ptr": "*i32"}
    pointers |= {
        "ends_ptr": "*i32",
        "density_ptr": "*fp32",
        "unranked_ptr": "*i32",
        "best_ptr": "*i32",
        "cuts": ("fp32", "fp32", "fp32"),
    }
    constants = {
        "FACTORS": (1, 2, 8), "LEVELS": 3, "STORED": (1, 2, 8, 64), "STORED_LEVELS": 4, "DROPPED": 64, "RULE": rule,
        "SCALED": rule == 1, "FLOOR": 1e-6 * rule, "CAPPED": rule == 1, "BLOCK_KV": 64, "WIDTH": 1024,
    }  # fmt: skip
    check_compiles(gpu, _choose, pointers, constants, num_warps=1)


def test_the_sequence_length_is_no_compile_time_constant():
    """Triton would compile again for lengths that are 1 or even; the official kernel does so for every resolution."""
    from comfyui_psa.kernels.gpu import attend as attend_triton
    from comfyui_psa.kernels.gpu import importance as importance_triton
    from comfyui_psa.kernels.gpu import int8 as int8_triton
    from comfyui_psa.kernels.gpu import levels as levels_triton
    from comfyui_psa.kernels.gpu import order as order_triton
    from comfyui_psa.kernels.gpu import pyramid as pyramid_triton

    kernels = (attend_triton._attend, importance_triton._reduce, levels_triton._choose, order_triton._move)
    for kernel in (*kernels, pyramid_triton._pool, int8_triton._quantise):
        lengths = [p for p in kernel.params if p.name in INTEGERS]
        assert lengths
        assert all(p.do_not_specialize and not p.is_constexpr for p in lengths), kernel


@pytest.mark.parametrize(
    ("capability", "declined"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((12, 0), False)]
)
def test_older_gpus_are_declined_with_the_reason(monkeypatch, capability, declined):
    """Turing has no bfloat16 and no asynchronous copies; the user's own attention computes there."""
    import torch

    from comfyui_psa.kernels.backends import BackendError, choose_backend

    class Tensor:
        is_cuda, dtype, shape, device = True, torch.float16, (1, 2, 300, 128), torch.device("cuda", 0)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for backend in ("auto", "triton"):
        if declined:
            with pytest.raises(BackendError, match=r"needs an NVIDIA GPU of compute capability 8\.0 or newer"):
                choose_backend(backend, Tensor())
        else:
            assert choose_backend(backend, Tensor()) == "triton"
