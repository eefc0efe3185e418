"""ImageReward against its published scorer, written out here line by line, and its reading of prompts."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from am_diffusers.rewards import OFFICIAL, ImageReward, RewardOptions
from reward_models import (
    CAPTIONS,
    CLIP_MEAN,
    CLIP_STD,
    CONTEXT,
    SIZE,
    PublishedImageReward,
    bert_vocabulary,
    save_image_reward,
)
from reward_pictures import SHAPES, as_pil, pictures

LONG = " and ".join(CAPTIONS)
IMAGES = pictures(2, 40, 48)


def published(model: PublishedImageReward, vocabulary: Path, image: Image.Image, prompt: str) -> float:
    """`ImageReward.score` for one picture: its transform, tokens padded to the limit, network and scale."""
    resize = Resize(SIZE, InterpolationMode.BICUBIC)
    transform = Compose([resize, CenterCrop(SIZE), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.enable_truncation(CONTEXT)
    tokenizer.enable_padding(length=CONTEXT)
    text = tokenizer.encode(prompt)
    with torch.no_grad():
        image_embeds = model.vision_model(transform(image)[None]).last_hidden_state
        text_output = model.text_encoder(
            torch.tensor([text.ids]),
            attention_mask=torch.tensor([text.attention_mask]),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.long),
            return_dict=True,
        )
        rewards = model.mlp(text_output.last_hidden_state[:, 0, :].float())
        return ((rewards - 0.2) / 1.5).item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PublishedImageReward]:
    """A small folder, and the model in it."""
    folder = tmp_path_factory.mktemp("image_reward")
    return folder, save_image_reward(folder)


@pytest.fixture
def folder(saved: tuple[Path, PublishedImageReward]) -> Path:
    return saved[0]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_image_reward_is_the_published_scorer(saved, height: int, width: int) -> None:
    folder, model = saved
    images = pictures(3, height, width)
    prompts = [CAPTIONS[1], "A Réd apple, it's UNKNOWN 猫", LONG]  # short, accents and letters, cut
    scores = ImageReward.from_pretrained(folder, options=OFFICIAL)(images, prompts)
    vocabulary = folder / "vocab.txt"
    expected = [published(model, vocabulary, as_pil(i), p) for i, p in zip(images, prompts, strict=True)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert scores.std() > 0.05


def test_the_vocabulary_is_that_of_the_file(folder: Path) -> None:
    tokenizer = ImageReward.from_pretrained(folder)._tokenizer
    assert tokenizer.get_vocab() == {token: row for row, token in enumerate(bert_vocabulary())}
    ids = tokenizer(CAPTIONS[2])["input_ids"]
    pieces = ["[CLS]", "the", "yel", "##l", "##o", "##w", "moon", "above", "the", "grey", "sea", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


def test_long_prompts_are_cut_counted_and_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = ImageReward.from_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        scores = reward(IMAGES[:1].expand(4, -1, -1, -1), [LONG, LONG + " again", LONG, CAPTIONS[1]])
        reward(IMAGES, [LONG, "again " + LONG])
    assert reward.truncated_prompts == 3
    assert len(caplog.records) == 1
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-6)
    assert scores[0].item() != pytest.approx(scores[3].item(), abs=1e-3)


def test_a_prompt_that_just_fits_is_not_cut(folder: Path) -> None:
    reward = ImageReward.from_pretrained(folder)
    for words, truncated in ((CONTEXT - 2, 0), (CONTEXT - 1, 1)):
        reward(IMAGES[:1], ["a " * words])
        assert reward.truncated_prompts == truncated


def test_prompts_are_tokenized_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, seen = ImageReward.from_pretrained(folder, options=RewardOptions(checkpointing=True)), []
    tokens = reward._tokens

    def watched(prompt: str) -> torch.Tensor:
        seen.append(prompt)
        return tokens(prompt)

    monkeypatch.setattr(reward, "_tokens", watched)
    for prompts in (CAPTIONS[:2], CAPTIONS[1::-1], [CAPTIONS[2]] * 2, CAPTIONS[:2]):
        reward(IMAGES.clone().requires_grad_(), prompts).sum().backward()
    assert seen == [*CAPTIONS[:3]]


def test_padding_changes_nothing(folder: Path) -> None:
    reward, prompts = ImageReward.from_pretrained(folder), [CAPTIONS[3], LONG]
    apart = torch.cat([reward(IMAGES[row : row + 1], prompts[row : row + 1]) for row in range(2)])
    assert torch.allclose(reward(IMAGES, prompts), apart, atol=1e-5)


def test_the_gradient_goes_through_cross_attention_only(folder: Path) -> None:
    reward = ImageReward.from_pretrained(folder)
    images = IMAGES.clone().requires_grad_()
    assert torch.autograd.grad(reward(images, CAPTIONS[:2]).sum(), images)[0].abs().max() > 0
    for layer in reward._scorer.text_encoder.encoder.layer:
        for parameter in layer.crossattention.self.value.parameters():
            parameter.zero_()
    assert torch.autograd.grad(reward(images, CAPTIONS[:2]).sum(), images)[0].abs().max() == 0


def test_image_features_are_the_class_token(saved) -> None:
    folder, model = saved
    reward = ImageReward.from_pretrained(folder)
    hidden = model.vision_model(reward._pixels(IMAGES)).last_hidden_state[:, 0]
    expected = hidden / hidden.norm(dim=-1, keepdim=True)
    assert torch.allclose(reward.image_features(IMAGES), expected, atol=1e-6)
