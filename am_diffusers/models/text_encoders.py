"""Prompts encoded once by a pipeline and kept, so that its text encoders can be freed."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_diffusers.models.family import Encoded, Family
from am_diffusers.velocity import Conditioning


class PromptEncoder:
    """Conditioning made of texts by a pipeline's own text encoders; each text is encoded once."""

    def __init__(self, pipe: Any, family: Family) -> None:
        """Use the text encoders of `pipe`."""
        self._pipe, self._family = pipe, family
        # In main memory: a thousand prompts are gigabytes.
        self._known: dict[tuple[str, int], Encoded] = {}

    def encode(
        self, prompts: Sequence[str], max_sequence_length: int, negative_prompt: str | None, batch_size: int
    ) -> Conditioning:
        """Encode what isn't known yet.

        Args:
            prompts: B texts.
            max_sequence_length: tokens of the longest prompt; part of the model's input.
            negative_prompt: for classifier-free guidance (most pipelines' own is ""); None without.
            batch_size: texts encoded at a time.

        Raises:
            ValueError: if the pipeline doesn't take prompts of that length, or a text was not encoded before
                the text encoders were freed.
        """
        self._family.check_length(max_sequence_length)
        texts = [*prompts] if negative_prompt is None else [*prompts, negative_prompt]
        self._learn(texts, max_sequence_length, batch_size)
        device = getattr(self._pipe, self._family.network).device
        rows = [self._known[prompt, max_sequence_length] for prompt in prompts]
        parts: dict[str, Tensor] = {}
        for name in Encoded._fields:
            if some := [part for row in rows if (part := getattr(row, name)) is not None]:
                parts[name] = torch.stack(some).to(device)
        if negative_prompt is not None:
            row = self._known[negative_prompt, max_sequence_length]
            for name, part in zip(row._fields, row, strict=True):
                if part is not None:
                    parts[f"negative_{name}"] = part.to(device).expand(len(prompts), *part.shape)
        return Conditioning(tuple(prompts), **parts)

    def free(self) -> None:
        """Drop the text encoders and their memory; texts already encoded stay available."""
        for name in self._family.text_components:
            if isinstance(getattr(self._pipe, name), torch.nn.Module):
                setattr(self._pipe, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _learn(self, texts: Sequence[str], length: int, batch_size: int) -> None:
        missing = [text for text in dict.fromkeys(texts) if (text, length) not in self._known]
        if missing and self._pipe.text_encoder is None:
            raise ValueError(
                f"the text encoders are freed and {missing[0]!r} (max_sequence_length {length}) was never "
                "encoded: encode every prompt before `free_text_encoders`"
            )
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            # A pipeline may write into the list it is given.
            for text, row in zip(batch, self._family.encode(self._pipe, [*batch], length), strict=True):
                parts = {name: part for name, part in row._asdict().items() if part is not None}
                kept = {name: part.cpu().clone() for name, part in parts.items()}
                self._known[text, length] = row._replace(**kept)
