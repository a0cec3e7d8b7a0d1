"""What `kfdist.Optimizer` passes on to the Preconditioner that it makes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch

from kfdist.capture.requests import Sampling
from kfdist.curvature.auto import MeasuredCosts
from kfdist.links.link import AbstractLink
from kfdist.policies.staleness import Adoption
from kfdist.runtime.apply.rates import Scalar
from kfdist.runtime.invert.service import Service
from kfdist.runtime.plan.planner import Method
from kfdist.types import Fisher, WeightSharing


class Curvature(TypedDict, total=False):
    """The arguments of `kfdist.Preconditioner`, which documents them, but for the model and `lr`."""

    method: Method
    damping: Scalar
    ema_decay: float
    factor_period: int
    inverse_period: int | Mapping[int, int]
    fisher: Fisher
    weight_sharing: WeightSharing
    sampling: Sampling
    skip: Sequence[str]
    kl_clip: Scalar | None
    adoption: Literal["asap"] | Adoption
    seed: int
    digest_period: int
    grad_scaler: torch.amp.GradScaler | None
    process_group: Any
    link: Service | AbstractLink | None
    costs: MeasuredCosts | None
