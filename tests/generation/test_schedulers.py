"""Samplers by name: which one a model's own is, and what is refused."""

import pytest

from dbcap.errors import ModelError, UsageError
from dbcap.generation.schedulers import OWN, SCHEDULERS, known, make, same_as


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_name_is_itself_whatever_the_model_has(name):
    assert same_as(name, {"_class_name": "DDIMScheduler"}) == known(name) == name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": False}, "dpm++"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpm++-karras"),
        ({"_class_name": "PNDMScheduler"}, "pndm"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler-a"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "EulerDiscrete"),
        ({"_class_name": "DEISMultistepScheduler"}, "DEISMultistep"),
        ({}, "ddim"),
    ],
)
def test_the_models_own_is_called_by_what_it_is(config, name):
    assert same_as(OWN, config) == name


def test_names_that_are_unknown():
    assert known(None) == OWN
    with pytest.raises(UsageError, match=r"there is no scheduler 'eular'; did you mean euler\?"):
        known("eular")
    with pytest.raises(ModelError, match="the model's scheduler Autoencoder is unknown"):
        make(OWN, {"_class_name": "Autoencoder"})
