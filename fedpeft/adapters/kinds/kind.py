"""What a kind of adapter is, and what a start of one is: a record each, whose fields are all that other code knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn

Update = Literal["product", "square", "linear", "neither"]
Head = Literal["shared", "local", "frozen"]


class Role(StrEnum):
    """What a tensor of a run is."""

    A = "A"
    B = "B"
    R = "R"
    PARAMETER = "parameter"  # of an adapter, and no factor
    HEAD = "head"  # and whatever else of the model is trained
    BASE = "base"  # a change of the frozen base


def by_rank(alpha: float, rank: int) -> float:
    """Return alpha / r."""
    return alpha / rank


def by_root_of_rank(alpha: float, rank: int) -> float:
    """Return alpha / sqrt(r), of rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank)


def drawn_if_asked(settings: Any) -> bool:
    """Tell whether an adapter begins at random values, where most of PEFT's begin at what changes nothing."""
    return getattr(settings, "init_weights", True) is False


def always(settings: Any) -> bool:
    """Say of an adapter that it begins at random values, whatever its options."""
    return True


@dataclass(frozen=True)
class Start:
    """What an adapter begins from.

    Parameters
    ----------
    model : torch.nn.Module
        The base.
    settings : PeftConfig
        PEFT's configuration.
    loss : callable
        What training minimises, of a batch of public rows.
    batches : sequence of mapping of str to Tensor
        Public rows as the model takes them; empty unless the initialisation looks at them.
    rows : str
        Where they come from, for errors.
    seed : int
        The run's.
    first_step : callable
        The change that the first step of training along a gradient makes to a weight.
    """

    model: nn.Module
    settings: PeftConfig
    loss: Callable[[Mapping[str, Tensor]], Tensor]
    batches: Sequence[Mapping[str, Tensor]]
    rows: str
    seed: int
    first_step: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Init:
    """An initialisation.

    Parameters
    ----------
    name : str
        ``adapter.init``.
    value : object
        Of PEFT's field for it, see `Kind.init`.
    configs : callable
        Returns what else it sets in PEFT's configuration.
    from_data : bool
        Whether it looks at public rows.
    of_base : bool
        Whether it takes s B0 A0 out of the base.
    of_gradients : bool
        Whether it takes gradients of the base's weights.
    ranks : int
        How many times the rank it takes out of a layer.
    conv1d : bool
        Whether it can begin GPT-2's transposed layers.
    kind : str
        The ``adapter.kind`` that it is the start of, and that a run has which names none; empty if there is no such.
    begins : str
        Where that kind begins, in words.
    instead : str
        What to use where there are no public rows, in words.
    simulations_only : str
        Why sites of a deployment cannot begin so, in words; empty if they can.
    prepare : callable, optional
        Called before PEFT makes the layers; what it returns is given to `Kind.install`.
    finish : callable, optional
        Called after PEFT has made them.
    """

    name: str
    value: object
    configs: Callable[[], dict[str, Any]] = dict
    from_data: bool = False
    of_base: bool = False
    of_gradients: bool = False
    ranks: int = 1
    conv1d: bool = True
    kind: str = ""
    begins: str = ""
    instead: str = ""
    simulations_only: str = ""
    prepare: Callable[[Start], Any] | None = None
    finish: Callable[[PeftModel, Start], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of adapter.

    Parameters
    ----------
    name : str
        ``adapter.kind``.
    config : str
        PEFT's class of its configuration.
    update : {"product", "square", "linear", "neither"}
        ``s B A`` and no more; ``s B R A`` between fixed B and A; linear in all that is trained; or none of these. The
        first two are layers of PEFT's LoRA.
    parts : tuple of str
        A tensor is this kind's if one of these begins a part of its name, such as ``lora_A`` in
        ``layer.lora_A.weight``.
    rank : tuple of str
        PEFT's fields for the rank; empty if it has none.
    alpha, dropout, seed, init : str, optional
        PEFT's fields for alpha, for the dropout of inputs, for the seed of random projections, and for how it begins.
    settings : mapping
        What else is set in PEFT's configuration, whatever users ask for.
    inits : tuple of str
        The initialisations that it takes; the first is its own where none is named.
    scaled : callable
        The scaling of an update by alpha and rank, where it has any.
    fixed : frozenset of Role
        What nobody trains.
    conv1d : bool
        Whether it can adapt GPT-2's transposed layers.
    row_by_row : bool
        Whether Opacus's hooks give the gradient of each row rightly: all that is trained are weights of linear layers.
    resizable : bool
        Whether rank and scaling of a layer can change after PEFT has made it: it is a layer of PEFT's LoRA.
    merges : bool
        Whether PEFT can merge it into the base.
    reads_base : bool
        Whether it is made from the base's weights, which must then be plain matrices.
    quantised : bool
        Whether it computes on a quantised base as it does on the same weights as plain matrices; what it reads of these
        goes through `fedpeft.quantization.dense_weight`.
    beyond_linear : bool
        Whether it adapts embeddings and stacks of experts' weights too: it is PEFT's plain LoRA.
    prompts : bool
        Whether it puts ``num_virtual_tokens`` of PEFT's configuration before the tokens of a text.
    prefix : str
        What PEFT puts before the names of the base's modules.
    choose : callable, optional
        Returns the modules to adapt, of a model and ``adapter.targets``; linear layers if not given.
    live : callable, optional
        Returns the tensors of an adapted model of which PEFT saves copies, or what it computes of them, by the names
        that they have here; all others are found among what it saves.
    export : callable, optional
        Returns what PEFT saves, of an adapted model and the tensors by their names here, where the two differ.
    names : mapping of str to str
        Parts of PEFT's names that are called otherwise here.
    fit : callable, optional
        Returns the fields of PEFT's configuration that follow from a model, the modules to adapt, and users' options.
    misfit : callable, optional
        Returns what is wrong with a layer of PEFT's configuration, d_out and d_in, and what to set; empty if nothing.
    moved : callable
        Tells of PEFT's configuration whether the adapter, as it begins, changes what the base computes.
    install : callable, optional
        Changes the layers that PEFT has made; the last argument is what `Init.prepare` returned.
    """

    name: str
    config: str
    update: Update
    parts: tuple[str, ...]
    rank: tuple[str, ...] = ("r",)
    alpha: str | None = None
    dropout: str | None = None
    seed: str | None = None
    init: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    inits: tuple[str, ...] = ("default",)
    scaled: Callable[[float, int], float] = by_rank
    fixed: frozenset[Role] = frozenset()
    conv1d: bool = True
    row_by_row: bool = False
    resizable: bool = False
    merges: bool = True
    reads_base: bool = False
    quantised: bool = False
    beyond_linear: bool = False
    prompts: bool = False
    prefix: str = "base_model.model."
    choose: Callable[[nn.Module, Sequence[str] | None], list[str]] | None = None
    live: Callable[[PeftModel], Mapping[str, Tensor]] | None = None
    export: Callable[[PeftModel, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    fit: Callable[[nn.Module, Sequence[str], Mapping[str, Any]], dict[str, Any]] | None = None
    misfit: Callable[[Any, int, int], str] | None = None
    moved: Callable[[Any], bool] = drawn_if_asked
    install: Callable[[PeftModel, Start, Any], None] | None = None

    @property
    def has_factors(self) -> bool:
        """Whether its update is a product of factors, and no more."""
        return self.update in ("product", "square")

    @property
    def linear(self) -> bool:
        """Whether its update is linear in what is trained, so that means are exact."""
        return self.update == "linear" or (self.has_factors and bool(self.fixed))

    @property
    def mixed_ranks(self) -> bool:
        """Whether adapters of different ranks can be merged."""
        return self.update == "product" and not self.fixed

    @property
    def lacks(self) -> set[str]:
        """The keys under ``[adapter]`` that mean nothing to it."""
        return {*(() if self.rank else ("rank", "ranks")), *(() if self.alpha else ("alpha",))}

    def begun(self, init: Init) -> dict[str, Any]:
        """Return the fields of PEFT's configuration that say how it begins."""
        return {} if self.init is None else {self.init: init.value, **init.configs()}

    def peft_config(
        self,
        init: Init,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        projection_seed: int,
        options: Mapping[str, Any],
        common: Mapping[str, Any],
    ) -> PeftConfig:
        """Return PEFT's configuration.

        Parameters
        ----------
        init : Init
            How it begins.
        rank : int
            r.
        alpha : float
            Numerator of the scaling.
        dropout : float
            Of inputs.
        projection_seed : int
            Draws the projections of the kinds that share one pair of them among all layers.
        options : mapping
            PEFT's own options of this kind.
        common : mapping
            What every configuration of PEFT takes, such as ``target_modules``.
        """
        import peft

        fields = dict.fromkeys(self.rank, rank) | dict(options) | dict(self.settings) | self.begun(init)
        named = ((self.alpha, alpha), (self.dropout, dropout), (self.seed, projection_seed))
        fields |= {name: value for name, value in named if name is not None}
        settings: PeftConfig = getattr(peft, self.config)(**fields, **common)
        return settings

    def set_by(self) -> dict[str, str]:
        """Return the fields of PEFT's configuration that users do not set, and what does."""
        named = ((self.alpha, "adapter.alpha"), (self.dropout, "adapter.dropout"), (self.seed, "run.seed"))
        return {
            **dict.fromkeys(self.settings, "adapter.kind"),
            **{name: by for name, by in (*named, (self.init, "adapter.init")) if name is not None},
            **dict.fromkeys(self.rank, "adapter.rank"),
        }
