"""Attacks: ``attack(key, logits_fn, x, y, *, ids=None, targets=None) -> AttackResult``."""

from jrobust.attacks._alma import ALMA
from jrobust.attacks._apgd import APGD
from jrobust.attacks._autoattack import AutoAttack
from jrobust.attacks._bandits import Bandits
from jrobust.attacks._base import Attack, AttackResult, GradientAttack, Record, State
from jrobust.attacks._boundary import Boundary
from jrobust.attacks._compose import (
    EoT,
    MultiTargeted,
    Restarts,
    Sequence,
    Union,
    eot,
    multi_targeted,
    restarts,
    sequence,
    union,
    with_eps,
)
from jrobust.attacks._cw import CW, CWLinf
from jrobust.attacks._ddn import DDN
from jrobust.attacks._deepfool import DeepFool
from jrobust.attacks._ead import EAD
from jrobust.attacks._fab import FAB
from jrobust.attacks._fmn import FMN
from jrobust.attacks._hopskipjump import HopSkipJump
from jrobust.attacks._jsma import JSMA
from jrobust.attacks._minimal import MinimalNorm
from jrobust.attacks._msd import MSD
from jrobust.attacks._nes import NES, SPSA
from jrobust.attacks._pdgd import PDGD
from jrobust.attacks._pgd import FGSM, MIFGSM, PGD, RSFGSM
from jrobust.attacks._quantized import Quantized, quantized
from jrobust.attacks._rays import RayS
from jrobust.attacks._simba import SimBA
from jrobust.attacks._spatial import RotationTranslation, Spatial
from jrobust.attacks._square import Square
from jrobust.attacks._transfer import (
    DIFGSM,
    NIFGSM,
    SINIFGSM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    DiverseInput,
    ScaledCopies,
    TransferPGD,
    Transform,
    gaussian_kernel,
)
from jrobust.attacks._universal import SGDUAP, UAP, Universal, UniversalResult
from jrobust.attacks._zoo import ZOO

__all__ = [
    "ALMA",
    "APGD",
    "CW",
    "DDN",
    "DIFGSM",
    "EAD",
    "FAB",
    "FGSM",
    "FMN",
    "JSMA",
    "MIFGSM",
    "MSD",
    "NES",
    "NIFGSM",
    "PDGD",
    "PGD",
    "RSFGSM",
    "SGDUAP",
    "SINIFGSM",
    "SPSA",
    "TIFGSM",
    "UAP",
    "VMIFGSM",
    "VNIFGSM",
    "ZOO",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Bandits",
    "Boundary",
    "CWLinf",
    "DeepFool",
    "DiverseInput",
    "EoT",
    "GradientAttack",
    "HopSkipJump",
    "MinimalNorm",
    "MultiTargeted",
    "Quantized",
    "RayS",
    "Record",
    "Restarts",
    "RotationTranslation",
    "ScaledCopies",
    "Sequence",
    "SimBA",
    "Spatial",
    "Square",
    "State",
    "TransferPGD",
    "Transform",
    "Union",
    "Universal",
    "UniversalResult",
    "eot",
    "gaussian_kernel",
    "multi_targeted",
    "quantized",
    "restarts",
    "sequence",
    "union",
    "with_eps",
]
