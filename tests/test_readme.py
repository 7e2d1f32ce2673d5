"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
def test_example(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    from batchnorm import kernels

    assert kernels.ran().forward == "cpu"
    assert names["loss"] > 0
