"""Tables that lose nothing, however narrow the terminal."""

import json

import pytest
from rich.markup import escape

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


HOSTILE = "\x1b]0;owned\x07\x1b[31mred\rover \x9b2J \x7f [bold]not[/]"
SHOWN = r"\x1b]0;owned\x07\x1b[31mred\rover \x9b2J \x7f [bold]not[/]"


def test_control_characters_of_texts_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    console.console.print(escape(HOSTILE), soft_wrap=True)
    assert capsys.readouterr().out == SHOWN + "\n"
    console.errors.print(f"[bold red]✗[/] {escape(HOSTILE)}", soft_wrap=True)
    assert capsys.readouterr().err == f"✗ {SHOWN}\n"
    console.show(("text",), [(escape("\x1b[2J"),)], "")
    assert capsys.readouterr().out.splitlines()[1].rstrip() == r"\x1b[2J"
    console.facts([("text", escape("\x1b[2J"))])
    assert r"\x1b[2J" in capsys.readouterr().out
    console.console.print("two\r\nlines\tand a tab: é")
    assert capsys.readouterr().out.splitlines() == ["two", "lines   and a tab: é"]


def test_json_for_programs_holds_them_as_escapes_too(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"text": HOSTILE})
    out = capsys.readouterr().out
    assert not any(ord(mark) < 32 or 127 <= ord(mark) < 160 for mark in out.replace("\n", ""))
    assert json.loads(out) == {"text": HOSTILE}
