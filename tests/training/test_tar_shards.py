"""Tars of webdataset's layout as a training set: the same as a folder, whatever their names, and damage is named."""

import gzip
import io
import json
import os
import tarfile

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from functional_sd3.core import prng
from functional_sd3.formats import files
from functional_sd3.image import pixels
from functional_sd3.image.cuts import Cut
from functional_sd3.recipes import shapes
from functional_sd3.training import checkpoint, datasets, tar_shards, training_images

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")


def png(index=0, size=(6, 5)):
    buffer = io.BytesIO()
    Image.fromarray(numpy.full((size[1], size[0], 3), 7 * index % 256, numpy.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path, members, **options):
    """A tar of (name, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def captions(tars):
    return {sample.path: sample.caption for sample in tars.listing.samples}


def test_a_sample_is_what_shares_a_name_up_to_its_first_dot(tmp_path):
    members = [
        ("a/1.png", png()),
        ("a/1.txt", b"one\nred ring\n"),
        ("a/1.json", b'{"caption": "not this"}'),
        ("a/2.seg.png", png()),
        ("a/2.png", png()),
        ("a/2.json", b'{"caption": "two"}'),
        ("3.PNG", png()),
        ("3.cls", b"12\n"),
        ("4.png", png()),
        ("5.txt", b"no image"),
        ("./6.jpeg.png", png()),
    ]
    tars = tar_shards.tar_set(str(write(tmp_path / "x.tar", members)), template="class {}")
    assert captions(tars) == {"x.tar/a/1.png": "one red ring", "x.tar/a/2.png": "two", "x.tar/3.PNG": "class 12", "x.tar/4.png": ""}  # fmt: skip # noqa: E501
    assert tars.listing.sizes == ((6, 5),) * 4 and not tars.listing.skipped
    said = datasets.summary(tars.listing)
    assert "1 in .txt" in said and "000123.txt, 000123.caption" in said and "metadata" not in said
    assert set(captions(tar_shards.tar_set(str(tmp_path / "x.tar"), caption="all")).values()) == {"all"}


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.from_regex(r"(\.\./|/|[a-zé]{1,120}/)*[a-z0-9]{1,120}", fullmatch=True), st.integers(0, 9)),
        max_size=8,
    )
)
def test_members_are_read_at_their_offsets_whatever_their_names(tmp_path_factory, named):
    folder = tmp_path_factory.mktemp("named")
    distinct = dict(named)
    members = [(f"{name}.png", png(index, (1 + index, 2))) for name, index in distinct.items()]
    path = write(folder / "x.tar", [("readme", b"x" * 700), *members], format=tarfile.PAX_FORMAT)
    before = sorted(os.listdir(folder)), sorted(os.listdir(folder.parent))
    if not members:
        with pytest.raises(ValueError, match="holds no images"):
            tar_shards.tar_set(str(path))
        return
    tars = tar_shards.tar_set(str(path))
    keys = {name.removeprefix("./") for name in distinct}
    assert len(tars.places) == len(keys) and not tars.listing.skipped
    for place in tars.places:
        index = distinct[place.name.removesuffix(".png")]
        assert tar_shards.read(place).size == (1 + index, 2)
        assert numpy.array(tar_shards.read(place))[0, 0, 0] == 7 * index
    assert (sorted(os.listdir(folder)), sorted(os.listdir(folder.parent))) == before


def test_patterns_and_folders_name_tars_in_order(tmp_path):
    for number in range(3):
        write(tmp_path / "set" / f"{number:04d}.tar", [(f"{number}.png", png(number))])
    wanted = [tmp_path / "set" / f"{number:04d}.tar" for number in range(3)]
    for data in ("set/{0000..0002}.tar", "set/*.tar", "set"):
        assert tar_shards.is_tars(str(tmp_path / data)) and tar_shards.paths(str(tmp_path / data)) == wanted
    with pytest.raises(ValueError, match=r"0003.tar does not exist and 1 more of 5"):
        tar_shards.paths(str(tmp_path / "set" / "{0000..0004}.tar"))
    with pytest.raises(ValueError, match="names 0 tars"):
        tar_shards.paths(str(tmp_path / "set" / "{0004..0000}.tar"))
    with pytest.raises(ValueError, match=r"none\*.tar does not exist"):
        tar_shards.paths(str(tmp_path / "none*.tar"))
    (tmp_path / "set" / "a.png").write_bytes(png())
    assert not tar_shards.is_tars(str(tmp_path / "set")) and not tar_shards.is_tars("shapes")


def test_what_is_damaged_is_named_and_the_rest_is_used(tmp_path):
    members = [
        (f"{index}.{kind}", content) for index in range(6) for kind, content in (("png", png(index)), ("txt", b"a"))
    ]
    members[2] = ("1.png", b"no image")
    members[5] = ("2.txt", b"\xff\xfe\x00")
    members.append(("3.png", png()))
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    tars = tar_shards.tar_set(str(path))
    assert [sample.path for sample in tars.listing.samples] == [f"x.tar/{index}.png" for index in (0, 3, 4, 5)]
    said = {skip.path.removeprefix(f"{path}: "): skip.reason for skip in tars.listing.skipped}
    assert said.keys() == {"1.png", "2.png", "3.png", "9.png"}
    assert "not a readable image" in said["1.png"] and "its caption cannot be read" in said["2.png"]
    assert said["3.png"] == "is there twice; the first is used" and said["9.png"] == "is no regular file"


@pytest.mark.parametrize(
    ("damage", "kept", "said"),
    [
        (lambda content: content[: 2 * 1024 + 512 + 20], 2, "2.png: is cut off"),
        (lambda content: content[: 2 * 1024 + 100], 2, "cannot be read after 1.png: a header is damaged"),
        (lambda content: content[: 3 * 1024], 3, "cannot be read after 2.png: it ends without the mark of its end"),
        (lambda content: content[:1024] + b"?" * 512 + content[1536:], 1, "read after 0.png: a header is damaged"),
    ],
)  # fmt: skip
def test_a_tar_that_is_cut_or_overwritten_is_named_with_the_last_whole_member(tmp_path, damage, kept, said):
    path = write(tmp_path / "x.tar", [(f"{index}.png", png(index)) for index in range(5)])
    path.write_bytes(damage(path.read_bytes()))
    tars = tar_shards.tar_set(str(path))
    assert len(tars.places) == kept
    assert any(
        said in f"{skip.path}: {skip.reason}" or said in f"{skip.path} {skip.reason}" for skip in tars.listing.skipped
    )


def test_other_files_are_refused_by_name(tmp_path):
    path = write(tmp_path / "x.tar", [("0.png", png())])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x.tar.gz is compressed \(gzip\).*: decompress it \(gunzip\)"):
        tar_shards.tar_set(str(tmp_path / "x.tar.gz"))
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="holds no images .*y.tar: cannot be read after its beginning: invalid header"):
        tar_shards.tar_set(str(tmp_path / "y.tar"))
    (place,) = tar_shards.tar_set(str(path)).places
    path.write_bytes(path.read_bytes()[:530])
    with pytest.raises(ValueError, match="x.tar: 0.png: is cut off"):
        tar_shards.read(place)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same images in a folder, and in two tars."""
    top = tmp_path_factory.mktemp("both")
    drawn, texts = shapes.images(prng.key(3), 9)
    members = []
    for index, (image, text) in enumerate(zip(pixels.to_pil(pixels.from_bytes(drawn)), texts, strict=True)):
        (top / "folder").mkdir(exist_ok=True)
        image.save(top / "folder" / f"{index}.png")
        (top / "folder" / f"{index}.json").write_text(json.dumps({"text": text}))
        members.append(
            [(f"{index}.{kind}", (top / "folder" / f"{index}.{kind}").read_bytes()) for kind in ("png", "json")]
        )
    for number, some in enumerate((members[:5], members[5:])):
        write(top / "tars" / f"{number:03d}.tar", [member for sample in some for member in sample])
    return top


def test_tars_are_trained_on_as_a_folder_is_and_resumed_to_the_bit(command, both, tmp_path):
    folder = training_images.folder_images(datasets.image_folder(both / "folder"), 16)
    tars = training_images.tar_images(tar_shards.tar_set(str(both / "tars")), 16)
    assert tars.captions == folder.captions and torch.equal(tars.load(range(9)), folder.load(range(9)))
    assert torch.equal(tars.cut(4, Cut(16, 8, mirrored=True)), folder.cut(4, Cut(16, 8, mirrored=True)))
    pattern = both / "tars" / "{000..001}.tar"
    constant = ["--schedule", "constant"]
    for name, data in (("folder", both / "folder"), ("tars", pattern)):
        assert command("--out", tmp_path / name, "--data", data, *constant)[0] == 0
    assert command("--out", tmp_path / "cut", "--data", pattern, *constant, "--steps", 2)[0] == 0
    assert "resuming at step 2" in command("--out", tmp_path / "cut", "--data", both / "tars", *constant, "--resume")[1]
    states = []
    for name in ("folder", "tars", "cut"):
        file = files.open_mapped(checkpoint.paths(tmp_path / name / "checkpoints")[-1])
        states.append({each: files.tensor(file, each) for each in file.header.tensors})
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def test_other_bytes_in_a_tar_are_other_data(command, both, tmp_path):
    pattern = str(both / "tars")
    assert command("--out", tmp_path / "out", "--data", pattern, "--steps", 2)[0] == 0
    one = write(tmp_path / "other" / "000.tar", [("0.png", png()), ("0.txt", b"a red ring")])
    with pytest.raises(ValueError, match="the contents of the data changed"):
        command("--out", tmp_path / "out", "--data", one, "--resume")


@pytest.mark.parametrize(
    ("words", "said"), [(["--follow"], "--follow is for a folder"), (["--masks", "."], "--masks is for a folder")]
)
def test_options_of_folders_are_refused_with_tars(command, both, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        command("--out", tmp_path / "out", "--data", both / "tars", *words)
