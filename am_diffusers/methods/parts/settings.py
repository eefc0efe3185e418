"""Flags that several methods read.

A method's own flags are the fields of its `Settings`, in its file; those that a few methods have in common
are in own_settings.py and end_points.py. A flag of the rollout, the targets or the reward's gradient is a
field of `SharedSettings`, and `Method.reads` says which methods read it.
"""

from dataclasses import dataclass, fields
from typing import Literal

from am_diffusers.methods.parts.ranges import Check, require
from am_diffusers.system.ranges import GUIDANCE, STEPS


@dataclass(frozen=True)
class SharedSettings:
    """The rollout, the targets, the reward's gradient. The defaults aim at base * exp(reward_scale * reward).

    Attributes:
        num_inference_steps: denoising steps K of a training rollout, from 2 to 1000.
        transitions: stochastic table of the rollout (see `am_diffusers.transitions`).
        pairing: which adjoint belongs to a step (MATH: right is the optimum of the discrete chain).
        adjoint: lean (base Jacobian only) or full (with the policy's Jacobian; for study, costs more).
        samples_per_prompt: neighbouring samples of an iteration that share a prompt; train_batch_size is a
            multiple of it on each process. Methods that compare samples of a prompt need 2 or more.
        reward_scale: factor lambda of the reward in exp(lambda * r), in 1 / reward units; auto = the one
            whose tilt differs from the base by target_kl.
        target_kl: KL divergence of the tilt from the base in nats, a mean over prompts, for reward_scale
            auto; a nat or less is what some thousand samples can learn.
        loss_steps: denoising steps an iteration trains on: all, or a number, at most K - 1.
        step_selection: which ones, for a number: last_and_random (published: half of them the last ones with
            noise, the others at random), or unbiased for all of them: stratified, or pps (with a probability
            that follows each step's residual).
        late_step_odds: how many times likelier a step with sigma at most .7 is than an earlier one among the
            random ones of last_and_random: positive, 1 as published. All steps are trained, so that the fixed
            point is the same.
        tail_samples: continuations M of each rollout's last step with noise, whose adjoints are averaged:
            less noise and the same fixed point, for M - 1 more passes and rewards. Logged rewards are means
            over them.
        ode_tail: last steps with noise that a rollout takes by the ODE instead; adjoints, targets and weights
            stay those of the table. BIASED: with more than 0 the tilt is not the optimum. With few steps this
            bias and that of the steps cancel in part on known tilts; refused for num_inference_steps above
            10, where they don't.
        mask_quantile: share in (0, 1) of the rows of a step to keep, those of largest residual are left
            out of the loss; null = keep all. Only null is unbiased: on a mixture of three modes .9 reaches
            40 % of the tilt's KL, null 92 %.
        row_weights: by what rows weigh less that are long: none, crossfit (the row before the last noisy
            step, by the norm of other continuations: needs tail_samples 2 or more, leaves the fixed point
            exactly alone), or ramp (all rows, those beyond a running quantile, from .9 to all in the first
            60 % of the run: the fixed point is right from there on). Not together with a mask.
        sigma_jitter: share in [0, 0.5) of a step by which interior sigmas move at random each iteration.
        rollout_guidance_scale: classifier-free guidance of the training rollout, at least 1; 1.0 = off.
        guidance_mode: where it acts: rollout (in the rollout alone: ungrounded, the tilted law is that of no
            sampler, found to work best in practice), none (needs scale 1: grounded), or everywhere (in the
            base's adjoint and the regression too: grounded on the guided base, adjoints grow with the scale).
        divergence: distance from the base that 1 / reward_scale weighs, see `am_diffusers.divergences`.
        divergence_q: exponent of divergence power: > 0 saturates, in [-1, 0) seeks the best reward.
        divergence_samples: base images a prompt from which normalisers are estimated, at least 2.
        divergence_prompts: up to this number of training prompts each has a normaliser, beyond they share
            one.
        divergence_max_slope: largest factor by which a divergence other than kl may scale a gradient.
        reward_smoothing_std: noise added to final latents before the reward, in latent units; 0 = off.
        reward_smoothing_samples: noisy copies averaged over, an even number.
        reward_clip_quantile: reward gradients are shortened to this running quantile of their norms, in
            (0, 1); null = off.

    Raises:
        ValueError: if a value is out of range.
    """

    num_inference_steps: int = 20
    transitions: Literal["memoryless_local_linear", "memoryless_euler", "ancestral"] = (
        "memoryless_local_linear"
    )
    pairing: Literal["right", "left", "trapezoid"] = "right"
    adjoint: Literal["lean", "full"] = "lean"
    samples_per_prompt: int = 1
    reward_scale: float | Literal["auto"] = 1.0
    target_kl: float | None = None
    loss_steps: int | Literal["all"] = "all"
    step_selection: Literal["last_and_random", "stratified", "pps"] = "last_and_random"
    late_step_odds: float = 1.0
    tail_samples: int = 4
    ode_tail: int = 0
    mask_quantile: float | None = None
    row_weights: Literal["none", "crossfit", "ramp"] = "none"
    sigma_jitter: float = 0.0
    rollout_guidance_scale: float = 1.0
    guidance_mode: Literal["rollout", "none", "everywhere"] = "rollout"
    divergence: Literal["kl", "power", "pearson_chi2", "forward_kl", "js"] = "kl"
    divergence_q: float = 0.5
    divergence_samples: int = 16
    divergence_prompts: int = 64
    divergence_max_slope: float = 10.0
    reward_smoothing_std: float = 0.0
    reward_smoothing_samples: int = 4
    reward_clip_quantile: float | None = None

    def __post_init__(self) -> None:
        require(self, [*self._rollout(), *self._rows(), *self._gradient()])

    @property
    def scale(self) -> float:
        """Return reward_scale as a number.

        Raises:
            ValueError: if it is auto, which only a run with a model can make a number.
        """
        if self.reward_scale == "auto":
            raise ValueError("reward_scale is auto: no base images have been scored yet to choose it")
        return self.reward_scale

    def _rollout(self) -> list[Check]:
        guided = self.rollout_guidance_scale != 1
        return [
            (
                self.num_inference_steps >= 2 and STEPS.holds(self.num_inference_steps),
                "num_inference_steps",
                "from 2 to 1000: the last one is deterministic",
            ),
            (self.samples_per_prompt >= 1, "samples_per_prompt", "at least 1"),
            (
                self.reward_scale == "auto" or self.reward_scale > 0,
                "reward_scale",
                "positive, as rewards are higher-is-better, or auto",
            ),
            (
                (self.target_kl is not None) == (self.reward_scale == "auto"),
                "target_kl",
                "set with reward_scale auto, for instance to 1.0, and only then",
            ),
            (self.target_kl is None or self.target_kl > 0, "target_kl", "a positive number of nats"),
            (
                self.reward_scale != "auto" or self.divergence == "kl",
                "reward_scale",
                f"a number with divergence {self.divergence}: auto tells tilts of kl only",
            ),
            (
                self.adjoint == "lean" or not guided or self.guidance_mode != "rollout",
                "adjoint",
                "lean with guidance in the rollout alone: the full adjoint differentiates that rollout "
                "(--guidance_mode everywhere or none)",
            ),
            (
                GUIDANCE.holds(self.rollout_guidance_scale),
                "rollout_guidance_scale",
                GUIDANCE.rule,
            ),
            (
                not guided or self.guidance_mode != "none",
                "rollout_guidance_scale",
                "1 with guidance_mode none",
            ),
            (
                guided or self.guidance_mode != "everywhere",
                "rollout_guidance_scale",
                "other than 1 with guidance_mode everywhere",
            ),
        ]

    def _rows(self) -> list[Check]:
        return [
            (
                self.loss_steps == "all" or 1 <= self.loss_steps < self.num_inference_steps,
                "loss_steps",
                "'all' or from 1 to num_inference_steps - 1: the last step has no noise and no loss",
            ),
            (
                self.loss_steps != "all" or self.step_selection == "last_and_random",
                "step_selection",
                "left out with loss_steps all: there is nothing to select",
            ),
            (
                self.late_step_odds > 0,
                "late_step_odds",
                "positive: a step that is never drawn stays the base's, and the law is not the tilt",
            ),
            (
                self.late_step_odds == 1
                or (self.loss_steps != "all" and self.step_selection == "last_and_random"),
                "late_step_odds",
                "1 unless some steps are drawn: with a number of loss_steps, by last_and_random",
            ),
            (1 <= self.tail_samples <= 1000, "tail_samples", "from 1 to 1000"),
            (
                0 <= self.ode_tail <= max(0, self.num_inference_steps - 2),
                "ode_tail",
                "from 0 to num_inference_steps - 2: the first step adds noise",
            ),
            (
                self.ode_tail == 0 or self.num_inference_steps <= 10,
                "ode_tail",
                "0 with more than 10 num_inference_steps: it takes the law farther from the tilt",
            ),
            (
                self.ode_tail == 0 or (self.tail_samples == 1 and self.adjoint == "lean"),
                "ode_tail",
                "0, or with --tail_samples 1 and --adjoint lean: given its start, nothing in a tail is drawn",
            ),
            (
                self.mask_quantile is None or 0 < self.mask_quantile < 1,
                "mask_quantile",
                "in (0, 1), or null to keep every row",
            ),
            (
                self.mask_quantile is None or self.row_weights == "none",
                "row_weights",
                "none with a mask: long rows are left out already (--mask_quantile null)",
            ),
            (
                self.row_weights != "crossfit" or (self.tail_samples >= 2 and self.pairing == "right"),
                "row_weights",
                "none or ramp, or crossfit with --tail_samples 2 or more and --pairing right: it weighs "
                "halves of the continuations by each other",
            ),
            (0 <= self.sigma_jitter < 0.5, "sigma_jitter", "in [0, 0.5)"),
        ]

    def _gradient(self) -> list[Check]:
        return [
            (self.divergence_q >= -1, "divergence_q", "at least -1"),
            (self.divergence_samples >= 2, "divergence_samples", "at least 2"),
            (self.divergence_prompts >= 1, "divergence_prompts", "at least 1"),
            (self.divergence_max_slope >= 1, "divergence_max_slope", "at least 1, the slope of kl"),
            (self.reward_smoothing_std >= 0, "reward_smoothing_std", "0 or positive"),
            (
                self.reward_smoothing_samples >= 2 and self.reward_smoothing_samples % 2 == 0,
                "reward_smoothing_samples",
                "an even number: copies come in opposite pairs",
            ),
            (
                self.reward_clip_quantile is None or 0 < self.reward_clip_quantile < 1,
                "reward_clip_quantile",
                "in (0, 1), or null to clip nothing",
            ),
        ]


FOR_ALL = ("samples_per_prompt", "reward_scale", "target_kl", "rollout_guidance_scale")
"""Shared flags that every method reads; the others are named in `Method.reads`."""

GRADIENT = tuple(
    field.name
    for field in fields(SharedSettings)
    if field.name.startswith(("divergence", "reward_smoothing", "reward_clip"))
)
"""Flags of the law aimed at and of how the reward's gradient is taken."""
