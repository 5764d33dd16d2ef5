"""The embedded model's files: small, fp16, strictly loaded, good enough; and its networks' shapes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from zeroconv.controlnet_core.networks.controlnet import ControlNet
from zeroconv.controlnet_core.networks.unet import UNet
from zeroconv.lab.autoencoder import LATENT_SCALE, Autoencoder, scale_latents
from zeroconv.lab.dataset import HINTS
from zeroconv.lab.evaluate import evaluate, held_out
from zeroconv.lab.models import UNET, WEIGHTS, control_name, load_weights, save_weights
from zeroconv.lab.pipeline import LabModel
from zeroconv.lab.segmenter import Segmenter
from zeroconv.lab.text_encoder import ROWS, TextEncoder
from zeroconv.lab.vocabulary import END, TOKEN_IDS, tokenize

NETWORKS = {
    "autoencoder": Autoencoder,
    "text_encoder": TextEncoder,
    "unet": lambda: UNet(UNET),
    "segmenter": Segmenter,
    **{control_name(hint): lambda: ControlNet(UNET) for hint in HINTS},
}
LARGEST = 40_000_000


def shipped(*names: str) -> list[Path]:
    """The files of the named networks, or a skip that says which are not there yet."""
    paths = [WEIGHTS / f"{name}.safetensors" for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        pytest.skip(f"not trained yet: {', '.join(missing)}; `python dev.py lab train` makes them")
    return paths


def test_autoencoder_halves_sides_three_times():
    model = Autoencoder(8, 8)
    x = torch.rand(2, 3, 64, 32) * 2 - 1
    assert model.encode(x).shape == (2, 4, 8, 4)
    assert model.decode(model.encode(x)).shape == x.shape


def test_scaled_latents_reconstruct_the_same():
    torch.manual_seed(0)
    model = Autoencoder(8, 8)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z, y = model.encode(x), model.decode(model.encode(x))
        scale_latents(model, 3.0)
        torch.testing.assert_close(model.encode(x), 3 * z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.decode(3 * z), y, rtol=1e-4, atol=1e-5)


def test_text_encoder_reads_the_words_in_order_and_no_words_ahead():
    torch.manual_seed(0)
    model = TextEncoder().eval()
    prompts = ["a red cube on sand ground", "a red cone on sand ground", "red a cube on sand ground"]
    with torch.no_grad():
        context = model(torch.tensor([tokenize(prompt) for prompt in prompts]))
    assert context.shape == (3, 77, 64)
    same, another, swapped = context
    # Causal: up to the third word (start, a, red) nothing differs, from it on everything does.
    torch.testing.assert_close(same[:3], another[:3])
    assert (same[3:] - another[3:]).abs().amax(1).min() > 0
    assert (same[1] - swapped[1]).abs().max() > 1e-3


def test_text_encoder_has_rows_for_the_vocabulary_alone():
    model = TextEncoder()
    assert model.text_model.embeddings.token_embedding.weight.shape == (len(TOKEN_IDS) + 2, 64)
    assert model.rows[END] == ROWS.index(END) == 1
    assert "rows" not in model.state_dict()


def test_segmenter_gives_three_classes_at_full_size():
    assert Segmenter(8)(torch.rand(2, 3, 64, 32)).shape == (2, 3, 64, 32)


def test_the_unet_is_sd1_in_small():
    assert len(UNET.skip_channels) == 12
    assert UNET.residual_shapes(16, 16)[0] == (64, 16, 16)
    assert UNET.residual_shapes(16, 16)[-1] == (128, 2, 2)
    assert all(UNET.heads(channels) * 64 == channels for channels in set(UNET.skip_channels))


def test_weights_are_written_as_fp16_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zeroconv.lab.models.WEIGHTS", tmp_path / "new")
    written = Segmenter(8)
    path = save_weights(written, "judge", {"made by": "a test"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "a test"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    read = load_weights(Segmenter(8), "judge")
    assert not read.training and not any(parameter.requires_grad for parameter in read.parameters())
    for key, value in read.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, written.state_dict()[key].half().float())
    assert all(parameter.requires_grad for parameter in written.parameters())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(Segmenter(16), "judge")


@pytest.mark.weights
@pytest.mark.parametrize("name", NETWORKS)
def test_shipped_file_is_fp16_and_loads_strictly(name: str):
    (path,) = shipped(name)
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        assert {file.get_tensor(key).dtype for key in keys} == {torch.float16}
    model = load_weights(NETWORKS[name](), name)
    assert keys == set(model.state_dict())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.weights
def test_shipped_files_are_small_together():
    shipped(*NETWORKS)
    files = {path.relative_to(WEIGHTS).as_posix(): path.stat().st_size for path in WEIGHTS.rglob("*.*")}
    assert files.keys() == {f"{name}.safetensors" for name in NETWORKS}
    assert sum(files.values()) <= LARGEST


@pytest.mark.weights
def test_latents_have_sd1s_scale():
    shipped("autoencoder")
    model = load_weights(Autoencoder(), "autoencoder")
    pictures = held_out(8).images
    with torch.no_grad():
        latents = model.encode(pictures * 2 - 1)
        reconstructed = model.decode(latents) * 0.5 + 0.5
    assert (latents * LATENT_SCALE).std().item() == pytest.approx(1, abs=0.1)
    assert (reconstructed - pictures).square().mean().item() < 2.5e-3  # 26 dB


@pytest.mark.weights
def test_shipped_controls_steer_the_pictures():
    """A loose form of `dev.py lab evaluate`, on four scenes."""
    shipped(*NETWORKS)
    segmenter = load_weights(Segmenter(), "segmenter").to((model := LabModel.load()).place)
    rows = evaluate(model, segmenter, held_out(4), batch=4).rows
    assert min(rows["renders"].figure, rows["renders"].solids) >= 0.93
    assert min(rows["reconstructions"].figure, rows["reconstructions"].solids) >= 0.85
    assert rows["depth"].mean >= 0.70
    assert rows["pose"].figure >= 0.65
    assert rows["depth+pose"].mean >= 0.70 and rows["depth+pose"].figure >= 0.65
    assert rows["canny"].mean >= 0.50
    assert max(rows["none"].mean, rows["other"].mean) <= 0.50
