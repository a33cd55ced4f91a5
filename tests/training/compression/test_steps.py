"""One line says how an adapter is compressed; a wrong one says what would be right."""

import pytest

from infra.errors import InvalidInput
from training.compression import read_steps
from training.compression.compeft import ComPEFTOptions
from training.compression.groups import GroupsOptions
from training.compression.steps import LowRankOptions


def test_a_line_names_a_rank_and_a_codec() -> None:
    steps = read_steps("low_rank:rank=4 + groups:bits=8, symmetric=false")
    assert steps.cut == LowRankOptions(rank=4)
    assert (steps.codec, steps.options) == ("groups", GroupsOptions(bits=8, symmetric=False))
    steps = read_steps("compeft:density=0.05,alpha=2,layout=bitmask")
    assert steps.options == ComPEFTOptions(density=0.05, alpha=2, layout="bitmask")
    assert read_steps("compeft").options == ComPEFTOptions()
    assert read_steps("low_rank:energy=0.9+compeft").cut == LowRankOptions(energy=0.9)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("grups:bits=4", r"there is no step 'grups'. Did you mean 'groups'"),
        ("nope", "Did you mean 'compeft'.*\n.*codebook:bits=2.*groups:bits=4.*low_rank:rank=4"),
        ("groups:bit=4", r"groups\.bit is not an option\. Did you mean 'bits'"),
        ("groups:bits=3", r"groups\.bits: give 2, 4 or 8 \(given: 3\)"),
        ("groups:bits=four", r"groups\.bits: give 2, 4 or 8 \(given: 'four'\)"),
        ("groups:bits", "'bits' is not one KEY=VALUE more of groups"),
        ("groups:bits=4,bits=8", "'bits=8' is not one KEY=VALUE more of groups"),
        ("groups:", None),
        ("compeft:density=2", "compeft.density: Input should be less than or equal to 1"),
        ("compeft:density=0", "compeft.density: Input should be greater than 0.*\nForms: compeft:density=0.1, "),
        ("compeft:alpha=nan", "compeft.alpha"),
        ("compeft:alpha=inf", "compeft.alpha"),
        ("compeft+low_rank:rank=4", "compeft makes bytes, so nothing can follow it"),
        ("groups+compeft", "groups makes bytes"),
        ("low_rank:rank=4", "ends with low_rank, which makes no bytes.\nAdd one of codebook, compeft, groups"),
        ("low_rank:rank=4+low_rank:rank=2+groups", "cuts the rank twice"),
        ("low_rank+groups", "give either rank or energy"),
        ("low_rank:rank=1,energy=0.5+groups", "give either rank or energy"),
        ("low_rank:rank=0+groups", "low_rank.rank"),
        ("", "there is no step ''"),
        ("groups+", "there is no step ''"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(line: str, told: str | None) -> None:
    if told is None:
        assert read_steps(line).options == GroupsOptions()
        return
    with pytest.raises(InvalidInput, match=told):
        read_steps(line)
