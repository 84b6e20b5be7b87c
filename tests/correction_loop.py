"""Whole runs with a correction as a loop that was written from its description alone. Imported by a fixture."""

import dataclasses

import torch

from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.order import TokenLayout, make_order
from comfyui_psa.patching import core
from comfyui_psa.patching.patch import KEY, patch_model

BLOCKS = 2


def is_renewed(step, block, renew):
    """Blocks take turns: in sparse step 1 of 8 it is block 7's, in step 7 block 1's, in step 8 block 0's."""
    return bool(renew) and (step + block) % renew == 0


class Loop:
    """Dense, sparse and corrected attention of a whole run, as an attention override on a stock model.

    It knows the noise levels beforehand, keeps everything for every row in dictionaries, and asks the kernels
    for nothing but the sparse attention of one row.
    """

    def __init__(
        self, model, patch, *, sigmas, renew=0, keep=True, group=1, gamma=0.95, grids=None, known=None, again=None
    ):
        """grids: number of tokens -> grid. known: what a row is known by again, by default all that there is.
        again: (percent, renew, keep), from where on it is as if the run had begun there, with other prompts or weights.
        """
        psa = patch_model(model, **patch)
        config = self.slider = psa.get_attachment(KEY).settings.config
        bounds = model.get_model_object("model_sampling").percent_to_sigma
        start, end = bounds(patch["start_percent"]), bounds(patch["end_percent"])
        self.sigmas = [float(sigma) for sigma in sigmas[:-1]]
        self.active = [end * 1.00001 < sigma <= start * 1.00001 for sigma in self.sigmas]
        sparse = [step for step, active in enumerate(self.active) if active]
        self.first = sparse[0]
        self.learning = self.first - 1 if self.first else self.first
        self.learns = self.first > 0 or len(sparse) >= 3
        self.number = {step: number for number, step in enumerate(sparse, 1)}
        self.renew, self.keep, self.group, self.gamma = renew, keep, group, gamma
        later = [step for step in sparse if step != self.learning]
        # Renewed calls are dense, and what they cost is taken from the others.
        self.config = dataclasses.replace(config, sparsity=config.sparsity + self.turns(later) / max(1, len(later)))
        self.again = None
        if again is not None:
            percent, *self.after = again
            self.again = next(step for step in sparse if self.sigmas[step] <= bounds(percent) * 1.00001)
            self.rest = [step for step in sparse if step > self.again]
        self.grids, self.known = grids or {768: (3, 16, 16)}, known or (lambda *row: row)
        self.lists, self.delta = {}, {}
        self.corrected = [0] * len(self.sigmas)

    def turns(self, steps):
        """How many dense steps the renewals in these make together."""
        return (
            sum(is_renewed(self.number[step], block, self.renew) for step in steps for block in range(BLOCKS)) / BLOCKS
        )

    def begin_again(self):
        """The steps that are left pay for a dense one."""
        self.renew, self.keep = self.after
        share = (1 + self.turns(self.rest)) / (1 + len(self.rest))
        self.config = dataclasses.replace(self.slider, sparsity=self.slider.sparsity + share)
        self.learning, self.again = self.again, None

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        dense = func(q, k, v, heads, *args, **kwargs)
        if q.shape != k.shape:
            return dense
        options = kwargs["transformer_options"]
        sigma, block = float(options["sigmas"][0]), options["block_index"]
        step = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma))
        if step == self.again:
            self.begin_again()
        videos = len(q) // len(options["uuids"])
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        without = str(sorted(options.get("patches_replace", {}).get("dit", ())))
        rows = [
            self.known(uuid, video, window, q.shape[1], without) for uuid in options["uuids"] for video in range(videos)
        ]
        outputs = []
        for row, place in enumerate(rows):
            one = [x[row].unflatten(1, (heads, -1)).transpose(0, 1)[None] for x in (q, k, v)]
            full = dense[row].unflatten(1, (heads, -1)).transpose(0, 1)[None]
            outputs.append(self.row(step, (block, place), *one, full).transpose(1, 2).flatten(2))
        return torch.cat(outputs)

    def row(self, step, place, q, k, v, dense):
        learning = self.learns and step == self.learning
        if not self.active[step] and not learning:
            return dense
        is_turn = self.learns and self.active[step] and is_renewed(self.number[step], place[0], self.renew)
        if learning or is_turn:
            result = self.sparse(q, k, v, None)
            self.lists[place], self.delta[place] = result.lists, self.lost(dense - result.output)
            return dense
        result = self.sparse(q, k, v, self.lists.get(place) if self.keep else None)
        if place not in self.delta:
            return result.output
        self.corrected[step] += 1
        return result.output + self.gamma * self.delta[place]

    def sparse(self, q, k, v, lists):
        layout = TokenLayout(self.grids[q.shape[2]])
        return pyramid_sparse_attention(q, k, v, self.config, layout=layout, backend="torch", lists=lists)

    def lost(self, lost):
        """What is left of it in eight bits: one row for every `group` tokens that are neighbours on the curve."""
        order = make_order(self.config.order, self.grids[lost.shape[2]], self.config.tile).index
        rows = lost[:, :, order].unflatten(2, (-1, self.group)).mean(3)
        scale = rows.abs().amax(-1, keepdim=True) / 448
        rows = (rows / scale).to(torch.float8_e4m3fn).float() * scale
        back = torch.empty_like(lost)
        back[:, :, order] = rows.repeat_interleave(self.group, 2)
        return back


def schedule_of(sample, model, **arguments):
    """The noise levels of a run, steps + 1."""
    found = []

    def look(network, x, context, options, conds):
        found.append(options["sample_sigmas"].tolist())

    watched = model.clone()
    core.add_wrappers(watched, "psa_test", before_call=look)
    sample(watched, **arguments)
    return found[0]


def looped(model, sample, patch, arguments, **settings):
    """The latents of a run with the loop, and the loop."""
    loop = Loop(model, patch, sigmas=schedule_of(sample, model, **arguments), **settings)
    clone = model.clone()
    core.set_override(clone, loop)
    return sample(clone, **arguments), loop
