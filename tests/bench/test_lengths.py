"""The draw of lengths has the tail it promises; wrong files and flags are refused in one line."""

import numpy as np
import pytest

from sbtiny.bench.lengths import draw_lengths, guess_lengths, read_lengths, record_ratio
from sbtiny.errors import InputError


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "mean", "longest"), [(16, 10, 60), (128, 44, 192), (64, 100, 1000)])
def test_the_longest_is_at_least_three_times_the_mean(seed: int, count: int, mean: int, longest: int) -> None:
    lengths = draw_lengths(count, mean, longest, seed)
    assert len(lengths) == count
    assert max(lengths) == longest >= 3 * sum(lengths) / count
    assert min(lengths) >= 2
    assert lengths == draw_lengths(count, mean, longest, seed)
    assert lengths != draw_lengths(count, mean, longest, seed + 1)


def test_no_tail_is_refused() -> None:
    with pytest.raises(InputError, match="heavy tail"):
        draw_lengths(64, 44, 100, 0)
    for few in (1, 2, 3):
        with pytest.raises(InputError, match=f"{few} answers of at most 192 tokens have no heavy tail"):
            draw_lengths(few, 44, 192, 0)
    assert max(draw_lengths(4, 44, 192, 0)) == 192


def test_lengths_of_a_file(tmp_path) -> None:
    file = tmp_path / "lengths.jsonl"
    file.write_text('3\n{"length": 5, "text": "x"}\n\n7\n')
    assert read_lengths(file, 2) == [3, 5]
    with pytest.raises(InputError, match="holds 3 lengths"):
        read_lengths(file, 4)
    with pytest.raises(InputError, match="no file"):
        read_lengths(tmp_path / "none", 1)
    file.write_bytes("3\n5\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"cannot read .*lengths\.jsonl: .*; save it as UTF-8 text"):
        read_lengths(file, 1)
    for wrong in ("zero", "0", "1.5", "true", '{"tokens": 3}'):
        file.write_text(f"3\n{wrong}\n")
        with pytest.raises(InputError, match="line 2"):
            read_lengths(file, 2)


def test_ratios_are_taken_round_by_round() -> None:
    assert record_ratio("ratio", [10, 40, 20], [5, 10, 5]) == {"ratio": 4, "ratio_range": [2, 4]}


def test_guesses_are_seeded_and_about_a_third_off() -> None:
    lengths = draw_lengths(2000, 60, 400, seed=1)
    found = guess_lengths(lengths, 5)
    assert found == guess_lengths(lengths, 5) != guess_lengths(lengths, 6)
    error = np.log(np.array(found) / np.array(lengths))[np.array(lengths) > 20]
    assert error.std() == pytest.approx(0.3, abs=0.03)
    assert abs(error.mean()) < 0.03
