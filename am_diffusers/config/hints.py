"""Answers to flags that don't exist or can't be read, in place of jsonargparse's messages."""

import dataclasses
import re

from am_diffusers.config import RewardConfig
from am_diffusers.config.values import all_kinds, choices, field_types, kind_in_words
from am_diffusers.system.text import nearest

# Flags of the Diffusers training scripts and of accelerate, and what does the same here.
TRAINING_IMAGES = "no training images are used: rewards score what the model generates for train_prompts"
TOKEN = "log in once with `hf auth login` or set HF_TOKEN: command lines end up in logs"
BEFORE_THE_SCRIPT = (
    "it belongs to accelerate, before the script: accelerate launch --{name} ... scripts/finetune.py"
)
HINTS = {
    "instance_data_dir": TRAINING_IMAGES,
    "instance_prompt": TRAINING_IMAGES,
    "class_data_dir": TRAINING_IMAGES,
    "class_prompt": TRAINING_IMAGES,
    "with_prior_preservation": TRAINING_IMAGES,
    "prior_loss_weight": TRAINING_IMAGES,
    "num_class_images": TRAINING_IMAGES,
    "train_data_dir": TRAINING_IMAGES,
    "image_column": TRAINING_IMAGES,
    "center_crop": TRAINING_IMAGES,
    "random_flip": TRAINING_IMAGES,
    "dataloader_num_workers": TRAINING_IMAGES,
    "token": TOKEN,
    "hub_token": TOKEN,
    "use_auth_token": TOKEN,
    "num_processes": BEFORE_THE_SCRIPT,
    "num_machines": BEFORE_THE_SCRIPT,
    "machine_rank": BEFORE_THE_SCRIPT,
    "main_process_ip": BEFORE_THE_SCRIPT,
    "main_process_port": BEFORE_THE_SCRIPT,
    "multi_gpu": BEFORE_THE_SCRIPT,
    "gpu_ids": BEFORE_THE_SCRIPT,
    "config_file": BEFORE_THE_SCRIPT,
    "gradient_accumulation_steps": "train_batch_size is the total of an iteration, accumulated for you: "
    "for less memory lower loss_micro_batch_size",
    "num_train_epochs": "set max_train_steps; --dry_run says how many epochs that is",
    "dataset_name": "train_prompts takes a hub data set, train_prompts_column names its column",
    "caption_column": "train_prompts_column names the column of the prompts",
    "validation_prompt": """validation_prompts takes a list: --validation_prompts '["a fox", "an owl"]'""",
    "validation_epochs": "validation_steps counts iterations",
    "sample_batch_size": "eval_batch_size sets how many images are sampled at a time",
    "scale_lr": "learning_rate is used as it is, train_batch_size being the total",
    "use_8bit_adam": "--optimizer adamw8bit",
    "train_text_encoder": "the text encoders stay frozen: the LoRA is on the transformer",
    "text_encoder_lr": "the text encoders stay frozen; learning_rate is for the transformer",
    "lora_blocks": "lora_layers names layers, in all blocks at once",
    "guidance_scale": "rollout_guidance_scale is for training, eval_guidance_scale for validation",
    "weighting_scheme": "the method weighs its own loss; transitions and loss_steps choose its steps",
    "cache_dir": "set HF_HOME to move the cache of models and data sets",
    "local_rank": "accelerate sets it: accelerate launch scripts/finetune.py",
    "enable_xformers_memory_efficient_attention": "attention is PyTorch's own, fast and small without a flag",
}


def explain(message: str) -> str:
    """Return a message of jsonargparse in our words: the nearest known key, or what a value must be."""
    unknown = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)", message)
    if unknown is None:
        return _misread(message) or message
    name = unknown[1] or unknown[2]
    if name in HINTS:
        return f"there is no '{name}' here: {HINTS[name].format(name=name)}"
    known = [*field_types(), "config", *(f.name for f in dataclasses.fields(RewardConfig))]
    return f"unknown key '{name}': did you mean '{nearest(name, known)}'? (all keys: --help)"


def _misread(message: str) -> str | None:
    """Return what the value that the message is about must be; None for another message."""
    names = re.findall(r'Parser key "(\w+)', message)
    kind = all_kinds().get(names[-1]) if names else None
    if kind is None:
        return None
    must = f"--{' '.join(dict.fromkeys(names))} must be {kind_in_words(kind)}"
    got = re.search(r"Given value: (.*)|Got value: (.*)(?![\s\S]*Given value)", message)
    text = re.search(r"Expected a <class 'str'>(?:\. Got value: (.*))?", message)
    text = None if int in choices(kind) else text
    value = (text[1] if text else None) or ((got[1] or got[2]) if got else None)
    if value is None:
        return must
    return f"{must}, but YAML reads {value}: quote it" if text else f"{must}, got {value}"
