"""Numbers as the report writes them."""

from am_diffusers.evaluation.statistics import Estimate

MINUS = "\N{MINUS SIGN}"


def plain(score: float) -> str:
    """Format four digits, trailing zeros too: `20.10`."""
    text = f"{score:.0f}" if abs(score) >= 1000 else f"{score:#.4g}"
    return text.replace("-", MINUS)


def change(difference: float) -> str:
    """Format a number with its sign: `+0.353`."""
    return f"{difference:+.3g}".replace("-", MINUS)


def signed(gain: Estimate) -> str:
    """Format as `+0.53 [+0.41, +0.66]`."""
    return gain.text("+.2f").replace("-", MINUS)


def share(kept: Estimate) -> str:
    """Format as `97 % [87 %, 109 %]`."""
    return kept.text(".0%").replace("-", MINUS).replace("%", "\N{NO-BREAK SPACE}%")


def digits(estimate: Estimate) -> str:
    """Format three digits: `12.3 [10.1, 14.8]`."""
    return estimate.text("#.3g").replace("-", MINUS)


def p_value(value: float) -> str:
    """Format two digits, or say that it is tiny."""
    if value < 1e-4:
        return "< 0.0001"
    return f"{value:.2f}" if value >= 0.01 else f"{value:.2g}"
