"""Token ids of the captioning engine against those of transformers' `generate`: every difference, and what explains it.

A case is one image under one setting. In float32 a difference is explained by a tie within 1e-5. In bfloat16 two passes
of the same weights differ by rounding; how much is measured on transformers alone: the largest difference between the
score that its bfloat16 pass gives a caption of its own and the score that a float32 pass of the same bfloat16 weights
gives it. Two captions whose float32 scores are within twice that (for greedy ones: two tokens, at the first place where
they differ) may change places. A caption may also be lost on the way, when a beam is dropped; then a float32 search
whose log-probabilities are moved at random, by the measured deviation, must find both captions.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from explain import Judge, Tokens, Verdict
from PIL import Image

import dbcap_starter
from dbcap.captioning import captioner
from dbcap.captioning.decoding import Decoding
from dbcap.captioning.engines.torch import TorchEngine
from dbcap.events import Silent
from dbcap.models import hub
from dbcap.models.device import Choice
from dbcap.testing.models import write_published_layout

SHARED = Path(os.environ.get("DBCAP_SHARED") or Path(__file__).parents[3] / "shared")
AT_LEAST = 0.98
"""Of cases in bfloat16 that must be equal."""
RULES: dict[str, dict[str, Any]] = {
    "no rule": {},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "repetition_penalty 1.5": {"repetition_penalty": 1.5},
    "repetition_penalty 0.8": {"repetition_penalty": 0.8},
    "min_length 16": {"min_length": 16},
}
RULES_OF_BEAMS: dict[str, dict[str, Any]] = {
    "length_penalty 2": {"length_penalty": 2.0},
    "length_penalty 0": {"length_penalty": 0.0},
    "length_penalty -1": {"length_penalty": -1.0},
    "early_stopping": {"early_stopping": True},
    "early_stopping never": {"early_stopping": "never"},
}
CANDIDATES = "as many candidates as beams"


@dataclass(frozen=True)
class Setting:
    """How images are captioned, and the first how many of them."""

    rule: str
    decoding: Decoding
    images: int


@dataclass(frozen=True)
class Work:
    """A model, its images and how many of them a setting gets."""

    name: str
    folder: Path
    images: list[Image.Image]
    main: int
    """Images without a rule."""
    crossed: int
    """Images with a rule."""
    beams: tuple[int, ...]
    """With rules."""
    batch: int


@dataclass(frozen=True)
class Difference:
    """One caption that is not `generate`'s."""

    rule: str
    beams: int
    image: int
    rank: int
    ours: Tokens
    theirs: Tokens
    texts: tuple[str, str]
    verdict: Verdict


@dataclass(frozen=True)
class Result:
    """What came of a setting."""

    setting: Setting
    equal: int
    best_equal: int
    """Images whose best caption is equal, whatever the other candidates are."""
    distinct: int
    bound: float
    differences: list[Difference]


def measure() -> dict[str, Any]:
    """Compare both models in both precisions."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines, rows, found = [], [], []
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as place:
        for work in _works(Path(place)):
            for dtype in ("float32", "bfloat16"):
                start = time.monotonic()
                results = list(_compare(work, dtype, Path(place) / "home"))
                title = f"{work.name}, {dtype}"
                lines += ["", *_table(title, results, time.monotonic() - start), *_listed(results, dtype)]
                rows += _rows(title, dtype, results)
                found.append(_as_json(work, dtype, results))
    return {"models": found, "rows": rows, "text": [_images_line(), *lines]}


# ---- what is captioned


def _images_line() -> str:
    if SHARED.is_dir():
        return f"Images: the composites of {SHARED} and seeded random crops of its photos."
    return f"There is no folder {SHARED}: the images are the samples of dbcap-starter and random crops of them."


def _works(place: Path) -> Iterator[Work]:
    """Yield the starter model, then one of full shape with random weights: write_published_layout scales them."""
    images = _images(1000)
    starter = Path(dbcap_starter.__file__).parent / "captioner"
    yield Work("starter", starter, images, main=1000, crossed=200, beams=(1, 2, 3, 4, 5), batch=50)
    tokenizer = SHARED / "tokenizers" / "gpt2" / "tokenizer.json"
    words = {"tokenizer": tokenizer} if tokenizer.is_file() else {}
    folder = write_published_layout(place / "full", tiny=False, **words)
    few = images[::125]
    yield Work("full shape, random weights", folder, few, main=8, crossed=4, beams=(1, 4), batch=8)


def _images(count: int) -> list[Image.Image]:
    """Return whole pictures, at most half of them, and then crops, in mixed order."""
    if SHARED.is_dir():
        whole = sorted((SHARED / "starter" / "composites").glob("*.png"))[: count // 2]
        sources = sorted((SHARED / "photos").glob("*/*.jpg"))
    else:
        whole = sources = sorted(dbcap_starter.samples().glob("*.png"))
    random = np.random.default_rng(0)
    images = [Image.open(path).convert("RGB") for path in whole]
    pictures = [Image.open(path).convert("RGB") for path in sources]
    for number in range(count - len(images)):
        picture = pictures[number % len(pictures)]
        side = int(random.integers(min(picture.size) // 8, min(picture.size) + 1))
        left, top = (int(random.integers(0, size - side + 1)) for size in picture.size)
        images.append(picture.crop((left, top, left + side, top + side)))
    return [images[number] for number in random.permutation(count)]


def _settings(work: Work) -> Iterator[Setting]:
    base = Decoding(max_length=20)
    for beams in range(1, 6):
        yield Setting("no rule", replace(base, num_beams=beams), work.main)
        if beams > 1:
            yield Setting(CANDIDATES, replace(base, num_beams=beams, num_captions=beams), work.main)
    for beams in work.beams:
        for rule, options in (RULES | (RULES_OF_BEAMS if beams > 1 else {})).items():
            if options:
                yield Setting(rule, replace(base, num_beams=beams, **options), work.crossed)


# ---- the comparison


def _compare(work: Work, dtype: str, home: Path) -> Iterator[Result]:
    local = hub.locate(str(work.folder), offline=True, events=Silent(), home=home)
    ours = captioner.load(local, Choice("cpu", dtype, work.batch, torch.get_num_threads(), (), "any"), Silent())
    kind = transformers.VisionEncoderDecoderModel
    plain = kind.from_pretrained(local.folder, dtype=getattr(torch, dtype))
    # The same weights, as bfloat16 rounded them, in float32 arithmetic.
    exact, taken = (kind.from_pretrained(local.folder, dtype=getattr(torch, dtype)).float() for _ in range(2))
    special = ours._special()
    judge = Judge(exact, TorchEngine(taken), special)
    pixels = np.stack([ours.prepare(image) for image in work.images])
    for setting in _settings(work):
        decoding, batches = setting.decoding, range(0, setting.images, work.batch)
        mine: list[list[Tokens]] = []
        theirs: list[list[Tokens]] = []
        for start in batches:
            batch = pixels[start : min(start + work.batch, setting.images)]
            mine += [[one.tokens for one in row] for row in ours.search(batch, decoding, [0] * len(batch))]
            theirs += _generate(plain, batch, decoding, special)
        result = _result(ours, judge, plain, pixels, setting, mine, theirs)
        about = f"{work.name}, {dtype}, {setting.rule}, {decoding.num_beams} beams"
        print(f"{about}: {result.equal} of {setting.images} equal", file=sys.stderr, flush=True)
        yield result


def _generate(plain: Any, pixels: np.ndarray, decoding: Decoding, special: Any) -> list[list[Tokens]]:
    """Let transformers caption pixels (B, 3, H, W)."""
    options: dict[str, Any] = {
        name: value
        for name, value in asdict(decoding).items()
        if value is not None and name not in ("sample", "num_captions", "prompt")
    }
    if decoding.num_beams == 1:
        del options["early_stopping"]
    config = transformers.GenerationConfig(
        do_sample=False,
        num_return_sequences=decoding.num_captions,
        decoder_start_token_id=special.start,
        eos_token_id=list(special.ends),
        pad_token_id=special.pad,
        **options,
    )
    rows = plain.generate(torch.from_numpy(pixels).to(plain.dtype), generation_config=config).tolist()
    cut = [_up_to_end(row, special.ends) for row in rows]
    return [cut[start : start + decoding.num_captions] for start in range(0, len(cut), decoding.num_captions)]


def _up_to_end(row: list[int], ends: tuple[int, ...]) -> Tokens:
    stop = next((place + 1 for place, token in enumerate(row) if place and token in ends), len(row))
    return tuple(row[:stop])


def _result(
    ours: Any,
    judge: Judge,
    plain: Any,
    pixels: np.ndarray,
    setting: Setting,
    mine: list[list[Tokens]],
    theirs: list[list[Tokens]],
) -> Result:
    decoding = setting.decoding
    differing = [number for number, (one, two) in enumerate(zip(mine, theirs, strict=True)) if one != two]
    rounding = judge.rounding(plain, pixels[: setting.images], theirs, decoding) if differing else None
    differences = []
    for number in differing:
        assert rounding is not None
        for rank, verdict in judge.differences(pixels[number], mine[number], theirs[number], decoding, rounding):
            pair = mine[number][rank], theirs[number][rank]
            texts = ours.text(pair[0]), ours.text(pair[1])
            differences.append(Difference(setting.rule, decoding.num_beams, number, rank, *pair, texts, verdict))
    return Result(
        setting,
        equal=len(mine) - len(differing),
        best_equal=sum(one[0] == two[0] for one, two in zip(mine, theirs, strict=True)),
        distinct=len({row[0] for row in theirs}),
        bound=0.0 if rounding is None else (rounding.token if decoding.num_beams == 1 else rounding.score),
        differences=differences,
    )


# ---- what is said of it


def _table(title: str, results: list[Result], seconds: float) -> list[str]:
    """Return equal cases by rule and number of beams."""
    cells: dict[str, dict[int, str]] = {}
    for one in results:
        beams = one.setting.decoding.num_beams
        cells.setdefault(one.setting.rule, {})[beams] = f"{one.equal:,}/{one.setting.images:,}"
    distinct = results[0].distinct
    return [
        f"{title} ({seconds / 60:.1f} min; {distinct} different greedy captions of {results[0].setting.images} images)",
        "",
        "| cases equal | greedy | 2 beams | 3 | 4 | 5 |",
        "|---|---|---|---|---|---|",
        *(f"| {rule} | {' | '.join(row.get(beams, '') for beams in range(1, 6))} |" for rule, row in cells.items()),
        "",
    ]


def _listed(results: list[Result], dtype: str) -> list[str]:
    """Return a line for each difference in float32 and each that nothing explains; the others by kind."""
    every = [one for result in results for one in result.differences]
    lines = []
    for one in every:
        verdict = one.verdict
        if dtype == "float32" or not verdict.why:
            what = f"{one.rule}, {one.beams} beams, image {one.image}, rank {one.rank}"
            gap = f"{verdict.ours:.6f} and {verdict.theirs:.6f}"
            lines.append(f"{what}: {verdict.why or 'NOT EXPLAINED'}: {one.ours} and {one.theirs} score {gap}")
    for why in ("a tie", "a tie on the way"):
        if some := [one.verdict for one in every if one.verdict.why == why]:
            gaps = sorted(abs(one.ours - one.theirs) / one.bound for one in some)
            middle, most = gaps[len(gaps) // 2], gaps[-1]
            lines.append(f"{len(some)} captions: {why}; gap over bound {middle:.2f} in the middle, {most:.2f} at most")
    return lines or ["no difference"]


def _rows(title: str, dtype: str, results: list[Result]) -> list[dict[str, Any]]:
    cases = sum(one.setting.images for one in results)
    best = sum(one.best_equal for one in results)
    unexplained = sum(not one.verdict.why for result in results for one in result.differences)
    equal = sum(one.equal for one in results)
    rows: list[dict[str, Any]] = [
        {
            "what": f"{title}: captions differ without a tie",
            "value": f"{unexplained}",
            "ratio": unexplained,
            "at_most": 0,
        }
    ]
    if dtype == "bfloat16":
        for what, count in (("the best caption is equal", best), ("all candidates are equal", equal)):
            share = f"{count:,}/{cases:,}"
            rows.append({"what": f"{title}: {what}", "value": share, "ratio": count / cases, "at_least": AT_LEAST})
    return rows


def _as_json(work: Work, dtype: str, results: list[Result]) -> dict[str, Any]:
    settings = [
        {
            "rule": one.setting.rule,
            "beams": one.setting.decoding.num_beams,
            "candidates": one.setting.decoding.num_captions,
            "images": one.setting.images,
            "equal": one.equal,
            "best_equal": one.best_equal,
            "bound": one.bound,
        }
        for one in results
    ]
    differences = [asdict(one) for result in results for one in result.differences]
    return {"model": work.name, "dtype": dtype, "settings": settings, "differences": differences}
