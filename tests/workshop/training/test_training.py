"""The training's optimiser and average, against their formulas written out."""

import pytest
import torch

from comfyui_psa.workshop.training.dit import make_muon
from comfyui_psa.workshop.training.schedule import moving_average


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_steps_of_muon_are_those_of_its_paper(shape):
    """Momentum 0.95 with Nesterov's look ahead, singular values brought near 1 by the quintic iteration, in double
    precision here; decay of 0.01 and 0.2 * sqrt(longer side) times the rate."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    muon = make_muon([weight])
    muon.param_groups[0]["lr"] = 0.02
    expected, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(2):
        weight.grad = torch.randn(shape, generator=generator)
        muon.step()
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * momentum
        update = update / update.norm()
        for _ in range(5):
            gram = update @ update.T
            update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
        expected = expected * (1 - 0.02 * 0.01) - 0.02 * 0.2 * max(shape) ** 0.5 * update
    # The iteration is in bfloat16.
    assert (weight.detach() - expected).norm() < 0.02 * (expected - start).norm()


def test_the_average_is_short_sighted_in_the_beginning():
    model = torch.nn.Linear(3, 2)
    average = moving_average(model, 0.9)
    expected = None
    for number in range(1, 200):
        with torch.no_grad():
            model.weight.normal_(generator=torch.Generator().manual_seed(number))
        average.update_parameters(model)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = model.weight if expected is None else decay * expected + (1 - decay) * model.weight
        expected = expected.detach().clone()
        if number in (1, 2, 20, 199):
            torch.testing.assert_close(average.module.weight.detach(), expected)
    assert not torch.equal(average.module.weight, model.weight), "a copy of its own"
