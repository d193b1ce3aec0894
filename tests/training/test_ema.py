"""The moving average: by hand, against diffusers', and bit by bit over a resume."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dbcap.training.ema import Average


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def move(parameters, step):
    """Change parameters in place, as a step of training does."""
    random = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for one in parameters:
            one += torch.randn(one.shape, generator=random).to(one)


def test_it_is_what_the_formula_says():
    one = parameter(1.0, -2.0)
    average = Average({"one": one}, 0.5)
    assert average.state()["one"].tolist() == [1, -2]
    wanted = [1.0, -2.0]
    for step, (values, decay) in enumerate([((3, 0), 2 / 11), ((5, 1), 3 / 12), ((-1, 1), 4 / 13)], 1):
        one.data = torch.tensor(values, dtype=torch.float32)
        average.update(step)
        wanted = [decay * old + (1 - decay) * new for old, new in zip(wanted, values, strict=True)]
        assert average.state()["one"].tolist() == pytest.approx(wanted)
    before = average.state()["one"].clone()
    average.update(100)  # (1 + 100) / (10 + 100) is above 0.5
    torch.testing.assert_close(average.state()["one"], 0.5 * before + 0.5 * one.detach())


def test_it_is_diffusers_average():
    """diffusers' first update takes the parameters as they are, and its next one is our step 1."""
    parameters = [parameter(1.0, 2.0, 3.0), parameter(-1.0)]
    theirs = EMAModel(parameters, decay=0.6)
    theirs.step(parameters)
    ours = Average({"a": parameters[0], "b": parameters[1]}, 0.6)
    for step in range(1, 30):
        move(parameters, step)
        theirs.step(parameters)
        ours.update(step)
        torch.testing.assert_close(list(ours.state().values()), theirs.shadow_params)


@given(st.integers(0, 20))
def test_a_resume_changes_no_bit(stop):
    def steps(parameters, average, start, end):
        for step in range(start, end):
            move(parameters, step)
            average.update(step)

    straight = [parameter(1.0, 2.0), parameter(0.1)]
    whole = Average(dict(zip("ab", straight, strict=True)), 0.9)
    steps(straight, whole, 1, 21)

    before = [parameter(1.0, 2.0), parameter(0.1)]
    first = Average(dict(zip("ab", before, strict=True)), 0.9)
    steps(before, first, 1, stop + 1)
    after = [nn.Parameter(one.detach().clone()) for one in before]
    second = Average(dict(zip("ab", after, strict=True)), 0.9)
    second.load(first.state())
    steps(after, second, stop + 1, 21)
    assert all(torch.equal(second.state()[name], value) for name, value in whole.state().items())


def test_the_average_of_short_numbers_is_a_long_one():
    one = parameter(1.0, dtype=torch.bfloat16)
    average = Average({"one": one}, 0.999)
    one.data = torch.tensor([1.0078125], dtype=torch.bfloat16)  # the next that there is
    average.update(100_000)
    (found,) = average.state().values()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1 + 0.001 * 0.0078125, abs=1e-7)


def test_it_lies_in_memory_as_the_parameter_does_and_asks_for_no_gradient():
    one = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    (found,) = Average({"one": one}, 0.9).state().values()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.requires_grad, found.data_ptr() == one.data_ptr()) == (False, False)


@pytest.mark.parametrize("state", [{}, {"b": torch.ones(2)}, {"a": torch.ones(1)}])
def test_a_state_of_other_parameters_is_refused(state):
    average = Average({"a": parameter(1.0, 2.0)}, 0.9)
    with pytest.raises(ValueError, match="of other parameters"):
        average.load(state)
    assert average.state()["a"].tolist() == [1, 2]
