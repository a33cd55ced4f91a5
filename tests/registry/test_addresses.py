import pytest

from infra.errors import InvalidInput
from registry.addresses import Address, adapter_name, alias_name


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("counting@3", Address("counting", number=3)),
        ("counting@production", Address("counting", alias="production")),
        ("counting", Address("counting")),
        ("a.b-c_9@12", Address("a.b-c_9", number=12)),
    ],
)
def test_an_address_reads_back_as_it_is_written(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@3",
        "counting@",
        "counting@0",
        "counting@v3",
        "counting@latest",
        "../x@1",
        "a/b",
        "Counting",
        "a@b@c",
        "x@²",
    ],
)
def test_what_is_not_an_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        Address.parse(text)


@pytest.mark.parametrize("text", ["v1", "17", "latest", "Production", "a.b", "", "x" * 64])
def test_aliases_that_mlflow_would_refuse_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        alias_name(text)


@pytest.mark.parametrize("text", ["production", "challenger-2", "v1-candidate", "x" * 63])
def test_mlflow_takes_every_alias_that_we_take(text: str) -> None:
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    _validate_model_alias_name(alias_name(text))
    _validate_model_alias_name_reserved(text)


def test_a_name_has_at_most_63_characters() -> None:
    assert adapter_name("x" * 63)
    with pytest.raises(InvalidInput, match="63"):
        adapter_name("x" * 64)
