"""Kernels that compute something else than they should, for the tests of what notices it. Needs Triton."""

import dataclasses

from comfyui_psa.kernels.gpu.backend import (
    attend_triton,
    build_pyramid_triton,
    choose_lists_triton,
    pool_triton,
    reduced_softmax_triton,
)
from comfyui_psa.kernels.order import TokenOrder


def no_correction(q, *arguments, delta=None, **more):
    """Forgets what is to be added."""
    return attend_triton(q, *arguments, **more)


def louder(q, pyramid, lists, block_q, scale, extra_k, extra_v, out, **more):
    attend_triton(q, pyramid, lists, block_q, scale, extra_k, extra_v, out, **more)
    out *= 1.1


def no_text(q, pyramid, lists, block_q, scale, extra_k, extra_v, out, **more):
    attend_triton(q, pyramid, lists, block_q, scale, None, None, out, **more)


def flat_pyramid(k, v, *arguments, **more):
    pyramid = build_pyramid_triton(k, v, *arguments, **more)
    for factor in pyramid.values:
        if factor > 1:
            pyramid.values[factor].zero_()
    return pyramid


def doubled_lists(*arguments):
    lists = choose_lists_triton(*arguments)
    lists.blocks.zero_()
    return lists


def unordered_means(x, groups, block, order):
    return pool_triton(x, groups, block, TokenOrder(None, None))


def forgotten_block(x, groups, block, order):
    means = pool_triton(x, groups, block, order)
    means[-1][:, -1, -block // groups[-1] * 2 : -block // groups[-1]] = 0
    return means


def upside_down(*arguments):
    return 1 - reduced_softmax_triton(*arguments)


def flat(*arguments):
    return reduced_softmax_triton(*arguments) ** 0.1


def one_wrong_score(*arguments):
    scores = reduced_softmax_triton(*arguments)
    scores[0, 1, -1, 1] *= 2
    return scores


def least_important(scores, *arguments):
    return choose_lists_triton((-scores).exp(), *arguments)


def swapped(scores, *arguments):
    """Two blocks of a row at one another's level."""
    other = scores.clone()
    first, last = scores[0, 1, 0].argmax(), scores[0, 1, 0].argmin()
    other[0, 1, 0, first], other[0, 1, 0, last] = scores[0, 1, 0, last], scores[0, 1, 0, first]
    return choose_lists_triton(other, *arguments)


def too_many(scores, config, *arguments):
    sparsity = None if config.sparsity is None else config.sparsity - 0.25
    shares = config.shares if sparsity is not None else {factor: 0.3 for factor in config.shares}
    return choose_lists_triton(scores, dataclasses.replace(config, shares=shares, sparsity=sparsity), *arguments)


def one_head_with_more(scores, config, *arguments):
    lists, more = choose_lists_triton(scores, config, *arguments), too_many(scores, config, *arguments)
    for name in ("blocks", "ends", "density"):
        getattr(lists, name)[:, 1] = getattr(more, name)[:, 1]
    return lists


def wrong_density(*arguments):
    lists = choose_lists_triton(*arguments)
    lists.density.mul_(1.1)
    return lists


def wrong_best(*arguments):
    lists = choose_lists_triton(*arguments)
    lists.best.copy_(lists.best.max() - lists.best)
    return lists
