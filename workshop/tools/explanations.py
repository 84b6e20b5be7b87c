"""What each log line and each reason of the product means and what to do, for `docs/troubleshooting.md`. Errors are not
here: they say themselves what is allowed and what to do.

A section is a title and blocks of lines, with an empty line between: the key, a part of the message that never changes,
then what it means and, after `->`, what to do. Without `->` there is nothing to do.
"""

from __future__ import annotations

import dataclasses
import re

_TEXT = """
# When PSA Patch runs

levels as written / sparsity
  The settings in words: what was set, in which part of the schedule, and the preset behind it.

the model stays dense
  PSA does not support this model. It samples as if PSA Patch were not there. The reason follows, see below. ->
  Choose a supported model, or leave the node where it is.

sparsity is 0
  The slider is at 0, so the node passes on the model unchanged. -> Raise sparsity to use PSA.

the levels are used as written
  PSA Pyramid has as_written on, or the preset is in threshold mode, so nothing is scaled to the slider. -> Turn
  as_written off, or set mode to topk, if the slider should count.

start_percent has no effect
  The preset has its own number of dense steps, as the one for 4-step LoRAs does. -> Choose another preset if
  start_percent should count.

the attention override that was there before
  Another node, such as a Sage Attention patch, set its own attention first. It computes the dense steps.

is replaced by PSA Patch
  Two PSA Patches follow each other on one model. The last one counts. -> Remove the one that you do not need.

has no input
  The workflow sets an input that the node does not have: an old or newer version, or a typo. -> Rename or remove
  the input in the workflow. The run goes on without it.

so far; this model is
  The model belongs to another family. -> Connect a model of a family that the line names, or try the preset generic.

this Wan model is autoregressive
  Causal Wan models attend to a cache, frame by frame, and PSA needs the whole video. -> Use an ordinary Wan model.
  This one runs as before, dense.

this Wan model is Animate 2
  Animate 2 has no attention of the whole video at once: every frame attends to the video and to one frame of the pose
  video. -> Use Animate (Wan 2.2) with PSA. Animate 2 runs as before, dense.

PSA supports the Wan variants
  ComfyUI knows a Wan variant that PSA does not know yet. -> Update the pack, or report the variant.

PSA supports CogVideoX 1.0 and 1.5
  The checkpoint cuts time into patches of another size than these two versions. -> Use CogVideoX 1.0 or 1.5.

this model makes images or sound
  Its latents have no time axis, and PSA pays for long videos only. -> Leave PSA Patch out, or connect a video model.

HunyuanImage, which makes images
  HunyuanImage shares its network with HunyuanVideo, but it makes images. -> Connect HunyuanVideo to use PSA.

nobody has tried PSA on this model
  With the preset generic, PSA takes a video model that it does not know for a plain grid of tokens. -> Compare a video
  with the dense one. If it looks right, please report the model, so that it gets a family of its own.

does not say what PSA needs to know
  The preset generic reads the size of patches and the blocks from the model's network, and did not find them. -> Set
  preset to auto. The model stays dense.

# Staying dense

so this model is no plain grid
  With the preset generic, PSA assumed that the video is all that self-attention sees. On this model it is not. -> Set
  preset to auto. The model stays dense.

a single image is sampled
  With the preset generic, PSA leaves single frames alone: it pays for long videos only. -> Sample more frames.

PSA cannot read the inputs of this model call
  An input has a shape that PSA does not expect: from a node that changes it, or from a newer ComfyUI. -> Bypass that
  node, update the pack, or report it with the error, which ComfyUI shows when it is started with --verbose DEBUG.

this Kandinsky 5 has sparse attention of its own
  diffusers computes these models, which make longer videos, with sparse attention that belongs to their weights. ->
  Load one with regular attention, such as those for 5 seconds, or go on without PSA.

the prompts in one call of the model have different lengths
  diffusers' HunyuanVideo 1.5 is given several prompts at once, and a mask hides the padding of each. -> Call the
  transformer once for each prompt, as diffusers' pipeline does.

this prompt is padded
  A text encoder has filled the prompt up to a fixed length, and the model must not see the filling. PSA has no masks.
  -> Encode the prompt with ComfyUI's own text node. It does not pad.

guides with a strength other than 1
  LTX weakens a guide by a mask over all tokens, and PSA has no masks. -> In all LTXVAddGuide nodes, set strength to 1
  and unplug attention_mask.

the guides do not cover whole frames
  PSA finds the video by the frames that guides add after it, and these do not add up. -> Sample without guides, or
  report the node that made them.

on another part of the video than ComfyUI packed
  MiniMax H3 packs text, sound and video once per run; a node samples the video in windows. -> Sample it at once.

are fewer than min_tokens
  The video is so short or small that normal attention is usually faster. -> Nothing, or lower min_tokens to try.

something else has added some
  The sequence is longer than the model's own tokens, so PSA cannot tell where the video is. -> Bypass the node that
  adds tokens.

the video and the conditioning both have
  Self-attention and cross-attention have the same size here, and PSA must not touch the second. -> Change the
  length or the size a little.

are fewer than two query blocks
  There is too little video for blocks. -> Sample a longer or larger video, or lower block_q.

PSA does not support q, k, v of type
  The attention runs in a type with fewer than 16 bits, or in whole numbers. -> Load the model in bf16 or fp16. fp8
  weights are fine: they are computed in 16 bits.

is listed in dense_blocks
  You asked for this block to stay dense. -> Take it out of dense_blocks if that was not the plan.

all blocks are listed in dense_blocks
  Every block was asked to stay dense, so nothing was sparse. -> List fewer blocks.

the attention call has a mask
  PSA does not compute attention with a mask. -> Bypass the node that sets the mask, such as one for masked prompts
  within one call.

is not possible with
  A setting cannot be met with so few tokens. -> Change it as the line says.

is out of reach for
  A short video has few blocks, so only some sparsities are possible; at least one block per row is seen in full. ->
  Move the slider to the value in the line, or sample a longer or larger video.

# After a run

… s each][, … corrected (…)][; …]
  The run in one line: how many steps were sparse, their mean sparsity, the backend, the seconds of sparse and of
  dense steps, how many calls had the correction, and how many times as fast a sparse step was, if the run can tell.

most calls of the sparse steps stayed dense
  Sparse steps were hardly faster because most of their calls were dense. -> See the reasons in the log or in PSA
  Report.

the model does not fit the GPU
  Sparse steps were hardly faster because weights are moved to the GPU in every step. -> Free GPU memory, or load a
  smaller file of the model (fp8, GGUF).

by plain torch, which saves little
  Without Triton, PSA computes with torch, which is meant for trying it on a CPU. -> Use a GPU with Triton, and the
  model in bf16 or fp16.

tokens are so few that dense attention
  Short sequences leave little to save, and preparing a sparse call takes time too. -> Sample a longer or larger video,
  or put min_tokens back.

everything but self-attention takes
  Other layers take most of a step here, and PSA leaves them as they are. -> Sample a longer or larger video, where
  attention weighs more.

the attention kernel was not tuned
  The built-in kernel shape is used, which may be slow on this GPU. -> Start without `PSA_AUTOTUNE=0`, or see in the
  log why tuning failed. On AMD GPUs there is no tuning yet.

sparse attention took about as long
  Nothing else explains it: this setting saves no time on this GPU. -> Raise sparsity, or set order to raster.

no step is between start_percent and end_percent
  PSA's part of the schedule had no step. -> Lower start_percent, raise end_percent, or sample more steps.

no call of the model reached PSA
  A cache or a compiled model answered every step. -> Bypass that node to use PSA.

a cache answered all
  A cache such as EasyCache skipped every step in which PSA was active. -> Lower the cache's threshold, or lower
  start_percent.

a node has put its own attention in front
  Another attention override was set after PSA Patch and computes everything. -> Put PSA Patch after that node.
  Bypass Model Sparse Attention, which always goes first.

a node has replaced the model's own forward
  TeaCache, MagCache and some Sage packs replace the model's code, and attention no longer passes PSA. -> Bypass
  that node. ComfyUI's own EasyCache works with PSA.

PSA never saw
  Some blocks are computed or compiled separately, or skipped. -> Bypass the node that does it, if these blocks
  should be sparse.

pairs of blocks was not a finite number
  The model's own numbers are infinite or NaN in places. PSA ranked those blocks last. -> Run the model in bf16, or
  download its file again.

the figures of this run were lost
  An error came up while the figures were collected. The video is not affected. -> Run again. Report it if it
  happens every time.

sparse and … dense self-attention calls
  One line per step, because verbose is on. -> Turn verbose off to silence it.

calibrated: sparsity
  What PSA Calibrate proposes, and whether it meets the target. -> Set the slider to it, or choose the saved preset.

# The correction and memory

correction: …, about
  Which size of the correction fits, how much memory it takes and where: GPU memory or the computer's own. -> Set
  correction to a smaller size, or off, to save the memory.

no correction: it needs
  Even the smallest allowed size does not fit. The run goes on without a correction. -> Close other programs, set
  correction to eighth, or sample a shorter or smaller video.

no correction from here on
  The correction failed or no longer fits in the middle of a run, for the reason given. The run goes on without it. ->
  If memory is named, set correction to eighth. Otherwise report the line.

the correction ends here: a hook has changed the strength of a LoRA
  The correction was measured with other weights and would make the video worse, so the run goes on without it. ->
  Change the strength in the dense steps only, or leave it.

the run goes on without it
  Follows the reason why there is no correction, if that is an error: sparse steps of this run get nothing back, and the
  next run tries it again. -> Report it if it happens every time.

a part of the calls is not corrected
  Memory filled up while the correction was measured. Calls without one are sparse as usual. -> Set correction to a
  smaller size, or sample a shorter or smaller video.

no correction with the order
  Orders that follow the data make other blocks in every step, so nothing can be carried over. -> Set order to
  curve, or accept the run without a correction.

out of memory; continuing with
  The GPU's memory was full. PSA now computes half as many heads at a time, a little slower. -> Nothing, or free GPU
  memory.

PSA ran out of memory
  There was no room even for one head at a time, so calls of this size stay dense for the run. -> Free GPU memory,
  set correction to off, or sample a shorter or smaller video.

# The GPU kernels

PSA tunes its attention kernel
  The first sparse call on this GPU looks for the fastest kernel, once. -> Wait up to 20 s. `PSA_AUTOTUNE=0` in the
  environment skips it.

times as fast with int8 keys
  While tuning, PSA also measured keys of eight bits, and they are faster on this GPU. -> Nothing: auto stays at 16
  bits. Set precision to int8 if its small error does not matter to you.

PSA could not tune
  The search failed for the reason given. The built-in kernel is used. -> Nothing. Free GPU memory if the reason is
  memory.

the kernels failed on this machine
  A kernel did not compile or stopped. The error's own words are in brackets. -> Update Triton and the GPU's driver.
  Report it if it fails every time.

this size stays dense for the rest of the run
  Follows the reason in front: calls of this size are not tried again in this run. -> Mend the reason in front of it.

the kernels compute wrong results
  The first sparse call of every kind on this machine is compared with exact attention, and this one was wrong. So that
  no picture shows it, calls stay dense, also in later runs. -> Update the GPU's driver and Triton. Report it if it
  stays.

is missing or broken
  A library that the kernels need cannot be loaded. -> Install it. On Windows, Triton is the package triton-windows.

…; set backend to auto
  backend is set to triton, and Triton cannot compute here for the reason in front. -> Set backend to auto, or
  install Triton.

the package triton is not installed
  There is a GPU but no Triton for it. -> `pip install triton`, on Windows `pip install triton-windows`, in
  ComfyUI's Python.

the Triton kernel computes float16, bfloat16 and float32
  The model runs in another type. -> Load it in bf16 or fp16.

the Triton kernel supports head sizes
  The model's heads are larger than the kernel allows. -> Nothing: this model stays dense.

on a GPU the Triton kernels compute float16 and bfloat16
  The model runs in float32, where the kernels would not pay. -> Load it in bf16 or fp16, or start ComfyUI without
  --force-fp32.

compute capability 8.0
  The GPU is older than the RTX 30 series. -> Nothing: it keeps its normal attention.

the Triton kernel needs a GPU
  backend is set to triton, and the model runs on something else. -> Set backend to auto.

precision int8 needs the Triton backend
  8-bit keys exist only in the GPU kernels. -> Set precision to auto.

the torch backend is meant for CPUs
  Follows one of the reasons above: the other backend would be slower than normal attention. -> Mend the reason in
  front of it.

# Models, LoRAs and presets

tensors are not part of CogVideoX
  The file holds more than the model. The rest is not used. -> Nothing, if the video is right.

the CogVideoX model is corrected already
  PSA CogVideoX Fix is there twice.

noise schedule with SNR shift
  Which CogVideoX it is, and what the loader corrected.

this CogVideoX model has ComfyUI's own positions
  It came from another loader, which does not set it up as in training. -> Put PSA CogVideoX Fix after that loader.

it is computed in float16, but was trained in bf16
  Numbers of this model do not fit into float16. -> Take the bf16 file, or start ComfyUI with --bf16-unet.

the start image is not used
  A start image is connected to a model that makes videos from text. -> Load an I2V model.

starts from an image and got none
  An I2V model runs without a start image. -> Add PSA CogVideoX Image To Video.

ComfyUI stretches it, and it blurs
  The start image and the video have different sizes. -> Set the same width and height in both.

says …: …; allowed
  A config file next to the model holds a value that no CogVideoX has. -> Download that file again.

its scheduler config says
  The scheduler's file belongs to another model. -> Download the scheduler folder again.

weights of the model patched, strength
  What PSA LoRA Loader did. What it could not use follows, in one of the ways below.

replaced as a whole, whatever the strength
  The file sets these weights instead of adding to them, so strength does not scale them.

of … keys …, for example
  How many of the file's keys were not used, why, and three of them. -> See the reasons below.

match nothing in the model
  These keys have names that this model does not have. -> If there are many, the LoRA is for another model.

were left out for their size
  These weights have another size than the model's. -> Choose a LoRA for this size of the model.

ComfyUI cannot use them there
  These keys are parts of a weight for which ComfyUI has no use in this form. -> Nothing, or take another file of
  the LoRA.

the same part of the weight under another name
  The file has the same thing twice, under two names.

belong to another adapter in the file
  The file holds several adapters. One was used. -> Save the other one as a file of its own.

are for the low-noise expert and were left out
  The file holds a LoRA for both experts of Wan 2.2. -> Save the second one as a separate file and load it onto the
  low-noise model.

it is for the low-noise expert of Wan 2.2
  The names in the file say so. -> Wire this LoRA to the low-noise model.

the pyramid is saved as
  PSA Pyramid wrote the preset that save_as named.

# In diffusers

PSA does not know the arguments
  The transformer was called in a way that PSA cannot read. -> Call it as diffusers' pipelines do.

LocalAttention stays dense from here on
  A call of another engine failed or has a mask, as the reason says. -> Choose another backend or preset, or a model
  without a mask.

fallbacks say why, and what to do
  The attention of some blocks is computed in a way that PSA cannot see. -> Look up the reason, which is counted in
  fallbacks.

: a cache, a hook or a guidance skips it
  Some blocks had no attention in the whole run. -> Nothing, if a cache or a guidance is meant to skip them; otherwise
  remove it.

ring attention shows each call
  With ring attention, a call never has all keys of the video. -> Use ulysses_degree instead of ring_degree.

no scheduler is known
  Without steps PSA cannot tell when the warm-up is over. -> Call the transformer through its pipeline, or use
  warm_up=0 on the bare transformer.

no self-attention of the model reached PSA
  A cache answered, or the model's forward was replaced after apply_psa. -> Call apply_psa again, last.

tokens, but … are expected of this model
  The call has another length than the model's own video and text. -> Remove what adds tokens.

does not go through torch's scaled_dot_product_attention
  The attention backend, a processor of your own or a replacement of torch's function computes attention where PSA
  cannot see it. -> pipe.transformer.set_attention_backend('native'), or remove the processor or the replacement.

gradients are asked for
  PSA computes no gradients, so calls that need them stay dense. Training works, without PSA's speed. -> For
  inference, call the model under torch.no_grad().

until apply_psa is called again
  A call failed for the reason in front, and calls like it are not tried again. -> Mend the reason, then call
  apply_psa again.
"""

NOTHING = "Nothing."


@dataclasses.dataclass(frozen=True)
class Explanation:
    """About the messages that contain `key`, a part of them that never changes.

    Attributes:
        section: one of `SECTIONS`. means, do: sentences.
    """

    section: str
    key: str
    means: str
    do: str = NOTHING


def _read(text: str) -> tuple[Explanation, ...]:
    found = []
    for part in re.split(r"^# ", text, flags=re.MULTILINE)[1:]:
        section, *blocks = part.strip().split("\n\n")
        for block in blocks:
            key, *lines = block.split("\n")
            means, _, do = " ".join(line.strip() for line in lines).partition(" -> ")
            found.append(Explanation(section, key, means, do or NOTHING))
    return tuple(found)


EXPLANATIONS = _read(_TEXT)
SECTIONS = tuple(dict.fromkeys(one.section for one in EXPLANATIONS))
