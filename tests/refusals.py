"""What a function says when it refuses its arguments."""

from collections.abc import Callable
from typing import Any

import pytest

from pflbench import UsageError


def refusal(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """Return the message of the `UsageError` that a call raises; it is one line."""
    with pytest.raises(UsageError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)
