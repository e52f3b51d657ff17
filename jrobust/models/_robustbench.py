"""Architectures and arguments of published models, by their identifier in RobustBench."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from jrobust.models._networks import CIFAR10
from jrobust.models._resnets import PreActResNet18, ResNet18, ResNet50, WideResNet

# Means and deviations as the classes of RobustBench's model zoo have them.
_RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_SHORT = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
_KUANGLIU = CIFAR10[0], (0.2023, 0.1994, 0.2010)
_LONG = (
    (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_CIFAR100_B = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_CIFAR100_LONG = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)

_Constants = tuple[tuple[float, ...], tuple[float, ...]]


def _wrn(depth: int, width: int, constants: _Constants = _RAW, classes: int = 10) -> WideResNet:
    return WideResNet(depth, width, classes, mean=constants[0], std=constants[1])


def _deepmind_wrn(
    depth: int, width: int, constants: _Constants = CIFAR10, classes: int = 10
) -> WideResNet:
    mean, std = constants
    return WideResNet(depth, width, classes, nn.silu, "same", mean=mean, std=std)


def _deepmind_r18(constants: _Constants = CIFAR10, classes: int = 10) -> PreActResNet18:
    return PreActResNet18(
        classes,
        activation=nn.silu,
        shortcut="input3x3",
        padding="same",
        final_norm=True,
        mean=constants[0],
        std=constants[1],
    )


def _prn(
    constants: _Constants, classes: int = 10, shortcut: str = "activated", final_norm: bool = True
) -> PreActResNet18:
    mean, std = constants
    return PreActResNet18(classes, shortcut=shortcut, final_norm=final_norm, mean=mean, std=std)


def _r18(constants: _Constants = _RAW) -> ResNet18:
    return ResNet18(mean=constants[0], std=constants[1])


def _r50(constants: _Constants) -> ResNet50:
    return ResNet50(10, "cifar", mean=constants[0], std=constants[1])


def _hundred(depth: int, width: int, constants: _Constants = _RAW) -> WideResNet:
    return _wrn(depth, width, constants, 100)


_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("cifar10", "Linf"): {
        "Standard": _wrn(28, 10),
        "Andriushchenko2020Understanding": _prn(_RAW, shortcut="input", final_norm=False),
        "Wong2020Fast": _prn(CIFAR10, shortcut="input", final_norm=False),
        "Engstrom2019Robustness": _r50(_KUANGLIU),
        "Carmon2019Unlabeled": _wrn(28, 10),
        "Sehwag2020Hydra": _wrn(28, 10),
        "Wang2020Improving": _wrn(28, 10),
        "Wu2020Adversarial_extra": _wrn(28, 10),
        "Zhang2020Geometry": _wrn(28, 10),
        "Sridhar2021Robust": _wrn(28, 10),
        "Hendrycks2019Using": _wrn(28, 10, _HALF),
        "Zhang2019Theoretically": _wrn(34, 10),
        "Huang2020Self": _wrn(34, 10),
        "Zhang2019You": _wrn(34, 10),
        "Zhang2020Attacks": _wrn(34, 10),
        "Wu2020Adversarial": _wrn(34, 10),
        "Sehwag2021Proxy": _wrn(34, 10),
        "Sitawarin2020Improving": _wrn(34, 10),
        "Cui2020Learnable_34_10": _wrn(34, 10),
        "Addepalli2021Towards_WRN34": _wrn(34, 10),
        "Addepalli2022Efficient_WRN_34_10": _wrn(34, 10),
        "Chen2021LTD_WRN34_10": _wrn(34, 10),
        "Jia2022LAS-AT_34_10": _wrn(34, 10),
        "Chen2020Efficient": _wrn(34, 10, CIFAR10),
        "Sridhar2021Robust_34_15": _wrn(34, 15),
        "Cui2020Learnable_34_20": _wrn(34, 20),
        "Chen2021LTD_WRN34_20": _wrn(34, 20),
        "Rice2020Overfitting": _wrn(34, 20, CIFAR10),
        "Jia2022LAS-AT_70_16": _wrn(70, 16),
        "Sehwag2021Proxy_R18": _r18(),
        "Addepalli2021Towards_RN18": _r18(),
        "Addepalli2022Efficient_RN18": _r18(),
        "Gowal2020Uncovering_28_10_extra": _deepmind_wrn(28, 10),
        "Gowal2020Uncovering_34_20": _deepmind_wrn(34, 20),
        "Gowal2020Uncovering_70_16": _deepmind_wrn(70, 16),
        "Gowal2020Uncovering_70_16_extra": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": _deepmind_wrn(28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_106_16_cutmix_ddpm": _deepmind_wrn(106, 16),
        "Gowal2021Improving_28_10_ddpm_100m": _deepmind_wrn(28, 10),
        "Gowal2021Improving_70_16_ddpm_100m": _deepmind_wrn(70, 16),
        "Rade2021Helper_ddpm": _deepmind_wrn(28, 10),
        "Rade2021Helper_extra": _deepmind_wrn(34, 10),
        "Pang2022Robustness_WRN28_10": _deepmind_wrn(28, 10),
        "Pang2022Robustness_WRN70_16": _deepmind_wrn(70, 16),
        "Wang2023Better_WRN-28-10": _deepmind_wrn(28, 10),
        "Wang2023Better_WRN-70-16": _deepmind_wrn(70, 16),
        "Xu2023Exploring_WRN-28-10": _deepmind_wrn(28, 10),
        "Rebuffi2021Fixing_R18_ddpm": _deepmind_r18(),
        "Gowal2021Improving_R18_ddpm_100m": _deepmind_r18(),
        "Rade2021Helper_R18_ddpm": _deepmind_r18(),
        "Rade2021Helper_R18_extra": _deepmind_r18(),
    },
    ("cifar10", "L2"): {
        "Standard": _wrn(28, 10),
        "Augustin2020Adversarial": _r50(_LONG),
        "Engstrom2019Robustness": _r50(_KUANGLIU),
        "Rice2020Overfitting": _prn(CIFAR10),
        "Rony2019Decoupling": _wrn(28, 10, _SHORT),
        "Wu2020Adversarial": _wrn(34, 10),
        "Sehwag2021Proxy": _wrn(34, 10),
        "Augustin2020Adversarial_34_10": _wrn(34, 10, _LONG),
        "Augustin2020Adversarial_34_10_extra": _wrn(34, 10, _LONG),
        "Sehwag2021Proxy_R18": _r18(),
        "Gowal2020Uncovering": _deepmind_wrn(70, 16),
        "Gowal2020Uncovering_extra": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": _deepmind_wrn(28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra": _deepmind_wrn(70, 16),
        "Wang2023Better_WRN-28-10": _deepmind_wrn(28, 10),
        "Wang2023Better_WRN-70-16": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_R18_cutmix_ddpm": _deepmind_r18(),
        "Rade2021Helper_R18_ddpm": _deepmind_r18(),
    },
    ("cifar10", "corruptions"): {
        "Standard": _wrn(28, 10),
        "Addepalli2021Towards_WRN34": _wrn(34, 10),
        "Addepalli2022Efficient_WRN_34_10": _wrn(34, 10),
        "Hendrycks2020AugMix_WRN": _wrn(40, 2, _HALF),
        "Kireev2021Effectiveness_Gauss50percent": _prn(CIFAR10),
        "Kireev2021Effectiveness_AugMixNoJSD": _prn(CIFAR10),
        "Kireev2021Effectiveness_RLAT": _prn(CIFAR10),
        "Kireev2021Effectiveness_RLATAugMixNoJSD": _prn(CIFAR10),
        "Kireev2021Effectiveness_RLATAugMix": _prn(CIFAR10),
        "Rebuffi2021Fixing_70_16_cutmix_extra_Linf": _deepmind_wrn(70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra_L2": _deepmind_wrn(70, 16),
    },
    ("cifar100", "Linf"): {
        "Rice2020Overfitting": _prn(_CIFAR100_LONG, 100),
        "Addepalli2021Towards_PARN18": _prn(_RAW, 100),
        "Hendrycks2019Using": _hundred(28, 10, _HALF),
        "Wu2020Adversarial": _hundred(34, 10, _CIFAR100_LONG),
        "Chen2020Efficient": _hundred(34, 10, _CIFAR100_B),
        "Sitawarin2020Improving": _hundred(34, 10),
        "Addepalli2021Towards_WRN34": _hundred(34, 10),
        "Chen2021LTD_WRN34_10": _hundred(34, 10),
        "Cui2020Learnable_34_10_LBGAT0": _hundred(34, 10),
        "Cui2020Learnable_34_10_LBGAT6": _hundred(34, 10),
        "Cui2020Learnable_34_20_LBGAT6": _hundred(34, 20),
        "Gowal2020Uncovering": _deepmind_wrn(70, 16, _CIFAR100, 100),
        "Gowal2020Uncovering_extra": _deepmind_wrn(70, 16, _CIFAR100, 100),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": _deepmind_wrn(28, 10, _CIFAR100, 100),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": _deepmind_wrn(70, 16, _CIFAR100, 100),
        "Rebuffi2021Fixing_R18_ddpm": _deepmind_r18(_CIFAR100, 100),
        "Rade2021Helper_R18_ddpm": _deepmind_r18(_CIFAR100, 100),
    },
}


def robustbench(name: str, dataset: str = "cifar10", threat_model: str = "Linf") -> nn.Module:
    """The network behind an identifier of RobustBench, its weights to come by :func:`from_torch`.

    ``module = robustbench("Wang2023Better_WRN-28-10")``, then
    ``from_torch(module, "Wang2023Better_WRN-28-10.pt")``; that of
    ``Andriushchenko2020Understanding`` and those of ``Kireev2021Effectiveness`` with
    ``entry="last"``. Architectures and input constants are those of RobustBench's model zoo.

    Args:
      name: the identifier.
      dataset: ``"cifar10"`` or ``"cifar100"``.
      threat_model: ``"Linf"``, ``"L2"`` or ``"corruptions"``.

    Raises ``ValueError`` for what is not in the table, with what is.
    """
    models = _MODELS.get((dataset, threat_model))
    if models is None:
        raise ValueError(
            f"no models of {dataset!r} and {threat_model!r} are known, only of "
            f"{', '.join(f'{d} {t}' for d, t in _MODELS)}"
        )
    if name not in models:
        raise ValueError(
            f"{name!r} is not known for {dataset} {threat_model}, only {', '.join(sorted(models))}"
        )
    return models[name]
