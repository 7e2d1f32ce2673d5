"""The README's examples run as they stand, and print what they say."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
PRINTED = re.compile(r"print\(.*?\)  # (.*?)(?: …)?$", re.MULTILINE)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_example(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert all(said in printed for said in PRINTED.findall(code))
    if "loss" in names:
        from batchnorm import kernels

        assert kernels.ran().forward == "cpu"
        assert names["loss"] > 0
    else:
        assert PRINTED.search(code)
