"""The sandwich: no adversarial point may lie inside of a certified ball."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from jrobust import _run, drive, keys, models, parallel, smoothing
from jrobust._algorithm import describe
from jrobust.attacks import Attack
from jrobust.data import Dataset
from jrobust.loops._certify import certify
from jrobust.loops._evaluate import _named, evaluate
from jrobust.loops._folder import Arrays, Folder, located
from jrobust.loops._lanes import Bar, check_count, check_data, lane_count, rows, surroundings
from jrobust.loops._programs import Clock, Job, Programs
from jrobust.loops._reliability import needs_gradients
from jrobust.smoothing._staged import is_dual
from jrobust.statistics import false_certificates
from jrobust.statistics._binomial import check_probability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("id", "y", "prediction", "correct", "status", "radius", "distance", "attack")
_STATUS = ("abstained", "standing", "attacked", "contradicted")
_NORMS = ("L0", "L1", "L2", "Linf")
# Keys are folded above all stages of a certification, which may have been run under the same key.
_ATTACKS, _SURROGATE, _VERDICTS, _CERTIFY = range(1 << 31, (1 << 31) + 4)
# How far along an attack's direction a point is sought, in multiples of what the attack found or of
# the radius, whichever is more.
_REACH = 4.0
# Examples whose votes are counted together, as in `certify`.
_LANES = 32


class Certified(Protocol):
    """What a certificate says of N inputs; :class:`jrobust.smoothing.Certificate` is one."""

    @property
    def prediction(self) -> np.ndarray:
        """(N,) integer: the answer everywhere in the ball, -1 where nothing is claimed."""

    @property
    def radius(self) -> np.ndarray:
        """(N,) radius of the ball, closed, at least 0."""

    @property
    def norm(self) -> str:
        """Its norm: ``"L2"``, ``"Linf"``, ``"L1"`` or ``"L0"``."""

    @property
    def alpha(self) -> float:
        """Probability that one claim is false; 0 for a deterministic certificate."""


class Claims(NamedTuple):
    """Certificates given as arrays: "the answer is ``prediction[i]`` within ``radius[i]``"."""

    prediction: np.ndarray
    """(N,) integer classes, -1 where nothing is claimed."""
    radius: np.ndarray
    """(N,) radii of closed balls, at least 0."""
    norm: str
    """``"L2"``, ``"Linf"``, ``"L1"`` or ``"L0"``."""
    alpha: float = 0.0
    """Probability that one claim is false; 0 for deterministic certificates."""


@dataclasses.dataclass(frozen=True, eq=False)
class SandwichReport:
    """Certified radii beside the distances of adversarial points.

    Attributes:
        examples: columns (N,): ``id``, ``y``, certified ``prediction`` (-1 where it abstains),
            ``correct``, ``radius``, ``distance`` of the closest adversarial point of all attacks
            (infinite where there is none), ``attack`` (index of the one that found it, -1 for
            none), and ``status``: ``abstained``, ``standing`` (certified, and no adversarial point
            found), ``attacked``, or ``contradicted`` (the point lies inside the certified ball).
        x: (N, ...) the closest adversarial point, else the input.
        attacks: names of the attacks.
        distances: (attacks, N) distance of each attack's closest adversarial point, or infinite.
        claimed: (attacks, N) distance of the point that each attack returned as adversarial, before
            any verdict; the same where the certificate is about the model itself.
        certificate: what was put to the test.
        allowed: contradictions that right certificates have at most, with ``confidence``.
        confidence: probability of that.
        verdict_alpha: probability that some point of an example is wrongly taken for adversarial.
        configuration: settings, seed and versions.
        seconds: wall time in ``certify``, in each attack and in ``verdicts``.
    """

    examples: dict[str, np.ndarray]
    x: np.ndarray
    attacks: tuple[str, ...]
    distances: np.ndarray
    claimed: np.ndarray
    certificate: Certified
    allowed: int
    confidence: float
    verdict_alpha: float
    configuration: dict[str, Any]
    seconds: dict[str, float]

    @property
    def contradictions(self) -> int:
        """Certificates with an adversarial point inside."""
        return int(np.sum(self.examples["status"] == "contradicted"))

    @property
    def failed(self) -> bool:
        """Whether that is more than right certificates allow."""
        return self.contradictions > self.allowed

    def ratio(self) -> np.ndarray:
        """Certified radius over the distance of the closest adversarial point, where both exist.

        At most 1 but for contradictions. The rest, up to 1, is what a better certificate or a
        better attack may still find.
        """
        rows = self.examples
        both = (rows["prediction"] >= 0) & np.isfinite(rows["distance"])
        with np.errstate(divide="ignore", invalid="ignore"):
            return rows["radius"][both] / rows["distance"][both]

    def summary(self) -> dict[str, Any]:
        """Examples by status, contradictions allowed, quartiles of :meth:`ratio`.

        ``undirected`` are examples at which the model that was attacked, or the surrogate in its
        place, disagrees with the certificate already at the input, so that nothing was searched;
        only the input itself was put to the test. More ``draws`` make them fewer.
        """
        count = {status: int(np.sum(self.examples["status"] == status)) for status in _STATUS}
        ratio = self.ratio()
        quartiles = [None] * 3
        if len(ratio):  # without interpolation, as a ratio may be infinite
            quartiles = np.quantile(ratio, (0.25, 0.5, 0.75), method="nearest").tolist()
        return {
            **count,
            "undirected": int(np.sum(self.claimed.min(axis=0) == 0)),
            "allowed": self.allowed,
            "failed": self.failed,
            "ratio_quartiles": quartiles,
            "ratio_largest": float(ratio.max()) if len(ratio) else None,
        }

    def plot(self, axes: Axes | None = None) -> Figure:
        """Radius against distance of each certified example, with the diagonal.

        No point may lie above the diagonal. Examples without an adversarial point stand at the
        right edge.

        Args:
            axes: of matplotlib, to draw on; those of a new figure when None.

        Raises ``ImportError`` without matplotlib.
        """
        from jrobust import report

        if axes is None:
            axes = report._new_figure(5.2, 4.6).add_subplot()
        rows = self.examples
        certified = rows["prediction"] >= 0
        far = np.concatenate([rows["distance"], rows["radius"][certified]])
        edge = 1.08 * float(np.max(far[np.isfinite(far)], initial=0.0)) or 1.0
        styles = {
            "attacked": ("o", report._COLOURS[0]),
            "standing": (">", report._COLOURS[2]),
            "contradicted": ("X", report._WRONG),
        }
        axes.plot([0, edge], [0, edge], color=report._INK, linewidth=1, zorder=2)
        for status, (marker, colour) in styles.items():
            chosen = certified & (rows["status"] == status)
            distance = np.minimum(rows["distance"][chosen], edge)
            axes.scatter(
                distance,
                rows["radius"][chosen],
                s=22,
                marker=marker,
                color=colour,
                label=f"{status} ({chosen.sum()})",
                linewidths=0,
                alpha=0.8,
                zorder=3,
                clip_on=False,
            )
        norm = self.certificate.norm
        report._style(
            axes, f"distance of the closest adversarial point, {norm}", "certified radius"
        )
        axes.set_xlim(0, edge)
        axes.set_ylim(0, edge)
        axes.legend(frameon=False, fontsize=9, labelcolor=report._INK, loc="upper left")
        return cast("Figure", axes.figure)


class Contradicted(RuntimeError):
    """More adversarial points inside certified balls than right certificates allow.

    Attributes:
        report: the whole :class:`SandwichReport`; a directory holds all of it already.
    """

    def __init__(self, report: SandwichReport) -> None:
        rows = report.examples
        wrong = np.flatnonzero(rows["status"] == "contradicted")
        ids = ", ".join(str(i) for i in rows["id"][wrong[:5]])
        super().__init__(
            f"{len(wrong)} of {len(rows['id'])} certificates have an adversarial point inside "
            f"their ball (ids {ids}{', ...' if len(wrong) > 5 else ''}), and with confidence "
            f"{report.confidence:g} at most {report.allowed} may: certificate, noise or model are "
            "not what the other side takes them for"
        )
        self.report = report


def _draw(model: Any, noise: Any, keys: jax.Array, x: jax.Array) -> jax.Array:
    return model(jax.vmap(noise.perturb)(keys, x))


def _logits(model: Any, x: jax.Array) -> jax.Array:
    return model(x)


def _surrogate(key: jax.Array, model: Any, noise: Any, draws: int) -> Any:
    """The log of the mean softmax over ``draws`` fixed copies, for gradients (SmoothAdv).

    Wrapped, so that attacks take it for the deterministic function that it is, and ascend the loss
    of the mean instead of the mean of losses. Of a black box it is one too, that is asked ``draws``
    times for each row.
    """
    if drive.is_host(model):
        return drive.Host(functools.partial(_ask, key, model, noise, draws))
    drawn = jax.tree_util.Partial(_draw, model, noise)
    return jax.tree_util.Partial(_logits, models.randomized(drawn, key, votes=draws))


@functools.partial(jax.jit, static_argnums=2)
def _copies(key: jax.Array, noise: Any, draws: int, x: jax.Array) -> jax.Array:
    """(draws, B, ...): under each draw's key the same noise for all rows, as ``Randomized`` has."""

    def draw(i: jax.Array) -> jax.Array:
        same = jnp.broadcast_to(jax.random.fold_in(key, i), x.shape[:1])
        return jax.vmap(noise.perturb)(same, x)

    return jax.vmap(draw)(jnp.arange(draws))


def _ask(key: jax.Array, host: drive.Host, noise: Any, draws: int, x: np.ndarray) -> np.ndarray:
    """What :func:`_surrogate` gives at ``x``, by one query of a black box."""
    copies = _copies(key, noise, draws, jnp.asarray(x))
    logits = np.asarray(host(copies.reshape(-1, *x.shape[1:])), np.float64)
    finite = np.isfinite(logits).all(axis=1, keepdims=True)
    logs = special.log_softmax(np.where(finite, logits, 0.0), axis=1)
    logs = np.where(finite, logs, np.nan).reshape(draws, len(x), -1)
    return special.logsumexp(logs, axis=0) - math.log(draws)


@functools.lru_cache(maxsize=64)
def _counter(samples: int) -> Callable[..., jax.Array]:
    def count(
        key: jax.Array, model: Any, x: jax.Array, noise: Any, ids: jax.Array, start: jax.Array
    ) -> jax.Array:
        return smoothing.count_votes(key, model, x, noise, samples, start=start, ids=ids)

    return count


def _length(norm: str, x: np.ndarray, x0: np.ndarray, pixels: bool) -> np.ndarray:
    """(B,) float64 distance of (B, ...) points, rounded up, as radii are rounded down."""
    change = np.abs(x.astype(np.float64) - x0.astype(np.float64))
    if norm == "L0":
        moved = np.asarray(change > 0)
        if pixels:
            moved = np.asarray(moved.any(axis=-1))
        return moved.sum(axis=tuple(range(1, moved.ndim))).astype(np.float64)
    flat = change.reshape(len(x), math.prod(x.shape[1:]))
    if norm == "Linf":
        return flat.max(axis=1, initial=0.0)
    length = flat.sum(axis=1) if norm == "L1" else np.sqrt((flat**2).sum(axis=1))
    return length * (1 + 2.0**-40)


def _drawn(noise: Any) -> Any:
    """The noise inside of all that restates its radius or masks it."""
    return _drawn(noise.noise) if hasattr(noise, "noise") else noise


def _pixels(attack: Attack, noise: Any) -> bool:
    """Whether L0 counts pixels or values: as the noise does, else as the attack's threat."""
    return getattr(attack.threats()[0] if noise is None else _drawn(noise), "pixels", True)


class _Judge:
    """Whether the smoothed classifier's answer at a point differs from the certified one."""

    def __init__(
        self,
        key: jax.Array,
        model: Any,
        noise: Any,
        data: Dataset,
        votes: int,
        alpha: float,
        mesh: Mesh,
        clock: Clock,
    ) -> None:
        self._key, self._model, self._noise, self._data = key, model, noise, data
        self._votes, self._alpha, self._clock = votes, alpha, clock
        self.lanes = lane_count(_LANES, len(data), mesh)
        self.programs = Programs(self._jobs, self.lanes, mesh, clock)

    def _jobs(self, lanes: int) -> dict[str, Job]:
        example = np.resize(np.arange(len(self._data)), lanes)
        args = self._args(self._data.x[example], example, 0)
        return {"verdicts": Job(_counter(self._votes), args, (None, None, 0, None, 0, None))}

    def _args(self, x: np.ndarray, index: np.ndarray, test: int) -> tuple[Any, ...]:
        ids = jnp.asarray(self._data.id[index])
        # Every test of an example has samples of its own.
        start = jnp.uint32(test * self._votes)
        return self._key, self._model, jnp.asarray(x), self._noise, ids, start

    def counts(self, x: np.ndarray, index: np.ndarray, mask: np.ndarray, test: int) -> np.ndarray:
        """(L, C + 1) votes at ``x`` (L, ...), points of the examples ``index``; rows of ``mask``.

        A black box is not asked about the others: no copy of them is finite.
        """
        if drive.is_host(self._model):
            program: Callable[..., Any] = _counter(self._votes)
            x = np.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, np.float32(np.nan))
        else:
            program = self.programs["verdicts"]
        with self._clock.measure("run"):
            return parallel.fetch(program(*self._args(x, index, test)))

    def differs(self, counts: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """(L,) bool: the answer is another one, wrongly said with probability ``alpha`` at most.

        Rejects count as an answer, as they do against the certified one.
        """
        answers = smoothing.predict(np.pad(counts, ((0, 0), (0, 1))), self._alpha)
        return (answers != smoothing.ABSTAIN) & (answers != prediction)

    def closest(
        self,
        index: np.ndarray,
        mask: np.ndarray,
        towards: np.ndarray,
        reach: np.ndarray,
        prediction: np.ndarray,
        box: tuple[np.ndarray, np.ndarray],
        tests: range,
    ) -> Arrays:
        """Bisect the rays from the inputs ``index`` (L,) through ``towards`` (L, ...).

        They end at ``reach`` (L,) times the way, or at the box. Returns the closest points that
        differ, whether there are any, and what was counted where.
        """
        x0 = self._data.x[index]
        direction = towards.astype(np.float64) - x0
        low, high = np.zeros(len(x0)), reach
        best, found = x0.copy(), np.zeros(len(x0), bool)
        places, counted = [], []
        for test in tests:
            t = (low + high) / 2
            points = x0 + t.reshape(-1, *[1] * (x0.ndim - 1)) * direction
            points = np.clip(points.astype(np.float32), *box)
            counts = self.counts(points, index, mask, test)
            away = self.differs(counts, prediction)
            best[away], found = points[away], found | away
            low, high = np.where(away, low, t), np.where(away, t, high)
            places.append(t)
            counted.append(counts)
        return {
            "x": best[mask],
            "found": found[mask],
            "places": np.stack(places)[:, mask],
            "counts": np.stack(counted)[:, mask],
        }


def _box(attack: Attack, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    threat = attack.threats()[0]
    lo, hi = (np.asarray(bound, np.float32) for bound in (threat.lo, threat.hi))
    return np.broadcast_to(lo, shape), np.broadcast_to(hi, shape)


def _check(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    attacks: Mapping[str, Attack],
    noise: Any,
    certificate: Certified | None,
    options: Mapping[str, Any],
    votes: int,
    alpha: float,
) -> None:
    """Everything that can be wrong, before any compute."""
    keys.check(key)
    check_data(data)
    for name, attack in attacks.items():
        _run.check(attack, key, logits_fn, data.x, data.y, data.id)
        if drive.is_host(logits_fn) and needs_gradients(attack):
            raise TypeError(
                f"{name} needs gradients and a Host model has none: attack it by queries, or with "
                "estimator= from jrobust.zeroth_order"
            )
    if noise is None:
        if certificate is None:
            raise ValueError(
                "nothing to put to the test: pass the noise of a smoothed classifier, or the "
                "certificate= of the model itself, such as Claims(prediction, radius, 'Linf')"
            )
        if isinstance(certificate, smoothing.Certificate):
            raise ValueError(
                "this certificate is about a smoothed classifier: pass its noise, because the "
                "model itself may answer otherwise"
            )
    else:
        if is_dual(noise):
            raise TypeError("the sandwich puts one noise to the test, not two halves")
        if isinstance(noise, smoothing.Mixed):
            raise TypeError(
                "a certificate with Mixed is about the mix, and the votes on an attacked point are "
                "of its robust part alone: put that part to the test, with the noise inside"
            )
        if isinstance(_drawn(noise), smoothing.DiscreteGaussian):
            raise ValueError(
                "certificates with DiscreteGaussian are about inputs on its grid, and attacks "
                "leave it: put those of Gaussian(sigma) to the test"
            )
        noise.check()
        least = math.ceil(1 - math.log2(alpha))
        if votes < least:
            raise ValueError(
                f"votes = {votes} always abstain: with verdict_alpha split over all tests of an "
                f"example, to {alpha:g} each, at least {least} are needed"
            )
    if options.get("top", getattr(certificate, "top", 1)) != 1:
        raise ValueError(
            "a certificate that an answer stays among the top k is not contradicted by another "
            "answer: the sandwich takes those of top = 1"
        )
    if certificate is not None:
        if options:
            raise TypeError(
                f"{', '.join(sorted(options))}: options of certify, which is not run where a "
                "certificate= is given"
            )
        _check_certificate(certificate, data, noise, _classes(logits_fn, data))


def _classes(logits_fn: Any, data: Dataset) -> int:
    if drive.is_host(logits_fn):
        return int(np.iinfo(np.int32).max)
    return _run.count_classes(logits_fn, jnp.asarray(data.x[:1]))


def _check_certificate(certificate: Certified, data: Dataset, noise: Any, classes: int) -> None:
    prediction, radius = np.asarray(certificate.prediction), np.asarray(certificate.radius)
    shape = (len(data),)
    if prediction.shape != shape or prediction.dtype.kind not in "iu":
        raise ValueError(
            f"certificate.prediction must be integers of shape {shape}, one for each example, got "
            f"{prediction.dtype} of shape {prediction.shape}"
        )
    if prediction.min() < -1 or prediction.max() >= classes:
        raise ValueError(
            f"certificate.prediction must lie in -1 .. {classes - 1}, got {prediction.min()} .. "
            f"{prediction.max()}"
        )
    if radius.shape != shape or not np.all(radius >= 0):
        raise ValueError(
            f"certificate.radius must be numbers >= 0 of shape {shape}, got {radius.dtype} of "
            f"shape {radius.shape}"
        )
    if certificate.norm not in _NORMS or (noise is not None and certificate.norm != noise.norm):
        wanted = noise.norm if noise is not None else ", ".join(_NORMS)
        raise ValueError(f"certificate.norm must be {wanted}, got {certificate.norm!r}")
    if not 0 <= certificate.alpha < 1:
        raise ValueError(f"certificate.alpha must lie in [0, 1), got {certificate.alpha}")


def sandwich(
    key: jax.Array,
    logits_fn: Any,
    data: Dataset,
    attacks: Attack | Sequence[Attack] | Mapping[str, Attack],
    noise: smoothing.Noise | None = None,
    *,
    certificate: Certified | None = None,
    draws: int = 32,
    votes: int = 1000,
    rounds: int = 10,
    verdict_alpha: float = 1e-6,
    confidence: float = 0.999,
    batch_size: int | None = None,
    memory: int | None = None,
    directory: Any = None,
    resume: bool = True,
    mesh: Mesh | None = None,
    progress: bool = True,
    **options: Any,
) -> SandwichReport:
    """Certify and attack the same classifier at the same inputs: certified radius <= distance.

    A certificate says that the answer at input i is ``prediction[i]`` everywhere within
    ``radius[i]``. Attacks look for a point with another answer. Where one lies inside the ball,
    certificate and attack contradict each other, and one of them is wrong. The attacks leave the
    certified class, right or wrong, so that wrong answers are put to the test too; where the
    certificate abstains it claims nothing, and nothing is attacked. Distances are measured in the
    certificate's norm, in float64, whatever norm an attack is made for (in L0 pixels or values, as
    the noise or else the attack's threat counts them); attacks that look for the closest point
    (``DDN``, ``FMN``, ``CW``, ``FAB``) give distances that mean most.

    **With a noise** the certificate is about the smoothed classifier, and so is the attack. A
    gradient attack climbs the log of the mean softmax over ``draws`` fixed noisy copies (Salman et
    al. 2019), which is not the smoothed classifier: its point is a direction. Along it, up to four
    times as far, or four radii, and inside the attack's box, ``rounds`` bisections look for the
    closest point at which PREDICT (Cohen et al. 2019) says, from ``votes`` fresh copies, an answer
    other than the certified one. **Without a noise** the certificate is about the model itself: a
    point counts if a separate float32 forward pass of it gives another class, or logits that are
    not finite.

    **How many contradictions fail the run.** A claim is true if the certified class is the most
    probable answer in the whole ball.

    * A claim is false with probability at most ``alpha``, over the votes of the certificate.
    * At a point inside the ball of a true claim, PREDICT at level a names another answer with
      probability at most a, over its own votes. The tests of an example (``rounds`` for each
      attack) use samples of their own, so that each point is fixed when its votes are drawn, even
      though earlier tests chose it. At level ``verdict_alpha / (attacks * rounds)`` each, some test
      of the example is wrong with probability at most ``verdict_alpha`` (Boole's inequality).

    Hence an example is contradicted with probability at most ``p = alpha + verdict_alpha``. Votes
    come from the example's own keys, so that examples are independent given what the attacks drew,
    and the number of contradictions is at most Binomial(N, p) in distribution. N counts all
    examples: which ones abstain is random too, and of those that do not more than ``alpha`` may be
    false. The run fails where contradictions exceed the ``confidence`` quantile of that: right
    certificates fail with probability at most ``1 - confidence``. A deterministic certificate
    (``alpha`` 0) of the model itself has p = 0: the first contradiction fails. One of a smoothed
    classifier has ``p = verdict_alpha``: by default the first fails too, of up to 1,000 examples.
    Passing proves nothing: attacks may be weak, and claims false by little are not told from true
    ones.

    Args:
        key: one typed key. Certificate, surrogate, attacks and verdicts draw apart.
        logits_fn: (B, ...) -> (B, C), rows independent. A :class:`jrobust.drive.Host` is attacked
            by its answers alone; with a noise each query of an attack asks it ``draws`` times, each
            verdict ``votes`` times.
        data: the examples, float32, inside the attacks' boxes.
        attacks: one attack, a list, or a dict from names to attacks.
        noise: of the smoothed classifier.
        certificate: what to put to the test, for instance ``loops.certify(...).certificate`` with
            its noise, or :class:`Claims`. By default ``loops.certify`` makes one.
        draws: noisy copies in the surrogate that attacks climb.
        votes: noisy copies of each verdict.
        rounds: verdicts for each example and attack.
        verdict_alpha: probability that some verdict of an example is wrong.
        confidence: probability with which right certificates pass.
        batch_size: lanes of the attacks, as in :func:`evaluate`.
        memory: of certificate and attacks, as in :func:`evaluate`.
        directory: where to write ``examples.csv``, ``sandwich.npz`` (points and distances),
            ``sandwich.png`` (if matplotlib is installed), ``configuration.json`` and
            ``report.json``; certificate and attacks in folders of their own below it.
        resume: go on with the run in the directory; otherwise start over.
        mesh: devices to split every batch over; all when None.
        progress: show bars.
        **options: of :func:`certify`, such as ``n``, ``alpha``, ``stages`` and ``box``.

    Returns:
        The :class:`SandwichReport`.

    Raises:
        Contradicted: if the run fails; carries the report, after everything has been written.
        TypeError, ValueError: before any compute, for settings and data that cannot be right; if
            another run is in the directory.
    """
    named = _named(attacks)
    for name, value in (("draws", draws), ("votes", votes), ("rounds", rounds)):
        check_count(name, value)
    check_probability("verdict_alpha", verdict_alpha)
    check_probability("confidence", confidence)
    level = verdict_alpha / (len(named) * rounds)
    _check(key, logits_fn, data, named, noise, certificate, options, votes, level)
    mesh = parallel.automatic(mesh)
    clock, seconds = Clock(), dict[str, float]()
    path = located(directory)

    def below(name: str) -> pathlib.Path | None:
        return None if path is None else path / name

    common: dict[str, Any] = {
        "memory": memory, "resume": resume, "mesh": mesh, "progress": progress,
    }  # fmt: skip
    if certificate is None:
        assert noise is not None
        made = certify(
            jax.random.fold_in(key, _CERTIFY),
            logits_fn,
            data,
            noise,
            **options,
            directory=below("certify"),
            **common,
        )
        certificate, seconds["certify"] = made.certificate, sum(made.seconds.values())
    prediction = np.asarray(certificate.prediction).astype(np.int64)
    radius = np.asarray(certificate.radius, np.float64)
    certified = np.flatnonzero(prediction >= 0)

    host = drive.is_host(logits_fn)
    model, attacked, judge = logits_fn if host else _run.as_pytree(logits_fn), logits_fn, None
    if noise is not None:
        strong = _run.strong(noise)
        attacked = _surrogate(jax.random.fold_in(key, _SURROGATE), model, strong, draws)
        if len(certified):
            fresh = jax.random.fold_in(key, _VERDICTS)
            judge = _Judge(fresh, model, strong, data, votes, level, mesh, clock)

    total, x = len(data), np.array(data.x)
    distances, claimed = (np.full((len(named), total), np.inf) for _ in range(2))
    closest = np.full(total, -1)
    points: dict[str, np.ndarray] = {}
    for name, attack in named.items() if len(certified) else ():
        found = evaluate(
            jax.random.fold_in(key, _ATTACKS),
            attacked,
            Dataset(data.x[certified], prediction[certified], data.id[certified]),
            {name: attack},
            checks=False,
            batch_size=batch_size,
            directory=below(f"attack-{list(named).index(name) + 1}"),
            **common,
        )
        seconds[name] = sum(found.seconds.values())
        points[name] = np.array(data.x)
        points[name][certified] = found.x
        broken = certified[~found.examples["robust"]]
        ends = points[name][broken], data.x[broken]
        lengths = _length(certificate.norm, *ends, _pixels(attack, noise))
        claimed[list(named).index(name), broken] = lengths

    bound = min(certificate.alpha + (0.0 if noise is None else verdict_alpha), 1.0)
    allowed = 0 if bound == 0 else int(false_certificates(total, min(bound, 1 - 1e-9), confidence))
    configuration = {
        "attacks": {name: describe(attack) for name, attack in named.items()},
        "noise": None if noise is None else describe(noise),
        "norm": certificate.norm,
        "alpha": certificate.alpha,
        "draws": draws,
        "votes": votes,
        "rounds": rounds,
        "verdict_alpha": verdict_alpha,
        "confidence": confidence,
        "examples": total,
        **surroundings(key, mesh),
    }
    sides = (data.x, data.y, data.id, prediction, radius, points)

    def identity() -> dict[str, str]:
        if judge is None or host:
            return Programs(lambda _: {}, 1, mesh, clock).identity(sides, ())
        return judge.programs.identity(sides, model)

    folder = Folder(path, configuration, identity, resume=resume, columns=_COLUMNS)
    with Bar(progress, "image") as bar:
        for number, (name, attack) in enumerate(named.items()):
            hit, reached = np.flatnonzero(np.isfinite(claimed[number])), points.get(name, x)
            if judge is not None:
                tests = range(number * rounds, (number + 1) * rounds)
                box, parts, done = _box(attack, data.x.shape[1:]), [np.zeros(0, bool)], 0
                for batch, (piece, mask) in enumerate(rows(hit, judge.lanes)):
                    found_at = np.maximum(claimed[number, piece], np.finfo(np.float64).tiny)
                    look = functools.partial(
                        judge.closest,
                        piece,
                        mask,
                        points[name][piece],
                        _REACH * np.maximum(1, np.minimum(radius[piece] / found_at, 1e6)),
                        prediction[piece],
                        box,
                        tests,
                    )
                    seen = folder.once(f"{number + 1}-{batch:06d}", look)
                    reached[piece[mask]] = seen["x"]
                    parts.append(seen["found"])
                    done += int(mask.sum())
                    bar.update(f"verdicts on {name}", done, len(hit))
                hit = hit[np.concatenate(parts)]
            ends = reached[hit], data.x[hit]
            distances[number, hit] = _length(certificate.norm, *ends, _pixels(attack, noise))
            nearer = hit[distances[number, hit] < distances[:number, hit].min(0, initial=np.inf)]
            x[nearer], closest[nearer] = reached[nearer], number
    distance = distances.min(axis=0)
    status = np.where(np.isfinite(distance), "attacked", "standing").astype("<U12")
    status[np.isfinite(distance) & (distance <= radius)] = "contradicted"
    status[prediction < 0] = "abstained"
    correct = prediction == data.y
    columns = (data.id, data.y, prediction, correct, status, radius, distance, closest)
    report = SandwichReport(
        examples=dict(zip(_COLUMNS, columns)),
        x=x,
        attacks=tuple(named),
        distances=distances,
        claimed=claimed,
        certificate=certificate,
        allowed=allowed,
        confidence=confidence,
        verdict_alpha=0.0 if noise is None else verdict_alpha,
        configuration=folder.configuration,
        seconds={**seconds, "verdicts": sum(clock.seconds.values())},
    )
    folder.examples(report.examples)
    folder.save("sandwich.npz", x=x, id=data.id, distances=distances, claimed=claimed)
    folder.finish({**report.summary(), "confidence": confidence, "seconds": report.seconds})
    if path is not None and parallel.is_main() and importlib.util.find_spec("matplotlib"):
        report.plot().savefig(path / "sandwich.png", dpi=200, metadata={"Software": None})
    if report.failed:
        raise Contradicted(report)
    return report
