"""Stage `export`: assemble the trained parts into folders as `am_diffusers/assets` has them."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from am_diffusers.system.files import open_to_umask

from .loop import Loop
from .preferences import current_models
from .world import World


def zero_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """Make a T5 encoder whose output is exactly zero, as the pipeline feeds where it has no T5.

    Diffusers cannot load a Stable Diffusion 3 folder without T5 unless `text_encoder_3=None` is passed; with
    this 20 kB stand-in a plain `from_pretrained(path)` works and gives the same images. Its tokenizer reads
    nothing, so that no prompt is reported as truncated.
    """
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=2, d_ff=2, num_layers=1, num_heads=1))
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def export_pipeline(loop: Loop, folder: Path) -> None:
    """Write the pipeline's folder; the transformer, most of the weights, in float16."""
    transformer, vae = current_models(loop)
    encoder, tokenizer = zero_t5(transformer.config.joint_attention_dim)
    parts = {}
    for suffix in ("", "_2"):
        tower = CLIPTextModelWithProjection.from_pretrained(loop.folder / f"text_encoder{suffix}")
        parts[f"text_encoder{suffix}"] = tower
        parts[f"tokenizer{suffix}"] = CLIPTokenizer.from_pretrained(loop.folder / f"tokenizer{suffix}")
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
        **parts,
    )
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.json"):  # where a part was loaded from is nobody's business
        document = json.loads(file.read_text())
        if isinstance(document, dict) and document.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(document, indent=2) + "\n")


def measured(folder: Path) -> dict[str, dict]:
    """Collect what `judge`, `samples` (the last time) and `rewards` measured, rounded to four digits."""
    base = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    found = {"base": base}
    found |= {name: json.loads((folder / f"{name}.json").read_text()) for name in ("judge", "rewards")}
    return json.loads(json.dumps(found), parse_float=lambda number: round(float(number), 4))


def export(world: World, loop: Loop) -> None:
    """Write pipeline, rewards, judge, sprites, prompts and figures to `assets` in the loop's folder."""
    assets = loop.folder / "assets"
    export_pipeline(loop, assets / "tiny_sd3")
    for name in ("tiny_pickscore", "tiny_hpsv2", "tiny_image_reward"):
        if (loop.folder / name).exists():
            shutil.copytree(loop.folder / name, assets / name, dirs_exist_ok=True)
    for name in ("judge.safetensors", "sprites.parquet"):
        if (loop.folder / name).exists():
            (assets / "world").mkdir(exist_ok=True)
            shutil.copy(loop.folder / name, assets / "world" / name)
    (assets / "prompts").mkdir(exist_ok=True)
    for name, combinations in (("train", world.train), ("eval", world.held_out)):
        lines = world.captions(world.labels(combinations))
        (assets / "prompts" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (assets / "measured.json").write_text(json.dumps(measured(loop.folder), indent=1) + "\n")
    open_to_umask(assets)
