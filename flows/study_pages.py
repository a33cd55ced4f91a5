"""The two pages of a reader study: the form that a reader fills in, and what was found.

Each is one file that needs nothing from elsewhere. The form names no arm: it is made from the blind half of the study.
"""

from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from flows.pictures import as_svg, axes_of_a_picture
from training.evaluation.reader_analysis import PREFERENCE, Findings, Mean
from training.evaluation.reader_ratings import packet_rows
from training.evaluation.reader_study import Design, Study

_FORM = Path(__file__).with_name("study_form.html")
_FINDINGS = Path(__file__).with_name("study_findings.html")


def form_page(study: Study, reader: int) -> str:
    """HTML in which a reader (from 0) rates; a button saves the CSV that `regraft study collect` reads."""
    head, *rows = packet_rows(study, reader)
    page = Environment(autoescape=True).from_string(_FORM.read_text(encoding="utf-8"))
    return page.render(
        design=study.design,
        packet={
            "head": head,
            "rows": rows,
            "criteria": [criterion.model_dump() for criterion in study.design.criteria],
            "file": f"ratings-reader-{reader + 1}.csv",
        },
    )


def findings_page(design: Design, findings: Findings) -> str:
    """HTML of what was found, with a picture for each measure."""
    page = Environment(autoescape=True).from_string(_FINDINGS.read_text(encoding="utf-8"))
    measures = [criterion.name for criterion in design.criteria] + [PREFERENCE]
    return page.render(
        design=design,
        findings=findings,
        pictures=[picture for measure in measures if (picture := _picture(measure, design, findings))],
        agreement=list(findings.agreement),
    )


def _picture(measure: str, design: Design, findings: Findings) -> Markup | None:
    """Each arm's mean with its interval."""
    means: list[Mean] = [mean for mean in findings.means if mean.measure == measure]
    if not means:
        return None
    figure, axes = axes_of_a_picture(height=0.6 + 0.45 * len(means))
    for place, mean in enumerate(reversed(means)):
        axes.plot((mean.low, mean.high), (place, place), color="#3b6ea5", linewidth=2)
        axes.plot(mean.value, place, "o", color="#3b6ea5")
    axes.set_yticks(range(len(means)), [mean.arm for mean in reversed(means)])
    axes.set_ylim(-0.5, len(means) - 0.5)
    scale = next(((each.low, each.high) for each in design.criteria if each.name == measure), (0, 1))
    axes.set_xlim(scale[0] - 0.03 * (scale[1] - scale[0]), scale[1] + 0.03 * (scale[1] - scale[0]))
    axes.set_title(measure, fontsize=10, loc="left")
    return as_svg(figure)
