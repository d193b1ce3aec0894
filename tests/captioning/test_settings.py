"""What a decoder's config says of its length is what transformers has positions for."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, RobertaConfig, RobertaForCausalLM

from dbcap.captioning.settings import positions_of

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "vocab_size": 9}


@pytest.mark.parametrize(
    ("kind", "config"), [(BertLMHeadModel, BertConfig), (RobertaForCausalLM, RobertaConfig)], ids=["bert", "roberta"]
)
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_a_decoder_takes_as_many_tokens_and_no_more(kind, config, pad):
    model = kind(config(**SIZE, max_position_embeddings=12, pad_token_id=pad, is_decoder=True)).eval()
    most = positions_of(model.config.to_dict())
    assert model(torch.full((1, most), 5)).logits.shape == (1, most, 9)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))


def test_a_config_may_not_say():
    assert positions_of({"model_type": "roberta"}) is None
