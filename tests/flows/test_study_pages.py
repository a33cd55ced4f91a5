"""The form names no arm, needs nothing from elsewhere, and saves what collecting reads; the findings show it all."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.study_pages import findings_page, form_page
from training.evaluation.reader_analysis import analyse
from training.evaluation.reader_ratings import collect
from training.evaluation.reader_study import Criterion, Design, Key, Study, blind

DESIGN = Design(
    title="Notes & <letters>",
    criteria=(Criterion(name="fluency", high=5), Criterion(name="correctness", low=0, high=3)),
    readers=2,
)
PROMPTS = ['say "</script><b>hi</b>"', "second,\nwith lines", "third; é"]
ARMS = {
    "summary@3": ["one, 'quoted'", "=two", "three\nlines"],
    "summary@4": ["<img src=x onerror=alert(1)>", "zwei", ""],
    "reference": ["uno", "dos", "tres"],
}

# The little of a browser that the form uses. Every answer gets the highest score, answer A is preferred.
BROWSER = """
const made = [], listeners = {};
let saved = null;
function node(name) {
  const self = { name, children: [], on: {}, classList: { toggle() {} },
    append(...more) { self.children.push(...more); }, click() {},
    addEventListener(what, act) { self.on[what] = act; } };
  made.push(self);
  return self;
}
const known = { packet: { textContent: PACKET }, save: node("button"), state: node("span") };
globalThis.document = { createElement: node, getElementById: (id) => known[id], querySelector: () => node("main") };
globalThis.localStorage = { getItem: () => null, setItem(place, text) { saved = text; } };
globalThis.confirm = () => true;
globalThis.Blob = class { constructor(parts) { this.text = parts.join(""); } };
globalThis.URL = { createObjectURL(blob) { process.stdout.write(blob.text); return ""; }, revokeObjectURL() {} };
SCRIPT
const last = new Map();
for (const each of made) if (each.type === "radio") last.set(each.name, each);
for (const each of last.values()) each.on.change();
made.filter((each) => each.type === "checkbox").forEach((each, place) => {
  each.checked = place % 3 === 0;
  if (each.checked) each.on.change();
});
const remarks = made.filter((each) => each.name === "textarea");
remarks[0].value = 'so "so", well';
remarks[0].on.input();
known.save.on.click();
process.stderr.write(known.state.textContent);
"""


@pytest.fixture
def study() -> tuple[Study, Key]:
    return blind(DESIGN, PROMPTS, ARMS, "secret", "s")


def test_a_form_names_no_arm_and_asks_nobody_else_for_anything(study: tuple[Study, Key]) -> None:
    for reader in range(2):
        page = form_page(study[0], reader)
        assert not any(arm in page for arm in (*ARMS, "summary"))
        own = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL).replace(
            "link.href =", ""
        )
        assert not re.search(r"(src|href)\s*=|https?:|@import|url\(|fetch\(", own)
        assert "Notes &amp; &lt;letters&gt;" in page


def test_texts_stay_texts(study: tuple[Study, Key]) -> None:
    page = form_page(study[0], 0)
    assert "<img" not in page
    assert "<b>hi" not in page
    assert page.count("</script>") == 2


@pytest.mark.skipif(shutil.which("node") is None, reason="needs a JavaScript interpreter")
def test_what_the_form_saves_is_what_collecting_reads(study: tuple[Study, Key], tmp_path: Path) -> None:
    blind_half, key = study
    files = []
    for reader in range(2):
        page = form_page(blind_half, reader)
        packet = re.search(r'<script type="application/json" id="packet">(.*?)</script>', page, re.DOTALL)
        script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
        assert packet and script
        program = BROWSER.replace("PACKET", json.dumps(packet[1])).replace("SCRIPT", script[1])
        told = subprocess.run(["node", "-e", program], capture_output=True, check=True)
        assert told.stderr.decode() == "3 of 3 items complete"
        files.append(tmp_path / f"ratings-reader-{reader + 1}.csv")
        files[-1].write_bytes(told.stdout)
    ratings = collect(blind_half, files)
    assert all(rating.scores == {"fluency": 5, "correctness": 3} for rating in ratings.by_id.values())
    for packet in blind_half.packets:
        assert [ratings.by_id[shown.id].preferred for shown in packet] == [True, False, False] * 3
    assert ratings.by_id[blind_half.packets[0][0].id].comment == 'so "so", well'
    page = findings_page(DESIGN, analyse(blind_half, key, ratings))
    assert page.count("<svg") == 3
    assert all(page.count(arm) >= 3 for arm in ARMS)
    assert "Notes &amp; &lt;letters&gt;" in page
