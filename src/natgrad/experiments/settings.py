"""What one run of the autoencoder experiment is: every choice that its numbers depend on.

`Settings` is immutable, validates itself, and is what `config.json` holds. `LIMITS` names the fields that a resumed run
may change: they say when to stop, not what happens on the way.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

ARTICLE_IMAGES = 10_000
NONLINEARITIES = ("sigmoid", "relu")
LIMITS = ("steps", "seconds")
DEFAULT_STEPS = 100


class SettingsError(ValueError):
    """The user asked for something that this experiment does not have; the message says what it has."""


@dataclass(frozen=True)
class Settings:
    """One run: the problem, who trains on it, and when to stop.

    Attributes:
        optimizers: Names from the registry in `contestants`.
        nonlinearity: ``"sigmoid"`` (the article's) or ``"relu"``, after every layer, the output included.
        weight_norm: Reparameterize every layer with `torch.nn.utils.parametrizations.weight_norm`.
        batch_size: Images a step; None is the full batch.
        width_divisor: The article's 1024 hidden units and 196 code units are divided by this.
        images: Number of training images, and of test images.
        steps: Stop each optimizer after so many steps.
        seconds: Stop each optimizer after so many seconds of its own training time.
        seed: Of the initial weights and of the order of minibatches.
        threads: Of torch; None leaves torch's default.
        eval_every: Steps between evaluations of the test loss; None is every step on full batches, four times an epoch
            on minibatches (an evaluation costs about as much as that much training).
    """

    optimizers: tuple[str, ...] = ("adam", "kfac")
    nonlinearity: str = "sigmoid"
    weight_norm: bool = False
    batch_size: int | None = None
    width_divisor: int = 1
    images: int = ARTICLE_IMAGES
    steps: int | None = None
    seconds: float | None = None
    seed: int = 1
    threads: int | None = None
    eval_every: int | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        if not self.optimizers:
            raise SettingsError("no optimizer given: name at least one, for example --optimizers adam,kfac")
        if len(set(self.optimizers)) != len(self.optimizers):
            raise SettingsError(f"an optimizer is named twice in {','.join(self.optimizers)}: name each once")
        if self.nonlinearity not in NONLINEARITIES:
            raise SettingsError(
                f"unknown nonlinearity {self.nonlinearity!r}: choose one of {', '.join(NONLINEARITIES)}"
            )
        if not 1 <= self.width_divisor <= 196:
            raise SettingsError(
                f"width_divisor is {self.width_divisor}: the code layer has 196 units, so give 1 to 196"
            )
        if not 1 <= self.images <= ARTICLE_IMAGES:
            raise SettingsError(
                f"images is {self.images}: the 20,000 images shipped are half for training, half for test, "
                f"so give 1 to {ARTICLE_IMAGES}"
            )
        if self.batch_size is not None and not 1 <= self.batch_size <= self.images:
            raise SettingsError(f"batch_size is {self.batch_size}: give 1 to {self.images} (the number of images)")
        for name in ("steps", "seconds", "threads", "eval_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"{name} is {value}: give a positive number")

    @property
    def is_full_batch(self) -> bool:
        """Whether every step sees all training images."""
        return self.batch_size in (None, self.images)

    @property
    def batches_per_epoch(self) -> int:
        """Steps in which every image is used once (the last, incomplete batch is left out)."""
        return self.images // (self.batch_size or self.images)

    @property
    def evaluation_interval(self) -> int:
        """Steps between two evaluations of the test loss."""
        return self.eval_every or max(1, self.batches_per_epoch // 4)

    @property
    def is_full_size(self) -> bool:
        """Whether the curves recorded in 2017 are of this very problem (for its nonlinearity)."""
        return self.images == ARTICLE_IMAGES and self.width_divisor == 1 and self.is_full_batch and not self.weight_norm

    @property
    def problem(self) -> tuple[object, ...]:
        """What must be equal for two runs to be comparable."""
        return self.nonlinearity, self.weight_norm, self.batch_size or self.images, self.width_divisor, self.images

    def describe(self) -> str:
        """The problem in one line, for titles."""
        parts = [
            "784-1024-1024-1024-196-1024-1024-1024-784" if self.width_divisor == 1 else f"1/{self.width_divisor} width"
        ]
        parts += [self.nonlinearity, f"{self.images:,} images"]
        parts += ["full batch" if self.is_full_batch else f"batches of {self.batch_size}"]
        parts += ["weight norm"] if self.weight_norm else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """A dictionary for `json.dump`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_json`; unknown keys are refused."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise SettingsError(
                f"unknown settings {sorted(unknown)}: was this run written by another version of natgrad?"
            )
        return cls(**{**values, "optimizers": tuple(values["optimizers"])})

    def differences(self, given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Which of the ``given`` values differ from these settings, `LIMITS` aside: name -> (ours, given)."""
        ours = self.to_json()
        return {k: (ours[k], v) for k, v in given.items() if k not in LIMITS and ours[k] != v}
