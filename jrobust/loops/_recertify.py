"""Certificates from the log of a certification, without the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrobust import smoothing
from jrobust._algorithm import describe
from jrobust.loops import _votes_log
from jrobust.loops._certify import CertificationReport
from jrobust.loops._folder import located, stored_configuration
from jrobust.loops._programs import Clock
from jrobust.smoothing._certify import check_top


def recertify(
    directory: Any,
    *,
    alpha: float | None = None,
    n: int | None = None,
    stages: Sequence[int] | None = None,
    radius: float | None = None,
    top: int | None = None,
    two_bounds: bool | None = None,
    anytime: bool | None = None,
    pairs: int | None = None,
    noise: smoothing.Noise | None = None,
) -> CertificationReport:
    """Certificates from the log of a :func:`certify` run, under another rule, without the model.

    Equal, to the bit, to those of a run that is made with these settings, the same ``block`` and
    the same shape of forward passes. What is left None is as it was in the run.

    **Settings must not be chosen by their outcome.** Each report is right with probability 1 -
    alpha in each certificate if its settings were fixed without a look at these counts. The n, the
    rule or the radius that looks best among several is not such a choice: report one that was
    planned, or split alpha over all that were tried. The exception is n under ``anytime``.

    Args:
        directory: of a run, finished or not; nothing is written there.
        alpha: probability that one certificate is false.
        n: votes of each example, a multiple of the log's block: all examples get so many, without
            stages.
        stages: total votes after each stage, multiples of the block; ``n`` and ``stages`` replace
            the run's stages and radius.
        radius: what stages stop at.
        top: as in :func:`certify`, like ``two_bounds`` and ``anytime``.
        pairs: of a run with a fast voter, as many of its pairs, a multiple of the block.
        noise: the run's noise, where it is none of ``jrobust.smoothing``'s, or holds an array that
            the log names by a digest, as the masks of halves of larger images; or the same noise
            in :class:`jrobust.smoothing.Converted`, for radii in another norm.

    Returns:
        A report; its counts are those that the rule asks for, ``seconds`` only this call's.

    Raises:
        ValueError: if there is no log, or a damaged one; if the rule asks for votes that were not
            counted, or that are not whole blocks; settings that make no sense; another noise.
    """
    directory = located(directory)
    clock, stored = Clock(), stored_configuration(directory)
    if "block" not in stored:
        raise ValueError(f"{directory} holds no certification run: give the directory of one")
    # Read before the configuration is used: the files tell whether that is whole.
    batches = _votes_log.read(directory, stored)
    first = next(batches, None)
    if first is None:
        raise ValueError(f"{directory} holds no votes yet")
    noise = _votes_log.noise_of(stored, noise)
    if n is None and stages is None:
        n, stages = stored["n"], stored["stages"]
        radius = stored["radius"] if radius is None else radius
    pairs = stored["pairs"] if pairs is None else pairs
    if pairs is not None and pairs > (stored["pairs"] or 0):
        raise ValueError(f"pairs must be at most the log's {stored['pairs'] or 0}, got {pairs}")
    rule = _votes_log.rule(
        noise,
        alpha=stored["alpha"] if alpha is None else alpha,
        n=n,
        stages=stages,
        radius=radius,
        top=stored["top"] if top is None else top,
        two_bounds=stored["two_bounds"] if two_bounds is None else two_bounds,
        anytime=stored["anytime"] if anytime is None else anytime,
        pairs=pairs,
    )
    check_top(rule.bounds.top, first["estimate"].shape[-1] - 1)
    block = _votes_log.block_size(rule, stored["block"])
    total = stored["examples"]
    votes = _votes_log.Votes(total, rule, block)
    examples, files = np.zeros((2, total), np.int64), 0
    for batch in itertools.chain([first], batches):
        files += 1
        votes.enter(batch)
        examples[:, batch["index"]] = batch["id"], batch["y"]
    try:
        certificate, estimate = votes.certify(np.arange(total))
    except _votes_log.Missing as missing:
        raise ValueError(
            f"the log in {directory} has fewer than the {missing.n} votes that this rule asks for "
            f"of {len(missing.rows)} of {total} examples: ask for fewer, or for a radius that the "
            "run did not close them at; if the run was interrupted, the call that made it goes on"
        ) from missing
    return CertificationReport(
        certificate=certificate,
        select_counts=votes.select,
        estimate_counts=estimate,
        y=examples[1],
        id=examples[0].astype(np.int32),
        configuration={**stored, **rule.settings(), "noise": describe(noise)},
        seconds=clock.total(),
        resumed=files,
        disagreements=votes.disagreements if rule.pairs else None,
    )
