"""`dbcap.Captioner`: what goes in, what comes out, and that it says what `dbcap caption` says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import dbcap_starter
from dbcap import Caption, Captioner
from dbcap.captioning.api import CaptionOptions
from dbcap.config.fields import cli_of
from dbcap.config.models import DECODING, READING, CaptionConfig
from dbcap.errors import InputError, ModelError, UsageError

STARTER = Path(dbcap_starter.__file__).parent / "captioner"


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCAP_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("no_proxy", "*")
        yield


@pytest.fixture(scope="module")
def tiny(tiny_captioner) -> Captioner:
    return Captioner.load(tiny_captioner, dtype="float32")


@pytest.fixture(scope="module")
def starter() -> Captioner:
    return Captioner.load("starter", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def said(tiny, samples) -> list[Caption]:
    """Captions of the first six samples, one by one."""
    found = [tiny.caption(str(path), max_length=10) for path in samples[:6]]
    assert len({caption.text for caption in found}) > 3, "the model says the same of everything"
    return found


def texts(captions: Any) -> list[str]:
    return [caption.text for caption in captions]


# ---- loading


def test_load_tells_what_was_loaded(starter, tiny_captioner):
    assert (starter.name, starter.device, starter.dtype) == ("starter", torch.device("cpu"), torch.float32)
    assert "starter" in repr(starter)
    assert isinstance(starter.model, transformers.VisionEncoderDecoderModel)
    other = Captioner.load(str(tiny_captioner), engine="torch", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (other.dtype, other.name) == (torch.bfloat16, str(tiny_captioner))
    assert other.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"engine": "onyx"}, "there is no engine 'onyx'; did you mean onnx?"),
        ({"engine": "jax"}, "there is no engine 'jax'; the engines are auto, torch, onnx"),
        ({"engine": "touch"}, "there is no engine 'touch'; did you mean torch?"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"dtype": torch.float64}, "there is no dtype 'float64'"),
    ],
)
def test_what_cannot_be_loaded_so_is_a_usage_error(tiny_captioner, keywords, words):
    with pytest.raises(UsageError) as caught:
        Captioner.load(tiny_captioner, **keywords)
    assert str(caught.value).startswith(words)


def test_the_default_is_the_published_model(hub, published_model):
    server = hub()
    folder = server.repo("nlpconnect/vit-gpt2-image-captioning")
    for path in published_model.iterdir():
        (folder / path.name).symlink_to(path)
    with pytest.raises(ModelError, match="is not in the cache, and --offline"):
        Captioner.load(offline=True)
    with pytest.raises(ModelError, match="pickle"):
        Captioner.load(allow_pickle=False)
    loaded = Captioner.load()
    assert loaded.name == "nlpconnect/vit-gpt2-image-captioning"
    server.stop()
    assert Captioner.load(offline=True).name == loaded.name


# ---- what goes in, what comes out


def test_every_kind_of_image_is_one_caption(tiny, said, samples, served):
    path = samples[0]
    opened = Image.open(path)
    kinds = {
        "path": path,
        "text": str(path),
        "URL": f"{served}/0.png",
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "PIL": opened,
        "numpy": np.asarray(Image.open(path).convert("RGB")),
    }
    for name, image in kinds.items():
        caption = tiny.caption(image, max_length=10)
        assert isinstance(caption, Caption), name
        assert caption == said[0], name
    assert texts(tiny.caption(list(kinds.values()), max_length=10, batch_size=3)) == [said[0].text] * len(kinds)


def test_a_caption_has_text_score_and_candidates(tiny, samples):
    caption = tiny.caption(samples[0], num_beams=4, num_captions=3, max_length=12)
    assert len(caption.candidates) == 3
    assert (caption.text, caption.score) == (caption.candidates[0].text, caption.candidates[0].score)
    scores = [candidate.score for candidate in caption.candidates]
    assert scores == sorted(scores, reverse=True)
    assert caption.text == caption.text.strip()


def test_a_sequence_gives_a_list(tiny, said, samples):
    for images in (samples[:6], tuple(samples[:6])):
        found = tiny.caption(images, max_length=10, batch_size=4)
        assert isinstance(found, list)
        assert texts(found) == texts(said)
    assert tiny.caption([]) == []
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in samples[:3]])
    assert texts(tiny.caption(pixels, max_length=10)) == texts(said[:3])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_gives_a_lazy_iterator_that_reads_no_more_than_a_batch_ahead(tiny, said, samples, workers):
    taken: list[Path] = []

    def images() -> Iterator[Path]:
        for path in samples[:6]:
            taken.append(path)
            yield path

    found = tiny.caption(images(), batch_size=2, max_length=10, workers=workers)
    assert isinstance(found, Iterator)
    assert taken == [], "nothing is read before the first caption is asked for"
    captions = []
    for count, caption in enumerate(found, 1):
        captions.append(caption)
        assert len(taken) <= count + 2 - count % 2, "the batch in hand, and nothing of the next"
    assert texts(captions) == texts(said)
    assert len(taken) == 6
    assert texts(tiny.caption({samples[0]: 1}, max_length=10)) == texts(said[:1]), "any iterable is read like that"


def test_images_are_read_by_the_one_reader(tiny, samples):
    picture = Image.open(samples[0]).convert("RGB").resize((40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for ending in ("png", "tiff"):
        lying = io.BytesIO()
        picture.save(lying, ending, exif=exif)
        upright = tiny.caption(picture.transpose(Image.Transpose.ROTATE_270), max_length=12)
        assert tiny.caption(lying.getvalue(), max_length=12) == upright
        assert tiny.caption(Image.open(io.BytesIO(lying.getvalue())), max_length=12) == upright
    assert upright != tiny.caption(picture, max_length=12)
    clear = picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    on = {}
    for colour in ("white", "black", "#ff0000"):
        canvas = Image.new("RGB", picture.size, colour)
        canvas.paste(clear, mask=clear.getchannel("A"))
        on[colour] = tiny.caption(canvas, max_length=12)
        data = io.BytesIO()
        clear.save(data, "PNG")
        assert tiny.caption(clear, alpha=colour, max_length=12) == on[colour]
        assert tiny.caption(data.getvalue(), alpha=colour, max_length=12) == on[colour]
    assert tiny.caption(clear, max_length=12) == on["white"]
    assert len({caption.score for caption in on.values()}) == 3
    assert clear.mode == "RGBA"


def test_a_pil_image_is_left_as_it_is_even_when_it_stands_twice(tiny, samples):
    image = Image.open(samples[0])
    image.info["icc_profile"] = b"mine"
    first, second = tiny.caption([image, image], max_length=10, workers=2)
    assert first.text == second.text
    assert image.info["icc_profile"] == b"mine"


# ---- as the command


def test_captions_are_those_of_the_command(caption, starter, samples):
    rows = caption(
        *samples[:5], "--format", "jsonl", "--batch-size", "2", "--num-beams", "4", "--num-captions", "2"
    ).rows
    found = starter.caption(samples[:5], batch_size=2, num_beams=4, num_captions=2)
    told = [[(one["text"], one["score"]) for one in row["captions"]] for row in rows]
    assert [[(one.text, round(one.score, 3)) for one in each.candidates] for each in found] == told
    drawn = caption(*samples[:3], "--sample", "--seed", "7", "--temperature", "3", "--format", "jsonl").rows
    again = starter.caption(iter(samples[:3]), sample=True, seed=7, temperature=3)
    assert texts(again) == [row["caption"] for row in drawn]


def test_keywords_are_the_options_of_the_command():
    fields = CaptionConfig.model_fields
    expected = {name for name, field in fields.items() if cli_of(field).group in (DECODING, READING)}
    expected = expected - {"recursive", "null"} | {"prompt", "batch_size"}
    assert set(CaptionOptions.__annotations__) == expected


def test_every_option_reaches_the_search(tiny, blip_captioner, samples):
    usual = tiny.caption(samples[:4], num_beams=2, max_length=24)
    for change in (
        {"num_beams": 5},
        {"max_length": 4},
        {"min_length": 24},
        {"length_penalty": -3.0},
        {"early_stopping": True},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 5.0},
        {"num_captions": 2},
    ):
        assert tiny.caption(samples[:4], **{"num_beams": 2, "max_length": 24, **change}) != usual, change
    drawn = tiny.caption(samples[:4], sample=True, max_length=14)
    assert tiny.caption(samples[:4], sample=True, max_length=14) == drawn, "the seed is 0 unless given"
    for change in ({"seed": 1}, {"top_k": 1}, {"top_p": 0.01}, {"temperature": 9.0}):
        assert tiny.caption(samples[:4], sample=True, max_length=14, **change) != drawn, change
    assert tiny.caption(samples[0], num_beams=None, max_length=None) == tiny.caption(samples[0]), "None: not given"
    blip = Captioner.load(blip_captioner, dtype="float32")
    assert blip.caption(samples[0], prompt="two cats").text.startswith("two cats ")


def test_sampling_draws_by_seed_and_content(tiny, samples):
    pixels = np.asarray(Image.open(samples[0]).convert("RGB"))
    options: Any = {"sample": True, "max_length": 12, "temperature": 5.0}
    one = tiny.caption(pixels, **options)
    other = pixels.copy()
    other[0, 0] ^= 1
    assert tiny.caption([other, Image.fromarray(pixels)], **options)[1] == one
    assert tiny.caption(samples[0], **options) == tiny.caption(samples[0].read_bytes(), **options)
    assert tiny.caption(pixels, seed=1, **options) != one


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_beams": 0}, "num_beams: 0 is not allowed: it must be an integer of at least 1"),
        ({"early_stopping": "maybe"}, "early_stopping: 'maybe' is not allowed: it must be one of yes, no, never"),
        ({"num_beams": True}, "num_beams: true is not allowed"),
        ({"batch_size": "some"}, "batch_size: 'some' is not allowed: it must be auto or an integer"),
        ({"alpha": "blue"}, "alpha: 'blue' is not allowed: it must be white, black or #rrggbb"),
        ({"temperature": float("nan")}, "temperature: NaN is not allowed"),
        ({"top_p": 0.5}, "top_p needs sample=True"),
        ({"sample": True, "num_beams": 2}, "sample=True and num_beams exclude each other"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 is above max_length=8"),
        (
            {"num_captions": 3},
            "num_captions=3 needs as many beams, and the search has 1; add num_beams=3, or sample=True",
        ),
        ({"max_length": 65}, "max_length=65 is beyond the 64 positions of"),
        ({"prompt": "a cat"}, "{name} takes no prompt; leave out prompt"),
    ],
)
def test_options_that_cannot_work_are_refused_by_their_keyword_before_anything_is_read(tiny, keywords, words):
    with pytest.raises(UsageError) as caught:
        tiny.caption((Path("missing.png") for _ in [1]), **keywords)
    assert str(caught.value).startswith(words.format(name=tiny.name))
    assert "--" not in str(caught.value)


def test_a_prompt_that_leaves_no_room_is_refused(blip_captioner, samples):
    blip = Captioner.load(blip_captioner, dtype="float32")
    with pytest.raises(UsageError, match="prompt has 6 tokens with the start token, and max_length=6 counts them"):
        blip.caption(samples[0], prompt="a b c d e", max_length=6)


def test_an_unknown_keyword_is_a_type_error(tiny, samples):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'num_beam'; did you mean num_beams\?"):
        tiny.caption(samples[0], num_beam=4)
    with pytest.raises(TypeError, match="'model'"):
        tiny.caption(samples[0], model="starter")


# ---- errors of images


@pytest.mark.parametrize(
    ("image", "words", "kind"),
    [
        ("missing.png", "images[1]|missing.png: no such file", "missing"),
        ("ftp://me:secret@127.0.0.1/a.png", "ftp://***@127.0.0.1/a.png: has the scheme 'ftp'", "url"),
        (b"", "images[1]: the file is empty", "empty"),
        (b"nonsense", "images[1]: is no image", "not-an-image"),
        (np.zeros((4, 4, 3), np.float32), "images[1]: is an array of float32 (4, 4, 3)", "unsupported"),
        (np.zeros((4, 4), np.uint8), "images[1]: is an array of uint8 (4, 4)", "unsupported"),
        (Image.new("RGB", (0, 4)), "images[1]: has no pixels", "empty"),
        (
            Image.new("RGB", (200, 200)),
            "images[1]: has 40,000 pixels; the limit is 39,999; raise max_pixels",
            "too-large",
        ),
        (7, "images[1]: is no image but of the type int", "unsupported"),
        (None, "images[1]: is no image but of the type NoneType", "unsupported"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value.partition(":")[0],
)
def test_the_error_of_an_image_names_it(tiny, said, samples, image, words, kind):
    with pytest.raises(InputError) as caught:
        tiny.caption([samples[0], image, samples[1]], max_pixels=39_999)
    assert str(caught.value).startswith(words.rpartition("|")[2])
    assert caught.value.kind == kind
    stream = tiny.caption(iter([samples[0], image, samples[1]]), batch_size=3, max_pixels=39_999, max_length=10)
    assert next(stream).text == said[0].text, "what stands before it comes out"
    with pytest.raises(InputError):
        next(stream)


def test_an_image_alone_and_one_that_cannot_be_fetched(tiny, served):
    with pytest.raises(InputError, match=r"^the image: is no image"):
        tiny.caption(b"nonsense")
    with pytest.raises(InputError) as caught:
        tiny.caption(f"{served}/missing.png")
    assert caught.value.kind == "url-status"
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match=r"was not fetched within 0\.2 seconds"):
        tiny.caption(f"{served}/slow.png", url_timeout=0.2)
    with pytest.raises(InputError, match="has more than 1,000,000 bytes"):
        tiny.caption(f"{served}/large.png", url_max_mb=1)


def test_a_cut_pil_image_is_damaged_input(tiny, samples):
    cut = Image.open(io.BytesIO(samples[0].read_bytes()[:400]))
    with pytest.raises(InputError, match="the image: cannot be decoded") as caught:
        tiny.caption(cut)
    assert caught.value.kind == "damaged"


def test_what_holds_no_images_is_a_usage_error(tiny):
    for value in (3.5, io.BytesIO(b"x"), torch.zeros(8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(UsageError, match=f"{type(value).__name__} is no image and holds none; an image is a path"):
            tiny.caption(value)


def test_captions_before_a_source_that_fails_still_come(tiny, samples):
    def source():
        yield from samples[:3]
        raise OSError("the disk is gone")

    found = tiny.caption(source(), batch_size=2)
    assert [next(found), next(found), next(found)] == tiny.caption(samples[:3], batch_size=2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


# ---- the same input, the same output


def test_low_precision_captions_depend_on_neither_batch_mates_nor_place(samples):
    low = Captioner.load("starter", dtype="bfloat16", device="cpu")
    straight = low.caption(samples[:5], batch_size=4)
    turned = low.caption(samples[:5][::-1], batch_size=4)
    assert turned[::-1] == straight
    assert list(low.caption(iter(samples[:5]), batch_size=4)) == straight
    assert list(low.caption(iter(samples[4:5]), batch_size=4)) == straight[4:], (
        "a lazy batch has the batch size's shape"
    )


@pytest.mark.parametrize(("dtype", "lazy_rows"), [("bfloat16", [3, 3]), ("float32", [3, 1])])
def test_batches_have_one_shape_where_kernels_ask_for_it(tiny_captioner, samples, monkeypatch, dtype, lazy_rows):
    low = Captioner.load(tiny_captioner, dtype=dtype, device="cpu")
    rows: list[int] = []
    generate = low._captioner.generate

    def listening(pixels: np.ndarray, *rest: Any) -> Any:
        rows.append(len(pixels))
        return generate(pixels, *rest)

    monkeypatch.setattr(low._captioner, "generate", listening)
    for images, batch, expected in (
        (samples[:4], 3, [3, 3]),
        (samples[:2], 3, [2]),
        (samples[0], 3, [1]),
        (iter(samples[:4]), 3, lazy_rows),
    ):
        rows.clear()
        captions = low.caption(images, batch_size=batch)
        assert len([captions] if isinstance(captions, Caption) else list(captions)) in (1, 2, 4)
        assert rows == expected
