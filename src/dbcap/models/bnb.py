"""Weights that bitsandbytes packed, as plain ones again; for that the package itself is not needed.

In 8 bits (LLM.int8, arXiv:2208.07339) `X.weight` is int8, and `X.SCB` has the greatest number of each output. In 4 bits
(QLoRA, arXiv:2305.14314) two numbers share a byte, the first in its upper half; they are places in
`X.weight.quant_map`, times the greatest number of their block, `X.weight.absmax`. That may be packed too, in 8 bits,
with a map, blocks and their greatest numbers of its own (`nested`), less its mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from dbcap.models.layout import BNB_OF_8, BNB_STATE, bnb_packed
from dbcap.models.mapped import MappedWeights

METHOD = "bitsandbytes"


def is_packed(config: Any) -> bool:
    """Return whether the weights that belong to a config of transformers are. Raises ValueError for other packers."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    method = getattr(method, "value", method)
    if method != METHOD:
        raise ValueError(f"it is quantised by {method}, and dbcap reads what {METHOD} made")
    return True


def unpacked(weights: MappedWeights, dtype: torch.dtype, transposed: Collection[str]) -> dict[str, torch.Tensor]:
    """Return all weights by name, those of floating-point numbers and the packed ones as `dtype`.

    `transposed` are the names of matrices that their module has as (inputs, outputs); bitsandbytes has (outputs,
    inputs). Raises ValueError for a weight without a whole state.
    """
    packed, states = _states(weights.names)
    exact = weights.stored({*states, *(name for state in states.values() for name in state.values())})
    found = {name: tensor for name, tensor in weights.tensors(dtype).items() if name not in exact}
    for name, parts in states.items():
        try:
            state = {part: exact[stored] for part, stored in parts.items()}
            matrix = _of_4(exact[name], state) if name in packed else _of_8(exact[name], state)
        except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the bitsandbytes state of {name} is damaged") from error
        found[name] = (matrix.T if name in transposed else matrix).to(dtype).contiguous()
    for name, tensor in found.items():
        if name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8):
            raise ValueError(f"{name} is packed and has no bitsandbytes state")
    weights.release()
    return found


def _states(names: Collection[str]) -> tuple[set[str], dict[str, dict[str, str]]]:
    """Return the weights in 4 bits, and the states of all packed ones: weight -> part -> where it is stored."""
    packed = bnb_packed(names)
    states: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part in BNB_OF_8:
            states.setdefault(f"{module}.weight", {})[part] = name
        elif module in packed:
            states.setdefault(module, {})[part] = name
        elif BNB_STATE in name:
            states.setdefault(name.partition(BNB_STATE)[0], {})["numbers"] = name
    return packed, states


def _of_8(integers: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if state.get("weight_format", torch.tensor(0)).item() or integers.dtype != torch.int8:  # the order that tiles have
        raise ValueError("the order of the integers is another")
    return integers * state["SCB"].float().view(len(integers), 1) * (1 / 127)


def _of_4(stored: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    numbers = json.loads(bytes(state["numbers"].tolist()))
    count = math.prod(numbers["shape"])
    largest = state["absmax"]
    if "nested_absmax" in state:
        places = state["nested_quant_map"].index_select(0, largest.int())
        largest = _scaled(places, state["nested_absmax"], numbers["nested_blocksize"]) + numbers["nested_offset"]
    # Two at once, by what a byte stands for.
    pairs = torch.cartesian_prod(state["quant_map"], state["quant_map"])
    values = pairs.index_select(0, stored.contiguous().view(torch.uint8).flatten().int()).flatten()[:count]
    matrix = _scaled(values, largest.float(), numbers["blocksize"]).view(numbers["shape"])
    return matrix.to(getattr(torch, numbers["dtype"]))  # which is what bitsandbytes multiplies by


def _scaled(values: torch.Tensor, largest: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply values (N,) in blocks of `size` by the largest number of each, the last one being shorter perhaps."""
    whole = len(values) // size
    last = values[whole * size :]
    if len(largest) != whole + (len(last) > 0):
        raise ValueError("there are more blocks than scales, or fewer")
    values[: whole * size].view(-1, size).mul_(largest[:whole, None])
    last.mul_(largest[-1])
    return values
