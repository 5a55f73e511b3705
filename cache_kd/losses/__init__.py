"""Distillation losses: pure functions in one file a method, their modules, and the table of names."""

from cache_kd.losses.at import AT
from cache_kd.losses.base import DistillLoss
from cache_kd.losses.bckd import BCKD
from cache_kd.losses.crosskd import CrossKD
from cache_kd.losses.cwd import CWD
from cache_kd.losses.dkd import DKD
from cache_kd.losses.fgd import FGD
from cache_kd.losses.fgfi import FGFI
from cache_kd.losses.fsp import FSP
from cache_kd.losses.ho import HO
from cache_kd.losses.ifvd import IFVD
from cache_kd.losses.kd import KD
from cache_kd.losses.ld import LD
from cache_kd.losses.local import LOCAL
from cache_kd.losses.mgd import MGD
from cache_kd.losses.mimic import MIMIC
from cache_kd.losses.nkd import NKD
from cache_kd.losses.pa import PA
from cache_kd.losses.pi import PI
from cache_kd.losses.pkd import PKD
from cache_kd.losses.sl2 import SL2
from cache_kd.losses.spec import LossSpec, build_loss, parse_loss, parse_losses
from cache_kd.losses.wsld import WSLD

LOSSES: dict[str, type[DistillLoss]] = {
    "cwd": CWD,
    "ld": LD,
    "bckd": BCKD,
    "crosskd": CrossKD,
    "kd": KD,
    "nkd": NKD,
    "dkd": DKD,
    "wsld": WSLD,
    "mimic": MIMIC,
    "mgd": MGD,
    "fgd": FGD,
    "fsp": FSP,
    "pkd": PKD,
    "fgfi": FGFI,
    "at": AT,
    "pi": PI,
    "pa": PA,
    "local": LOCAL,
    "ifvd": IFVD,
    "ho": HO,
    "sl2": SL2,
}

__all__ = ["LOSSES", "DistillLoss", "LossSpec", "build_loss", "parse_loss", "parse_losses"]
