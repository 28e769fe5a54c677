"""What several test files need and no fixture gives."""

import pytest

from core.errors import UserError


def message_of(call):
    """The message, one line, of the UserError that `call()` raises."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
