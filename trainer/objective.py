"""What a run minimises: the choices of conf/objective.

Each takes the model, on the meta device, and the `Setup` of the run beside its own keys.
"""

from models.hybrid import HybridLM
from trainer.distillation import DistillationLoss
from trainer.engine import LossModule
from trainer.errors import ConfigError
from trainer.layerwise import LayerwiseLoss, Norm, check_layers
from trainer.loss import LanguageModelLoss
from trainer.settings import Setup
from trainer.teacher import load_teacher


def language_model(*, model: HybridLM, setup: Setup) -> LossModule:
    return LanguageModelLoss(model, tile=setup.settings.loss_tile, autocast=setup.numerics.autocast)


def distillation(
    *,
    teacher: str,
    shard_teacher: bool,
    temperature: float,
    ce_weight: float,
    model: HybridLM,
    setup: Setup,
) -> LossModule:
    """Raises ValueError, and ConfigError for a teacher that has none of these words."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; allowed: above 0")
    if not 0 <= ce_weight <= 1:
        raise ValueError(f"ce_weight is {ce_weight}; allowed: 0 to 1")
    return DistillationLoss(
        model,
        teacher=load_teacher(teacher, student=model, setup=setup, shard=shard_teacher),
        temperature=temperature,
        ce_weight=ce_weight,
        tile=setup.settings.loss_tile,
        autocast=setup.numerics.autocast,
    )


def layerwise(
    *, teacher: str, shard_teacher: bool, norm: Norm, model: HybridLM, setup: Setup
) -> LossModule:
    """Raises ConfigError for a teacher of another shape."""
    if setup.settings.compile:
        raise ConfigError(
            "trainer.compile=true: objective=ild watches the mixers, which a compiled layer does "
            "not show; allowed: false"
        )
    return LayerwiseLoss(
        model,
        teacher=load_teacher(
            teacher, student=model, setup=setup, shard=shard_teacher, check=check_layers
        ),
        norm=norm,
        tile=setup.settings.loss_tile,
        autocast=setup.numerics.autocast,
    )
