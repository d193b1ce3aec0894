"""Noise, targets, weights and the loss of DreamBooth: against diffusers' schedulers, by hand, and half by half."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from dbcap.training import losses

TYPES = ("epsilon", "v_prediction", "sample")
SHAPE = (4, 3, 2)


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def drawn(rows, seed=0):
    """Return clean latents, noise and a prediction, each (rows, 4, 3, 2)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(3, rows, *SHAPE, generator=random).unbind()


# ---- noise and targets


def test_noise_and_targets_are_those_of_diffusers(scheduler):
    clean, noise, _ = drawn(5)
    times, left = torch.tensor([0, 1, 500, 998, 999]), scheduler.alphas_cumprod
    torch.testing.assert_close(losses.add_noise(left, clean, noise, times), scheduler.add_noise(clean, noise, times))
    found = {kind: losses.target(kind, left, clean, noise, times) for kind in TYPES}
    torch.testing.assert_close(found["v_prediction"], scheduler.get_velocity(clean, noise, times))
    assert found["epsilon"] is noise
    assert found["sample"] is clean


def test_noise_and_velocity_by_hand():
    left, times = torch.tensor([1.0, 0.64, 0.0]), torch.tensor([0, 1, 2])
    clean, noise = torch.full((3, 1, 1, 1), 10.0), torch.full((3, 1, 1, 1), 5.0)
    assert losses.add_noise(left, clean, noise, times).flatten().tolist() == pytest.approx([10, 8 + 3, 5])
    velocity = losses.target("v_prediction", left, clean, noise, times)
    assert velocity.flatten().tolist() == pytest.approx([5, 4 - 6, -10])


@pytest.mark.parametrize("kind", TYPES)
def test_whatever_is_predicted_the_same_latents_come_back(kind, scheduler):
    """A sampler gives a target the meaning that training gave it."""
    clean, noise, _ = drawn(1)
    one = DDPMScheduler.from_config(scheduler.config, prediction_type=kind, clip_sample=False)
    times = torch.tensor([400])
    noised = losses.add_noise(one.alphas_cumprod, clean, noise, times)
    target = losses.target(kind, one.alphas_cumprod, clean, noise, times)
    torch.testing.assert_close(one.step(target, 400, noised).pred_original_sample, clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [losses.target, losses.min_snr_weights])
def test_a_kind_of_prediction_that_there_is_not(call):
    left, times, row = torch.tensor([0.5]), torch.tensor([0]), torch.ones(1, 1, 1, 1)
    arguments = ("flow", left, row, row, times) if call is losses.target else (left, times, 5.0, "flow")
    with pytest.raises(ValueError, match="flow") as failure:
        call(*arguments)
    assert str(failure.value) == "there is no prediction type 'flow'"


def test_offset_noise_moves_a_channel_as_a_whole():
    noise, moved = drawn(2)[0], torch.tensor([[1.0, 2, 3, 4], [-1, 0, 1, 2]])[:, :, None, None]
    assert torch.equal(losses.offset(noise, moved, 0.0), noise)
    difference = losses.offset(noise, moved, 0.5) - noise
    torch.testing.assert_close(difference, (0.5 * moved).expand_as(noise))


# ---- weights


def test_the_ratio_is_that_of_diffusers(scheduler):
    times = torch.arange(1000)
    found = losses.snr(scheduler.alphas_cumprod, times)
    torch.testing.assert_close(found, compute_snr(scheduler, times), rtol=1e-4, atol=0)
    assert found[0] > found[999] > 0


def test_weights_by_hand():
    left, times = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0, 1, 2])  # ratios 9, 1 and 1/4
    wanted = {"epsilon": [5 / 9, 1, 1], "v_prediction": [5 / 10, 1 / 2, 0.25 / 1.25], "sample": [5, 1, 0.25]}
    for kind, weights in wanted.items():
        found = losses.min_snr_weights(left, times, 5.0, kind)
        assert found.tolist() == pytest.approx(weights), kind


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_numbers_where_no_noise_is_and_where_nothing_else_is(kind):
    found = losses.min_snr_weights(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), 5.0, kind).tolist()
    assert all(map(math.isfinite, found))
    assert found == {"epsilon": [0, 1], "v_prediction": [0, 0], "sample": [5, 0]}[kind]


@given(st.floats(0.001, 0.999), st.floats(0.1, 50))
def test_weights_mean_one_thing_whatever_is_predicted(left, gamma):
    """The error of the clean latents is that of the noise by sqrt((1 - a) / a), of the velocity by sqrt(1 - a)."""
    cumprod, times = torch.tensor([left], dtype=torch.float64), torch.tensor([0])
    noise, velocity, clean = (losses.min_snr_weights(cumprod, times, gamma, kind).item() for kind in TYPES)
    assert noise == pytest.approx(clean * (1 - left) / left)
    assert velocity == pytest.approx(clean * (1 - left))


# ---- DreamBooth


def test_the_loss_by_hand():
    prediction = torch.tensor([1.0, 2, 3, 4])[:, None, None, None].expand(4, 1, 1, 2)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25])
    found = losses.dreambooth(prediction, torch.zeros(4, 1, 1, 2), weights, 2, 0.5)
    assert found.instance.item() == (1 * 1 + 0.5 * 4) / 2
    assert found.prior.item() == (2 * 9 + 0.25 * 16) / 2
    assert found.total.item() == 1.5 + 0.5 * 11


def test_without_class_images_there_is_one_half():
    prediction = torch.tensor([1.0, 3])[:, None, None, None]
    found = losses.dreambooth(prediction, torch.zeros_like(prediction), torch.tensor([1.0, 2]), 2, 7.0)
    assert (found.total.item(), found.instance.item(), found.prior.item()) == (9.5, (1 + 2 * 9) / 2, 0)


def test_without_weights_all_rows_count_alike():
    prediction, target, _ = drawn(4)
    found, wanted = (losses.dreambooth(prediction, target, weights, 2, 0.5) for weights in (None, torch.ones(4)))
    assert found == wanted
    torch.testing.assert_close(found.instance, torch.nn.functional.mse_loss(prediction[:2], target[:2]))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_min_snr_with_a_prior_weighs_each_row_by_its_own_time(rows, kind, scheduler):
    """diffusers' example multiplies the subject's B errors by all 2B weights: an error, or at batch 1 a mean of both.

    Here every number is computed with Python's, row by row.
    """
    clean, noise, prediction = drawn(2 * rows)
    left = scheduler.alphas_cumprod
    times = torch.tensor([20, 900, 400, 650, 3, 250, 777, 120])[: 2 * rows]
    weights = losses.min_snr_weights(left, times, 5.0, kind)
    target = losses.target(kind, left, clean, noise, times)
    found = losses.dreambooth(prediction, target, weights, rows, 0.7)
    errors = []
    for row in range(2 * rows):
        ratio = left[times[row]].item() / (1 - left[times[row]].item())
        weight = min(ratio, 5) / {"epsilon": ratio, "v_prediction": ratio + 1, "sample": 1}[kind]
        squares = [(a - b) ** 2 for a, b in zip(prediction[row].flatten(), target[row].flatten(), strict=True)]
        errors.append(weight * float(sum(squares)) / len(squares))
    instance, prior = sum(errors[:rows]) / rows, sum(errors[rows:]) / rows
    assert found.instance.item() == pytest.approx(instance, rel=1e-4)
    assert found.prior.item() == pytest.approx(prior, rel=1e-4)
    assert found.total.item() == pytest.approx(instance + 0.7 * prior, rel=1e-4)


@given(st.integers(1, 4), st.floats(0, 10), st.integers(0, 99))
def test_one_pass_is_two(rows, prior_weight, seed):
    """The loss and its gradient are those of a pass with the subject's images and another with the class's."""
    noise, given_, _ = drawn(2 * rows, seed)
    weights = torch.rand(2 * rows, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor([0.5, -1.0, 2.0, 0.1], requires_grad=True)

    def loss(part, instances, weight):
        prediction = given_[part] * scale[:, None, None]
        return losses.dreambooth(prediction, noise[part], weights[part], instances, weight)

    together = loss(slice(None), rows, prior_weight)
    (gradient,) = torch.autograd.grad(together.total, scale)
    one, other = (loss(part, rows, 0.0) for part in (slice(rows), slice(rows, None)))
    apart = one.total + prior_weight * other.total
    (wanted,) = torch.autograd.grad(apart, scale)
    torch.testing.assert_close(together.total, apart, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert (together.instance.item(), together.prior.item()) == pytest.approx((one.total.item(), other.total.item()))


def test_gradients_of_each_row_by_hand():
    prediction = torch.tensor([1.0, 2, 3, 4])[:, None, None, None].requires_grad_()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25])
    losses.dreambooth(prediction, torch.zeros(4, 1, 1, 1), weights, 2, 0.5).total.backward()
    assert prediction.grad.flatten().tolist() == [2 * 1 / 2, 0.5 * 4 / 2, 0.5 * 2 * 6 / 2, 0.5 * 0.25 * 8 / 2]


def test_it_is_computed_in_float32():
    prediction = torch.full((2, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    target = torch.full((2, 1, 64, 64), 1 - 2**-12)  # which bfloat16 takes for 1
    found = losses.dreambooth(prediction, target, torch.ones(2), 1, 1.0)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(2 * 2**-24)
