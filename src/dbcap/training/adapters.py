"""What is trained beside frozen weights: LoRA (arXiv:2106.09685) by peft, and a new word (arXiv:2208.01618).

Both are float32 whatever the frozen weights are.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dbcap.errors import UsageError
from dbcap.models.parts import published
from dbcap.training import randomness

_ATTENTION = (
    *(".to_q", ".to_k", ".to_v", ".to_out.0"),  # of a denoiser
    *(".q_proj", ".k_proj", ".v_proj", ".out_proj"),  # of a text encoder
)
_UNET, _ADAPTER = "unet", "default"
_HEADER = "lora_adapter_metadata"
"""Where diffusers, and `models.lora`, look for alpha in the header of a file."""


# ---- LoRA


def add_lora(module: nn.Module, part: str, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Put LoRA into a part of a pipeline, which is frozen, and leaves its outputs as they are.

    `targets` is "attention": the four projections of each attention, or "all": all linear layers and convolutions of a
    denoiser. A layer's W becomes W + alpha / rank * B A, with B zero, and A drawn as linear layers are, from
    U(-1, 1) / sqrt(inputs): a function of the seed, the part and the layer's name.
    """
    chosen = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if targets == "attention" or part != _UNET:
        chosen = [path for path in chosen if path.endswith(_ATTENTION)]
    module.requires_grad_(False)
    # It would draw from torch's global generator, were its matrices not without memory at first.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, module, low_cpu_mem_usage=True)
    for path, layer in _lora_layers(module):
        down, up = _halves(layer)
        place = layer.get_base_layer().weight.device
        drawn = torch.rand(down.weight.shape, generator=randomness.generator(seed, "lora", part, published(path)))
        bound = 1 / math.sqrt(down.weight[0].numel())
        down.weight = nn.Parameter(((2 * drawn - 1) * bound).to(place))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=place))


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of a part by their names in a file, without the part: `....to_q.lora_A.weight` and lora_B."""
    found: dict[str, nn.Parameter] = {}
    for path, layer in _lora_layers(module):
        down, up = _halves(layer)
        found |= {f"{published(path)}.lora_A.weight": down.weight, f"{published(path)}.lora_B.weight": up.weight}
    return found


def lora_header(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the header of a file: what makes readers use alpha / rank."""
    said: dict[str, Any] = {}
    for part, module in modules.items():
        config: Any = module.peft_config[_ADAPTER]  # type: ignore[index]
        # Of peft's many settings those that every version of it knows.
        chosen = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
        said |= {f"{part}.{name}": value for name, value in chosen.items()}
    return {"format": "pt", _HEADER: json.dumps(said)}


@contextlib.contextmanager
def switched_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Make parts compute what they did before they got LoRA."""
    layers = [layer for module in modules for _, layer in _lora_layers(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield path, layer


def _halves(layer: Any) -> tuple[Any, Any]:
    """Return the layers that hold A and B."""
    return layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]


# ---- a new word


class NewWord(nn.Module):
    """The token embeddings of a text encoder, frozen, and one trainable vector beside them."""

    def __init__(self, word: str, token: int, table: nn.Embedding, vector: Tensor) -> None:
        """`vector` (1, C) is what `token` becomes; all others become what they do in `table`."""
        super().__init__()
        self.word, self.token, self.table = word, token, table.requires_grad_(False)
        self.vector = nn.Parameter(vector)

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens (B, L) -> vectors (B, L, C), of the table's number format."""
        new = ids == self.token  # it may lie behind the table's end
        rows: Tensor = self.table(ids.masked_fill(new, 0))
        return torch.where(new[..., None], self.vector.to(rows.dtype), rows)


def add_word(text_encoder: Any, tokenizer: Any, word: str, class_word: str) -> NewWord:
    """Teach a tokenizer a word of one token, and give a text encoder, which is frozen, a vector for it.

    It begins as the mean of the vectors of the class word's tokens. Raises UsageError for a word that the tokenizer
    knows, and for a class word that is no token of its own.
    """
    if word in tokenizer.get_vocab():
        raise UsageError(f"the word {word!r} is known to this model already", "choose another --name")
    known = tokenizer(class_word, add_special_tokens=False).input_ids
    if not known:
        raise UsageError(f"--class-word {class_word!r} has no tokens", "choose another word")
    tokenizer.add_tokens([word])
    table = text_encoder.get_input_embeddings()
    mean = table.weight[known].detach().float().mean(0, keepdim=True)
    text_encoder.requires_grad_(False)
    new = NewWord(word, tokenizer.convert_tokens_to_ids(word), table, mean)
    text_encoder.set_input_embeddings(new)
    return new
