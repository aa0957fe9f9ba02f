"""The kinds of adapters and the initialisations, one file or row each; nothing imports PEFT before it is asked to."""

from __future__ import annotations

from fedpeft.adapters.kinds.adalora import ADALORA
from fedpeft.adapters.kinds.adamss import ADAMSS
from fedpeft.adapters.kinds.beft import BEFT
from fedpeft.adapters.kinds.c3a import C3A
from fedpeft.adapters.kinds.deft import DEFT
from fedpeft.adapters.kinds.delora import DELORA
from fedpeft.adapters.kinds.eva import EVA
from fedpeft.adapters.kinds.ffa_lora import FFA_LORA
from fedpeft.adapters.kinds.fourierft import FOURIERFT, WAVEFT
from fedpeft.adapters.kinds.glora import GLORA
from fedpeft.adapters.kinds.gralora import GRALORA
from fedpeft.adapters.kinds.hira import HIRA
from fedpeft.adapters.kinds.ia3 import IA3
from fedpeft.adapters.kinds.inits import DEFAULT, GAUSSIAN, OLORA, PISSA
from fedpeft.adapters.kinds.kind import Head, Init, Kind, Role, Start, Update
from fedpeft.adapters.kinds.ln_tuning import LN_TUNING
from fedpeft.adapters.kinds.loha import LOHA
from fedpeft.adapters.kinds.lokr import LOKR
from fedpeft.adapters.kinds.lora import DORA, LORA, RSLORA
from fedpeft.adapters.kinds.lora_ga import LORA_GA
from fedpeft.adapters.kinds.lora_sb import LORA_SB, LORA_SB_GRADIENT
from fedpeft.adapters.kinds.lora_xs import LORA_XS
from fedpeft.adapters.kinds.miss import MISS
from fedpeft.adapters.kinds.orthogonal import BOFT, HRA, OFT
from fedpeft.adapters.kinds.osf import OSF
from fedpeft.adapters.kinds.peanut import PEANUT
from fedpeft.adapters.kinds.prompts import P_TUNING, PREFIX_TUNING, PROMPT_TUNING
from fedpeft.adapters.kinds.psoft import PSOFT
from fedpeft.adapters.kinds.pvera import PVERA
from fedpeft.adapters.kinds.randlora import RANDLORA
from fedpeft.adapters.kinds.refused import REFUSED
from fedpeft.adapters.kinds.road import ROAD
from fedpeft.adapters.kinds.shira import SHIRA
from fedpeft.adapters.kinds.supertuning import SUPERTUNING
from fedpeft.adapters.kinds.tinylora import TINYLORA
from fedpeft.adapters.kinds.unilora import UNILORA
from fedpeft.adapters.kinds.vblora import VBLORA
from fedpeft.adapters.kinds.vera import VERA
from fedpeft.registry import Registry

__all__ = ["INITS", "KINDS", "Head", "Init", "Kind", "Role", "Start", "Update"]

KINDS: Registry[Kind] = Registry(
    "adapter.kind",
    "fedpeft.adapters",
    (
        LORA,
        FFA_LORA,
        LORA_XS,
        LORA_SB,
        RSLORA,
        DORA,
        ADALORA,
        VERA,
        RANDLORA,
        MISS,
        LOHA,
        LOKR,
        VBLORA,
        UNILORA,
        DELORA,
        TINYLORA,
        PVERA,
        PSOFT,
        ADAMSS,
        GLORA,
        PEANUT,
        OSF,
        GRALORA,
        HIRA,
        SHIRA,
        SUPERTUNING,
        C3A,
        FOURIERFT,
        WAVEFT,
        OFT,
        BOFT,
        HRA,
        ROAD,
        IA3,
        BEFT,
        LN_TUNING,
        DEFT,
        PROMPT_TUNING,
        PREFIX_TUNING,
        P_TUNING,
    ),
    REFUSED,
)
INITS: Registry[Init] = Registry(
    "adapter.init", "fedpeft.inits", (DEFAULT, GAUSSIAN, PISSA, OLORA, EVA, LORA_GA, LORA_SB_GRADIENT)
)
