"""What the tests of generation share: the command as its users run it, and a pipeline that only these tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbcap.cli.app import run as command
from dbcap.testing.diffusion import write_diffusion

QUICK = ["--steps", "3", "--guidance", "2", "--dtype", "float32", "--no-progress"]


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose denoiser takes a mask."""
    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "inpainting", inpaints=True)


class Generate:
    """`dbcap generate` in an empty folder, quickly, by a tiny model if no other is named."""

    def __init__(self, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._model, self._capfd = model, capfd

    def __call__(self, *words: str, model: Path | str | None = "") -> tuple[int, list[str], str]:
        """Run it, with None without a model; returns exit code, lines of stdout and stderr."""
        chosen = [] if model is None else ["--model", str(model or self._model)]
        code = command(["generate", *chosen, *QUICK, *words])
        out, err = self._capfd.readouterr()
        return code, out.splitlines(), err

    def refused(self, *words: str, model: Path | str | None = "") -> str:
        """Return the one line of a run that is refused as wrong usage and prints nothing."""
        code, lines, err = self(*words, model=model)
        assert (code, lines, err.count("\n")) == (2, [], 1)
        assert "None" not in err
        return err


@pytest.fixture
def generate(home, tiny_diffusion, tmp_path, monkeypatch, capfd) -> Generate:
    """The command, in an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Generate(tiny_diffusion, capfd)
