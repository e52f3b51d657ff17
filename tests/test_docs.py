"""The README's code runs as it stands, and the reference lists every public name."""

import pathlib
import re
import runpy
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import jrobust
from jrobust import attacks
from jrobust.threat import Linf

ROOT = pathlib.Path(__file__).resolve().parent.parent


def blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_example_runs_as_it_stands(capsys):
    names = {}
    exec(blocks()[0], names)
    assert "robust at 0.05, 0.1, 0.2" in capsys.readouterr().out
    clean = float((names["model"](names["test"].x).argmax(-1) == names["test"].y).mean())
    broken = np.asarray(names["curve"].success).mean(axis=1)
    assert clean > 0.9
    assert 0.02 < broken[0] < broken[-1] < 0.9, "adversarial training helps, and radius hurts"


def test_the_attack_in_forty_lines_is_an_attack(key):
    code = blocks()[1]
    assert len(code.splitlines()) <= 40
    names = {"__name__": "readme"}
    exec(code, names)
    attack = names["CosinePGD"](Linf(0.05))
    w = jax.random.normal(key, (12, 4))

    def logits_fn(x):
        return x @ w

    x = 0.4 + 0.2 * jax.random.uniform(jax.random.key(1), (16, 12))
    y = jnp.argmax(logits_fn(x), -1)
    alone = jrobust.run(attack, key, logits_fn, x, y)
    often = jrobust.run(attacks.restarts(attack, 3), key, logits_fn, x, y)
    assert 0 < alone.success.mean() <= often.success.mean()
    assert jnp.max(alone.distance) <= 0.05
    gap = logits_fn(x)[jnp.arange(16), y][:, None] - logits_fn(x)
    reach = 0.05 * jnp.sum(jnp.abs(w.T[y][:, None] - w.T[None]), -1)
    breakable = jnp.any((gap < 0.99 * reach) & (reach > 0), -1)
    assert jnp.all(often.success == breakable), "on a linear model the ball's corner decides"


def test_the_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    text = (ROOT / "docs" / "reference.md").read_text()
    assert made["reference"]() == text, "run python docs/make_reference.py"


def test_every_public_name_is_documented():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    for line in made["reference"]().splitlines():
        if line.startswith("* `") and " = " not in line:
            assert len(line.split(": ", 1)[1]) > 15, line


def test_the_page_on_evaluation_runs_as_it_stands():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    names = {"__name__": "evaluation"}
    with warnings.catch_warnings():
        # Of an untrained network, whatever there is to doubt.
        warnings.simplefilter("ignore", jrobust.loops.ReliabilityWarning)
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, names)
    assert names["report"].attacks == ("0.02", "0.05", "0.1")
    assert 0 < names["event"].interval(0.05)[1] <= 1
