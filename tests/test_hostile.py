"""A slice of `python -m benchmarks.hostile`."""

from benchmarks.hostile import attempt, write_sound


def test_what_is_not_damaged_loads(tmp_path):
  for kind, load in write_sound(tmp_path).items():
    load(tmp_path / kind.partition("-")[0])


def test_damaged_files_load_or_end_in_one_line(tmp_path):
  loads = write_sound(tmp_path)
  ends = [attempt(tmp_path, loads, 0, number) for number in range(40)]
  assert [wrong for *_, wrong in ends if wrong is not None] == []
  # Each kind was tried, and some of the damage was seen.
  assert {kind for kind, *_ in ends} == set(loads)
  assert {end for _, end, _ in ends} == {"loaded", "refused"}
