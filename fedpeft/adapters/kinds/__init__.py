"""The kinds of adapters, and PEFT's configuration for each; nothing here imports PEFT before it is asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from peft import PeftConfig

    from fedpeft.config import AdapterConfig

AdapterKind = Literal[
    "lora", "ffa-lora", "lora-xs", "lora-sb", "rslora", "dora", "adalora", "vera", "randlora", "miss", "loha", "lokr"
]
AdapterInit = Literal["default", "gaussian", "pissa", "olora", "eva", "lora-ga", "lora-sb-gradient"]
Head = Literal["shared", "local", "frozen"]

ALL_KINDS: frozenset[str] = frozenset(get_args(AdapterKind))
ADDITIVE_KINDS: frozenset[str] = frozenset({"lora", "ffa-lora", "rslora"})  # whose update is s B A, and no more
R_KINDS: frozenset[str] = frozenset({"lora-xs", "lora-sb"})  # whose update is s B R A between fixed B and A
WITHOUT_DROPOUT: frozenset[str] = frozenset({"loha", "lokr"})  # PEFT drops ranks of these, never inputs
WITHOUT_CONV1D: frozenset[str] = frozenset({"miss", "loha", "lokr"})  # GPT-2's transposed layers
# which kinds may be initialised how; the others have a default of their own
INITS: dict[AdapterInit, frozenset[str]] = {
    "default": ALL_KINDS - {"lora-sb"},
    "gaussian": frozenset({"lora", "ffa-lora", "rslora", "dora"}),
    "pissa": frozenset({"lora", "rslora"}),
    "olora": frozenset({"lora", "rslora"}),
    "eva": frozenset({"lora", "rslora"}),
    "lora-ga": frozenset({"lora", "rslora"}),
    "lora-sb-gradient": frozenset({"lora-sb"}),
}
INITS_FROM_DATA: frozenset[str] = frozenset({"eva", "lora-ga", "lora-sb-gradient"})
INITS_OF_BASE: frozenset[str] = frozenset({"pissa", "olora", "lora-ga"})  # take s B0 A0 out of the base
# PEFT's own names, where they differ; True is replaced where we begin otherwise
PEFT_INITS = {"default": True, "lora-ga": "lora_ga", "lora-sb-gradient": True}


def peft_config(adapter: AdapterConfig, projection_seed: int, **common: Any) -> PeftConfig:
    """Return PEFT's configuration of an adapter.

    Parameters
    ----------
    adapter : AdapterConfig
        Names kind, rank and scaling.
    projection_seed : int
        Draws the projections of the kinds that share one pair of them among all layers.
    **common
        What every configuration of PEFT takes, such as ``target_modules``.
    """
    import peft

    r, alpha, dropout = adapter.rank, adapter.alpha, adapter.dropout
    match adapter.kind:
        case "adalora":
            # no rank is ever pruned: that is for the caller of update_and_allocate, whom nobody is here. The step
            # counts are for it, and must be consistent; the orthogonality term would enter every loss, tests' too
            steps = {"total_step": 1, "tinit": 0, "tfinal": 0}
            return peft.AdaLoraConfig(
                init_r=r, target_r=r, lora_alpha=alpha, lora_dropout=dropout, orth_reg_weight=0.0, **steps, **common
            )
        case "vera":
            return peft.VeraConfig(r=r, vera_dropout=dropout, projection_prng_key=projection_seed, **common)
        case "randlora":
            return peft.RandLoraConfig(
                r=r,
                randlora_alpha=alpha,
                randlora_dropout=dropout,
                projection_prng_key=projection_seed,
                save_projection=True,
                **common,
            )
        case "miss":
            return peft.MissConfig(r=r, miss_dropout=dropout, **common)
        case "loha":
            return peft.LoHaConfig(r=r, alpha=alpha, **common)
        case "lokr":
            return peft.LoKrConfig(r=r, alpha=alpha, **common)
    return peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        init_lora_weights=PEFT_INITS.get(adapter.init, adapter.init),
        # ranks stay as configured: the same in every layer
        eva_config=peft.EvaConfig(rho=1.0) if adapter.init == "eva" else None,
        lora_ga_config=peft.LoraGAConfig() if adapter.init == "lora-ga" else None,
        **common,
    )
