"""The model, its adapter and the training prompts."""

from dataclasses import dataclass
from typing import Literal

from am_diffusers.system.resolution import Resolution, read_resolution


@dataclass(frozen=True)
class ModelConfig:
    """Model and adapter.

    Attributes:
        pretrained_model_name_or_path: Diffusers folder, `asset:` path or hub id of a pipeline.
        revision: branch, tag or commit of a hub model; null = its main branch.
        variant: weight file variant of the model, e.g. fp16; null = none.
        resolution: size of the images in training and evaluation, in pixels: one number is the side of a
            square, 832x480 is width x height.
        max_sequence_length: length of the T5 part of the prompt, in tokens; the same everywhere.
        negative_prompt: text that classifier-free guidance leads away from, in the guided rollout, validation
            and evaluation alike; needs guidance.
        rank: LoRA rank, the inner dimension of each adapter.
        lora_alpha: LoRA alpha; the adapter is scaled by lora_alpha / rank.
        lora_layers: names of the adapted linear layers; null = the eight attention projections of MMDiT.
        init_lora: LoRA that training starts from: a file or folder of Diffusers, of PEFT or with kohya's
            alphas. Base and reference stay the model without it. Its rank and layers must fit in rank and
            lora_layers; what these have more starts as the identity. null = start from the model itself.
        init_lora_as_base: make init_lora part of the frozen model; a fresh LoRA is trained, and the saved
            file contains both.
        mixed_precision: dtype of the frozen transformer (no = float32); LoRA, states, adjoints, VAE and
            rewards stay float32. bf16 where the device has it: fp16 overflows where activations are large.
        gradient_checkpointing: recompute activations of transformer, VAE and reward towers in backward
            passes to save memory.
        free_text_encoders: encode all prompts before training and free the text encoders' memory; false
            keeps the encoders and encodes each prompt when it comes up.
        shard_weights: spread the frozen transformer over the processes (FSDP2), for models that don't fit on
            one card; the LoRA stays whole. Processes then work in step: a signal waits for the next exchange
            between them, and a failure on one ends the others by their timeout.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    resolution: int | str = 512
    max_sequence_length: int = 256
    negative_prompt: str = ""
    rank: int = 32
    lora_alpha: int = 64
    lora_layers: list[str] | None = None
    init_lora: str | None = None
    init_lora_as_base: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    free_text_encoders: bool = True
    shard_weights: bool = False

    @property
    def size(self) -> Resolution:
        """Width and height of the images."""
        return read_resolution(self.resolution)


@dataclass(frozen=True)
class PromptConfig:
    """Training prompts.

    Attributes:
        train_prompts: txt, jsonl, json, csv, tsv or parquet file, data set folder, `asset:` path, hub id, or
            name of a published set, such as Pick-a-Pic.
        train_prompts_column: column (or JSON key) that holds the prompt; not used by txt files.
        train_prompts_split: split of a data set folder or hub data set.
        max_train_prompts: number of prompts to use, the first ones; null = all.
    """

    train_prompts: str
    train_prompts_column: str = "prompt"
    train_prompts_split: str = "train"
    max_train_prompts: int | None = None
