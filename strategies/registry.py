"""All methods by name: each is one file, and one line here."""

from __future__ import annotations

from fedpeft.registry import Registry
from fedpeft.strategies.base import AdapterStrategy
from fedpeft.strategies.fed_sb import FedSb
from fedpeft.strategies.fedex_lora import FedExLora
from fedpeft.strategies.fedit import FedIt
from fedpeft.strategies.fedrot_lora import FedRotLora
from fedpeft.strategies.fedsa_lora import FedSaLora
from fedpeft.strategies.fedsvd import FedSvd
from fedpeft.strategies.flexlora import FlexLora
from fedpeft.strategies.flora import FLora
from fedpeft.strategies.florist import Florist
from fedpeft.strategies.frlora import FrLora
from fedpeft.strategies.hetlora import HetLora
from fedpeft.strategies.local import Local
from fedpeft.strategies.lora_fair import LoraFair
from fedpeft.strategies.lora_lego import LoraLego
from fedpeft.strategies.raflora import RaFLora
from fedpeft.strategies.rolora import RoLora
from fedpeft.strategies.scaffold import Scaffold

METHODS: Registry[type[AdapterStrategy]] = Registry(
    "strategy",
    "fedpeft.strategies",
    [
        FedIt,
        LoraFair,
        LoraLego,
        FLora,
        FedExLora,
        FlexLora,
        RaFLora,
        HetLora,
        Florist,
        RoLora,
        FedSaLora,
        FedSvd,
        FedSb,
        FrLora,
        FedRotLora,
        Scaffold,
        Local,
    ],
    base=AdapterStrategy,
)
STRATEGIES = METHODS.ours
available = METHODS.all  # ours, and those that other packages add under the entry point group
find = METHODS.find
