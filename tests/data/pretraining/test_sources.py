"""The text of a folder is the text in it and in the folders below it, including links."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastformer.data.pretraining.sources import open_sources, stream


def test_links_to_other_folders_are_followed(tmp_path: Path) -> None:
    for folder in ("here", "elsewhere", "elsewhere/below"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"text of {folder}\n")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    found = list(stream(open_sources([tmp_path / "here"])))
    assert [document.strip() for document in found] == ["text of here", "text of elsewhere", "text of elsewhere/below"]


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_into_itself_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "again").symlink_to(tmp_path / "folder" / target)
    with pytest.raises(ValueError, match="again is a link to a folder that contains it"):
        open_sources([tmp_path / "folder"])
