"""Figures in files: the same bytes each time, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from figure_data import make_results

from clo.errors import CloError
from clo_plots.stalls import plot_stalls
from clo_plots.style import save_figure


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_same_figure_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for path in paths:
        save_figure(plot_stalls(make_results()), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["figure", "figure.jpg", "figure.png.gz"])
def test_another_suffix_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(CloError, match=r"must be one of \.png, \.svg, \.pdf"):
        save_figure(plot_stalls(make_results()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, figure = tmp_path / "figure.png", plot_stalls(make_results())
    path.write_bytes(b"old")

    def fail(file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(CloError, match="No space left"):
        save_figure(figure, path)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("figure.png", b"old")]


def test_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_figure(plot_stalls(make_results()), tmp_path / "figure.svg")
    assert dict(matplotlib.rcParams) == before
