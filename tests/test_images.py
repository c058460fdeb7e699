"""Reading pictures: every usual kind becomes upright RGB, every unusable one a clear error."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from conceptshift.datamodules import BadImageError, images, read_image
from conceptshift.datamodules.images import image_path
from PIL import Image

# Left half dark red, right half light blue; 12 wide, 8 high.
PIXELS = np.zeros((8, 12, 3), dtype=np.uint8)
PIXELS[:, :6] = (100, 0, 0)
PIXELS[:, 6:] = (150, 200, 250)
PICTURE = Image.fromarray(PIXELS)


def gray(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(picture.convert("L").convert("RGB"))


@pytest.mark.parametrize(
    ("name", "picture", "expected"),
    [
        ("a.png", PICTURE, PIXELS),
        ("a.webp", PICTURE, PIXELS),
        ("a.jpg", PICTURE, PIXELS),
        ("gray.jpg", PICTURE.convert("L"), gray(PICTURE)),
        ("gray-alpha.png", PICTURE.convert("LA"), gray(PICTURE)),
        ("alpha.png", PICTURE.convert("RGBA"), PIXELS),
        ("palette.png", PICTURE.convert("P", palette=Image.Palette.ADAPTIVE), PIXELS),
        (
            "one-bit.png",
            PICTURE.convert("1", dither=Image.Dither.NONE),
            gray(PICTURE.convert("1", dither=Image.Dither.NONE)),
        ),
        ("cmyk.jpg", PICTURE.convert("CMYK"), PIXELS),
        ("a.gif", PICTURE, PIXELS),
        ("jpeg without a suffix", PICTURE, PIXELS),
    ],
)
def test_every_mode_becomes_rgb(name: str, picture: Image.Image, expected: object, tmp_path: Path) -> None:
    path = tmp_path / name
    lossless = {"lossless": True} if path.suffix == ".webp" else {"quality": 100, "subsampling": 0}
    picture.save(path, format=None if path.suffix else "JPEG", **lossless)
    read = read_image(path)
    assert (read.mode, read.size) == ("RGB", (12, 8))
    # Edges of the halves blur in JPEG; the middle of each half does not.
    for column in (2, 9):
        np.testing.assert_allclose(np.asarray(read)[4, column], np.asarray(expected)[4, column], atol=8)


def test_sixteen_bit_gray_keeps_its_shades(tmp_path: Path) -> None:
    values = np.repeat(np.array([[0, 32768, 65535]], dtype=np.uint16), 4, axis=0)
    Image.fromarray(values).save(tmp_path / "deep.png")
    shades = np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist()
    assert shades[0] == 0
    assert 120 <= shades[1] <= 135
    assert shades[2] == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    """A camera stores the pixels turned and says in EXIF how; what is read is always the same scene."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = PICTURE.transpose(undo[orientation]) if orientation in undo else PICTURE
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png")), PIXELS)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((100, 100), 60).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such picture"),
        (b"", "not a picture"),
        (b"<html>404 not found</html>", "not a picture"),
        (jpeg()[:3000], "truncated or damaged"),
        (png()[:3000], "truncated or damaged"),
        (png()[:40], "(truncated or damaged|not a picture)"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "(truncated or damaged|not a picture)"),
        (b"GIF89a" + bytes(3), "(truncated or damaged|not a picture)"),
    ],
)
def test_unusable_files_are_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImageError, match=rf"bad\.jpg: {reason}.*skip_bad_images=true"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """Fuzzing: whatever is wrong with a file, the error is a BadImageError or there is a picture."""
    rng = np.random.default_rng(0)
    path = tmp_path / "fuzz"
    exif = Image.Exif()
    exif[0x0112] = 6
    buffers = [jpeg(), png()]
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        PICTURE.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        buffers.append(buffer.getvalue())
    for original in buffers:
        for _ in range(60):
            damaged = bytearray(original[: rng.integers(8, len(original) + 1)])
            for place in rng.integers(4, len(damaged), size=rng.integers(0, 12)):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(BadImageError):
                assert read_image(path).mode == "RGB"


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="no such picture"):
        read_image(tmp_path)


def test_absurdly_large_pictures_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PICTURE.save(tmp_path / "large.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 95)
    monkeypatch.setattr(Image.Image, "convert", lambda *a, **k: pytest.fail("it was decoded"))
    with pytest.raises(BadImageError, match=r"large\.png: 12 x 8 pixels, more than 95;"):
        read_image(tmp_path / "large.png")


def test_exactly_the_limit_is_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    PICTURE.save(tmp_path / "large.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 96)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert read_image(tmp_path / "large.png").size == (12, 8)
    assert not list(recwarn)


def test_what_pillow_calls_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PICTURE.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImageError, match=r"bomb\.png: more than"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "a/b/../../../x.jpg"])
def test_names_that_leave_the_data_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="outside"):
        image_path(tmp_path / "data", name)


def test_links_that_leave_the_data_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    with pytest.raises(BadImageError, match="outside"):
        image_path(tmp_path / "data", "link", "x.jpg")


def test_names_inside_are_joined(tmp_path: Path) -> None:
    assert image_path(tmp_path, "train2014", "a.jpg") == tmp_path / "train2014" / "a.jpg"
    assert image_path(tmp_path, "", "x/../a.jpg").resolve() == tmp_path / "a.jpg"
