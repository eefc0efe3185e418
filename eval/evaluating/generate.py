"""Makes the images that aren't there yet, the same ones whoever makes them and in whatever order."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from am_diffusers.evaluation.images import ImageId, Sampled, Sampler
from am_diffusers.models.base import Model
from am_diffusers.models.proof import lora_effect, prompt_point
from am_diffusers.noise import LatentSpec
from am_diffusers.run.fields import guided
from am_diffusers.run.load import DTYPES
from am_diffusers.velocity import Conditioning
from evaluating.candidates import Candidate
from evaluating.plan import Plan
from evaluating.store import Store

logger = logging.getLogger(__name__)
EFFECT_FLOOR = 1e-6
"""Smallest relative change of the velocity by a LoRA that is no rounding error."""

ENCODE_GROUP = 16
"""Prompts encoded at a time."""

Batches = list[tuple[Candidate, tuple[ImageId, ...]]]


def missing_batches(store: Store, units: Sequence[tuple[Candidate, int]], batch_size: int) -> Batches:
    """Find batches of chunks with a missing or damaged image, in the order of the chunks.

    Chunks are always cut into the same batches: which images share a network pass changes their last bits.
    """
    missing: Batches = []
    for candidate, chunk in units:
        images = store.chunks[chunk]
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            damage = {image: store.damage(candidate, image) for image in batch}
            for image, reason in damage.items():
                if reason:
                    logger.warning("%s is made again: %s", store.image(candidate, image), reason)
            if any(reason is not None for reason in damage.values()):
                missing.append((candidate, batch))
    return missing


@dataclass(frozen=True)
class Generator:
    """The model of a plan, sampling one candidate after the other.

    Attributes:
        plan: what to make.
        store: folder of the images.
        model: the model, without a LoRA before and after.
    """

    plan: Plan
    store: Store
    model: Model

    def check(self) -> None:
        """Make every sampler and load every LoRA at every scale once, before hours are spent.

        Raises:
            ValueError: a sampler can't do with so few steps, or a LoRA doesn't fit, changes nothing or
                too much.
        """
        for candidate in self.plan.candidates:
            self.sampler(candidate)
        cond = self._encode(1.0)(self.plan.prompts.prompts[:1])
        tuned = {(each.lora, each.lora_scale): each for each in self.plan.candidates if each.lora}
        before: Candidate | None = None
        for candidate in tuned.values():
            self._load(before, candidate)
            before = candidate
            width, height = self.plan.size
            effect = lora_effect(self.model, prompt_point(self.model, cond, height, width))
            if not EFFECT_FLOOR < effect < float("inf"):
                name = f"{candidate.lora} at scale {candidate.lora_scale:g}"
                raise ValueError(
                    f"{name} changes the velocity by {effect:.1e} of its size: it has no effect on this base "
                    "model, or too much; was it trained on this one?"
                )
        if before is not None:
            self.model.unload_lora()

    def make(self, batches: Batches) -> None:
        """Make and write the images of `batches`, ordered by candidate."""
        loaded: Candidate | None = None
        for candidate, batch in tqdm(batches, desc="pictures", disable=None):
            if candidate != loaded:
                self._load(loaded, candidate)
                loaded = candidate
            self._batch(candidate, batch)
        if loaded is not None and loaded.lora is not None:
            self.model.unload_lora()

    def _load(self, before: Candidate | None, candidate: Candidate) -> None:
        if before is not None and before.lora is not None and before.lora != candidate.lora:
            self.model.unload_lora()
            before = None
        if candidate.lora is None:
            return
        self.store.check_lora(candidate)  # a training run may have written it anew since
        if before is None or before.lora != candidate.lora:
            self.model.load_lora(candidate.lora)
        self.model.set_lora_scale(candidate.lora_scale)

    def _batch(self, candidate: Candidate, batch: Sequence[ImageId]) -> None:
        sampler, prompts = self.sampler(candidate), self.plan.prompts.prompts
        policy = guided(self.model.policy, candidate.guidance_scale)
        base = None if candidate.is_base else guided(self.model.base, candidate.guidance_scale)
        made = sampler.sample(policy, prompts, batch, base=base)
        for row, image in enumerate(batch):
            self._require_finite(made, row, candidate, image)
            if self.store.damage(candidate, image) is not None:
                path_kl = None if made.path_kl is None else made.path_kl[row].item()
                self.store.save_image(candidate, image, made.images[row], path_kl)

    def _require_finite(self, made: Sampled, row: int, candidate: Candidate, image: ImageId) -> None:
        values = [made.images[row], *([] if made.path_kl is None else [made.path_kl[row]])]
        if not all(value.isfinite().all() for value in values):
            prompt = self.plan.prompts.prompts[image.prompt]
            raise ValueError(
                f"{candidate.key} makes NaN or infinity of {prompt!r}: try --mixed_precision no or bf16, or "
                "a smaller --lora_scale; everything made before is kept"
            )

    def sampler(self, candidate: Candidate) -> Sampler:
        """Make the sampler of a candidate's images; the noise is the same for all candidates."""
        shape = self.model.latent_shape(self.plan.size.height, self.plan.size.width)
        return Sampler(
            solver=self.model.solver(self.plan.options.sampler, candidate.num_inference_steps, shape),
            encode=self._encode(candidate.guidance_scale),
            decode=self.model.decode,
            latents=LatentSpec(shape, self.model.device),
            seed=self.plan.options.seed,
            batch_size=self.plan.options.batch_size,
        )

    def _encode(self, guidance_scale: float) -> Callable[[Sequence[str]], Conditioning]:
        return partial(
            self.model.encode_prompts,
            max_sequence_length=self.plan.max_sequence_length,
            negative_prompt=None if guidance_scale == 1 else self.plan.options.negative_prompt,
        )


def load_model(plan: Plan, batches: Batches, device: torch.device) -> Model:
    """Load the base model, encode the prompts of `batches` and free the text encoders."""
    dtype = DTYPES[plan.options.mixed_precision]
    model = Model.from_pretrained(plan.source, weight_dtype=dtype, device=device)
    # Prompts are always encoded with the same neighbours: the last bits of an embedding depend on them.
    texts = list(dict.fromkeys(plan.prompts.prompts))
    places = {text: place for place, text in enumerate(texts)}
    needed = {plan.prompts.prompts[image.prompt] for _, batch in batches for image in batch}
    for group in sorted({0, *(places[text] // ENCODE_GROUP for text in needed)}):
        model.encode_prompts(
            texts[group * ENCODE_GROUP : (group + 1) * ENCODE_GROUP],
            max_sequence_length=plan.max_sequence_length,
            negative_prompt=plan.options.negative_prompt,
            batch_size=ENCODE_GROUP + 1,
        )
    model.free_text_encoders()
    return model
