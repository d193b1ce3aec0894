"""LoRA and new words in training: what is drawn, what is trained; and that files mean elsewhere what they did here."""

import copy
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

from dbcap.errors import UsageError
from dbcap.models import embeddings, lora
from dbcap.training import adapters

RANK, ALPHA = 3, 7.5
LAYERS = {"attention": 32, "all": 83}
"""Targets -> layers of the tiny denoiser."""


@pytest.fixture
def parts(tiny_diffusion):
    """A denoiser and a text encoder, trainable as a whole."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_diffusion / "text_encoder"),
    }


@pytest.fixture
def tokenizer(tiny_diffusion):
    return AutoTokenizer.from_pretrained(tiny_diffusion / "tokenizer")


@pytest.fixture
def given():
    """Latents, times and tokens of two rows."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=random), torch.tensor([10, 900]), torch.arange(32).view(2, 16)


def add(parts, targets="attention", seed=0):
    for part, module in parts.items():
        adapters.add_lora(module, part, RANK, ALPHA, targets, seed)
    return parts


def predict(parts, given):
    latents, times, tokens = given
    states = parts["text_encoder"](tokens).last_hidden_state
    return parts["unet"](latents.to(parts["unet"].dtype), times, encoder_hidden_states=states).sample


def state(parts):
    """Return the tensors of a file."""
    return {
        f"{part}.{name}": one.detach()
        for part, module in parts.items()
        for name, one in adapters.lora_parameters(module).items()
    }


def every(parts):
    return [one for part in parts.values() for one in adapters.lora_parameters(part).values()]


def gradients(parts, given):
    """Return the gradients of all LoRA matrices, by names."""
    loss = predict(parts, given).float().square().mean()
    for part in parts.values():
        part.zero_grad()
    loss.backward()
    return {
        f"{part}.{name}": one.grad.clone()
        for part, module in parts.items()
        for name, one in adapters.lora_parameters(module).items()
    }


def train(parts, given, steps=4):
    """Move away from where the model was."""
    optimizer = torch.optim.AdamW(every(parts), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (predict(parts, given) - 1).float().square().mean().backward()
        optimizer.step()


def write(parts, path):
    save_file(state(parts), path, adapters.lora_header(parts))
    return path


def merged(fresh, path):
    """Return modules with what `dbcap generate --lora` makes of a file."""
    read = lora.read(path, 1.0, dict.fromkeys(fresh, True))
    for part, module in fresh.items():
        read.merge(part, module)
    return fresh


# ---- LoRA


@pytest.mark.parametrize("targets", LAYERS)
def test_only_what_is_asked_for_is_trained_and_nothing_changes_at_first(parts, given, targets):
    with torch.no_grad():
        before = predict(parts, given)
        found = predict(add(parts, targets), given)
    assert torch.equal(found, before)
    assert len(adapters.lora_parameters(parts["unet"])) == 2 * LAYERS[targets]
    assert len(adapters.lora_parameters(parts["text_encoder"])) == 2 * 3 * 4
    trainable = [one for part in parts.values() for one in part.parameters() if one.requires_grad]
    assert {id(one) for one in trainable} == {id(one) for one in every(parts)}


def test_attention_means_the_transformers_projections(parts):
    names = adapters.lora_parameters(add(parts)["unet"])
    layers = {
        name.partition(".transformer_blocks.0.")[2].removesuffix(".lora_A.weight") for name in names if "A." in name
    }
    assert layers == {f"attn{one}.{layer}" for one in "12" for layer in ("to_q", "to_k", "to_v", "to_out.0")}


def test_matrices_are_drawn_by_seed_and_name(parts, tiny_diffusion):
    other = copy.deepcopy(parts)
    before = torch.get_rng_state()
    add(parts, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)  # whatever is drawn elsewhere
    one, same = state(parts), state(add(other, "all", seed=1))
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    third = {"unet": UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet")}
    adapters.add_lora(third["unet"], "unet", RANK, ALPHA, "attention", 2)
    for name, tensor in state(third).items():
        assert torch.equal(one[name], tensor) == ("lora_B" in name)
    drawn = [tensor for name, tensor in one.items() if "lora_A" in name]
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == len(drawn)


def test_matrices_are_drawn_as_those_of_linear_layers_and_begin_with_nothing(parts):
    matrices = state(add(parts, "all"))
    for name, tensor in matrices.items():
        if "lora_B" in name:
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor[0].numel())
        assert 0.5 * bound < tensor.abs().max() <= bound
    assert matrices["unet.mid_block.resnets.0.conv1.lora_A.weight"].shape == (RANK, 64, 3, 3)
    assert matrices["unet.mid_block.resnets.0.conv1.lora_B.weight"].shape == (64, RANK, 1, 1)


@pytest.mark.parametrize("targets", LAYERS)
def test_a_file_means_to_dbcap_and_diffusers_what_it_meant_in_training(parts, given, targets, tiny_diffusion, tmp_path):
    fresh = copy.deepcopy(parts)
    train(add(parts, targets), given)
    path = write(parts, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion, dtype=torch.float32)
    pipeline.load_lora_weights(path)
    with torch.no_grad():
        before, found = predict(fresh, given), predict(parts, given)
        ours = predict(merged(fresh, path), given)
        theirs = predict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, given)
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs, found, rtol=1e-5, atol=1e-5)


def test_alpha_is_in_the_header_for_both_readers(parts, given, tiny_diffusion, tmp_path):
    """Without it they take the rank, which is another scale."""
    fresh = {name: copy.deepcopy(part).requires_grad_(False) for name, part in parts.items()}
    train(add(parts), given)
    write(parts, tmp_path / "with.safetensors")
    save_file(state(parts), tmp_path / "without.safetensors")
    name, shape = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (64, 64)
    plain = fresh["unet"].get_submodule(name).weight.detach()
    changes = []
    for file in ("with", "without"):
        one = merged(copy.deepcopy(fresh), tmp_path / f"{file}.safetensors")
        changes.append(one["unet"].get_submodule(name).weight - plain)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
        pipeline.load_lora_weights(tmp_path / f"{file}.safetensors")
        pipeline.fuse_lora()
        theirs = pipeline.unet.get_submodule(name).base_layer.weight
        torch.testing.assert_close(theirs - plain, changes[-1], rtol=1e-4, atol=1e-6)
    assert changes[0].shape == shape
    torch.testing.assert_close(changes[0], changes[1] * ALPHA / RANK, rtol=1e-4, atol=1e-6)


def test_a_frozen_model_in_bfloat16_has_adapters_in_float32(parts, given):
    exact = add(copy.deepcopy(parts))
    short = add({name: part.to(torch.bfloat16) for name, part in parts.items()})
    matrices = state(short)
    assert {tensor.dtype for tensor in matrices.values()} == {torch.float32}
    assert {one.dtype for name, one in short["unet"].named_parameters() if "lora" not in name} == {torch.bfloat16}
    assert all(torch.equal(tensor, matrices[name]) for name, tensor in state(exact).items())
    for one in (exact, short):
        train(one, given)
    assert {one.grad.dtype for one in every(short)} == {torch.float32}
    with torch.no_grad():
        found, wanted = predict(short, given), predict(exact, given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("targets", LAYERS)
def test_gradients_flow_where_activations_are_computed_twice(parts, given, targets):
    """All that goes into a block is frozen, or asks for no gradient: reentrant checkpoints would lose the block's."""
    train(add(parts, targets), given, 1)  # else A's are zero
    wanted = gradients(parts, given)
    for part in parts.values():
        part.train()
    parts["unet"].enable_gradient_checkpointing()
    parts["text_encoder"].activation_checkpointing_enable()
    found = gradients(parts, given)
    assert all(gradient.any() for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_the_denoiser_alone_has_gradients_where_activations_are_computed_twice(parts, given):
    """Then not even the text's states ask for one."""
    one = {"unet": add(parts)["unet"], "text_encoder": parts["text_encoder"].requires_grad_(False)}
    one["unet"].enable_gradient_checkpointing()
    predict(one, given).square().mean().backward()
    ups = [one for name, one in adapters.lora_parameters(parts["unet"]).items() if "lora_B" in name]
    assert all(one.grad is not None and one.grad.any() for one in ups)


def test_switched_off_is_the_base_model(parts, given):
    with torch.no_grad():
        before = predict(parts, given)
    train(add(parts), given)
    with torch.no_grad():
        trained = predict(parts, given)
        with adapters.switched_off(parts.values()):
            off = predict(parts, given)
            with adapters.switched_off([parts["unet"]]):
                assert torch.equal(predict(parts, given), before)
        back = predict(parts, given)
    assert torch.equal(off, before)
    assert torch.equal(back, trained)
    assert not torch.allclose(trained, before, atol=0.01)


def test_switching_off_between_forward_and_backward_changes_no_gradient(parts, given):
    """As where the base model's own prediction is the target."""
    train(add(parts), given, 1)
    parts["unet"].enable_gradient_checkpointing()
    wanted = gradients(parts, given)
    for part in parts.values():
        part.zero_grad()
    loss = predict(parts, given).square().mean()
    with adapters.switched_off(parts.values()), torch.no_grad():
        predict(parts, given)
    loss.backward()
    found = {name: one.grad for name, one in adapters.lora_parameters(parts["unet"]).items()}
    assert all(torch.equal(gradient, wanted[f"unet.{name}"]) for name, gradient in found.items())


def test_adapters_are_on_again_after_an_error(parts, given):
    train(add(parts), given, 1)
    with torch.no_grad():
        wanted = predict(parts, given)
    with pytest.raises(RuntimeError), adapters.switched_off(parts.values()):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(predict(parts, given), wanted)
    assert all(one.requires_grad for one in every(parts))


# ---- a new word


def vectors(encoder, ids):
    return encoder.get_input_embeddings()(ids)


@pytest.mark.parametrize("word", ["<rex>", "<My-Dog.2_x>"])
def test_a_word_begins_as_its_class(parts, tokenizer, word):
    encoder = parts["text_encoder"]
    table = encoder.get_input_embeddings().weight.detach().clone()
    cat, dog = tokenizer("cat dog", add_special_tokens=False).input_ids
    new = adapters.add_word(encoder, tokenizer, word, "cat dog")
    ids = torch.tensor(tokenizer(f"a {word} dog").input_ids)
    assert ids.tolist().count(new.token) == 1
    assert new.token == len(table)
    found = vectors(encoder, ids)
    torch.testing.assert_close(found[ids == new.token][0], (table[cat] + table[dog]) / 2)
    assert torch.equal(found[ids != new.token], table[ids[ids != new.token]])


def test_only_its_row_is_trained(parts, tokenizer):
    encoder = parts["text_encoder"]
    new = adapters.add_word(encoder, tokenizer, "<rex>", "dog")
    before = {name: one.clone() for name, one in encoder.state_dict().items()}
    trainable = [one for one in encoder.parameters() if one.requires_grad]
    assert [(one.data_ptr(), one.shape) for one in trainable] == [(new.vector.data_ptr(), (1, 32))]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    encoder(torch.tensor([tokenizer("<rex> a <rex> dog").input_ids])).last_hidden_state.sum().backward()
    optimizer.step()
    assert {name for name, one in encoder.state_dict().items() if not torch.equal(one, before[name])} == {
        "embeddings.token_embedding.vector"
    }


def test_its_gradient_is_the_sum_over_its_places(parts, tokenizer):
    new = adapters.add_word(parts["text_encoder"], tokenizer, "<rex>", "dog")
    weights = torch.tensor([[1.0, 2, 4], [8, 16, 32]])[..., None]
    (new(torch.tensor([[new.token, 3, new.token], [4, new.token, 5]])) * weights).sum().backward()
    assert new.vector.grad.tolist() == [[1.0 + 4 + 16] * 32]


def test_a_word_is_float32_in_a_frozen_encoder_of_bfloat16(parts, tokenizer):
    encoder = parts["text_encoder"].to(torch.bfloat16)
    new = adapters.add_word(encoder, tokenizer, "<rex>", "dog")
    rows = vectors(encoder, torch.tensor([new.token, 3]))
    assert (new.vector.dtype, rows.dtype) == (torch.float32, torch.bfloat16)
    rows.float().sum().backward()
    assert new.vector.grad.dtype == torch.float32


def test_a_tables_spare_rows_are_left_alone(parts, tokenizer):
    """Some models have more rows than words: the new word's number is then one of the table's."""
    encoder = parts["text_encoder"]
    table = nn.Embedding(len(tokenizer) + 8, 32)
    encoder.set_input_embeddings(table)
    before = table.weight.detach().clone()
    new = adapters.add_word(encoder, tokenizer, "<rex>", "dog")
    with torch.no_grad():
        new.vector += 1
    rows = vectors(encoder, torch.tensor([new.token, new.token + 1]))
    assert torch.equal(rows[0], new.vector[0])
    assert torch.equal(rows[1], before[new.token + 1])
    assert torch.equal(table.weight, before)


def test_a_word_in_a_file_is_read_by_dbcap_and_diffusers(parts, tokenizer, family, tiny_diffusion, tmp_path):
    new = adapters.add_word(parts["text_encoder"], tokenizer, "<Rex>", "dog")
    with torch.no_grad():
        new.vector += torch.arange(32) / 10
    save_file({new.word: new.vector.detach()}, tmp_path / "other-name.safetensors")
    text = "a <Rex> dog"
    with torch.no_grad():
        rows = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        (wanted,) = parts["text_encoder"](rows).last_hidden_state
    ours = family(tiny_diffusion)
    ours.add_embedding(tmp_path / "other-name.safetensors")
    torch.testing.assert_close(ours.encode(text, 1, (32, 32)).states, wanted, rtol=1e-5, atol=1e-5)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
    pipeline.load_textual_inversion(tmp_path / "other-name.safetensors")
    (theirs,) = pipeline.encode_prompt(text, "cpu", 1, False)[0]
    torch.testing.assert_close(theirs, wanted, rtol=1e-5, atol=1e-5)
    assert embeddings.read(tmp_path / "other-name.safetensors", 1).word == "<Rex>"


def test_gradients_of_a_word_flow_where_activations_are_computed_twice(parts, tokenizer, given):
    encoder, unet = parts["text_encoder"].train(), parts["unet"].train().requires_grad_(False)
    new = adapters.add_word(encoder, tokenizer, "<rex>", "dog")
    tokens = torch.tensor(tokenizer(["a <rex> dog", "one <rex> cat"], padding="max_length").input_ids)
    found = []
    for _ in range(2):
        predict(parts, (*given[:2], tokens)).square().mean().backward()
        found.append(new.vector.grad.clone())
        new.vector.grad = None
        unet.enable_gradient_checkpointing()
        encoder.activation_checkpointing_enable()
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0])


def test_words_that_cannot_be_new(parts, tokenizer):
    encoder, before = parts["text_encoder"], len(tokenizer)
    with pytest.raises(UsageError, match="the word 'dog' is known to this model already; choose another --name"):
        adapters.add_word(encoder, tokenizer, "dog", "cat")
    with pytest.raises(UsageError, match="--class-word ' ' has no tokens"):
        adapters.add_word(encoder, tokenizer, "<rex>", " ")
    assert len(tokenizer) == before
    assert isinstance(encoder.get_input_embeddings(), nn.Embedding)


def test_real_words_of_clip(parts, shared):
    """CLIP's tokenizer makes letters small, and splits at dots and dashes: a new word stays one all the same."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "clip")
    encoder = parts["text_encoder"]
    encoder.set_input_embeddings(nn.Embedding(len(tokenizer), 32))
    new = adapters.add_word(encoder, tokenizer, "<My-Dog.2_x>", "golden retriever")
    plain = tokenizer("a photo of dog", add_special_tokens=False).input_ids
    found = tokenizer("a photo of <My-Dog.2_x> dog", add_special_tokens=False).input_ids
    assert found == [*plain[:3], new.token, plain[3]]
    assert new.token == 49408
    classes = tokenizer("golden retriever", add_special_tokens=False).input_ids
    assert len(classes) == 2
    torch.testing.assert_close(new.vector[0], new.table.weight[classes].mean(0))
