"""docs/ops.md says what the definitions say."""

from __future__ import annotations

from pathlib import Path

from elision.kernels.docs import page


def test_docs_of_the_ops_are_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "ops.md"
    assert path.read_text(encoding="utf-8") == page(), (
        "write it anew: python -c 'import elision.kernels.docs as d; print(d.page(), end=\"\")' > docs/ops.md"
    )
