"""Server side: one federated LoRA method a file, and the registry that finds them by name."""

from fedpeft.strategies.base import AdapterStrategy, StrategyOptions
from fedpeft.strategies.capabilities import Capabilities
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
from fedpeft.strategies.registry import STRATEGIES, available, find
from fedpeft.strategies.resolved import with_typed_options
from fedpeft.strategies.rolora import RoLora

__all__ = [
    "STRATEGIES",
    "AdapterStrategy",
    "Capabilities",
    "FLora",
    "FedExLora",
    "FedIt",
    "FedRotLora",
    "FedSaLora",
    "FedSb",
    "FedSvd",
    "FlexLora",
    "Florist",
    "FrLora",
    "HetLora",
    "Local",
    "LoraFair",
    "LoraLego",
    "RaFLora",
    "RoLora",
    "StrategyOptions",
    "available",
    "find",
    "with_typed_options",
]
