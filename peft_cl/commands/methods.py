"""The methods by the names that the command knows them by."""

from __future__ import annotations

from dataclasses import dataclass

from ..strategies import OSF, FineTuning, FirstSessionLoRA, NearestClassMean, SequentialLoRA, SlowLearner
from ..trainer import Strategy
from ..tuners import CodaPromptConfig, DualPromptConfig, L2PConfig, LinearProbeConfig
from ..tuners.base.config import PromptPoolConfig


@dataclass(frozen=True)
class Method:
    """An adapter's configuration, how it is trained, and settings of the adapter that differ from its defaults.

    `preset` is what a run begins with that names none and adds no strategy.
    """

    config_class: type[PromptPoolConfig]
    strategy_class: type[Strategy] = Strategy
    defaults: tuple[tuple[str, object], ...] = ()
    preset: str | None = None

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone changes, so that it must be float32 and be saved with the adapter."""
        return issubclass(self.strategy_class, FineTuning)

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.strategy_class.name or self.config_class.method

    def fits(self, config: PromptPoolConfig) -> bool:
        """Whether it is a way to go on with an adapter of this configuration."""
        return type(config) is self.config_class and (config.head == "linear" or self.preset == "best")

    def configure(self, preset: str | None = None, **settings: object) -> PromptPoolConfig:
        """Make the adapter's configuration.

        Raises:
            ValueError: A preset that the method does not have, or a setting that it refuses.
        """
        settings = {**dict(self.defaults), **settings}
        return self.config_class.from_preset(preset, **settings) if preset else self.config_class(**settings)


UNMASKED = (("train_mask", False),)
METHODS = {
    "l2p": Method(L2PConfig, preset="best"),
    "dualprompt": Method(DualPromptConfig, preset="best"),
    "coda": Method(CodaPromptConfig, preset="best"),
    "frozen": Method(LinearProbeConfig, preset="best"),
    "linear-probe": Method(LinearProbeConfig),
    # Fine-tuning means the plain cross-entropy over all classes seen, without the mask that the prompt methods have.
    "fine-tuning": Method(LinearProbeConfig, FineTuning, defaults=UNMASKED),
    "slow-learner": Method(LinearProbeConfig, SlowLearner),
    "lora": Method(LinearProbeConfig, SequentialLoRA, defaults=UNMASKED),
    "first-session-lora": Method(LinearProbeConfig, FirstSessionLoRA),
    "osf": Method(LinearProbeConfig, OSF, defaults=UNMASKED),
    "nearest-class-mean": Method(LinearProbeConfig, NearestClassMean),
}
