"""Stage `export`: assemble the trained parts into the folders of `am_diffusers/assets`."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .data import PictureSet
from .transformer import new_transformer

NUM_EVALUATION_PROMPTS = 64


def zero_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 encoder whose output is exactly zero, which is what the pipeline feeds when it has no T5.

    Diffusers cannot load a Stable Diffusion 3 folder without T5 unless `text_encoder_3=None` is passed; with
    this 20 kB stand-in a plain `from_pretrained(path)` works and gives the same pictures. Its tokenizer reads
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


def export_pipeline(work: Path, folder: Path) -> None:
    """The pipeline folder; the transformer, most of the weights, in float16."""
    transformer = new_transformer()
    transformer.load_state_dict(torch.load(work / "transformer.pt", weights_only=True)["ema"])
    encoder, tokenizer = zero_t5(transformer.config.joint_attention_dim)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(work / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2"),
        text_encoder_3=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(work / "tokenizer_2"),
        tokenizer_3=tokenizer,
    )
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.json"):  # where a part was loaded from is nobody's business
        document = json.loads(file.read_text())
        if isinstance(document, dict) and document.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(document, indent=2) + "\n")


def evaluation_combinations(data: PictureSet) -> torch.Tensor:
    """Held-out combinations of different concepts, at most one a concept."""
    order = data.held_out[torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(1))]
    first = {}
    for combination in order.tolist():
        first.setdefault(int(data.labels(torch.tensor([combination])).concept), combination)
    return torch.tensor(list(first.values())[:NUM_EVALUATION_PROMPTS])


def export(data: PictureSet, work: Path, assets: Path) -> None:
    """Write pipeline, rewards and prompt lists; existing folders keep their README."""
    export_pipeline(work, assets / "tiny_sd3")
    for name in ("tiny_pickscore", "tiny_hpsv2", "tiny_image_reward"):
        shutil.copytree(work / name, assets / name, dirs_exist_ok=True)
    (assets / "prompts").mkdir(exist_ok=True)
    for name, combinations in (("train", data.train), ("eval", evaluation_combinations(data))):
        lines = data.captions(data.labels(combinations))
        (assets / "prompts" / f"{name}.txt").write_text("\n".join(lines) + "\n")
