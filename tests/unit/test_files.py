"""Files are complete or absent, and the remains of killed writers are removed."""

import os

from gritlm.files import written_aside


def test_the_remains_of_a_killed_writer_are_removed_a_day_later(tmp_path):
    old, fresh, of_another = (tmp_path / f".{name}.part" for name in ("out.1", "out.2", "other.1"))
    for remains in (old, fresh, of_another):
        remains.mkdir()
        (remains / "half").touch()
    for remains in (old, of_another):
        os.utime(remains, (0, 0))
    with written_aside(tmp_path / "out") as aside:
        aside.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", fresh.name, of_another.name}
