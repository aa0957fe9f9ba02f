"""Server side: one federated LoRA method a file, and the registry that finds them by name."""

from fedpeft.strategies.base import AdapterStrategy as AdapterStrategy
from fedpeft.strategies.base import StrategyOptions as StrategyOptions
from fedpeft.strategies.capabilities import Capabilities as Capabilities
from fedpeft.strategies.fed_sb import FedSb as FedSb
from fedpeft.strategies.fedex_lora import FedExLora as FedExLora
from fedpeft.strategies.fedit import FedIt as FedIt
from fedpeft.strategies.fedrot_lora import FedRotLora as FedRotLora
from fedpeft.strategies.fedsa_lora import FedSaLora as FedSaLora
from fedpeft.strategies.fedsvd import FedSvd as FedSvd
from fedpeft.strategies.flexlora import FlexLora as FlexLora
from fedpeft.strategies.flora import FLora as FLora
from fedpeft.strategies.florist import Florist as Florist
from fedpeft.strategies.frlora import FrLora as FrLora
from fedpeft.strategies.hetlora import HetLora as HetLora
from fedpeft.strategies.local import Local as Local
from fedpeft.strategies.lora_fair import LoraFair as LoraFair
from fedpeft.strategies.lora_lego import LoraLego as LoraLego
from fedpeft.strategies.raflora import RaFLora as RaFLora
from fedpeft.strategies.registry import STRATEGIES as STRATEGIES
from fedpeft.strategies.registry import available as available
from fedpeft.strategies.registry import find as find
from fedpeft.strategies.resolved import with_typed_options as with_typed_options
from fedpeft.strategies.rolora import RoLora as RoLora
