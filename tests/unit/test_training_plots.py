"""Pictures of packed rows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mini_llm.plots import packed_rows
from mini_llm.plots.packed_rows import attention_mask, plot_attention_mask, plot_packing


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def colors_of(path: Path) -> dict[str, int]:
    """How many pixels of a picture have each of the colours that mean something."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    names = {"context": packed_rows.CONTEXT, "supervised": packed_rows.SUPERVISED}
    return {name: int((pixels == rgb(color)).all(-1).sum()) for name, color in names.items()}


def row(lengths: list[int], seq_len: int) -> dict[str, np.ndarray]:
    """A row whose second half of every conversation is supervised."""
    mask = np.zeros(seq_len, bool)
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        mask[start + length // 2 : start + length] = True
    return {"input_ids": np.zeros(seq_len), "doc_lens": np.array(lengths), "loss_mask": mask}


@pytest.mark.parametrize("step", [1, 3])
def test_attention_mask_is_block_diagonal_and_causal_at_every_resolution(step):
    lengths, seq_len = np.array([5, 1, 7]), 17
    document = [*[0] * 5, 1, *[2] * 7, *[None] * 4]
    positions = range(0, seq_len, step)
    expected = [
        [document[i] is not None and document[i] == document[j] and j <= i for j in positions]
        for i in positions
    ]
    assert attention_mask(lengths, seq_len, step).tolist() == expected


def test_packing_picture_shows_the_shares_of_context_and_supervised_tokens(tmp_path):
    # 3/8 context, 3/8 supervised and 1/4 padding; then a row full of supervised tokens alone.
    path = plot_packing(tmp_path, [row([512, 256, 768], 2048)] * 3)
    assert path == tmp_path / "plots" / "packing.png"
    half = colors_of(path)
    assert half["context"] == pytest.approx(half["supervised"], rel=0.05)
    full = row([2048], 2048)
    full["loss_mask"][:] = True
    alone = colors_of(plot_packing(tmp_path, [full] * 3))
    assert alone["context"] < 0.02 * alone["supervised"]  # its place in the legend
    assert half["supervised"] / alone["supervised"] == pytest.approx(3 / 8, rel=0.1)


def test_attention_picture_shows_a_small_part_of_the_square_and_never_builds_it(
    tmp_path, monkeypatch
):
    shapes = []

    def spy(doc_lens, seq_len, step=1):
        mask = attention_mask(doc_lens, seq_len, step)
        shapes.append(mask.shape)
        return mask

    monkeypatch.setattr(packed_rows, "attention_mask", spy)
    seen = []
    for lengths in ([8192], [4096, 4096], [2048] * 3):
        path = plot_attention_mask(tmp_path, row(lengths, 8192))
        assert path == tmp_path / "plots" / "attention_mask.png"
        seen.append(colors_of(path))
    assert set(shapes) == {(1024, 1024)}
    # Of one conversation's triangle, two of half its length cover half; the lower half of a
    # triangle, three quarters of it, is supervised.
    totals = [colors["context"] + colors["supervised"] for colors in seen]
    assert totals[1] / totals[0] == pytest.approx(1 / 2, rel=0.05)
    assert totals[2] / totals[0] == pytest.approx(3 / 16, rel=0.05)
    assert seen[0]["supervised"] / totals[0] == pytest.approx(3 / 4, rel=0.05)


def test_pictures_of_the_smallest_rows_and_of_many_are_drawn(tmp_path):
    few = plot_packing(tmp_path, [row([3], 4)])
    small = Image.open(few).size
    many = plot_packing(tmp_path, [row([30, 30], 64)] * 100)  # the first 32 of them
    large = Image.open(many).size
    assert small[0] == pytest.approx(large[0], abs=40)
    assert small[1] < large[1] < 2000
