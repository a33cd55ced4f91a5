"""Tables that lose nothing, however narrow the terminal."""

import pytest

from cli import console


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_table_that_does_not_fit_is_folded_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console.console, "width", width)
    row = ("@12", "smollm2-135m-instruct", "prompt-tuning", "9.9 MB", "production")
    console.show(("", "base", "method", ">size", "aliases"), [row], "")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert "@12" in lines[1]
    shown = "".join("".join(lines[1:]).split())
    assert sorted(shown) == sorted("".join("".join(row).split()))
