"""Masks as tools write them become class numbers; what cannot be a mask is refused with the name of its file."""

import numpy as np
import pytest

from fastseg.training import masks

Image = pytest.importorskip("PIL.Image")

LABELS = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)


def form(count=3, **options):
    return masks.MaskFormat(tuple(f"class {k}" for k in range(count)), 255, **options)


def two_bits(path):
    """A greyscale PNG with 2 bits per pixel, which Pillow can read and not write."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(bytes([0, sum(int(v) << (6 - 2 * column) for column, v in enumerate(row)) & 255]) for row in LABELS)
    header = struct.pack(">IIBBBBB", 3, 2, 2, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def palette(path):
    image = Image.fromarray(LABELS)
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    image.save(path)


WRITERS = {
    "8 bits": lambda path: Image.fromarray(LABELS).save(path),
    "16 bits": lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path),
    "2 bits": two_bits,
    "palette": palette,
    "equal channels": lambda path: Image.fromarray(LABELS[..., None].repeat(3, 2)).save(path),
    "equal channels, opaque": lambda path: Image.fromarray(LABELS[..., None].repeat(3, 2)).convert("RGBA").save(path),
    "grey and alpha": lambda path: Image.merge("LA", [Image.fromarray(LABELS), Image.new("L", (3, 2), 255)]).save(path),
    "32 bits": lambda path: Image.fromarray(LABELS.astype(np.int32)).save(path, format="TIFF"),
    "floats": lambda path: Image.fromarray(LABELS.astype(np.float32)).save(path, format="TIFF"),
    "bitmap": lambda path: Image.fromarray(LABELS).save(path, format="BMP"),
    "gif": lambda path: Image.fromarray(LABELS).save(path, format="GIF"),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_mask_with_class_numbers_is_read(write, tmp_path):
    write(tmp_path / "mask.png")
    read = form().read(tmp_path / "mask.png")
    assert read.dtype == np.int64 and read.tolist() == LABELS.tolist()


def test_two_bits_are_what_pillow_spreads(tmp_path):
    two_bits(tmp_path / "mask.png")
    assert np.unique(np.asarray(Image.open(tmp_path / "mask.png"))).tolist() == [0, 85, 170]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_black_and_white_masks_have_two_classes(mode, tmp_path):
    wanted = np.array([[0, 1, 1], [0, 0, 1]])
    Image.fromarray((wanted * 255).astype(np.uint8)).convert(mode).save(tmp_path / "mask.png")
    two = masks.MaskFormat(("ground", "figure"), 7)
    assert two.read(tmp_path / "mask.png").tolist() == wanted.tolist()
    if mode != "1":
        with pytest.raises(ValueError, match="has the label 255: labels must be 0 to 2, or 7"):
            masks.MaskFormat(("a", "b", "c"), 7).read(tmp_path / "mask.png")
        assert form(2).read(tmp_path / "mask.png").max() == 255  # ignored: the user's ignore_index comes first
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="has the label 255"):
        two.read(tmp_path / "mask.png")


def lossy(path):
    Image.fromarray(LABELS).save(path, format="JPEG")


def transparent(path):
    Image.merge("LA", [Image.fromarray(LABELS), Image.new("L", (3, 2), 128)]).save(path)


def broken_floats(path):
    Image.fromarray(LABELS + np.float32(0.5)).save(path, format="TIFF")


def deep_colour(path):
    """A PNG with three channels of 16 bits, of which Pillow reads the upper 8: all labels would be 0."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"\0" + struct.pack(">3H", 2, 2, 2)
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))


REFUSED = {
    "lossy": (lossy, "must not be a JPEG file, which changes labels"),
    "transparent": (transparent, "must be opaque, but has pixels with an alpha of 128"),
    "colours": (
        lambda path: Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)).save(path),
        "is in colour: name the class of each colour in a file",
    ),
    "halves": (broken_floats, "has numbers that are not whole"),
    "deep colour": (deep_colour, "must have one channel, because it has 16 bits per channel"),
    "other": (lambda path: Image.new("CMYK", (3, 2)).save(path, format="TIFF"), "but has Pillow's mode CMYK"),
    "label": (lambda path: Image.fromarray(LABELS + np.uint16(300)).save(path), "has the label 300: labels must be 0"),
}


@pytest.mark.parametrize("write, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_mask_is_refused_by_name(write, message, tmp_path):
    write(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=f"mask.png .*{message}"):
        form().read(tmp_path / "mask.png")


TABLES = {
    "camvid": "128 128 128\tSky\n0 128 64\tBuilding\n0 0 0\tVoid\n",
    "comma": "name,r,g,b\nSky,128,128,128\nBuilding,0,128,64\nVoid,0,0,0\n",
    "name behind": "# colours\n128, 128, 128, Sky\n\n0, 128, 64, Building\n0, 0, 0, void\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_colour_coded_masks_are_read_by_a_table(text, tmp_path):
    (tmp_path / "colours.txt").write_text(text)
    table = masks.read_colour_table(tmp_path / "colours.txt")
    assert table.classes == ("Sky", "Building")
    drawn = np.array([[[128, 128, 128], [0, 128, 64]], [[0, 0, 0], [128, 128, 128]]], np.uint8)
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    read = masks.MaskFormat(table.classes, 11, table=table)
    assert read.read(tmp_path / "mask.png").tolist() == [[0, 1], [11, 0]]
    Image.fromarray(drawn).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "mask.png")
    assert read.read(tmp_path / "mask.png").tolist() == [[0, 1], [11, 0]]
    drawn[1, 0] = 1, 2, 3
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png has the colour \(1, 2, 3\) in row 1, column 0, .* the 3 colours"):
        read.read(tmp_path / "mask.png")


def test_several_colours_have_one_class_and_mistakes_are_named_by_line(tmp_path):
    path = tmp_path / "colours.txt"
    path.write_text("1 1 1 Car\n2 2 2 Road\n3 3 3 Car\n")
    assert masks.read_colour_table(path).colours == {(1, 1, 1): 0, (2, 2, 2): 1, (3, 3, 3): 0}
    for text, message in (
        ("1 1 1 Car\n1 1 Road", "line 2, must be a colour, three numbers"),
        ("1 1 256 Car", "line 1, must be a colour"),
        ("1 1 1", "line 1, must be a colour"),
        ("1 1 1 Car\n1 1 1 Road", r"line 2, gives the colour \(1, 1, 1\) a second class, Road"),
        ("1 1 1 void", "must name at least one class"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            masks.read_colour_table(path)


# --- EXIF ------------------------------------------------------------------------------------------------------------


def photograph(folder, turned, mask_turned, mask_upright):
    """A picture of 2x3 pixels, stored lying if `turned`, and its mask, upright or as the picture is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright = np.array([[0, 1], [2, 1], [0, 0]], np.uint8)
    lying = np.rot90(upright)
    Image.fromarray((lying if turned else upright)[..., None].repeat(3, 2) * 50).save(
        folder / "frame.png", exif=exif if turned else None
    )
    Image.fromarray(np.ascontiguousarray(upright if mask_upright else lying)).save(
        folder / "mask.png", exif=exif if mask_turned else None
    )
    return folder / "frame.png", folder / "mask.png", upright


@pytest.mark.parametrize("mask_turned, mask_upright", [(True, False), (False, True)])
def test_pictures_and_masks_are_turned_as_their_tags_say(mask_turned, mask_upright, tmp_path):
    frame, mask, upright = photograph(tmp_path, True, mask_turned, mask_upright)
    pair = masks.read_pair(frame, mask, form())
    assert pair.labels.tolist() == upright.tolist() and pair.image.size == (2, 3)
    assert (np.asarray(pair.image)[..., 0] == 50 * pair.labels).all()
    assert pair.turned and pair.mask_turned == mask_turned


def test_a_mask_drawn_on_the_stored_picture_needs_a_choice(tmp_path):
    frame, mask, upright = photograph(tmp_path, True, False, False)
    with pytest.raises(ValueError, match=r"must be as large as its image, 2x3, but is 3x2: it fits .* --exif stored"):
        masks.read_pair(frame, mask, form())
    pair = masks.read_pair(frame, mask, form(exif="stored"))
    assert pair.labels.tolist() == np.rot90(upright).tolist()
    assert (np.asarray(pair.image)[..., 0] == 50 * pair.labels).all()
