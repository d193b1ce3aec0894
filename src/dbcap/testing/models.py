"""Writers of tiny real captioners: transformers' own classes with random weights, made to say words that vary by image.

Plain random weights say one and the same thing whatever they see. So the image's part in the decoder's sum is made
large, and the output prefers whole words, which keeps captions readable.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BeitConfig,
    BertConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    DeiTConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    GPT2Tokenizer,
    PretrainedConfig,
    RobertaConfig,
    SwinConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

Encoder = Literal["vit", "deit", "beit", "swin"]
Decoder = Literal["gpt2", "bert", "roberta", "trocr"]

END = "<|endoftext|>"
_TALK = """
a an the of on in at by with near two three red green blue yellow white black brown pink small large old
young round man woman child dog cat bird horse fish boat car bus train house tree flower table chair window
street field beach water snow grass sky sun night ball book cup hat clock is are sits stands holds runs
flies eats
"""
WORDS = tuple(_TALK.split())
"""What the tiny models talk in; every one of them is a single token after a space."""


# ---- the published layout


def write_published_layout(
    folder: Path, *, tiny: bool = True, seed: int = 0, tokenizer: Path | None = None, card: bool = True
) -> Path:
    """Write the layout of nlpconnect/vit-gpt2-image-captioning with random weights, and return `folder`.

    It is of 2022: a pickled `pytorch_model.bin` with GPT-2's old mask buffers and the tied embedding under two names,
    the configuration of a ViTFeatureExtractor, `vocab.json` and `merges.txt`, no `generation_config.json`. `tokenizer`
    is a `tokenizer.json` of GPT-2's to use instead of the small byte-level vocabulary. `tiny=False`: 239 M parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _small_bpe() if tokenizer is None else _read_bpe(tokenizer)
    end = vocabulary[END]
    words = [vocabulary[_byte_level(f" {word}")] for word in WORDS if _byte_level(f" {word}") in vocabulary]
    size: dict[str, Any] = {"vocab_size": len(vocabulary), "bos_token_id": end, "eos_token_id": end}
    vision, text = ViTConfig(), GPT2Config(**size, **_DECODER)
    if tiny:
        vision = ViTConfig(**_TINY_VISION, image_size=224, patch_size=16)
        text = GPT2Config(**size, **_TINY_GPT2, n_positions=1024, **_DECODER)
    model = _encoder_decoder(vision, text, start=end, end=end, pad=end, seed=seed)
    _enliven_gpt2(model, words, end)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"architectures": ["VisionEncoderDecoderModel"], "torch_dtype": "float32"}
    state = {_name_of_2022(name): tensor for name, tensor in model.state_dict().items()}
    for layer, part in itertools.product(range(text.n_layer), ("attn", "crossattention")):
        prefix = f"decoder.transformer.h.{layer}.{part}"
        state[f"{prefix}.bias"] = torch.tril(torch.ones(text.n_positions, text.n_positions, dtype=torch.uint8))[
            None, None
        ]
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    for name, body in {
        "config.json": config,
        "preprocessor_config.json": {
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ViTFeatureExtractor",
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 2,
            "size": 224,
        },
        "special_tokens_map.json": {**special, "pad_token": END},
        "tokenizer_config.json": {
            **special,
            "add_prefix_space": False,
            "model_max_length": 1024,
            "name_or_path": "gpt2",
            "special_tokens_map_file": None,
            "tokenizer_class": "GPT2Tokenizer",
        },
        "vocab.json": vocabulary,
    }.items():
        (folder / name).write_text(json.dumps(body, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if card:
        (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- image-to-text\n---\n\n# A captioner\n")
    return folder


def _name_of_2022(name: str) -> str:
    """Return what a weight of ViT's was called when the published file was written."""
    for new, old in _OLD_NAMES.items():
        name = name.replace(new, old)
    return re.sub(r"^encoder\.layers\.", "encoder.encoder.layer.", name)


_OLD_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


# ---- other encoders and decoders


def write_tiny(folder: Path, encoder: Encoder = "vit", decoder: Decoder = "gpt2", seed: int = 0) -> Path:
    """Write a tiny captioner of these two halves, with processor and tokenizer, in safetensors, and return `folder`."""
    vision: PretrainedConfig = {
        "vit": lambda: ViTConfig(**_TINY_VISION, image_size=32, patch_size=8),
        "deit": lambda: DeiTConfig(**_TINY_VISION, image_size=32, patch_size=8),
        "beit": lambda: BeitConfig(
            **_TINY_VISION, image_size=32, patch_size=8, vocab_size=16, use_absolute_position_embeddings=True
        ),
        "swin": lambda: SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4
        ),
    }[encoder]()
    if decoder == "gpt2":
        vocabulary, merges = _small_bpe()
        spelt: Any = merges  # pairs work too, whatever the annotation says
        end = vocabulary[END]
        size: dict[str, Any] = {"vocab_size": len(vocabulary), "bos_token_id": end, "eos_token_id": end}
        text: PretrainedConfig = GPT2Config(**size, **_TINY_GPT2, n_positions=64, **_DECODER)
        tokenizer: Any = GPT2Tokenizer(
            vocab=vocabulary, merges=spelt, bos_token=END, eos_token=END, unk_token=END, pad_token=END
        )
        tokens: dict[str, Any] = {"start": end, "end": end, "pad": end}
    else:
        tokenizer = _wordpiece()
        tokens = {"start": tokenizer.cls_token_id, "end": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
        size = {"vocab_size": len(tokenizer), "pad_token_id": tokens["pad"], **_DECODER}
        text = {
            "bert": lambda: BertConfig(**_TINY_BERT, **size),
            "roberta": lambda: RobertaConfig(**_TINY_BERT, **size),
            "trocr": lambda: TrOCRConfig(**_TINY_TROCR, **size),
        }[decoder]()
    model = _encoder_decoder(vision, text, **tokens, seed=seed)
    if decoder == "gpt2":
        _enliven_gpt2(model, [vocabulary[_byte_level(f" {word}")] for word in WORDS], tokens["end"])
    elif decoder == "trocr":
        _enliven_trocr(model, tokenizer)
    else:
        head = model.decoder.cls.predictions if decoder == "bert" else model.decoder.lm_head
        _enliven_bert(head, model.decoder.get_input_embeddings().weight, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_tiny_blip(folder: Path, seed: int = 0) -> Path:
    """Write a tiny BLIP captioner, with processor and tokenizer, in safetensors, and return `folder`."""
    tokenizer = _wordpiece(bos_token="[DEC]")
    vision = {**_TINY_VISION, "image_size": 32, "patch_size": 8}
    text = {
        **_TINY_BERT,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": _WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=_WIDTH)
    model = _seeded(lambda: BlipForConditionalGeneration(config), seed)
    decoder = model.text_decoder
    _enliven_bert(decoder.cls.predictions, decoder.bert.embeddings.word_embeddings.weight, tokenizer)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def write_tiny_git(folder: Path, seed: int = 0) -> Path:
    """Write a tiny GIT captioner, with processor and tokenizer, in safetensors, and return `folder`."""
    tokenizer = _wordpiece()
    vision = {**_TINY_VISION, "image_size": 32, "patch_size": 8}
    config = GitConfig(
        vision_config=vision,
        **_TINY_BERT,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = _seeded(lambda: GitForCausalLM(config), seed)
    _enliven_bert(model.output, model.git.embeddings.word_embeddings.weight, tokenizer)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


# ---- weights

_WIDTH = 32
_GAIN = 2.0
_LENGTH = 8
"""In words, about which GPT-2's captions end."""
_TINY_VISION: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_DECODER: dict[str, Any] = {"add_cross_attention": True, "is_decoder": True}
_TINY_GPT2: dict[str, Any] = {"n_embd": _WIDTH, "n_layer": 2, "n_head": 2}
_TINY_BERT: dict[str, Any] = {**_TINY_VISION, "max_position_embeddings": 64}
_TINY_TROCR: dict[str, Any] = {
    "d_model": _WIDTH,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "cross_attention_hidden_size": _WIDTH,
}


def _encoder_decoder(
    vision: PretrainedConfig, text: PretrainedConfig, *, start: int, end: int, pad: int, seed: int
) -> Any:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        start,
        start,
        end,
        pad,
    )
    model = _seeded(lambda: VisionEncoderDecoderModel(config), seed)
    for key in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, key, getattr(config, key))
    return model


def _seeded(make: Callable[[], torch.nn.Module], seed: int) -> Any:
    """Return what `make` makes, with lively weights; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        _redraw(model)
    return model


def _redraw(model: torch.nn.Module) -> None:
    """Draw all matrices anew, so large that what goes in makes a difference to what comes out."""
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.nn.Parameter) or weight.dim() < 2:
                continue
            if isinstance(module, torch.nn.Embedding):
                weight.normal_(0.0, 2.0 if "position" in name or name.endswith("wpe") else 1.0)
                continue
            conv1d = type(module).__name__ == "Conv1D"  # GPT-2's linear layer, stored the other way round
            inputs = weight.shape[0] if conv1d else weight[0].numel()
            # what the image brings into the text outweighs the text itself
            boost = 2.0 if "cross" in name and name.endswith(("c_proj", "output.dense")) else 1.0
            weight.normal_(0.0, boost * _GAIN / inputs**0.5)


def _prefer_words(weight: torch.Tensor, words: list[int], end: int) -> None:
    """Scale the rows of an embedding that is also the output layer: nothing but words and the end is likely."""
    with torch.no_grad():
        keep = torch.full((weight.shape[0], 1), 0.02)
        keep[[*words, end]] = 1.0
        weight.mul_(keep / weight.shape[1] ** 0.25)


def _enliven_gpt2(model: Any, words: list[int], end: int) -> None:
    """Make the output words, and the end likelier from word to word, so that captions have different lengths."""
    transformer = model.decoder.transformer
    embeddings, positions = transformer.wte.weight, transformer.wpe.weight
    _prefer_words(embeddings, words, end)
    with torch.no_grad():
        later = torch.arange(len(positions)).sub(_LENGTH).div(_LENGTH).clamp(max=1.0)
        direction = torch.nn.functional.normalize(embeddings[end], dim=0)
        positions.add_(30.0 * later[:, None] * direction)


def _enliven_bert(head: Any, embeddings: torch.Tensor, tokenizer: Any) -> None:
    """Make the output words. `head` has the bias over the vocabulary."""
    words = tokenizer.convert_tokens_to_ids(list(WORDS))
    end = tokenizer.sep_token_id
    _prefer_words(embeddings, words, end)
    with torch.no_grad():
        head.bias.fill_(-100.0)
        head.bias[words] = 0.0
        head.bias[end] = -1.0


def _enliven_trocr(model: Any, tokenizer: Any) -> None:
    """Make the output words; it has no bias."""
    words = tokenizer.convert_tokens_to_ids(list(WORDS))
    _prefer_words(model.decoder.get_input_embeddings().weight, words, tokenizer.sep_token_id)


# ---- tokenizers


def _byte_level(text: str) -> str:
    """Return ASCII text as GPT-2's vocabulary spells it."""
    return text.replace(" ", "Ġ")


def _small_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level vocabulary that can spell everything and has a token for each of `WORDS` after a space."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        spelt = _byte_level(f" {word}")
        # all merges start at the space, so no two words get into each other's way
        merges.update({(spelt[:place], spelt[place]): None for place in range(1, len(spelt))})
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges), END]
    return {token: number for number, token in enumerate(tokens)}, list(merges)


def _read_bpe(tokenizer: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a `tokenizer.json`."""
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return model["vocab"], [(left, right) for left, right in pairs]


def _wordpiece(**special: Any) -> BertTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *special.values()]
    tokens += [*WORDS, *(letter for letter in letters if letter not in WORDS), *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, **special)
