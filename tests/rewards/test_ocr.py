"""The OCR reward: against onnxruntime and OpenCV, what it prefers, its gradients and its errors."""

import itertools
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from am_diffusers.rewards import OCR, OFFICIAL, RewardOptions
from am_diffusers.rewards.ocr import quoted_text
from am_diffusers.rewards.parts.onnx_graph import Node, OnnxGraph
from am_diffusers.rewards.parts.packaged import RAPIDOCR
from am_diffusers.rewards.parts.text_line import official_text_line, text_line
from text_pictures import picture_of

WORDS = ["HELLO", "Coffee", "open 24h"]
SHAPES = [(48, 320), (30, 100), (24, 24), (96, 640), (200, 512), (33, 500), (13, 44)]


@pytest.fixture(scope="module")
def ocr() -> OCR:
    for module in ("rapidocr_onnxruntime", "onnx"):
        if find_spec(module) is None:
            pytest.skip(f"{module} isn't installed: {RAPIDOCR.remedy}")
    return OCR.from_pretrained()


def signs(words: list[str]) -> list[str]:
    return [f'a sign that says "{word}"' for word in words]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_official_resize_is_opencv_bit_for_bit(height: int, width: int) -> None:
    cv2 = pytest.importorskip(
        "cv2", reason="opencv-python isn't installed or lacks libGL", exc_type=ImportError
    )
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = published_line(cv2, picture[..., ::-1])
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    assert torch.equal(official_text_line(images)[0], torch.from_numpy(expected))


def published_line(cv2, picture: np.ndarray) -> np.ndarray:
    """`TextRecognizer.resize_norm_img` of rapidocr_onnxruntime for one BGR picture."""
    height, width = picture.shape[:2]
    line_width = int(48 * max(320 / 48, width / height))
    resized_width = min(math.ceil(48 * (width / float(height))), line_width)
    resized = cv2.resize(picture, (resized_width, 48)).astype("float32").transpose((2, 0, 1)) / 255
    padded = np.zeros((3, 48, line_width), dtype=np.float32)
    padded[:, :, :resized_width] = (resized - 0.5) / 0.5
    return padded


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tensor_line_is_the_official_one_within_its_roundings(height: int, width: int) -> None:
    images = torch.from_numpy(np.random.default_rng(1).random((2, 3, height, width), dtype=np.float32))
    official = official_text_line(images)
    for rounded, levels in ((False, 1.3), (True, 1.01)):  # half a level of the input, .8 of the resize
        difference = (text_line(images, rounded=rounded) - official).abs().max().item()
        assert difference * 127.5 < levels


def test_network_is_that_of_onnxruntime(ocr: OCR) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed")
    session = runtime.InferenceSession(str(RAPIDOCR.find()))
    for shape in ((48, 200), (40, 400)):
        lines = torch.cat([official_text_line(picture_of(w, height=shape[0], width=shape[1])) for w in WORDS])
        expected = session.run(None, {session.get_inputs()[0].name: lines.numpy()})[0]
        assert np.abs(ocr._log_probs(lines).exp().numpy() - expected).max() < 1e-4


def test_it_reads_and_prefers_what_is_written(ocr: OCR) -> None:
    images = torch.cat([picture_of(word) for word in WORDS])
    assert [word in text for word, text in zip(WORDS, ocr.read(images), strict=True)] == [True] * 3
    scores = torch.stack([ocr(images, signs([word] * 3)) for word in WORDS], 1)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    assert bool((scores < 0).all())
    assert bool((scores.diag() > -2).all())
    assert bool((scores[~torch.eye(3, dtype=torch.bool)] < -8).all())


def test_score_is_the_sum_over_all_alignments(ocr: OCR) -> None:
    """Against the definition: every path of 6 frames that collapses to the text, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, len(ocr._characters) + 1, generator=generator, dtype=torch.float64)
    reward = OCR(torch.nn.Identity(), characters=ocr._characters)  # pyright: ignore[reportArgumentType]
    classes = [ocr._class_of[letter] for letter in "aab"]
    log_probs = logits.log_softmax(-1)[0]
    total = torch.tensor(0.0, dtype=torch.float64)
    for path in itertools.product([0, *set(classes)], repeat=6):
        if [c for c, _ in itertools.groupby(path) if c] == classes:
            total += sum(log_probs[frame, c] for frame, c in enumerate(path)).exp()
    assert reward._score(logits, ['"aab"']).item() == pytest.approx(total.log().item() / 3, abs=1e-12)


def test_gradient_ascent_towards_another_word_raises_the_score(ocr: OCR) -> None:
    image, prompt = picture_of("HELLO", width=160).requires_grad_(), signs(["HELP"])
    scores = []
    for _ in range(12):
        score = ocr(image, prompt)
        scores.append(score.item())
        gradient = torch.autograd.grad(score.sum(), image)[0]
        image = (image + 0.02 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    assert scores[0] < -4
    assert ocr(image, prompt).item() > -2


def test_modes_agree_on_pictures_of_words(ocr: OCR) -> None:
    image, prompt = picture_of("Coffee", height=60, width=260), signs(["Coffee"])
    scores = [
        OCR.from_pretrained(options=options)(image, prompt).item()
        for options in (RewardOptions("rounded"), OFFICIAL)
    ]
    assert [ocr(image, prompt).item()] * 2 == pytest.approx(scores, abs=0.05)
    assert not OCR.from_pretrained(options=OFFICIAL)(image.requires_grad_(), prompt).requires_grad


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN" on a door', "OPEN"),
        ('"first" and "second"', "first"),
        ("a neon sign “Café 24”", "Café 24"),
        ("the baker's sign says 'fresh bread'", "fresh bread"),
        ("a shirt with 'don't panic' on it", "don't panic"),
        ("the '90s band \"LIVE\" at the kids' party", "LIVE"),
        ("a card, \u2018it\u2019s on\u2019, in gold", "it\u2019s on"),
    ],
)
def test_the_first_quoted_text_counts(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a red apple", "the baker's shop and the boys' room", '""', '" "'])
def test_a_prompt_without_quoted_text_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"no quoted text in .*write it in quotes"):
        quoted_text(prompt)


def test_text_that_cannot_be_read_is_refused(ocr: OCR) -> None:
    with pytest.raises(ValueError, match=r"doesn't know \['ǿ', '☃'\] in 'a \"☃ǿ\"'"):
        ocr.check_can_score(['a "fox"', 'a "☃ǿ"'])
    assert ocr(picture_of("x"), [f'"{"ab" * 20}"']).isfinite().all()  # 40 frames, 40 characters
    for text in ("ab" * 20 + "c", "a" * 21):  # equal neighbours need a blank between them
        with pytest.raises(ValueError, match=r"needs 41 frames.* has 40"):
            ocr(picture_of("x"), [f'"{text}"'])


def test_other_files_are_refused(ocr: OCR, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not found at 'no\.onnx'.*package:rapidocr-onnxruntime"):
        OCR.from_pretrained("no.onnx")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(RAPIDOCR.find())
    model.metadata_props[0].value = "a\nb"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="6625 classes but 3 characters"):
        OCR.from_pretrained(tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="sha256"):
        OCR.from_pretrained(tmp_path / "other.onnx", sha256="0" * 64)


def test_unsupported_graphs_are_refused() -> None:
    node = Node("Erf", ["x"], "y", {})
    with pytest.raises(ValueError, match="operator Erf isn't supported"):
        OnnxGraph([node], {}, source="x")
    with pytest.raises(ValueError, match="nothing computes the input z"):
        OnnxGraph([Node("Relu", ["z"], "y", {})], {}, source="x")
    with pytest.raises(ValueError, match="unexpected keyword argument 'auto_pad'"):
        OnnxGraph([Node("Softmax", ["x"], "y", {"axis": 1, "auto_pad": "SAME"})], {}, source="x")


def test_a_picture_is_one_line_whatever_its_size(ocr: OCR) -> None:
    """Twice as large, on a canvas that needs no padding: the same line, blurred."""
    image = picture_of("Coffee", width=320)
    large = interpolate(image, scale_factor=2, mode="bilinear").clamp(0, 1)
    assert all("Coffee" in ocr.read(picture)[0] for picture in (image, large))
