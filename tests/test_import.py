"""`import jrobust`, and attacking, smoothing and estimating, need jax, optax and numpy alone."""

import subprocess
import sys

CODE = """
import sys

BLOCKED = {"flax", "orbax", "tensorflow_datasets", "tensorflow", "matplotlib", "sklearn", "tqdm",
           "grain", "chex", "torch", "PIL", "pytest"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Block())

import jax, jax.numpy as jnp, numpy as np
import jrobust
from jrobust import attacks, data, loops, smoothing, zeroth_order
from jrobust.threat import Linf

w = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
model = lambda x: (x - 0.5) @ w
x = np.float32([[0.6, 0.45], [0.9, 0.1], [0.4, 0.7]])
y = np.array([0, 0, 1])
found = jrobust.run(attacks.PGD(Linf(0.1)), jax.random.key(0), model, x, y)
assert found.success.tolist() == [True, False, False], found
report = loops.evaluate(
    jax.random.key(0), model, data.Dataset(x, y), attacks.FGSM(Linf(0.1)), progress=False,
    checks=False,
)
assert report.robust_accuracy == 2 / 3
certified = loops.certify(
    jax.random.key(0), model, data.Dataset(x, y), smoothing.Gaussian(0.2), n=500, progress=False
)
assert certified.accuracy() > 0.5
value, grad = jax.jit(
    lambda key, x: zeroth_order.CGE(1e-2)(key, lambda v: jnp.sum(v**2), x)
)(jax.random.key(0), x)
assert np.allclose(grad, 2 * x, atol=1e-3)
loaded = BLOCKED & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
try:
    data.digits()
except ImportError as error:
    assert "jrobust[data]" in str(error), error
else:
    raise AssertionError("scikit-learn is blocked")
print("bare")
"""


def test_the_core_works_without_the_edges():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bare"
