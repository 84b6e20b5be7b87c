"""Rows of results come back as they were written, and a committed file with them."""

import dataclasses
import math

import pytest

from comfyui_psa.workshop.quality.results import RunRow
from comfyui_psa.workshop.table import read_records, read_rows, write_records, write_rows


@dataclasses.dataclass
class Row:
    name: str
    count: int
    share: float
    gain: float | None = None
    runs: int | None = None


ROWS = [Row('a "name", with commas', 3, 0.25, math.inf, 7), Row("", 0, 1 / 3), Row("two\nlines", -1, 1e-9, 0.0, 0)]


def test_records_come_back(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_records(path, Row, ROWS[:1])
    write_records(path, Row, ROWS[1:], append=True)
    assert path.read_bytes().splitlines()[0] == b"name,count,share,gain,runs"
    assert read_records(path, Row) == [ROWS[0], dataclasses.replace(ROWS[1], share=0.333333), ROWS[2]]
    write_records(path, Row, [])
    assert read_records(path, Row) == []


def test_columns_that_a_row_lacks_are_empty_and_others_left_out(tmp_path):
    write_rows(tmp_path / "rows.csv", ["a", "b"], [{"a": 1, "c": 2}, {"b": None, "a": 0.123456789}])
    assert read_rows(tmp_path / "rows.csv") == [{"a": "1", "b": ""}, {"a": "0.123457", "b": ""}]


@pytest.mark.parametrize("text", ["name,count,share\nx,1,\n", "name,count,share\nx,1.5,1\n"])
def test_a_cell_of_another_type_is_an_error(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=r"could not convert|invalid literal"):
        read_records(tmp_path / "rows.csv", Row)


def test_an_older_file_may_lack_a_column(tmp_path):
    (tmp_path / "runs.csv").write_text("setting,group,clip,psnr,steps\ndense,dense,one,inf,10\n")
    assert read_records(tmp_path / "runs.csv", RunRow) == [RunRow("dense", "dense", "one", psnr=math.inf, steps=10)]
