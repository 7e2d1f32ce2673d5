"""The examples of the README and of pages run as they stand, and print what they say."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NAMES = "layers", "models", "diagnosing", "recalibrating", "adapting", "converting", "other-tools"
PAGES = "README.md", *(f"docs/{name}.md" for name in NAMES)
EXAMPLES = [
    pytest.param(page, code, id=f"{page}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    )
]
PRINTED = re.compile(r"print\(.*?\)  # (.*?)(?: …)?$", re.MULTILINE)


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_example(page: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)  # by chance an untrained network predicts one class, of which adapt warns
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    printed = capsys.readouterr().out
    assert all(said in printed for said in PRINTED.findall(code))
    if "loss" in names:
        from batchnorm import kernels

        assert kernels.ran().forward == "numba"
        assert names["loss"] > 0
    else:
        assert PRINTED.search(code)
