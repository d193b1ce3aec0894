"""The contract of transformers v4's `image-to-text` pipeline, one named row a line, held against plain `generate`."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset
from transformers import GenerationConfig
from transformers.pipelines.pt_utils import KeyDataset

import dbcap_starter
from dbcap import pipeline
from dbcap.errors import InputError, ModelError, UsageError

STARTER = Path(dbcap_starter.__file__).parent / "captioner"
KINDS = ("vit-gpt2", "published", "starter", "blip", "git")
CLASSES = {"blip": transformers.BlipForConditionalGeneration, "git": transformers.GitForCausalLM}


@dataclass
class Plain:
    """A model used as its card says: `generate` and `tokenizer.decode`, one image at a time."""

    kind: str
    folder: Path

    def __post_init__(self) -> None:
        auto = CLASSES.get(self.kind, transformers.VisionEncoderDecoderModel)
        self.model = auto.from_pretrained(self.folder, dtype=torch.float32)
        self.processor = transformers.AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)

    def __call__(self, image: Path | Image.Image, prompt: str | None = None, **options: Any) -> list[str]:
        picture = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
        pixels = self.processor(images=picture, return_tensors="pt")["pixel_values"]
        inputs = {"pixel_values": pixels, **self.inputs_of(prompt)}
        output = self.model.generate(**inputs, **options)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in output]

    def inputs_of(self, prompt: str | None) -> dict[str, Any]:
        if prompt is None:
            return {}
        if self.kind == "git":
            ids = [self.tokenizer.cls_token_id, *self.tokenizer(prompt, add_special_tokens=False).input_ids]
            return {"input_ids": torch.tensor([ids])}
        return dict(self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))


class Bench:
    """What the rows of the contract work with."""

    def __init__(self, folders: dict[str, Path], images: list[Path], url: str, tmp: Path) -> None:
        self.folders, self.images, self.url, self.tmp = folders, images, url, tmp
        self.image = images[0]
        self._made: dict[Any, Any] = {}

    def pipe(self, kind: str = "vit-gpt2", **settings: Any) -> Any:
        """Return a pipeline; those without settings of their own are loaded once."""
        key = ("pipe", kind)
        if settings or key not in self._made:
            made = pipeline("image-to-text", model=str(self.folders[kind]), device="cpu", **settings)
            return made if settings else self._made.setdefault(key, made)
        return self._made[key]

    def plain(self, kind: str = "vit-gpt2") -> Plain:
        key = ("plain", kind)
        if key not in self._made:
            self._made[key] = Plain(kind, self.folders[kind])
        return self._made[key]

    def with_config(self, name: str, **changes: Any) -> Path:
        """Return a copy of the tiny model with another generation_config.json."""
        folder = self.tmp / name
        if not folder.exists():
            shutil.copytree(self.folders["vit-gpt2"], folder)
            path = folder / "generation_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder


@pytest.fixture(scope="module")
def url(served) -> str:
    """A server of the first sample."""
    return served.replace("me:secret@", "")


@pytest.fixture(scope="module")
def bench(
    tiny_captioner, published_model, blip_captioner, git_captioner, samples, url, tmp_path_factory
) -> Iterator[Bench]:
    torch.set_num_threads(1)
    folders = (tiny_captioner, published_model, STARTER, blip_captioner, git_captioner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCAP_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("no_proxy", "*")
        tmp = tmp_path_factory.mktemp("models")
        yield Bench(dict(zip(KINDS, folders, strict=True)), list(samples[:5]), url, tmp)


ROWS: dict[str, Callable[[Bench], None]] = {}


def row(name: str) -> Callable[[Callable[[Bench], None]], None]:
    def add(check: Callable[[Bench], None]) -> None:
        assert name not in ROWS
        ROWS[name] = check

    return add


@contextlib.contextmanager
def searched_by_dbcap(pipe: Any) -> Iterator[list[int]]:
    """Let transformers' `generate` be an error; yields the rows of each batch that is searched."""

    def refuse(*_: object) -> None:
        raise AssertionError("transformers generates")

    rows: list[int] = []
    search = pipe._captioner.search

    def listening(pixels: Any, *rest: Any) -> Any:
        rows.append(len(pixels))
        return search(pixels, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "_generate", refuse)
        patch.setattr(pipe._captioner, "search", listening)
        yield rows


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """Yield what is written to a log, as it comes."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


def rows_of(*captions: list[str]) -> list[list[dict[str, str]]]:
    return [[{"generated_text": text} for text in each] for each in captions]


# ---- the factory


@row("pipeline(task, model=...) and pipeline(model=...) give the same, on the CPU or the GPU, in float32")
def _(b: Bench) -> None:
    pipe = pipeline(model=b.folders["vit-gpt2"])
    assert pipe.task == "image-to-text"
    assert pipe(str(b.image)) == b.pipe()(str(b.image))
    assert pipe.dtype == pipe.torch_dtype == pipe.model.dtype == torch.float32
    low = b.folders["starter"]
    assert json.loads((low / "config.json").read_text())["dtype"] == "float16", "the file's format does not decide"
    assert b.pipe("starter").dtype == torch.float32
    assert pipe.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(pipe.model, transformers.VisionEncoderDecoderModel)
    assert pipe.tokenizer.decode([]) == ""
    assert pipe.image_processor.size["height"] == 32


@row("the starter's name, a Path and a hub name with revision= are models too")
def _(b: Bench) -> None:
    assert pipeline("image-to-text", "starter")(str(b.image)) == b.pipe("starter")(str(b.image))
    with pytest.raises(ModelError, match="org/name@v1 is not in the cache, and --offline"):
        pipeline("image-to-text", "org/name", revision="v1", offline=True)


@row("torch_dtype= and dtype= take torch's dtypes and their names")
def _(b: Bench) -> None:
    for given in ({"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}):
        assert b.pipe(**given).model.dtype == torch.bfloat16
    assert b.pipe(dtype="auto").dtype == torch.float32, "what dbcap chooses for a tiny model"
    with pytest.raises(UsageError, match="dtype and torch_dtype differ"):
        b.pipe(dtype="float32", torch_dtype=torch.float16)
    with pytest.raises(UsageError, match="there is no dtype 'float8'"):
        b.pipe(dtype="float8")


@row("device= takes a number, a name and a torch.device")
def _(b: Bench) -> None:
    for given in (-1, "cpu", torch.device("cpu")):
        pipe = pipeline("image-to-text", str(b.folders["vit-gpt2"]), device=given)
        assert pipe.device == torch.device("cpu") == pipe.model.device
    if not torch.cuda.is_available():
        assert pipeline("image-to-text", str(b.folders["vit-gpt2"]), device=0).device.type in ("cpu", "mps")
    with pytest.raises(UsageError, match="there is no device 'gpu'"):
        pipeline("image-to-text", str(b.folders["vit-gpt2"]), device="gpu")


@row("tokenizer= and image_processor= are used; the model's own name stands for them")
def _(b: Bench) -> None:
    plain, name = b.plain(), str(b.folders["vit-gpt2"])

    class Loud:
        def decode(self, *args: Any, **options: Any) -> str:
            return plain.tokenizer.decode(*args, **options).upper()

    assert b.pipe(tokenizer=Loud())(str(b.image)) == rows_of([plain(b.image, max_length=64)[0].upper()])[0]
    assert b.pipe(tokenizer=name, image_processor=name)(str(b.image)) == b.pipe()(str(b.image))
    dark = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    pipe = b.pipe(image_processor=dark)
    assert pipe.image_processor is dark
    assert pipe(str(b.image)) != b.pipe()(str(b.image))
    with pytest.raises(UsageError, match="tokenizer='gpt2' is not the model's"):
        b.pipe(tokenizer="gpt2")


@row("a transformers model with tokenizer= and image_processor= (once feature_extractor=) is used as it is")
def _(b: Bench) -> None:
    for kind in ("vit-gpt2", "blip", "git"):
        plain = Plain(kind, b.folders[kind])
        parts = {"tokenizer": plain.tokenizer, "image_processor": plain.processor}
        pipe = pipeline("image-to-text", model=plain.model, device=-1, max_new_tokens=12, **parts)
        assert (pipe.model, pipe.tokenizer, pipe.image_processor) == (plain.model, *parts.values())
        assert pipe([str(path) for path in b.images]) == b.pipe(kind)(
            [str(path) for path in b.images], max_new_tokens=12
        )
        several = {"num_beams": 3, "num_return_sequences": 2}
        expected = [plain(path, max_new_tokens=12, **several) for path in b.images]
        assert pipe([str(path) for path in b.images], generate_kwargs=several, batch_size=2) == rows_of(*expected)
    old = pipeline(model=plain.model, tokenizer=plain.tokenizer, feature_extractor=plain.processor, device="cpu")
    assert old(str(b.image), prompt="two cats") == b.pipe("git")(str(b.image), prompt="two cats")
    with torch.no_grad():
        for weight in plain.model.parameters():
            weight.mul_(-1.0)
    assert old(str(b.image)) == rows_of(plain(b.image, max_length=64))[0] != b.pipe("git")(str(b.image))
    with pytest.raises(UsageError, match="a model object comes alone"):
        pipeline("image-to-text", model=plain.model)
    with pytest.raises(UsageError, match="the model is in float32, not float16"):
        pipeline("image-to-text", model=plain.model, dtype=torch.float16, **parts)
    with pytest.raises(UsageError, match="Linear captions no images here"):
        pipeline("image-to-text", model=torch.nn.Linear(1, 1), **parts)


@row("another task is an error that names image-to-text, and so is a model that captions nothing")
def _(b: Bench) -> None:
    for task in ("image-to-txt", "text-generation", "nlpconnect/vit-gpt2-image-captioning"):
        with pytest.raises(UsageError, match=f"there is no task '{task}': the only one is 'image-to-text'"):
            pipeline(task, model=str(b.folders["vit-gpt2"]))
    folder = b.with_config("bert")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="a model of type bert, which captions no images"):
        pipeline(model=str(folder))


@row("what every call shall use is given once: max_new_tokens, generate_kwargs, batch_size, num_beams ...")
def _(b: Bench) -> None:
    paths = [str(path) for path in b.images]
    beams = [b.plain()(path, num_beams=3, max_new_tokens=9) for path in b.images]
    for given in (
        {"num_beams": 3, "max_new_tokens": 9},
        {"generate_kwargs": {"num_beams": 3}, "max_new_tokens": 9, "batch_size": 2, "num_workers": 2},
        {"num_beams": 3, "max_length": 10},
    ):
        pipe = b.pipe(**given)
        assert pipe(paths) == rows_of(*beams)
        assert pipe(paths, generate_kwargs={"num_beams": 1}) == b.pipe()(paths, max_new_tokens=9), (
            "a call has the last word"
        )
    with pytest.raises(TypeError, match="unexpected keyword argument 'trust_remote_code'"):
        b.pipe(trust_remote_code=True)


# ---- inputs


@row("inputs: a path, a URL, base64, a data: URI, a PIL image")
def _(b: Bench) -> None:
    text = base64.encodebytes(b.image.read_bytes()).decode()
    plain = text.replace("\n", "")
    expected = rows_of(b.plain()(b.image, max_length=64))[0]
    kinds = [str(b.image), f"{b.url}/0.png", text, plain, f"data:image/png;base64,{plain}", Image.open(b.image)]
    for image in kinds:
        assert b.pipe()(image) == expected
        assert b.pipe()(images=image) == expected, "the old keyword"
    assert b.pipe()(kinds) == [expected] * len(kinds)


@row("inputs=None: ValueError")
def _(b: Bench) -> None:
    for call in ({}, {"inputs": None}, {"images": None}):
        with pytest.raises(ValueError, match=r"^Cannot call the image-to-text pipeline without an inputs argument!$"):
            b.pipe()(**call)


@row("inputs of other types: TypeError, be they single, in a list, or in a stream")
def _(b: Bench) -> None:
    words = (
        "^Incorrect format used for image. Should be an url linking to an image, a base64 string, a local path, or a"
    )
    for image in (7, b"bytes", (str(b.image),), {"image": str(b.image)}, [str(b.image)]):
        for call in (image, [image]) if not isinstance(image, list) else ([image],):
            with pytest.raises(TypeError, match=words) as caught:
                b.pipe()(call)
            assert isinstance(caught.value, InputError)
    with pytest.raises(TypeError, match=words):
        list(b.pipe()(iter([None])))


@row("a missing file, and a text that is no image: ValueError")
def _(b: Bench) -> None:
    words = (
        "^Incorrect image source. Must be a valid URL starting with `http://` or `https://`, a valid path to an image"
        " file, or a base64 encoded string. Got {}"
    )
    long = "A" * 1000
    for text in ("missing.png", str(b.tmp), "data:image/png;base64,AAAA", "data:image/png", "", "ü", long):
        shown = text if len(text) < 200 else "A" * 200 + "\\.\\.\\."
        with pytest.raises(ValueError, match=words.format(shown)) as caught:
            b.pipe()(text)
        assert isinstance(caught.value, InputError)
        assert len(str(caught.value)) < 600
    cut = base64.b64encode(b.image.read_bytes()[:300]).decode()
    with pytest.raises(ValueError, match="Failed with is truncated"):
        b.pipe()(cut)


@row("a file that is no image, and a URL that cannot be fetched: UnidentifiedImageError, with the name")
def _(b: Bench) -> None:
    path = b.tmp / "broken.png"
    path.write_bytes(b.image.read_bytes()[:200])
    with pytest.raises(UnidentifiedImageError, match=r"\.\.\.: the model's processor refuses it: not that one$"):
        b.pipe(image_processor=_Refusing())(_base64(b.image))
    for image, words in ((str(path), "broken.png: is truncated"), (f"{b.url}/missing.png", "the server answered 404")):
        with pytest.raises(UnidentifiedImageError, match=words) as caught:
            b.pipe()(image)
        assert isinstance(caught.value, InputError)
        assert image in str(caught.value)


class _Refusing:
    """An image processor that takes no image."""

    def __call__(self, **_: object) -> None:
        raise ValueError("not that one")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@row("images are turned as their EXIF says and made RGB; what is transparent lies on white")
def _(b: Bench) -> None:
    picture = Image.open(b.image).convert("RGB").resize((40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = b.tmp / "lying.jpg"
    picture.save(path, exif=exif, quality=100, subsampling=0)
    upright = Image.open(path).transpose(Image.Transpose.ROTATE_270)
    expected = rows_of(b.plain()(upright, max_length=64))[0]
    assert b.pipe()(str(path)) == b.pipe()(Image.open(path)) == expected != b.pipe()(picture)
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert b.pipe()(clear) == b.pipe()(Image.new("RGB", (32, 32), "white")) != b.pipe()(clear.convert("RGB"))
    grey = Image.open(b.image).convert("L")
    assert b.pipe()(grey) == rows_of(b.plain()(grey, max_length=64))[0]


@row("timeout= limits the fetching of a URL, and nothing else")
def _(b: Bench) -> None:
    with pytest.raises(InputError, match=r"slow.png: was not fetched within 0\.1 seconds"):
        b.pipe()(f"{b.url}/slow.png", timeout=0.1)
    assert b.pipe()(f"{b.url}/slow.png", timeout=None) == b.pipe()(str(b.image), timeout=1e-9)
    assert b.pipe(timeout=0.1)(f"{b.url}/slow.png", timeout=5) == b.pipe()(str(b.image))
    with pytest.raises(UsageError, match="timeout=0 is not allowed"):
        b.pipe()(str(b.image), timeout=0)


# ---- results


@row("nesting: one image gives a list of dicts, a list one such list each, an empty one nothing")
def _(b: Bench) -> None:
    expected = rows_of(*(b.plain()(path, max_length=64) for path in b.images))
    assert len({str(each) for each in expected}) > 3, "the model says the same of everything"
    assert b.pipe()(str(b.image)) == expected[0]
    assert b.pipe()([str(b.image)]) == expected[:1]
    assert b.pipe()([str(path) for path in b.images]) == expected
    assert b.pipe()([]) == []


@row("a generator gives a lazy iterator, which reads no more than a batch ahead")
def _(b: Bench) -> None:
    taken: list[str] = []

    def stream() -> Iterator[str]:
        for path in b.images:
            taken.append(path.name)
            yield str(path)

    results = b.pipe()(stream(), batch_size=2)
    assert taken == []
    assert next(results) == b.pipe()(str(b.image))
    assert len(taken) == 2
    assert [next(results), *results] == b.pipe()([str(path) for path in b.images[1:]])
    assert list(b.pipe()(map(str, b.images), num_workers=2)) == b.pipe()([str(path) for path in b.images])


@row("a Dataset gives a lazy iterator, with a length where it has one")
def _(b: Bench) -> None:
    taken: list[int] = []

    class Pictures(Dataset):
        def __len__(self) -> int:
            return len(b.images)

        def __getitem__(self, place: int) -> Any:
            taken.append(place)
            return {"image": Image.open(b.images[place]), "path": str(b.images[place])}

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[str]:
            return map(str, b.images)

    expected = b.pipe()([str(path) for path in b.images])
    results = b.pipe()(KeyDataset(Pictures(), "image"), batch_size=2)
    assert (len(results), taken) == (5, [])
    assert next(results) == expected[0]
    assert taken == [0, 1]
    assert list(results) == list(results) == expected, "a loop starts from the beginning"
    assert list(b.pipe()(KeyDataset(Pictures(), "path"))) == list(b.pipe()(Stream(), batch_size=3)) == expected


@row("texts are decoded without special tokens, and not stripped; strip=True strips them")
def _(b: Bench) -> None:
    (one,) = b.pipe()(str(b.image))
    text = one["generated_text"]
    assert [text] == b.plain()(b.image, max_length=64)
    assert text != text.strip()
    assert "endoftext" not in text
    assert b.pipe()(str(b.image), strip=True) == b.pipe(strip=True)(str(b.image)) == [{"generated_text": text.strip()}]


@row("num_return_sequences=n gives n dicts an image, at every batch size")
def _(b: Bench) -> None:
    kwargs = {"num_beams": 4, "num_return_sequences": 3, "max_length": 12}
    expected = rows_of(*(b.plain()(path, **kwargs) for path in b.images))
    assert all(len({row["generated_text"] for row in rows}) == 3 for rows in expected)
    paths = [str(path) for path in b.images]
    assert b.pipe()(paths[0], generate_kwargs=kwargs) == expected[0]
    for size in (1, 2, 5, 8):
        assert b.pipe()(paths, generate_kwargs=kwargs, batch_size=size) == expected
        assert list(b.pipe()(iter(paths), generate_kwargs=kwargs, batch_size=size)) == expected
    kwargs["bad_words_ids"] = [[b.plain().tokenizer(" the").input_ids[0]]]  # which only transformers knows
    expected = rows_of(*(b.plain()(path, **kwargs) for path in b.images))
    assert b.pipe()(paths, generate_kwargs=kwargs, batch_size=2) == expected


@row("batch_size=, 1 unless given, and num_workers= change nothing")
def _(b: Bench) -> None:
    paths = [str(path) for path in b.images]
    for kind in KINDS:
        expected = b.pipe(kind)(paths)
        for size in (2, 5, 16):
            assert b.pipe(kind)(paths, batch_size=size, num_workers=size % 3) == expected
    for wrong in ({"batch_size": 0}, {"num_workers": -1}, {"batch_size": "2"}):
        with pytest.raises(UsageError, match="is not allowed; it is a whole number from"):
            b.pipe()(paths, **wrong)


@row("errors propagate: one bad image ends a list and a stream")
def _(b: Bench) -> None:
    images = [str(b.images[0]), "missing.png", str(b.images[1])]
    with pytest.raises(ValueError, match="Got missing"):
        b.pipe()(images, batch_size=2)
    results = b.pipe()(iter(images), batch_size=3)
    assert next(results) == b.pipe()(images[0])
    with pytest.raises(ValueError, match="Got missing"):
        next(results)


@row('on_error="skip" leaves bad images out and says so in the log, "record" puts their error in their place')
def _(b: Bench) -> None:
    images = [str(b.images[0]), "missing.png", 7, str(b.images[1])]
    good = b.pipe()([images[0], images[3]])
    with logged("dbcap") as said:
        for size in (1, 2, 4):
            said.clear()
            assert b.pipe(on_error="skip")(images, batch_size=size) == good
            assert [line.partition(".")[0] for line in said] == [
                "skipped: Incorrect image source",
                "skipped: Incorrect format used for image",
            ]
            first, second, third, last = b.pipe()(iter(images), batch_size=size, on_error="record")
            assert [first, last] == good
            assert second[0]["generated_text"] is third[0]["generated_text"] is None
            assert "Got missing.png" in second[0]["error"]
            assert "Got <class 'int'>" in third[0]["error"]
        assert b.pipe()("missing.png", on_error="skip") == []
        assert b.pipe()("missing.png", on_error="record") == [second[0]]
    with pytest.raises(UsageError, match="on_error='stop' is not known; use raise, skip, record"):
        b.pipe()(images, on_error="stop")


# ---- generation


@row("every kind of model says what `generate` says by the model's own settings")
def _(b: Bench) -> None:
    for kind in KINDS:
        length = {} if kind == "starter" else {"max_length": 257 if kind == "published" else 64}
        expected = [b.plain(kind)(path, **length) for path in b.images]
        assert b.pipe(kind)([str(path) for path in b.images]) == rows_of(*expected)


@row("max_new_tokens= counts what is made after the start")
def _(b: Bench) -> None:
    for kind in KINDS:
        expected = rows_of(*(b.plain(kind)(path, max_new_tokens=5) for path in b.images))
        assert b.pipe(kind)([str(path) for path in b.images], max_new_tokens=5) == expected
        assert b.pipe(kind)([str(path) for path in b.images], generate_kwargs={"max_new_tokens": 5}) == expected


@row("max_new_tokens= in both places: ValueError")
def _(b: Bench) -> None:
    words = "^`max_new_tokens` is defined both as an argument and inside `generate_kwargs` argument, please use only 1"
    for call in (lambda **given: b.pipe()(str(b.image), **given), b.pipe):
        with pytest.raises(ValueError, match=words):
            call(max_new_tokens=5, generate_kwargs={"max_new_tokens": 5})


@row("256 new tokens, where the model names no length and has so many positions")
def _(b: Bench) -> None:
    assert b.pipe("published").generation_config.max_new_tokens == 256
    (long,) = b.pipe("published")(str(b.image), generate_kwargs={"min_length": 257})
    assert len(b.plain("published").tokenizer(long["generated_text"]).input_ids) == 256
    (short,) = b.pipe()(str(b.image), generate_kwargs={"min_length": 64})
    assert len(b.plain().tokenizer(short["generated_text"]).input_ids) == 63, "64 positions, the start token in one"
    assert b.pipe()(str(b.image), max_new_tokens=1000) == b.pipe()(str(b.image), max_new_tokens=63)
    beyond = {"max_new_tokens": 1000, "bad_words_ids": [[3]]}
    assert b.pipe()(str(b.image), generate_kwargs=beyond) == b.pipe()(str(b.image))


@row("a length of the model's own goes before that, and a call's before both")
def _(b: Bench) -> None:
    for name, own in (("short", {"max_length": 6}), ("made", {"max_new_tokens": 5, "num_beams": 2})):
        pipe = pipeline("image-to-text", str(b.with_config(name, **own)), device=-1)
        assert pipe(str(b.image)) == rows_of(b.plain()(b.image, **own))[0]
        for longer in ({"max_length": 9}, {"max_new_tokens": 8}, {"max_new_tokens": 8, "bad_words_ids": [[3]]}):
            expected = rows_of(b.plain()(b.image, **own | {"max_new_tokens": 8}))[0]
            assert pipe(str(b.image), generate_kwargs=longer) == expected
    assert b.pipe("starter").generation_config.num_beams == 4


@row("generate_kwargs that dbcap's search knows")
def _(b: Bench) -> None:
    for kind in ("vit-gpt2", "blip", "git"):
        usual = [b.plain(kind)(path, max_new_tokens=12, num_beams=2) for path in b.images]
        differ = 0
        for change in (
            {"num_beams": 5},
            {"num_beams": 1},
            {"max_length": 5},
            {"min_length": 13},
            {"min_new_tokens": 12},
            {"length_penalty": -3.0},
            {"early_stopping": True},
            {"early_stopping": "never"},
            {"no_repeat_ngram_size": 1},
            {"repetition_penalty": 5.0},
            {"do_sample": False, "temperature": 0.5, "top_p": 0.5},  # which v4 ignored
        ):
            kwargs = {"max_new_tokens": 12, "num_beams": 2, **change}
            if "max_length" in change:
                del kwargs["max_new_tokens"]
            expected = [b.plain(kind)(path, **kwargs) for path in b.images]
            differ += expected != usual
            with searched_by_dbcap(b.pipe(kind)):
                found = b.pipe(kind)([str(path) for path in b.images], generate_kwargs=kwargs, batch_size=3)
            assert found == rows_of(*expected), (kind, change)
        assert differ >= 5


@row("generate_kwargs that only transformers knows, and values beyond dbcap's bounds")
def _(b: Bench) -> None:
    token = b.plain().tokenizer(" the").input_ids[0]
    for kwargs in (
        {"bad_words_ids": [[token]]},
        {"sequence_bias": {(token,): 9.0}},
        {"repetition_penalty": 200.0},
        {"num_beams": 2, "logits_processor": transformers.LogitsProcessorList([_Shift()])},
    ):
        expected = rows_of(*(b.plain()(path, max_length=12, **kwargs) for path in b.images))
        assert expected != b.pipe()([str(path) for path in b.images], generate_kwargs={"max_length": 12})
        with logged("transformers") as said:
            found = b.pipe()(
                [str(path) for path in b.images], generate_kwargs={"max_length": 12, **kwargs}, batch_size=2
            )
        assert found == expected, kwargs
        assert [line for line in said if line.startswith("Both")] == [], "one length is given, not two"
    for name, value in {"temperature": 0.0, "top_k": -1, "repetition_penalty": 0.0}.items():
        with pytest.raises(ValueError, match=name.rpartition("_")[2]):
            b.pipe()(str(b.image), generate_kwargs={"do_sample": True, name: value})
    for wrong in ({"num_beams": 0}, {"max_new_tokens": 0}, {"nonsense": 1}, {"num_return_sequences": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            b.pipe()(str(b.image), generate_kwargs=wrong)


class _Shift(transformers.LogitsProcessor):
    """Takes from the first half of the vocabulary."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        scores[:, : scores.shape[1] // 2] -= 2
        return scores


@row("sampling: torch.manual_seed decides, and batches change nothing")
def _(b: Bench) -> None:
    paths = [str(path) for path in b.images]
    kwargs = {"do_sample": True, "max_length": 12, "temperature": 2.0, "num_return_sequences": 2}

    def drawn(seed: int, **options: Any) -> Any:
        transformers.set_seed(seed)
        return b.pipe()(paths, generate_kwargs={**kwargs, **options.pop("more", {})}, **options)

    first = drawn(1)
    assert all(len(rows) == 2 for rows in first)
    assert drawn(1, batch_size=2) == drawn(1, batch_size=8) == first
    assert drawn(2) != first
    assert b.pipe()(paths, generate_kwargs=kwargs) != drawn(2), "a second call draws on"
    assert drawn(1, more={"top_k": 1}) == drawn(2, more={"top_k": 1}) != first
    torch.manual_seed(5)
    state = torch.get_rng_state()
    b.pipe()(paths)
    assert torch.equal(torch.get_rng_state(), state), "a search draws nothing"


@row("do_sample with num_beams > 1 is transformers' own, draw for draw")
def _(b: Bench) -> None:
    kwargs = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "max_length": 12}
    transformers.set_seed(3)
    expected = b.plain()(b.image, **kwargs)
    transformers.set_seed(3)
    assert b.pipe()(str(b.image), generate_kwargs=kwargs) == rows_of(expected)[0]
    sampling = pipeline(model=str(b.with_config("sampling", do_sample=True, top_k=0, temperature=3.0)), device=-1)
    transformers.set_seed(3)
    first = sampling(str(b.image))
    assert first != sampling(str(b.image)) != b.pipe()(str(b.image)), "the model's own do_sample holds"


@row("generation_config: the call's goes before the pipeline's, and the pipeline's before the model's")
def _(b: Bench) -> None:
    pipe = pipeline("image-to-text", str(b.with_config("short", max_length=6)), device=-1)
    call = GenerationConfig(max_new_tokens=9, num_beams=3, bad_words_ids=[[5]])
    expected = rows_of(b.plain()(b.image, max_new_tokens=9, num_beams=3))[0]
    assert pipe(str(b.image), generate_kwargs={"generation_config": call}) == expected
    pipe.generation_config.max_length = 10
    pipe.generation_config.num_beams = 3
    assert pipe(str(b.image)) == expected
    pipe.generation_config = GenerationConfig(max_new_tokens=9, num_beams=3)
    assert pipe(str(b.image)) == expected
    pipe.generation_config = GenerationConfig(num_beams=2)
    assert pipe(str(b.image)) == rows_of(b.plain()(b.image, max_length=6, num_beams=2))[0], "the model's own length"
    token = b.plain().tokenizer(" the").input_ids[0]
    pipe.generation_config.sequence_bias = [[[token], 20.0]]
    assert "the the" in pipe(str(b.image))[0]["generated_text"]
    held = pipe(str(b.image), generate_kwargs={"generation_config": GenerationConfig(max_new_tokens=3), "num_beams": 2})
    assert held == rows_of(b.plain()(b.image, max_new_tokens=3, num_beams=2))[0]


# ---- prompts


@row("prompt= for a vision-encoder-decoder: ValueError")
def _(b: Bench) -> None:
    words = "^Model type vision-encoder-decoder does not support conditional text generation$"
    for prompt in ("a photo of", ""):
        with pytest.raises(ValueError, match=words):
            b.pipe()(str(b.image), prompt=prompt)


@row("prompt= for BLIP and GIT begins the caption")
def _(b: Bench) -> None:
    paths = [str(path) for path in b.images]
    for kind in ("blip", "git"):
        for prompt in ("a photo of two cats", ""):
            for kwargs in (
                {},
                {"num_beams": 3, "num_return_sequences": 2},
                {"bad_words_ids": [[5]]},
                {"min_new_tokens": 8},
            ):
                made = rows_of(*(b.plain(kind)(path, prompt, max_new_tokens=9, **kwargs) for path in b.images))
                assert all(row["generated_text"].startswith(prompt) for rows in made for row in rows)
                for size in (1, 3):
                    options: Any = {
                        "prompt": prompt,
                        "generate_kwargs": kwargs,
                        "max_new_tokens": 9,
                        "batch_size": size,
                    }
                    assert b.pipe(kind)(paths, **options) == made
        assert b.pipe(kind, prompt="a photo")(paths[0], max_new_tokens=9) == b.pipe(kind)(
            paths[0], prompt="a photo", max_new_tokens=9
        )
        (long,) = b.pipe(kind)(paths[0], prompt="a photo of two cats", generate_kwargs={"min_length": 64})
        assert len(long["generated_text"].split()) >= 50, "to the last position, and not beyond"
        with pytest.raises(
            UsageError, match="the prompt and the start token are 101 tokens, and a caption may have 64"
        ):
            b.pipe(kind)(paths[0], prompt="a " * 100)


@row("prompt= that is no single text: ValueError")
def _(b: Bench) -> None:
    words = (
        "^Received an invalid text input, got - <class 'list'> - but expected a single string. Note also that one"
        " single text can be provided for conditional image to text generation.$"
    )
    with pytest.raises(ValueError, match=words):
        b.pipe("blip")([str(b.image)], prompt=["a photo of"])


@row("unknown keywords: TypeError, num_beams= among them")
def _(b: Bench) -> None:
    for unknown in ({"text": "a photo of"}, {"num_beams": 4}, {"do_sample": True}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(unknown))}'"):
            b.pipe()(str(b.image), **unknown)


# ---- beyond the contract


@row("in bfloat16 a caption depends on neither batch mates nor place")
def _(b: Bench) -> None:
    pipe = b.pipe("starter", dtype=torch.bfloat16, batch_size=3)
    paths = [str(path) for path in b.images]
    straight = pipe(paths, generate_kwargs={"num_return_sequences": 4})
    assert pipe(paths[::-1], generate_kwargs={"num_return_sequences": 4})[::-1] == straight
    assert list(pipe(iter(paths[4:]), generate_kwargs={"num_return_sequences": 4})) == straight[4:]


@row("batches have one shape where kernels ask for it")
def _(b: Bench) -> None:
    paths = [str(path) for path in b.images[:4]]
    for dtype, lazy in (("bfloat16", [3, 3]), ("float32", [3, 1])):
        pipe = b.pipe(dtype=dtype, batch_size=3)
        for inputs, expected in ((paths, [3, 3]), (paths[:2], [2]), (paths[0], [1]), (iter(paths), lazy)):
            with searched_by_dbcap(pipe) as rows:
                list(pipe(inputs))
            assert rows == expected


@pytest.mark.parametrize("check", ROWS.values(), ids=ROWS)
def test_contract(check, bench):
    check(bench)
