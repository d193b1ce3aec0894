"""What each method trains, and what stays as it is."""

from __future__ import annotations

import pytest
import torch

from dbcap.config.training import TrainConfig
from dbcap.errors import UsageError
from dbcap.models.identity import Identity
from dbcap.training import trainee

CAPTIONS = ("a photo of a sks dog", "a dog on a table", "")
REX = Identity("<rex>", "dog")


@pytest.fixture
def make(family, tiny_diffusion):
    """Return a function that makes what a method trains."""

    def call(method="full", *, text=True, base=False, checkpoints=False, dtype=torch.float32, model=None, **settings):
        how = trainee.How(text, base, False, dtype, checkpoints)
        config = TrainConfig(data=("d",), method=method, **settings)
        captions = [one.replace("sks", "<rex>") if method == "embedding" else one for one in CAPTIONS]
        name = "bfloat16" if dtype == torch.bfloat16 else "float32"
        return trainee.make(family(model or tiny_diffusion, name), captions, 32, how, config, REX)

    return call


def noisy(rows=2):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))


TIMES, NUMBERS = torch.tensor([10, 700]), torch.tensor([0, 1])


def predicted(found):
    return found.predict(noisy(), TIMES, found.tell(NUMBERS))


def step(found):
    """Train all that is trained a little."""
    predicted(found).square().mean().backward()
    with torch.no_grad():
        for name, one in found.weights.gradients().items():
            found.weights.masters[name] -= 0.1 * one.sign().to(found.weights.masters[name].dtype)
    found.weights.forget_gradients(found.weights.working)
    found.weights.publish(found.weights.masters)


def state(module):
    return {name: one.detach().clone() for name, one in module.state_dict().items()}


def changed(before, module):
    return {name for name, one in module.state_dict().items() if not one.equal(before[name])}


METHODS = {
    "full": ({"unet", "text_encoder"}, {}),
    "full, text encoder frozen": ({"unet"}, {"text": False}),
    "lora": ({"adapter"}, {"method": "lora"}),
    "lora, text encoder frozen": ({"adapter"}, {"method": "lora", "text": False}),
    "embedding": ({"adapter"}, {"method": "embedding"}),
}


@pytest.mark.parametrize(("parts", "how"), METHODS.values(), ids=METHODS)
def test_what_is_trained_gets_gradients_and_nothing_else(parts, how, make):
    found = make(**how)
    assert {name.partition(".")[0] for name in found.weights.working} == parts
    predicted(found).square().mean().backward()
    trained = {id(one) for one in found.weights.working.values()}
    for module in found.modules.values():
        for name, one in module.named_parameters():
            assert (one.grad is not None) == (id(one) in trained), name
            assert one.requires_grad == (id(one) in trained), name
    assert found.weights.gradients().keys() == found.weights.working.keys()


@pytest.mark.parametrize("how", [how for _, how in METHODS.values()], ids=METHODS)
def test_before_training_it_predicts_what_the_model_does(how, make, family, tiny_diffusion):
    found, whole = make(**how), family(tiny_diffusion)
    encoder = whole.module("text_encoder", torch.float32)
    rows = [torch.cat([whole.token_rows(CAPTIONS[number], 1)[0] for number in (0, 1)])]
    with torch.no_grad():
        told = whole.tell([encoder], rows, (32, 32))
        expected = whole.denoise(whole.module("unet", torch.float32), noisy(), TIMES, told)
        mine = predicted(found)
    one = 1 if how.get("method") == "embedding" else 0  # there the first caption has a word that the model has not
    torch.testing.assert_close(mine[one:], expected[one:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "embedding"])
def test_all_that_is_trained_changes_what_is_predicted(method, make):
    found = make(method)
    before = predicted(found).detach()
    for name, master in found.weights.masters.items():
        if "lora_A" in name:
            continue  # B is zero at first
        kept = master.detach().clone()
        with torch.no_grad():
            master += 0.5
        found.weights.publish([name])
        assert not predicted(found).detach().equal(before), name
        with torch.no_grad():
            master.copy_(kept)
        found.weights.publish([name])
    assert predicted(found).detach().equal(before)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_text_encoders_that_are_not_trained_leave_memory(method, make):
    found, with_text = make(method, text=False), make(method)
    assert found.encoders == {}
    assert set(found.modules) == {"unet"}
    for numbers in (NUMBERS, torch.tensor([2, 2, 0])):
        told = found.tell(numbers)
        assert not told.states.requires_grad
        torch.testing.assert_close(told.states, with_text.tell(numbers).states, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"text": False}, {"method": "lora"}], ids=["full", "text frozen", "lora"])
def test_the_base_model_predicts_what_it_did_before(how, make):
    found = make(base=True, **how)
    with torch.no_grad():
        before = predicted(found)
    torch.testing.assert_close(found.base_prediction(noisy(), TIMES, NUMBERS), before, atol=1e-4, rtol=1e-4)
    first = found.base_prediction(noisy(), TIMES, NUMBERS)
    step(found)
    assert found.base_prediction(noisy(), TIMES, NUMBERS).equal(first)
    assert not first.requires_grad
    with torch.no_grad():
        assert (predicted(found) - before).abs().max() > 1e-3
    assert found.weights.gradients() == {}


def test_a_lora_changes_only_itself(make):
    found = make("lora", rank=2)
    before = {name: state(module) for name, module in found.modules.items()}
    step(found)
    for part, module in found.modules.items():
        names = changed(before[part], module)
        assert names
        assert all("lora_" in name for name in names)
    assert set(found.headers) == {"adapter"}


def test_an_embedding_changes_only_its_row(make):
    found = make("embedding")
    (name,) = found.weights.working
    assert name == "adapter.<rex>"
    before = {part: state(module) for part, module in found.modules.items()}
    with torch.no_grad():
        plain = found.tell(torch.tensor([1])).states
        own = found.tell(torch.tensor([0])).states
    step(found)
    assert changed(before["unet"], found.unet) == set()
    assert len(changed(before["text_encoder"], found.encoders["text_encoder"])) == 1
    with torch.no_grad():
        assert found.tell(torch.tensor([1])).states.equal(plain), "captions without the word"
        assert not found.tell(torch.tensor([0])).states.equal(own)


def test_an_embedding_for_two_text_encoders(make, tiny_xl):
    with pytest.raises(UsageError, match="an embedding of a model with two text encoders is not trained; use --method"):
        make("embedding", model=tiny_xl)


@pytest.mark.parametrize("how", [how for _, how in METHODS.values()], ids=METHODS)
def test_gradient_checkpointing_changes_no_gradient(how, make):
    gradients = []
    for checkpoints in (False, True):
        found = make(checkpoints=checkpoints, **how)
        if checkpoints:
            assert found.unet.is_gradient_checkpointing
        predicted(found).square().mean().backward()
        gradients.append(found.weights.gradients())
    plain, other = gradients
    assert plain.keys() == other.keys()
    for name, one in plain.items():
        torch.testing.assert_close(other[name], one, atol=1e-7, rtol=1e-4)


def test_in_bfloat16_the_copies_are_rounded_and_the_weights_are_not(make, family, tiny_diffusion):
    found = make(dtype=torch.bfloat16)
    exact = family(tiny_diffusion).module("unet", torch.float32).state_dict()
    for name, one in found.unet.named_parameters():
        assert one.dtype == torch.bfloat16
        assert found.weights.masters[f"unet.{name}"].equal(exact[name])
    assert predicted(found).dtype == torch.float32


def test_each_row_is_told_its_own_caption(make):
    found = make()
    both, turned = found.tell(torch.tensor([0, 1, 1])).states, found.tell(torch.tensor([1, 0])).states
    torch.testing.assert_close(both[:2].flip(0), turned)
    assert both[1].equal(both[2])
    assert not both[0].equal(both[1])
