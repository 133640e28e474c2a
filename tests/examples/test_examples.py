"""Each example learns, loses little by quantization, and its integer program gives the outputs of mode "eval", all of them."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("[!_]*.py"))
SPELL = ("transformer_linen", "transformer_nnx")  # they predict characters; the others read digits


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name):
    if name == "mlp_equinox":
        pytest.importorskip("equinox", reason="equinox is an optional neighbour; this example needs it")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = importlib.import_module(f"examples.{name}").main()
    first, last = np.mean(result.losses[:5]), np.mean(result.losses[-5:])
    assert result.differ == 0
    assert result.integer == result.quantized
    if name in SPELL:
        assert last < 0.75 * first
        assert result.quantized < 0.75 * first  # on pages that it was not trained on
        assert abs(result.quantized - result.float) < 0.05
    else:
        assert last < 0.25 * first
        assert result.quantized > 75
        assert abs(result.quantized - result.float) < 3


def test_the_readme_lists_every_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 6
    for name in EXAMPLES:
        assert f"](examples/{name}.py)" in readme, name
        lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 90, f"{name} has {len(lines)} lines: an example is read at one sitting"
        assert f"python -m examples.{name}" in "\n".join(lines)
