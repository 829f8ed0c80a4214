"""Sets the probability of ADA's transforms: fixed, ramped, or adapted to how sure D is of real images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distgan.objective import SIGN
from distgan.objective.augment import Augment
from distgan.parallel.ranks import Wrapping
from distgan.recipe import Config
from distgan.schedules import ramped

MOST = 0.8
"""The highest adapted probability. Above it, generators begin to draw augmented images (Karras et al. 2020, section 2.2
and figure 3)."""

_EVERY = 4  # steps between two changes (Karras et al. 2020, section 3.1: every four minibatches)


class Adaptation:
    """The probability of ADA's transforms over a run, the same on all ranks.

    An adapted one starts at 0 and changes every four steps by a constant amount: up if the mean sign of the logits of
    real images since the last change is above `augment.target`, otherwise down. It stays between 0 and `MOST`. Nothing
    waits for the device; a change costs one collective of one number. Signs are counted in whole images, so that sums
    are exact on any number of ranks.
    """

    def __init__(self, config: Config, augment: Augment, ranks: Wrapping) -> None:
        """Moves the augmentation's probability to the device."""
        self._augment, self._ranks, self._adaptive = augment, ranks, config.augment.adaptive
        self._course = ramped(config, config.augment.probability or 0.0, config.ramp.probability)
        self._logs = self._adaptive or config.augment.probability is not None
        self._target = config.augment.target
        self._images = _EVERY * config.images_per_step  # between two changes, on all ranks
        self._change = self._images / config.augment.adapt_over
        self._share = config.train.batch_size / ranks.world
        self._known = self._course(0)  # if it is not adapted
        augment.probability = augment.probability.to(ranks.device)
        self._signs = torch.zeros((), dtype=torch.float64, device=ranks.device)  # of this rank, since the last change

    def add(self, logged: Mapping[str, Tensor], weight: float) -> None:
        """Adds the mean sign of the logits of this rank's real images; `weight` is the part's weight in its share."""
        if SIGN in logged:  # of the discriminator's updates, if it is adapted
            self._signs += (logged[SIGN].double() * (weight * self._share)).round()

    def set(self, step: int) -> None:
        """Collective: sets the probability for the updates that follow this step."""
        probability = self._augment.probability
        if not self._adaptive:
            self._known = self._course(step)
            probability.fill_(self._known)
        elif step % _EVERY == 0 and step > 0:
            self._ranks.all_reduce_sums([self._signs])
            probability.add_((self._signs - self._target * self._images).sign() * self._change).clamp_(0, MOST)
            self._signs.zero_()

    @property
    def now(self) -> dict[str, float]:
        """Returns `augment/probability`, if there is one. Waits for the device if it is adapted."""
        if not self._logs:
            return {}
        return {"augment/probability": float(self._augment.probability) if self._adaptive else self._known}

    def state(self) -> dict[str, Any] | None:
        """Collective: returns what a checkpoint keeps of an adapted probability. Waits for the device."""
        if not self._adaptive:
            return None
        return {"probability": float(self._augment.probability), "signs": sum(self._ranks.gather(float(self._signs)))}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Restores a saved state. Rank zero takes the signs of all ranks, because their number may have changed."""
        if state is not None:
            self._augment.probability.fill_(state["probability"])
            self._signs.fill_(state["signs"] if self._ranks.rank == 0 else 0)
