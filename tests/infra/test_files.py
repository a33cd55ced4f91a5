"""Folders that are there whole or not at all."""

from pathlib import Path

import pytest

from infra.errors import Conflict
from infra.files import whole_folder


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_is_there_when_all_of_it_is(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "new" / "folder"
    if exists:
        folder.mkdir(parents=True)
    with whole_folder(folder) as written:
        written.mkdir()
        (written / "half").write_text("1")
        assert not (folder / "half").exists()
    assert [file.name for file in folder.iterdir()] == ["half"]
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(Conflict), whole_folder(folder):
        pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_one_that_was_stopped(tmp_path: Path, stop: type[BaseException]) -> None:
    with pytest.raises(stop), whole_folder(tmp_path / "folder") as written:
        written.mkdir()
        (written / "half").write_text("1")
        raise stop
    assert not list(tmp_path.iterdir())
