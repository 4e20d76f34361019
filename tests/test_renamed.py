"""A name that an earlier version had ends in an error that tells the new one."""

from __future__ import annotations

import pytest

import secateur
import secateur.runtime as runtime


@pytest.mark.parametrize(
    ("module", "prefix"), [(secateur, "secateur"), (runtime, "secateur.runtime")]
)
def test_an_old_name_tells_the_new_one(module: object, prefix: str) -> None:
    renamed: dict[str, str] = module.RENAMED  # type: ignore[attr-defined]
    assert renamed
    for old, new in renamed.items():
        assert getattr(module, new)
        with pytest.raises(AttributeError, match=f"{prefix}.{new} now"):
            getattr(module, old)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = module.nothing_of_this_name  # type: ignore[attr-defined]
