"""Names of adapters and models: what is accepted, and what a wrong name's message suggests."""

from __future__ import annotations

import pytest

from loramill.errors import InvalidRequest
from loramill.names import AdapterName, ModelName


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("support", "'support' is not an adapter name; write it as tenant/adapter, such as acme/support."),
        (
            "acme/support@3f2a",
            "'acme/support@3f2a' includes a version, but only an adapter's name is allowed here; write ",
        ),
        ("acme/support@", "'acme/support@' includes a version, but only an adapter's name is allowed here; write "),
        ("acme/Support@3f2a", "'Support' is not a valid name for an adapter: use"),
    ],
)
def test_a_name_that_is_not_an_adapters_is_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AdapterName.parse(text)
    assert caught.value.message.startswith(message)


def test_a_models_name_may_have_a_version() -> None:
    assert ModelName.parse("acme/support@3f2a9c01").selector == "3f2a9c01"
    assert ModelName.parse("acme/support").selector == "champion"
