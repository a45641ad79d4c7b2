"""Which times a sampler visits."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from carrara.diffusion.schedule import NoiseSchedule


class Spacing(ABC):
    """Chooses the times of `num_steps` steps: (num_steps + 1,), float64, falling from 1 to 0."""

    @abstractmethod
    def times(self, schedule: NoiseSchedule, num_steps: int) -> Tensor: ...

    def __call__(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        """The times; ValueError where the schedule has none of the kind, or too few."""
        if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, but a sampler makes a whole number of steps, one at least")
        return self.times(schedule, num_steps)


class Uniform(Spacing):
    """Even steps in t, on the table's indices where the schedule has a table."""

    def times(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        return schedule.times(num_steps)


class InNoiseLevels(Spacing):
    """Steps even in a function of logsnr, from t = 1 to the schedule's `t_min`, and one to the clean picture."""

    @abstractmethod
    def coordinate(self, logsnr: Tensor) -> Tensor: ...

    @abstractmethod
    def logsnr(self, coordinate: Tensor) -> Tensor:
        """The inverse of `coordinate`."""

    def times(self, schedule: NoiseSchedule, num_steps: int) -> Tensor:
        if schedule.terminal_snr_is_zero:
            raise ValueError(
                f"the {type(self).__name__} spacing is singular with the {type(schedule).__name__} schedule, whose SNR"
                " at t = 1 is zero; take the uniform spacing"
            )
        ends = torch.tensor([1.0, schedule.t_min], dtype=torch.float64)
        first, last = self.coordinate(schedule.logsnr(ends)).tolist()
        even = torch.linspace(first, last, num_steps, dtype=torch.float64)
        inner = schedule.t_from_logsnr(self.logsnr(even))[1:]
        return torch.cat([torch.ones(1).double(), inner, torch.zeros(1).double()])


class Karras(InNoiseLevels):
    """Even in (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5)."""

    def __init__(self, rho: float = 7.0) -> None:
        if rho <= 0:
            raise ValueError(f"rho must be positive, but is {rho}")
        self.rho = rho

    def coordinate(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / (2 * self.rho)).exp()

    def logsnr(self, coordinate: Tensor) -> Tensor:
        return -2 * self.rho * coordinate.log()


class LogSNR(InNoiseLevels):
    """Even in log SNR (Lu et al. 2022, section 4.3), which makes NCSN's geometric levels (Song & Ermon 2019)."""

    def coordinate(self, logsnr: Tensor) -> Tensor:
        return logsnr

    def logsnr(self, coordinate: Tensor) -> Tensor:
        return coordinate
