"""How much noise reaches the product when factors are noised: both, as in LoRA, or B alone, as in FFA-LoRA.

    python -m benchmarks.product_noise [--out docs/product-noise.png]

Gaussian noise xA, xB of standard deviation sigma in every entry of the factors makes of their product

    (B + xB)(A + xA) = B A + xB A + B xA + xB xA,

whose last three terms are uncorrelated, so that their expected squared Frobenius norms add up:

    E |xB A|^2 = sigma^2 d_out |A|^2,   E |B xA|^2 = sigma^2 d_in |B|^2,   E |xB xA|^2 = sigma^4 d_out d_in r.

Sun et al. 2024, https://arxiv.org/abs/2403.12313, freeze A for the sake of the last one. The figure has these lines,
and points of seeded draws. A is as PEFT initialises it; B's entries are a tenth as large, because B begins at zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedpeft.report.plots import DASHES, DPI, LIGHT, SIZE

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "product-noise.png"
D_OUT, D_IN, RANK, DRAWS, SEED = 96, 160, 8, 64, 0
SIGMAS = np.logspace(-3.5, 0, 15)
LORA, FFA, CROSS = "LoRA: noise on A and B", "FFA-LoRA: noise on B", "xB xA, which LoRA alone has"

Array = NDArray[np.float64]


def factors(d_out: int, d_in: int, rank: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw factors of a layer, B (d_out, r) and A (r, d_in)."""
    bound = 1 / np.sqrt(d_in)  # PEFT's initialisation of A
    return rng.uniform(-bound, bound, (d_out, rank)) / 10, rng.uniform(-bound, bound, (rank, d_in))


def expected(b: Array, a: Array, sigma: float) -> dict[str, float]:
    """Return the expected squared Frobenius norms of the three terms, in closed form."""
    (d_out, rank), d_in = b.shape, a.shape[1]
    return {
        "xB A": sigma**2 * d_out * float(np.sum(a * a)),
        "B xA": sigma**2 * d_in * float(np.sum(b * b)),
        "xB xA": sigma**4 * d_out * d_in * rank,
    }


def drawn(b: Array, a: Array, sigma: float, draws: int, rng: np.random.Generator) -> dict[str, float]:
    """Return the mean squared Frobenius norms of the three terms and of what the product is off, over draws."""
    sums = dict.fromkeys(("xB A", "B xA", "xB xA", LORA, FFA), 0.0)
    for _ in range(draws):
        noise_b, noise_a = (sigma * rng.standard_normal(factor.shape) for factor in (b, a))
        terms = {
            "xB A": noise_b @ a,
            "B xA": b @ noise_a,
            "xB xA": noise_b @ noise_a,
            LORA: (b + noise_b) @ (a + noise_a) - b @ a,
            FFA: (b + noise_b) @ a - b @ a,
        }
        for name, term in terms.items():
            sums[name] += float(np.sum(term * term)) / draws
    return sums


def simulate(draws: int) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
    """Return lines and points over `SIGMAS`, both relative to the norm of the product."""
    rng = np.random.default_rng(SEED)
    b, a = factors(D_OUT, D_IN, RANK, rng)
    size = float(np.linalg.norm(b @ a))
    closed = [expected(b, a, sigma) for sigma in SIGMAS]
    found = [drawn(b, a, sigma, draws, rng) for sigma in SIGMAS]
    lines = {
        LORA: [sum(terms.values()) for terms in closed],
        FFA: [terms["xB A"] for terms in closed],
        CROSS: [terms["xB xA"] for terms in closed],
    }
    points = {LORA: [one[LORA] for one in found], FFA: [one[FFA] for one in found], CROSS: [o["xB xA"] for o in found]}
    relative = [{name: np.sqrt(values) / size for name, values in kind.items()} for kind in (lines, points)]
    return relative[0], relative[1]


def draw(lines: Mapping[str, Array], points: Mapping[str, Array], path: Path) -> None:
    """Draw points over lines into a PNG file, in the style of a run's own plots."""
    with matplotlib.style.context("default"):
        figure = Figure(figsize=SIZE, dpi=DPI, facecolor=LIGHT.paper)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=LIGHT.paper)
        for index, (name, line) in enumerate(lines.items()):
            color = LIGHT.lines[index]
            axes.plot(SIGMAS, line, color=color, linestyle=DASHES[index], linewidth=1.6, zorder=3, label=name)
            axes.plot(SIGMAS, points[name], "o", color=color, markersize=4, zorder=4)
        axes.axhline(1, color=LIGHT.ink, linewidth=0.8, zorder=2)
        axes.text(SIGMAS[-1], 1.2, "as large as the product", ha="right", color=LIGHT.ink, fontsize=9)
        axes.set(xscale="log", yscale="log", xlabel="standard deviation of the noise in each entry of a factor, sigma")
        axes.set_ylabel("noise in the product / |B A|")
        axes.set_title(
            f"Noise in B A ({D_OUT} x {D_IN}, rank {RANK}): closed form, and {DRAWS} draws",
            loc="left",
            color=LIGHT.ink,
            fontweight="bold",
            fontsize=11,
        )
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIGHT.grid)
        axes.tick_params(which="both", colors=LIGHT.ink, length=0)
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=9, handlelength=2.4)
        figure.subplots_adjust(left=0.115, bottom=0.125, top=0.9, right=0.97)
        with path.open("wb") as file:
            canvas.print_png(file, metadata={"Software": None})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURE, help="the PNG file to write")
    arguments = parser.parse_args(words)
    lines, points = simulate(DRAWS)
    draw(lines, points, arguments.out)
    for at, sigma in enumerate(SIGMAS):
        print(
            f"sigma {sigma:.4f}: "
            + ", ".join(f"{name} {lines[name][at]:.3g} ({points[name][at]:.3g})" for name in lines)
        )
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()
