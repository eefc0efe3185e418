"""Prompt embeddings of Stable Diffusion 3: encoded once by the pipeline, kept, text encoders then freed."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor
from transformers import AutoTokenizer

from am_diffusers.models.pretrained import Pretrained
from am_diffusers.velocity import Conditioning

TokenCounter = tuple[Callable[[str], int], int]


def token_counters(source: Pretrained, max_sequence_length: int) -> dict[str, TokenCounter]:
    """For CLIP and T5 as this model has them, a function that counts a text's tokens, and how many are read.

    Special tokens are counted. A model without T5 has none; no weights are read.
    """
    index = source.config("model_index.json")
    counters: dict[str, TokenCounter] = {}
    for name, folder in (("CLIP", "tokenizer"), ("T5", "tokenizer_3")):
        if index.get(folder, [None])[0] is None:
            continue
        tokenizer = AutoTokenizer.from_pretrained(source.path, subfolder=folder, revision=source.revision)

        def count(text: str, tokenizer: Any = tokenizer) -> int:
            return len(tokenizer(text, verbose=False).input_ids)

        limit = max_sequence_length if name == "T5" else tokenizer.model_max_length
        counters[name] = (count, limit)
    return counters


class PromptEncoder:
    """Embeddings of texts by a pipeline's own `encode_prompt`; each text is encoded once."""

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        """Use the text encoders of `pipe`."""
        self._pipe = pipe
        # In main memory: a thousand SD3 prompts are gigabytes.
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def encode(
        self, prompts: Sequence[str], max_sequence_length: int, negative_prompt: str | None, batch_size: int
    ) -> Conditioning:
        """See `SD3.encode_prompts`."""
        texts = [*prompts] if negative_prompt is None else [*prompts, negative_prompt]
        self._learn(texts, max_sequence_length, batch_size)
        device = self._pipe.transformer.device
        rows = [self._known[prompt, max_sequence_length] for prompt in prompts]
        embeddings, pooled = (torch.stack(part).to(device) for part in zip(*rows, strict=True))
        if negative_prompt is None:
            return Conditioning(tuple(prompts), embeddings, pooled)
        row = self._known[negative_prompt, max_sequence_length]
        negative = [part.to(device).expand(len(prompts), *part.shape) for part in row]
        return Conditioning(tuple(prompts), embeddings, pooled, *negative)

    def free(self) -> None:
        """Drop the text encoders and their memory; texts already encoded stay available."""
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            setattr(self._pipe, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _learn(self, texts: Sequence[str], length: int, batch_size: int) -> None:
        if not 1 <= length <= 512:
            raise ValueError(f"max_sequence_length is {length}, expected 1 to 512")
        missing = [text for text in dict.fromkeys(texts) if (text, length) not in self._known]
        if missing and self._pipe.text_encoder is None:
            raise ValueError(
                f"the text encoders are freed and {missing[0]!r} (max_sequence_length {length}) was never "
                "encoded: encode every prompt before `free_text_encoders`"
            )
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            embeddings, _, pooled, _ = self._pipe.encode_prompt(
                prompt=batch,
                prompt_2=batch,
                prompt_3=batch,
                device=self._pipe.transformer.device,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
            assert embeddings is not None
            assert pooled is not None
            for text, row, pooled_row in zip(batch, embeddings.cpu(), pooled.cpu(), strict=True):
                self._known[text, length] = (row.clone(), pooled_row.clone())
